"""Store a model's weights in another format, in place, on the CPU."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from griffin.layouts import FFBlock, decoder_layers, find_ff_blocks
from griffin.native import library, memory, operands, packing
from griffin.weights.neuron_major import make_neuron_major
from griffin.weights.projection import is_plain, rows
from griffin.weights.quantised import FLOATS, WEIGHTS, QuantisedLinear


def convert(model: nn.Module, weights: str) -> None:
    """Store a Transformers model's weights in another format, in place, on the CPU.

    int8, int4: the Linears (and Conv1Ds) of all decoder layers and the output embeddings become `QuantisedLinear`s; an
    FF block's neuron has its gate, up and down row in one record. Embeddings and norms stay as they are, also an
    embedding that is tied to the output: the output gets a packed matrix of its own, which takes that much more memory
    and spares reading the wide one for every token. bf16, f32: all parameters are converted, and the FF blocks' output
    projections stored neuron-major, so that `griffin.attach` finds them so.

    Raises:
        ValueError: an unknown format, a model that is not on the CPU or already quantised, projections that are not
            plain Linears, GRIFFIN attached. The model is then as it was.
    """
    _replace(model, weights, fill=True)


def prepare(model: nn.Module, weights: str) -> None:
    """What `convert` does, but the packed weights are left uninitialised, for `load_state_dict` to fill."""
    _replace(model, weights, fill=False)


@torch.no_grad()
def _replace(model: nn.Module, weights: str, *, fill: bool) -> None:
    if weights not in WEIGHTS:
        raise ValueError(f"weights is {weights!r}; expected one of {', '.join(WEIGHTS)}")
    if quantised := next((module.format for module in model.modules() if isinstance(module, QuantisedLinear)), None):
        raise ValueError(f"the model has {quantised} weights already; load it again for other ones")
    if other := next((p.device for p in model.parameters() if p.device.type != "cpu"), None):
        raise ValueError(f"the model is on {other}; weight formats are for the CPU: load it with device='cpu'")
    blocks = find_ff_blocks(model)
    if weights in FLOATS:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(FLOATS[weights])  # not the buffers: rotary frequencies stay float32
        kept = ExitStack()  # never closed: the storage stays
        for block in blocks:
            make_neuron_major(block.output, block.path, kept)
        return
    if (reason := library.why_not()) is not None:
        raise ValueError(f"weights={weights!r} needs the native library: {reason}")
    others = _projections(model, blocks)
    for block in blocks:
        _replace_block(block, weights, fill)
    for parent, name, projection in others:
        weight, bias = rows(projection)
        packed, scales = _packed([weight], weights, fill)
        setattr(parent, name, QuantisedLinear(packed[None], _row(scales), length=weight.shape[1], bias=bias))


def _projections(model: nn.Module, blocks: list[FFBlock]) -> list[tuple[nn.Module, str, nn.Module]]:
    """Parent, name and module of what is replaced beside the FF blocks; the whole model is checked."""
    in_blocks = {id(projection) for block in blocks for projection in (*block.inputs, block.output)}
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    layers = decoder_layers(model)[1]
    wanted = {id(module) for module in layers.modules()} | {id(head)}
    projections = []
    for parent in model.modules():
        for name, module in parent.named_children():
            if id(module) not in wanted:
                continue
            if "forward" in vars(module):
                raise ValueError(f"{name} is patched: GRIFFIN is attached to this model; call detach() first")
            if is_plain(module):
                if id(module) not in in_blocks:
                    projections.append((parent, name, module))
            elif module is head or isinstance(module, nn.Linear) or "Linear" in type(module).__name__:
                raise ValueError(
                    f"{name} is a {type(module).__module__}.{type(module).__name__}, not a plain Linear or Conv1D of "
                    "floating-point weights; load the model unquantised and without adapters"
                )
    return projections


def _replace_block(block: FFBlock, weights: str, fill: bool) -> None:
    inputs = block.input_weights()
    down, out_bias = rows(block.output)
    records, scales = _packed([*inputs, down.t()], weights, fill)
    d_ff, d, n = block.width, down.shape[0], len(inputs) + 1
    by_part = records.view(d_ff, n, -1).transpose(0, 1)  # (n, D_ff, bytes of a row)
    scales_by_part = None if scales is None else scales.t()
    each = n - 1 if block.layout.fused else 1
    for i, (name, projection) in enumerate(zip(block.layout.inputs, block.inputs, strict=True)):
        part = slice(i * each, (i + 1) * each)
        part_scales = None if scales_by_part is None else scales_by_part[part]
        setattr(block.module, name, QuantisedLinear(by_part[part], part_scales, length=d, bias=rows(projection)[1]))
    part_scales = None if scales_by_part is None else scales_by_part[n - 1 :]
    output = QuantisedLinear(by_part[n - 1 :], part_scales, length=d, bias=out_bias, transposed=True)
    setattr(block.module, block.layout.output, output)


def _packed(parts: list[Tensor], weights: str, fill: bool) -> tuple[Tensor, Tensor | None]:
    """Records (n, bytes) of the parts' rows, one after the other, and for int8 their scales (n, number of parts)."""
    n, d = parts[0].shape
    if not fill:
        records = torch.empty(n, len(parts) * packing.row_bytes(weights, d), dtype=torch.uint8)
        memory.advise_huge(records)
        return records, torch.empty(n, len(parts)) if weights == "int8" else None
    if len(parts) == 1:
        tensors = operands.quantise_matrix(parts[0], format=weights).tensors
        return tensors[0], tensors[1][:, None] if weights == "int8" else None
    gate, up, down = (None, *parts) if len(parts) == 2 else parts
    assert up is not None
    assert down is not None
    tensors = operands.quantise_ff(gate, up, down, format=weights, activation="relu").tensors  # which is not kept
    return tensors[0], tensors[1] if weights == "int8" else None


def _row(scales: Tensor | None) -> Tensor | None:
    return None if scales is None else scales.t()
