"""A table of rows for a person, as the benchmarks beside llama.cpp print it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table


def made(title: str, words: Sequence[str], numbers: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table whose first columns hold words, and whose others hold numbers."""
    table = Table(title=title)
    for name in words:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    return table
