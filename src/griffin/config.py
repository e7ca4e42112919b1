"""The one configuration object. Standard library only, so that every integration can import it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from griffin.methods import METHODS, Method

# What may stand before a method's name, joined by "+", as in "dynamic+topk".
REFINEMENTS = {
    "prior": "the model's profile counts as so many tokens of the prompt, which helps short prompts",
    "dynamic": "dynamic neuron selection: a token computes those experts whose gates matter; density means bytes",
    "planes": "as dynamic, and the token decides how many bits of a neuron are read; for quantised weights",
}
AUTO = "auto"
BEST = "prior+dynamic+topk"
"""The selection that `loss=` uses."""
BATCHES = ("shared", "per_sequence")
BACKENDS = ("auto", "reference", "gather", "native", "triton")


@dataclass(frozen=True)
class GriffinConfig:
    """What to keep of every FF block during generation, and how.

    The field names are the same everywhere: keyword arguments of `attach`, command-line flags, keys of an integration.

    Args:
        density: share of the FF neurons kept in the generation phase, 0 < density <= 1. 1.0 is the full model. With
            dynamic neuron selection: the share of the FF weights' bytes that are read for a token.
        selection: a name of `griffin.METHODS`: `topk` (the paper's), `sample`, `topk_sample` (the paper's variants),
            `random` (control), `magnitude` (the paper's static baseline, which ignores the prompt) or `wanda` (the
            paper's unstructured baseline, which evaluations alone offer). `dynamic+` before one of the first four adds
            dynamic neuron selection (`griffin.method.dynamic`), which loses far less at the same bytes; `planes+`
            before `topk` chooses bits as well (`griffin.method.planes`); `prior+` adds the model's profile. `auto` is
            `topk` with `prior+` for a model that has a profile, and with `dynamic+` where that saves time: where the
            native backend runs.
        layers: indices of the layers to prune; `None` means all of them. The others stay whole.
        batch: `shared` (one set of experts for the whole batch: the paper's weighted sum) or `per_sequence`.
        backend: `auto`, or the name of one (`reference`, `gather`, `native`, `triton`).
        seed: seed of the random selections. The same seed, prompt and layer give the same experts.
        profile: file of the model's profile, made by `griffin profile`; `None` looks among those that come with griffin
            and those in its cache.
        loss: a target instead of a density: the smallest density whose KL to the full model was at most this, in nats a
            token, when the profile was made. The selection is then `prior+dynamic+topk`.
        compact: whether the native backend copies the experts of a selection one behind the other, where weights are
            quantised and no token chooses among them: a step reads them faster (`docs/cpu.md`), for `density` of the FF
            weights' memory more. Experts that differ between the sequences of a batch are read in place.

    Raises:
        ValueError: a field has a value outside of the above.
    """

    density: float = 0.5
    selection: str = AUTO
    layers: tuple[int, ...] | None = None
    batch: str = "shared"
    backend: str = "auto"
    seed: int = 0
    profile: str | None = None
    loss: float | None = None
    compact: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "density", _density(self.density))
        object.__setattr__(self, "selection", _selection(self.selection))
        _choice("batch", self.batch, BATCHES)
        _choice("backend", self.backend, BACKENDS)
        if self.method.select is None and self.backend not in ("auto", "reference"):
            raise ValueError(
                f"backend is {self.backend!r}, but selection {self.method} keeps single weights, not neurons: it saves "
                "no time, whatever computes it; leave the backend out"
            )
        if self.layers is not None:
            object.__setattr__(self, "layers", _layers(self.layers))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed!r}; expected a whole number from 0 to 2**63 - 1")
        if self.profile is not None and not isinstance(self.profile, str):
            raise ValueError(f"profile is {self.profile!r}; expected the path of a file, or None")
        if self.loss is not None:
            object.__setattr__(self, "loss", _loss(self))
        if not isinstance(self.compact, bool):
            raise ValueError(f"compact is {self.compact!r}; expected True or False")

    @property
    def method(self) -> Method:
        """The selection's method, without refinements; `auto` ranks by `topk`."""
        return METHODS["topk" if self.selection == AUTO else self.selection.rpartition("+")[2]]

    @property
    def dynamic(self) -> bool:
        """Whether the selection has, or with `auto` or `loss` may turn out to have, dynamic neuron selection."""
        return self.selection == AUTO or self.loss is not None or self.planes or "dynamic" in self.selection.split("+")

    @property
    def planes(self) -> bool:
        """Whether dynamic neuron selection decides how many bits of a neuron are read."""
        return "planes" in self.selection.split("+")

    @property
    def prior(self) -> bool:
        """Whether the selection names the profile."""
        return "prior" in self.selection.split("+")

    @property
    def needs(self) -> frozenset[str]:
        """What the prompt phase has to gather beside the flocking statistic."""
        return self.method.needs | ({"ups"} if self.dynamic else set())

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
        raise ValueError(f"give either loss ({value:g}) or density ({config.density:g}), not both")
    if config.selection not in (GriffinConfig.selection, AUTO, BEST):
        raise ValueError(f"selection is {config.selection!r}, but loss= uses {BEST}; leave the selection out")
    return float(value)


def _selection(value: object) -> str:
    if value == AUTO:
        return AUTO
    *refinements, name = str(value).replace(" ", "").split("+")
    _choice("selection", name, (*METHODS, AUTO))
    method = METHODS.get(name)
    for refinement in refinements:
        _choice("selection's refinement", refinement, tuple(REFINEMENTS))
    if refinements and (method is None or method.static or method.select is None):
        raise ValueError(
            f"selection is {value!r}, but {name} cannot be refined by {refinements[0]}; expected "
            f"{refinements[0]}+topk, or {name} alone"
        )
    if "planes" in refinements and ("dynamic" in refinements or name != "topk"):
        raise ValueError(
            f"selection is {value!r}; planes is a dynamic selection itself, among experts chosen by topk: expected "
            "planes+topk or prior+planes+topk"
        )
    return "+".join([*(refinement for refinement in REFINEMENTS if refinement in refinements), name])


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
