"""Attach GRIFFIN to a model, and take it off again without a trace."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from torch import nn

from griffin.attachment.handle import Griffin, Phase, refuse_training
from griffin.attachment.selected import Selected
from griffin.attachment.transformers_generate import attach_generate
from griffin.config import GriffinConfig
from griffin.families import Layout
from griffin.method.statistics import Conversation

__all__ = ["Conversation", "Griffin", "Phase", "Selected", "attach"]


def attach(
    model: nn.Module,
    config: GriffinConfig | None = None,
    *,
    layout: Layout | None = None,
    mixed: bool = False,
    **settings: Any,
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
        mixed: sequences of one batch are selected one by one, each by a config of its own (`Griffin.select`, `use`).
        **settings: fields of `GriffinConfig`, by keyword, over those of `config`.

    Returns:
        The handle: experts, statistic, phases, `detach()`. Also a context manager.

    Raises:
        ValueError: a setting is unknown or out of range; the model is an encoder-decoder, a mixture of experts, of an
            unknown layout, in training mode, or has GRIFFIN attached already.
    """
    refuse_training(model)
    given = GriffinConfig.from_mapping(settings) if config is None else config
    if config is not None and settings:
        GriffinConfig.from_mapping(settings)  # refuses unknown keys with a hint
        given = replace(config, **settings)
    handle = Griffin(model, given, layout, mixed=mixed)
    with ExitStack() as stack:  # an exception in the middle leaves the model as it was
        handle._patch(stack)
        if not mixed:
            attach_generate(handle, stack)
        handle._begin(stack.pop_all())
    return handle
