"""Replace a method on one instance, and put back exactly what was there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

_MISSING = object()


def patch(stack: ExitStack, instance: Any, name: str, replacement: Callable[..., Any]) -> None:
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
