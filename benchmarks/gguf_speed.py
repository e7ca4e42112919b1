"""Speed, load time and memory of griffin and llama.cpp on one GGUF file; see `compare_llamacpp.py`."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import llama_programs
from llama_gguf import bytes_per_token, format_of
from llama_programs import LlamaBench, Start
from rich.table import Table
from row_table import made

import griffin
from griffin.analysis import benchmark, workload
from griffin.analysis.benchmark import SpeedRow as OwnRow
from griffin.analysis.machine import Bandwidth
from griffin.config import GriffinConfig

SHORT_PROMPT = 16  # tokens, before the generation phase is timed
START_PROMPT = "The most important thing about a bridge is that"
_START = Path(__file__).with_name("gguf_start.py")


@dataclass(frozen=True)
class SpeedRow:
    """One engine on one file at one density; times and speeds are medians over the rounds.

    Args:
        load_s: seconds of `griffin.load`, or llama.cpp's own load time; the file is in the page cache.
        first_token_s: seconds from the start of a process to its first token, with an answer to a short prompt.
        prompt_tokens_per_s: of a prompt of `prompt_tokens`.
        generation_tokens_per_s: of `generated_tokens` after a prompt of `SHORT_PROMPT`.
        peak_rss_mb: most memory of the process that was started, mapped files included.
        bytes_per_token: bytes of weights read to generate a token.
        read_bandwidth: of the machine, in bytes/s, before and after each round.
    """

    file: str
    engine: str
    format: str
    density: float
    load_s: float
    first_token_s: float
    prompt_tokens: int
    prompt_tokens_per_s: float
    prompt_ratio: float
    generated_tokens: int
    generation_tokens_per_s: float
    generation_ratio: float
    peak_rss_mb: float | None
    file_mb: float
    bytes_per_token: int
    share_of_read_bandwidth: float | None
    read_bandwidth: float | None


def speed(
    file: Path, densities: Sequence[float], prompt: int, generate: int, repeats: int, bench: LlamaBench
) -> tuple[list[SpeedRow], list[float]]:
    """The rows of a file, llama.cpp's first, and the read bandwidths measured around the rounds.

    The prompt phase is that of density 1.0 at every density, so it is timed once a round. In the rounds of the
    generation phase each density is timed in this process, then llama.cpp, and every engine also starts once in a
    process of its own. The lowest density is verified against the reference first: its kernels are those of all.
    """
    configs = benchmark.cases(densities, ["topk"], 1, "auto")
    passage = (Path(griffin.__file__).parent / "analysis" / "passage.txt").read_text(encoding="utf-8")
    model, tokenizer = griffin.load(file, device="cpu")
    for prompt_tokens, generated in ((prompt, 2), (SHORT_PROMPT, generate)):
        benchmark.check_length(model, prompt_tokens, generated)
    ids = tokenizer(passage, verbose=False)["input_ids"]
    prompts = workload.passage_prompts(ids, tokenizer.bos_token_id, 1, max(prompt, SHORT_PROMPT))
    benchmark.verified(model, prompts, [min(configs, key=lambda config: config.density)])
    starts: list[list[Start]] = [[] for _ in range(1 + len(configs))]
    timed = 0

    def prompt_timed() -> None:
        bench.measure_prompt(file, prompt)
        print(f"prompt phase timed; llama.cpp's: {bench.prompt[-1]:.1f} tokens/s", file=sys.stderr)

    def generation_timed() -> None:
        nonlocal timed
        timed += 1
        if timed % len(configs):
            return
        bench.measure_generation(file, generate, SHORT_PROMPT)
        print(f"generation timed; llama.cpp's: {bench.generation[-1]:.2f} tokens/s", file=sys.stderr)
        starts[0].append(llama_programs.start(bench, file, START_PROMPT, generate))
        for of_density, config in zip(starts[1:], configs, strict=True):
            of_density.append(_start(file, config.density, bench.threads, generate))
        print("every engine started", file=sys.stderr)

    def figures(length: int, tokens: int, what: list[GriffinConfig], done: Callable[[], None]) -> list[OwnRow]:
        inputs = prompts[:, :length]
        runs, read = benchmark.measure(model, inputs, what, tokens, repeats, done)
        bandwidths.extend(read)
        return benchmark.rows(str(file), workload.format_of(model), model, inputs, tokens, what, runs, read)

    bandwidths: list[Bandwidth] = []
    (of_prompt,) = figures(prompt, 2, configs[:1], prompt_timed)
    rounds_of_prompt = len(bandwidths)
    of_generation = figures(SHORT_PROMPT, generate, configs, generation_timed)
    speeds = [own.bytes_per_s for own in bandwidths]
    around = [statistics.fmean(pair) for pair in pairwise(speeds[rounds_of_prompt:])]
    read = bytes_per_token(file)
    shares = [read * own / speed for own, speed in zip(bench.generation, around, strict=False)]
    theirs = statistics.median(bench.prompt), statistics.median(bench.generation)
    share = statistics.median(shares) if shares else None

    def row(
        engine: str, density: float, own: tuple[float, float], own_starts: list[Start], read: int, share: float | None
    ) -> SpeedRow:
        peaks = [start.peak_rss_bytes for start in own_starts if start.peak_rss_bytes is not None]
        return SpeedRow(
            file=file.name,
            engine=engine,
            format=format_of(file),
            density=density,
            load_s=statistics.median(start.load_s for start in own_starts),
            first_token_s=statistics.median(start.first_token_s for start in own_starts),
            prompt_tokens=prompt,
            prompt_tokens_per_s=own[0],
            prompt_ratio=own[0] / theirs[0],
            generated_tokens=generate,
            generation_tokens_per_s=own[1],
            generation_ratio=own[1] / theirs[1],
            peak_rss_mb=max(peaks) / 1e6 if peaks else None,
            file_mb=file.stat().st_size / 1e6,
            bytes_per_token=read,
            share_of_read_bandwidth=share,
            read_bandwidth=statistics.median(speeds) if speeds else None,
        )

    def own_row(found: OwnRow, own_starts: list[Start]) -> SpeedRow:
        own = of_prompt.prompt_tokens_per_s, found.generation_tokens_per_s
        own_read = round(found.bytes_per_s / found.generation_tokens_per_s)
        engine = f"griffin, {found.backend}"
        return row(engine, found.density, own, own_starts, own_read, found.share_of_read_bandwidth)

    rows = [row("llama.cpp", 1.0, theirs, starts[0], read, share)]
    rows += [own_row(*each) for each in zip(of_generation, starts[1:], strict=True)]
    return rows, speeds


def table(rows: Sequence[SpeedRow]) -> Table:
    """The rows, for a person."""
    first = rows[0]
    columns = ("density", "load\ns", "first\ntoken s", "prompt\ntok/s", "ratio", "generation\ntok/s", "ratio")
    return made(
        f"{first.prompt_tokens}-token prompts, {first.generated_tokens} tokens generated, medians",
        ("file", "engine"),
        (*columns, "MB a\ntoken", "share of\nbandwidth", "peak\nMB"),
        [
            (
                row.file,
                row.engine,
                f"{row.density:g}",
                f"{row.load_s:.2f}",
                f"{row.first_token_s:.2f}",
                f"{row.prompt_tokens_per_s:.1f}",
                f"{row.prompt_ratio:.2f}x",
                f"{row.generation_tokens_per_s:.2f}",
                f"{row.generation_ratio:.2f}x",
                f"{row.bytes_per_token / 1e6:.0f}",
                "?" if row.share_of_read_bandwidth is None else f"{row.share_of_read_bandwidth:.0%}",
                "?" if row.peak_rss_mb is None else f"{row.peak_rss_mb:.0f}",
            )
            for row in rows
        ],
    )


def _start(file: Path, density: float, threads: int, tokens: int) -> Start:
    done = llama_programs.watched([sys.executable, _START, file, density, threads, tokens, START_PROMPT])
    return Start(float(done.stdout.split()[0]), done.first_output_s, done.peak_rss_bytes)
