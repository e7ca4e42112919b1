"""Report a sweep's progress: a line for every finished cell, and on a terminal a bar with the remaining time."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from griffin.analysis.cells import Cell, Key
from griffin.analysis.sweep import SweepObserver

if TYPE_CHECKING:
    from rich.progress import Progress


@contextmanager
def observer(cells: int) -> Iterator[SweepObserver]:
    """Yield the observer that reports the progress of a sweep with `cells` cells to measure."""
    if not sys.stderr.isatty():
        yield _Lines(cells)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns: tuple[Any, ...] = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("remaining"),
        TimeRemainingColumn(),
    )
    year_s = 366 * 24 * 3600.0  # a cell takes minutes, so the whole run estimates the speed
    bar = Progress(
        *columns, console=Console(file=sys.stderr), transient=True, refresh_per_second=1, speed_estimate_period=year_s
    )
    with bar:
        yield _Bar(cells, bar)


class _Lines(SweepObserver):
    """Prints a line for each cell, with the remaining time estimated from the average cell."""

    def __init__(self, cells: int) -> None:
        self._cells, self._done, self._start = cells, 0, time.monotonic()

    def finished(self, cell: Cell) -> None:
        self._done += 1
        left = (self._cells - self._done) * (time.monotonic() - self._start) / self._done
        remaining = f", about {_duration(left)} left" if self._done < self._cells else ""
        self.print_line(f"[{self._done}/{self._cells}] {described(cell)}{remaining}")

    def failed(self, keys: Sequence[Key], error: Exception) -> None:
        self._done += len(keys)
        for key in keys:
            self.print_line(f"griffin: error: {key}: {' '.join(str(error).split()) or type(error).__name__}")

    def print_line(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


class _Bar(_Lines):
    """Prints the lines above a progress bar."""

    def __init__(self, cells: int, bar: Progress) -> None:
        super().__init__(cells)
        self._bar, self._task = bar, bar.add_task("starting", total=cells)

    def begun(self, keys: Sequence[Key]) -> None:
        self._bar.update(self._task, description=str(keys[0]), completed=self._done)
        if any(key.kind == "speed" for key in keys):
            self._bar.refresh()
            self._bar.stop()  # its thread would distort the timing

    def ticked(self, cells: float) -> None:
        self._bar.update(self._task, advance=cells)

    def finished(self, cell: Cell) -> None:
        self._go_on()
        super().finished(cell)

    def failed(self, keys: Sequence[Key], error: Exception) -> None:
        self._go_on()
        super().failed(keys, error)

    def print_line(self, line: str) -> None:
        self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _go_on(self) -> None:
        if not self._bar.live.is_started:
            self._bar.start()


def described(cell: Cell) -> str:
    """Describe a cell in one line: its key, its first figures and its duration."""
    figures = ", ".join(f"{name} {metric.value:.4g}" for name, metric in list(cell.metrics.items())[:3])
    cut = f"; {cell.truncated} of {cell.n} were cut to fit the model's context" if cell.truncated else ""
    return f"{cell.key}: {figures} ({_duration(cell.seconds)}){cut}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
