"""Reads the settings: the key `griffin` of vLLM's additional config, and the density of a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from griffin.config import AUTO, GriffinConfig
from griffin.methods import METHODS

KEY = "griffin"
DENSITY = "griffin_density"
"""Name of a request's density in `SamplingParams.extra_args`, over HTTP in `vllm_xargs`."""

_SELECTIONS = [name for name, method in METHODS.items() if method.select is not None and not method.static]


def of(vllm_config: Any) -> GriffinConfig | None:
    """The config of an engine; `None` if its additional config has no key `griffin`.

    Raises:
        ValueError: a setting is unknown, has a wrong value, or is not available inside vLLM.
    """
    additional = vllm_config.additional_config
    if not isinstance(additional, Mapping) or KEY not in additional:
        return None
    given = additional[KEY]
    if not isinstance(given, Mapping):
        raise ValueError(f'additional config: griffin is {given!r}; expected settings, such as {{"density": 0.5}}')
    config = GriffinConfig.from_mapping(given)
    if config.selection == AUTO and config.loss is None:
        config = replace(config, selection="topk")  # the best of those that the plugin has
    if given.get("batch", "per_sequence") != "per_sequence":
        raise ValueError("batch is 'shared', but inside vLLM every request has its own experts; leave it out")
    if config.loss is not None or config.profile is not None or config.selection not in _SELECTIONS:
        asked = "a loss" if config.loss is not None else config.selection
        asked = "a profile" if config.profile is not None else asked
        raise ValueError(
            f"{asked} was asked for, which the vLLM plugin does not have: no dynamic neuron selection, no profile, "
            f"and no baseline that ignores the prompt; expected selection {', '.join(_SELECTIONS)}, and a density"
        )
    return replace(config, batch="per_sequence")


def of_request(params: Any, config: GriffinConfig) -> GriffinConfig:
    """The config of a request: the engine's, with the request's density if it names one.

    Raises:
        ValueError: the density is not valid, or another argument begins with `griffin`.
    """
    extra = getattr(params, "extra_args", None) or {}
    for name in extra:
        if str(name).startswith(KEY) and name != DENSITY:
            raise ValueError(f"unknown request argument {name!r}; a request may set its {DENSITY}")
    return replace(config, density=extra[DENSITY]) if DENSITY in extra else config
