"""Transformers imported without what answering prompts in a process of our own does not need.

`transformers.modeling_utils` imports torch's compiler and its distributed tensors, and with them sympy; and SciPy,
accelerate and scikit-learn where they are installed. That is half of its time and 100 MB. It does without them where
they do not exist, so here they do not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

_NOT_NEEDED = ("accelerate", "scipy", "sklearn")


def lean() -> None:
    """Before transformers is imported: hide these packages, for good. Imports torch."""
    if "transformers" in sys.modules:
        return
    for name in _NOT_NEEDED:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # Python's own way to say "not installed"
    import torch

    torch.distributed.is_available = lambda: False
    # nothing is compiled here, and to decorate imports the compiler
    torch.compiler.disable = _undecorated  # type: ignore[assignment]


def _undecorated(function: Callable[..., Any] | None = None, *_: object, **__: object) -> Any:
    return (lambda decorated: decorated) if function is None else function
