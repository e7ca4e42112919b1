"""Result files: checked before a long run, and written atomically."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from griffin.errors import GriffinError


def check_writable(path: Path) -> None:
    """Raise `GriffinError` if a file cannot be written there."""
    if path.is_dir():
        raise GriffinError(f"cannot write to {path}: it is a folder; expected the name of a file")
    if _special(path):
        return
    partial = _partial(path)
    try:
        partial.write_text("", encoding="utf-8")
    except OSError as error:
        raise GriffinError(f"cannot write to {path}: {error.strerror or error}") from error
    finally:
        _remove(partial)


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: a reader sees either the old file or the whole new one.

    Raises:
        GriffinError: the file cannot be written.
    """
    partial = _partial(path)
    try:
        if _special(path):
            path.write_text(text, encoding="utf-8")
            return
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # otherwise a power cut could leave an empty file under the new name
        partial.replace(path.resolve())
    except OSError as error:
        raise GriffinError(f"cannot write to {path}: {error.strerror or error}") from error
    finally:
        _remove(partial)


def csv_text(rows: Sequence[Mapping[str, Any]], *constants: Mapping[str, Any]) -> str:
    """Rows as CSV, with a header; every row ends with the constants, such as the machine and the versions."""
    same = {name: _cell(value) for constant in constants for name, value in constant.items()}
    text = io.StringIO()
    writer = csv.DictWriter(text, [*rows[0], *same], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, **same} for row in rows)
    return text.getvalue()


def _cell(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, list) else value


def _special(path: Path) -> bool:  # a device or a pipe, which must not be replaced by a file
    return path.exists() and not path.is_file()


def _partial(path: Path) -> Path:
    real = path.resolve()  # where a symbolic link points to, so that the link stays
    return real.with_name(f".{real.name}.{os.getpid()}.partial")


def _remove(partial: Path) -> None:
    with suppress(OSError):  # if its folder is not writable, the file was never created
        partial.unlink(missing_ok=True)
