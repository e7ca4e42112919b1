"""What the generation phase costs on real text: perplexity, KL to the full model and top-1 agreement.

A text is cut into sequences. Each one's prompt runs in full; the tokens after it are scored with its experts.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from griffin.cli.arguments import (
    REFINED,
    add_json_argument,
    add_model_arguments,
    load_model,
    parse_densities,
    parse_lengths,
)
from griffin.cli.progress import progress_bar
from griffin.cli.tables import print_table
from griffin.config import BACKENDS
from griffin.methods import METHODS
from griffin.text_files import read_text

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from griffin.analysis.bootstrap import Interval
    from griffin.analysis.perplexity import PerplexityRow
    from griffin.config import GriffinConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_model_arguments(parser)
    how = parser.add_argument_group("measurement")
    how.add_argument("--text", type=Path, metavar="FILE", help="the text to score, UTF-8, such as WikiText-2 (needed)")
    how.add_argument(
        "--densities",
        type=parse_densities,
        default=[1.0, 0.75, 0.5],
        metavar="LIST",
        help="shares of the FF neurons kept (default: 1.0,0.75,0.5)",
    )
    how.add_argument(
        "--selection",
        type=lambda text: text.split(","),
        default=["topk"],
        metavar="LIST",
        help=f"how experts are selected, one or more of {', '.join(METHODS)}; {REFINED} (default: topk)",
    )
    how.add_argument(
        "--prompt",
        type=parse_lengths,
        default=[1024],
        metavar="LIST",
        help="tokens of the prompt; several lengths score the same continuations (default: 1024)",
    )
    how.add_argument(
        "--generate",
        type=parse_lengths,
        default=[128],
        metavar="LIST",
        help="tokens scored after the prompt; shorter ones are the start of the longest (default: 128)",
    )
    how.add_argument("--sequences", type=int, default=16, metavar="N", help="sequences of the text (default: 16)")
    how.add_argument("--backend", default="auto", metavar="NAME", help=f"{', '.join(BACKENDS)} (default: auto)")
    how.add_argument("--seed", type=int, default=0, metavar="N", help="seed of random selections (default: 0)")
    out = parser.add_argument_group("output")
    add_json_argument(out, "versions and rows", "table")
    out.add_argument("--csv", type=Path, metavar="FILE", help="the rows, each with model and versions")
    out.add_argument("--plot", type=Path, metavar="PNG", help="a picture of perplexity against the lengths")


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        ValueError: wrong arguments, a text that is too short, or a model that GRIFFIN cannot prune.
        GriffinError: the model cannot be fetched, or a file cannot be written.
    """
    if args.text is None:
        raise ValueError(
            "--text FILE is missing: give a UTF-8 text of some 100 kB, such as WikiText-2's validation set"
        )
    text = read_text(args.text)
    if not text.strip():
        raise ValueError(f"{args.text} is empty; give a text that is longer than a prompt and its continuation")
    from griffin.analysis import files, machine, perplexity

    configs = perplexity.cases(args.densities, args.selection, args.backend, args.seed)
    json_file = None if args.json in (None, "-") else Path(args.json)
    for path in (json_file, args.csv, args.plot):
        if path is not None:
            files.check_writable(path)
    model, tokenizer = load_model(args)
    rows = _measured(model, tokenizer, text, configs, args)
    about: dict[str, Any] = {
        "model": args.model,
        "weights": args.weights or str(model.dtype).removeprefix("torch."),
        "text": args.text.name,
        "backend": args.backend,
        "seed": args.seed,
    }
    about |= machine.versions()
    cells = [row.flat() for row in rows]
    written = json.dumps({"about": about, "rows": cells}, indent=2)
    if args.csv is not None:
        files.write_text(args.csv, files.csv_text(cells, about))
    if json_file is not None:
        files.write_text(json_file, written + "\n")
    if args.plot is not None:
        from griffin.analysis.plots import perplexity_against_length

        perplexity_against_length(rows, f"{args.model}, {args.text.name}, {args.sequences} sequences", args.plot)
    if args.json == "-":
        print(written)
        return 0
    for (prompt, generated), group in groupby(rows, key=lambda row: (row.prompt_tokens, row.generated_tokens)):
        print_table(_table(f"{args.model}, {args.text.name}, {prompt} + {generated} tokens", list(group)))
    return 0


def _measured(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    configs: list[GriffinConfig],
    args: argparse.Namespace,
) -> list[PerplexityRow]:
    from griffin.analysis.benchmark import check_length
    from griffin.analysis.perplexity import encode_text, measure, summary, windows

    longest = max(args.generate)
    ids, bos = encode_text(tokenizer, text)
    sequences = windows(ids, bos, args.prompt, longest, args.sequences)
    check_length(model, max(args.prompt), longest)
    rows = []
    with progress_bar(len(args.prompt) * len(configs) * args.sequences) as done:
        for prompt, window_ids in zip(args.prompt, sequences, strict=True):
            scored = measure(model, window_ids, prompt, configs, progress=partial(done, f"prompts of {prompt} tokens"))
            rows += [summary(scores, prompt, generate) for generate in args.generate for scores in scored]
    return rows


def _table(title: str, rows: list[PerplexityRow]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=escape(f"{title}, {rows[0].sequences} sequences"),
        caption=f"full model: perplexity {_interval_text(rows[0].full_perplexity, '.2f')}; in brackets: 95% intervals "
        "over the sequences, by bootstrap",
    )
    for name in ("density", "selection"):
        table.add_column(name)
    for name in ("perplexity", "ln(perplexity / full's)", "KL(full || griffin), nats", "top-1 agreement"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            f"{row.density:g}",
            "-" if row.density == 1.0 else row.selection,
            _interval_text(row.perplexity, ".2f"),
            _interval_text(row.log_ratio, "+.4f"),
            _interval_text(row.kl, ".4f"),
            _interval_text(row.agreement, ".1%"),
        )
    return table


def _interval_text(interval: Interval, format: str) -> str:
    if interval.low != interval.low:  # nan: one sequence has no interval
        return f"{interval.value:{format}}"
    return f"{interval.value:{format}} ({interval.low:{format}} to {interval.high:{format}})"
