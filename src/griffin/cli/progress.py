"""A progress bar on stderr for commands with many runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(runs: int) -> Iterator[Callable[[str], None]]:
    """Yield a function to call after every run, with a short description; the bar shows the remaining time.

    Without a terminal nothing is shown. The bar is redrawn between runs, not by a thread that could distort timings.
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
