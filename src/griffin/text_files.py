"""Texts from outside: files, stdin, the command line. All are UTF-8, and a byte order mark before one is none of it.

Some editors write such a mark (U+FEFF) at the start of a file. As a part of the text it would be tokens of a prompt, an
unknown column of a table, or a message where a command was meant. Anywhere else U+FEFF is a character like any other.
"""

from __future__ import annotations

import gzip
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

_MARK = "\ufeff"


def without_mark(text: str) -> str:
    """A text without the byte order mark that it may begin with."""
    return text.removeprefix(_MARK)


def decode(data: bytes, source: str) -> str:
    """UTF-8 text of `data`.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return without_mark(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from error


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        ValueError: there is no such file, it cannot be read, or it is not UTF-8.
    """
    try:
        return decode(path.read_bytes(), str(path))
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ValueError(f"{path} cannot be read: {reason}; expected a text file") from error


def read_stdin() -> str:
    """All of stdin.

    Raises:
        ValueError: it is not UTF-8.
    """
    return decode(sys.stdin.buffer.read(), "stdin")


def stdin_messages() -> Iterator[str]:
    """The lines of stdin, stripped, each a text of its own, as soon as it is there.

    Raises:
        ValueError: one is not UTF-8.
    """
    for number, data in enumerate(sys.stdin.buffer, 1):
        yield decode(data, f"stdin, line {number},").strip()


def lines(path: Path) -> Iterator[tuple[str, str]]:
    """Lines of a file, gzipped if its name says so, each after its place.

    Raises:
        ValueError: it is not UTF-8, or no whole gzip file.
        OSError: it cannot be read.
    """
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for line in file:
                number += 1
                where = f"{path}, line {number}"
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise ValueError(f"{where}: not UTF-8: {error}") from error
                yield where, without_mark(text) if number == 1 else text
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path}, after line {number}: cannot be read: {error}") from error
