"""The ceiling of a density: generation is bound by the bytes of weights it reads, and GRIFFIN reads fewer of them.

In a batch every sequence has its own experts, and a step reads the FF weights of their union. The union grows with the
batch, and so does the key/value cache, which GRIFFIN does not change. Arithmetic shrinks by the density, independently
of the union.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from griffin.errors import GriffinError
from griffin.layouts import find_ff_blocks
from griffin.weights.projection import shape_of
from griffin.weights.quantised import QuantisedLinear


def bytes_read_per_token(model: nn.Module) -> int:
    """Bytes of all weights that the full model reads to generate one token.

    Embeddings are not counted, as a lookup reads one row. An embedding tied to the output projection is counted there.
    """
    return sum(nbytes for _, nbytes in _read(model, None).values())


def ceiling(ff_share: float, density: float) -> float:
    """Upper bound of the speed-up: `1 / (1 - f (1 - density))`, where f is the FF's share of all weight bytes read."""
    return 1 / (1 - ff_share * (1 - density))


def independent_union(density: float, batch: int) -> float:
    """Share of the neurons in the union of B independent sequences' experts: `1 - (1 - density)**B`."""
    return 1 - (1 - density) ** batch


@dataclass(frozen=True)
class Machine:
    """The speed of a machine: bytes read and floating-point operations per second."""

    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True)
class Part:
    """Number and bytes of weights that a generation step reads once, for any batch size."""

    weights: int
    nbytes: int

    def operations(self, batch: int) -> int:
        """Floating-point operations of a step: every sequence multiplies by every weight and adds."""
        return 2 * batch * self.weights


@dataclass(frozen=True)
class StepCost:
    """What a generation step of the full model reads.

    Args:
        ff: the FF blocks' weights.
        other: all other weights.
        cache_bytes: bytes of one sequence's keys and values at a given context.
    """

    ff: Part
    other: Part
    cache_bytes: int

    def nbytes(self, batch: int, ff_read: float = 1.0) -> float:
        """Bytes that a step reads if it reads the share `ff_read` of the FF."""
        return self.other.nbytes + ff_read * self.ff.nbytes + batch * self.cache_bytes

    def speedup(self, batch: int, ff_read: float) -> float:
        """Upper bound of the speed-up by bytes; for a batch of one without a cache it equals `ceiling`."""
        return self.nbytes(batch) / self.nbytes(batch, ff_read)

    def flops_per_ff_byte(self, batch: int, density: float = 1.0, ff_read: float = 1.0) -> float:
        """FF operations per FF byte read. A machine with fewer operations per byte is bound by arithmetic."""
        return density * self.ff.operations(batch) / (ff_read * self.ff.nbytes)

    def ff_bound_by(self, machine: Machine, batch: int, density: float = 1.0, ff_read: float = 1.0) -> str:
        """`bytes` or `arithmetic`, whichever takes the FF longer."""
        most = machine.flops_per_s / machine.bytes_per_s
        return "arithmetic" if self.flops_per_ff_byte(batch, density, ff_read) > most else "bytes"

    def seconds(self, machine: Machine, batch: int, density: float = 1.0, ff_read: float = 1.0) -> float:
        """Lower bound of a step's time: the FF, then the other weights, each bound by its bytes or its arithmetic.

        Attention counts by the bytes of the cache alone, as it does only a few operations per byte.
        """

        def least(part: Part, computed: float, read: float) -> float:
            return max(
                read * part.nbytes / machine.bytes_per_s, computed * part.operations(batch) / machine.flops_per_s
            )

        cache = batch * self.cache_bytes / machine.bytes_per_s
        return least(self.ff, density, ff_read) + least(self.other, 1.0, 1.0) + cache

    def speedup_in_time(self, machine: Machine, batch: int, density: float, ff_read: float) -> float:
        """Upper bound of the speed-up by `seconds`."""
        return self.seconds(machine, batch) / self.seconds(machine, batch, density, ff_read)


@torch.no_grad()
def step_cost(model: PreTrainedModel, context: int, bytes_per_weight: float | None = None) -> StepCost:
    """What a generation step of the model reads at a context of `context` tokens.

    Args:
        model: a model; it may be on the device meta, as only sizes are used.
        context: tokens in a sequence's cache; layers with a sliding window read at most the window.
        bytes_per_weight: count the Linears as if they were packed into this many bytes per weight.

    Raises:
        ValueError: GRIFFIN cannot prune the model.
        GriffinError: the model keeps no keys and values, or in a form that cannot be counted.
    """
    blocks = find_ff_blocks(model)
    projections = [projection for block in blocks for projection in (*block.inputs, block.output)]
    read = _read(model, bytes_per_weight)
    weights, nbytes = (sum(column) for column in zip(*read.values(), strict=True))
    ff_weights = sum(block.parameters for block in blocks)
    if bytes_per_weight is None:
        ff_bytes = sum(block.nbytes for block in blocks)
    else:
        in_linears = sum(shape_of(projection)[0] * shape_of(projection)[1] for projection in projections)
        ff_bytes = int(in_linears * bytes_per_weight) + (ff_weights - in_linears) * model.dtype.itemsize
    ff = Part(ff_weights, ff_bytes)
    return StepCost(ff, Part(weights - ff.weights, nbytes - ff.nbytes), _cache_bytes(model, context))


def _read(model: nn.Module, bytes_per_weight: float | None) -> dict[int, tuple[int, int]]:
    """Number and bytes of the weights read for a token, by address; shared weights count once."""
    read: dict[int, tuple[int, int]] = {}
    for module in model.modules():
        if isinstance(module, QuantisedLinear):
            height, width = shape_of(module)
            read[id(module)] = height * width, int(module.nbytes)
        if isinstance(module, nn.Embedding):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            packed = bytes_per_weight is not None and isinstance(module, nn.Linear) and name == "weight"
            size = int(parameter.numel() * (bytes_per_weight or 0)) if packed else parameter.nbytes
            address = parameter.data_ptr() or id(parameter)  # on the device meta, data_ptr() is 0
            read[address] = parameter.numel(), size
    return read


def _cache_bytes(model: PreTrainedModel, context: int) -> int:
    """Bytes of one sequence's keys and values, extrapolated from a run of two tokens."""
    tokens = 2
    output: Any = model(torch.zeros(1, tokens, dtype=torch.int64, device=model.device), use_cache=True)
    total = 0
    for layer in getattr(getattr(output, "past_key_values", None), "layers", []):
        window = getattr(layer, "sliding_window", None) or context
        total += min(context, window) * (layer.keys.nbytes + layer.values.nbytes) // tokens
    if not total:
        raise GriffinError(f"{type(model).__name__} keeps no keys and values that could be counted")
    return total
