"""What the kernel computes on: feedforward blocks and matrices, described to the native library where they lie.

Words: D model width, D_ff feedforward width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from griffin.native import abi, grouped, library
from griffin.native.packing import Bytes, huge_pages

_MOST_PLANES = 4  # of 8 bits
_FLOAT_FORMATS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclass(frozen=True)
class Matrix:
    """One matrix W (out, in) as the library sees it; with its tensors. Made by `matrix` or `packed_matrix`."""

    d_in: int
    d_out: int
    format: str
    weight_bytes: int
    struct: Any = field(repr=False)
    kept: tuple[Any, ...] = field(repr=False)


@dataclass(frozen=True)
class Block:
    """One feedforward block as the library sees it. Made by `ff_block`."""

    d_model: int
    d_ff: int
    gate: Matrix | None
    up: Matrix
    down: Matrix
    struct: Any = field(repr=False)

    @property
    def gated(self) -> bool:
        """Whether there is a gate."""
        return self.gate is not None

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """(gate, up, down), or (up, down)."""
        return (self.up, self.down) if self.gate is None else (self.gate, self.up, self.down)

    @property
    def format(self) -> str:
        """The weights' formats; one name where all have the same."""
        return "+".join(dict.fromkeys(matrix.format for matrix in self.matrices))

    @property
    def in_planes(self) -> bool:
        """Whether all weights are in groups without a table, as planes of bits and copies of experts need them."""
        return all(matrix.struct.format == abi.GROUPED and not matrix.struct.table for matrix in self.matrices)

    @property
    def weight_bytes(self) -> int:
        """Of gate, up and down, scales included: what a dense call reads."""
        return sum(matrix.weight_bytes for matrix in self.matrices)


@dataclass(frozen=True)
class Dynamic:
    """Dynamic neuron selection as the library sees it. Make one by `dynamic`."""

    k: int
    struct: Any = field(repr=False)
    kept: tuple[Any, ...] = field(repr=False)


@dataclass(frozen=True, eq=False)
class Compact:
    """A block with copies of its experts' rows, one behind the other. Make one by `compact`.

    Args:
        struct: the block as the library sees it, the copies in place of its weights.
        block: the block itself, whose scales and biases are read.
        copies: of gate (if there is one), up and down.

    Shapes:
        copies: each (bytes,) uint8: k rows in the layout of the matrix, in blocks of 32, and `SLACK`
    """

    struct: Any = field(repr=False)
    block: Block
    copies: tuple[Bytes, ...] = field(repr=False)


@dataclass(frozen=True, eq=False)
class Planes:
    """Precision of a block's rows in dynamic neuron selection: codes lie in planes of 2 bits, the highest first.

    Args:
        whole: bit r of entry i says that row r of the input reads the gate of expert i whole.
        first: planes of the gates that are not read whole.
        levels: up and down of the `levels[l - 1]` best of a token are read to l planes at least; `levels[0]` is k.

    Shapes:
        whole: (n_experts,) uint16
    """

    whole: Tensor
    first: int
    levels: tuple[int, ...]


# -- matrices and blocks --------------------------------------------------------------


def matrix(weight: Tensor, bias: Tensor | None = None, *, neuron_major: bool = False) -> Matrix:
    """A float matrix W (out, in), read where it is.

    Args:
        weight: (out, in), or neuron-major (in, out): `down_proj.weight.T` of a transposed storage.
        bias: (out,), copied to float32 if it is not, or None.

    Raises ValueError for another dtype than float32, bfloat16, float16, a device that is not the CPU, or rows with
    gaps.
    """
    if weight.dtype not in _FLOAT_FORMATS:
        raise ValueError(f"weight: {weight.dtype}, expected one of {', '.join(map(str, _FLOAT_FORMATS))}")
    if weight.dim() != 2 or weight.device.type != "cpu":
        raise ValueError(f"weight: {tuple(weight.shape)} on {weight.device}, expected two dimensions on cpu")
    if weight.shape[1] > 1 and weight.stride(1) != 1:
        raise ValueError(f"weight: strides {weight.stride()}, expected contiguous rows")
    d_out, d_in = reversed(weight.shape) if neuron_major else weight.shape
    format = _FLOAT_FORMATS[weight.dtype]
    own_bias = _bias(bias, d_out)
    struct = abi.MatrixStruct(
        d_in, d_out, abi.FORMATS.index(format), int(neuron_major), abi.GroupedStruct(), weight.data_ptr(),
        weight.stride(0) * weight.element_size(), None, library.address(own_bias),
    )  # fmt: skip
    return Matrix(d_in, d_out, format, weight.nbytes, struct, (weight, own_bias))


def packed_matrix(packed: grouped.Packed, bias: Tensor | None = None) -> Matrix:
    """A matrix of weights in groups, read where it is. bias: (out,), copied to float32 if it is not, or None."""
    own_bias = _bias(bias, packed.d_out)
    struct = packed.struct(own_bias)
    return Matrix(packed.d_in, packed.d_out, packed.format.name, packed.nbytes, struct, (packed, own_bias))


def ff_block(gate: Matrix | None, up: Matrix, down: Matrix, *, activation: str) -> Block:
    """A feedforward block; formats may differ.

    Shapes:
        gate, up: (D_ff, D), rows of W; gate None: ungated
        down: (D, D_ff), neuron-major

    Raises ValueError for other shapes, layouts or an unknown activation.
    """
    if activation not in abi.ACTIVATIONS:
        raise ValueError(f"activation {activation!r}: expected one of {', '.join(abi.ACTIVATIONS)}")
    d_ff, d = up.d_out, up.d_in
    shapes = [(m.d_out, m.d_in, bool(m.struct.neuron_major)) for m in (gate or up, up, down)]
    if shapes != [(d_ff, d, False), (d_ff, d, False), (d, d_ff, True)]:
        raise ValueError(
            f"gate, up and down are {shapes} (out, in, neuron-major), expected gate and up (D_ff, D), down (D, D_ff) "
            "neuron-major"
        )
    struct = abi.BlockStruct(
        abi.MatrixStruct() if gate is None else gate.struct, up.struct, down.struct, abi.ACTIVATIONS.index(activation)
    )
    return Block(d, d_ff, gate, up, down, struct)


def _bias(bias: Tensor | None, length: int) -> Tensor | None:
    if bias is None:
        return None
    if bias.shape != (length,):
        raise ValueError(f"bias: shape {tuple(bias.shape)}, expected ({length},)")
    return bias.detach().to(device="cpu", dtype=torch.float32).contiguous()


# -- copies of experts --------------------------------------------------------------


def compact(block: Block, experts: Tensor, room: Sequence[Bytes] = (), *, threads: int | None = None) -> Compact:
    """Copy the rows of a block's experts, so that they are read one behind the other, as a dense block's are.

    Args:
        block: the block.
        experts: its experts.
        room: the copies of a `Compact` of this block that nobody uses any more: they are written over if they fit.

    Shapes:
        experts: (k,) int32 or int64, contiguous

    Raises ValueError for an expert outside 0..D_ff-1, or a block of other weights than in groups, or with a table.
    """
    if not block.in_planes:
        raise ValueError(f"a compact block of {block.format} weights: expected weights in groups, without a table")
    struct = abi.BlockStruct.from_buffer_copy(block.struct)
    copies: list[Bytes] = []
    for name, matrix in (("gate", block.gate), ("up", block.up), ("down", block.down)):
        if matrix is None:
            continue
        packed: grouped.Packed = matrix.kept[0]
        size = grouped.bytes_of_rows(packed, len(experts))
        old = room[len(copies)] if room else None
        copy = huge_pages(size) if old is None or len(old) != size else old
        library.check(
            library.loaded().griffin_copy_rows(
                ctypes.addressof(matrix.struct), experts.data_ptr(), experts.element_size(), len(experts),
                copy.ctypes.data, threads or torch.get_num_threads(),
            )
        )  # fmt: skip
        getattr(struct, name).weight = copy.ctypes.data
        copies.append(copy)
    return Compact(struct, block, tuple(copies))


# -- dynamic neuron selection --------------------------------------------------------------


def dynamic(
    block: Block, weight: Tensor, k: int, *, gate: Matrix | None = None, planes: Planes | None = None
) -> Dynamic:
    """Compute, for each token, up and down only for the k experts with the largest scores `|act(gate)| * weight`.

    In a block without a gate, up takes its place: it is computed for all experts, and down for the k. Relatives are
    TEAL and CATS, which threshold activations; here the k largest gate scores of a token are chosen.

    Args:
        block: the block.
        weight: factors of the scores, not negative.
        k: experts of a token.
        gate: the gate in another format, read in place of the block's; its bias is still the block's.
        planes: how many planes of the rows are read; None: all. Not with a `gate`.

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
    if planes is not None:
        counts = planes.levels
        if gate is not None or not 1 <= planes.first <= _MOST_PLANES or not 1 <= len(counts) <= _MOST_PLANES:
            raise ValueError(f"{planes}: expected first and 1 to {_MOST_PLANES} levels, and no gate of its own")
        if counts[0] != k or any(not 0 <= more <= less for less, more in pairwise(counts)):
            raise ValueError(f"levels {counts}: expected k = {k} first, and none above the one before it")
        if planes.whole.dtype != torch.uint16 or planes.whole.dim() != 1 or not planes.whole.is_contiguous():
            raise ValueError(f"whole: {tuple(planes.whole.shape)} {planes.whole.dtype}, expected uint16, one an expert")
        if not block.in_planes:
            raise ValueError(f"planes of {block.format} weights: expected weights in groups, without a table")
        struct.whole, struct.n_levels, struct.first = planes.whole.data_ptr(), len(counts), planes.first
        struct.levels[: len(counts)] = counts
    return Dynamic(k, struct, (rows, gate, planes))
