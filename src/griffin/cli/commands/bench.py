"""Speed at several densities, verified first, beside the ceiling and the memory's read bandwidth. On the CPU."""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from griffin.cli.arguments import BUILTIN_MODELS, REFINED, add_json_argument, parse_densities
from griffin.cli.progress import progress_bar
from griffin.cli.tables import print_pairs, print_table
from griffin.config import BACKENDS
from griffin.methods import METHODS

if TYPE_CHECKING:
    from rich.table import Table

    from griffin.analysis.benchmark import SpeedRow
    from griffin.analysis.workload import Plan

_DENSITIES = [1.0, 0.75, 0.5, 0.25]
_BUSY_LOAD_PER_CORE = 0.5
_VARIATION = 1.15  # warn if the read bandwidths differ by more than this factor


# The paper's latency table (its section 5.3): full model, magnitude and GRIFFIN at 50% and 75% sparsity.
_PAPER_SHAPES = ("llama2-13b", "gemma-7b")
_PAPER_LENGTHS = ((2048, 128), (2048, 2048))
_PAPER_DENSITIES = [1.0, 0.5, 0.25]
_PAPER_SELECTIONS = ["magnitude", "topk"]
_PRESET_SAYS = ("model", "density", "selection", "prompt", "generate")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    what = parser.add_argument_group("model")
    what.add_argument(
        "-m",
        "--model",
        metavar="MODEL",
        help=f"a built-in model ({', '.join(BUILTIN_MODELS)}), a .gguf file, a model folder or a Hugging Face Hub id "
        f"(default: {BUILTIN_MODELS[0]})",
    )
    what.add_argument(
        "--shape",
        metavar="NAME",
        help="instead of a model: random weights in the shape of llama2-7b, llama2-13b, mistral-7b, gemma-7b, opt-6.7b "
        "or tinyllama-1.1b",
    )
    what.add_argument(
        "--weights",
        metavar="TYPE",
        help="bf16, f32, int8 or int4; a quantised model is dequantised first (default: as the model is stored, "
        "quantised weights too; bf16 for a shape)",
    )
    how = parser.add_argument_group("measurement")
    how.add_argument(
        "--density",
        type=parse_densities,
        metavar="LIST",
        help="shares of the FF neurons kept; 1.0 is always measured (default: 1.0,0.75,0.5,0.25)",
    )
    how.add_argument(
        "--selection",
        type=lambda text: text.split(","),
        metavar="LIST",
        help=f"how experts are selected, one or more of {', '.join(METHODS)}; {REFINED} (default: topk)",
    )
    how.add_argument("--backend", default="auto", metavar="NAME", help=f"{', '.join(BACKENDS)} (default: auto)")
    how.add_argument("--prompt", type=int, metavar="N", help="tokens of the prompt (default: 512)")
    how.add_argument("--generate", type=int, metavar="N", help="tokens to generate (default: 64)")
    how.add_argument(
        "--batch",
        type=int,
        default=1,
        metavar="N",
        help="different prompts at once, each with its experts (default: 1)",
    )
    how.add_argument("--repeats", type=int, default=3, metavar="N", help="rounds over all densities (default: 3)")
    how.add_argument("--threads", type=int, metavar="N", help="threads to compute with (default: as torch chooses)")
    how.add_argument(
        "--preset",
        metavar="NAME",
        help="paper: the paper's latency table (llama2-13b and gemma-7b, or one of them by --shape; prompt+generated "
        "tokens 2048+128 and 2048+2048; full model, magnitude and GRIFFIN at densities 0.5 and 0.25)",
    )
    out = parser.add_argument_group("output")
    add_json_argument(out, "machine, versions and rows", "tables")
    out.add_argument("--csv", type=Path, metavar="FILE", help="the rows, each with machine and versions")


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        ValueError: wrong arguments, or a model that GRIFFIN cannot prune.
        GriffinError: the model does not fit or cannot be fetched, a backend is wrong, a file cannot be written.
    """
    plan = plan_from(args)
    import torch

    from griffin.analysis import files, machine, workload

    json_file = None if args.json in (None, "-") else Path(args.json)
    for path in (json_file, args.csv):
        if path is not None:
            files.check_writable(path)
    workload.check_fits(plan)
    if plan.weights is not None and not plan.shapes and (found := workload.stored_quantised(plan.model)) is not None:
        print(
            f"warning: {plan.model} has {found} weights; they are dequantised and stored as {plan.weights}, so this is "
            "not the file's speed; leave --weights out for that",
            file=sys.stderr,
        )
    load = machine.load_average()
    _print_load(load)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(args.threads or threads)
        about = machine.machine() | {"load_average": load}
        with progress_bar(plan.runs) as done:
            rows, bandwidths = workload.carry_out(plan, done)
    finally:
        torch.set_num_threads(threads)
    speeds = [bandwidth.bytes_per_s for bandwidth in bandwidths]
    _warn_of_variation(speeds)
    _warn_of_paths(rows)
    about |= {
        "read_bandwidth_bytes_per_s": statistics.median(speeds) if speeds else None,
        "read_bandwidth_measured": speeds,  # before and after each round
        "read_bandwidth_how": bandwidths[0].how if bandwidths else "there was no memory for a buffer to read",
        "peak_rss_of": "each run" if machine.reset_peak_rss() else "the whole process",
    }
    versions = machine.versions()
    records = [asdict(row) for row in rows]
    text = json.dumps({"machine": about, "versions": versions, "rows": records}, indent=2)
    if args.csv is not None:
        files.write_text(args.csv, files.csv_text(records, about, versions))
    if json_file is not None:
        files.write_text(json_file, text + "\n")
    if args.json == "-":
        print(text)
    else:
        _print_tables(rows, about, versions)
    return 0


def plan_from(args: argparse.Namespace) -> Plan:
    """The plan for the arguments.

    Raises:
        ValueError: arguments are out of range or do not go together.
    """
    if args.model is not None and args.shape is not None:
        raise ValueError(f"--model {args.model} and --shape {args.shape} do not go together; give one of them")
    for name, least in (("prompt", 1), ("generate", 2), ("batch", 1), ("repeats", 1), ("threads", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} is {value}; expected a whole number from {least}")
    shapes: tuple[str, ...] = () if args.shape is None else (args.shape,)
    densities, selections = args.density or _DENSITIES, args.selection or ["topk"]
    lengths: tuple[tuple[int, int], ...] = ((args.prompt or 512, args.generate or 64),)
    if args.preset is not None:
        if args.preset != "paper":
            raise ValueError(f"--preset is {args.preset!r}; expected paper")
        if given := [name for name in _PRESET_SAYS if getattr(args, name) is not None]:
            raise ValueError(f"--preset paper says itself what --{given[0]} is; leave one of the two out")
        if args.shape not in (None, *_PAPER_SHAPES):
            raise ValueError(f"--preset paper has the shapes {' and '.join(_PAPER_SHAPES)}, not {args.shape!r}")
        shapes = shapes or _PAPER_SHAPES
        densities, selections, lengths = _PAPER_DENSITIES, _PAPER_SELECTIONS, _PAPER_LENGTHS
    from griffin.analysis.benchmark import cases, dtype_of
    from griffin.analysis.passage import passage
    from griffin.analysis.shapes import shape_of
    from griffin.analysis.workload import Plan

    configs = cases(densities, selections, args.batch, args.backend)
    for name in shapes:
        shape_of(name)
    if args.weights is not None:
        dtype_of(args.weights)
    model = args.model or BUILTIN_MODELS[0]
    return Plan(model, shapes, args.weights, args.batch, configs, lengths, args.repeats, passage())


def _print_load(load: float | None) -> None:
    if load is None:
        return
    cores = os.cpu_count() or 1
    print(f"load average {load:.2f} on {cores} cores", file=sys.stderr)
    if load > _BUSY_LOAD_PER_CORE * cores:
        print("warning: this machine is busy with something else; the figures will be too low", file=sys.stderr)


def _warn_of_variation(speeds: Sequence[float]) -> None:
    if speeds and max(speeds) > _VARIATION * min(speeds):
        print(
            f"warning: the memory's own speed changed from {min(speeds) / 1e9:.1f} to {max(speeds) / 1e9:.1f} GB/s "
            "during the run; compare ratios, not speeds",
            file=sys.stderr,
        )


def _warn_of_paths(rows: Sequence[SpeedRow]) -> None:
    names = {row.model for row in rows if row.backend == "native" and row.native_calls_per_step == 0}
    for name in sorted(names):
        print(
            f"warning: {name} at density 1.0 ran Transformers' own forward, not the native library; its "
            "speed-up compares two paths",
            file=sys.stderr,
        )


def _print_tables(rows: Sequence[SpeedRow], about: dict[str, Any], versions: dict[str, str]) -> None:
    speeds = [speed / 1e9 for speed in about["read_bandwidth_measured"]]
    bandwidth = f"unknown: {about['read_bandwidth_how']}"
    if speeds:
        bandwidth = (
            f"{statistics.median(speeds):.1f} GB/s, median of {len(speeds)} around the rounds, {min(speeds):.1f} to "
            f"{max(speeds):.1f} ({about['read_bandwidth_how']})"
        )
    print_pairs(
        "machine",
        [
            ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
            ("CPU", f"{about['cpu']}, {about['cpu_cores']} cores, {about['torch_threads']} torch threads"),
            ("native library", about["native_library"]),
            ("load average", "unknown" if about["load_average"] is None else f"{about['load_average']:.2f}"),
            ("read bandwidth", bandwidth),
            ("peak RSS", f"of {about['peak_rss_of']}"),
        ],
    )
    for _, group in groupby(rows, key=lambda row: (row.model, row.prompt_tokens, row.generated_tokens)):
        print_table(_table(list(group)))


def _table(rows: Sequence[SpeedRow]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    head = rows[0]
    table = Table(
        title=escape(
            f"{head.model}, {head.weights}, backend {head.backend}, batch {head.batch}, "
            f"{head.prompt_tokens} + {head.generated_tokens} tokens, medians"
        )
    )
    for name in ("density", "selection"):
        table.add_column(name)
    for name in (
        "prompt\ntok/s",
        "selection\nms",
        "generation\ntok/s",
        "speed-up",
        "ceiling",
        "share of\nceiling",
        "GB/s",
        "share of\nbandwidth",
        "peak RSS\nGB",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        share, peak = row.share_of_read_bandwidth, row.peak_rss_bytes
        table.add_row(
            f"{row.density:g}",
            "-" if row.density == 1.0 else row.selection,
            f"{row.prompt_tokens_per_s:.0f}",
            f"{row.selection_ms:.1f}",
            f"{row.generation_tokens_per_s:.2f}",
            f"{row.speedup:.2f}x",
            f"{row.ceiling:.2f}x",
            f"{row.share_of_ceiling:.0%}",
            f"{row.bytes_per_s / 1e9:.1f}",
            "?" if share is None else f"{share:.0%}",
            "?" if peak is None else f"{peak / 1e9:.2f}",
        )
    return table
