"""Requests to the engine, their limits, and the events that the engine sends back."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from griffin.config import GriffinConfig
from griffin.engine.step import Sampling


class FullError(Exception):
    """The queue is full."""


class LateError(Exception):
    """A request was not finished in time."""


class StoppedError(Exception):
    """The server is stopping."""


@dataclass(frozen=True)
class Limits:
    """What the engine takes on.

    Args:
        places: most answers at a time.
        queue: most prompts that wait.
        cache_bytes: most bytes of keys and values, of all answers together.
        prompt_chunk: prompt tokens between two steps of the running answers.
        seconds: most seconds from a request's arrival to its last token.
    """

    places: int = 16
    queue: int = 64
    cache_bytes: int = 2**32
    prompt_chunk: int = 64
    seconds: float = 600.0


@dataclass(frozen=True)
class TokenInfo:
    """A token and how likely the model found it, before any sampling setting.

    Args:
        token: its id.
        logprob: natural logarithm of its probability.
        top: the likeliest tokens with theirs, likeliest first.
        offset: characters of the answer's text before the token's own; a special token has none.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    offset: int = 0


@dataclass(frozen=True)
class Piece:
    """What a step adds to an answer.

    Args:
        index: which of the request's answers.
        text: the text that is certain now.
        token: the token, if the request wants to know how likely it was.
        finish_reason: `stop`, `length`, or `None` while it goes on.
    """

    index: int
    text: str
    token: TokenInfo | None
    finish_reason: str | None


@dataclass(frozen=True)
class Summary:
    """What a whole request took.

    Args:
        prompt_tokens: of all its prompts.
        completion_tokens: of all its answers.
        density: share of the FF neurons (with a token tier: bytes) that its answers were computed with.
        selection: how experts were selected; `full` at density 1.0.
        ff_bytes_per_token: bytes of FF weights that a token reads.
        waited_s: seconds in the queue.
        prompt_s: seconds from there to the first token.
        generation_tokens_per_s: of one answer, in its generation phase, while others may have run beside it.
    """

    prompt_tokens: int
    completion_tokens: int
    density: float
    selection: str
    ff_bytes_per_token: int
    waited_s: float
    prompt_s: float
    generation_tokens_per_s: float


Event = Piece | Summary | Exception


@dataclass(eq=False)
class GenerationRequest:
    """Prompts to be answered with one config.

    Args:
        prompts: token ids of each.
        config: what to keep.
        sampling: how tokens are drawn; answer i of a prompt is drawn with seed + i.
        n: answers of each prompt.
        logprobs: how many of the likeliest tokens to tell; `None`: not even the one that was drawn.
        emit: called in the engine's thread with every event; the last is a `Summary` or an exception.
    """

    prompts: Sequence[Sequence[int]]
    config: GriffinConfig
    sampling: Sampling
    emit: Callable[[Event], None]
    n: int = 1
    logprobs: int | None = None
    cancelled: bool = False
    arrived_s: float = field(default_factory=time.monotonic)
    started_s: float = 0.0
    first_s: float = 0.0
    open_answers: int = 0
    completion_tokens: int = 0
    ff_bytes: int = 0
    used: GriffinConfig | None = None

    def cancel(self) -> None:
        """Nobody waits for the answer any more: its places are free after the present step."""
        self.cancelled = True
