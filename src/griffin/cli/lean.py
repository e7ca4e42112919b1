"""Transformers imported without what answering prompts in a process of our own does not need.

`transformers.modeling_utils` imports torch's compiler and its distributed tensors, and with them sympy; and SciPy,
accelerate and scikit-learn where they are installed. That is more than a third of the time of all imports, and 100 MB.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

_NOT_NEEDED = ("accelerate", "scipy", "sklearn")
_IMPORTED = ("griffin.generation.chat", "griffin.models.load", "transformers.generation.utils")


def import_lean() -> None:
    """Import what loads and answers; what that does not need looks, for good, as if it were not installed."""
    if "transformers" in sys.modules:
        return
    for name in _NOT_NEEDED:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # Python's own way to say so
    import torch

    torch.distributed.is_available = lambda: False
    stand_in = _Undecorating("torch._dynamo")
    stand_in.__path__ = [f"{folder}/_dynamo" for folder in torch.__path__]  # its modules can be imported one by one
    sys.modules["torch._dynamo"] = torch._dynamo = stand_in
    try:
        for name in _IMPORTED:
            import_module(name)
    finally:  # whoever compiles gets the real one
        del sys.modules["torch._dynamo"], torch._dynamo


class _Undecorating(ModuleType):
    """In place of torch's compiler: its decorators, which transformers uses when it is imported, change nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _undecorated


def _undecorated(function: Callable[..., Any] | None = None, *_: object, **__: object) -> Any:
    return (lambda decorated: decorated) if function is None else function
