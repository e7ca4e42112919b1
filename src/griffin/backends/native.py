"""Experts read in place by the native library: nothing is copied, so a new selection costs nothing.

The library computes a whole FF block in one call. The model's own forward calls the projections one by one, so the
first input projection keeps the block's input, the others answer with a placeholder, and the output projection makes
the call.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from griffin.backends.reference import split_rows
from griffin.layouts import FFBlock
from griffin.method.dynamic import Dynamic, sketch
from griffin.native import kernel, library, operands
from griffin.weights.neuron_major import make_neuron_major
from griffin.weights.projection import rows, shape_of

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# What an operator cannot take as an argument: the blocks that are alive, by a number of their own.
_BLOCKS: WeakValueDictionary[int, NativeFF] = WeakValueDictionary()
_NUMBERS = itertools.count()


@torch.library.custom_op("griffin::ff", mutates_args=())
def ff(x: Tensor, experts: Tensor, row_mask: Tensor | None, block: int, group: int) -> Tensor:
    """`kernel.ff` as an operator, so that `torch.compile` sees one opaque call with a known result.

    Shapes: as `kernel.ff`; `block` is a number that `NativeFF.number` gives, `group` the place of a set in its `sets`.
    """
    ff = _BLOCKS[block]
    return kernel.ff(ff.block, x, experts, row_mask, dynamic=ff.sets[group].dynamic)


@ff.register_fake
def _(x: Tensor, experts: Tensor, row_mask: Tensor | None, block: int, group: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class Set(NamedTuple):
    """What up to 16 sequences are computed with: the union of their experts, and which sequence wants which of them."""

    experts: Tensor
    row_mask: Tensor | None
    dynamic: operands.Dynamic | None


class NativeFF:
    """One FF block over the model's own weights, its output projection stored neuron-major."""

    def __init__(self, block: FFBlock, undo: ExitStack) -> None:
        if (reason := why_not(block)) is not None:
            raise ValueError(f"the native backend cannot be used: {reason}")
        self._ff, self._width = block, block.width
        self._undo = undo.enter_context(ExitStack())  # of this block, so that replaced weights can be taken anew
        self._open()
        self.number = next(_NUMBERS)
        _BLOCKS[self.number] = self
        self._sequences = 1
        self._sets: list[Set] = []  # for every 16 sequences
        self._x: Tensor | None = None
        self._placeholder = torch.zeros(2)
        self.calls = 0

    def _open(self) -> None:
        """Take the addresses of the model's weights, until `undo` closes."""
        if not self._ff.quantised:  # records are neuron-major as they are
            make_neuron_major(self._ff.output, self._ff.path, self._undo)
        self._block: operands.Block | None = native_block(self._ff)
        self._taken = _addresses(self._ff)
        self._undo.callback(self._close)  # before the weights are transposed back

    def _close(self) -> None:
        """Let the model's weights go."""
        self._block, self._sets, self._x = None, [], None

    def refresh(self) -> bool:
        """See `SparseFF.refresh`."""
        if _addresses(self._ff) == self._taken:
            return False
        self._undo.close()
        if (reason := why_not(self._ff)) is not None:
            raise ValueError(
                f"the model's weights were replaced while GRIFFIN was attached, and {reason}; attach again"
            )
        self._open()
        return True

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
        self._sequences, self._sets = len(experts), self.sets_of(experts, dynamic)

    def sets_of(self, experts: Sequence[Tensor], dynamic: Dynamic | None) -> list[Set]:
        """What every 16 sequences of a batch are computed with; arguments as for `select`."""
        if len(experts) == 1:
            return [Set(experts[0], None, self._dynamic(dynamic, slice(0, 1)))]
        sets = []
        for at in range(0, len(experts), kernel.MAX_ROWS):
            part = slice(at, at + kernel.MAX_ROWS)
            sets.append(Set(*kernel.union(experts[part], self._width), self._dynamic(dynamic, part)))
        return sets

    def _dynamic(self, dynamic: Dynamic | None, rows: slice) -> operands.Dynamic | None:
        if dynamic is None:
            return None
        gate = None if dynamic.split.gate is None else sketch(self._ff, dynamic.split.gate)
        weights = dynamic.weights if len(dynamic.weights) == 1 else dynamic.weights[rows]
        return operands.dynamic(self.block, weights, dynamic.split.chosen, gate=gate)

    def read(self, which: int, x: Tensor) -> Tensor:
        """See `SparseFF.read`. Keeps the input; the projection is computed in `write`."""
        self._x = x
        return self._placeholder.to(x.dtype).expand(*x.shape[:-1], 2)

    def write(self, z: Tensor) -> Tensor:
        """See `SparseFF.write`."""
        x, self._x = self._x, None
        assert x is not None, "the output projection was called before the input projections"
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
        experts, mask, dynamic = self._sets[group]
        if torch.compiler.is_compiling():
            y: Tensor = ff(x, experts, mask, self.number, group)
            return y
        return kernel.ff(self.block, x, experts, mask, dynamic=dynamic)  # without the dispatcher's overhead


def why_not(block: FFBlock) -> str | None:
    """Why the native library cannot compute a block; `None` if it can."""
    if (reason := library.why_not()) is not None:
        return reason
    weights = [] if block.quantised else [rows(projection)[0] for projection in (*block.inputs, block.output)]
    for weight in weights:
        if weight.device.type != "cpu":
            return f"{block.path} is on {weight.device}; the native library runs on the CPU"
        if weight.dtype not in _DTYPES or weight.dtype != weights[0].dtype:
            return f"{block.path} has weights of {weight.dtype}; expected float32, bfloat16 or float16"
    if any(weight.stride(1) != 1 for weight in weights[:-1]):
        return f"{block.path} stores its input projections column by column (Conv1D), so no neuron is contiguous"
    if block.activation is None:
        return f"{block.path} has an activation that the native library does not know"
    return None


def _addresses(block: FFBlock) -> tuple[tuple[int, tuple[int, ...], torch.dtype], ...]:
    """Where and how a block's weights and biases are stored."""
    tensors = [
        tensor
        for projection in (*block.inputs, block.output)
        for tensor in (*projection.parameters(recurse=False), *projection.buffers(recurse=False))
    ]
    return tuple((tensor.data_ptr(), tensor.stride(), tensor.dtype) for tensor in tensors)


def native_block(block: FFBlock) -> operands.Block:
    """A block of the native library over the model's own weights, which must be neuron-major or quantised."""
    activation = block.activation
    assert activation is not None
    biases: list[Any] = [projection.bias for projection in block.inputs]
    if block.layout.fused:
        biases = [None, None] if biases[0] is None else list(biases[0].chunk(2))
    gate_bias, up_bias = (biases[0], biases[1]) if block.gated else (None, biases[0])
    out_bias: Any = block.output.bias
    if block.quantised:
        records, scales = ff_records(block)
        return operands.ff_records(
            records,
            scales,
            d_model=shape_of(block.output)[0],
            gated=block.gated,
            activation=activation,
            gate_bias=gate_bias,
            up_bias=up_bias,
            out_bias=out_bias,
        )
    weights = block.input_weights()
    gate, up = (weights[0], weights[1]) if block.gated else (None, weights[0])
    down = rows(block.output)[0]
    return operands.ff_block(
        None if gate is None else gate.detach(),
        up.detach(),
        down.detach().t(),
        activation=activation,
        gate_bias=gate_bias,
        up_bias=up_bias,
        out_bias=out_bias,
    )


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
    scales = block.inputs[0].scales
    return records, scales[0].as_strided((d_ff, len(packed)), (len(packed), 1)) if isinstance(scales, Tensor) else None
