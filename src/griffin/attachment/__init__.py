"""Attach GRIFFIN to a model, and take it off again without a trace."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from griffin.attachment.handle import Griffin, Phase, refuse_training
from griffin.attachment.plan import Plan
from griffin.attachment.selection import Selection
from griffin.config import GriffinConfig
from griffin.families import Layout
from griffin.method.statistics import Statistics

__all__ = ["GATHER_ONLY", "Griffin", "Phase", "Plan", "Selection", "Statistics", "attach", "config_from"]


GATHER_ONLY = GriffinConfig(density=1.0, selection="topk", backend="reference")
"""For `handle.gather()` alone: nothing is pruned, and the weights stay where they are."""


def attach(
    model: nn.Module, config: GriffinConfig | None = None, *, layout: Layout | None = None, **settings: Any
) -> Griffin:
    """Attach GRIFFIN to a Transformers causal language model.

    From then on `model.generate` runs the prompt through the full model, selects the experts of every FF block from it
    (Dong et al., arXiv 2404.01365, section 4), and generates with those alone. Weights, config and classes of the model
    stay as they are.

        with griffin.attach(model, density=0.5):
            model.generate(**inputs, max_new_tokens=200)

    Args:
        model: the model, in eval mode.
        config: what to keep; `None` means the defaults.
        layout: where the FF blocks are, for a family that no row of `griffin.LAYOUTS` fits.
        **settings: fields of `GriffinConfig`, by keyword, over those of `config`.

    Returns:
        The handle: experts, statistic, phases, `detach()`. Also a context manager.

    Raises:
        ValueError: a setting is unknown or out of range; the model is an encoder-decoder, a mixture of experts, of an
            unknown layout, in training mode, has weights that are not in memory, delegates `generate` to something
            that GRIFFIN cannot follow, or has GRIFFIN attached already.
    """
    refuse_training(model)
    handle = Griffin(model, config_from(config, settings), layout)
    handle.attach()
    return handle


def config_from(config: GriffinConfig | None, settings: dict[str, Any]) -> GriffinConfig:
    """A config with fields replaced by keyword.

    Raises:
        ValueError: a setting is unknown or out of range.
    """
    given = GriffinConfig.from_mapping(settings)  # refuses unknown keys with a hint
    return given if config is None else replace(config, **settings)
