"""Make a model's profile from a given text, or from text that the model generates."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from griffin.activation import ACTIVATIONS
from griffin.analysis import perplexity
from griffin.attachment import GATHER_ONLY, attach
from griffin.config import BEST, GriffinConfig
from griffin.engine.step import Sampling, generate_step
from griffin.layouts import FFBlock, find_ff_blocks
from griffin.method.dynamic import output_norms
from griffin.method.planes import Curve
from griffin.method.profile import Profile, format_of, sample

DENSITIES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
TOKENS = 512  # tokens of a sequence
_PROMPT = 256  # prompt tokens of a sequence that measures losses; the others are scored
_BATCH = 16
_HELD_OUT = 4  # every fourth sequence measures the losses and does not contribute to the prior


@torch.no_grad()
def written(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: int,
    seed: int,
    done: Callable[[], None] = lambda: None,
) -> Tensor:
    """Text that the model generates at temperature 1 from a beginning-of-sequence token alone.

    Calls `done` `steps_of(sequences)` times.

    Shapes:
        Returns (sequences, 512), int64.

    Raises:
        ValueError: the tokenizer has no token that a sequence can begin with.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ValueError("the tokenizer has no token to begin with, so the model cannot write a text; give --text FILE")
    texts = []
    for at in range(0, sequences, _BATCH):
        rows = min(_BATCH, sequences - at)
        beginning = torch.full((rows, 1), start, device=model.device)
        with attach(model, GriffinConfig(density=1.0, selection="topk", batch="per_sequence")) as handle:
            sampling = Sampling(temperature=1.0, seed=seed + at)
            tokens = []
            for step in islice(generate_step(model, beginning, handle=handle, sampling=sampling), TOKENS - 1):
                tokens.append(step.tokens)
                done()
        texts.append(torch.cat([beginning, torch.stack(tokens, dim=1)], dim=1))
    return torch.cat(texts).cpu()


def steps_of(sequences: int) -> int:
    """Number of steps that `written` takes."""
    return math.ceil(sequences / _BATCH) * (TOKENS - 1)


def split(sequences: Tensor) -> tuple[Tensor, Tensor]:
    """Split into sequences for the prior and sequences for the losses. Shapes: each (n, 512)."""
    held_out = torch.arange(len(sequences)) % _HELD_OUT == _HELD_OUT - 1
    return sequences[~held_out], sequences[held_out]


@torch.no_grad()
def prior(
    model: PreTrainedModel, sequences: Tensor, about: dict[str, str], done: Callable[[], None] = lambda: None
) -> Profile:
    """A profile without losses: means over all tokens of the sequences.

    Shapes:
        sequences: (N, S), int64.

    Raises:
        ValueError: GRIFFIN cannot prune the model, or its activations are not finite.
    """
    energies: dict[int, Tensor] = {}
    ups: dict[int, Tensor] = {}
    with attach(model, GATHER_ONLY) as handle:
        for row in sequences:
            with handle.gather(needs={"ups"}) as statistics:
                model(row[None].to(model.device), use_cache=False)
            for total, gathered in ((energies, statistics.energies), (ups, statistics.ups)):
                for layer, values in gathered.items():
                    total[layer] = total.get(layer, 0) + values[0].cpu()
            done()
    tokens = sequences.numel()
    return Profile(
        {layer: totals / tokens for layer, totals in energies.items()},
        {layer: totals / tokens for layer, totals in ups.items()},
        sample(model),
        about | {"tokens": str(tokens)},
    )


@torch.no_grad()
def with_curves(
    profile: Profile, model: PreTrainedModel, sequences: Tensor, done: Callable[[], None] = lambda: None
) -> Profile:
    """The profile with how every layer's output energy is spread over its neurons: by a token's scores, by a prompt's.

    The first half of a sequence is the prompt, the second half are the tokens. Blocks that `planes+` does not read (no
    gate, an unknown activation) have none.

    Shapes:
        sequences: (N, 512), int64.
    """
    blocks = [block for block in find_ff_blocks(model) if block.gated and block.activation is not None]
    seen: dict[int, list[Tensor]] = {}
    totals: dict[int, Tensor] = {}
    with ExitStack() as hooks:
        for block in blocks:

            def keep(_module: nn.Module, _x: object, y: Tensor, block: FFBlock = block) -> None:
                parts = y[0].float().chunk(2, dim=-1) if block.layout.fused else (y[0].float(),)
                seen.setdefault(block.layer, []).extend(parts)

            for projection in block.inputs:
                hooks.callback(projection.register_forward_hook(keep).remove)
        for row in sequences:
            seen.clear()
            model(row[None].to(model.device), use_cache=False)
            for block in blocks:
                gate, up = seen[block.layer]
                found = _energies_by_rank(block, gate, up)
                totals[block.layer] = totals.get(block.layer, 0) + found
            done()
    shares = {layer: total / total.sum(dim=1, keepdim=True) for layer, total in totals.items()}
    return replace(profile, curves={layer: Curve(*map(tuple, each.tolist())) for layer, each in shares.items()})


def _energies_by_rank(block: FFBlock, gate: Tensor, up: Tensor) -> Tensor:
    """Output energies of the later tokens, by twentieths of the neurons in a token's order and in the prompt's.

    Shapes: gate, up (S, D_ff); returns (2, 20).
    """
    assert block.activation is not None
    norms, a = output_norms(block).to(gate.device), ACTIVATIONS[block.activation](gate)
    z = a * up
    prompt = z[:_PROMPT]
    statistic = (prompt / prompt.norm(dim=1, keepdim=True).clamp_min(1e-9)).square().sum(dim=0)
    energies = (z[_PROMPT:] * norms).square()
    scores = a[_PROMPT:].abs() * up[:_PROMPT].square().mean(dim=0).sqrt() * norms
    by_token = energies.gather(1, scores.argsort(dim=1, descending=True)).mean(dim=0)
    by_prompt = energies.mean(dim=0)[statistic.argsort(descending=True)]
    return torch.stack(
        [torch.stack([part.sum() for part in each.tensor_split(20)]) for each in (by_token, by_prompt)]
    ).cpu()


def with_losses(
    profile: Profile, model: PreTrainedModel, sequences: Tensor, path: str, done: Callable[[], None] = lambda: None
) -> Profile:
    """The profile with the loss of each density, for the current storage format of the model's FF weights.

    Args:
        profile: the profile; its file is `path`.
        model: the profile's model.
        sequences: text that did not contribute to the prior.
        path: the profile's file.
        done: called after every sequence with every density.

    Shapes:
        sequences: (N, 512), int64.
    """
    configs = [GriffinConfig(density=density, selection=BEST, profile=path) for density in DENSITIES]
    scored_configs = perplexity.measure(model, sequences, _PROMPT, configs, progress=done)
    losses = {scored.config.density: float(scored.kl.double().mean()) for scored in scored_configs}
    weights = format_of(find_ff_blocks(model)[0])
    return replace(profile, losses={**profile.losses, weights: losses})
