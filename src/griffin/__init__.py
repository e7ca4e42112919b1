"""GRIFFIN: faster LLM generation from the prompt's own feedforward experts, with no training.

Dong, Chen, Chi: Prompt-prompted Mixture of Experts for Efficient LLM Generation (arXiv 2404.01365).

Names are imported when they are first used, so that `griffin --help` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from griffin.config import GriffinConfig
from griffin.errors import GriffinError
from griffin.version import __version__

if TYPE_CHECKING:
    from griffin.attachment import Conversation, Griffin, Phase, attach
    from griffin.engine.step import Sampling, Step, generate_step
    from griffin.families import LAYOUTS, Layout
    from griffin.generation.generate import Result, generate, stream_generate
    from griffin.layouts import FFBlock, find_ff_blocks
    from griffin.models.load import load

_HOMES = {
    "griffin.attachment": ("Conversation", "Griffin", "Phase", "attach"),
    "griffin.generation.generate": ("Result", "generate", "stream_generate"),
    "griffin.models.load": ("load",),
    "griffin.engine.step": ("Sampling", "Step", "generate_step"),
    "griffin.families": ("LAYOUTS", "Layout"),
    "griffin.layouts": ("FFBlock", "find_ff_blocks"),
}

__all__ = [
    "LAYOUTS",
    "Conversation",
    "FFBlock",
    "Griffin",
    "GriffinConfig",
    "GriffinError",
    "Layout",
    "Phase",
    "Result",
    "Sampling",
    "Step",
    "__version__",
    "attach",
    "find_ff_blocks",
    "generate",
    "generate_step",
    "load",
    "stream_generate",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(import_module(home), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'griffin' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
