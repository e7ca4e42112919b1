"""Weights in 8 or 4 bits: every projection of the decoder's layers and the output embeddings, in place, on the CPU.

The formats are the native library's (`griffin_native.h`). A few rows of input are multiplied where the packed weights
lie; a prompt goes through torch's own GEMM, over blocks dequantised into one small buffer (`wide.multiply`), so that it
runs at the speed of the fastest dtype here and no whole copy of a weight ever exists.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from griffin.backends import kernel, library, memory, operands, packing, wide
from griffin.backends.neuron_major import make_neuron_major
from griffin.layouts import FFBlock, decoder_layers, find_ff_blocks, is_plain, rows

FLOATS = {"bf16": torch.bfloat16, "f32": torch.float32}
QUANTISED = ("int8", "int4")
WEIGHTS = (*FLOATS, *QUANTISED)


class QuantisedLinear(nn.Module):
    """`y = x W^T + b` over packed rows of `W`, for inference.

    Args:
        packed: (P, n, bytes of a row) uint8, rows contiguous. P is 1, or 2 for a fused gate and up (the gate's rows
            come first in the output). It may be a view into the records of an FF block.
        scales: int8: (P, n) float32, a scale a row. None says int4.
        length: weights in a row.
        bias: (out_features,) or None; kept as it is.
        transposed: a row holds the weights of one input instead of one output (neuron-major: the output projection of
            an FF block). Its forward always dequantises: in the generation phase the native FF call reads the records
            itself, so this one serves the prompt phase and density 1.0 only.
    """

    packed: Tensor
    scales: Tensor | None
    bias: Tensor | None

    def __init__(
        self, packed: Tensor, scales: Tensor | None, *, length: int, bias: Tensor | None, transposed: bool = False
    ) -> None:
        super().__init__()
        n = packed.shape[0] * packed.shape[1]
        if transposed and packed.shape[0] != 1:
            raise ValueError(f"packed has {packed.shape[0]} parts; a transposed projection has one")
        self.in_features, self.out_features = (n, length) if transposed else (length, n)
        self.format = "int4" if scales is None else "int8"
        self.transposed = transposed
        self._length = length
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self._matrices: list[operands.Matrix] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the packed rows and their scales."""
        return self.packed.numel() + (0 if self.scales is None else 4 * self.scales.numel())

    def matrices(self) -> list[operands.Matrix]:
        """The parts as the native library sees them, rows of W; biases are in them."""
        if self.transposed:
            raise ValueError("the rows of a transposed projection belong to its inputs: it is no matrix of the library")
        if self._matrices is None:
            biases = [None] * len(self.packed) if self.bias is None else list(self.bias.chunk(len(self.packed)))
            self._matrices = [
                operands.matrix_rows(part, self._scales(p), d_in=self.in_features, bias=biases[p])
                for p, part in enumerate(self.packed)
            ]
        return self._matrices

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (..., in_features); returns (..., out_features) of the same dtype."""
        flat = x.reshape(-1, self.in_features)
        if flat.dtype not in FLOATS.values():
            flat = flat.float()  # float16, which the library's inputs are not
        out = flat.new_empty(flat.shape[0], self.out_features)
        if 1 <= flat.shape[0] <= kernel.MAX_ROWS and not self.transposed:
            at = 0
            for matrix in self.matrices():
                kernel.matvec(matrix, flat, out=out[:, at : at + matrix.d_out])
                at += matrix.d_out
        else:
            self._unpacked(flat.to(wide.product_dtype(flat.dtype)), out)
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _unpacked(self, x: Tensor, out: Tensor) -> None:
        """out = x W^T + bias, over blocks that are dequantised to the dtype of x."""
        parts = len(self.packed)
        biases = [None] * parts if self.bias is None else list(self.bias.chunk(parts))
        for part, target, bias in zip(range(parts), out.chunk(parts, dim=1), biases, strict=True):
            rows, scales = self.packed[part], self._scales(part)

            def read(begin: int, block: Tensor, rows: Tensor = rows, scales: Tensor | None = scales) -> None:
                if self.transposed:
                    packing.unpack_rows(rows, scales, block, d=self._length, begin=begin)
                else:
                    own = slice(begin, begin + block.shape[0])
                    own_scales = None if scales is None else scales[own]
                    packing.unpack_rows(rows[own], own_scales, block, d=self._length)

            wide.multiply(x, read, target, bias=bias, transposed=self.transposed)

    @torch.no_grad()
    def dequantised(self, indices: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """The rows as numbers, or of every part those at `indices`: for tests and the reference backend.

        Shapes: indices (k,); returns (P * k, length), which is `W`, or `W^T` if `transposed`.
        """
        parts = []
        for p, part in enumerate(self.packed):
            block, scales = part, self._scales(p)
            if indices is not None:
                block, scales = part[indices], None if scales is None else scales[indices]
            out = torch.empty(block.shape[0], self._length, dtype=dtype if dtype in FLOATS.values() else torch.float32)
            parts.append(packing.unpack_rows(block, scales, out, d=self._length).to(dtype))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    @torch.no_grad()
    def row_norms(self) -> list[Tensor]:
        """L2 norm of every row, a tensor (n,) of float32 a part. Dequantises a block at a time."""
        norms, step = [], max(1, wide.BLOCK_VALUES // self._length)
        for p, part in enumerate(self.packed):
            scales, own = self._scales(p), []
            for at in range(0, part.shape[0], step):
                block = part[at : at + step]
                out = torch.empty(block.shape[0], self._length)
                packing.unpack_rows(block, None if scales is None else scales[at : at + step], out, d=self._length)
                own.append(torch.linalg.vector_norm(out, dim=1))
            norms.append(torch.cat(own))
        return norms

    def reset(self) -> None:
        """Forget what was derived from the bias and the scales, after they have changed."""
        self._matrices = None

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        kind = ", neuron-major" if self.transposed else ""
        return f"{self.in_features}, {self.out_features}, {self.format}, bias={self.bias is not None}{kind}"

    def _scales(self, part: int) -> Tensor | None:
        return None if self.scales is None else self.scales[part]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantisedLinear:
        """`model.to(dtype)` is for the bias: packed rows and their scales stay what and where they are."""
        if (device := fn(torch.empty(0)).device).type != "cpu":
            raise ValueError(f"{self.format} weights are for the CPU and cannot go to {device}; load without weights=")
        self._matrices = None
        if self.bias is not None:
            self.bias.data = fn(self.bias.data)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        self._matrices = None  # they hold copies of biases and scales
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_matrices": None}  # addresses are of this process


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
            make_neuron_major(block, kept)
        return
    if (reason := library.available()) is not None:
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
    found = []
    for parent in model.modules():
        for name, module in parent.named_children():
            if id(module) not in wanted:
                continue
            if "forward" in vars(module):
                raise ValueError(f"{name} is patched: GRIFFIN is attached to this model; call detach() first")
            if is_plain(module):
                if id(module) not in in_blocks:
                    found.append((parent, name, module))
            elif module is head or isinstance(module, nn.Linear) or "Linear" in type(module).__name__:
                raise ValueError(
                    f"{name} is a {type(module).__module__}.{type(module).__name__}, not a plain Linear or Conv1D of "
                    "floating-point weights; load the model unquantised and without adapters"
                )
    return found


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
        own = None if scales_by_part is None else scales_by_part[part]
        setattr(block.module, name, QuantisedLinear(by_part[part], own, length=d, bias=rows(projection)[1]))
    own = None if scales_by_part is None else scales_by_part[n - 1 :]
    output = QuantisedLinear(by_part[n - 1 :], own, length=d, bias=out_bias, transposed=True)
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


def ff_records(block: FFBlock) -> tuple[Tensor, Tensor | None]:
    """The records that an FF block's projections are views into, and int8's scales, for `operands.ff_records`.

    Shapes: (D_ff, bytes of a record) uint8; (D_ff, 3), or 2 ungated, float32.

    Raises:
        ValueError: the projections do not lie in one record, as after somebody replaced one of them.
    """
    projections = (*block.inputs, block.output)
    packed = [part for projection in projections for part in projection.packed]  # type: ignore[union-attr]
    first, (d_ff, row) = packed[0], packed[0].shape
    record = row * len(packed)
    addresses = [part.data_ptr() - first.data_ptr() for part in packed]
    if addresses != [i * row for i in range(len(packed))] or any(part.stride() != (record, 1) for part in packed):
        raise ValueError(f"{block.path}: gate, up and down do not lie in one record; load or convert the model again")
    records = first.as_strided((d_ff, record), (record, 1))
    own = block.inputs[0].scales
    return records, own[0].as_strided((d_ff, len(packed)), (len(packed), 1)) if isinstance(own, Tensor) else None
