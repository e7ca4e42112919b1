"""A sweep: the matrix of methods, densities, tasks and lengths as jobs, and the loop that carries them out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from griffin.analysis.cells import FULL, Cell, CellResult, Key, Model, cell_id
from griffin.analysis.folder import Folder
from griffin.config import GriffinConfig

Tick = Callable[[float], None]  # called now and then with the share of the job that was done since


@dataclass(frozen=True)
class Job:
    """Cells that are measured together, because they share work or have to take turns.

    Args:
        keys: the cells.
        measure: measures those of them that are given, in their order.
    """

    keys: tuple[Key, ...]
    measure: Callable[[Sequence[Key], Tick], Iterable[CellResult]]


class SweepObserver:
    """What is told while a sweep runs; every method may be left as it is."""

    def begun(self, keys: Sequence[Key]) -> None:
        """These cells are measured now."""

    def ticked(self, cells: float) -> None:
        """So many cells more are done, in parts."""

    def finished(self, cell: Cell) -> None:
        """A cell is in the folder."""

    def failed(self, keys: Sequence[Key], error: Exception) -> None:
        """These cells could not be measured."""


def settings(
    methods: Sequence[str], densities: Sequence[float], batches: Sequence[str] = ("shared",), **settings: Any
) -> list[GriffinConfig]:
    """The matrix: the full model once, then every method at every density below 1, which is the full model whatever the
    method, and every kind of batch.

    Raises:
        ValueError: a method, a density or a kind of batch is none.
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
    """The key of a cell that a config is measured in."""
    method = FULL if config.density == 1.0 else config.selection
    batch = config.batch if method != FULL else "shared"
    return Key(kind=kind, method=method, density=config.density, batch=batch, seed=config.seed, **more)


def config_of(key: Key) -> GriffinConfig:
    """The config that a cell is measured with."""
    if key.method == FULL:
        return GriffinConfig(density=1.0, seed=key.seed)
    return GriffinConfig(density=key.density, selection=key.method, batch=key.batch, seed=key.seed)


def pending(folder: Folder, model: Model, jobs: Iterable[Job]) -> list[tuple[Job, tuple[Key, ...]]]:
    """The jobs that are not done, each with its cells that are not in the folder."""
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
    """Measure what is pending; a job that fails is told, what it has found is kept, and the others go on.

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
        except Exception as error:  # whatever went wrong with one cell, the others are worth having
            problem = error
        seconds = (time.perf_counter() - start) / max(1, len(results))  # they were measured together
        for key, result in zip(keys, results, strict=problem is None):
            observer.finished(folder.append(key, model, result, seconds, versions, machine))
        if problem is not None:
            failed += len(keys) - len(results)
            observer.failed(keys[len(results) :], problem)
    return failed


def _tick(observer: SweepObserver, cells: int, share: float) -> None:
    observer.ticked(share * cells)
