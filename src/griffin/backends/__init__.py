"""How the experts are computed in the generation phase. One module a backend, with one class that follows `SparseFF`.

`reference` is the truth that the others are tested against. `resolve` decides once which backend `auto` means, and why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from torch import Tensor

from griffin.backends import gather, native, reference, triton
from griffin.layouts import FFBlock
from griffin.method.dynamic import Dynamic
from griffin.native import library


class SparseFF(Protocol):
    """One FF block computed for its experts only.

    The model's own forward stays in charge: it calls `read` where it would call an input projection and `write` where
    it would call the output projection. What lies between works on k values instead of D_ff.
    """

    calls: int  # how often `write` ran, so that tests know which path did

    def __init__(self, block: FFBlock, undo: ExitStack) -> None:
        """What is changed of the model's own weights is put back when `undo` closes."""

    def select(self, experts: Sequence[Tensor], dynamic: Dynamic | None = None) -> None:
        """Take a new selection: one set of experts for all rows, or one for each sequence of the batch.

        Args:
            experts: the sets.
            dynamic: which of them a token computes; `None`: all. Its weights have a row, or one for each set.

        Shapes: each (k,), int64, ascending, all of the same k.
        """

    def refresh(self) -> bool:
        """Read the model's weights anew if they were replaced (`parameter.data = ...`) since `attach`.

        Returns whether the selection is lost and has to be made again.
        """

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """Tensors that `read` and `write` take the selection from; a captured step holds their addresses."""

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
    "triton": triton.TritonFF,
}
_NOT_DYNAMIC = {
    "gather": "copies experts once a prompt",
    "triton": "reads a list of experts that is made once a prompt",
}


def resolve(name: str, blocks: Sequence[FFBlock], *, dynamic: bool = False, compact: bool = False) -> Backend:
    """The backend that a name means for these blocks.

    Args:
        name: `auto`, or a backend's.
        blocks: the blocks.
        dynamic: whether dynamic neuron selection is wanted, which `gather` and `triton` do not have.
        compact: whether `native` copies the experts of quantised weights (`GriffinConfig.compact`).

    Raises:
        ValueError: there is none of that name, or it cannot compute these blocks.
    """
    native_ff = partial(native.NativeFF, compact=compact)
    if name == "auto":
        reason = next((reason for block in blocks if (reason := native.why_not(block)) is not None), None)
        if reason is None:
            return Backend("native", f"auto: experts are read in place ({library.isa()})", native_ff)
        if dynamic:
            why = f"auto: all experts are computed and some are left out, which saves no time, since {reason}"
            return Backend("reference", why, reference.ReferenceFF)
        if blocks[0].device.type == "cuda" and all(triton.why_not(block) is None for block in blocks):
            return Backend("triton", "auto: experts are read in place by Triton kernels", triton.TritonFF)
        if any(block.quantised for block in blocks):
            why = f"auto: quantised experts are dequantised, since {reason}"
            return Backend("reference", why, reference.ReferenceFF)
        why = f"auto: experts are copied once per selection, then read like a dense block, since {reason}"
        return Backend("gather", why, gather.GatherFF)
    if name not in _BACKENDS:
        raise ValueError(f"backend is {name!r}; expected auto or one of {', '.join(_BACKENDS)}")
    if dynamic and (reason := why_not_dynamic(name)) is not None:
        raise ValueError(f"{reason}; use backend native, or a selection without dynamic+")
    return Backend(name, "asked for by name", native_ff if name == "native" else _BACKENDS[name])


def why_not_dynamic(name: str) -> str | None:
    """Why a backend, by its name, has no dynamic neuron selection; `None` if it has."""
    if name not in _NOT_DYNAMIC:
        return None
    return f"the {name} backend {_NOT_DYNAMIC[name]}, and dynamic neuron selection chooses them for every token"
