"""What the kernel computes on: feedforward blocks and matrices, described to the native library where they lie.

Words: D model width, D_ff feedforward width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from griffin.native import abi, library, memory, packing

_FLOAT_FORMATS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclass(frozen=True)
class Block:
    """One feedforward block as the library sees it; keeps its tensors alive. Made by `ff_block` or `quantise_ff`."""

    d_model: int
    d_ff: int
    format: str
    gated: bool
    weight_bytes: int
    """of gate, up and down, scales included: what a dense call reads"""
    struct: Any = field(repr=False)
    tensors: tuple[Tensor, ...] = field(repr=False)


@dataclass(frozen=True)
class Matrix:
    """One matrix (out, in) as the library sees it. Make one by `matrix` or `quantise_matrix`."""

    d_in: int
    d_out: int
    format: str
    weight_bytes: int
    struct: Any = field(repr=False)
    tensors: tuple[Tensor, ...] = field(repr=False)


@dataclass(frozen=True)
class Dynamic:
    """Dynamic neuron selection as the library sees it. Make one by `dynamic`."""

    k: int
    struct: Any = field(repr=False)
    kept: tuple[Any, ...] = field(repr=False)


class Biases(TypedDict, total=False):
    """A block's biases, each None or left out if there is none; copied to float32 if they are not.

    Shapes:
        gate_bias, up_bias: (D_ff,); out_bias: (D,)
    """

    gate_bias: Tensor | None
    up_bias: Tensor | None
    out_bias: Tensor | None


# -- blocks --------------------------------------------------------------


def ff_block(gate: Tensor | None, up: Tensor, down: Tensor, *, activation: str, **biases: Unpack[Biases]) -> Block:
    """A block over float weights, read where they are.

    Shapes:
        gate, up: (D_ff, D), rows contiguous; gate None: ungated
        down: (D_ff, D), neuron-major, rows contiguous: `down_proj.weight.T` of a transposed storage

    Raises ValueError for other shapes, dtypes (float32, bfloat16, float16; all alike) or strides.
    """
    format = _float_format("up", up)
    parts = {"gate": gate, "up": up, "down": down}
    given = {name: part for name, part in parts.items() if part is not None}
    for name, part in given.items():
        packing.check_rows(name, part, up.shape, up.dtype)
    weights = tuple(given.values())
    return _block(format, up.shape[1], weights, (), weights, activation, **biases)


def quantise_ff(
    gate: Tensor | None, up: Tensor, down: Tensor, *, format: str, activation: str, **biases: Unpack[Biases]
) -> Block:
    """A block of int8 or int4 weights, quantised from float ones of any dtype (shapes as in `ff_block`).

    A neuron's gate, up and down rows follow one another in one record: `tensors[0]` is (D_ff, record bytes) uint8, and
    for int8 `tensors[1]` is (D_ff, 3 or 2) float32, the rows' scales. int4's are in the rows (float16, groups of 32).
    """
    parts = [part for part in (gate, up, down) if part is not None]
    for part in parts:
        if part.shape != up.shape or part.dim() != 2:
            raise ValueError(f"shapes {[tuple(p.shape) for p in parts]}: expected all (D_ff, D)")
    d_ff, d = up.shape
    row_bytes, n = packing.row_bytes(format, d), len(parts)
    records = torch.empty(d_ff, n * row_bytes, dtype=torch.uint8)
    memory.advise_huge(records)
    scales = torch.ones(d_ff, n, dtype=torch.float32) if format == "int8" else None
    for i, part in enumerate(parts):
        packing.pack(format, part, records[:, i * row_bytes :], scales[:, i:] if scales is not None else None)
    return ff_records(records, scales, d_model=d, gated=gate is not None, activation=activation, **biases)


def ff_records(
    records: Tensor, scales: Tensor | None, *, d_model: int, gated: bool, activation: str, **biases: Unpack[Biases]
) -> Block:
    """A block over records that were quantised before (`quantise_ff(...).tensors`), read where they are.

    Shapes:
        records: (D_ff, bytes of a record) uint8: gate, up and down row of a neuron, without gate if not `gated`
        scales: int8: (D_ff, 3), or 2 if not gated, float32; None says int4
    """
    d_ff, n = records.shape[0], 3 if gated else 2
    format = "int4" if scales is None else "int8"
    row_bytes = packing.row_bytes(format, d_model)
    packing.check_rows("records", records, torch.Size((d_ff, n * row_bytes)), torch.uint8)
    parts = torch.split(records, row_bytes, 1)
    if scales is None:
        return _block(format, d_model, parts, (), (records,), activation, **biases)
    if not scales.is_contiguous():
        raise ValueError("scales: expected a contiguous tensor")
    packing.check_rows("scales", scales, torch.Size((d_ff, n)), torch.float32)
    return _block(format, d_model, parts, scales.unbind(1), (records, scales), activation, **biases)


def _block(
    format: str,
    d: int,
    parts: Sequence[Tensor],
    scales: Sequence[Tensor],
    data: tuple[Tensor, ...],
    activation: str,
    *,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    out_bias: Tensor | None = None,
) -> Block:
    """A block over checked weights.

    Args:
        parts: the rows of gate, up and down, or of up and down
        scales: int8: one for each part, views into one tensor
        data: the tensors that parts and scales are views into, to be kept alive
    """
    d_ff, names = len(parts[0]), ("gate", "up", "down")[-len(parts) :]
    biases = _bias("gate_bias", gate_bias, d_ff), _bias("up_bias", up_bias, d_ff), _bias("out_bias", out_bias, d)
    struct = abi.BlockStruct(d, d_ff, abi.FORMATS.index(format), _activation(activation))
    for name, part in zip(names, parts, strict=True):
        setattr(struct, name, part.data_ptr())
        setattr(struct, f"{name}_stride", part.stride(0) * part.element_size())
    for name, scale in zip(names, scales, strict=False):  # none, but for int8
        setattr(struct, f"{name}_scale", scale.data_ptr())
        struct.scale_stride = scale.stride(0) * scale.element_size()
    struct.gate_bias, struct.up_bias, struct.out_bias = map(library.address, biases)
    kept = data + tuple(bias for bias in biases if bias is not None)
    return Block(d, d_ff, format, len(parts) == 3, sum(t.nbytes for t in data), struct, kept)


def _activation(name: str) -> int:
    if name not in abi.ACTIVATIONS:
        raise ValueError(f"activation {name!r}: expected one of {', '.join(abi.ACTIVATIONS)}")
    return abi.ACTIVATIONS.index(name)


# -- matrices --------------------------------------------------------------


def matrix(weight: Tensor, bias: Tensor | None = None) -> Matrix:
    """A float matrix (out, in) with contiguous rows, read where it is. Raises ValueError as `ff_block` does."""
    format = _float_format("weight", weight)
    packing.check_rows("weight", weight, weight.shape, weight.dtype)
    return _matrix(format, weight.shape[1], weight, None, bias)


def quantise_matrix(weight: Tensor, *, format: str, bias: Tensor | None = None) -> Matrix:
    """An int8 (a scale a row) or int4 (groups of 32) matrix from float weights (out, in); `tensors[0]` has the rows."""
    d_out, d_in = weight.shape
    rows = torch.empty(d_out, packing.row_bytes(format, d_in), dtype=torch.uint8)
    memory.advise_huge(rows)
    scale = torch.ones(d_out, dtype=torch.float32) if format == "int8" else None
    packing.pack(format, weight, rows, scale)
    return _matrix(format, d_in, rows, scale, bias)


def matrix_rows(rows: Tensor, scale: Tensor | None, *, d_in: int, bias: Tensor | None = None) -> Matrix:
    """A matrix over rows that were quantised before, read where they are; scales that are not contiguous are copied.

    Shapes:
        rows: (out, bytes of a row) uint8, rows contiguous, at any stride (a part of a neuron's record)
        scale: int8: (out,) float32; None says int4
    """
    d_out, format = rows.shape[0], "int4" if scale is None else "int8"
    packing.check_rows("rows", rows, torch.Size((d_out, packing.row_bytes(format, d_in))), torch.uint8)
    if scale is not None:
        if scale.shape != (d_out,) or scale.dtype != torch.float32:
            raise ValueError(f"scale: {tuple(scale.shape)} {scale.dtype}, expected ({d_out},) float32")
        scale = scale.contiguous()
    return _matrix(format, d_in, rows, scale, bias)


def _matrix(format: str, d_in: int, rows: Tensor, scale: Tensor | None, bias: Tensor | None) -> Matrix:
    """A matrix over checked rows, float or quantised."""
    d_out, stride = len(rows), rows.stride(0) * rows.element_size()
    bias = _bias("bias", bias, d_out)
    struct = abi.MatrixStruct(
        d_in, d_out, abi.FORMATS.index(format), 0, rows.data_ptr(), stride, library.address(scale),
        library.address(bias),
    )  # fmt: skip
    data = (rows,) if scale is None else (rows, scale)
    kept = data if bias is None else (*data, bias)
    return Matrix(d_in, d_out, format, sum(t.nbytes for t in data), struct, kept)


# -- dynamic neuron selection --------------------------------------------------------------


def dynamic(block: Block, weight: Tensor, k: int, *, gate: Matrix | None = None) -> Dynamic:
    """Compute, for each token, up and down only for the k experts with the largest scores `|act(gate)| * weight`.

    In a block without a gate, up takes its place: it is computed for all experts, and down for the k. Relatives are
    TEAL and CATS, which threshold activations; here the k largest gate scores of a token are chosen.

    Args:
        block: the block.
        weight: factors of the scores, not negative.
        k: experts of a token.
        gate: the gate in another format, read in place of the block's; its bias is still the block's.

    Shapes:
        weight: (D_ff,), or (B, D_ff) with one row for each row of input; float32
        gate: (D_ff, D)

    Raises ValueError for other shapes or dtypes, or a k outside of 1..D_ff.
    """
    rows = weight.contiguous() if weight.dim() == 2 else weight.contiguous()[None]
    if rows.dim() != 2 or rows.shape[1] != block.d_ff or rows.dtype != torch.float32 or rows.device.type != "cpu":
        raise ValueError(
            f"weight: {tuple(weight.shape)} {weight.dtype}, expected ({block.d_ff},) or (B, {block.d_ff}) float32"
        )
    if not 1 <= k <= block.d_ff:
        raise ValueError(f"k is {k}, expected 1..{block.d_ff}")
    if gate is not None and (gate.d_out, gate.d_in) != (block.d_ff, block.d_model):
        raise ValueError(f"gate: ({gate.d_out}, {gate.d_in}), expected ({block.d_ff}, {block.d_model})")
    struct = abi.DynamicStruct(weight=rows.data_ptr(), weight_stride=block.d_ff if len(rows) > 1 else 0, k=k)
    if gate is not None:
        struct.gate = gate.struct
    return Dynamic(k, struct, (rows, gate))


# -- both --------------------------------------------------------------


def _float_format(name: str, weight: Tensor) -> str:
    if weight.dtype not in _FLOAT_FORMATS:
        raise ValueError(f"{name}: {weight.dtype}, expected one of {', '.join(map(str, _FLOAT_FORMATS))}")
    return _FLOAT_FORMATS[weight.dtype]


def _bias(name: str, bias: Tensor | None, length: int) -> Tensor | None:
    if bias is None:
        return None
    if bias.shape != (length,):
        raise ValueError(f"{name}: shape {tuple(bias.shape)}, expected ({length},)")
    return bias.detach().to(device="cpu", dtype=torch.float32).contiguous()


def unpack(block: Block | Matrix, first: int = 0, last: int | None = None) -> list[Tensor]:
    """The block's weights as float32: [gate, up, down] or [up, down], or [weight] of a matrix; rows first..last only.

    Shapes:
        each: (last - first, D), down neuron-major
    """
    s = block.struct
    if isinstance(block, Matrix):
        d, total, parts = block.d_in, block.d_out, [(s.weight, s.stride, s.scale, 4)]
    else:
        d, total = block.d_model, block.d_ff
        parts = [(s.up, s.up_stride, s.up_scale, s.scale_stride), (s.down, s.down_stride, s.down_scale, s.scale_stride)]
        if block.gated:
            parts.insert(0, (s.gate, s.gate_stride, s.gate_scale, s.scale_stride))
    n = (total if last is None else min(last, total)) - first
    out = []
    for base, stride, scale, scale_stride in parts:
        weight = torch.empty(n, d, dtype=torch.float32)
        at = scale + first * scale_stride if scale else None
        library.check(
            library.loaded().griffin_unpack(
                s.format, base + first * stride, n, d, stride, at, scale_stride, weight.data_ptr(), d
            )
        )
        out.append(weight)
    return out
