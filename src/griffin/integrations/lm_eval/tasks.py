"""The tasks: files in `tasks/`, each the harness's own task (named by `harness`) with what is changed of it.

A file's keys are those of the harness's task files, and three more: `harness`, the harness's file that it starts from;
`harness_functions: false`, where that file's functions cannot be imported; `local`, changes for rows from local files.
The folder of local files comes as `data` in the harness's metadata (`--metadata data=DIR`); without it the rows come
from the Hub.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from griffin.errors import GriffinError
from griffin.integrations.lm_eval import TASK_FILES, TASKS, data


class GriffinTask(ConfigurableTask):  # type: ignore[misc]
    """A task of the harness, with rows from local files if its metadata names a folder of them as `data`.

    Raises:
        ValueError: a local file is missing or malformed.
        GriffinError: the rows cannot be loaded from the Hub.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        own = {name: value for name, value in config.items() if name != "class"}
        local = own.pop("local", {})
        settings = _of_harness(own.pop("harness", None), own.pop("harness_functions", True))
        metadata = settings.get("metadata", {}) | own.get("metadata", {})
        settings |= own | {"metadata": metadata}
        folder = metadata.get("data")
        self._rows = None if folder is None else data.load(settings["task"], Path(folder).expanduser())
        if self._rows is not None:
            settings |= {"training_split": None, "validation_split": None, "test_split": "test", **local}
            # Of one split the harness leaves the row that is asked out of the examples it shows.
            settings["fewshot_split"] = "shots" if "shots" in self._rows else "test"
        super().__init__(config=settings)

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Take the rows that were read from local files, or load them from the Hub."""
        if self._rows is not None:
            self.dataset = {split: datasets.Dataset.from_list(rows) for split, rows in self._rows.items()}
            return
        try:
            super().download(dataset_kwargs, **kwargs)
        except Exception as error:  # whatever datasets, fsspec or the network raise
            reason = " ".join(str(error).split())[:200]
            raise GriffinError(
                f"the rows of task {self.config.task} cannot be loaded from the Hub ({reason}); check the network, or "
                "give the folder of local files: --data DIR"
            ) from error


def manager(metadata: dict[str, Any]) -> TaskManager:
    """A task manager that knows these tasks alone."""
    return TaskManager(include_path=str(TASK_FILES), include_defaults=False, metadata=metadata)


def check_names(names: Iterable[str]) -> None:
    """Raise `ValueError` for a name that is none of the tasks of this room."""
    for name in names:
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"there are no local files for task {name!r}{hint}; expected one of {', '.join(TASKS)}")


def _of_harness(path: str | None, functions: bool) -> dict[str, Any]:
    if path is None:
        return {}
    settings: dict[str, Any] = load_yaml(Path(lm_eval.tasks.__file__).parent / path, resolve_func=functions)
    settings.pop("tag", None)
    return settings
