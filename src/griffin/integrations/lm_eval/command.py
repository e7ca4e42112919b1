"""The harness's own `run` command with griffin's model and tasks: what `griffin eval` runs."""

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
    """Run the harness: prints its table, and writes what its flags ask for.

    Args:
        parser: an empty parser, which reports wrong flags.
        flags: the harness's own.
        tasks: names of tasks; with `data` of those of this room.
        data: the folder of local files, or `None` for the Hub.
        model_args: arguments of `GriffinLM`, beside those of the flags' `--model_args`.
        batch_size: a number, or `auto`.

    Returns:
        The exit code that the parser asks for (0 after the harness's --help), or 0.

    Raises:
        ValueError: wrong flags or tasks, a missing or malformed file, a model that GRIFFIN cannot prune.
        GriffinError: the model or the rows cannot be fetched.
    """
    args = _parsed(parser, flags)
    args.tasks = list(tasks)
    args.model, args.batch_size = "griffin", batch_size
    args.model_args = {**_others(args.model_args or {}), **model_args}
    if data is not None:
        check_names(tasks)
        for task in tasks:
            load(task, data)  # before the model is loaded
        args.metadata = {**(args.metadata or {}), "data": str(data)}
    # Later paths win, so a user's own tasks do.
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
    except AssertionError as error:  # how the harness refuses much of what it is asked
        if not error.args:
            raise
        raise ValueError(f"the harness refuses: {error.args[0]}") from error
    return 0


def _parsed(parser: argparse.ArgumentParser, flags: Sequence[str]) -> argparse.Namespace:
    Run.create(parser.add_subparsers(dest="command"))
    words = []
    for flag in flags:  # the harness writes --output_path, this command line writes --batch-size: both are understood
        name, equals, value = flag.partition("=")
        words.append(name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else flag)
    return parser.parse_args(["run", *words])


def _others(model_args: dict[str, Any]) -> dict[str, Any]:
    """Model arguments that no flag of this command gives: of two values one would be dropped."""
    flags = {"pretrained": "-m", **{own.name: f"--{own.name}" for own in fields(GriffinConfig)}}
    flags |= {name: f"--{name}" for name in ("phase", "dtype", "weights", "device", "revision")}
    for name in model_args:
        if name in flags:
            raise ValueError(f"--model_args has {name}, which is a flag here; give {flags[name]} instead")
    return model_args


def _check_folder(path: Path) -> None:
    """Raise `GriffinError` if nothing can be written there: better before a long run than after."""
    folder = path.parent if path.suffix == ".json" else path
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GriffinError(f"cannot write to {path}: {error.strerror or error}") from error
    if not os.access(folder, os.W_OK):
        raise GriffinError(f"cannot write to {path}: the folder cannot be written")
