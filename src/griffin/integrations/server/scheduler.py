"""Which prompts wait, which run, and whose turn it is. Knows no model; the engine calls it with its lock held.

Prompts run in turns, a chunk at a time. The next turn is that of the prompt with the greatest *slowdown*: how long it
will have taken, compared with how long it would take alone. A short prompt loses more by waiting, so it overtakes a
long one after a chunk; a long one that has waited in proportion to its length is not overtaken any more.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from torch import Tensor

from griffin.engine.batch import Prefill
from griffin.integrations.server.types import FullError, GenerationRequest, Limits

_LEARNED = 0.2  # weight of the newest measurement in a moving average
_FIXED_S = 1.0  # seconds beside its prompt that a request takes in any case, for the comparison of slowdowns


class Prompt:
    """A prompt in the queue or in its prompt phase."""

    def __init__(self, request: GenerationRequest, number: int, nbytes: int) -> None:
        self.request, self.number, self.nbytes = request, number, nbytes
        self.tokens = len(request.prompts[number])  # to be run
        self.prefill: Prefill | None = None
        self.activations: list[Tensor] = []  # of the chunks so far, if the request asks for them

    @property
    def left(self) -> int:
        """Tokens that have not been run."""
        return self.tokens if self.prefill is None else self.prefill.left


class Scheduler:
    """The prompts of one engine.

    Args:
        limits: how many may wait, and how much may run.
        clock: seconds, increasing.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self.waiting: list[Prompt] = []
        self.running: list[Prompt] = []  # in their prompt phase
        self._token_s = 0.01  # seconds for a prompt token, learned from the chunks
        self._departure_s = 1.0  # seconds from one prompt's leaving the queue to the next, learned likewise
        self._departed = clock()  # when a prompt left the queue, or the queue began to form
        self._sent_back_until = 0.0  # when the last prompt that was refused has been told to come back

    def add(self, prompts: Sequence[Prompt]) -> None:
        """Put prompts into the queue.

        Raises:
            FullError: it has no room for them; the error says when it will.
        """
        if len(self.waiting) + len(prompts) > self._limits.queue:
            raise FullError(
                f"{len(self.waiting)} prompts are waiting, and the queue has {self._limits.queue} places",
                self._retry_after_s(len(prompts)),
            )
        if not self.waiting:
            self._departed = self._clock()
        self.waiting += prompts

    def admit(self, places: int, nbytes: int) -> Prompt | None:
        """Take the next prompt from the queue if it fits. A smaller one behind it does not overtake it for that.

        Args:
            places: answers that there is room for.
            nbytes: bytes of key/value memory that are free.
        """
        prompt = self._next(self.waiting)
        if prompt is None or prompt.request.n > places or prompt.nbytes > nbytes:
            return None
        self.waiting.remove(prompt)
        self.running.append(prompt)
        now = self._clock()
        self._departure_s += _LEARNED * (now - self._departed - self._departure_s)
        self._departed = now
        return prompt

    def turn(self) -> Prompt | None:
        """The prompt whose next chunk is run now."""
        return self._next(self.running)

    def ran(self, tokens: int, seconds: float) -> None:
        """Learn from a chunk that has been run, and the step of the running answers after it."""
        self._token_s += _LEARNED * (seconds / tokens - self._token_s)

    def remove(self, request: GenerationRequest) -> None:
        """Forget a request's prompts."""
        self.waiting = [prompt for prompt in self.waiting if prompt.request is not request]
        self.running = [prompt for prompt in self.running if prompt.request is not request]

    def _next(self, prompts: Sequence[Prompt]) -> Prompt | None:
        now = self._clock()

        def urgency(prompt: Prompt) -> tuple[bool, float]:
            waited = now - prompt.request.arrived_s
            alone = prompt.tokens * self._token_s + _FIXED_S
            late = waited > self._limits.deadline_s / 2  # it comes first, or it will not be finished in time
            return late, (waited + prompt.left * self._token_s + _FIXED_S) / alone

        return max(prompts, key=urgency, default=None)  # of equals the one that came first

    def _retry_after_s(self, prompts: int) -> int:
        """Seconds after which so many prompts will find room.

        Each client that is refused is told a later time, so that they do not all come back at once; the latest is when
        all that wait now will have left the queue.
        """
        now = self._clock()
        each = max(self._departure_s, now - self._departed)
        until = max(self._sent_back_until, now) + each * prompts
        self._sent_back_until = min(until, now + each * max(prompts, len(self.waiting)))
        return max(1, math.ceil(self._sent_back_until - now))
