"""The jobs of a sweep that run tasks of the harness."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from griffin.analysis.bootstrap import Interval, geometric_interval, mean_interval
from griffin.analysis.cells import CellResult, Key, Metric
from griffin.analysis.fingerprint import fingerprint
from griffin.analysis.machine import versions
from griffin.analysis.sweep import Job, Tick, config_of, key_of
from griffin.config import GriffinConfig
from griffin.integrations.lm_eval import GENERATED
from griffin.integrations.lm_eval.data import load
from griffin.integrations.lm_eval.evaluate import TaskResult, evaluate
from griffin.integrations.lm_eval.generating import Shared
from griffin.methods import METHODS

_ROUNDING = 1e-6  # a metric counts as the mean of its values up to this relative or absolute difference


def task_jobs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    configs: Sequence[GriffinConfig],
    *,
    data: Path | None,
    limit: int | None,
    phase: str,
    batch_size: int,
    max_length: int | None = None,
    answers: Path | None = None,
) -> list[Job]:
    """Make the jobs. A task with generated answers is one job for all configs, which share its prompt phase.

    Args:
        answers: a folder in which such a task keeps its answers while it runs.

    The other arguments are those of `evaluate`.
    """

    def measure(keys: Sequence[Key], tick: Tick) -> Iterator[CellResult]:
        shared = None
        task = keys[0].task
        assert task is not None
        if task in GENERATED and not _unstructured(keys[0]):
            path = None if answers is None else answers / f"{task}.partial.jsonl"
            shared = Shared([config_of(key) for key in keys], path, tick, [fingerprint(model), versions()])
        for key in keys:
            results = evaluate(
                model,
                tokenizer,
                config_of(key),
                tasks=[task],
                data=data,
                limit=limit,
                phase=phase,
                batch_size=batch_size,
                max_length=max_length,
                seed=key.seed,
                shared=shared,
            )
            yield measured(results[task], key.seed)

    def key(task: str, config: GriffinConfig) -> Key:
        task_phase = None if config.density == 1.0 or task in GENERATED else phase
        source = "hub" if data is None else f"files {_digest(task, data)}"
        return key_of(
            config,
            "task",
            task=task,
            source=source,
            prompt=max_length,
            limit=limit,
            phase=task_phase,
            batch_size=batch_size,
        )

    jobs = []
    for task in tasks:
        keys = [key(task, config) for config in configs]
        together = tuple(of_task for of_task in keys if task in GENERATED and not _unstructured(of_task))
        alone = [Job((of_task,), measure) for of_task in keys if of_task not in together]
        jobs += [Job(together, measure), *alone] if together else alone
    return jobs


@cache
def _digest(task: str, data: Path) -> str:
    """8 hex digits that identify the rows, as other files hold other examples."""
    rows = json.dumps(load(task, data), sort_keys=True)
    return hashlib.sha256(rows.encode()).hexdigest()[:8]


def measured(result: TaskResult, seed: int) -> CellResult:
    """The cell of a task. A metric that is a mean over the examples has an interval."""
    metrics = {}
    for name, value in result.metrics.items():
        better = result.higher_is_better[name]
        interval = _interval(name, result, seed)
        if interval is not None and math.isclose(interval.value, value, rel_tol=_ROUNDING, abs_tol=_ROUNDING):
            metrics[name] = Metric(value, interval.low, interval.high, better)
        else:
            metrics[name] = Metric(value, higher_is_better=better)
    return CellResult(
        metrics=metrics,
        n=result.n,
        truncated=result.truncated,
        samples={
            "values": result.per_sample,
            "weights": result.weights,
            "groups": result.groups,
            "doc_ids": [sample["doc_id"] for sample in result.samples],
        },
        texts={"samples": result.samples},
    )


def _interval(name: str, result: TaskResult, seed: int) -> Interval | None:
    values = result.per_sample.get(name, [])
    if not values or not all(map(math.isfinite, values)):
        return None
    mean = geometric_interval if "perplexity" in name else mean_interval
    return mean(values, weights=result.weights.get(name), groups=result.groups, seed=seed)


def _unstructured(key: Key) -> bool:
    """Whether a cell's method keeps single weights, so that it needs a separate prompt phase."""
    return key.method in METHODS and METHODS[key.method].select is None
