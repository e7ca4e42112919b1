"""The one configuration object. Standard library only, so that every integration can import it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

# The one list of methods, by name: flags, help pages, sweeps and reports read it. `griffin.method.selection` has a
# function for each of them, and its `register` adds another.
SELECTIONS = {
    "topk": "the neurons of largest flocking statistic: the paper's",
    "sample": "drawn with probability proportional to the statistic: the paper's variant",
    "topk_sample": "half of each: the paper's variant",
    "random": "drawn uniformly: control",
    "magnitude": "the neurons of largest weights, whatever the prompt: the paper's static baseline",
    "wanda": "single weights by weight times input, which saves no time: the paper's unstructured baseline",
}
# What may stand before a selection, joined by "+", as in "tier+topk".
REFINEMENTS = {
    "prior": "the model's profile counts as so many tokens of the prompt, which helps short prompts",
    "tier": "up and down of those neurons only whose gates matter, for every token anew; density means bytes",
}
AUTO = "auto"
BEST = "prior+tier+topk"  # what a target loss means
BATCHES = ("shared", "per_sequence")
BACKENDS = ("auto", "reference", "gather", "native")


@dataclass(frozen=True)
class GriffinConfig:
    """What to keep of every FF block during generation, and how.

    The field names are the same everywhere: keyword arguments of `attach`, command-line flags, keys of an integration.

    Args:
        density: share of the FF neurons kept in the generation phase, 0 < density <= 1. 1.0 is the full model. With a
            token tier: the share of the FF weights' bytes that are read for a token.
        selection: `topk` (the paper's), `sample`, `topk_sample` (the paper's variants), `random` (control),
            `magnitude` (the paper's static baseline, which ignores the prompt) or `wanda` (the paper's unstructured
            baseline: single weights, not neurons, so that it saves no time; for evaluation). `tier+` before one of the
            first four adds the token tier (`griffin.method.dynamic`), which loses far less at the same bytes; `prior+`
            the model's profile. `auto` is `topk` with `prior+` for a model that has a profile, and with `tier+` where
            that saves time: where the native backend runs.
        layers: indices of the layers to prune; `None` means all of them. The others stay whole.
        batch: `shared` (one set of experts for the whole batch: the paper's weighted sum) or `per_sequence`.
        backend: `auto`, or the name of one (`reference`, `gather`, `native`).
        seed: seed of the random selections. The same seed, prompt and layer give the same experts.
        profile: file of the model's profile, made by `griffin profile`; `None` looks among those that come with griffin
            and those in its cache.
        loss: a target instead of a density: the smallest density whose KL to the full model was at most this, in nats a
            token, when the profile was made. The selection is then `prior+tier+topk`.

    Raises:
        ValueError: a field has a value outside of the above.
    """

    density: float = 0.5
    selection: str = "topk"
    layers: tuple[int, ...] | None = None
    batch: str = "shared"
    backend: str = "auto"
    seed: int = 0
    profile: str | None = None
    loss: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "density", _density(self.density))
        object.__setattr__(self, "selection", _selection(self.selection))
        _choice("batch", self.batch, BATCHES)
        _choice("backend", self.backend, BACKENDS)
        if self.selection == "wanda" and self.backend not in ("auto", "reference"):
            raise ValueError(
                f"backend is {self.backend!r}, but selection wanda keeps single weights, not neurons: it saves no "
                "time, whatever computes it; leave the backend out"
            )
        if self.layers is not None:
            object.__setattr__(self, "layers", _layers(self.layers))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed!r}; expected a whole number from 0 to 2**63 - 1")
        if self.profile is not None and not isinstance(self.profile, str):
            raise ValueError(f"profile is {self.profile!r}; expected the path of a file, or None")
        if self.loss is not None:
            object.__setattr__(self, "loss", _loss(self))

    @property
    def ranking(self) -> str:
        """The selection without its refinements, a name of `SELECTIONS`."""
        return self.selection.rpartition("+")[2]

    @property
    def gathers(self) -> frozenset[str]:
        """What the prompt phase has to gather beside the flocking statistic."""
        if self.selection == "wanda":
            return frozenset({"inputs"})
        return frozenset({"ups"} if self.tier else ())

    @property
    def tier(self) -> bool:
        """Whether there is a token tier."""
        return self.selection == AUTO or "tier" in self.selection.split("+") or self.loss is not None

    @property
    def prior(self) -> bool:
        """Whether the profile counts as tokens of the prompt."""
        return "prior" in self.selection.split("+")

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> GriffinConfig:
        """Build a config from outside data (JSON, model arguments), refusing unknown keys.

        Raises:
            ValueError: an unknown key (with the nearest known one), or a value that a field refuses.
        """
        known = [field.name for field in fields(cls)]
        for key in mapping:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"unknown GRIFFIN setting {key!r}{hint}; known are {', '.join(known)}")
        return cls(**mapping)

    def experts_of(self, width: int) -> int:
        """Number of experts k = floor(density * width), at least 1, for an FF block of `width` neurons.

        The product is rounded to 6 decimals first: 0.29 * 100 is 28.999999999999996 in binary, and 29 is meant.
        """
        return max(1, math.floor(round(self.density * width, 6)))


def _density(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value <= 1.0:
        raise ValueError(
            f"density is {value!r}; expected a number above 0 and at most 1: the share of FF neurons to keep, "
            "for example 0.5"
        )
    return float(value)


def _loss(config: GriffinConfig) -> float:
    value = config.loss
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0.0:
        raise ValueError(
            f"loss is {value!r}; expected a number above 0: KL to the full model in nats a token, for example 0.05"
        )
    if config.density != GriffinConfig.density:
        raise ValueError(f"there are a loss, {value:g}, and a density, {config.density:g}; give one of them")
    if config.selection not in (GriffinConfig.selection, AUTO, BEST):
        raise ValueError(f"selection is {config.selection!r}, but a loss is that of {BEST}; leave the selection out")
    return float(value)


def _selection(value: object) -> str:
    if value == AUTO:
        return AUTO
    *refinements, ranking = str(value).replace(" ", "").split("+")
    _choice("selection", ranking, tuple(SELECTIONS))
    for name in refinements:
        _choice("selection's refinement", name, tuple(REFINEMENTS))
    if refinements and ranking in ("wanda", "magnitude"):
        raise ValueError(
            f"selection is {value!r}, but {ranking} is a baseline of its own, which has no {refinements[0]}; expected "
            f"{refinements[0]}+topk, or {ranking} alone"
        )
    return "+".join([*(name for name in REFINEMENTS if name in refinements), ranking])


def _choice(field: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"{field} is {value!r}{hint}; expected one of {', '.join(allowed)}")


def _layers(value: object) -> tuple[int, ...]:
    if isinstance(value, str | bytes | int) or not hasattr(value, "__iter__"):
        raise ValueError(f"layers is {value!r}; expected a list of layer indices such as [0, 1, 2], or None for all")
    layers = tuple(value)
    if any(isinstance(layer, bool) or not isinstance(layer, int) or layer < 0 for layer in layers):
        raise ValueError(f"layers is {value!r}; expected whole numbers from 0")
    if not layers:
        raise ValueError("layers is empty, so nothing would be pruned; leave it out to prune all layers")
    return tuple(sorted(set(layers)))
