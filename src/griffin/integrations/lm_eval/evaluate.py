"""Evaluate one model with one config on tasks, from Python."""

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
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from griffin.config import GriffinConfig
from griffin.integrations.lm_eval.generating import Shared
from griffin.integrations.lm_eval.model import GriffinLM
from griffin.integrations.lm_eval.tasks import check_names, manager


@dataclass(frozen=True)
class TaskResult:
    """The metrics of one task.

    Args:
        task: the task's name.
        metrics: values by name; if the task has several answer filters, the name ends with the filter in brackets.
        per_sample: for every metric, one value per example, in the order of `samples`. The metric is their mean, or
            for perplexities of documents their geometric mean.
        weights: for every metric, the examples' weights in that mean, such as their numbers of words; a metric whose
            examples have equal weights is missing.
        higher_is_better: for every metric, whether a higher value is better.
        groups: for every example, the number of its long context, which the questions on one paper share; `None` if no
            examples share a context.
        n: number of examples.
        truncated: number of contexts that were longer than the model's window.
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
        model: the model, in eval mode, without GRIFFIN attached; it is not changed.
        tokenizer: its tokenizer.
        config: which FF neurons to keep; at density 1.0 the results equal those of the harness's `hf`.
        tasks: names of the tasks.
        data: the folder of local files; `None` loads the rows from the Hub.
        limit: the most examples of a task; `None` takes all.
        phase: how log-likelihoods are computed, see `griffin.integrations.lm_eval.scoring`.
        batch_size: the number of prompts in a batch.
        max_length: the most tokens of a context and its continuation; longer contexts are cut from the left and
            counted. `None` uses the model's whole window.
        seed: seed of the harness's random numbers, such as the choice of few-shot examples.
        softmax_dtype: argument of HFLM; with "float32" the log-likelihoods of 16-bit models are not rounded to three
            digits.
        shared: answers generated for several configs together, including `config`; see `generating.Shared`.
        progress: called with a task's name, the number of finished tasks and the number of all tasks.

    Raises:
        ValueError: a task, phase or model layout is unknown, or a file is missing or malformed.
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
        task_manager = manager({} if data is None else {"data": str(data)})
        results = {}
        for number, task in enumerate(tasks):
            if progress is not None:
                progress(task, number, len(tasks))
            results[task] = _evaluate_task(lm, task, task_manager, limit, seed)
    return results


def _evaluate_task(lm: GriffinLM, task: str, task_manager: Any, limit: int | None, seed: int) -> TaskResult:
    before = lm.truncated
    # As `lm_eval.simple_evaluate`, which lists all installed packages for each task: pip takes two seconds or more.
    set_seed(seed)
    loaded = task_manager.load([task])
    for each in loaded["tasks"].values():
        if each.get_config("num_fewshot") is None:
            each.set_config(key="num_fewshot", value=0)
        each.set_fewshot_seed(seed=seed)
    evaluation: Any = lm_eval.evaluate(lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=0)
    samples: list[dict[str, Any]] = evaluation["samples"][task]
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    higher = evaluation["higher_is_better"][task]
    metrics: dict[str, float] = {}
    per_sample: dict[str, list[float]] = {}
    weights: dict[str, list[float]] = {}
    better: dict[str, bool] = {}
    for key, value in evaluation["results"][task].items():
        metric, _, filter_name = key.partition(",")
        if not filter_name or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        name = metric if len(filters) == 1 else f"{metric} ({filter_name})"
        metrics[name] = float(value)
        items = [sample[metric] for sample in samples if sample["filter"] == filter_name]
        per_sample[name] = [_value(metric, item) for item in items]
        if isinstance(items[0], tuple | list):
            weights[name] = [float(weight) for _, weight in items]
        better[name] = bool(higher[metric])
    # A sample appears once for every filter.
    examples = [sample for sample in samples if sample["filter"] == filters[0]]
    return TaskResult(
        task=task,
        metrics=metrics,
        per_sample=per_sample,
        weights=weights,
        higher_is_better=better,
        groups=_groups([sample["doc"] for sample in examples]),
        n=len(examples),
        truncated=lm.truncated - before,
        samples=[
            {"doc_id": sample["doc_id"], "target": sample["target"], "response": _response(sample["filtered_resps"])}
            for sample in examples
        ],
    )


def _value(metric: str, item: Any) -> float:
    """The value of one example. For perplexities the harness returns the log-likelihood and the weight."""
    if not isinstance(item, tuple | list):
        return float(item)
    loglikelihood, weight = item
    if metric == "bits_per_byte":
        return float(-loglikelihood / weight / math.log(2))
    return math.exp(-loglikelihood / weight)


def _groups(docs: Sequence[Any]) -> list[int] | None:
    if not docs or not all(isinstance(doc, dict) and "context" in doc for doc in docs):
        return None
    numbers: dict[str, int] = {}
    groups = [numbers.setdefault(str(doc["context"]), len(numbers)) for doc in docs]
    return groups if len(numbers) < len(docs) else None


def _response(responses: list[Any]) -> Any:
    return responses[0] if len(responses) == 1 else [list(response) for response in responses]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the harness, which warns about intended settings and draws progress bars on stderr."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(level)
