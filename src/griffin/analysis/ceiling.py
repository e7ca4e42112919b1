"""The ceiling of a density: generation is bound by the bytes of weights it reads, and GRIFFIN reads fewer of them.

In a batch every sequence has its own experts, and the FF weights read are those of their union, which grows with the
batch; so does the key/value cache, which GRIFFIN leaves as it is. Arithmetic shrinks by the density,
whatever the union.
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

    An embedding is looked up, which reads one row of it; one that is tied to the output projection is read there.
    """
    return sum(nbytes for _, nbytes in _read(model, None).values())


def ceiling(ff_share: float, density: float) -> float:
    """Speed-up at most: `1 / (1 - f (1 - density))` with the share f of the FF in all bytes of weights read."""
    return 1 / (1 - ff_share * (1 - density))


def independent_union(density: float, batch: int) -> float:
    """Share of the neurons that B sequences select together if none knows of another: `1 - (1 - density)**B`."""
    return 1 - (1 - density) ** batch


@dataclass(frozen=True)
class Machine:
    """What computes: bytes read and floating-point operations, each per second."""

    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True)
class Part:
    """Weights that are read once in a generation step, whatever the batch: how many, and their bytes."""

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
        cache_bytes: of one sequence's keys and values, at a given context.
    """

    ff: Part
    other: Part
    cache_bytes: int

    def nbytes(self, batch: int, ff_read: float = 1.0) -> float:
        """Bytes of a step that reads this share of the FF."""
        return self.other.nbytes + ff_read * self.ff.nbytes + batch * self.cache_bytes

    def speedup(self, batch: int, ff_read: float) -> float:
        """Speed-up at most, by bytes: of a batch of one without a cache it is `ceiling`."""
        return self.nbytes(batch) / self.nbytes(batch, ff_read)

    def flops_per_ff_byte(self, batch: int, density: float = 1.0, ff_read: float = 1.0) -> float:
        """Operations of the FF for every byte of it that is read: a machine that does fewer is bound by arithmetic."""
        return density * self.ff.operations(batch) / (ff_read * self.ff.nbytes)

    def ff_bound_by(self, machine: Machine, batch: int, density: float = 1.0, ff_read: float = 1.0) -> str:
        """`bytes` or `arithmetic`: what the FF takes longer for."""
        most = machine.flops_per_s / machine.bytes_per_s
        return "arithmetic" if self.flops_per_ff_byte(batch, density, ff_read) > most else "bytes"

    def seconds(self, machine: Machine, batch: int, density: float = 1.0, ff_read: float = 1.0) -> float:
        """Least time of a step: FF, then other weights, each as long as its bytes or its arithmetic take.

        Attention is counted by the bytes of the cache alone: it does a few operations a byte.
        """

        def least(part: Part, computed: float, read: float) -> float:
            return max(
                read * part.nbytes / machine.bytes_per_s, computed * part.operations(batch) / machine.flops_per_s
            )

        cache = batch * self.cache_bytes / machine.bytes_per_s
        return least(self.ff, density, ff_read) + least(self.other, 1.0, 1.0) + cache

    def speedup_in_time(self, machine: Machine, batch: int, density: float, ff_read: float) -> float:
        """Speed-up of `seconds`."""
        return self.seconds(machine, batch) / self.seconds(machine, batch, density, ff_read)


@torch.no_grad()
def step_cost(model: PreTrainedModel, context: int, bytes_per_weight: float | None = None) -> StepCost:
    """What a generation step of the model reads, at a context of so many tokens.

    Args:
        model: a model; one on the device meta will do, as nothing but sizes is looked at.
        context: tokens that a sequence has in its cache; layers with a sliding window read no more than that.
        bytes_per_weight: count the Linears as if they were packed in so many bytes a weight.

    Raises:
        ValueError: GRIFFIN cannot prune the model.
        GriffinError: the model keeps no keys and values, or in a way that is not known.
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
    """Number and bytes of the weights that are read for a token, shared ones once."""
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
    """Bytes of one sequence's keys and values: those of two tokens tell what a token takes in every layer."""
    tokens = 2
    output: Any = model(torch.zeros(1, tokens, dtype=torch.int64, device=model.device), use_cache=True)
    total = 0
    for layer in getattr(getattr(output, "past_key_values", None), "layers", []):
        window = getattr(layer, "sliding_window", None) or context
        total += min(context, window) * (layer.keys.nbytes + layer.values.nbytes) // tokens
    if not total:
        raise GriffinError(f"{type(model).__name__} keeps no keys and values that could be counted")
    return total
