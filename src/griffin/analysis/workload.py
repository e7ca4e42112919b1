"""Carry out a benchmark plan: load or build the models, make the prompts, verify, measure."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from griffin.analysis import benchmark, machine, shapes
from griffin.analysis.benchmark import SpeedRow
from griffin.analysis.machine import Bandwidth
from griffin.analysis.shapes import Shape
from griffin.config import GriffinConfig
from griffin.errors import GriffinError
from griffin.gguf.reader import GgufFile
from griffin.layouts import decoder_layers
from griffin.models.builtin import BUILTIN, builtin_file
from griffin.models.load import load
from griffin.native.packing import GGUF_TYPES
from griffin.weights.quantised import FLOATS

PACKED_BYTES = {"int8": 1.0625, "int4": 0.578125}  # bytes per weight, including its share of the scale
_VERIFIED_LAYERS = 2  # layers of a shape that are verified, at full width, in seconds
_SHIFT = 29  # tokens by which the prompts of a batch begin later in the passage


@dataclass(frozen=True)
class Plan:
    """A plan of what to measure.

    Args:
        model: a model to load; unused if there are shapes.
        shapes: names of shapes.
        weights: format of the weights; `None`: the model's stored format, bf16 for a shape.
        batch: number of prompts run at once.
        configs: what `benchmark.cases` returned.
        lengths: pairs of prompt tokens and generated tokens, measured one after another.
        repeats: rounds over the configs.
        passage: the text that a loaded model's prompts are taken from, repeated as often as needed. A shape gets random
            tokens, as its weights are random too.
    """

    model: str
    shapes: tuple[str, ...]
    weights: str | None
    batch: int
    configs: list[GriffinConfig]
    lengths: tuple[tuple[int, int], ...]
    repeats: int
    passage: str

    @property
    def names(self) -> tuple[str, ...]:
        """The models and shapes to measure."""
        return self.shapes or (self.model,)

    @property
    def runs(self) -> int:
        """Number of calls of `done`: one for each verified config and each timed run."""
        return len(self.names) * len(self.configs) * (1 + len(self.lengths) * self.repeats)


def check_fits(plan: Plan) -> None:
    """Raise `GriffinError` if a shape of the plan does not fit the free memory."""
    free = machine.available_bytes()
    weights = plan.weights or "bf16"
    dtype = benchmark.dtype_of(weights)
    tokens = plan.batch * max(map(sum, plan.lengths))
    if free is None:
        return
    for name in plan.shapes:
        shape = shapes.shape_of(name)
        if weights in PACKED_BYTES:
            size = shapes.packed_bytes(shape, PACKED_BYTES[weights])
        else:
            size = shapes.weight_bytes(shape, dtype)
        cache = shapes.cache_bytes(shape, dtype, tokens)
        if size + cache > free:
            raise GriffinError(
                f"{name} in {weights} needs {(size + cache) / 1e9:.1f} GB of memory ({size / 1e9:.1f} GB of weights, "
                f"{cache / 1e9:.1f} GB of key/value cache), {free / 1e9:.1f} GB are free; choose a smaller shape, "
                "weights of fewer bits or a shorter length"
            )


def carry_out(plan: Plan, done: Callable[[str], None] = lambda what: None) -> tuple[list[SpeedRow], list[Bandwidth]]:
    """Verify and measure; returns the rows, and the read bandwidths measured around each round.

    Args:
        plan: the plan.
        done: called after every run, with a short description.

    Raises:
        ValueError: there is no such model, or its context is too short for the lengths.
        GriffinError: a backend is wrong, or a model cannot be loaded.
    """
    rows: list[SpeedRow] = []
    bandwidths: list[Bandwidth] = []
    longest = max(prompt for prompt, _ in plan.lengths)
    for name in plan.names:
        if plan.shapes:
            model, prompts = _verified_shape(plan, name, longest, done)
        else:
            model, prompts = _verified_model(plan, longest, done)
        weights = plan.weights or format_of(model)
        timed = partial(done, f"{name} timed")
        for length, generated in plan.lengths:
            inputs = prompts[:, :length]
            runs, read = benchmark.measure(model, inputs, plan.configs, generated, plan.repeats, timed)
            rows += benchmark.rows(name, weights, model, inputs, generated, plan.configs, runs, read)
            bandwidths += read
        del model
        gc.collect()
    return rows, bandwidths


def _verified_shape(plan: Plan, name: str, longest: int, done: Callable[[str], None]) -> tuple[PreTrainedModel, Tensor]:
    """Verify a shape with few layers of full width, then build the whole model; returns it and the prompts."""
    shape, weights = shapes.shape_of(name), plan.weights or "bf16"
    dtype = benchmark.dtype_of(weights)
    small = benchmark.prepare(shapes.build(shape, dtype, _VERIFIED_LAYERS), weights)
    _check_lengths(small, plan)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(small.config.vocab_size, (plan.batch, longest), generator=generator)
    benchmark.verified(small, prompts, plan.configs, lambda: done(f"{name} verified"))
    del small
    gc.collect()
    return built(shape, weights), prompts


def built(shape: Shape, weights: str) -> PreTrainedModel:
    """Build the whole model in a format of weights. It is quantised layer by layer to limit the memory needed."""
    dtype = benchmark.dtype_of(weights)
    if weights in FLOATS:
        return benchmark.prepare(shapes.build(shape, dtype), weights)
    whole = benchmark.prepare(shapes.build(shape, dtype, 1), weights)
    config, layers = shape.config(), decoder_layers(whole)[1]
    for number in range(1, config.num_hidden_layers):
        layer: Any = decoder_layers(benchmark.prepare(shapes.build(shape, dtype, 1), weights))[1][0]
        layer.self_attn.layer_idx = number
        layers.append(layer)
        gc.collect()  # models contain reference cycles
    whole.config.num_hidden_layers = config.num_hidden_layers
    if getattr(config, "layer_types", None) is not None:
        whole.config.layer_types = config.layer_types
    return whole


def _verified_model(plan: Plan, longest: int, done: Callable[[str], None]) -> tuple[PreTrainedModel, Tensor]:
    """Load a model and verify it; returns it and the prompts."""
    dtype = None if plan.weights is None else benchmark.dtype_of(plan.weights)
    model, tokenizer = load(plan.model, dtype=dtype, device="cpu")
    if plan.weights is not None:
        model = benchmark.prepare(model, plan.weights)
    _check_lengths(model, plan)
    ids = tokenizer(plan.passage, verbose=False)["input_ids"]
    prompts = passage_prompts(ids, tokenizer.bos_token_id, plan.batch, longest)
    benchmark.verified(model, prompts, plan.configs, lambda: done(f"{plan.model} verified"))
    return model, prompts


def stored_quantised(name: str) -> str | None:
    """The most frequent type of a GGUF file's quantised tensors; `None`: there are none, or it is no such file."""
    path = builtin_file(BUILTIN[name]) if name in BUILTIN else Path(name).expanduser()
    if path.suffix.lower() != ".gguf":
        return None
    with GgufFile(path) as file:
        types = Counter(tensor.type.name for tensor in file.tensors.values() if tensor.type.name in GGUF_TYPES)
    return types.most_common(1)[0][0] if types else None


def passage_prompts(ids: list[int], bos: int | None, batch: int, length: int) -> Tensor:
    """Different prompts from one passage. Each begins a little later in it, and wraps around at its end.

    Shapes:
        ids: the passage's tokens. Returns (batch, length), int64.
    """
    prefix = ids[:1] if ids and ids[0] == bos else []
    text = torch.tensor(ids[len(prefix) :])
    within = torch.arange(length - len(prefix))
    return torch.stack(
        [
            torch.cat([torch.tensor(prefix, dtype=torch.int64), text[(within + _SHIFT * n) % len(text)]])
            for n in range(batch)
        ]
    )


def _check_lengths(model: PreTrainedModel, plan: Plan) -> None:
    for prompt_tokens, generated in plan.lengths:
        benchmark.check_length(model, prompt_tokens, generated)


def format_of(model: PreTrainedModel) -> str:
    """The format in which a model's weights are stored."""
    names = {dtype: name for name, dtype in FLOATS.items()}
    return names.get(model.dtype, str(model.dtype).removeprefix("torch."))
