"""Flocking: which FF neurons the tokens of a sequence agree on, and whether other sequences agree on the same.

Without --text on the passage that is shipped; every text is cut into sequences that do not overlap.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from griffin.cli.arguments import add_json_argument, add_model_arguments, load_model, parse_densities
from griffin.cli.progress import progress_bar
from griffin.cli.tables import print_table
from griffin.config import GriffinConfig
from griffin.errors import GriffinError
from griffin.text_files import read_text

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MOST_SEQUENCES = 8
_ANSWER_TOKENS = 32
_TURNS = ["Name three facts about lighthouses.", "Write a short poem about the second of them."]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_model_arguments(parser)
    how = parser.add_argument_group("measurement")
    how.add_argument("--text", type=Path, metavar="FILE", help="a UTF-8 text (default: the passage that is shipped)")
    how.add_argument("--tokens", type=int, default=128, metavar="N", help="tokens of a sequence (default: 128)")
    how.add_argument(
        "--sequences",
        type=int,
        metavar="N",
        help=f"sequences of the text (default: as many as there are, at most {_MOST_SEQUENCES})",
    )
    how.add_argument(
        "--densities",
        type=parse_densities,
        default=[0.75, 0.5, 0.25],
        metavar="LIST",
        help="shares of the FF neurons kept (default: 0.75,0.5,0.25)",
    )
    how.add_argument("--layer", type=int, metavar="N", help="layer of the heat maps (default: the middle one)")
    how.add_argument(
        "--turn",
        action="append",
        metavar="TEXT",
        help="a message of the conversation; give at least two (default: two that are shipped)",
    )
    how.add_argument("--seed", type=int, default=0, metavar="N", help="seed of permuted and random tokens (default: 0)")
    out = parser.add_argument_group("output")
    add_json_argument(out, "all numbers", "table")
    out.add_argument("--pictures", type=Path, metavar="DIR", help="write pictures (PNG) into this folder")


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        ValueError: wrong arguments, a text that is too short, or a model that GRIFFIN cannot prune.
        GriffinError: the model cannot be fetched, or a file cannot be written.
    """
    densities = [GriffinConfig(density=density, seed=args.seed).density for density in args.densities]
    if args.tokens < 2 or (args.sequences is not None and args.sequences < 2):
        raise ValueError("expected --tokens from 2, and --sequences from 2 as they are compared with each other")
    if args.turn is not None and len(args.turn) < 2:
        raise ValueError("--turn is given once; give it for each message of the conversation, at least twice")
    from griffin.analysis.passage import PASSAGE

    path = args.text or PASSAGE
    text = read_text(path)
    from griffin.analysis import files, flocking, machine
    from griffin.layouts import find_ff_blocks

    json_file = None if args.json in (None, "-") else Path(args.json)
    if json_file is not None:
        files.check_writable(json_file)
    if args.pictures is not None and args.pictures.exists() and not args.pictures.is_dir():
        raise GriffinError(f"cannot write pictures to {args.pictures}: it is a file; expected the name of a folder")
    model, tokenizer = load_model(args)
    layers = len(find_ff_blocks(model))
    if args.layer is not None and not 0 <= args.layer < layers:
        raise ValueError(f"--layer is {args.layer}; this model has layers 0 to {layers - 1}")
    if args.turn is not None and tokenizer.chat_template is None:
        raise ValueError(f"{args.model} has no chat template, so it takes no --turn; leave it out")
    sequences = _sequences(model, tokenizer, text, args)
    texts = flocking.compared(sequences[:1], model.config.get_text_config().vocab_size, args.seed)
    turns = [] if tokenizer.chat_template is None else args.turn or _TURNS
    with progress_bar(len(sequences) + len(texts) + len(turns)) as done:
        by_sequence = _joined(model, [row[None] for row in sequences], done)
        by_text = _joined(model, texts.values(), done)
        by_turn = _conversation(model, tokenizer, turns, done)
    about = {"model": args.model, "text": path.name, "seed": args.seed, "tokens": args.tokens}
    about |= {"sequences": len(sequences), "turns": len(turns)} | machine.versions()
    rows = [_row(density, by_sequence, by_text, list(texts), by_turn) for density in densities]
    numbers: dict[str, Any] = {"about": about, "layers": list(by_sequence), "densities": rows}
    if json_file is not None:
        files.write_text(json_file, json.dumps(numbers, indent=2) + "\n")
    if args.pictures is not None:
        _draw(model, texts, numbers, args)
    if args.json == "-":
        print(json.dumps(numbers, indent=2))
    else:
        _print(numbers)
    return 0


def _row(
    density: float,
    by_sequence: Mapping[int, Tensor],
    by_text: Mapping[int, Tensor],
    names: Sequence[str],
    by_turn: Sequence[Mapping[int, Tensor]],
) -> dict[str, Any]:
    """The numbers of one density, most of them by layer; `names` are the compared texts' names, the original first."""
    import torch

    from griffin.analysis.flocking import energy_share, jaccard, turn_overlap

    overlap, against, shares = jaccard(by_sequence, density), jaccard(by_text, density), energy_share(by_text, density)
    others = ~torch.eye(overlap.shape[1], dtype=torch.bool)
    return {
        "density": density,
        "energy_share": energy_share(by_sequence, density).mean(dim=1).tolist(),
        "jaccard": overlap[:, others].mean(dim=1).tolist(),
        "jaccard_pairs": overlap.tolist(),
        "jaccard_by_chance": density / (2 - density),
        "energy_share_of": {name: shares[:, at].tolist() for at, name in enumerate(names)},
        "jaccard_with_original": {name: against[:, 0, at].tolist() for at, name in enumerate(names) if at},
        "jaccard_between_turns": [turn_overlap(*two, density).tolist() for two in pairwise(by_turn)],
    }


def _sequences(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, args: argparse.Namespace
) -> Tensor:
    """Shapes: (N, S)."""
    from griffin.analysis.benchmark import check_length
    from griffin.analysis.perplexity import encode_text, windows

    ids, bos = encode_text(tokenizer, text)
    check_length(model, args.tokens, 0)
    count = args.sequences or max(2, min(_MOST_SEQUENCES, len(ids) // args.tokens))
    return windows(ids, bos, [args.tokens - 1], 1, count)[0]


def _joined(model: PreTrainedModel, texts: Iterable[Tensor], done: Callable[[str], None]) -> dict[int, Tensor]:
    """Energies of texts that are run one after another, by layer, each (N, D_ff)."""
    import torch

    from griffin.analysis.flocking import energies

    by_text = []
    for ids in texts:
        by_text.append(energies(model, [ids]))
        done("sequences")
    return {layer: torch.cat([text_energies[layer] for text_energies in by_text]) for layer in by_text[0]}


def _conversation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, turns: Sequence[str], done: Callable[[str], None]
) -> list[Mapping[int, Tensor]]:
    """Energies after each turn of a conversation with the full model."""
    from griffin.engine.step import Sampling
    from griffin.generation.chat import Session

    by_turn: list[Mapping[int, Tensor]] = []
    if turns:
        with Session(model, tokenizer, GriffinConfig(density=1.0), Sampling(max_tokens=_ANSWER_TOKENS)) as session:
            for turn in turns:
                for _ in session.ask(turn):
                    pass
                by_turn.append(session.gathered.copy().energies)
                done("conversation")
    return by_turn


def _draw(
    model: PreTrainedModel, texts: Mapping[str, Tensor], numbers: dict[str, Any], args: argparse.Namespace
) -> None:
    import torch

    from griffin.analysis import plots
    from griffin.analysis.flocking import relative_activations

    try:
        args.pictures.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GriffinError(f"cannot make the folder {args.pictures}: {error.strerror or error}") from error
    layers, rows = numbers["layers"], numbers["densities"]
    layer = layers[len(layers) // 2] if args.layer is None else args.layer
    maps = {name: relative_activations(model, ids.to(model.device), [layer])[layer] for name, ids in texts.items()}
    plots.flocking_heat_maps(maps, f"{args.model}, layer {layer}", args.pictures / "flocking.png")
    for name, label in (
        ("energy_share", "share of the energy that the experts hold"),
        ("jaccard", "Jaccard overlap of two sequences' experts"),
    ):
        lines = {f"density {row['density']:g}": torch.tensor(row[name]) for row in rows}
        plots.lines_against_layer(lines, label, args.model, args.pictures / f"{name.replace('_', '-')}.png")
    lines = {
        f"density {row['density']:g}, turn {at} and {at + 1}": torch.tensor(overlap)
        for row in rows
        for at, overlap in enumerate(row["jaccard_between_turns"], start=1)
    }
    if lines:
        label = "Jaccard overlap of experts after two turns"
        plots.lines_against_layer(lines, label, args.model, args.pictures / "turns.png")
    for row in rows:
        title = f"{args.model}, density {row['density']:g}, mean of the layers"
        matrix = torch.tensor(row["jaccard_pairs"]).mean(dim=0)
        plots.overlap_matrix(matrix, title, args.pictures / f"pairs-{row['density']:g}.png")


def _print(numbers: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    about = numbers["about"]
    table = Table(
        title=escape(f"{about['model']}, {about['text']}, {about['sequences']} sequences of {about['tokens']} tokens"),
        caption="means over the layers; with tokens permuted or random: overlap with the experts of the original text",
    )
    table.add_column("density")
    names = ("energy of\nthe experts", "Jaccard of\ntwo sequences", "by\nchance", "with tokens\npermuted")
    for name in (*names, "with random\ntokens", "between\ntwo turns"):
        table.add_column(name, justify="right")
    for row in numbers["densities"]:
        turns = [value for overlaps in row["jaccard_between_turns"] for value in overlaps]
        table.add_row(
            f"{row['density']:g}",
            f"{fmean(row['energy_share']):.1%}",
            f"{fmean(row['jaccard']):.3f}",
            f"{row['jaccard_by_chance']:.3f}",
            *(f"{fmean(row['jaccard_with_original'][name]):.3f}" for name in ("permuted", "random")),
            f"{fmean(turns):.3f}" if turns else "-",
        )
    print_table(table)
