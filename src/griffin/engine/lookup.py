"""Prompt lookup: what may follow a text, copied from where its end occurred before.

A. Saxena, Prompt Lookup Decoding, 2023 (github.com/apoorvumang/prompt-lookup-decoding): no second model, and right
where an answer repeats its prompt or itself, as edited code, quotations and lists do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

_SHORTEST = 2  # tokens of the text's end that must have occurred before
_LONGEST = 32  # longer matches are not told apart
_OCCURRENCES = 32  # latest occurrences of the last tokens that are compared


class Candidate(NamedTuple):
    """Where the text's end occurred before.

    Args:
        match: how many of its last tokens, 2 to 32.
        next: position of the token that followed.
    """

    match: int
    next: int


class Lookup:
    """A text of tokens, and where its end occurred in it before.

    Args:
        ids: the text so far.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids: list[int] = []
        self._after: dict[tuple[int, ...], list[int]] = {}  # what follows an n-gram of _SHORTEST, ascending
        for token in ids:
            self.add(token)

    def add(self, token: int) -> None:
        """The text goes on with this token."""
        end = len(self.ids)
        if end >= _SHORTEST:  # noted when its next token is known, so that the text's end does not find itself
            self._after.setdefault(tuple(self.ids[end - _SHORTEST :]), []).append(end)
        self.ids.append(token)

    def candidate(self) -> Candidate | None:
        """The longest earlier occurrence of the text's end, of equally long ones the latest; `None`: there is none."""
        ids, best = self.ids, None
        for after in reversed(self._after.get(tuple(ids[-_SHORTEST:]), ())[-_OCCURRENCES:]):
            match = _SHORTEST
            while match < min(after, _LONGEST) and ids[after - match - 1] == ids[-match - 1]:
                match += 1
            if best is None or match > best.match:
                best = Candidate(match, after)
                if match == _LONGEST:
                    break
        return best

    def draft(self, candidate: Candidate, count: int) -> list[int]:
        """So many tokens from a candidate on; one that overlaps the text's end is continued with itself."""
        drafted: list[int] = []
        for at in range(candidate.next, candidate.next + count):
            drafted.append(self.ids[at] if at < len(self.ids) else drafted[at - len(self.ids)])
        return drafted
