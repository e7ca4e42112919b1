"""The registry of methods: how neurons are scored and selected. One row a method; standard library only.

Flags, help pages, configs, sweeps and reports read `METHODS`. The functions of the paper's methods are named by
"module:function" and imported when they are first used, so that `griffin --help` does not wait for torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

Scores = Callable[..., Any]
Select = Callable[..., Any]


@dataclass(frozen=True)
class Method:
    """One method.

    Args:
        name: what configs, flags and tables call it.
        summary: what it selects, in a line.
        select: `(scores, k, seeds) -> experts`, a function or "module:function". `None`: the method keeps single
            weights instead of neurons (Wanda), so it saves no time and only evaluations offer it.
        scores: `(blocks, statistics, batch) -> scores`, a function or "module:function": what neurons are ranked by;
            `griffin.method.scores.flocking` unless given. `blocks` are of one width; `batch` is the config's.
        needs: what the prompt phase gathers beside the flocking statistic: "inputs" (squared norms of the projections'
            inputs), "ups" (energies of the up projection).
        static: the scores do not depend on the prompt, so experts are selected at `attach` and nothing is gathered.

    Shapes:
        scores: (N, D_ff), one row for each layer and set of experts. experts: (N, k), int64, each row ascending.
        `scores(...)` returns (layers, sets, D_ff): one set, or one for each sequence if `batch` is "per_sequence".
    """

    name: str
    summary: str
    select: Select | str | None
    scores: Scores | str = "griffin.method.scores:flocking"
    needs: frozenset[str] = frozenset()
    static: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def select_function(self) -> Select:
        """`select`, imported.

        Raises:
            ValueError: the method selects no neurons.
        """
        if self.select is None:
            raise ValueError(f"selection {self.name} keeps single weights, not neurons")
        select: Select = _imported(self.select)
        return select

    @property
    def scores_function(self) -> Scores:
        """`scores`, imported."""
        scores: Scores = _imported(self.scores)
        return scores


METHODS: dict[str, Method] = {}


def register_method(method: Method) -> Method:
    """Add a method: from then on configs, flags, sweeps and reports know it by its name.

        def last(scores, k, seeds):
            width = scores.shape[1]
            return torch.arange(width - k, width).repeat(len(scores), 1)

        griffin.register_method(griffin.Method("last", "the last k neurons", select=last))

    Raises:
        ValueError: there is one of that name, or the name cannot be part of a selection.
    """
    if method.name in METHODS:
        raise ValueError(f"there is a method {method.name!r} already; choose another name")
    if not method.name or not method.name.replace("_", "").isalnum():
        raise ValueError(f"the method's name is {method.name!r}; expected letters, digits and underscores")
    METHODS[method.name] = method
    return method


_SELECTION = "griffin.method.selection"

for _method in (
    Method("topk", "the neurons of largest flocking statistic: the paper's", f"{_SELECTION}:topk"),
    Method(
        "sample", "drawn with probability proportional to the statistic: the paper's variant", f"{_SELECTION}:sample"
    ),
    Method("topk_sample", "half of each: the paper's variant", f"{_SELECTION}:topk_sample"),
    Method("random", "drawn uniformly: control", f"{_SELECTION}:random"),
    Method(
        "magnitude",
        "the neurons of largest weights, whatever the prompt: the paper's static baseline",
        f"{_SELECTION}:topk",
        scores="griffin.method.scores:magnitude",
        static=True,
    ),
    Method(
        "wanda",
        "single weights by weight times input, which saves no time: the paper's unstructured baseline, in evaluations",
        None,
        needs=frozenset({"inputs"}),
    ),
):
    register_method(_method)


def _imported(function: Any) -> Any:
    if not isinstance(function, str):
        return function
    module, _, name = function.partition(":")
    return getattr(import_module(module), name)
