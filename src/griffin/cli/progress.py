"""A bar on stderr for commands of many runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(runs: int) -> Iterator[Callable[[str], None]]:
    """Yield what is to be called after every run, with a few words on it; shows the time that remains.

    Only on a terminal. It is drawn between runs, never by a thread of its own during one.
    """
    if not sys.stderr.isatty():
        yield lambda what: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(file=sys.stderr), transient=True, auto_refresh=False) as bar:
        task = bar.add_task("starting", total=runs)
        bar.refresh()

        def done(what: str) -> None:
            bar.update(task, advance=1, description=what, refresh=True)

        yield done
