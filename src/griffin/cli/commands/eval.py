"""Evaluate a model on tasks of lm-evaluation-harness.

The table that the harness prints goes to stdout. All flags of its own `run` command may be added, such as --limit N,
--num_fewshot N, --output_path DIR, --log_samples, --apply_chat_template, --model_args KEY=VALUE: docs/evaluation.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
from dataclasses import asdict
from pathlib import Path

from griffin.cli.arguments import add_config_arguments, add_model_arguments, config_from
from griffin.cli.parser import Parser
from griffin.config import GriffinConfig
from griffin.errors import GriffinError
from griffin.integrations.lm_eval import PHASES, SUITES, TASKS

TAKES_OTHER_FLAGS = True  # they come as `args.others`

_INSTALL = "griffin eval needs lm-evaluation-harness: pip install 'griffin-llm[eval]'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.usage = "griffin eval --tasks TASKS [options] [flags of lm-eval]"
    what = parser.add_argument_group("evaluation")
    what.add_argument("--tasks", "-t", nargs="+", metavar="TASK", help="names, separated by commas or spaces")
    what.add_argument("--suite", metavar="NAME", help="a set of tasks instead: paper (the ten of the paper)")
    what.add_argument(
        "--data", type=Path, metavar="DIR", help="read the tasks' rows from local files there (default: from the Hub)"
    )
    what.add_argument(
        "--phase",
        default="continuation",
        metavar="NAME",
        help="what the experts compute of a choice that is scored: continuation (all of it) or last_token (the paper's "
        "simulation) (default: continuation)",
    )
    what.add_argument(
        "--batch-size",
        "--batch_size",
        "-b",
        default="1",
        metavar="N",
        help="prompts run at once; they share their experts, unless --batch per_sequence (default: 1)",
    )
    add_model_arguments(parser)
    add_config_arguments(parser, without=("seed",))
    what.add_argument(
        "--seed",
        metavar="N",
        help="of random selections and of the harness; or A,B,C,D, the harness's own four (default: 0 and its own)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        ValueError: wrong arguments, a missing or malformed file, a model that GRIFFIN cannot prune.
        GriffinError: the model or the rows cannot be fetched, or the results cannot be written.
    """
    tasks = _tasks(args)
    config = _config(args)
    if args.phase not in PHASES:
        raise ValueError(f"--phase is {args.phase!r}; expected {' or '.join(PHASES)}")
    if importlib.util.find_spec("lm_eval") is None:
        raise GriffinError(_INSTALL)

    from griffin.integrations.lm_eval.command import run as run_harness

    logging.getLogger("transformers").setLevel(logging.ERROR)
    given = {name: getattr(args, name) for name in ("weights", "device", "revision")}
    given |= {"dtype": None if args.dtype is None else _dtype(args.dtype)}
    model_args = {"pretrained": args.model, "phase": args.phase, **asdict(config)}
    model_args |= {name: value for name, value in given.items() if value is not None}
    return run_harness(
        Parser(prog="griffin eval"),
        [*args.others, *([] if args.seed is None else ["--seed", args.seed])],
        tasks=tasks,
        data=args.data,
        model_args=model_args,
        batch_size=args.batch_size,
    )


def _tasks(args: argparse.Namespace) -> list[str]:
    if args.suite is not None:
        if args.tasks:
            raise ValueError("--suite and --tasks both name tasks; give one of them")
        if args.suite not in SUITES:
            raise ValueError(f"--suite is {args.suite!r}; expected one of {', '.join(SUITES)}")
        return list(SUITES[args.suite])
    names = [name for word in args.tasks or () for name in word.split(",") if name]
    if not names:
        raise ValueError(f"there are no tasks; give --suite paper or --tasks with some of {', '.join(TASKS)}")
    return list(dict.fromkeys(names))


def _config(args: argparse.Namespace) -> GriffinConfig:
    """The config for the arguments. Four numbers in `--seed` are the harness's; the config keeps its default then."""
    seed = args.seed
    single = seed is None or "," not in seed
    if seed is not None and single and not seed.isdecimal():
        raise ValueError(f"--seed is {seed!r}; expected a whole number from 0, or four separated by commas")
    namespace = argparse.Namespace(**{**vars(args), "seed": int(seed) if seed is not None and single else None})
    return config_from(namespace)


def _dtype(name: str) -> str:
    """The harness's name for a dtype."""
    full = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}.get(name, name)
    if full not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"--dtype is {name!r}; expected bf16, f16 or f32")
    return full
