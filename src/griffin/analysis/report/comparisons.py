"""Compare every figure of a sweep with the full model's, with the interval of the difference."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from griffin.analysis.bootstrap import Interval, mean_interval, paired_interval
from griffin.analysis.cells import FULL, Cell, Key, Metric
from griffin.analysis.folder import Folder
from griffin.config import BEST

NATS = "nll"  # the examples' values whose mean is the logarithm of the perplexity
PERPLEXITY = "perplexity"
_FEWEST = 10  # an interval over fewer examples is not trusted
# The methods in the order of tables and legends.
_METHODS = (FULL, BEST, "dynamic+topk", "prior+topk", "topk", "topk_sample", "sample", "magnitude", "wanda", "random")


@dataclass(frozen=True)
class Setting:
    """How the model was run; each setting is a row of the tables.

    With experts for each sequence the batch size does not matter, so it is kept only for batches that share experts.
    """

    method: str
    density: float
    batch_size: int
    phase: str | None

    @classmethod
    def of(cls, key: Key) -> Setting:
        """The setting of a cell."""
        phase = None if key.phase == "continuation" else key.phase  # the default; other kinds of cells have no phase
        batch_size = key.batch_size if key.batch == "shared" and key.method != FULL else 1
        return cls(key.method, key.density, batch_size, phase)

    @property
    def name(self) -> str:
        """The method, and every setting that is not the default, in a few words."""
        words = ["full model" if self.method == FULL else self.method]
        words += [f"shared by a batch of {self.batch_size}"] if self.batch_size > 1 else []
        words += [self.phase.replace("_", " ")] if self.phase else []
        return ", ".join(words)

    @property
    def order(self) -> tuple[Any, ...]:
        """The sort key in a table: by method, then by decreasing density."""
        rank = _METHODS.index(self.method) if self.method in _METHODS else len(_METHODS)
        return rank, self.method, self.batch_size, self.phase or "", -self.density


@dataclass(frozen=True)
class Score:
    """A figure of a cell beside the full model's.

    Args:
        cell: the cell of the figure.
        name: the metric's name.
        metric: the figure.
        difference: difference to the full model, paired over the examples; for perplexities as a share of the full
            model's. `None` for the full model, and if there is no full model. The ends are nan without an interval.
        relative: whether the difference is a share.
    """

    cell: Cell
    name: str
    metric: Metric
    difference: Interval | None
    relative: bool

    @property
    def verdict(self) -> str:
        """`worse` or `better` if the interval of the difference excludes 0, else `unclear`; empty without an interval.

        Few examples are always unclear: if all differences have one sign by chance, so do all resampled means.
        """
        if self.difference is None or math.isnan(self.difference.low):
            return ""
        if self.difference.low <= 0.0 <= self.difference.high or self.cell.n < _FEWEST:
            return "unclear"
        return "better" if (self.difference.value > 0) == self.metric.higher_is_better else "worse"


class Comparisons:
    """The cells of a folder, each figure compared with the full model's of the same task and examples."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._samples: dict[str, dict[str, Any]] = {}
        self._full = {_alike(cell.key): cell for cell in folder.cells.values() if cell.key.method == FULL}

    def cells(self, kind: str) -> list[Cell]:
        """The cells of a kind, in the order of the tables."""
        cells = [cell for cell in self._folder.cells.values() if cell.key.kind == kind]
        return sorted(
            cells, key=lambda cell: (Setting.of(cell.key).order, cell.key.prompt or 0, cell.key.generate or 0)
        )

    def sets(self, kind: str) -> dict[str, list[Cell]]:
        """The cells of tasks or texts, grouped by their examples; only figures of the same examples are compared.

        The names are those of the tasks and texts. Groups with the same name also get their differences.
        """
        by_examples: dict[Key, list[Cell]] = {}
        for cell in self.cells(kind):
            by_examples.setdefault(_examples(cell.key), []).append(cell)
        return {_told_apart(key, by_examples): cells for key, cells in by_examples.items()}

    def samples(self, cell: Cell) -> dict[str, Any]:
        """The samples of a cell, read once."""
        if cell.id not in self._samples:
            self._samples[cell.id] = self._folder.samples_of(cell)
        return self._samples[cell.id]

    def texts(self, cell: Cell) -> dict[str, Any]:
        """The texts of a cell; empty if they were removed."""
        return self._folder.texts_of(cell)

    def full(self, cell: Cell) -> Cell | None:
        """The full model's cell of the same kind, task and lengths."""
        return self._full.get(_alike(cell.key))

    def score(self, cell: Cell, name: str) -> Score | None:
        """A figure of a cell; `None` if the cell does not have it."""
        metric = cell.metrics.get(name)
        if metric is None:
            return None
        relative = PERPLEXITY in name
        full = self.full(cell)
        if full is None or full is cell or name not in full.metrics:
            return Score(cell, name, metric, None, relative)
        ours, theirs = (self._values(one, name) for one in (cell, full))
        doc_ids = [self.samples(one).get("doc_ids") for one in (cell, full)]
        if ours is None or theirs is None or len(ours) != len(theirs) or doc_ids[0] != doc_ids[1]:
            return Score(cell, name, metric, _without_interval(metric, full.metrics[name], relative), relative)
        groups = self.samples(full).get("groups")
        difference = paired_interval(ours, theirs, weights=self._weights(full, name), groups=groups, seed=cell.key.seed)
        if relative:
            difference = Interval(*(math.expm1(end) for end in (difference.value, difference.low, difference.high)))
        return Score(cell, name, metric, difference, relative)

    def scores(self, cells: Iterable[Cell]) -> list[Score]:
        """All figures of the cells."""
        scores = [self.score(cell, name) for cell in cells for name in cell.metrics]
        return [score for score in scores if score is not None]

    def _values(self, cell: Cell, name: str) -> list[float] | None:
        """The examples' values, whose mean is the figure (or the logarithm of a perplexity); `None` without them."""
        values = self.samples(cell).get("values", {}).get(NATS if name == PERPLEXITY else name)
        if not values or not all(isinstance(value, int | float) for value in values):
            return None
        if PERPLEXITY in name and name != PERPLEXITY:  # a task stores each document's perplexity
            values = [math.log(value) for value in values]
        mean = mean_interval(values, weights=self._weights(cell, name), resamples=1).value
        mean = math.exp(mean) if PERPLEXITY in name else mean
        return values if math.isclose(mean, cell.metrics[name].value, rel_tol=1e-6, abs_tol=1e-6) else None

    def _weights(self, cell: Cell, name: str) -> list[float] | None:
        weights = self.samples(cell).get("weights", {}).get(NATS if name == PERPLEXITY else name)
        return weights if isinstance(weights, list) else None


def _alike(key: Key) -> Key:
    """The part of the key that a cell shares with the full model's cell it is compared with.

    It includes the seed, as some tasks draw their examples with it.
    """
    return replace(key, method=FULL, density=1.0, batch="shared", phase=None)


def _examples(key: Key) -> Key:
    """The part of the key that cells of a task or text share if they were measured on the same examples."""
    prompt = None if key.kind == "perplexity" else key.prompt  # the source of a text includes its windows
    return replace(_alike(key), batch_size=1, prompt=prompt, generate=None)


def _told_apart(key: Key, others: Iterable[Key]) -> str:
    def words(key: Key) -> list[str]:
        source, _, windows = (key.source or "").partition(", ")
        return [
            "all examples" if key.limit is None else f"{key.limit} examples",
            "the model's window" if key.prompt is None else f"at most {key.prompt} tokens",
            f"data {source}",
            windows,
            f"seed {key.seed}",
        ]

    alike = [words(other) for other in others if other.task == key.task]
    differing = [word for word, *rest in zip(words(key), *alike, strict=True) if len(set(rest)) > 1]
    name = key.task or "text"
    return f"{name} ({', '.join(differing)})" if differing else name


def _without_interval(metric: Metric, full: Metric, relative: bool) -> Interval:
    value = metric.value / full.value - 1 if relative and full.value else metric.value - full.value
    return Interval(value, math.nan, math.nan)
