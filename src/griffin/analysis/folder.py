"""The results folder of a sweep: `cells.jsonl`, one cell a line, and the files of their samples and texts.

Texts are in a separate subfolder, so a copy can leave out texts that may not be redistributed; such a copy can still be
reported on and added to. A line is written after the file of its samples, and flushed to the disk. A run that is killed
therefore leaves complete cells and at most one broken last line, which the reader skips. Nothing is overwritten.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from griffin.analysis.cells import SAMPLES, TEXTS, Cell, CellResult, Key, Model, cell_from, cell_id, json_text
from griffin.analysis.files import write_text
from griffin.errors import GriffinError
from griffin.text_files import read_text

LINES = "cells.jsonl"


@dataclass
class Folder:
    """A results folder.

    Args:
        path: the folder's path.
        cells: the finished cells by id, in the order in which they finished.
        warnings: one line for each corrupt entry that was skipped.
    """

    path: Path
    cells: dict[str, Cell] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def append(
        self,
        key: Key,
        model: Model,
        measured: CellResult,
        seconds: float,
        versions: Mapping[str, str],
        machine: Mapping[str, Any],
    ) -> Cell:
        """Write a finished cell: first the file of its samples, then its line.

        Raises:
            GriffinError: the cell cannot be written; the folder then holds the same cells as before.
        """
        name = cell_id(key, model)
        samples = None
        if measured.texts is not None:
            _make(self.path / TEXTS)
            write_text(self._texts(name), json_text(measured.texts) + "\n")
        if measured.samples is not None:
            samples = f"{SAMPLES}/{name}.json"
            _make(self.path / SAMPLES)
            write_text(self.path / samples, json_text(measured.samples) + "\n")
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
        _append_line(self.path / LINES, json_text(asdict(cell)))
        self.cells[name] = cell
        return cell

    def samples_of(self, cell: Cell) -> dict[str, Any]:
        """The samples of a cell; empty if it has none.

        Raises:
            GriffinError: their file cannot be read.
        """
        return {} if cell.samples is None else _object(self.path / cell.samples)

    def texts_of(self, cell: Cell) -> dict[str, Any]:
        """The texts of a cell; empty if it has none, or they were removed.

        Raises:
            GriffinError: their file cannot be read.
        """
        path = self._texts(cell.id)
        return _object(path) if path.exists() else {}

    def _texts(self, cell: str) -> Path:
        return self.path / TEXTS / f"{cell}.json"


def read(path: Path) -> Folder:
    """Read a results folder. Each line that is not a complete cell is skipped and adds a warning.

    Raises:
        ValueError: there is no such folder, or it holds no `cells.jsonl`.
        GriffinError: the folder cannot be read.
    """
    if not (path / LINES).is_file():
        what = "is not a folder" if path.exists() and not path.is_dir() else f"has no {LINES}"
        what = what if path.exists() else "does not exist"
        raise ValueError(f"{path} {what}; expected a folder that griffin sweep has written")
    return _read(path)


@contextmanager
def writing(path: Path, model: Model, versions: Mapping[str, str]) -> Iterator[Folder]:
    """Open a results folder to add a model's cells to it; create it if needed, and lock it inside the block.

    Args:
        path: the folder's path.
        model: the model of the new cells.
        versions: versions of the software that computes them.

    Raises:
        ValueError: the folder holds results of another model or other versions (Python's is ignored). Nothing is
            written then.
        GriffinError: the folder cannot be written, or another sweep is writing to it.
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
            _check(path, cell, model, versions)
        yield folder
    finally:
        lock.release()


def _check(path: Path, cell: Cell, model: Model, versions: Mapping[str, str]) -> None:
    if cell.model.fingerprint != model.fingerprint:
        ours, theirs = (f"{one.name} ({one.weights}, {one.fingerprint})" for one in (model, cell.model))
        raise ValueError(f"{path} holds results of {theirs}, not of {ours}; choose another folder with -o")
    for name in (versions.keys() & cell.versions.keys()) - {"python"}:
        ours, theirs = versions[name], cell.versions[name]
        if ours != theirs:
            raise ValueError(f"{path} holds results of {name} {theirs}, this is {ours}; choose another folder with -o")


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
            cell = cell_from(json.loads(line))
            if cell.samples is not None:
                json.loads((path / cell.samples).read_bytes())
        except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
            half = " (cut off in the middle)" if number == len(lines) else ""
            reason = " ".join(str(error).split()) or type(error).__name__
            folder.warnings.append(f"{path / LINES}, line {number}{half}: not a whole cell, left out: {reason}")
            continue
        folder.cells[cell.id] = cell
    return folder


def _object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError) as error:
        raise GriffinError(f"{path} cannot be read: {error}") from error
    return content if isinstance(content, dict) else {}


def _append_line(path: Path, line: str) -> None:
    """Append a line to a file atomically and flush it to the disk; terminate a broken last line first."""
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
