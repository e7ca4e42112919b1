"""The engine's requests, limits, events and exceptions."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from griffin.config import GriffinConfig
from griffin.engine.step import Sampling


class FullError(Exception):
    """The queue is full.

    Args:
        message: what is full.
        retry_after_s: seconds after which there will be room, as far as the queue can tell.
    """

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class LateError(Exception):
    """A request was not finished in time."""


class StoppedError(Exception):
    """The server is stopping."""


class FormError(Exception):
    """No answer of the form that the request asks for can be written, or it is too complex to be held to."""


@dataclass(frozen=True)
class Limits:
    """How much work the engine accepts.

    Args:
        max_sequences: the most answers at a time.
        queue: the most prompts that wait.
        cache_bytes: the most bytes of keys and values, over all answers.
        prompt_chunk: prompt tokens that run between two steps of the running answers. All prompts run in such chunks,
            whatever else runs, so that an answer does not depend on the load.
        prefix_bytes: the most bytes of kept beginnings of prompts; 0 keeps none.
        deadline_s: the most seconds from a request's arrival to its last token.
    """

    max_sequences: int = 16
    queue: int = 64
    cache_bytes: int = 2**32
    prompt_chunk: int = 64
    prefix_bytes: int = 2**30
    deadline_s: float = 600.0


@dataclass(frozen=True)
class TokenInfo:
    """A token and the log-probability that the model gives it, before any sampling setting.

    Args:
        token: the token id.
        logprob: the natural logarithm of its probability.
        top: the likeliest tokens with their log-probabilities, likeliest first.
        offset: characters of the answer's text before this token's text; a special token has no text.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    offset: int = 0


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool that an answer makes.

    Args:
        id: what the tool's result refers to.
        name: the function.
        arguments: a JSON object, as text.
    """

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Piece:
    """The text that one step adds to an answer.

    Args:
        index: the number of the answer within its request.
        text: the text that later tokens cannot change.
        token: the token's log-probabilities, if the request asks for them.
        finish_reason: `stop`, `length`, `tool_calls`, or `None` while the answer continues.
        calls: calls of tools that are complete with this step; their text is no part of `text`.
    """

    index: int
    text: str
    token: TokenInfo | None
    finish_reason: str | None
    calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class Summary:
    """Token counts, settings and times of a finished request.

    Args:
        prompt_tokens: tokens of all prompts.
        cached_tokens: those of them that were known from earlier prompts.
        completion_tokens: tokens of all answers.
        drafted_tokens: tokens that lossless drafts named.
        accepted_tokens: those of them that were right.
        density: share of the FF neurons (with a token tier: of the FF bytes) that computed the answers.
        selection: how experts were selected; `full` at density 1.0.
        ff_bytes_per_token: bytes of FF weights read for each token.
        waited_s: seconds in the queue.
        prompt_s: seconds from leaving the queue to the first token.
        generation_tokens_per_s: tokens per second of one answer in its generation phase; other answers may have run in
            the same steps.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    density: float
    selection: str
    ff_bytes_per_token: int
    waited_s: float
    prompt_s: float
    generation_tokens_per_s: float


@dataclass(frozen=True)
class Activations:
    """What a request for activations gets instead of an answer.

    Args:
        values: relative activations of each token, as `griffin.analysis.flocking.relative_activations` gives them.

    Shapes:
        values: (S, D_ff), float32.
    """

    values: Tensor


Event = Piece | Summary | Activations | Exception


class Constraint(Protocol):
    """Decides which tokens one answer may go on with."""

    def masked(self, logits: Tensor) -> Tensor:
        """The logits (V,) with minus infinity for every token that may not come next."""

    def accept(self, token: int) -> None:
        """Go on after this token."""


@dataclass(eq=False)
class GenerationRequest:
    """Prompts to answer with one config.

    Args:
        prompts: the token ids of each prompt.
        config: which FF neurons to keep.
        sampling: how tokens are drawn; answer i of a prompt uses seed + i.
        n: the number of answers to each prompt.
        lossless: whether an answer is drafted while no other runs beside it; only of the full model.
        constraint: makes for each answer what decides which tokens may come next; `None` allows all.
        logprobs: how many of the likeliest tokens to report beside the drawn token; `None` reports none at all.
        emit: called in the engine's thread with every event; the last is a `Summary`, `Activations` or an exception.
        activations_of: a layer whose activations are wanted instead of answers.
    """

    prompts: Sequence[Sequence[int]]
    config: GriffinConfig
    sampling: Sampling
    emit: Callable[[Event], None]
    n: int = 1
    lossless: bool = False
    constraint: Callable[[], Constraint] | None = None
    logprobs: int | None = None
    activations_of: int | None = None
    cancelled: bool = False
    arrived_s: float = field(default_factory=time.monotonic)
    started_s: float = 0.0
    first_token_s: float = 0.0
    open_answers: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    ff_bytes: int = 0
    used: GriffinConfig | None = None

    def cancel(self) -> None:
        """Drop the request after the current step, as its client no longer waits."""
        self.cancelled = True
