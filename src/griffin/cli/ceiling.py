"""`griffin info --ceiling`: the upper bound of the speed-up for each batch size."""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from griffin.cli.arguments import BUILTIN_MODELS, load_model
from griffin.cli.tables import print_pairs, print_table
from griffin.text_files import read_text

if TYPE_CHECKING:
    from griffin.analysis.ceiling import Machine, StepCost

_BATCHES = [1, 2, 4, 8, 16, 32, 64]
_CONTEXT = 512
_COLUMNS = {"model", "texts", "density", "batch", "union"}
_ASKS = ("shape", "batch", "context", "union", "bandwidth_gb_s", "tflops")
_OF_MODEL = ("model", "dtype", "device", "revision")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that go with --ceiling."""
    group = parser.add_argument_group("ceiling by batch")
    group.add_argument(
        "--ceiling",
        action="store_true",
        help="for each batch and density: FF bytes that the union of the sequences' experts reads, and the most that "
        "the whole step can gain",
    )
    group.add_argument(
        "--shape",
        metavar="NAME",
        help="instead of a model, without its weights: llama2-7b, llama2-13b, mistral-7b, gemma-7b, opt-6.7b or "
        "tinyllama-1.1b",
    )
    group.add_argument(
        "--batch", type=_parse_batches, metavar="LIST", help="numbers of sequences (default: 1,2,4,8,16,32,64)"
    )
    group.add_argument("--context", type=int, metavar="N", help="tokens in each sequence's cache (default: 512)")
    group.add_argument(
        "--union", type=Path, metavar="FILE", help="unions that benchmarks/union.py measured, beside the two bounds"
    )
    group.add_argument(
        "--bandwidth-gb-s",
        type=float,
        metavar="GB/S",
        help="bytes that the machine reads; with --tflops the ceiling is also told in time",
    )
    group.add_argument("--tflops", type=float, metavar="N", help="10^12 floating-point operations a second it does")


def refuse_without(args: argparse.Namespace) -> None:
    """Raise `ValueError` if an argument was given that requires --ceiling."""
    if given := [name for name in _ASKS if getattr(args, name) is not None]:
        raise ValueError(f"--{given[0].replace('_', '-')} goes with --ceiling; add it, or leave this out")


def run(args: argparse.Namespace, densities: Sequence[float]) -> int:
    """Print the ceilings.

    Raises:
        ValueError: wrong arguments, or a model that GRIFFIN cannot prune.
        GriffinError: the model cannot be fetched, or its cache cannot be counted.
    """
    context = _CONTEXT if args.context is None else args.context
    if context < 1:
        raise ValueError(f"--context is {context}; expected a whole number of tokens from 1")
    if args.no_model:
        raise ValueError("--ceiling is a model's, and --no-model leaves it out; give one of the two")
    if args.shape is not None and (given := [name for name in _OF_MODEL if getattr(args, name) is not None]):
        raise ValueError(f"--{given[0]} and --shape {args.shape} do not go together; leave one of them out")
    machine = _machine(args)
    union, of = _measured(args.union, densities)
    name, weights, step = _step(args, context)
    batches = args.batch or _BATCHES
    rows = [_row(step, machine, density, batch, union) for density in densities for batch in batches]
    about = {
        "name": name,
        "weights": weights,
        "context": context,
        **asdict(step),
        "union": of,
        "machine": None if machine is None else asdict(machine),
        "rows": rows,
    }
    if args.json:
        print(json.dumps({"ceiling": about}, indent=2))
    else:
        _print(about)
    return 0


def _parse_batches(text: str) -> list[int]:
    if not all(re.fullmatch(r"\s*0*[1-9]\d*\s*", part) for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"found {text!r}; expected numbers of sequences from 1, such as 1,8,64")
    return [int(part) for part in text.split(",")]


def _machine(args: argparse.Namespace) -> Machine | None:
    for flag, value in (("--bandwidth-gb-s", args.bandwidth_gb_s), ("--tflops", args.tflops)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{flag} is {value:g}; expected a number above 0")
    if (args.bandwidth_gb_s is None) != (args.tflops is None):
        raise ValueError("--bandwidth-gb-s and --tflops go together: time needs both; give the other one too")
    if args.tflops is None:
        return None
    from griffin.analysis.ceiling import Machine

    return Machine(args.bandwidth_gb_s * 1e9, args.tflops * 1e12)


def _measured(path: Path | None, densities: Sequence[float]) -> tuple[dict[tuple[float, int], float], str | None]:
    """Unions by density and batch, and the model they were measured on."""
    if path is None:
        return {}, None
    reader = csv.DictReader(read_text(path).splitlines())
    expected = f"a file that benchmarks/union.py wrote, with the columns {', '.join(sorted(_COLUMNS))}"
    if missing := sorted(_COLUMNS - set(reader.fieldnames or ())):
        raise ValueError(f"{path} has no column {missing[0]!r}; expected {expected}")
    try:
        rows = [row for row in reader if row["texts"] == "all"]
        union = {(float(row["density"]), int(row["batch"])): float(row["union"]) for row in rows}
    except (TypeError, ValueError):
        raise ValueError(f"{path} has a density, batch or union that is no number; expected {expected}") from None
    if not any(density in densities for density, _ in union):
        measured = ", ".join(f"{density:g}" for density in dict.fromkeys(density for density, _ in union))
        asked = ", ".join(f"{density:g}" for density in densities)
        raise ValueError(f"{path} was measured at density {measured or 'none'}, not {asked}; ask for one of those")
    if any(not density <= share + 0.01 or not share <= 1 for (density, _), share in union.items()):
        raise ValueError(f"{path} has a union outside of its density to 1; expected {expected}")
    return union, rows[0]["model"]


def _step(args: argparse.Namespace, context: int) -> tuple[str, str, StepCost]:
    """The model's name, the format of its weights, and the cost of a step."""
    from griffin.analysis.ceiling import step_cost
    from griffin.analysis.shapes import on_meta
    from griffin.analysis.workload import PACKED_BYTES, format_of
    from griffin.generation.text import context_length

    if args.shape is None:
        args.model = args.model or BUILTIN_MODELS[0]
        name, bytes_per_weight = args.model, None
        model, _ = load_model(args)
        weights = args.weights or format_of(model)
    else:
        from griffin.analysis.benchmark import dtype_of
        from griffin.analysis.shapes import shape_of

        name, weights = args.shape, args.weights or "bf16"
        bytes_per_weight = PACKED_BYTES.get(weights)
        model = on_meta(shape_of(name), dtype_of(weights))
    limit = context_length(model)
    if limit is not None and context > limit:
        raise ValueError(f"--context is {context}, but the context of {name} is {limit} tokens; ask for fewer")
    return name, weights, step_cost(model, context, bytes_per_weight)


def _row(
    step: StepCost, machine: Machine | None, density: float, batch: int, union: Mapping[tuple[float, int], float]
) -> dict[str, Any]:
    from griffin.analysis.ceiling import independent_union

    shares = {
        "same": density,
        "measured": union.get((density, batch)),
        "chance": independent_union(density, batch),
    }
    row: dict[str, Any] = {
        "density": density,
        "batch": batch,
        "flops_per_ff_byte": step.flops_per_ff_byte(batch),
        "ff_bound_by": None if machine is None else step.ff_bound_by(machine, batch),
    }
    for name, share in shares.items():
        if share is None:
            row[name] = None
            continue
        entry: dict[str, Any] = {"ff_read": share, "speedup": step.speedup(batch, share)}
        entry["flops_per_ff_byte"] = step.flops_per_ff_byte(batch, density, share)
        if machine is not None:
            entry["speedup_in_time"] = step.speedup_in_time(machine, batch, density, share)
            entry["ff_bound_by"] = step.ff_bound_by(machine, batch, density, share)
        row[name] = entry
    return row


def _print(about: Mapping[str, Any]) -> None:
    from rich.table import Table

    names = [name for name in ("same", "measured", "chance") if name != "measured" or about["union"]]
    print_pairs("one step of a batch", _pairs(about))
    table = Table(title="the most that a batch can gain")
    for column in ("density", "batch"):
        table.add_column(column, justify="right")
    what, key = ("by bytes", "speedup") if about["machine"] is None else ("in time", "speedup_in_time")
    for column in ("FF read", what):
        for name in names:
            table.add_column(f"{column}\n{name}", justify="right")
    if about["machine"] is None:
        table.add_column("full FF,\nflop/byte", justify="right")
    else:
        table.add_column("FF bound by\nfull, GRIFFIN")
    for row in about["rows"]:
        entries = [row[name] for name in names]
        cells = [f"{row['density']:g}", str(row["batch"])]
        cells += ["-" if entry is None else f"{entry['ff_read']:.1%}" for entry in entries]
        cells += ["-" if entry is None else f"{entry[key]:.2f}x" for entry in entries]
        if about["machine"] is None:
            cells.append(f"{row['flops_per_ff_byte']:.1f}")
        else:
            pruned = row["measured"] or row["chance"]
            cells.append(f"{row['ff_bound_by']}, {pruned['ff_bound_by']}")
        table.add_row(*cells)
    print_table(table)


def _pairs(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = [
        ("model", f"{about['name']}, {about['weights']}"),
        ("FF weights", f"{about['ff']['nbytes'] / 1e6:.1f} MB"),
        ("other weights", f"{about['other']['nbytes'] / 1e6:.1f} MB"),
        ("cache", f"{about['cache_bytes'] / 1e6:.2f} MB a sequence, {about['context']} tokens"),
        ("same", "all sequences have the same experts, as with one set for the whole batch"),
    ]
    if about["union"]:
        pairs.append(("measured", f"unions of real prompts on {about['union']}"))
    pairs.append(("chance", "sequences are independent: they share experts by chance alone"))
    if about["machine"] is None:
        pairs.append(("by bytes", "the ceiling of the speed-up where memory is what binds"))
        explained = "a machine that does fewer is bound by arithmetic, which shrinks by the density: see --tflops"
        return [*pairs, ("flop/byte", explained)]
    flops, speed = about["machine"]["flops_per_s"], about["machine"]["bytes_per_s"]
    explained = (
        f"the ceiling at {speed / 1e9:g} GB/s and {flops / 1e12:g} Tflop/s, as given: {flops / speed:.3g} flop/byte"
    )
    judged = "measured, where there is one, else chance" if about["union"] else "experts by chance"
    return [*pairs, ("in time", explained), ("FF bound by", f"the full model, then GRIFFIN with {judged}")]
