"""Speed of the generation phase at several densities, beside the ceiling and the machine's read bandwidth.

Densities are interleaved, so background load hits all of them. Figures are medians over rounds; a speed-up is the
median of the per-round ratios. Every backend is verified against the reference before anything is timed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice, pairwise

import torch
from torch import Tensor
from transformers import PreTrainedModel

from griffin.analysis import machine
from griffin.analysis.ceiling import bytes_read_per_token, ceiling
from griffin.analysis.machine import Bandwidth
from griffin.analysis.verification import verify
from griffin.attachment import Griffin, attach
from griffin.backends import resolve
from griffin.config import GriffinConfig
from griffin.engine.step import generate_step
from griffin.errors import GriffinError
from griffin.generation.text import context_length
from griffin.layouts import find_ff_blocks
from griffin.models.convert import convert
from griffin.native import library
from griffin.weights.neuron_major import make_neuron_major
from griffin.weights.quantised import FLOATS, QUANTISED, QuantisedLinear

# By weight format: the dtype in which a model is built before conversion. Weights that are not converted keep it.
WEIGHTS = {**FLOATS, **dict.fromkeys(QUANTISED, torch.bfloat16)}
_WARM_UP_TOKENS = 32
_WARM_UP_STEPS = 3


@dataclass(frozen=True)
class SpeedRow:
    """The measurements of one density, selection and length. Speeds, times and shares are medians over the rounds.

    Args:
        model: name of the model or shape.
        weights: format of the weights.
        density: share of the FF neurons kept.
        selection: the method that selected them.
        batch: number of sequences.
        backend: the backend that computed the experts.
        prompt_tokens, generated_tokens: tokens of each sequence; the first generated token comes from the prompt phase.
        prompt_tokens_per_s: prompt speed of all sequences together, with the statistic and without the selection.
        generation_tokens_per_s: generation speed of all sequences together, without the first token.
        selection_ms: time to select and prepare the experts.
        speedup: speed relative to density 1.0 on the same backend; the median of the per-round ratios.
        ceiling: upper bound of the speed-up, `1 / (1 - f (1 - density))`. A batch with experts for each sequence reads
            their union, so its memory bound is lower; its arithmetic still shrinks by exactly this factor.
        share_of_ceiling: the speed-up as a share of the ceiling.
        bytes_per_s: bytes of weights read in a step times steps per second. The key/value cache is not counted.
        share_of_read_bandwidth: `bytes_per_s` as a share of the read bandwidth measured before and after the same
            round; `None` if the bandwidth is unknown.
        peak_rss_bytes: peak memory in use, weights included; `None` where the system does not report it.
        native_calls_per_step: calls of the native library in a generation step; they show which path ran.
    """

    model: str
    weights: str
    density: float
    selection: str
    batch: int
    backend: str
    prompt_tokens: int
    generated_tokens: int
    prompt_tokens_per_s: float
    generation_tokens_per_s: float
    selection_ms: float
    speedup: float
    ceiling: float
    share_of_ceiling: float
    bytes_per_s: float
    share_of_read_bandwidth: float | None
    peak_rss_bytes: int | None
    native_calls_per_step: float


@dataclass(frozen=True)
class Run:
    """The measurements of one prompt and its generation."""

    backend: str
    prompt_tokens_per_s: float
    steps_per_s: float
    selection_s: float
    ff_bytes: float  # read in a step
    peak_rss_bytes: int | None
    native_calls_per_step: float


def prepare(model: PreTrainedModel, weights: str) -> PreTrainedModel:
    """Convert a model's weights to a format of `WEIGHTS`; returns the model.

    Raises:
        ValueError: there is no such format.
    """
    dtype_of(weights)
    convert(model, weights)
    return model


def dtype_of(weights: str) -> torch.dtype:
    """The dtype in which a model is built or loaded for a format of weights.

    Raises:
        ValueError: there is no such format.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights is {weights!r}; expected one of {', '.join(WEIGHTS)}")
    return WEIGHTS[weights]


def cases(densities: Sequence[float], selections: Sequence[str], batch: int, backend: str) -> list[GriffinConfig]:
    """The configs of a round in order: density 1.0 once, then every other density with every selection.

    Raises:
        ValueError: a density, a selection or the backend is not valid.
    """
    kind = "shared" if batch == 1 else "per_sequence"
    for density in densities:
        GriffinConfig(density=density)
    for selection in selections:
        GriffinConfig(selection=selection)
    wanted = [(1.0, "topk" if "topk" in selections else selections[0])]
    wanted += [(density, selection) for selection in selections for density in densities if density != 1.0]
    return [
        GriffinConfig(density=density, selection=selection, batch=kind, backend=backend)
        for density, selection in dict.fromkeys(wanted)
    ]


def check_length(model: PreTrainedModel, prompt_tokens: int, generated_tokens: int) -> None:
    """Raise `ValueError` if prompt and answer together exceed the model's context."""
    limit = context_length(model)
    if limit is not None and prompt_tokens + generated_tokens > limit:
        raise ValueError(
            f"a prompt of {prompt_tokens} tokens and {generated_tokens} generated ones do not fit the model's context "
            f"of {limit}; ask for fewer"
        )


def measure(
    model: PreTrainedModel,
    prompts: Tensor,
    configs: Sequence[GriffinConfig],
    generated_tokens: int,
    repeats: int,
    done: Callable[[], None] = lambda: None,
) -> tuple[list[list[Run]], list[Bandwidth]]:
    """Time every config in every round, after a short warm-up, and the read bandwidth before and after every round.

    Returns:
        The runs by config, and the bandwidths, one more than there are rounds. Without memory for the buffer the
        bandwidths are empty.

    Args:
        model: the model, in eval mode.
        prompts: one prompt for each sequence.
        configs: what `cases` returned.
        generated_tokens: tokens to generate; at least 2, as the first one is not timed.
        repeats: number of rounds.
        done: called after every run.

    Shapes:
        prompts: (B, S).

    Raises:
        GriffinError: the chosen backend did not run.
    """
    runs: list[list[Run]] = [[] for _ in configs]
    bandwidths: list[Bandwidth | None] = []
    with laid_out_once(model, configs[0].backend):
        for config in configs:
            _timed(model, prompts[:, :_WARM_UP_TOKENS], config, _WARM_UP_STEPS)
        bandwidths.append(machine.read_bandwidth())
        for _ in range(repeats):
            for config_runs, config in zip(runs, configs, strict=True):
                config_runs.append(_timed(model, prompts, config, generated_tokens))
                done()
            bandwidths.append(machine.read_bandwidth())
    measured = [bandwidth for bandwidth in bandwidths if bandwidth is not None]
    return runs, measured if len(measured) == len(bandwidths) else []


def verified(
    model: PreTrainedModel, prompts: Tensor, configs: Sequence[GriffinConfig], done: Callable[[], None] = lambda: None
) -> None:
    """Verify every config against the reference backend: see `griffin.analysis.verification`.

    Raises:
        GriffinError: a backend is wrong.
    """
    with laid_out_once(model, configs[0].backend):
        for config in configs:
            verify(model, config, prompts)
            done()


def rows(
    name: str,
    weights: str,
    model: PreTrainedModel,
    prompts: Tensor,
    generated_tokens: int,
    configs: Sequence[GriffinConfig],
    runs: Sequence[Sequence[Run]],
    bandwidths: Sequence[Bandwidth],
) -> list[SpeedRow]:
    """The figures of every config, from what `measure` returned. The first config is the baseline, density 1.0."""
    read = bytes_read_per_token(model)
    ff = sum(block.nbytes for block in find_ff_blocks(model))
    batch, prompt_tokens = prompts.shape
    figures = []
    for config, config_runs in zip(configs, runs, strict=True):
        speedup = statistics.median(
            run.steps_per_s / full.steps_per_s for run, full in zip(config_runs, runs[0], strict=True)
        )
        steps_per_s = statistics.median(run.steps_per_s for run in config_runs)
        ff_read = statistics.median(run.ff_bytes for run in config_runs)
        most = ceiling(ff / read, config.density)
        step_bytes = read - ff + ff_read
        # On a shared host the memory bandwidth changes with time, so each round uses the values measured around it.
        shares = [
            step_bytes * run.steps_per_s / statistics.fmean((before.bytes_per_s, after.bytes_per_s))
            for run, (before, after) in zip(config_runs, pairwise(bandwidths), strict=False)
        ]
        peaks = [run.peak_rss_bytes for run in config_runs if run.peak_rss_bytes is not None]
        figures.append(
            SpeedRow(
                model=name,
                weights=weights,
                density=config.density,
                selection=config.selection,
                batch=batch,
                backend=config_runs[0].backend,
                prompt_tokens=prompt_tokens,
                generated_tokens=generated_tokens,
                prompt_tokens_per_s=statistics.median(run.prompt_tokens_per_s for run in config_runs),
                generation_tokens_per_s=batch * steps_per_s,
                selection_ms=1e3 * statistics.median(run.selection_s for run in config_runs),
                speedup=speedup,
                ceiling=most,
                share_of_ceiling=speedup / most,
                bytes_per_s=step_bytes * steps_per_s,
                share_of_read_bandwidth=statistics.median(shares) if shares else None,
                peak_rss_bytes=max(peaks, default=None),
                native_calls_per_step=config_runs[0].native_calls_per_step,
            )
        )
    return figures


def _timed(model: PreTrainedModel, prompts: Tensor, config: GriffinConfig, generated_tokens: int) -> Run:
    with attach(model, config) as handle:
        steps = generate_step(model, prompts, handle=handle)
        machine.reset_peak_rss()
        prompt_step = next(steps)
        sparse, (native, counted) = handle.sparse_calls, _native_counts()
        seconds = [step.seconds for step in islice(steps, generated_tokens - 1)]
        native, counted = (now - before for now, before in zip(_native_counts(), (native, counted), strict=True))
        if config.density < 1.0 and handle.sparse_calls == sparse and native == 0:
            raise GriffinError(f"backend {handle.backend.name} was to compute the experts, but it did not run")
        return Run(
            backend=handle.backend.name,
            prompt_tokens_per_s=prompts.numel() / prompt_step.seconds,
            steps_per_s=len(seconds) / sum(seconds),
            selection_s=prompt_step.selection_s,
            ff_bytes=counted / len(seconds) if counted else ff_bytes_per_step(handle),
            peak_rss_bytes=machine.peak_rss_bytes(),
            native_calls_per_step=native / len(seconds),
        )


def ff_bytes_per_step(handle: Griffin) -> int:
    """Bytes of FF weights that one generation step of the batch reads, for steps that the native library did not count.

    Every sequence's experts are read separately.
    """
    whole = sum(block.nbytes for block in find_ff_blocks(handle.model) if block.layer not in handle.pruned)
    sets = max((len(experts) for experts in handle.experts.values() if isinstance(experts, list)), default=1)
    return whole + sets * (handle.ff_bytes_per_token - whole)


def _native_counts() -> tuple[int, int]:
    """Number of calls of the native library, and bytes of FF weights it has read."""
    return (library.calls(), library.ff_bytes()) if library.why_not() is None else (0, 0)


@contextmanager
def laid_out_once(model: PreTrainedModel, *backends: str) -> Iterator[None]:
    """Keep the weights in the native backend's layout inside the block, so that no run has to convert them again."""
    blocks = find_ff_blocks(model)
    with ExitStack() as undo:
        if any(resolve(backend, blocks).name == "native" for backend in backends):
            for block in blocks:
                if not isinstance(block.output, QuantisedLinear):  # which is neuron-major already
                    make_neuron_major(block.output, block.path, undo)
        yield
