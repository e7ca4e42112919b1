"""The innermost layer of generation: token ids in, token ids out, one step at a time."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    Cache,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from griffin.attachment import Griffin, Selection
from griffin.engine.decoders import Decoder, Decoders, new_cache
from griffin.engine.forward import Forward
from griffin.engine.lossless import Lossless
from griffin.method.statistics import keep_with_cache, of_cache

_LEAST_TEMPERATURE = 1e-4


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Args:
        max_tokens: most tokens to generate for a prompt.
        temperature: 0 is greedy, and so is less than 1e-4; above, logits are divided by it before drawing.
        top_p: draw from the smallest set of tokens whose probability reaches this; 1 is off.
        top_k: draw from this many most likely tokens; 0 is off.
        min_p: drop tokens less likely than this share of the likeliest; 0 is off.
        repetition_penalty: above 1, tokens that have occurred become less likely.
        frequency_penalty: subtracted from a token's logit for each time that the answer already has it; 0 is off.
        presence_penalty: subtracted from the logits of all tokens that the answer already has; 0 is off.
        logit_bias: token ids, each with what is added to its logit.
        stop: texts that end an answer; they are not part of it.
        seed: seed of the drawing; `None` draws a new one each time.

    Raises:
        ValueError: a value is out of its range.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    stop: Sequence[str] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        biases = (self.logit_bias or {}).items()
        for name, allowed, fits in (
            ("max_tokens", "a whole number from 1", _whole(self.max_tokens) and self.max_tokens >= 1),
            ("temperature", "a number from 0 to 100", 0 <= self.temperature <= 100),
            ("top_p", "above 0 and at most 1", 0 < self.top_p <= 1),
            ("top_k", "a whole number from 0 (off)", _whole(self.top_k) and self.top_k >= 0),
            ("min_p", "from 0 (off) to 1", 0 <= self.min_p <= 1),
            ("repetition_penalty", "above 0 (1 is off)", 0 < self.repetition_penalty < float("inf")),
            ("frequency_penalty", "from -100 to 100 (0 is off)", -100 <= self.frequency_penalty <= 100),
            ("presence_penalty", "from -100 to 100 (0 is off)", -100 <= self.presence_penalty <= 100),
            (
                "logit_bias",
                "token ids from 0, each with a number from -100 to 100",
                all(_whole(token) and token >= 0 and -100 <= bias <= 100 for token, bias in biases),
            ),
            ("seed", "a whole number from 0, or None", self.seed is None or (_whole(self.seed) and self.seed >= 0)),
        ):
            if not fits:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected {allowed}")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop is {self.stop!r}; expected texts that are not empty")
        object.__setattr__(self, "stop", stop)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken; logits divided by less would not be finite."""
        return self.temperature < _LEAST_TEMPERATURE

    def processors(self, prompt_tokens: int) -> LogitsProcessorList:
        """Logits processors for these settings: Transformers' own in the order in which its generate applies them, and
        before its temperature the OpenAI API's penalties of the tokens after the first `prompt_tokens`, and biases.
        """
        chosen = LogitsProcessorList()
        if self.repetition_penalty != 1.0:
            chosen.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.frequency_penalty or self.presence_penalty:
            chosen.append(_AnswerPenalty(self.frequency_penalty, self.presence_penalty, prompt_tokens))
        if self.logit_bias:
            chosen.append(_Bias(self.logit_bias))
        if not self.greedy and self.temperature != 1.0:
            chosen.append(TemperatureLogitsWarper(self.temperature))
        if not self.greedy and self.top_k > 0:
            chosen.append(TopKLogitsWarper(self.top_k))
        if not self.greedy and self.top_p < 1.0:
            chosen.append(TopPLogitsWarper(self.top_p))
        if not self.greedy and self.min_p > 0.0:
            chosen.append(MinPLogitsWarper(self.min_p))
        return chosen


class _AnswerPenalty(LogitsProcessor):
    """Subtract `count * frequency + presence` from the logits of tokens that the answer has: the OpenAI API's."""

    def __init__(self, frequency: float, presence: float, prompt_tokens: int) -> None:
        self._frequency, self._presence, self._prompt_tokens = frequency, presence, prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        answer = input_ids[:, self._prompt_tokens :]
        counts = torch.zeros_like(scores).scatter_add_(1, answer, torch.ones_like(answer, dtype=scores.dtype))
        return scores - (self._frequency * counts + self._presence * (counts > 0))


class _Bias(LogitsProcessor):
    """Add to the logits of some tokens."""

    def __init__(self, biases: Mapping[int, float]) -> None:
        self._tokens, self._biases = torch.tensor(list(biases)), torch.tensor(list(biases.values()))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if int(self._tokens.max()) >= scores.shape[1]:
            last = int(self._tokens.max())
            raise ValueError(f"logit_bias names token {last}; this model has tokens 0 to {scores.shape[1] - 1}")
        return scores.index_add(1, self._tokens.to(scores.device), self._biases.to(scores).expand(len(scores), -1))


@dataclass(frozen=True)
class Step:
    """One step of a batch.

    Args:
        tokens: the tokens drawn, (B,), int64.
        logits: what they were drawn from, before any processor, (B, V), float32.
        seconds: duration of the forward pass and the drawing; of the first step: of the prompt phase.
        selection_s: seconds the selection of experts took; 0 but for the first step.
    """

    tokens: Tensor
    logits: Tensor
    seconds: float
    selection_s: float


def generate_step(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    handle: Griffin | None = None,
    sampling: Sampling | None = None,
    cache: Cache | None = None,
    prompt_chunk: int | None = None,
    lossless: Lossless | None = None,
    step: str = "auto",
) -> Generator[Step, Sequence[int] | None, None]:
    """Run a prompt and yield one step after another, without an end: the caller stops.

    To drop finished sequences, `send` the ascending indices of the rows to keep; the others are removed from the batch
    and the cache.

    Args:
        model: the model, in eval mode.
        input_ids: the prompts, left-padded. With a cache: the whole conversation, of which the cache holds the start.
        attention_mask: 1 where a token is real; `None` where there is no padding.
        handle: GRIFFIN attached to this model; `None` runs the full model.
        sampling: how tokens are drawn; its `max_tokens` and `stop` are the caller's business.
        cache: key/value cache of earlier turns; it is extended in place.
        prompt_chunk: most prompt tokens in one forward pass; `None` runs the prompt whole.
        lossless: drafts from the text so far, for one prompt and the full model; the tokens are the same as without.
        step: what computes the generation steps, a name of `griffin.engine.decoders.STEPS`.

    Shapes:
        input_ids, attention_mask: (B, S).

    Raises:
        ValueError: no new token after the cache, `prompt_chunk` is not positive, `lossless` is given for a batch or for
            a handle that prunes, or the step that was asked for by name cannot be taken.
    """
    sampling = sampling or Sampling()
    cache = new_cache(model, step=step) if cache is None else cache
    done = int(cache.get_seq_length())
    if input_ids.shape[1] <= done:
        raise ValueError(f"the prompt has {input_ids.shape[1]} tokens and the cache {done}: there is none to run")
    if prompt_chunk is not None and prompt_chunk < 1:
        raise ValueError(f"prompt_chunk is {prompt_chunk}; expected a number of tokens from 1")
    if lossless is not None:
        _check_lossless(input_ids, handle)
    draw = Draw(sampling, input_ids)

    start = time.perf_counter()
    forward = Forward(model, cache, attention_mask)
    phase = nullcontext() if handle is None else handle.prompt_phase(statistics=of_cache(cache))
    with torch.no_grad(), phase:
        for chunk in torch.split(input_ids[:, done:], prompt_chunk or input_ids.shape[1], dim=1):
            logits = forward(chunk)
    selections: Sequence[Selection] = ()
    selection_s = 0.0
    if handle is not None:
        keep_with_cache(handle.gathered, cache)
        selections, selection_s = handle.selections, handle.selection_s
    tokens = draw(logits)
    kept = yield Step(tokens, logits, time.perf_counter() - start - selection_s, selection_s)

    text = [] if lossless is None else [*input_ids[0].tolist(), int(tokens)]
    decoders = Decoders(model, handle, step)
    decoder: Decoder | None = None
    while True:
        start = time.perf_counter()
        if kept is not None:
            rows = list(kept)
            tokens = tokens[rows]
            cache.batch_select_indices(torch.tensor(rows, device=tokens.device))
            attention_mask = None if attention_mask is None else attention_mask[rows]
            if len(selections) > 1:
                selections = [selections[row] for row in rows]
            draw.keep(rows)
            decoder = None
        if decoder is None:
            decoder = decoders.decoder([cache], selections, attention_mask)
            if lossless is not None:
                decoder = lossless.over(decoder, cache, text[:-1], input_ids.shape[1] + sampling.max_tokens - len(text))
        logits = decoder(tokens)
        tokens = draw(logits)
        if lossless is not None:
            text.append(int(tokens))
        kept = yield Step(tokens, logits, time.perf_counter() - start, 0.0)


class Draw:
    """Draw the next token of every row, and remember it for the penalties."""

    def __init__(self, sampling: Sampling, input_ids: Tensor) -> None:
        self._greedy = sampling.greedy
        self._processors = sampling.processors(input_ids.shape[1])
        self._seen = input_ids
        self._generator = torch.Generator(device=input_ids.device)
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows."""
        self._seen = self._seen[list(rows)]

    def __call__(self, logits: Tensor) -> Tensor:
        scores = logits
        if self._processors:
            scores = self._processors(self._seen, logits)  # type: ignore[arg-type]
        if self._greedy:
            tokens = scores.argmax(dim=-1)
        else:
            tokens = torch.multinomial(scores.softmax(dim=-1), 1, generator=self._generator).squeeze(1)
        if self._processors:
            self._seen = torch.cat([self._seen, tokens[:, None]], dim=1)
        return tokens


def _check_lossless(input_ids: Tensor, handle: Griffin | None) -> None:
    if input_ids.shape[0] != 1:
        raise ValueError(f"lossless drafts for one prompt at a time, found {input_ids.shape[0]}; give them one by one")
    if handle is not None and handle.pruned:
        raise ValueError(
            f"lossless gives the tokens of the full model, and the handle's density is {handle.config.density:g}; "
            "attach with density=1.0"
        )


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
