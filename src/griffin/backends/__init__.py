"""How the experts are computed in the generation phase. One module a backend, one class of one shape in each.

`reference` is the truth that the others are tested against. `resolve` says once which backend `auto` means and why.

The native library is five modules, each built on those before it: `library`, `memory`, `packing`, `operands`, `kernel`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from griffin.backends import gather, masked, native, reference
from griffin.layouts import FFBlock
from griffin.method.dynamic import Tier
from griffin.native import library


class SparseFF(Protocol):
    """One FF block computed for its experts only.

    The model's own forward stays in charge: it calls `read` where it would call an input projection and `write` where
    it would call the output projection. What lies between works on k values instead of D_ff.
    """

    calls: int  # how often `write` ran, so that tests know which path did

    def __init__(self, block: FFBlock, undo: ExitStack) -> None:
        """What is changed of the model's own weights is put back when `undo` closes."""

    def select(self, experts: Sequence[Tensor], tier: Tier | None = None) -> None:
        """Take a new selection: one set of experts for all rows, or one for each sequence of the batch.

        Args:
            experts: the sets.
            tier: which of them a token computes; `None`: all. Its weights have a row, or one for each set.

        Shapes: each (k,), int64, ascending, all of the same k.
        """

    def read(self, which: int, x: Tensor) -> Tensor:
        """Input projection number `which`, for the experts.

        Shapes: x is (B, S, D), or (B * S, D) where the model flattens its tokens. Returns the same with k for D, and 2k
        where gate and up are fused.
        """

    def write(self, z: Tensor) -> Tensor:
        """Output projection from the experts.

        Shapes: z is (B, S, k) or (B * S, k). Returns the same with D for k.
        """


@dataclass(frozen=True)
class Backend:
    """A backend's name, why it was taken, and what makes its FF blocks."""

    name: str
    reason: str
    make: Callable[[FFBlock, ExitStack], SparseFF]


_BACKENDS: dict[str, type[SparseFF]] = {
    "reference": reference.ReferenceFF,
    "gather": gather.GatherFF,
    "native": native.NativeFF,
}


MASKED = Backend("masked", "single weights are kept, not neurons: saves no time", masked.MaskedFF)


def resolve(name: str, blocks: Sequence[FFBlock], *, tier: bool = False) -> Backend:
    """The backend that a name means for these blocks.

    Args:
        name: `auto`, or a backend's.
        blocks: the blocks.
        tier: whether a token tier is wanted, which `gather` does not have.

    Raises:
        ValueError: there is none of that name, or it cannot compute these blocks.
    """
    if name == "auto":
        unusable = next((reason for block in blocks if (reason := native.unusable(block)) is not None), None)
        if unusable is None:
            return Backend("native", f"auto: experts are read in place ({library.isa()})", native.NativeFF)
        if tier:
            reason = f"auto: all experts are computed and some are left out, which saves no time, since {unusable}"
            return Backend("reference", reason, reference.ReferenceFF)
        if any(block.quantised for block in blocks):
            return Backend(
                "reference", f"auto: quantised experts are dequantised, since {unusable}", reference.ReferenceFF
            )
        reason = f"auto: experts are copied once per selection, then read like a dense block, since {unusable}"
        return Backend("gather", reason, gather.GatherFF)
    if name not in _BACKENDS:
        raise ValueError(f"backend is {name!r}; expected auto or one of {', '.join(_BACKENDS)}")
    if tier and name == "gather":
        raise ValueError("the gather backend copies experts once a prompt, a token tier chooses them anew: use native")
    return Backend(name, "asked for by name", _BACKENDS[name])
