"""Log-likelihood of continuations with the experts. Token ids in, numbers out; knows nothing of the harness.

Two phases can be meant (`phase`):

- `continuation`: the context is the prompt phase, run once for all of its continuations. Its last token is then
  computed again, with the experts, and so are the continuation's tokens: every one of them is predicted by the experts.
- `last_token`: the paper's simulation of classification. The whole input but its last token is the prompt phase, and
  only that last token is computed with the experts; so it is the last token of the continuation that they predict.
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

_ROWS = 4  # continuations in one forward pass, at least: each has a copy of its context's keys and values
_TOKENS = 512  # of a continuation in one forward pass: all of them need logits, of the vocabulary's size


@dataclass(frozen=True)
class Continuation:
    """A continuation to score after a context, which is not empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    def within(self, window: int) -> Continuation:
        """The same with its context cut from the left, as the harness does: all but the last token fit the window."""
        kept = (self.context + self.continuation)[-(window + 1) :]
        return Continuation(kept[: len(kept) - len(self.continuation)], self.continuation)


@dataclass(frozen=True)
class Score:
    """Log-likelihood of request number `index`, in nats, and whether greedy decoding would give its continuation."""

    index: int
    loglikelihood: float
    greedy: bool


class Scorer:
    """Scores requests with one attached model.

    Args:
        model: the model.
        handle: GRIFFIN attached to it.
        phase: `continuation` or `last_token`.
        batch_size: contexts (inputs, for `last_token`) in one prompt phase; left-padded.
        pad_token: what they are padded with.
        log_softmax: of logits (..., V).
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
    def __call__(self, requests: Sequence[Continuation]) -> Iterator[Score]:
        """Score the requests, longest first, each as soon as it is known.

        Raises:
            ValueError: the scores that select the experts are not finite.
        """
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for index, request in enumerate(requests):
            prompt = request.context
            if self._phase == "last_token":
                prompt += request.continuation[:-1]
            by_prompt.setdefault(prompt, []).append(index)
        prompts = sorted(by_prompt, key=len, reverse=True)
        run = self._last_tokens if self._phase == "last_token" else self._continuations
        for batch in _batches(prompts, self._batch_size):
            yield from run(batch, [by_prompt[prompt] for prompt in batch], requests)

    def _continuations(
        self, contexts: Sequence[tuple[int, ...]], indices: Sequence[Sequence[int]], requests: Sequence[Continuation]
    ) -> Iterator[Score]:
        ids, mask = pad(contexts, self._pad_token, self._model.device)
        cache = DynamicCache()
        with self._handle.prompt_phase():
            self._forward(ids, mask, cache, keep=1)
        cache.crop(-1)  # the last token of the context comes again, with the experts
        own_experts = self._handle.config.batch == "per_sequence"
        rows = [[(row, index) for index in own] for row, own in enumerate(indices)]
        groups = rows if own_experts else [list(chain.from_iterable(rows))]
        size = max(_ROWS, self._batch_size)
        for group in groups:
            for at in range(0, len(group), size):
                part = group[at : at + size]
                scored = [requests[index].continuation for _, index in part]
                of = [row for row, _ in part]
                starts = [contexts[row][-1:] + own[:-1] for (row, _), own in zip(part, scored, strict=True)]
                logprobs, greedy = self._teach(starts, scored, of, mask, cache)
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
        """Run inputs after the cached contexts `rows`, with their experts.

        Shapes: returns log-probability of every target and whether it is the likeliest token, both (N, T); shorter ones
        are padded on the right.
        """
        device = self._model.device
        ids, wanted = (_right_padded(tokens, self._pad_token, device) for tokens in (inputs, targets))
        own = _rows_of(cache, torch.tensor(rows, device=device))
        own_mask = None if mask is None else mask[torch.tensor(rows, device=device), :-1]
        logprobs, greedy = [], []
        with self._handle.generation_phase(rows=rows):
            for tokens, target in zip(
                torch.split(ids, _TOKENS, dim=1), torch.split(wanted, _TOKENS, dim=1), strict=True
            ):
                if own_mask is not None:
                    own_mask = torch.cat([own_mask, own_mask.new_ones(tokens.shape)], dim=1)
                logits = self._log_softmax(self._forward(tokens, own_mask, own))
                logprobs.append(logits.gather(2, target[..., None]).squeeze(2))
                greedy.append(logits.argmax(dim=-1) == target)
        return torch.cat(logprobs, dim=1), torch.cat(greedy, dim=1)

    def _last_tokens(
        self, inputs: Sequence[tuple[int, ...]], indices: Sequence[Sequence[int]], requests: Sequence[Continuation]
    ) -> Iterator[Score]:
        cache = DynamicCache()
        before = max(len(requests[index].continuation) for own in indices for index in own) - 1
        alone = len(inputs[0]) == 1  # nothing comes before the last token: it is its own prompt
        ids, mask = pad(inputs, self._pad_token, self._model.device)
        prompt, last = (ids, ids) if alone else (ids[:, :-1], ids[:, -1:])
        with self._handle.prompt_phase():
            first = self._forward(
                prompt, None if mask is None else mask[:, : prompt.shape[1]], cache, keep=max(1, before)
            )
        if alone:
            cache.crop(-1)
        with self._handle.generation_phase():
            second = self._forward(last, mask, cache)
        logits = self._log_softmax(second if before == 0 else torch.cat([first, second], dim=1))
        for row, own in enumerate(indices):
            for index in own:
                targets = torch.tensor(requests[index].continuation, device=logits.device)
                own_logits = logits[row, -len(targets) :]
                logprobs = own_logits.gather(1, targets[:, None])
                yield Score(index, float(logprobs.sum()), bool((own_logits.argmax(dim=-1) == targets).all()))

    def _forward(self, tokens: Tensor, mask: Tensor | None, cache: Cache, keep: int | None = None) -> Tensor:
        """The model's logits for new tokens after those in the cache, of the last `keep` positions or of all."""
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
    """So many at a time; those of a single token on their own, as they are treated differently."""
    longer = sum(len(prompt) > 1 for prompt in prompts)
    for part in (prompts[:longer], prompts[longer:]):
        for at in range(0, len(part), size):
            yield part[at : at + size]


def _right_padded(tokens: Sequence[tuple[int, ...]], pad_token: int, device: torch.device) -> Tensor:
    longest = max(map(len, tokens))
    return torch.tensor([[*own, *[pad_token] * (longest - len(own))] for own in tokens], device=device)


def _rows_of(cache: DynamicCache | Cache, rows: Tensor) -> Cache:
    """A cache of some of the sequences, in that order; the given one stays as it is."""
    if cache.get_seq_length() == 0:
        return DynamicCache()
    chosen = copy.copy(cache)
    chosen.layers = [
        copy.copy(layer) for layer in cache.layers
    ]  # a layer replaces its tensors, it does not write in them
    chosen.batch_select_indices(rows)  # type: ignore[attr-defined, unused-ignore]
    return chosen
