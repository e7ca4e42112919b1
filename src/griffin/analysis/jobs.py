"""The jobs of a sweep that need only the model: perplexity, speed, flocking, and answers to compare."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from griffin.analysis import benchmark, flocking, perplexity
from griffin.analysis.cells import FULL, CellResult, Key, Metric
from griffin.analysis.sweep import Job, Tick, config_of, key_of
from griffin.analysis.wanda import attach_any
from griffin.analysis.workload import passage_prompts
from griffin.config import GriffinConfig
from griffin.generation.generate import stream_generate
from griffin.generation.text import Prompt, context_length
from griffin.layouts import find_ff_blocks

_POINTS = 32  # on a curve over the generated tokens
_ROUNDS = 3
_FLOCKING_DENSITIES = (0.25, 0.5, 0.75)
_FLOCKING_SEQUENCES = 8
_PICTURE = (64, 384)  # a picture shows at most so many tokens and neurons
# The scale of all three pictures ends at this quantile of the text's, as a few values are far larger.
_BRIGHTEST = 0.995


def perplexities(
    model: PreTrainedModel,
    text: str,
    ids: Sequence[int],
    bos: int | None,
    configs: Sequence[GriffinConfig],
    prompts: Sequence[int],
    generates: Sequence[int],
    sequences: int,
    source: str,
) -> list[Job]:
    """One job for each prompt length; shorter continuations are prefixes of the longest.

    Args:
        text: the text's name.
        ids: the text's tokens, without special ones.
        bos: the token that the model expects at the beginning.
        configs: what `griffin.analysis.sweep.settings` returned.
        prompts, generates: tokens of the prompt and of the continuation.
        sequences: number of sequences cut from the text.
        source: distinguishes this text from another of the same name.

    Raises:
        ValueError: a length is out of range, the text is too short, or the model's context is.
    """
    longest = max(generates)
    benchmark.check_length(model, max(prompts), longest)
    windows = perplexity.windows(ids, bos, prompts, longest, sequences)
    source = f"{source}, windows of {max(prompts)} + {longest}"  # other lengths cut other sequences

    def job(prompt: int, window_ids: Tensor) -> Job:
        keys = [
            key_of(config, "perplexity", task=text, source=source, prompt=prompt, generate=generate, limit=sequences)
            for config in configs
            for generate in sorted(set(generates))
        ]

        def measure(todo: Sequence[Key], tick: Tick) -> Iterator[CellResult]:
            wanted = list(dict.fromkeys(config_of(key) for key in todo))
            steps = len(window_ids) * len(wanted)
            scored = perplexity.measure(model, window_ids, prompt, wanted, progress=lambda: tick(1 / steps))
            by_config = dict(zip(wanted, scored, strict=True))
            return (_perplexity(by_config[config_of(key)], key) for key in todo)

        return Job(tuple(keys), measure)

    return [job(prompt, window_ids) for prompt, window_ids in zip(prompts, windows, strict=True)]


def _perplexity(scored: perplexity.Scored, key: Key) -> CellResult:
    assert key.prompt is not None
    assert key.generate is not None
    row = perplexity.summary(scored, key.prompt, key.generate, key.seed)
    nll, kl, agreement = (values[:, : key.generate].double() for values in (scored.nll, scored.kl, scored.agreement))
    bins = torch.arange(key.generate).tensor_split(min(_POINTS, key.generate))
    metrics = {"perplexity": Metric.of(row.perplexity, higher_is_better=False)}
    if key.method != FULL:
        metrics["kl"] = Metric.of(row.kl, higher_is_better=False)
        metrics["agreement"] = Metric.of(row.agreement)
    return CellResult(
        metrics=metrics,
        n=row.sequences,
        data={
            "position": [float(positions.double().mean()) + 1 for positions in bins],
            "perplexity": [float(nll[:, positions].mean().exp()) for positions in bins],
        },
        samples={
            "values": {
                "nll": nll.mean(dim=1).tolist(),
                "kl": kl.mean(dim=1).tolist(),
                "agreement": agreement.mean(dim=1).tolist(),
            }
        },
    )


def speeds(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    weights: str,
    passage: str,
    configs: Sequence[GriffinConfig],
    prompt: int,
    generate: int,
) -> Job:
    """One job for all configs that can save time. They are verified against the reference backend, then interleaved.

    Args:
        name, weights: the model's name and weight format, for the rows.
        passage: the text that the prompt is taken from.
        configs: what `griffin.analysis.sweep.settings` returned.
        prompt, generate: numbers of tokens; reduced if the model's context is too short.
    """
    context = context_length(model)
    if context is not None and prompt + generate > context:
        prompt, generate = context - context // 4, context // 4
    timed = [
        config for config in configs if config.method.select is not None
    ]  # Wanda reads every weight, so it saves no time
    keys = tuple(key_of(config, "speed", prompt=prompt, generate=generate) for config in timed)

    def measure(todo: Sequence[Key], tick: Tick) -> Iterator[CellResult]:
        if model.device.type != "cpu":
            raise ValueError(f"speed is measured on the CPU, the model is on {model.device}; add --device cpu")
        full = next(key for key in keys if key.method == FULL)
        wanted = list(dict.fromkeys([full, *todo]))
        wanted_configs = [config_of(key) for key in wanted]
        encoded = tokenizer(passage, verbose=False)["input_ids"]
        prompts = passage_prompts(encoded, tokenizer.bos_token_id, 1, prompt)
        steps = len(wanted_configs) * (1 + _ROUNDS)
        benchmark.verified(model, prompts, wanted_configs, lambda: tick(1 / steps))
        runs, read = benchmark.measure(model, prompts, wanted_configs, generate, _ROUNDS, lambda: tick(1 / steps))
        rows = benchmark.rows(name, weights, model, prompts, generate, wanted_configs, runs, read)
        by_key = dict(zip(wanted, rows, strict=True))
        return (_speed(by_key[key]) for key in todo)

    return Job(keys, measure)


def _speed(row: benchmark.SpeedRow) -> CellResult:
    metrics = {
        name: Metric(getattr(row, name)) for name in ("speedup", "generation_tokens_per_s", "prompt_tokens_per_s")
    }
    return CellResult(metrics=metrics, n=_ROUNDS, data=asdict(row))


def examples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    configs: Sequence[GriffinConfig],
    generate: int,
    source: str,
) -> list[Job]:
    """One job for each config, which answers the prompts greedily.

    Args:
        prompts: the prompts; each becomes a user message if the tokenizer has a chat template.
        generate: maximum number of tokens of an answer.
        source: distinguishes these prompts from others.
    """

    def measure(todo: Sequence[Key], tick: Tick) -> Iterator[CellResult]:
        for key in todo:
            yield _examples(model, tokenizer, prompts, key, tick)

    keys = [key_of(config, "examples", source=source, generate=generate, limit=len(prompts)) for config in configs]
    return [Job((key,), measure) for key in keys]


def _examples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], key: Key, tick: Tick
) -> CellResult:
    tokens: list[list[int]] = []
    pieces: list[list[str]] = []
    with attach_any(model, config_of(key)) as handle:
        for text in prompts:
            prompt: Prompt = text if tokenizer.chat_template is None else [{"role": "user", "content": text}]
            answer = list(stream_generate(model, tokenizer, prompt, griffin=handle, max_tokens=key.generate))
            tokens.append([token for piece in answer for token in piece.tokens])
            pieces.append([piece.text for piece in answer])
            tick(1 / len(prompts))
    return CellResult(
        metrics={"generated_tokens": Metric(sum(map(len, tokens)) / len(prompts))},
        n=len(prompts),
        samples={"tokens": tokens},
        texts={"prompts": list(prompts), "pieces": pieces},
    )


def flocking_job(
    model: PreTrainedModel, name: str, ids: Sequence[int], bos: int | None, tokens: int, seed: int, source: str
) -> Job:
    """One cell: flocking pictures of three layers, and the overlap of the experts of several sequences.

    The pictures show a text, its tokens permuted, and random tokens.

    Args:
        name: the text's name.
        ids: the text's tokens, without special ones; they are cut into sequences that do not overlap.
        bos: the token that the model expects at the beginning.
        tokens: maximum number of tokens of a sequence.
        seed: seed of the permutation and of the random tokens.
        source: distinguishes this text from another of the same name.
    """
    most = min(tokens, context_length(model) or tokens, len(ids) // _FLOCKING_SEQUENCES)
    key = Key("flocking", FULL, 1.0, task=name, source=source, prompt=most, limit=_FLOCKING_SEQUENCES, seed=seed)

    def measure(todo: Sequence[Key], tick: Tick) -> Iterator[CellResult]:
        if most < 2:
            raise ValueError(f"the text has {len(ids)} tokens; expected at least {2 * _FLOCKING_SEQUENCES}")
        beginning = [] if bos is None else [bos]
        step, size = len(ids) // _FLOCKING_SEQUENCES, most - len(beginning)
        texts = torch.tensor([[*beginning, *ids[at * step : at * step + size]] for at in range(_FLOCKING_SEQUENCES)])
        energies = flocking.energies(model, texts.split(1))  # type: ignore[no-untyped-call]
        tick(0.8)
        yield _flocking(energies, _pictures(model, texts[:1], seed))

    return Job((key,), measure)


def _flocking(energies: Mapping[int, Tensor], pictures: list[dict[str, object]]) -> CellResult:
    """Shapes: energies by layer, each (N, D_ff)."""
    n = next(iter(energies.values())).shape[0]
    pairs = torch.triu_indices(n, n, 1)
    series: dict[str, dict[str, list[float]]] = {"jaccard": {}, "energy": {}}
    for density in _FLOCKING_DENSITIES:
        overlaps = flocking.jaccard(energies, density)[:, pairs[0], pairs[1]]
        series["jaccard"][f"{density:g}"] = overlaps.mean(dim=1).tolist()
        series["energy"][f"{density:g}"] = flocking.energy_share(energies, density).mean(dim=1).tolist()
    metrics = {
        f"{what} at {density}": Metric(sum(values) / len(values))
        for what, by_density in series.items()
        for density, values in by_density.items()
    }
    chance = {f"{density:g}": density / (2 - density) for density in _FLOCKING_DENSITIES}
    return CellResult(metrics, n, data={**series, "chance": chance}, samples={"pictures": pictures})


def _pictures(model: PreTrainedModel, text: Tensor, seed: int) -> list[dict[str, object]]:
    """Pictures of three layers for a text, its tokens permuted, and random tokens. Shapes: text (1, S)."""
    versions = flocking.compared(text.to(model.device), model.config.get_text_config().vocab_size, seed)
    layers = len(find_ff_blocks(model))
    chosen = sorted({layers // 4, layers // 2, 3 * layers // 4})
    activations = {name: flocking.relative_activations(model, ids, chosen) for name, ids in versions.items()}
    pictures: list[dict[str, object]] = []
    for layer in chosen:
        shown = {name: by_layer[layer][: _PICTURE[0], : _PICTURE[1]] for name, by_layer in activations.items()}
        most = max(float(shown["original"].quantile(_BRIGHTEST)), 1e-12)
        maps = {name: {"shape": list(values.shape), "bytes": _bytes(values / most)} for name, values in shown.items()}
        pictures.append({"layer": layer, "shape": maps["original"]["shape"], "maps": maps})
    return pictures


def _bytes(values: Tensor) -> str:
    """Encode values from 0 to 1 as one byte each, in base64."""
    rounded = (values.clamp(0, 1) * 255).round().to(torch.uint8)
    return base64.b64encode(bytes(rounded.flatten().tolist())).decode("ascii")
