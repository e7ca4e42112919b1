"""The full model and GRIFFIN side by side on a real passage, everything measured in this run."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

from griffin.cli.arguments import add_model_arguments, load_model
from griffin.config import AUTO, GriffinConfig
from griffin.text_files import read_text

if TYPE_CHECKING:
    import torch
    from rich.table import Table
    from transformers import PreTrainedModel

    from griffin.analysis.benchmark import Run
    from griffin.generation.generate import Result

_FULL = "full model"
CASES = {
    _FULL: GriffinConfig(density=1.0),
    "GRIFFIN, half of the neurons": GriffinConfig(density=0.5),
    "dynamic selection, half of the bytes": GriffinConfig(density=0.5, selection=AUTO),
    "dynamic selection, three quarters": GriffinConfig(density=0.75, selection=AUTO),
}
_STATISTIC_TOKENS = 1024
_REPEATS = 3
_ROUNDS, _ROUND_TOKENS = 3, 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_model_arguments(parser)
    parser.add_argument(
        "-f", "--file", type=Path, metavar="FILE", help="the passage to continue, instead of the one shipped"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=80, metavar="N", help="tokens to generate for each text (default: 80)"
    )
    parser.add_argument(
        "--picture",
        type=Path,
        metavar="PNG",
        default=Path("griffin-flocking.png"),
        help="where to write the picture of the flocking (default: griffin-flocking.png)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        ValueError: the passage is missing, empty or too long.
        GriffinError: the model cannot be fetched, or the picture cannot be written.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.panel import Panel

    from griffin.analysis.benchmark import measure
    from griffin.analysis.flocking import relative_activations
    from griffin.analysis.passage import PASSAGE
    from griffin.analysis.plots import flocking_heat_map
    from griffin.engine.step import Sampling
    from griffin.generation.generate import generate
    from griffin.generation.text import Prompt, encode, pad
    from griffin.layouts import find_ff_blocks

    passage = read_text(args.file or PASSAGE)
    sampling = Sampling(max_tokens=args.max_tokens)
    model, tokenizer = load_model(args)
    prompt: Prompt = passage  # a model without a chat template continues the passage
    if tokenizer.chat_template is not None:
        prompt = [{"role": "user", "content": f"Summarize this passage in a few sentences:\n\n{passage}"}]
    ids, _ = pad(encode(model, tokenizer, [prompt]), 0, model.device)
    console = Console()

    verb = "continues" if prompt is passage else "summarizes"
    console.print(f"\n[bold]{args.model}[/bold] {verb} a passage (prompt of {ids.shape[1]} tokens), which begins:")
    console.print(f"{escape(passage.strip()[:200])} …\n", style="dim")
    results: dict[str, Result] = {}
    for name, config in CASES.items():
        result = generate(model, tokenizer, prompt, griffin=config, sampling=sampling)
        assert not isinstance(result, list)
        results[name] = result
        console.print(Panel(escape(result.text.strip() or "(no text)"), title=name, title_align="left"))
    console.print(f"Measuring: {_ROUNDS} rounds of {_ROUND_TOKENS} tokens each …", style="dim")
    runs, _ = measure(model, ids, list(CASES.values()), _ROUND_TOKENS, _ROUNDS)  # as `griffin bench` measures
    console.print(_table(dict(zip(CASES, runs, strict=True)), _agreements(model, ids, results[_FULL].tokens)))

    full_s, attached_s, selection_s, tokens, backend = _prompt_cost(model, ids)
    console.print(
        f"Cost of the statistic in the prompt phase, {tokens} tokens: {attached_s / full_s - 1:+.1%} "
        f"({full_s * 1e3:.0f} ms full, {attached_s * 1e3:.0f} ms with it; medians of {_REPEATS}, interleaved). "
        f"Selecting the experts at density 0.5 ({backend} backend): {selection_s * 1e3:.0f} ms, once a prompt."
    )
    layer = len(find_ff_blocks(model)) // 2
    relative = relative_activations(model, ids, [layer])[layer]
    flocking_heat_map(relative, f"Flocking in layer {layer} of {args.model}", args.picture)
    message = f"Picture of the flocking (layer {layer}, neurons by tokens): {args.picture.resolve()}"
    console.print(message, soft_wrap=True)  # do not wrap the path, so that it can be copied
    return 0


def _agreements(model: PreTrainedModel, ids: torch.Tensor, continuation: tuple[int, ...]) -> dict[str, float]:
    """Share of the full model's continuation tokens that GRIFFIN predicts too, by case."""
    import torch

    from griffin.analysis.agreement import teacher_forced_logits, top1_agreement
    from griffin.attachment import attach

    if not continuation:
        return {}
    given = torch.tensor([continuation], device=ids.device)
    full = teacher_forced_logits(model, ids, given)
    agreements = {}
    for name, config in CASES.items():
        if name == _FULL:
            continue
        with attach(model, config) as handle:
            agreements[name] = top1_agreement(teacher_forced_logits(model, ids, given, handle), full)
    return agreements


def _prompt_cost(model: PreTrainedModel, ids: torch.Tensor) -> tuple[float, float, float, int, str]:
    """Median seconds of the prompt phase without and with the statistic, and of the selection; tokens; backend."""
    import torch

    from griffin.attachment import attach

    tokens = ids.repeat(1, -(-_STATISTIC_TOKENS // ids.shape[1]))[:, :_STATISTIC_TOKENS]
    full, attached, selections = [], [], []
    with torch.no_grad(), attach(model, density=0.5) as handle:
        for repeat in range(_REPEATS + 1):
            start = time.perf_counter()
            model(tokens, use_cache=True, logits_to_keep=1)
            middle = time.perf_counter()
            with handle.prompt_phase():
                model(tokens, use_cache=True, logits_to_keep=1)
            end = time.perf_counter()
            if repeat:  # the first round warms up
                full.append(middle - start)
                attached.append(end - middle - handle.selection_s)
                selections.append(handle.selection_s)
    medians = statistics.median(full), statistics.median(attached), statistics.median(selections)
    return *medians, tokens.shape[1], handle.backend.name


def _table(speeds: dict[str, list[Run]], agreements: dict[str, float]) -> Table:
    """A table of each case's medians over rounds; a speed-up is the median of the per-round ratios."""
    from rich.table import Table

    table = Table("", "prompt tok/s", "generation tok/s", "speed-up", "FF read per token", "agrees with full")
    for name, runs in speeds.items():
        ratios = [run.steps_per_s / full.steps_per_s for run, full in zip(runs, speeds[_FULL], strict=True)]
        table.add_row(
            name,
            f"{statistics.median(run.prompt_tokens_per_s for run in runs):.0f}",
            f"{statistics.median(run.steps_per_s for run in runs):.1f}",
            f"{statistics.median(ratios):.2f}x",
            f"{runs[0].ff_bytes / 1e6:.0f} MB",
            f"{agreements[name]:.0%}" if name in agreements else "-",
        )
    return table
