"""Measure a model once: which neurons matter over many texts (a prior for short prompts), and what densities cost.

The text is given, or the model writes it. The profile is a small file that `--selection auto`, `prior+...` and
`--loss` look for. An existing one of the same model keeps its prior and its losses of other weight formats, unless a
text is given.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from griffin.cache import cache_folder
from griffin.cli.arguments import add_model_arguments, load_model
from griffin.cli.progress import progress_bar
from griffin.cli.tables import print_table
from griffin.text_files import read_text

if TYPE_CHECKING:
    from torch import Tensor

    from griffin.method.profile import Profile

_CURVES = 8  # sequences that measure how the layers' energies are spread
_LEAST = 4  # sequences: every fourth is held out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_model_arguments(parser)
    group = parser.add_argument_group("profile")
    group.add_argument("--text", type=Path, metavar="FILE", help="a UTF-8 text (default: the model writes one)")
    group.add_argument(
        "--sequences", type=int, default=32, metavar="N", help="sequences of 512 tokens; a quarter measures the losses "
        "(default: 32)",
    )  # fmt: skip
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the text that the model writes (default: 0)"
    )
    group.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="the profile (default: in griffin's cache, where it is found)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        ValueError: wrong arguments, a text that is too short, a profile of another model in the way.
        GriffinError: the model cannot be fetched, or the file cannot be written.
    """
    if args.sequences < _LEAST:
        raise ValueError(f"--sequences is {args.sequences}; expected a whole number from {_LEAST}")
    text = None if args.text is None else read_text(args.text)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(args.model).name if Path(args.model).exists() else args.model)
    path = args.output or cache_folder() / "profiles" / f"{name}.safetensors"

    from griffin.analysis.benchmark import check_length
    from griffin.analysis.files import check_writable
    from griffin.analysis.profiling import DENSITIES, TOKENS, prior, split, with_curves, with_losses
    from griffin.layouts import find_ff_blocks
    from griffin.method.profile import Profile

    if args.output is not None:
        check_writable(path)
    model, tokenizer = load_model(args)
    check_length(model, TOKENS // 2, TOKENS // 2)
    profile = Profile.load(path) if path.exists() else None
    if profile is not None and not profile.fits(model, find_ff_blocks(model)):
        raise ValueError(f"{path} is the profile of another model, and stays as it is; give another -o FILE")
    sequences = _sequences(args, model, tokenizer, text)
    for_prior, held_out = split(sequences)
    source = {"model": args.model, "text": "written by the model" if args.text is None else args.text.name}
    if profile is None or text is not None:
        with progress_bar(len(for_prior)) as done:
            profile = prior(model, for_prior, source, lambda: done("prior"))
    if not profile.curves or text is not None:
        some = for_prior[:_CURVES]
        with progress_bar(len(some)) as done:
            profile = with_curves(profile, model, some, lambda: done("curves"))
    profile.save(path)
    with progress_bar(len(held_out) * len(DENSITIES)) as done:
        profile = with_losses(profile, model, held_out, str(path), lambda: done("losses"))
    profile.save(path)
    print_table(_table(profile))
    print(path)
    return 0


def _sequences(args: argparse.Namespace, model: Any, tokenizer: Any, text: str | None) -> Tensor:
    from griffin.analysis.perplexity import encode_text, windows
    from griffin.analysis.profiling import TOKENS, steps_of, written

    if text is not None:
        ids, bos = encode_text(tokenizer, text)
        return windows(ids, bos, [TOKENS - 1], 1, args.sequences)[0]
    with progress_bar(steps_of(args.sequences)) as done:
        return written(model, tokenizer, args.sequences, args.seed, lambda: done("text"))


def _table(profile: Profile) -> Any:
    from rich.table import Table

    table = Table(title=f"{profile.about['model']}: KL to the full model, nats a token")
    table.add_column("density (bytes)")
    for weights in profile.losses:
        table.add_column(weights, justify="right")
    for density in sorted({density for losses in profile.losses.values() for density in losses}):
        cells = [losses.get(density) for losses in profile.losses.values()]
        table.add_row(f"{density:g}", *("-" if loss is None else f"{loss:.4f}" for loss in cells))
    return table
