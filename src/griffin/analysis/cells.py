"""The results folder of a sweep: `cells.jsonl`, one JSON object a line, each the result of one cell of the matrix.

A line is written whole and flushed to the disk, after the file of its samples, so that a run that is killed at any
moment leaves only whole cells behind, and at most one broken last line, which is not believed. Nothing is ever
overwritten.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from griffin.analysis.bootstrap import Interval
from griffin.analysis.files import write_text
from griffin.errors import GriffinError
from griffin.version import __version__

LINES = "cells.jsonl"
SAMPLES = "samples"
FULL = "full"
KINDS = ("task", "perplexity", "speed", "flocking", "examples")


@dataclass(frozen=True)
class Key:
    """What a cell measures, apart from the model.

    Args:
        kind: one of `KINDS`.
        method: name of a selection, or `full`: the full model.
        density: share of the FF neurons kept; 1.0 for `full`.
        batch: whose experts a batch has, as in `GriffinConfig`; `shared` for batches of one.
        batch_size: sequences run at once.
        phase: which tokens a task scores with experts (`continuation`, `last_token`); `None` where it does not matter.
        task: name of the task or of the text.
        source: where the task's data come from (`files` or `hub`), or a hash of the text.
        prompt: tokens of the prompt.
        generate: tokens generated, or scored as if generated.
        limit: most examples; `None`: all.
        seed: of the random selections and of the bootstrap.
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
        words += [f"{self.prompt}+{self.generate} tokens"] if self.prompt else []
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
class Measured:
    """What measuring a cell found.

    Args:
        metrics: figures by name.
        n: number of examples or sequences.
        truncated: how many of them did not fit the model's context.
        data: the kind's own series, small.
        samples: values of every example by metric under `values` (and what each counts under `weights`), pictures,
            texts under `texts`; kept in a file of their own.
    """

    metrics: Mapping[str, Metric]
    n: int
    truncated: int = 0
    data: Mapping[str, Any] = field(default_factory=dict)
    samples: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Model:
    """Which model a folder holds results of: `name` is how it was asked for, `fingerprint` what it is."""

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


@dataclass
class Folder:
    """A results folder.

    Args:
        path: where it is.
        cells: its finished cells by id, in the order in which they were finished.
        complaints: what was found in it that is not believed, one clear line each.
    """

    path: Path
    cells: dict[str, Cell] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)

    def append(
        self,
        key: Key,
        model: Model,
        measured: Measured,
        seconds: float,
        versions: Mapping[str, str],
        machine: Mapping[str, Any],
    ) -> Cell:
        """Keep a finished cell: the file of its samples first, then its line.

        Raises:
            GriffinError: it cannot be written; the folder is then as it was.
        """
        name = cell_id(key, model)
        samples = None
        if measured.samples is not None:
            samples = f"{SAMPLES}/{name}.json"
            _make(self.path / SAMPLES)
            write_text(self.path / samples, _json(measured.samples) + "\n")
        cell = Cell(
            id=name,
            key=key,
            model=model,
            versions=dict(versions),
            machine=dict(machine),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(seconds, 3),
            n=measured.n,
            truncated=measured.truncated,
            metrics=dict(measured.metrics),
            data=dict(measured.data),
            samples=samples,
        )
        _append_line(self.path / LINES, _json(asdict(cell)))
        self.cells[name] = cell
        return cell

    def samples_of(self, cell: Cell) -> dict[str, Any]:
        """The samples of a cell; empty if it has none.

        Raises:
            GriffinError: their file cannot be read.
        """
        if cell.samples is None:
            return {}
        try:
            found = json.loads((self.path / cell.samples).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise GriffinError(f"{self.path / cell.samples} cannot be read: {error}") from error
        return found if isinstance(found, dict) else {}


def read(path: Path) -> Folder:
    """Read a results folder. Lines that are not whole cells are left out and complained of.

    Raises:
        ValueError: there is no such folder, or it holds no `cells.jsonl`.
        GriffinError: it cannot be read.
    """
    if not (path / LINES).is_file():
        what = "is not a folder" if path.exists() and not path.is_dir() else f"has no {LINES}"
        what = what if path.exists() else "does not exist"
        raise ValueError(f"{path} {what}; expected a folder that griffin sweep has written")
    return _read(path)


@contextmanager
def writing(path: Path, model: Model) -> Iterator[Folder]:
    """A results folder to add cells of a model to, made if it is not there, and locked as long as the block runs.

    Raises:
        ValueError: it holds results of another model or of another version of griffin; nothing is written then.
        GriffinError: it cannot be written, or another sweep is writing to it.
    """
    _make(path)
    lock = FileLock(path / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise GriffinError(
            f"another griffin sweep is writing to {path}; wait for its end or choose another folder"
        ) from None
    except (OSError, NotImplementedError) as error:
        raise GriffinError(f"{path} cannot be locked: {error}; choose a folder on another disk") from error
    try:
        folder = _read(path)
        for cell in folder.cells.values():
            _check(path, cell, model)
        yield folder
    finally:
        lock.release()


def _check(path: Path, cell: Cell, model: Model) -> None:
    if cell.model.fingerprint != model.fingerprint:
        ours, theirs = (f"{own.name} ({own.weights}, {own.fingerprint})" for own in (model, cell.model))
        raise ValueError(f"{path} holds results of {theirs}, not of {ours}; choose another folder with -o")
    if (other := cell.versions.get("griffin")) != __version__:
        raise ValueError(
            f"{path} holds results of griffin {other}, this is {__version__}; choose another folder with -o"
        )


def _read(path: Path) -> Folder:
    folder = Folder(path)
    try:
        lines = (path / LINES).read_bytes().split(b"\n")
    except FileNotFoundError:
        return folder
    except OSError as error:
        raise GriffinError(f"{path / LINES} cannot be read: {error.strerror or error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            cell = _cell(json.loads(line))
            if cell.samples is not None:
                json.loads((path / cell.samples).read_bytes())
        except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
            half = " (cut off in the middle)" if number == len(lines) else ""
            reason = " ".join(str(error).split()) or type(error).__name__
            folder.complaints.append(f"{path / LINES}, line {number}{half}: not a whole cell, left out: {reason}")
            continue
        folder.cells[cell.id] = cell
    return folder


def _cell(found: Any) -> Cell:
    """The cell in a line's JSON.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: it is none.
    """
    if not isinstance(found, dict) or set(found) != {own.name for own in fields(Cell)}:
        raise ValueError("its fields are not those of a cell")
    key = Key(**found["key"])
    model = Model(**found["model"])
    if found["id"] != cell_id(key, model):
        raise ValueError("its id does not belong to its key")
    metrics = {name: Metric(**_with_nan(own)) for name, own in found["metrics"].items()}
    if key.kind not in KINDS or not isinstance(found["data"], dict):
        raise ValueError(f"its kind is {key.kind!r}")
    expected = None if found["samples"] is None else f"{SAMPLES}/{found['id']}.json"
    if found["samples"] != expected:
        raise ValueError(f"its samples are in {found['samples']!r}, expected {expected!r}")
    return Cell(**{**found, "key": key, "model": model, "metrics": metrics})


def _with_nan(metric: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: math.nan if metric[name] is None else float(metric[name]) for name in ("value", "low", "high")}
    return values | {"higher_is_better": bool(metric["higher_is_better"])}


def _json(value: Any) -> str:
    return json.dumps(_without_nan(value), allow_nan=False, separators=(",", ":"))


def _without_nan(value: Any) -> Any:
    """JSON has no nan and no infinity: null stands for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _without_nan(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(own) for own in value]
    return value


def _append_line(path: Path, line: str) -> None:
    """Add a line to a file, whole and flushed to the disk, or not at all; a broken last line is closed first."""
    try:
        with path.open("a+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            start = b"" if file.read(1) in (b"", b"\n") else b"\n"
            try:
                file.write(start + line.encode("ascii") + b"\n")
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.truncate(path, size)
                raise
    except OSError as error:
        raise GriffinError(f"cannot write to {path}: {error.strerror or error}; finished cells are safe") from error


def _make(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GriffinError(f"cannot make the folder {path}: {error.strerror or error}") from error
