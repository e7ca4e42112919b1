"""Compute log-likelihoods of continuations with the experts, from token ids. This module does not use the harness.

The argument `phase` has two values:

- `continuation`: the context runs once in the prompt phase, for all of its continuations. The experts then compute its
  last token again and the tokens of the continuation, so they predict every token of the continuation.
- `last_token`: the paper's simulation of classification. All of the input except its last token runs in the prompt
  phase, and the experts compute only that last token, so they predict only the last token of the continuation.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from griffin.attachment import Griffin
from griffin.generation.text import pad

_MIN_CONTINUATIONS = 4  # in one forward pass; each has a copy of its context's keys and values
_TOKENS = 512  # tokens of a continuation in one forward pass, as each needs logits over the whole vocabulary


@dataclass(frozen=True)
class Continuation:
    """The tokens of a continuation to score after a context, which is not empty."""

    context: tuple[int, ...]
    tokens: tuple[int, ...]

    def within(self, window: int) -> Continuation:
        """Cut the context from the left, as the harness does, so that all tokens but the last fit the window."""
        kept = (self.context + self.tokens)[-(window + 1) :]
        return Continuation(kept[: len(kept) - len(self.tokens)], self.tokens)


@dataclass(frozen=True)
class Score:
    """Log-likelihood in nats of continuation number `index`, and whether greedy decoding would generate it."""

    index: int
    loglikelihood: float
    greedy: bool


class Scorer:
    """Scores continuations with one attached model.

    Args:
        model: the model.
        handle: GRIFFIN attached to it.
        phase: `continuation` or `last_token`.
        batch_size: the number of contexts (for `last_token`: inputs) in one prompt phase.
        pad_token: the token id that pads them on the left.
        log_softmax: the function that normalises logits (..., V).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        handle: Griffin,
        *,
        phase: str,
        batch_size: int,
        pad_token: int,
        log_softmax: Callable[[Tensor], Tensor],
    ) -> None:
        self._model, self._handle, self._phase = model, handle, phase
        self._batch_size, self._pad_token, self._log_softmax = batch_size, pad_token, log_softmax
        accepted = inspect.signature(model.forward).parameters
        self._positions, self._keep = "position_ids" in accepted, "logits_to_keep" in accepted

    @torch.no_grad()
    def __call__(self, continuations: Sequence[Continuation]) -> Iterator[Score]:
        """Score the continuations, those of the longest contexts first, and yield each score once it is computed.

        Raises:
            ValueError: the statistics that select the experts are not finite.
        """
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for index, continuation in enumerate(continuations):
            prompt = continuation.context
            if self._phase == "last_token":
                prompt += continuation.tokens[:-1]
            by_prompt.setdefault(prompt, []).append(index)
        prompts = sorted(by_prompt, key=len, reverse=True)
        run = self._last_tokens if self._phase == "last_token" else self._continuations
        for batch in _batches(prompts, self._batch_size):
            yield from run(batch, [by_prompt[prompt] for prompt in batch], continuations)

    def _continuations(
        self,
        contexts: Sequence[tuple[int, ...]],
        indices: Sequence[Sequence[int]],
        continuations: Sequence[Continuation],
    ) -> Iterator[Score]:
        ids, mask = pad(contexts, self._pad_token, self._model.device)
        cache = DynamicCache()
        with self._handle.prompt_phase():
            self._forward(ids, mask, cache, keep=1)
        cache.crop(-1)  # the last token of the context runs again with the experts
        separate_experts = self._handle.config.batch == "per_sequence"
        rows = [[(row, index) for index in of_context] for row, of_context in enumerate(indices)]
        groups = rows if separate_experts else [list(chain.from_iterable(rows))]
        size = max(_MIN_CONTINUATIONS, self._batch_size)
        for group in groups:
            for at in range(0, len(group), size):
                part = group[at : at + size]
                scored = [continuations[index].tokens for _, index in part]
                context_rows = [row for row, _ in part]
                inputs = [contexts[row][-1:] + tokens[:-1] for row, tokens in zip(context_rows, scored, strict=True)]
                logprobs, greedy = self._teach(inputs, scored, context_rows, mask, cache)
                for n, (_, index) in enumerate(part):
                    length = len(scored[n])
                    yield Score(index, float(logprobs[n, :length].sum()), bool(greedy[n, :length].all()))

    def _teach(
        self,
        inputs: Sequence[tuple[int, ...]],
        targets: Sequence[tuple[int, ...]],
        rows: Sequence[int],
        mask: Tensor | None,
        cache: Cache,
    ) -> tuple[Tensor, Tensor]:
        """Run inputs after the cached contexts `rows`, with these contexts' experts.

        Shapes: returns the log-probability of every target and whether it is the likeliest token, both (N, T); shorter
        continuations are padded on the right.
        """
        device = self._model.device
        ids, wanted = (_right_padded(tokens, self._pad_token, device) for tokens in (inputs, targets))
        rows_cache = _rows_of(cache, torch.tensor(rows, device=device))
        rows_mask = None if mask is None else mask[torch.tensor(rows, device=device), :-1]
        logprobs, greedy = [], []
        with self._handle.generation_phase(rows=rows):
            for tokens, target in zip(
                torch.split(ids, _TOKENS, dim=1), torch.split(wanted, _TOKENS, dim=1), strict=True
            ):
                if rows_mask is not None:
                    rows_mask = torch.cat([rows_mask, rows_mask.new_ones(tokens.shape)], dim=1)
                logits = self._log_softmax(self._forward(tokens, rows_mask, rows_cache))
                logprobs.append(logits.gather(2, target[..., None]).squeeze(2))
                greedy.append(logits.argmax(dim=-1) == target)
        return torch.cat(logprobs, dim=1), torch.cat(greedy, dim=1)

    def _last_tokens(
        self, inputs: Sequence[tuple[int, ...]], indices: Sequence[Sequence[int]], continuations: Sequence[Continuation]
    ) -> Iterator[Score]:
        cache = DynamicCache()
        before = max(len(continuations[index].tokens) for index in chain.from_iterable(indices)) - 1
        alone = len(inputs[0]) == 1  # the last token is the only one, so it is also the prompt
        ids, mask = pad(inputs, self._pad_token, self._model.device)
        prompt, last = (ids, ids) if alone else (ids[:, :-1], ids[:, -1:])
        with self._handle.prompt_phase():
            prompt_logits = self._forward(
                prompt, None if mask is None else mask[:, : prompt.shape[1]], cache, keep=max(1, before)
            )
        if alone:
            cache.crop(-1)
        with self._handle.generation_phase():
            last_logits = self._forward(last, mask, cache)
        logits = self._log_softmax(last_logits if before == 0 else torch.cat([prompt_logits, last_logits], dim=1))
        for row, of_prompt in enumerate(indices):
            for index in of_prompt:
                targets = torch.tensor(continuations[index].tokens, device=logits.device)
                target_logits = logits[row, -len(targets) :]
                logprobs = target_logits.gather(1, targets[:, None])
                yield Score(index, float(logprobs.sum()), bool((target_logits.argmax(dim=-1) == targets).all()))

    def _forward(self, tokens: Tensor, mask: Tensor | None, cache: Cache, keep: int | None = None) -> Tensor:
        """Run new tokens after those in the cache. Returns the logits of the last `keep` positions, or of all."""
        arguments: dict[str, Any] = {}
        if mask is not None:
            arguments["attention_mask"] = mask
            if self._positions:
                arguments["position_ids"] = (mask.cumsum(dim=1) - 1).clamp_min(0)[:, -tokens.shape[1] :]
        if keep is not None and self._keep:
            arguments["logits_to_keep"] = keep
        logits: Tensor = self._model(tokens, past_key_values=cache, use_cache=True, **arguments).logits
        return logits if keep is None else logits[:, -keep:]


def _batches(prompts: Sequence[tuple[int, ...]], size: int) -> Iterator[Sequence[tuple[int, ...]]]:
    """Batches of `size` prompts. Prompts of a single token, which come last, get separate batches."""
    longer = sum(len(prompt) > 1 for prompt in prompts)
    for part in (prompts[:longer], prompts[longer:]):
        for at in range(0, len(part), size):
            yield part[at : at + size]


def _right_padded(tokens: Sequence[tuple[int, ...]], pad_token: int, device: torch.device) -> Tensor:
    longest = max(map(len, tokens))
    return torch.tensor([[*sequence, *[pad_token] * (longest - len(sequence))] for sequence in tokens], device=device)


def _rows_of(cache: DynamicCache | Cache, rows: Tensor) -> Cache:
    """A cache of the given rows, in this order. The given cache is not changed."""
    if cache.get_seq_length() == 0:
        return DynamicCache()
    chosen = copy.copy(cache)
    # Shallow copies are enough, as a layer replaces its tensors instead of writing into them.
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    chosen.batch_select_indices(rows)  # type: ignore[attr-defined, unused-ignore]
    return chosen
