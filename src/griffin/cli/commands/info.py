"""This machine, a model's FF blocks, and how much faster GRIFFIN can make it at most."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from griffin.cli import ceiling as by_batch
from griffin.cli.arguments import BUILTIN_MODELS, add_model_arguments, load_model, parse_densities
from griffin.cli.tables import print_pairs, print_table
from griffin.config import BACKENDS, GriffinConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from griffin.layouts import FFBlock

_DENSITIES = (0.75, 0.5)


@dataclass(frozen=True)
class Layers:
    """Consecutive layers whose FF blocks are alike.

    Args:
        first, last: indices of the layers.
        path: module of the FF block, with `{}` for the index of the layer.
        layout: names of the projections.
        d_ff: FF width, the number of neurons.
        d: model width.
        gated: whether there is a gate.
        bytes_per_layer: bytes of the weights of one FF block.
    """

    first: int
    last: int
    path: str
    layout: str
    d_ff: int
    d: int
    gated: bool
    bytes_per_layer: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--density",
        action="append",
        type=parse_densities,
        metavar="D",
        help="give the ceiling for this density, 0 < D <= 1; a list or several times (default: 0.75,0.5)",
    )
    parser.add_argument("--backend", default="auto", metavar="NAME", help=f"{', '.join(BACKENDS)} (default: auto)")
    parser.add_argument("--no-model", action="store_true", help="this machine only")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_model_arguments(parser)
    parser.set_defaults(model=None)  # to distinguish a given model from the default
    by_batch.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        ValueError: wrong arguments, or a model that GRIFFIN cannot prune.
        GriffinError: the model cannot be fetched.
    """
    given = _DENSITIES if args.density is None else [density for some in args.density for density in some]
    densities = [GriffinConfig(density=density, backend=args.backend).density for density in given]
    if args.ceiling:
        return by_batch.run(args, densities)
    by_batch.refuse_without(args)
    args.model = args.model or BUILTIN_MODELS[0]
    from griffin.analysis.machine import machine, versions

    about: dict[str, Any] = {"machine": versions() | machine()}
    if not args.json:
        print_pairs("machine", _machine_rows(about["machine"]))
    if not args.no_model:
        model, _ = load_model(args)
        about["model"] = describe(model, args.model, densities, args.backend)
        if not args.json:
            _print_model(about["model"])
    if args.json:
        print(json.dumps(about, indent=2))
    return 0


def describe(model: PreTrainedModel, name: str, densities: Iterable[float], backend: str) -> dict[str, Any]:
    """A model's FF blocks, how they are computed, and the ceiling of each density.

    Raises:
        ValueError: the model has no FF blocks that GRIFFIN can prune, or the backend cannot compute them.
    """
    from griffin.analysis.ceiling import bytes_read_per_token, ceiling
    from griffin.attachment import attach
    from griffin.engine.decoders import Decoders
    from griffin.layouts import find_ff_blocks
    from griffin.method import profile
    from griffin.weights.quantised import parameter_count, prompt_dtype

    blocks = find_ff_blocks(model)
    ff_bytes = sum(block.nbytes for block in blocks)
    read_bytes = bytes_read_per_token(model)
    share = ff_bytes / read_bytes
    with attach(model, backend=backend) as handle:
        step = Decoders(model, handle).name
    stored = profile.find(model, blocks)
    return {
        "name": name,
        "family": model.config.model_type,
        "parameters": parameter_count(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "layers": [asdict(layers) for layers in _fold(blocks)],
        "backend": handle.backend.name,
        "backend_reason": handle.backend.reason,
        "prompt_dtype": str(prompt_dtype(model, model.dtype)).removeprefix("torch."),
        "generation_step": step,
        "ff_bytes": ff_bytes,
        "read_bytes_per_token": read_bytes,
        "ff_share": share,
        "ceilings": [{"density": density, "speedup": ceiling(share, density)} for density in densities],
        "dynamic": [_dynamic(blocks[0], density) for density in densities if density < 1.0],
        "profile": None if stored is None else {**stored.about, "losses": stored.losses},
    }


def _dynamic(block: FFBlock, density: float) -> dict[str, Any] | None:
    """How dynamic selection divides a density's bytes in a block; `None` if it does not support the activation."""
    from griffin.method.dynamic import split

    try:
        return {"density": density, "width": block.width, "gated": block.gated, **asdict(split(block, density))}
    except ValueError:
        return None


def _fold(blocks: Sequence[FFBlock]) -> list[Layers]:
    """Join consecutive FF blocks that are alike."""
    from griffin.weights.projection import shape_of

    folded: list[Layers] = []
    for block in blocks:
        layers = Layers(
            first=block.layer,
            last=block.layer,
            path=".".join("{}" if part == str(block.layer) else part for part in block.path.split(".")),
            layout=str(block.layout),
            d_ff=block.width,
            d=shape_of(block.output)[0],
            gated=block.gated,
            bytes_per_layer=block.nbytes,
        )
        if folded and asdict(folded[-1]) | {"first": layers.first, "last": layers.last} == asdict(layers):
            layers = Layers(**asdict(layers) | {"first": folded.pop().first})
        folded.append(layers)
    return folded


def _split_text(split: dict[str, Any]) -> str:
    scored, computed = ("gates", "up and down") if split["gated"] else ("ups", "down")
    source = "" if split["gate"] is None else f" from a copy in {split['gate']}"
    experts, chosen = (split[name] / split["width"] for name in ("experts", "chosen"))
    return f"{scored} of {experts:.0%}{source}, {computed} of {chosen:.0%} of the neurons"


def _machine_rows(about: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("versions", ", ".join(f"{name} {about[name]}" for name in ("griffin", "torch", "transformers", "python"))),
        ("system", about["system"]),
        ("CPU", f"{about['cpu']}, {about['cpu_cores']} cores, {about['torch_threads']} torch threads"),
        ("CPU features", f"{', '.join(about['cpu_features']) or 'unknown'} (torch: {about['torch_cpu_capability']})"),
        ("accelerator", about["accelerator"] or "none"),
        ("native library", about["native_library"]),
    ]


def _print_model(about: dict[str, Any]) -> None:
    from rich.table import Table

    of = f"{about['ff_bytes'] / 1e6:.1f} of {about['read_bytes_per_token'] / 1e6:.1f} MB"
    slow = "" if about["prompt_dtype"] == about["dtype"] else f", as this CPU is slow with {about['dtype']} matrices"
    pairs = [
        ("name", about["name"]),
        ("family", about["family"]),
        ("parameters", f"{about['parameters'] / 1e6:.1f} M, {about['dtype']}, on {about['device']}"),
        ("backend", f"{about['backend']} ({about['backend_reason']})"),
        ("prompt phase", f"multiplies in {about['prompt_dtype']}{slow}"),
        ("generation step", about["generation_step"]),
        ("FF share", f"{about['ff_share']:.1%} of the weights read per generated token ({of})"),
    ]
    pairs += [
        (f"ceiling at {row['density']:g}", f"{row['speedup']:.2f}x generation speed at most")
        for row in about["ceilings"]
    ]
    pairs += [(f"dynamic at {row['density']:g}", _split_text(row)) for row in about["dynamic"] if row is not None]
    profile = about["profile"]
    profile_text = (
        ""
        if profile is None
        else f"{profile['text']}, {profile['tokens']} tokens; losses for {', '.join(profile['losses']) or 'none'}"
    )
    pairs.append(("profile", profile_text or "none known; griffin profile makes one"))
    print_pairs("model", pairs)
    table = Table("layers", "FF block", "layout", "D_ff", "D", "gated", "MB a layer", title="FF blocks")
    for row in about["layers"]:
        span = str(row["first"]) if row["first"] == row["last"] else f"{row['first']}-{row['last']}"
        size = f"{row['bytes_per_layer'] / 1e6:.2f}"
        gated = "yes" if row["gated"] else "no"
        table.add_row(span, row["path"], row["layout"], str(row["d_ff"]), str(row["d"]), gated, size)
    print_table(table)
