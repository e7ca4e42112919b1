"""GRIFFIN: faster LLM generation from the prompt's own feedforward experts, with no training.

Dong, Chen, Chi: Prompt-prompted Mixture of Experts for Efficient LLM Generation (arXiv 2404.01365).
"""

from griffin.attach import Conversation, Griffin, Phase, attach
from griffin.config import GriffinConfig
from griffin.errors import GriffinError
from griffin.layouts import LAYOUTS, FFBlock, Layout, find_ff_blocks
from griffin.version import __version__

__all__ = [
    "LAYOUTS",
    "Conversation",
    "FFBlock",
    "Griffin",
    "GriffinConfig",
    "GriffinError",
    "Layout",
    "Phase",
    "__version__",
    "attach",
    "find_ff_blocks",
]
