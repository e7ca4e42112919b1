"""Whole generation steps on a device, for benchmarks/gpu.py: kinds of step, full model against experts, latency."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from gpu_report import Clock, Report
from torch import Tensor
from transformers import PreTrainedModel

import griffin
from griffin.analysis.machine import available_bytes
from griffin.analysis.shapes import Shape, build, cache_bytes, weight_bytes
from griffin.attachment import Griffin
from griffin.engine.compiled import CompiledStep
from griffin.engine.decoders import EagerStep, new_cache
from griffin.engine.forward import Forward
from griffin.engine.step import generate_step
from griffin.layouts import find_ff_blocks

KINDS = ("eager", "compiled", "captured", "compiled and captured")
_STEPS = 24


def model_of(shape: Shape, wanted: int | None, tokens: int, device: torch.device) -> tuple[PreTrainedModel, str]:
    """A random bf16 model, with fewer layers where they do not fit; and what was cut."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16  # the interpreter, and speed on a CPU
    whole = shape.config().get_text_config().num_hidden_layers
    free = available_bytes(device)
    one = weight_bytes(shape, dtype, 2) - weight_bytes(shape, dtype, 1)
    rest = weight_bytes(shape, dtype, 1) - one + 2 * cache_bytes(shape, dtype, tokens)
    fits = whole if free is None else max(1, int((0.85 * free - rest) // one))
    layers = min(whole, fits, wanted or whole)
    model = build(shape, dtype, layers, device)
    return model, "" if layers == whole else f"{layers} of {whole} layers"


def time_steps(
    report: Report, clock: Clock, name: str, model: PreTrainedModel, backend: str, note: str, kinds: Sequence[str],
    batches: Sequence[int], tokens: int,
) -> None:  # fmt: skip
    """Milliseconds of a step, by kind of step, density and batch; each kind checked against the eager one."""
    blocks = find_ff_blocks(model)
    ff = sum(block.nbytes for block in blocks)
    read = sum(p.nbytes for p in model.parameters()) - _looked_up(model)
    for batch in batches:
        full: dict[str, float] = {}
        for density in (None, 0.5):
            attached = nullcontext() if density is None else _attach(model, density, backend)
            with attached as handle, torch.no_grad():
                expected: Tensor | None = None
                for kind in kinds if batch == 1 else [kind for kind in kinds if kind in ("eager", "captured")]:
                    if clock.left() < 60:
                        report.add("step", kind, "not run", shape=name, batch=batch, note="no time left")
                        continue
                    prompt = _prompt(model, batch, tokens)
                    first, run = _decoder(model, handle, prompt, kind)
                    logits = [run(token).clone() for token in _two(first)]
                    compare = logits[-1]
                    if expected is None:
                        expected = compare
                    error = float((compare - expected).norm() / expected.norm())
                    if not error < 0.05:  # bf16 in other kernels
                        raise SystemExit(f"wrong: {name}, {kind} step: logits differ by {error:.2g} from the eager one")
                    count = 1 if clock.tiny else _STEPS
                    seconds = clock.wall(lambda run=run, token=first, count=count: _steps(run, token, count)) / count
                    place: dict[str, Any] = {"shape": name, "batch": batch, "density": density or 1.0, "note": note}
                    report.add("step", kind, seconds * 1e3, "ms", **place)
                    if density is None:
                        full[kind] = seconds
                        report.add("step", kind, read / seconds / 1e9, "GB/s of weights", **place)
                    else:
                        assert handle is not None
                        ceiling = read / (read - ff + handle.ff_bytes_per_token)
                        if kind in full:
                            report.add("step", f"{kind}: full to experts", full[kind] / seconds, "x", **place)
                            report.add("step", f"{kind}: of the ceiling", full[kind] / seconds / ceiling, "", **place)
                if handle is not None and "eager" in kinds:
                    _time_selection(report, clock, name, model, handle, batch, note)


def paper_latency(
    report: Report, clock: Clock, name: str, model: PreTrainedModel, backend: str, note: str, prompt: int, count: int
) -> None:
    """The paper's table (section 5.3): a prompt, its selection, and the generation, in seconds; batch 1."""
    ids = _prompt(model, 1, prompt)
    for density in (None, 0.5) if clock.tiny else (None, 0.75, 0.5):  # None: the full model, without GRIFFIN
        with nullcontext() if density is None else _attach(model, density, backend) as handle:
            for turn in range(2):  # the first one compiles and captures
                if clock.left() < 40:
                    report.add("latency", f"{prompt} + {count}", "not run", shape=name, note="no time left")
                    return
                steps = generate_step(model, ids, handle=handle, step=_step_name(model))
                first = clock.wall(lambda steps=steps: next(steps))
                rest = clock.wall(lambda steps=steps: list(itertools.islice(steps, count - 1)))
                steps.close()
                if turn:
                    place: dict[str, Any] = {"shape": name, "batch": 1, "density": density or 1.0, "note": note}
                    report.add("latency", f"prompt of {prompt}, selection", first, "s", **place)
                    report.add("latency", f"generation of {count}", rest, "s", **place)
                    report.add("latency", "both", first + rest, "s", **place)


def memory(report: Report, name: str, model: PreTrainedModel, note: str) -> None:
    """Bytes of the weights, and the most that was allocated."""
    weights = sum(parameter.nbytes for parameter in model.parameters())
    report.add("memory", "weights", weights / 1e9, "GB", shape=name, note=note)
    if model.device.type == "cuda":
        report.add("memory", "most allocated", torch.cuda.max_memory_allocated() / 1e9, "GB", shape=name, note=note)


def _attach(model: PreTrainedModel, density: float, backend: str) -> Griffin:
    return griffin.attach(model, density=density, selection="topk", backend=backend)


def _step_name(model: PreTrainedModel) -> str:
    return "compiled" if model.device.type == "cuda" else "captured"  # the compiler takes too long for a test


def _decoder(model: PreTrainedModel, handle: Griffin | None, prompt: Tensor, kind: str) -> tuple[Tensor, Any]:
    """The first token after the prompt, and what runs the next ones."""
    cache = new_cache(model, step="captured")
    with nullcontext() if handle is None else handle.prompt_phase():
        first = Forward(model, cache, None)(prompt).argmax(-1)
    selections = () if handle is None else handle.selections
    if kind == "eager":
        return first, EagerStep(model, handle, [cache], selections, None)
    settings: dict[str, Any] = {"compiled": kind.startswith("compiled"), "captured": kind.endswith("captured")}
    if model.device.type == "cpu":
        settings["backend"] = "eager"  # traced, and not compiled
    return first, CompiledStep(model, handle, cache, selections, None, **settings)  # type: ignore[arg-type]


def _two(first: Tensor) -> Iterator[Tensor]:
    yield first
    yield first


def _steps(run: Any, token: Tensor, count: int) -> None:
    for _ in range(count):
        token = run(token).argmax(-1)


def _time_selection(
    report: Report, clock: Clock, name: str, model: PreTrainedModel, handle: Griffin, batch: int, note: str
) -> None:
    gathered = handle.gathered
    seconds = clock.wall(lambda: handle.use(handle.plan.select(gathered)))
    report.add("step", "selection", seconds * 1e3, "ms", shape=name, batch=batch, density=0.5, note=note)


def _prompt(model: PreTrainedModel, batch: int, tokens: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randint(2, model.config.get_text_config().vocab_size, (batch, tokens)).to(model.device)


def _looked_up(model: Any) -> int:
    """Bytes of the embeddings, of which a step reads a row, unless they are the head too."""
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return 0 if table is head else int(table.nbytes)
