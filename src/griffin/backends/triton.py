"""Experts read in place by Triton kernels, on a GPU: nothing is copied, and the index lists have fixed addresses.

A selection is written into buffers that a block keeps for as long as its model lives, also from one `attach` to the
next: a compiled or captured step reads the next experts from the same place, whatever their number. The kernels are in
`griffin.backends.triton_kernels`. Under TRITON_INTERPRET=1 they run on a CPU, for tests.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn

from griffin.backends.in_place import InPlace
from griffin.layouts import FFBlock
from griffin.method.dynamic import Dynamic
from griffin.weights.device_groups import DeviceGroups, device_groups, why_not_device
from griffin.weights.neuron_major import make_neuron_major
from griffin.weights.projection import rows
from griffin.weights.quantised import QuantisedLinear

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_ROWS = 8  # tokens that one read of the weights serves

# What an operator cannot take as an argument: the blocks that are attached, by a number that stays a projection's own.
_BLOCKS: WeakValueDictionary[int, TritonFF] = WeakValueDictionary()
_NUMBERS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_COUNTER = itertools.count()
# Index lists and counts by output projection and number of sets: captured graphs hold their addresses.
_LISTS: WeakKeyDictionary[nn.Module, dict[int, tuple[Tensor, Tensor]]] = WeakKeyDictionary()


@torch.library.custom_op("griffin::triton_ff", mutates_args=())
def triton_ff(x: Tensor, experts: Tensor, counts: Tensor, block: int) -> Tensor:
    """An FF block for its experts, as an operator: `torch.compile` sees one opaque call with a known result.

    Shapes: x (T, D), contiguous; experts (sets, D_ff) int32; counts (sets,) int32: so many of each set count, from its
        start. Returns (T, D).
    """
    return _BLOCKS[block].compute(x, experts, counts)


@triton_ff.register_fake
def _(x: Tensor, experts: Tensor, counts: Tensor, block: int) -> Tensor:
    return torch.empty_like(x)


class TritonFF(InPlace):
    """One FF block over the model's own weights, its output projection stored neuron-major."""

    def __init__(self, block: FFBlock, undo: ExitStack) -> None:
        super().__init__(block, undo, "triton")
        self._number = _NUMBERS.setdefault(block.output, next(_COUNTER))
        _BLOCKS[self._number] = self
        self._lists = _LISTS.setdefault(block.output, {})
        self._experts, self._counts = self._lists_of(1)

    @staticmethod
    def _why_not(block: FFBlock) -> str | None:
        return why_not(block)

    def select(self, experts: Sequence[Tensor], dynamic: Dynamic | None = None) -> None:
        """See `SparseFF.select`. Nothing waits for the device."""
        assert dynamic is None, "resolve refuses it"
        self._experts, self._counts = self._lists_of(len(experts))
        for n, expert_set in enumerate(experts):
            k = expert_set.shape[0]
            self._experts[n, :k].copy_(expert_set)
            self._counts[n].fill_(k)

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """See `SparseFF.buffers`."""
        return self._experts, self._counts

    def write(self, z: Tensor) -> Tensor:
        """See `SparseFF.write`."""
        x = self._input()
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        if flat.shape[0] % self._experts.shape[0]:
            raise ValueError(
                f"experts were selected for a batch of {self._experts.shape[0]} sequences, but the generation phase "
                f"got tokens of shape {tuple(x.shape[:-1])}; run the prompt phase and the generation phase on the same "
                "batch"
            )
        if torch.compiler.is_compiling():
            y: Tensor = triton_ff(flat, self._experts, self._counts, self._number)
            return y.view(x.shape)
        self.calls += 1
        return self.compute(flat, self._experts, self._counts).view(x.shape)

    def compute(self, x: Tensor, experts: Tensor, counts: Tensor) -> Tensor:
        """As `triton_ff`."""
        if self._matrices is None:
            raise ValueError("this handle is detached; call griffin.attach again")
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            return launch(self._matrices, self._biases, self._activation, self._width, x, experts, counts)

    def _lists_of(self, sets: int) -> tuple[Tensor, Tensor]:
        if sets not in self._lists or self._lists[sets][0].device != self._ff.device:
            experts = torch.zeros(sets, self._width, dtype=torch.int32, device=self._ff.device)
            self._lists[sets] = experts, torch.zeros(sets, dtype=torch.int32, device=self._ff.device)
        return self._lists[sets]

    def _open(self) -> None:
        """Take the model's weights, until `undo` closes."""
        block = self._ff
        if not isinstance(block.output, QuantisedLinear):
            make_neuron_major(block.output, block.path, self._undo)
        inputs = [matrix for projection in block.inputs for matrix in _rows_of(projection, block.layout.fused)]
        biases = [bias for projection in block.inputs for bias in _biases_of(projection, block.layout.fused)]
        down, down_bias = _down_of(block.output)
        assert block.activation is not None
        self._activation = block.activation
        self._matrices: _Matrices | None = (inputs[0] if block.gated else None, inputs[-1], down)
        self._biases = (biases[0] if block.gated else None, biases[-1], down_bias)
        self._undo.callback(self._close)  # before the weights are transposed back

    def _close(self) -> None:
        self._matrices, self._x = None, None


_Matrix = Tensor | DeviceGroups
_Matrices = tuple[_Matrix | None, _Matrix, _Matrix]  # gate, up, down: a row a neuron
_Biases = tuple[Tensor | None, Tensor | None, Tensor | None]


def interpreted() -> bool:
    """Whether Triton kernels are run by its interpreter, on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(block: FFBlock) -> str | None:
    """Why the Triton kernels cannot compute a block; `None` if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if block.device.type != "cuda" and not interpreted():
        return f"{block.path} is on {block.device}; Triton kernels run on a GPU (TRITON_INTERPRET=1: on a CPU, slowly)"
    if block.activation is None:
        return f"{block.path} has an activation that the kernels do not know"
    if len({isinstance(projection, QuantisedLinear) for projection in block.inputs}) > 1:
        return f"{block.path} has one quantised input projection and one that is not"
    if len({projection.bias is None for projection in block.inputs}) > 1:
        return f"{block.path} has one input projection with a bias and one without"
    for projection in (*block.inputs, block.output):
        if isinstance(projection, QuantisedLinear):
            if (reason := next(filter(None, map(why_not_device, projection.parts)), None)) is not None:
                return f"{block.path} has weights of {projection.format}, and {reason}"
            continue
        weight = rows(projection)[0]
        if weight.dtype not in _DTYPES:
            return f"{block.path} has weights of {weight.dtype}; expected float32, bfloat16 or float16"
        if projection is not block.output and weight.stride(1) != 1:
            return f"{block.path} stores its input projections column by column (Conv1D), so no neuron is contiguous"
    if isinstance(block.output, QuantisedLinear) and not block.output.neuron_major:
        return f"{block.path} has a quantised output projection that is not neuron-major"
    return None


def _rows_of(projection: nn.Module, fused: bool) -> list[_Matrix]:
    """The matrices of an input projection: gate and up if it is fused."""
    if isinstance(projection, QuantisedLinear):
        return [device_groups(part, part.rows.device) for part in projection.parts]
    weight = rows(projection)[0].detach()
    return list(weight.chunk(2)) if fused else [weight]


def _biases_of(projection: nn.Module, fused: bool) -> list[Tensor | None]:
    bias: Any = projection.bias
    if bias is None:
        return [None] * (2 if fused else 1)
    return list(bias.detach().chunk(2)) if fused else [bias.detach()]


def _down_of(projection: nn.Module) -> tuple[_Matrix, Tensor | None]:
    bias = projection.bias
    own = bias.detach() if isinstance(bias, Tensor) else None
    if isinstance(projection, QuantisedLinear):
        return device_groups(projection.parts[0], projection.stored.device), own
    return rows(projection)[0].detach().t(), own


def launch(
    matrices: _Matrices, biases: _Biases, activation: str, width: int, x: Tensor, experts: Tensor, counts: Tensor
) -> Tensor:
    """The three kernels.

    Args:
        matrices: gate (None: ungated), up and down, a row a neuron.
        biases: theirs.
        activation: a name of `griffin.activation.ACTIVATIONS`.
        width: D_ff.

    Shapes: as `triton_ff`.
    """
    import triton

    from griffin.backends import triton_kernels as kernels

    gate, up, down = matrices
    gate_bias, up_bias, down_bias = biases
    tokens, hidden = x.shape
    sets = experts.shape[0]
    per_set = tokens // sets
    row_tile = 1 if sets > 1 else min(_MOST_ROWS, triton.next_power_of_2(tokens))
    row_tiles = -(-tokens // row_tile)
    z = torch.empty(tokens, width, dtype=torch.float32, device=x.device)

    # Programs of one warp: a row is summed, and a column added up, without shared memory. Tiles are as large as
    # registers allow, so that enough bytes are under way: 4 KB a program for one token.
    neurons = 4
    grid = (-(-width // neurons), row_tiles)
    common = {"GATED": gate is not None, "BIASED": up_bias is not None, "ACTIVATION": activation}
    first = up if gate is None else gate
    gate_bias = x if gate_bias is None else gate_bias  # a pointer that is not read
    up_bias = x if up_bias is None else up_bias
    if isinstance(up, Tensor):
        assert isinstance(first, Tensor)
        columns = min(1024 if row_tile <= 2 else 512, triton.next_power_of_2(hidden))
        kernels.read[grid](
            x, experts, counts, first, up, gate_bias, up_bias, z, tokens, hidden, width, per_set,
            first.stride(0), up.stride(0), **common, ROWS=row_tile, M=neurons, C=columns, num_warps=1,
        )  # fmt: skip
    else:
        assert isinstance(first, DeviceGroups)
        kernels.read_groups[grid](
            x, experts, counts, gate_bias, up_bias, z, tokens, hidden, width, per_set,
            *_pointers(first), *_strides(first), *_pointers(up), *_strides(up),
            **_constants("GATE_", first), **_constants("UP_", up), **common, ROWS=row_tile, M=neurons,
            G=min(512 // up.format.group, triton.next_power_of_2(up.codes.shape[1] // up.format.group)), num_warps=1,
        )  # fmt: skip

    chunk = 16 if row_tile <= 2 else 8  # neurons at a time
    splits = min(max(8, 32 // max(row_tiles, row_tile // 4)), -(-width // chunk))
    parts = torch.empty(splits, tokens, hidden, dtype=torch.float32, device=x.device)
    if isinstance(down, Tensor):
        columns = min(256, triton.next_power_of_2(hidden))
        kernels.write[(-(-hidden // columns), splits, row_tiles)](
            z, experts, counts, down, parts, tokens, hidden, width, per_set, down.stride(0),
            SPLITS=splits, ROWS=row_tile, K=chunk, C=columns, num_warps=1,
        )  # fmt: skip
    else:
        stride = down.codes.shape[1]
        # A byte of 4-bit codes is two columns, each with its scales: half as many bytes, or registers spill.
        columns = min(1024 // down.bits, triton.next_power_of_2(stride))
        kernels.write_groups[(-(-stride // columns), splits, row_tiles)](
            z, experts, counts, *_pointers(down), parts, tokens, hidden, width, per_set, stride, down.padded,
            **_constants("", down), SPLITS=splits, ROWS=row_tile, K=chunk, C=columns, num_warps=1,
        )  # fmt: skip

    y = torch.empty_like(x)
    columns = min(1024, triton.next_power_of_2(hidden))
    kernels.finish[(-(-hidden // columns), tokens)](
        parts, x if down_bias is None else down_bias, y, tokens, hidden, SPLITS=splits, BIASED=down_bias is not None,
        C=columns,
    )  # fmt: skip
    return y


def _pointers(matrix: DeviceGroups) -> tuple[Tensor, ...]:
    """Codes, scale, sub, offset, sub_offset; what a format lacks is not read."""
    parts = (matrix.codes, matrix.scale, matrix.sub, matrix.offset, matrix.sub_offset)
    return tuple(matrix.codes if part is None else part for part in parts)


def _strides(matrix: DeviceGroups) -> tuple[int, int, int]:
    """Bytes of a row of codes, spans and groups of a row."""
    return matrix.codes.shape[1], matrix.scale.shape[1], matrix.padded // matrix.format.group


def _constants(prefix: str, matrix: DeviceGroups) -> dict[str, Any]:
    values = {
        "BITS": matrix.bits, "ZERO": matrix.zero, "GROUP": matrix.format.group, "SPAN": matrix.span,
        "SUBS": matrix.sub is not None, "OFFSETS": matrix.format.offset,
    }  # fmt: skip
    return {prefix + name: value for name, value in values.items()}
