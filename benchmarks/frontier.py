"""The frontier: KL to the source file against bytes (and tokens/s), for smaller files alone and for methods on each.

    python benchmarks/frontier.py SOURCE.gguf DATA --quantize LLAMA-QUANTIZE --work FOLDER -o results/frontier/NAME.csv
    python benchmarks/frontier.py --plot docs/frontier.png -o results/frontier/NAME.csv

`--quantize` is llama.cpp's quantiser, which makes every file of `--types` from the source (a source that is quantised
already is quantised a second time, as a user without the original would do it; a file of the source's own type is the
source). Every point is measured in the same way: the second halves of 512-token windows of WikiText-2's validation
text after the first halves, and texts of four kinds after prompts of 32 tokens; KL from the source's distributions, in
nats a token. A file's prompt runs with its own weights, whole. A row is appended when it is measured, so the command
can be stopped and started again.

`--speed` adds tokens/s to the rows that have none: each file's whole model and its methods in turn, and where
`--llama-bench` is given, llama.cpp on the file between them. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
from pathlib import Path
from typing import Any

import torch
from llama_gguf import bytes_per_token
from llama_programs import LlamaBench, watched
from texts import kinds
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import griffin
from griffin.analysis import files, plots
from griffin.analysis.agreement import run_continuation, run_prompt
from griffin.analysis.bootstrap import mean_interval
from griffin.analysis.perplexity import encode_text, windows
from griffin.attachment import GATHER_ONLY, attach
from griffin.config import GriffinConfig
from griffin.layouts import find_ff_blocks

TYPES = "Q8_0,Q6_K,Q5_K_M,Q4_K_M,Q3_K_M,Q2_K"
_WINDOW, _SHORT = (256, 256), (32, 224)  # tokens of prompt and continuation
_ROUNDS = 3
_PROMPT = "The most important thing about a bridge is that"
KEYS = ("type", "method", "density")


def texts(tokenizer: PreTrainedTokenizerBase, data: Path, count: int, tokens: int) -> dict[str, Tensor]:
    """Sequences by protocol: "half" and "short". Shapes: each (count, prompt + at most `tokens`), int64."""
    wiki = (data / "wikitext2" / "wiki.valid.raw").read_text(encoding="utf-8")[:400_000]
    ids, bos = encode_text(tokenizer, wiki)
    half = windows(ids, bos, [_WINDOW[0]], _WINDOW[1], count)[0]
    rows = []
    for kind in kinds(data).values():
        ids, bos = encode_text(tokenizer, kind[100_000:140_000])
        rows.append(windows(ids, bos, [_SHORT[0]], _SHORT[1], max(1, count // 4))[0])
    return {"half": half[:, : _WINDOW[0] + tokens], "short": torch.cat(rows)[:, : _SHORT[0] + tokens]}


@torch.no_grad()
def distributions(model: PreTrainedModel, ids: Tensor, prompt: int, config: GriffinConfig) -> list[Tensor]:
    """Log probabilities of every continuation's tokens. Shapes: ids (N, P + G); each (G, V), float32."""
    found = []
    for row in ids:
        with attach(model, GATHER_ONLY) as gathering, gathering.gather(needs=config.needs) as statistics_:
            cache, first = run_prompt(model, row[None, :prompt])
        with attach(model, config) as handle:
            handle.select(statistics_)
            with handle.generation_phase():
                logits = run_continuation(model, row[None, prompt:], copy.deepcopy(cache), first)[0]
        found.append(logits.float().log_softmax(dim=-1))
    return found


def made(source: Path, kind: str, program: Path | None, work: Path) -> Path:
    """The file of a type, made once; the source itself for its own type."""
    if kind == "source":
        return source
    file = work / f"{source.stem}-{kind}.gguf"
    if not file.exists():
        if program is None:
            raise ValueError(f"{file} is not there; give --quantize, the path of llama.cpp's llama-quantize")
        partial = file.with_suffix(".partial")
        watched([program, "--allow-requantize", source, partial, kind])
        partial.replace(file)
    return file


def measure(args: argparse.Namespace) -> None:
    args.work.mkdir(parents=True, exist_ok=True)
    there = {tuple(row[key] for key in KEYS) for row in rows_of(args.output)}
    source, tokenizer = griffin.load(args.source)
    protocols = texts(tokenizer, args.data, args.sequences, args.tokens)
    full = GriffinConfig(density=1.0, selection="topk")
    reference = {
        name: distributions(source, ids, prompt, full)
        for (name, ids), prompt in zip(protocols.items(), (_WINDOW[0], _SHORT[0]), strict=True)
    }
    del source
    points = [("dense", "1")] + [(m, d) for m in args.methods.split(",") if m for d in args.densities.split(",")]
    for kind in ("source", *filter(None, args.types.split(","))):
        wanted = [point for point in points if (kind, *point) not in there]
        if not wanted:
            continue
        file = made(args.source, kind, args.quantize, args.work)
        model, _ = griffin.load(file)
        blocks = find_ff_blocks(model)
        ff = sum(block.nbytes for block in blocks)
        for method, density in wanted:
            config = full if method == "dense" else GriffinConfig(density=float(density), selection=method)
            try:
                with attach(model, config) as handle:
                    read = handle.ff_bytes_per_token
            except ValueError as error:  # a density that the method cannot have, or weights that it does not read
                print(f"{kind} {method} {density}: left out, {error}", flush=True)
                continue
            row: dict[str, Any] = {"type": kind, "method": method, "density": density}
            row |= {"ff_bytes": read, "bytes": bytes_per_token(file) - ff + read}
            for (name, ids), prompt in zip(protocols.items(), (_WINDOW[0], _SHORT[0]), strict=True):
                row |= compared(name, reference[name], distributions(model, ids, prompt, config))
            row |= {"sequences": args.sequences, "tokens": args.tokens, "tokens_per_s": "", "llama_tokens_per_s": ""}
            append(args.output, row)
            print(f"{kind} {method} {density}: {row['bytes'] / 1e6:.1f} MB, KL {row['kl_half']:.4f}, "
                  f"after short prompts {row['kl_short']:.4f}", flush=True)  # fmt: skip


def compared(name: str, reference: list[Tensor], found: list[Tensor]) -> dict[str, float]:
    """KL and agreement of a protocol's sequences, with the interval of KL."""
    pairs = list(zip(reference, found, strict=True))
    kl = [float(F.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean()) for p, q in pairs]
    same = [float((p.argmax(-1) == q.argmax(-1)).double().mean()) for p, q in pairs]
    interval = mean_interval(kl)
    return {
        f"kl_{name}": interval.value,
        f"kl_{name}_low": interval.low,
        f"kl_{name}_high": interval.high,
        f"agreement_{name}": sum(same) / len(same),
    }


def speed(args: argparse.Namespace) -> None:
    """Fill in tokens/s: the points of a file in turn, `_ROUNDS` times; the medians are written."""
    rows = rows_of(args.output)
    for kind in dict.fromkeys(row["type"] for row in rows):
        points = [row for row in rows if row["type"] == kind and not row["tokens_per_s"]]
        if not points:
            continue
        file = made(args.source, kind, args.quantize, args.work)
        model, tokenizer = griffin.load(file)
        bench = None if args.llama_bench is None else LlamaBench(args.llama_bench, torch.get_num_threads())
        own: list[list[float]] = [[] for _ in points]
        for _ in range(_ROUNDS):
            for times, row in zip(own, points, strict=True):
                times.append(tokens_per_s(model, tokenizer, row))
            if bench is not None:
                bench.measure_generation(file, 64, 16)
        for times, row in zip(own, points, strict=True):
            row["tokens_per_s"] = f"{statistics.median(times):.2f}"
            if bench is not None and row["method"] == "dense":
                row["llama_tokens_per_s"] = f"{statistics.median(bench.generation):.2f}"
        files.write_text(args.output, files.csv_text(rows))


def tokens_per_s(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, row: dict[str, str]) -> float:
    selection = "topk" if row["method"] == "dense" else row["method"]
    config = GriffinConfig(density=float(row["density"]), selection=selection)
    result = griffin.generate(model, tokenizer, _PROMPT, griffin=config, max_tokens=64)
    return result.generation_tokens_per_s


def plot(args: argparse.Namespace) -> None:
    """A line for the dense files, and one for each file with each method."""
    rows = rows_of(args.output)
    lines: dict[str, list[tuple[float, float, str]]] = {}
    for row in rows:
        across, kl = row["tokens_per_s"] if args.speed else row["bytes"], float(row[f"kl_{args.protocol}"])
        if not across or (row["type"], row["method"]) == ("source", "dense"):  # not measured; no loss of its own
            continue
        name = "files alone" if row["method"] == "dense" else f"{row['method']} on {row['type']}"
        mark = row["type"] if row["method"] == "dense" else ""
        lines.setdefault(name, []).append((float(across) / (1 if args.speed else 1e6), kl, mark))
        if args.speed and row["llama_tokens_per_s"]:
            lines.setdefault("files alone, llama.cpp", []).append((float(row["llama_tokens_per_s"]), kl, mark))
    label = "tokens/s" if args.speed else "MB of weights read a token"
    plots.frontier(lines, label, "KL to the source, nats a token", args.plot)


def append(path: Path, row: dict[str, Any]) -> None:
    new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def rows_of(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="?", type=Path)
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--methods", default="topk,dynamic+topk,planes+topk")
    parser.add_argument("--densities", default="0.4,0.5,0.6,0.75,0.85")
    parser.add_argument("--sequences", type=int, default=4, help="of each of the two protocols")
    parser.add_argument("--tokens", type=int, default=128, help="scored tokens of a sequence, at most 224")
    parser.add_argument("--quantize", type=Path)
    parser.add_argument("--llama-bench", type=Path)
    parser.add_argument("--work", type=Path, default=Path("/tmp/griffin-frontier"))
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    parser.add_argument("--protocol", choices=("half", "short"), default="half", help="of the plot")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    if args.plot is not None:
        plot(args)
    elif args.source is None or args.data is None:
        parser.error("SOURCE and DATA are needed, but for --plot")
    else:
        (speed if args.speed else measure)(args)


if __name__ == "__main__":
    main()
