"""GRIFFIN as a model of lm-evaluation-harness, and the tasks of the paper from local files or the Hub.

Only this package imports `lm_eval`. The import takes some seconds, so names are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from griffin.integrations.lm_eval.evaluate import TaskResult, evaluate
    from griffin.integrations.lm_eval.model import GriffinLM

PHASES = ("continuation", "last_token")
TASKS = (
    "hellaswag",
    "piqa",
    "copa",
    "arc_easy",
    "arc_challenge",
    "boolq",
    "xsum",
    "cnn_dailymail",
    "coqa",
    "qasper",
    "gsm8k",
    "wikitext2",
)
GENERATED = ("xsum", "cnn_dailymail", "coqa", "qasper", "gsm8k")  # tasks with generated answers
SUITES = {"paper": TASKS[:10]}
TASK_FILES = Path(__file__).parent / "tasks"  # the folder for the harness's --include_path

__all__ = ["GENERATED", "PHASES", "SUITES", "TASKS", "TASK_FILES", "GriffinLM", "TaskResult", "evaluate"]

_MODULES = {"GriffinLM": "model", "TaskResult": "evaluate", "evaluate": "evaluate"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = getattr(import_module(f"griffin.integrations.lm_eval.{_MODULES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
