"""Store a model's weights in another format, in place, on the CPU."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import nn

from griffin.layouts import FFBlock, decoder_layers, find_ff_blocks
from griffin.native import grouped, library
from griffin.weights.neuron_major import make_neuron_major
from griffin.weights.projection import is_plain, rows
from griffin.weights.quantised import FLOATS, WEIGHTS, QuantisedLinear, forget_ties, quantised_format


@torch.no_grad()
def convert(model: nn.Module, weights: str) -> None:
    """Store a Transformers model's float weights in another format, in place, on the CPU.

    int8, int4: the Linears (and Conv1Ds) of all decoder layers and the output embeddings become `QuantisedLinear`s, an
    FF block's output projection neuron-major. Embeddings and norms stay as they are, also an embedding that is tied to
    the
    output: the output gets a packed matrix of its own, which takes that much more memory and spares reading the wide
    one for every token. bf16, f32: all parameters are converted, and the FF blocks' output projections stored
    neuron-major, so that `griffin.attach` finds them so.

    Raises:
        ValueError: an unknown format, a model that is not on the CPU or already quantised, projections that are not
            plain Linears, GRIFFIN attached. The model is then as it was.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights is {weights!r}; expected one of {', '.join(WEIGHTS)}")
    if quantised := quantised_format(model):
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
        for name, projection in zip(block.layout.inputs, block.inputs, strict=True):
            weight, bias = rows(projection)
            parts = [grouped.quantise(part, weights) for part in weight.chunk(2 if block.layout.fused else 1)]
            setattr(block.module, name, QuantisedLinear(parts, bias))
        weight, bias = rows(block.output)
        packed = grouped.quantise(weight, weights, neuron_major=True)
        setattr(block.module, block.layout.output, QuantisedLinear([packed], bias))
    for parent, name, projection in others:
        weight, bias = rows(projection)
        setattr(parent, name, QuantisedLinear([grouped.quantise(weight, weights)], bias))
    forget_ties(model)


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
