"""Lossless speculation: drafts from the text so far, verified by one step of the full model over several tokens.

Row i of a step of several rows has the bits that the same token's own step gives. So a token is drawn from a verified
row exactly as from a step of its own: greedy answers and, with the same seed, drawn ones are those of generation
without drafts, token by token. A drawn token equals a draft x with probability p(x), and else comes from p without x:
this is speculative sampling (Leviathan et al., arXiv 2211.17192) for a draft that is certain of its tokens.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache

from griffin.engine.cache import BufferedCache
from griffin.engine.decoders import Decoder, NativeStep
from griffin.engine.lookup import Candidate, Lookup

MOST_DRAFTED = 10  # tokens
_LEAST_GAIN = 1.05  # expected of a draft, in plain steps a step
_MOST_LOST = 1.5  # plain steps that drafts may lose before they are switched off
_MOST_SAVED = 3.0  # plain steps saved that count against later losses
_PAUSE = 128  # tokens of the first time without drafts; each further one is twice as long
_REMEMBERED = 256  # tokens after which a measured time is forgotten
_SLOPE = 0.2  # of V(m), before anything is measured


class Costs:
    """V(m): the time of a step of m tokens over that of one token, both as measured lately."""

    def __init__(self) -> None:
        self.plain: float | None = None
        """Seconds of a step of one token; `None` before two were measured, as the first is no measure."""
        self._plain: deque[float] = deque(maxlen=15)  # seconds
        self._times: dict[int, deque[tuple[float, int]]] = {}  # by m: seconds over a plain step's, and when
        self._known: dict[int, float] = {1: 1.0}  # by m: the median of these
        self._now = 0

    def add(self, rows: int, seconds: float) -> float:
        """A step of so many tokens took so long; returns how many plain steps that is."""
        if rows == 1 or self.plain is None:
            self._plain.append(seconds)
            if len(self._plain) > 1:
                self.plain = statistics.median(self._plain) if len(self._plain) > 2 else min(self._plain)
            return 1.0
        steps = min(seconds / self.plain, 2.0 * rows)  # more is another process's time
        times = self._times.setdefault(rows, deque(maxlen=7))
        times.append((steps, self._now))
        self._known[rows] = statistics.median(time for time, _ in times)
        return steps

    def pass_token(self) -> None:
        """A token was generated: times that are too old are forgotten."""
        self._now += 1
        if self._now % 32:
            return
        for rows, times in list(self._times.items()):
            while times and self._now - times[0][1] > _REMEMBERED:
                times.popleft()
            if not times:
                del self._times[rows], self._known[rows]

    def of(self, rows: int) -> float:
        """V(rows): the median of what was measured, else along the line between the nearest that were."""
        known = self._known
        if rows in known:
            return known[rows]
        below = max(m for m in known if m < rows)
        above = min((m for m in known if m > rows), default=None)
        if above is not None:
            share = (rows - below) / (above - below)
            return known[below] + share * (known[above] - known[below])
        slope = _SLOPE if below == 1 else max((known[below] - 1) / (below - 1), 0.0)
        return known[below] + slope * (rows - below)


class Acceptance:
    """How often the token after a match is the right one, by the match's length: from every token that comes."""

    _LENGTHS = (2, 3, 4, 6, 9, 17)  # shortest match of each class
    _BEFORE = (0.25, 0.35, 0.5, 0.65, 0.75, 0.85)  # what is supposed before there are observations
    _WEIGHT = 3.0  # of that, in observations
    _KEPT = 0.95  # of the weight of older observations, at each new one

    def __init__(self) -> None:
        self._right = [share * self._WEIGHT for share in self._BEFORE]
        self._all = [self._WEIGHT] * len(self._BEFORE)

    def add(self, match: int, right: bool) -> None:
        """The token after a match of this length was right or not."""
        of = self._class(match)
        self._right[of] = self._KEPT * self._right[of] + right
        self._all[of] = self._KEPT * self._all[of] + 1

    def of(self, match: int) -> float:
        """The probability that the token after a match of this length is right."""
        of = self._class(match)
        return self._right[of] / self._all[of]

    def _class(self, match: int) -> int:
        return sum(match >= least for least in self._LENGTHS) - 1


class Lossless:
    """When and how much to draft, and what came of it. For one generation.

    A draft has the length with the largest expected number of tokens per time. It is left out where that is hardly
    more than one plain step gives. Where drafts have lost time nevertheless they are switched off, and tried again
    later.

    Args:
        most: most tokens to draft for one step, 1 to 15.

    Raises:
        ValueError: `most` is out of its range.
    """

    def __init__(self, most: int = MOST_DRAFTED) -> None:
        if not 1 <= most <= 15:
            raise ValueError(f"most is {most}; expected 1 to 15 drafted tokens")
        self._most = most
        self._costs, self._acceptance = Costs(), Acceptance()
        self._saved = 0.0  # plain steps, of the drafts since they were switched on; at most _MOST_SAVED
        self._pause, self._left = _PAUSE, 0  # tokens without drafts: of the next pause, and of this one
        self._since = (0, 0)  # drafted and accepted, when they were switched on
        self._never: str | None = None
        self._because: str | None = None
        self.drafted = 0
        """Tokens that were drafted and verified."""
        self.accepted = 0
        """Drafted tokens that were right."""
        self.verifies = 0
        """Steps that verified drafts."""

    @property
    def off(self) -> str | None:
        """Why drafts are switched off now; `None` while they are on."""
        return self._never or (self._because if self._left else None)

    @property
    def acceptance(self) -> float | None:
        """Share of the drafted tokens that were right; `None` before the first draft."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_verify(self) -> float | None:
        """Tokens that a step with a draft gave, its own one included; `None` before the first draft."""
        return 1 + self.accepted / self.verifies if self.verifies else None

    def over(self, decoder: Decoder, cache: Cache, ids: Sequence[int], most_tokens: int) -> Decoder:
        """A decoder of one sequence that gives what this one gives, with drafts.

        Args:
            decoder: the sequence's decoder, of the full model.
            cache: its keys and values.
            ids: its tokens, all that are in the cache.
            most_tokens: how many more may be generated; nothing is drafted beyond them.
        """
        if isinstance(decoder, NativeStep) and isinstance(cache, BufferedCache):
            return _Ahead(self, decoder, cache, ids, most_tokens)
        self._never = (
            "the generation step is the model's own forward, whose rows are not bit for bit those of single steps"
        )
        return decoder

    def length(self, candidate: Candidate | None, most: int) -> int:
        """How many tokens of a candidate to draft now; 0: none."""
        if candidate is None or self._left or self._costs.plain is None:
            return 0
        best, length = _LEAST_GAIN, 0
        tokens = likely = 1.0
        for count in range(1, min(most, self._most) + 1):
            likely *= self._acceptance.of(candidate.match + count - 1)
            tokens += likely
            if (gain := tokens / self._costs.of(count + 1)) > best:
                best, length = gain, count
        return length

    def ran(self, rows: int, seconds: float) -> None:
        """A step of so many rows took so long."""
        steps = self._costs.add(rows, seconds)
        if rows > 1:
            self.verifies += 1
            self.drafted += rows - 1
            self._saved += 1 - steps

    def accept(self) -> None:
        """A drafted token was right: a step saved."""
        self.accepted += 1
        self._saved += 1

    def judge(self) -> None:
        """A draft is used up: switch off if drafts have lost too much."""
        self._saved = min(self._saved, _MOST_SAVED)
        if self._saved < -_MOST_LOST:
            self._switch_off()

    def see(self, guess: tuple[int, int] | None, token: int) -> None:
        """A token came; `guess`: the match before it, and the token that followed that."""
        self._costs.pass_token()
        if guess is not None:
            self._acceptance.add(guess[0], guess[1] == token)
        if self._left:
            self._left -= 1

    def _switch_off(self) -> None:
        drafted, accepted = self.drafted - self._since[0], self.accepted - self._since[1]
        self._because = (
            f"drafts cost more than they saved: {accepted} of {drafted} drafted tokens were right, and a step of 4 "
            f"tokens takes {self._costs.of(4):.1f} times as long as one of 1"
        )
        self._left, self._pause = self._pause, 2 * self._pause
        self._saved, self._since = 0.0, (self.drafted, self.accepted)


class Drafts:
    """Lossless drafts of a sequence that is alone at some steps, and at others runs beside sequences.

    Args:
        ids: its tokens, all that are in the cache.
        most_tokens: how many more may be generated.
    """

    def __init__(self, ids: Sequence[int], most_tokens: int) -> None:
        self.policy = Lossless()
        self._ids, self._room = list(ids), len(ids) + most_tokens

    def over(self, decoder: Decoder, cache: Cache) -> Decoder:
        """A decoder of the sequence alone that gives what this one gives; see `Lossless.over`."""
        return self.policy.over(decoder, cache, self._ids, self._room - len(self._ids) - 1)

    def ran(self, token: int) -> None:
        """A step, of whichever decoder, has appended this token's keys and values."""
        self._ids.append(token)


class _Ahead:
    """A native step that also runs drafts, and hands out their logits when the drawn tokens turn out to be these.

    Between calls the cache holds exactly the tokens that were passed in: drafted ones lie behind its end, and are
    taken in one by one, or overwritten.
    """

    def __init__(
        self, policy: Lossless, step: NativeStep, cache: BufferedCache, ids: Sequence[int], most_tokens: int
    ) -> None:
        self._policy, self._step, self._cache = policy, step, cache
        self._lookup = Lookup(ids)
        self._left = most_tokens
        self._drafted: list[int] = []  # and not passed in yet
        self._logits: list[Tensor] = []  # of each of them, (1, V)
        self._behind = (0, 0)  # the cache's length and buffers that these are valid for
        self._guess: tuple[int, int] | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        """See `Decoder`."""
        token = int(tokens)
        policy, lookup = self._policy, self._lookup
        policy.see(self._guess, token)
        lookup.add(token)
        candidate = lookup.candidate()
        self._guess = None if candidate is None else (candidate.match, lookup.ids[candidate.next])
        remaining, self._left = self._left, self._left - 1
        if self._drafted and self._drafted[0] == token and self._behind == self._place():
            self._cache.advance()
            policy.accept()
            return self._take()
        if self._logits:
            self._drafted, self._logits = [], []
            policy.judge()
        count = policy.length(candidate, remaining - 1)
        drafted = lookup.draft(candidate, count) if candidate is not None else []
        before = self._cache.length
        start = time.perf_counter()
        rows = self._step.rows(torch.tensor([token, *drafted]))
        policy.ran(1 + len(drafted), time.perf_counter() - start)
        self._cache.cut(before + 1)
        self._drafted, self._logits = [token, *drafted], list(torch.split(rows, 1))
        return self._take()

    def _take(self) -> Tensor:
        self._drafted.pop(0)
        logits = self._logits.pop(0)
        self._behind = self._place()
        if not self._logits:
            self._policy.judge()
        return logits

    def _place(self) -> tuple[int, int]:
        return self._cache.length, self._cache.replaced
