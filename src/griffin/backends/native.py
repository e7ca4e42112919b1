"""Experts read in place by the native library, or from copies one behind the other (`GriffinConfig.compact`)."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor

from griffin.backends.in_place import InPlace
from griffin.backends.reference import split_rows
from griffin.layouts import FFBlock
from griffin.method.dynamic import Dynamic, sketch
from griffin.method.planes import PlaneSplit
from griffin.native import kernel, library, operands
from griffin.native.packing import Bytes
from griffin.weights.neuron_major import make_neuron_major
from griffin.weights.projection import rows
from griffin.weights.quantised import QuantisedLinear

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# What an operator cannot take as an argument: the blocks that are alive, by a number of their own.
_BLOCKS: weakref.WeakValueDictionary[int, NativeFF] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()
# Memory of experts' copies that nothing uses, by output projection: new memory costs several times what copying does.
_ROOM: weakref.WeakKeyDictionary[torch.nn.Module, tuple[Bytes, ...]] = weakref.WeakKeyDictionary()


@torch.library.custom_op("griffin::ff", mutates_args=())
def ff(x: Tensor, experts: Tensor, row_mask: Tensor | None, block: int, group: int) -> Tensor:
    """`kernel.ff` as an operator, so that `torch.compile` sees one opaque call with a known result.

    Shapes: as `kernel.ff`; `block` is a number that `NativeFF.number` gives, `group` the place of a set in its `sets`.
    """
    ff = _BLOCKS[block]
    own = ff.sets[group]
    return kernel.ff(ff.block, x, experts, row_mask, dynamic=own.dynamic, compact=ff.copies_of(own))


@ff.register_fake
def _(x: Tensor, experts: Tensor, row_mask: Tensor | None, block: int, group: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class Set(NamedTuple):
    """What up to 16 sequences are computed with: the union of their experts, and which sequence wants which of them."""

    experts: Tensor
    row_mask: Tensor | None
    dynamic: operands.Dynamic | None


class NativeFF(InPlace):
    """One FF block over the model's own weights, its output projection stored neuron-major.

    Args:
        block, undo: as for `InPlace`.
        compact: whether experts that all rows share are copied (`GriffinConfig.compact`).

    Raises:
        ValueError: as `InPlace`.
    """

    def __init__(self, block: FFBlock, undo: ExitStack, *, compact: bool = False) -> None:
        super().__init__(block, undo, "native")
        self.number = next(_NUMBERS)
        _BLOCKS[self.number] = self
        self._sequences = 1
        self._sets: list[Set] = []  # for every 16 sequences
        self._compact = compact
        self._copied: tuple[Tensor, operands.Compact] | None = None  # the last experts that were

    @staticmethod
    def _why_not(block: FFBlock) -> str | None:
        return why_not(block)

    def _open(self) -> None:
        if not isinstance(self._ff.output, QuantisedLinear):  # which is neuron-major as it is
            make_neuron_major(self._ff.output, self._ff.path, self._undo)
        self._block: operands.Block | None = native_block(self._ff)
        self._undo.callback(self._close)  # before the weights are transposed back

    def _close(self) -> None:
        """Let the model's weights go."""
        self._block, self._sets, self._x, self._copied = None, [], None, None

    @property
    def ff_block(self) -> FFBlock:
        """The block as the model has it."""
        return self._ff

    @property
    def block(self) -> operands.Block:
        """The block as the native library sees it."""
        if self._block is None:
            raise ValueError("this handle is detached; call griffin.attach again")
        return self._block

    @property
    def sets(self) -> Sequence[Set]:
        """What every 16 sequences are computed with; one set without a mask where experts are shared."""
        return self._sets

    def select(self, experts: Sequence[Tensor], dynamic: Dynamic | None = None) -> None:
        """See `SparseFF.select`."""
        self._sets = []  # what only they use may be used anew
        self._sequences, self._sets = len(experts), self.sets_of(experts, dynamic)

    def sets_of(self, experts: Sequence[Tensor], dynamic: Dynamic | None) -> list[Set]:
        """What every 16 sequences of a batch are computed with; arguments as for `select`."""
        if len(experts) == 1:
            return [Set(experts[0], None, self._dynamic(dynamic, slice(0, 1), experts))]
        sets = []
        for at in range(0, len(experts), kernel.MAX_ROWS):
            part = slice(at, at + kernel.MAX_ROWS)
            joined, row_mask = kernel.union(experts[part], self._width)
            sets.append(Set(joined, row_mask, self._dynamic(dynamic, part, experts[part], joined)))
        return sets

    def copies_of(self, own: Set) -> operands.Compact | None:
        """Copies of a set's experts, if they are wanted and the library computes with them.

        They are made when a step first asks, which is after the first token.
        """
        experts, mask, dynamic = own
        if not self._compact or mask is not None or dynamic is not None or len(experts) == self._width:
            return None
        if not self.block.in_planes:
            return None
        if self._copied is None or self._copied[0] is not experts:
            self._copied = None
            copies = operands.compact(self.block, experts, _ROOM.pop(self._ff.output, ()))
            weakref.finalize(copies, _keep_room, weakref.ref(self._ff.output), copies.copies).atexit = False
            self._copied = experts, copies
        return self._copied[1]

    def _dynamic(
        self, dynamic: Dynamic | None, rows: slice, experts: Sequence[Tensor], joined: Tensor | None = None
    ) -> operands.Dynamic | None:
        if dynamic is None:
            return None
        gate = None
        if dynamic.split.gate is not None:
            gate = operands.packed_matrix(sketch(self._ff, dynamic.split.gate))
        weights = dynamic.weights if len(dynamic.weights) == 1 else dynamic.weights[rows]
        planes = None
        if isinstance(dynamic.split, PlaneSplit):
            assert dynamic.whole is not None
            whole = _row_bits(dynamic.whole if len(dynamic.whole) == 1 else dynamic.whole[rows], experts, joined)
            planes = operands.Planes(whole, dynamic.split.first, dynamic.split.levels)
        return operands.dynamic(self.block, weights, dynamic.split.chosen, gate=gate, planes=planes)

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """See `SparseFF.buffers`."""
        return tuple(part for each in self._sets for part in (each.experts, each.row_mask) if part is not None)

    def write(self, z: Tensor) -> Tensor:
        """See `SparseFF.write`."""
        x = self._input()
        if not torch.compiler.is_compiling():  # a count that changes would recompile every step
            self.calls += 1
        if self._sequences == 1:
            flat = x.reshape(-1, x.shape[-1])
            parts = [self._run(part, 0) for part in torch.split(flat, kernel.MAX_ROWS)]
            return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(x.shape)
        by_sequence = split_rows(x, self._sequences)
        y = torch.empty_like(by_sequence)
        for position in range(by_sequence.shape[1]):
            for group in range(len(self._sets)):
                at = slice(group * kernel.MAX_ROWS, (group + 1) * kernel.MAX_ROWS)
                y[at, position] = self._run(by_sequence[at, position], group)
        return y.view(x.shape)

    def _run(self, x: Tensor, group: int) -> Tensor:
        if x.dtype not in (torch.float32, torch.bfloat16):
            return self._run(x.float(), group).to(x.dtype)
        own = self._sets[group]
        experts, mask, dynamic = own
        if torch.compiler.is_compiling():
            y: Tensor = ff(x, experts, mask, self.number, group)
            return y
        # without the dispatcher's overhead
        return kernel.ff(self.block, x, experts, mask, dynamic=dynamic, compact=self.copies_of(own))


def _keep_room(output: weakref.ref[torch.nn.Module], copies: tuple[Bytes, ...]) -> None:
    """Nothing is computed with these copies any more: their memory is for the next ones."""
    if (module := output()) is not None:
        _ROOM[module] = copies


def _row_bits(whole: Tensor, experts: Sequence[Tensor], joined: Tensor | None) -> Tensor:
    """Of every expert, which rows read its gate whole, a bit each: all of them or none where they share the experts.

    Shapes: whole (sets, k), bool; experts sets of (k,); joined (n,), their union; returns (n,), or (k,), uint16.
    """
    if joined is None:
        return torch.where(whole[0], 0xFFFF, 0).to(torch.uint16)
    bits = torch.zeros(len(joined), dtype=torch.int32)
    for row, (own, of_row) in enumerate(zip(experts, whole, strict=True)):
        bits[torch.searchsorted(joined, own[of_row].to(joined.dtype))] |= 1 << row
    return bits.to(torch.uint16)


def why_not(block: FFBlock) -> str | None:
    """Why the native library cannot compute a block; `None` if it can."""
    if (reason := library.why_not()) is not None:
        return reason
    for projection in (*block.inputs, block.output):
        if isinstance(projection, QuantisedLinear):
            continue
        weight = rows(projection)[0]
        if weight.device.type != "cpu":
            return f"{block.path} is on {weight.device}; the native library runs on the CPU"
        if weight.dtype not in _DTYPES:
            return f"{block.path} has weights of {weight.dtype}; expected float32, bfloat16 or float16"
        if projection is not block.output and weight.stride(1) != 1:
            return f"{block.path} stores its input projections column by column (Conv1D), so no neuron is contiguous"
    if isinstance(block.output, QuantisedLinear) and not block.output.neuron_major:
        return f"{block.path} has a quantised output projection that is not neuron-major"
    if block.activation is None:
        return f"{block.path} has an activation that the native library does not know"
    return None


def native_block(block: FFBlock) -> operands.Block:
    """A block of the native library over the model's own weights, whose output projection must be neuron-major."""
    activation = block.activation
    assert activation is not None
    inputs = [matrix for projection in block.inputs for matrix in _matrices(projection, block.layout.fused)]
    if isinstance(block.output, QuantisedLinear):
        down = block.output.matrices()[0]
    else:
        weight, bias = rows(block.output)
        down = operands.matrix(weight.detach().t(), bias, neuron_major=True)
    return operands.ff_block(inputs[0] if block.gated else None, inputs[-1], down, activation=activation)


def _matrices(projection: torch.nn.Module, fused: bool) -> list[operands.Matrix]:
    """The matrices of an input projection: gate and up if it is fused."""
    if isinstance(projection, QuantisedLinear):
        return projection.matrices()
    weight, bias = rows(projection)
    if not fused:
        return [operands.matrix(weight.detach(), bias)]
    biases = (None, None) if bias is None else bias.chunk(2)
    return [operands.matrix(*pair) for pair in zip(weight.detach().chunk(2), biases, strict=True)]
