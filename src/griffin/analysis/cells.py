"""Cells of a sweep: their keys, their results, and their lines of JSON."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from griffin.analysis.bootstrap import Interval

FULL = "full"
SAMPLES, TEXTS = "samples", "texts"  # subfolders of a results folder
KINDS = ("task", "perplexity", "speed", "flocking", "examples")


@dataclass(frozen=True)
class Key:
    """What a cell measures, apart from the model.

    Args:
        kind: one of `KINDS`.
        method: name of a selection, or `full`: the full model.
        density: share of the FF neurons kept; 1.0 for `full`.
        batch: `batch` of the `GriffinConfig`; `shared` for batches of one.
        batch_size: number of sequences run at once.
        phase: the tokens that a task scores with experts (`continuation`, `last_token`); `None` for other kinds.
        task: name of the task or of the text.
        source: origin of the task's data (`hub`, or `files` and a hash of the rows), or a hash of the text.
        prompt: tokens of the prompt; for a task, the limit of a context, `None` for the model's window.
        generate: tokens generated, or scored as if generated.
        limit: maximum number of examples; `None`: all.
        seed: seed of the random selections and of the bootstrap.
    """

    kind: str
    method: str
    density: float
    batch: str = "shared"
    batch_size: int = 1
    phase: str | None = None
    task: str | None = None
    source: str | None = None
    prompt: int | None = None
    generate: int | None = None
    limit: int | None = None
    seed: int = 0

    def __str__(self) -> str:
        words = [self.task or self.kind]
        words += [f"{self.prompt} + {self.generate} tokens"] if self.prompt and self.generate else []
        words += [self.method] if self.method == FULL else [self.method, f"{self.density:g}"]
        words += [self.batch.replace("_", " ")] if self.batch_size > 1 else []
        return " ".join(words)


@dataclass(frozen=True)
class Metric:
    """A figure of a cell with its confidence interval, `nan` where there is none."""

    value: float
    low: float = math.nan
    high: float = math.nan
    higher_is_better: bool = True

    @classmethod
    def of(cls, interval: Interval, *, higher_is_better: bool = True) -> Metric:
        """The metric of an interval."""
        return cls(interval.value, interval.low, interval.high, higher_is_better)


@dataclass(frozen=True)
class CellResult:
    """The result of measuring a cell.

    Args:
        metrics: figures by name.
        n: number of examples or sequences.
        truncated: how many of them did not fit the model's context.
        data: small series that only this kind of cell has.
        samples: the examples' values by metric under `values`, with `weights`, `groups` and `doc_ids`; pictures. A
            separate file holds them.
        texts: prompts and answers; another separate file holds them.
    """

    metrics: Mapping[str, Metric]
    n: int
    truncated: int = 0
    data: Mapping[str, Any] = field(default_factory=dict)
    samples: Mapping[str, Any] | None = None
    texts: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Model:
    """The model of a folder's results: `name` is the name the user gave, `fingerprint` identifies its weights."""

    name: str
    fingerprint: str
    weights: str
    dtype: str


@dataclass(frozen=True)
class Cell:
    """A finished cell, as read from a folder."""

    id: str
    key: Key
    model: Model
    versions: Mapping[str, str]
    machine: Mapping[str, Any]
    date: str
    seconds: float
    n: int
    truncated: int
    metrics: Mapping[str, Metric]
    data: Mapping[str, Any]
    samples: str | None  # path inside the folder


def cell_id(key: Key, model: Model) -> str:
    """16 hex digits that name a cell: the SHA-256 of its key and the model's fingerprint."""
    text = json.dumps({"key": asdict(key), "model": model.fingerprint}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cell_from(record: Any) -> Cell:
    """The cell in a line's JSON.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: the record is not a cell.
    """
    if not isinstance(record, dict) or set(record) != {column.name for column in fields(Cell)}:
        raise ValueError("its fields are not those of a cell")
    key = Key(**record["key"])
    model = Model(**record["model"])
    if record["id"] != cell_id(key, model):
        raise ValueError("its id does not belong to its key")
    metrics = {name: Metric(**_with_nan(metric)) for name, metric in record["metrics"].items()}
    if key.kind not in KINDS or not isinstance(record["data"], dict):
        raise ValueError(f"its kind is {key.kind!r}")
    expected = None if record["samples"] is None else f"{SAMPLES}/{record['id']}.json"
    if record["samples"] != expected:
        raise ValueError(f"its samples are in {record['samples']!r}, expected {expected!r}")
    return Cell(**{**record, "key": key, "model": model, "metrics": metrics})


def _with_nan(metric: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: math.nan if metric[name] is None else float(metric[name]) for name in ("value", "low", "high")}
    return values | {"higher_is_better": bool(metric["higher_is_better"])}


def json_text(value: Any) -> str:
    return json.dumps(_without_nan(value), allow_nan=False, separators=(",", ":"))


def _without_nan(value: Any) -> Any:
    """Replace nan and infinity by `None`, as JSON has neither."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return value
