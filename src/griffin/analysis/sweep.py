"""A sweep: the matrix of methods, densities, tasks and lengths as jobs, and the loop that runs them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from griffin.analysis.cells import FULL, Cell, CellResult, Key, Model, cell_id
from griffin.analysis.folder import Folder
from griffin.config import GriffinConfig

Tick = Callable[[float], None]  # called now and then with the share of the job done since the last call


@dataclass(frozen=True)
class Job:
    """Cells that are measured together, because they share work or have to be interleaved.

    Args:
        keys: the cells' keys.
        measure: measures the given subset of the cells, in order.
    """

    keys: tuple[Key, ...]
    measure: Callable[[Sequence[Key], Tick], Iterable[CellResult]]


class SweepObserver:
    """Receives the events of a running sweep; a subclass overrides the methods it needs."""

    def begun(self, keys: Sequence[Key]) -> None:
        """The measurement of these cells starts."""

    def ticked(self, cells: float) -> None:
        """Another `cells` cells are done; the number may be a fraction."""

    def finished(self, cell: Cell) -> None:
        """A cell was written to the folder."""

    def failed(self, keys: Sequence[Key], error: Exception) -> None:
        """These cells could not be measured."""


def settings(
    methods: Sequence[str], densities: Sequence[float], batches: Sequence[str] = ("shared",), **settings: Any
) -> list[GriffinConfig]:
    """The configs of the matrix: the full model once, then every method with every kind of batch and density below 1.

    Raises:
        ValueError: a method, a density or a kind of batch is not valid.
    """
    full = GriffinConfig(density=1.0, **settings)
    wanted = [
        replace(full, density=density, selection=method, batch=batch)
        for method in methods
        for batch in batches
        for density in densities
    ]
    return [full, *dict.fromkeys(config for config in wanted if config.density < 1.0)]


def key_of(config: GriffinConfig, kind: str, **more: Any) -> Key:
    """The key of the cell for a config."""
    method = FULL if config.density == 1.0 else config.selection
    batch = config.batch if method != FULL else "shared"
    return Key(kind=kind, method=method, density=config.density, batch=batch, seed=config.seed, **more)


def config_of(key: Key) -> GriffinConfig:
    """The config of a cell."""
    if key.method == FULL:
        return GriffinConfig(density=1.0, seed=key.seed)
    return GriffinConfig(density=key.density, selection=key.method, batch=key.batch, seed=key.seed)


def pending(folder: Folder, model: Model, jobs: Iterable[Job]) -> list[tuple[Job, tuple[Key, ...]]]:
    """The unfinished jobs, each with its cells that are missing from the folder."""
    todo = []
    for job in jobs:
        missing = tuple(key for key in job.keys if cell_id(key, model) not in folder.cells)
        if missing:
            todo.append((job, missing))
    return todo


def carry_out(
    folder: Folder,
    model: Model,
    todo: Sequence[tuple[Job, tuple[Key, ...]]],
    versions: Mapping[str, str],
    machine: Mapping[str, Any],
    observer: SweepObserver,
) -> int:
    """Measure the pending cells. If a job fails, its finished cells are kept, and the other jobs still run.

    Returns:
        The number of cells that failed.

    Raises:
        GriffinError: the folder cannot be written.
    """
    failed = 0
    for job, keys in todo:
        observer.begun(keys)
        start = time.perf_counter()
        results: list[CellResult] = []
        problem = None
        try:
            results.extend(job.measure(keys, partial(_tick, observer, len(keys))))
        except Exception as error:  # a failure of one job must not lose the others
            problem = error
        seconds = (time.perf_counter() - start) / max(1, len(results))  # the cells of a job are timed together
        for key, result in zip(keys, results, strict=problem is None):
            observer.finished(folder.append(key, model, result, seconds, versions, machine))
        if problem is not None:
            failed += len(keys) - len(results)
            observer.failed(keys[len(results) :], problem)
    return failed


def _tick(observer: SweepObserver, cells: int, share: float) -> None:
    observer.ticked(share * cells)
