"""Replace methods on one instance, put back exactly what was there, and keep patched modules from being copied."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NoReturn

from torch import nn

_MISSING = object()
_GUARD = "_griffin_guard"


def patch(stack: ExitStack, instance: Any, name: str, replacement: Any) -> None:
    """Set `instance.name` until `stack` closes.

    What the instance itself held under that name (accelerate's device hooks hold their forward so) is put back; where
    it held nothing, nothing stays.
    """
    before = vars(instance).get(name, _MISSING)
    vars(instance)[name] = replacement

    def undo() -> None:
        if before is _MISSING:
            vars(instance).pop(name, None)
        else:
            vars(instance)[name] = before

    stack.callback(undo)


class _Guard:
    """Refuses to be copied: a copied or pickled module would keep calling the original's weights."""

    def _refuse(self, *_: Any) -> NoReturn:
        raise ValueError(
            "GRIFFIN is attached to this model, and a copy would go on computing with the original's weights; detach "
            "before copying or pickling the model (its state_dict can be saved while attached)"
        )

    __deepcopy__: Callable[..., NoReturn] = _refuse
    __copy__: Callable[..., NoReturn] = _refuse
    __reduce_ex__: Callable[..., NoReturn] = _refuse


def guard(stack: ExitStack, module: nn.Module) -> None:
    """Make copying and pickling of a module, and of what contains it, raise `ValueError` until `stack` closes."""
    patch(stack, module, _GUARD, _Guard())


def is_attached(module: nn.Module) -> bool:
    """Whether a module is guarded: GRIFFIN is attached to it."""
    return _GUARD in vars(module)
