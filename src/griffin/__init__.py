"""GRIFFIN: faster LLM generation from the prompt's own feedforward experts, with no training.

Dong, Chen, Chi: Prompt-prompted Mixture of Experts for Efficient LLM Generation (arXiv 2404.01365).

Names are imported when they are first used, so that `griffin --help` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from griffin.config import GriffinConfig
from griffin.errors import GriffinError
from griffin.methods import METHODS, Method, register_method
from griffin.version import __version__

if TYPE_CHECKING:
    from griffin.attachment import Griffin, Phase, Plan, Selection, Statistics, attach
    from griffin.engine.decoders import new_cache
    from griffin.engine.step import Sampling, Step, generate_step
    from griffin.families import LAYOUTS, Layout
    from griffin.generation.generate import Result, generate, stream_generate
    from griffin.layouts import FFBlock, find_ff_blocks
    from griffin.models.load import load

_HOMES = {
    "griffin.attachment": ("Griffin", "Phase", "Plan", "Selection", "Statistics", "attach"),
    "griffin.engine.decoders": ("new_cache",),
    "griffin.generation.generate": ("Result", "generate", "stream_generate"),
    "griffin.models.load": ("load",),
    "griffin.engine.step": ("Sampling", "Step", "generate_step"),
    "griffin.families": ("LAYOUTS", "Layout"),
    "griffin.layouts": ("FFBlock", "find_ff_blocks"),
}

__all__ = [
    "LAYOUTS",
    "METHODS",
    "FFBlock",
    "Griffin",
    "GriffinConfig",
    "GriffinError",
    "Layout",
    "Method",
    "Phase",
    "Plan",
    "Result",
    "Sampling",
    "Selection",
    "Statistics",
    "Step",
    "__version__",
    "attach",
    "find_ff_blocks",
    "generate",
    "generate_step",
    "load",
    "new_cache",
    "register_method",
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
