"""The jobs of a sweep that are tasks of the harness."""

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

_ROUNDING = 1e-6  # a metric is the mean of its values if they differ by no more, as a share


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
    """A job for each task and config; of tasks with free answers one for all configs, as they share the prompt phase.

    Args:
        answers: a folder to keep such a task's answers in as they come.

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
            found = evaluate(
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
            yield measured(found[task], key.seed)

    def key(task: str, config: GriffinConfig) -> Key:
        own_phase = None if config.density == 1.0 or task in GENERATED else phase
        source = "hub" if data is None else f"files {_digest(task, data)}"
        return key_of(
            config,
            "task",
            task=task,
            source=source,
            prompt=max_length,
            limit=limit,
            phase=own_phase,
            batch_size=batch_size,
        )

    jobs = []
    for task in tasks:
        keys = [key(task, config) for config in configs]
        together = tuple(own for own in keys if task in GENERATED and not _unstructured(own))
        alone = [Job((own,), measure) for own in keys if own not in together]
        jobs += [Job(together, measure), *alone] if together else alone
    return jobs


@cache
def _digest(task: str, data: Path) -> str:
    """8 hex digits of the rows: other files are other examples."""
    rows = json.dumps(load(task, data), sort_keys=True)
    return hashlib.sha256(rows.encode()).hexdigest()[:8]


def measured(result: TaskResult, seed: int) -> CellResult:
    """The cell of a task: every metric with its interval over the examples, where it is a mean of theirs."""
    metrics = {}
    for name, value in result.metrics.items():
        better = result.higher_is_better[name]
        found = _interval(name, result, seed)
        if found is not None and math.isclose(found.value, value, rel_tol=_ROUNDING, abs_tol=_ROUNDING):
            metrics[name] = Metric(value, found.low, found.high, better)
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
    """Whether a cell's method keeps single weights: its statistic is gathered by a prompt phase of its own."""
    return key.method in METHODS and METHODS[key.method].select is None
