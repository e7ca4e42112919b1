"""Print tables on stdout."""

from __future__ import annotations

from collections.abc import Iterable


def print_table(table: object) -> None:
    """Print a rich table; it is 120 columns wide if stdout is not a terminal."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    console.print(table)


def print_pairs(title: str, pairs: Iterable[tuple[str, str]]) -> None:
    """Print names and values as a table."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, show_header=False)
    for name, value in pairs:
        table.add_row(name, escape(str(value)))
    print_table(table)
