"""The implementation of `griffin eval`: the harness's `run` command with griffin's model and tasks."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
from lm_eval._cli.run import Run
from lm_eval.utils import setup_logging

from griffin.config import GriffinConfig
from griffin.errors import GriffinError
from griffin.integrations.lm_eval import TASK_FILES
from griffin.integrations.lm_eval.data import load
from griffin.integrations.lm_eval.model import GriffinLM  # registers `griffin`, for releases that read no entry points
from griffin.integrations.lm_eval.tasks import check_names

assert GriffinLM is not None


def run(
    parser: argparse.ArgumentParser,
    flags: Sequence[str],
    *,
    tasks: Sequence[str],
    data: Path | None,
    model_args: dict[str, Any],
    batch_size: str,
) -> int:
    """Run the harness, which prints its table and writes the files that its flags name.

    Args:
        parser: an empty parser, used to report wrong flags.
        flags: flags of the harness.
        tasks: names of tasks; with `data`, names from `griffin.integrations.lm_eval.TASKS`.
        data: the folder of local files; `None` loads the rows from the Hub.
        model_args: arguments of `GriffinLM`, in addition to those in the flag `--model_args`.
        batch_size: a number, or `auto`.

    Returns:
        The exit code.

    Raises:
        ValueError: a flag or task is wrong, a file is missing or malformed, or GRIFFIN cannot prune the model.
        GriffinError: the model or the rows cannot be fetched.
    """
    args = _parsed(parser, flags)
    args.tasks = list(tasks)
    args.model, args.batch_size = "griffin", batch_size
    args.model_args = {**_others(args.model_args or {}), **model_args}
    if data is not None:
        check_names(tasks)
        for task in tasks:
            load(task, data)  # report a malformed file before the model is loaded
        args.metadata = {**(args.metadata or {}), "data": str(data)}
    # Later paths take precedence, so a user's tasks replace griffin's.
    args.include_path = [str(TASK_FILES), *([args.include_path] if args.include_path else [])]
    if args.output_path is not None:
        _check_folder(Path(args.output_path))
    if "LMEVAL_LOG_LEVEL" in os.environ:
        setup_logging()
    else:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        datasets.disable_progress_bars()
    try:
        args.func(args)
    except AssertionError as error:  # the harness checks many arguments with assert
        if not error.args:
            raise
        raise ValueError(f"the harness refuses: {error.args[0]}") from error
    return 0


def _parsed(parser: argparse.ArgumentParser, flags: Sequence[str]) -> argparse.Namespace:
    Run.create(parser.add_subparsers(dest="command"))
    words = []
    for flag in flags:  # accept both --output-path and the harness's --output_path
        name, equals, value = flag.partition("=")
        words.append(name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else flag)
    return parser.parse_args(["run", *words])


def _others(model_args: dict[str, Any]) -> dict[str, Any]:
    """The given model arguments. Raises `ValueError` for one that has a flag, as one of two values would be ignored."""
    flags = {"pretrained": "-m", **{field.name: f"--{field.name}" for field in fields(GriffinConfig)}}
    flags |= {name: f"--{name}" for name in ("phase", "dtype", "weights", "device", "revision")}
    for name in model_args:
        if name in flags:
            raise ValueError(f"--model_args has {name}, which is a flag here; give {flags[name]} instead")
    return model_args


def _check_folder(path: Path) -> None:
    """Raise `GriffinError` if the folder cannot be written, before a long run instead of after it."""
    folder = path.parent if path.suffix == ".json" else path
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GriffinError(f"cannot write to {path}: {error.strerror or error}") from error
    if not os.access(folder, os.W_OK):
        raise GriffinError(f"cannot write to {path}: the folder cannot be written")
