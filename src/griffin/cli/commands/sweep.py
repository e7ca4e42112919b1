"""Measure a matrix of methods, densities and tasks into a folder: quality, perplexity, speed, flocking, answers.

A sweep that was stopped or killed goes on when the same command is given again; what is finished is not run twice.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from griffin.cli.arguments import REFINED, add_model_arguments, load_model, parse_densities, parse_lengths
from griffin.config import BATCHES, GriffinConfig
from griffin.integrations.lm_eval import PHASES, SUITES, TASKS
from griffin.methods import METHODS
from griffin.text_files import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from griffin.analysis.sweep import Job

_DENSITIES = [1.0, 0.75, 0.5]
_SPEED_TOKENS = (512, 64)
_ANSWER_TOKENS = 80
_FLOCKING_TOKENS = 512
_QUESTIONS = (
    "Summarize this passage in a few sentences:\n\n{passage}",
    "Explain to a child why the sky is blue during the day and red in the evening.",
    "Write a short story about a fisherman who finds a letter in a bottle.",
    "List five things to check before a long bicycle tour, and say why each of them matters.",
)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_model_arguments(parser)
    matrix = parser.add_argument_group("matrix (the full model is always measured, once)")
    matrix.add_argument(
        "--densities", type=parse_densities, default=_DENSITIES, metavar="LIST", help="default: 1.0,0.75,0.5"
    )
    matrix.add_argument(
        "--methods",
        type=_names,
        default=["topk"],
        metavar="LIST",
        help=f"of {', '.join(METHODS)}; {REFINED} (default: topk)",
    )
    matrix.add_argument("--seed", type=int, default=0, metavar="N", help="of random selections (default: 0)")
    tasks = parser.add_argument_group("tasks of lm-evaluation-harness")
    tasks.add_argument("--tasks", type=_names, default=[], metavar="LIST", help=f"of {', '.join(TASKS)}")
    tasks.add_argument("--suite", metavar="NAME", help=f"a set of tasks: {', '.join(SUITES)}")
    tasks.add_argument("--data", type=Path, metavar="DIR", help="local files instead of the Hub")
    tasks.add_argument("--limit", type=int, metavar="N", help="most examples of a task (default: all)")
    tasks.add_argument(
        "--phase",
        default=PHASES[0],
        metavar="NAME",
        help=f"what experts score: {', '.join(PHASES)} (default: {PHASES[0]})",
    )
    tasks.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="cut longer contexts from the left, and count them; what follows counts too (default: the model's window)",
    )
    tasks.add_argument("--batch-size", type=int, default=1, metavar="N", help="sequences run at once (default: 1)")
    tasks.add_argument(
        "--batch",
        type=_names,
        default=[BATCHES[0]],
        metavar="LIST",
        help=f"experts of a batch, one or more of {', '.join(BATCHES)} (default: {BATCHES[0]})",
    )
    text = parser.add_argument_group("perplexity")
    text.add_argument("--perplexity", type=Path, metavar="TEXT", help="measure the perplexity of a text file")
    text.add_argument(
        "--prompt", type=parse_lengths, default=[512], metavar="LIST", help="tokens of the prompt (default: 512)"
    )
    text.add_argument(
        "--generate", type=parse_lengths, default=[128], metavar="LIST", help="tokens scored after it (default: 128)"
    )
    text.add_argument("--sequences", type=int, default=16, metavar="N", help="sequences of the text (default: 16)")
    more = parser.add_argument_group("more")
    more.add_argument("--speed", action="store_true", help="measure speed beside the ceiling, on the CPU")
    more.add_argument(
        "--flocking", action="store_true", help="picture flocking, and measure how experts of texts overlap"
    )
    more.add_argument("--examples", action="store_true", help="answer a few prompts with every method and density")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="folder of the results, made if it is not there"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        ValueError: wrong arguments, or the folder holds results of another model or version.
        GriffinError: the model cannot be fetched, the folder cannot be written, or another sweep is writing to it.
    """
    configs = _matrix(args)
    tasks = _tasks(args)
    if not (tasks or args.perplexity or args.speed or args.flocking or args.examples):
        raise ValueError("nothing to measure; give --tasks, --suite, --perplexity, --speed, --flocking or --examples")
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"{args.output} is not a folder; expected one for the results")
    text = None if args.perplexity is None else read_text(args.perplexity)
    from griffin.analysis import cells, machine, sweep
    from griffin.analysis.fingerprint import fingerprint
    from griffin.analysis.folder import writing
    from griffin.cli.sweep_progress import observer

    model, tokenizer = load_model(args)
    dtype = str(model.dtype).removeprefix("torch.")
    about = cells.Model(args.model, fingerprint(model), args.weights or dtype, dtype)
    _check_window(args.max_length, model)
    versions = machine.versions() | _used(model, configs) | ({"lm_eval": version("lm_eval")} if tasks else {})
    jobs = _jobs(args, model, tokenizer, about, configs, tasks, text)
    total = sum(len(job.keys) for job in jobs)
    with writing(args.output, about, versions) as folder:
        for warning in folder.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        todo = sweep.pending(folder, about, jobs)
        missing = sum(len(keys) for _, keys in todo)
        print(f"{total} cells, {total - missing} of them finished earlier", file=sys.stderr)
        try:
            with observer(missing) as progress:
                failed = sweep.carry_out(folder, about, todo, versions, machine.machine(), progress)
        except KeyboardInterrupt:
            left = sum(len(keys) for _, keys in sweep.pending(folder, about, jobs))
            print(
                f"\ninterrupted: {total - left} of {total} cells are in {args.output}; the same command goes on",
                file=sys.stderr,
            )
            raise
    if failed:
        print(f"griffin: error: {failed} of {total} cells failed; the same command tries them again", file=sys.stderr)
    print(f"{args.output}: see it with griffin report {args.output}", file=sys.stderr)
    return 1 if failed else 0


def _check_window(length: int | None, model: PreTrainedModel) -> None:
    from griffin.generation.text import context_length

    window = context_length(model)
    if length is not None and window is not None and length > window:
        raise ValueError(f"--max-length is {length}, the model's window is {window} tokens; expected no more than that")


def _used(model: PreTrainedModel, configs: Sequence[GriffinConfig]) -> dict[str, str]:
    """Attach every method once, so that a method this model cannot run fails before others run for hours.

    Returns:
        The digest of the profile that methods use, as one of the versions.
    """
    from griffin.analysis.wanda import attach_any

    used = {}
    for config in {config.selection: config for config in configs if config.density < 1.0}.values():
        try:
            with attach_any(model, config) as handle:
                if handle.plan.profile is not None:
                    used["profile"] = handle.plan.profile.digest
        except ValueError as error:
            raise ValueError(f"method {config.selection} cannot be measured: {error}") from error
    return used


def _matrix(args: argparse.Namespace) -> list[GriffinConfig]:
    for name, least in (("limit", 1), ("batch_size", 1), ("sequences", 1), ("max_length", 2)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; expected a whole number from {least}")
    if args.phase not in PHASES:
        raise ValueError(f"--phase is {args.phase!r}; expected one of {', '.join(PHASES)}")
    for kind in args.batch:
        GriffinConfig(batch=kind)
    from griffin.analysis.sweep import settings

    return settings(args.methods, args.densities, seed=args.seed)


def _tasks(args: argparse.Namespace) -> list[str]:
    if args.suite is not None and args.suite not in SUITES:
        raise ValueError(f"--suite is {args.suite!r}; expected one of {', '.join(SUITES)}")
    tasks = list(dict.fromkeys([*args.tasks, *SUITES.get(args.suite, ())]))
    if tasks:
        from griffin.integrations.lm_eval.tasks import check_names

        check_names(tasks)
        if args.data is not None:
            from griffin.integrations.lm_eval.data import load

            for task in tasks:
                load(task, args.data)  # a missing file fails before the model is loaded
    return tasks


def _jobs(
    args: argparse.Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    about: Any,
    configs: Sequence[GriffinConfig],
    tasks: Sequence[str],
    text: str | None,
) -> list[Job]:
    """All requested jobs, the quickest first."""
    from griffin.analysis import jobs
    from griffin.analysis.cells import TEXTS
    from griffin.analysis.passage import passage as shipped_passage
    from griffin.analysis.perplexity import encode_text
    from griffin.analysis.sweep import settings

    # The other kinds run one sequence at a time, where `batch` makes no difference.
    batched = settings(args.methods, args.densities, args.batch if args.batch_size > 1 else BATCHES[:1], seed=args.seed)
    passage = shipped_passage()
    todo: list[Job] = []
    if args.examples:
        prompts = [question.format(passage=passage) for question in _QUESTIONS]
        todo += jobs.examples(model, tokenizer, prompts, configs, _ANSWER_TOKENS, _hash("".join(prompts)))
    if args.flocking or text is not None:
        name, content = ("passage", passage) if text is None else (args.perplexity.name, text)
        ids, bos = encode_text(tokenizer, content)
        if args.flocking:
            todo.append(jobs.flocking_job(model, name, ids, bos, _FLOCKING_TOKENS, args.seed, _hash(content)))
        if text is not None:
            lengths = args.prompt, args.generate, args.sequences
            todo += jobs.perplexities(model, name, ids, bos, configs, *lengths, _hash(text))
    if args.speed:
        todo.append(jobs.speeds(model, tokenizer, about.name, about.weights, passage, configs, *_SPEED_TOKENS))
    if tasks:
        from griffin.integrations.lm_eval.sweep import task_jobs

        todo += task_jobs(
            model,
            tokenizer,
            tasks,
            batched,
            data=args.data,
            limit=args.limit,
            phase=args.phase,
            batch_size=args.batch_size,
            max_length=args.max_length,
            answers=args.output / TEXTS,
        )
    return todo


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:8]
