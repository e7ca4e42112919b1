"""The tasks. Each file in `tasks/` names a task file of the harness and changes some of its settings.

A file has the keys of the harness's task files and three more: `harness` names the harness's file, `harness_functions:
false` says that its functions cannot be imported, and `local` holds changes for rows from local files. The harness's
metadata give the folder of local files as `data` (`--metadata data=DIR`); without it the rows come from the Hub.
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
    """A task of the harness, with rows from local files if its metadata has their folder as `data`.

    Raises:
        ValueError: a local file is missing or malformed.
        GriffinError: the rows cannot be loaded from the Hub.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        given = {name: value for name, value in config.items() if name != "class"}
        local = given.pop("local", {})
        settings = _of_harness(given.pop("harness", None), given.pop("harness_functions", True))
        metadata = settings.get("metadata", {}) | given.get("metadata", {})
        settings |= given | {"metadata": metadata}
        folder = metadata.get("data")
        self._rows = None if folder is None else data.load(settings["task"], Path(folder).expanduser())
        if self._rows is not None:
            settings |= {"training_split": None, "validation_split": None, "test_split": "test", **local}
            # With one split for both, the harness leaves the tested row out of the few-shot examples.
            settings["fewshot_split"] = "shots" if "shots" in self._rows else "test"
        super().__init__(config=settings)

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Use the rows from local files, or load them from the Hub."""
        if self._rows is not None:
            self.dataset = {split: datasets.Dataset.from_list(rows) for split, rows in self._rows.items()}
            return
        try:
            super().download(dataset_kwargs, **kwargs)
        except Exception as error:  # datasets, fsspec and the network may raise anything
            reason = " ".join(str(error).split())[:200]
            raise GriffinError(
                f"the rows of task {self.config.task} cannot be loaded from the Hub ({reason}); check the network, or "
                "give the folder of local files: --data DIR"
            ) from error


def manager(metadata: dict[str, Any]) -> TaskManager:
    """A task manager with only these tasks."""
    return TaskManager(include_path=str(TASK_FILES), include_defaults=False, metadata=metadata)


def check_names(names: Iterable[str]) -> None:
    """Raise `ValueError` for a name that is not in `TASKS`."""
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
