"""Evaluate one model at one setting on some tasks, from Python."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lm_eval
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from griffin.config import GriffinConfig
from griffin.integrations.lm_eval.generating import Shared
from griffin.integrations.lm_eval.model import GriffinLM
from griffin.integrations.lm_eval.tasks import check_names, manager


@dataclass(frozen=True)
class TaskResult:
    """What was measured on one task.

    Args:
        task: its name.
        metrics: value by name; a metric of one of several filters of answers has the filter's name in brackets.
        per_sample: by metric, one value an example, in the order of `samples`. Their mean is the metric; of
            perplexities, which are each document's own, the geometric mean.
        weights: what an example counts in those means, such as its number of words; missing where all count alike.
        higher_is_better: by metric.
        groups: of every example, which share a long context (the questions on one paper); `None` where none do.
        n: number of examples.
        truncated: contexts that were longer than the model's window.
        samples: for every example `doc_id`, `target`, and `response`: the generated text after the task's filter, or
            for every choice its log-likelihood and whether it is the greedy one.
    """

    task: str
    metrics: dict[str, float]
    per_sample: dict[str, list[float]]
    weights: dict[str, list[float]]
    higher_is_better: dict[str, bool]
    groups: list[int] | None
    n: int
    truncated: int
    samples: list[dict[str, Any]]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: GriffinConfig,
    *,
    tasks: Sequence[str],
    data: Path | None,
    limit: int | None = None,
    phase: str = "continuation",
    batch_size: int = 1,
    max_length: int | None = None,
    seed: int = 0,
    softmax_dtype: str | None = None,
    shared: Shared | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, TaskResult]:
    """Evaluate a model on tasks of `griffin.integrations.lm_eval.TASKS`, one after another.

    Args:
        model: the model, in eval mode, without GRIFFIN attached; it is left as it was.
        tokenizer: its tokenizer.
        config: what to keep; at density 1.0 the results are those of the harness's `hf`.
        tasks: names of the tasks.
        data: the folder of local files; `None` loads the rows from the Hub.
        limit: most examples of a task; `None` takes all.
        phase: how log-likelihoods are computed, see `griffin.integrations.lm_eval.scoring`.
        batch_size: prompts run at once.
        max_length: most tokens of a context and what follows it; longer contexts are cut from the left, and counted.
            `None`: as many as the model can take.
        seed: of the harness's random numbers, such as the choice of few-shot examples.
        softmax_dtype: as HFLM's; "float32" keeps 16-bit models' log-likelihoods from being rounded to three digits.
        shared: answers generated for several configs together, `config` being one; see `generating.Shared`.
        progress: called with a task's name, the number of tasks done before it, and of all.

    Raises:
        ValueError: an unknown task, phase or model layout; a missing or malformed file.
        GriffinError: the rows cannot be loaded from the Hub.
    """
    check_names(tasks)
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; expected a number of examples from 1")
    with _quiet():
        lm = GriffinLM(
            model,
            tokenizer=tokenizer,
            phase=phase,
            batch_size=batch_size,
            max_length=max_length,
            softmax_dtype=softmax_dtype,
            disable_tqdm=True,
            shared=shared,
            **asdict(config),
        )
        known = manager({} if data is None else {"data": str(data)})
        results = {}
        for number, task in enumerate(tasks):
            if progress is not None:
                progress(task, number, len(tasks))
            results[task] = _one(lm, task, known, limit, seed)
    return results


def _one(lm: GriffinLM, task: str, known: Any, limit: int | None, seed: int) -> TaskResult:
    before = lm.truncated
    found: Any = lm_eval.simple_evaluate(
        lm,
        tasks=[task],
        task_manager=known,
        limit=limit,
        bootstrap_iters=0,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    samples: list[dict[str, Any]] = found["samples"][task]
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    higher = found["higher_is_better"][task]
    metrics: dict[str, float] = {}
    per_sample: dict[str, list[float]] = {}
    weights: dict[str, list[float]] = {}
    better: dict[str, bool] = {}
    for key, value in found["results"][task].items():
        metric, _, own_filter = key.partition(",")
        if not own_filter or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        name = metric if len(filters) == 1 else f"{metric} ({own_filter})"
        metrics[name] = float(value)
        own = [sample[metric] for sample in samples if sample["filter"] == own_filter]
        per_sample[name] = [_value(metric, item) for item in own]
        if isinstance(own[0], tuple | list):
            weights[name] = [float(weight) for _, weight in own]
        better[name] = bool(higher[metric])
    first = [sample for sample in samples if sample["filter"] == filters[0]]
    return TaskResult(
        task=task,
        metrics=metrics,
        per_sample=per_sample,
        weights=weights,
        higher_is_better=better,
        groups=_groups([sample["doc"] for sample in first]),
        n=len(first),
        truncated=lm.truncated - before,
        samples=[
            {"doc_id": sample["doc_id"], "target": sample["target"], "response": _response(sample["filtered_resps"])}
            for sample in first
        ],
    )


def _value(metric: str, item: Any) -> float:
    """One example's value: of the perplexities the harness keeps log-likelihood and weight."""
    if not isinstance(item, tuple | list):
        return float(item)
    loglikelihood, weight = item
    if metric == "bits_per_byte":
        return float(-loglikelihood / weight / math.log(2))
    return math.exp(-loglikelihood / weight)


def _groups(docs: Sequence[Any]) -> list[int] | None:
    if not docs or not all(isinstance(doc, dict) and "context" in doc for doc in docs):
        return None
    known: dict[str, int] = {}
    found = [known.setdefault(str(doc["context"]), len(known)) for doc in docs]
    return found if len(known) < len(docs) else None


def _response(responses: list[Any]) -> Any:
    return responses[0] if len(responses) == 1 else [list(response) for response in responses]


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness warns of what is meant here, such as a model that is given, and draws bars of its own on stderr."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(level)
