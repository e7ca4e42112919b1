"""The jobs of a sweep that are tasks of the harness."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from griffin.analysis.bootstrap import mean_interval
from griffin.analysis.cells import Key, Measured, Metric
from griffin.analysis.sweep import Job, Tick, config_of, key_of
from griffin.config import GriffinConfig
from griffin.integrations.lm_eval.evaluate import TaskResult, evaluate

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
) -> list[Job]:
    """A job for each task and config; the arguments are those of `evaluate`."""

    def measure(keys: Sequence[Key], tick: Tick) -> Iterator[Measured]:
        for key in keys:
            assert key.task is not None
            found = evaluate(
                model,
                tokenizer,
                config_of(key),
                tasks=[key.task],
                data=data,
                limit=limit,
                phase=phase,
                batch_size=batch_size,
                seed=key.seed,
            )
            yield measured(found[key.task], key.seed)

    source = "hub" if data is None else "files"
    keys = [
        key_of(
            config,
            "task",
            task=task,
            source=source,
            limit=limit,
            phase=None if config.density == 1.0 else phase,
            batch_size=batch_size,
        )
        for task in tasks
        for config in configs
    ]
    return [Job((key,), measure) for key in keys]


def measured(result: TaskResult, seed: int) -> Measured:
    """The cell of a task: every metric with its interval over the examples, where it is a mean of theirs."""
    metrics = {}
    for name, value in result.metrics.items():
        better = result.higher_is_better[name]
        values = result.per_sample.get(name, [])
        found = mean_interval(values, seed=seed) if values and all(map(math.isfinite, values)) else None
        if found is not None and math.isclose(found.value, value, rel_tol=_ROUNDING, abs_tol=_ROUNDING):
            metrics[name] = Metric(value, found.low, found.high, better)
        else:
            metrics[name] = Metric(value, higher_is_better=better)
    return Measured(
        metrics=metrics,
        n=result.n,
        truncated=result.truncated,
        samples={
            "values": result.per_sample,
            "doc_ids": [sample["doc_id"] for sample in result.samples],
        },
        texts={"samples": result.samples},
    )
