"""Stop texts found in a text that grows, in time linear in the text however long the stop texts are.

Source: Knuth, Morris and Pratt, Fast Pattern Matching in Strings (1977). Each stop text has a state: how many of its
characters the text ends with. The table of borders is made no further than a state has come.
"""

from __future__ import annotations

from collections.abc import Sequence


class Stops:
    """Finds the stop texts of one answer.

    Special tokens are written into the text but not shown. A stop text is looked for in the text as it is shown, and in
    the text as it is written, there with each special token as a whole.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._of_shown = [_Matcher(stop) for stop in stops]
        self._of_written: list[_Matcher] | None = None  # from the first special token on; before, they are the same
        self._shown = self._written = 0  # characters so far
        self._hidden: list[range] = []  # where special tokens are in the written text
        self._forgotten = 0  # characters of special tokens so far back that none of them is in `_hidden` any more

    def feed(self, text: str, *, shown: bool) -> int | None:
        """Take the next text, which is a special token if it is not shown.

        Returns:
            The number of shown characters before the first stop text that ends in `text`; `None` if none does.
        """
        if not text:
            return None
        if not shown and self._of_written is None:
            self._of_written = [matcher.copy() for matcher in self._of_shown]
        starts = []
        if shown:
            starts = [self._shown + start for matcher in self._of_shown for start, _ in matcher.feed(text)]
            self._shown += len(text)
        else:
            self._hidden.append(range(self._written, self._written + len(text)))
        before, self._written = self._written, self._written + len(text)
        for matcher in self._of_written or ():
            for start, end in matcher.feed(text):
                whole = shown or end == len(text)
                if whole and not any(before + start in span[1:] for span in self._hidden):
                    starts.append(self._shown_before(before + start))
        return min(starts, default=None)

    @property
    def held(self) -> int:
        """The number of last shown characters that may be the beginning of a stop text."""
        held = max((matcher.state for matcher in self._of_shown), default=0)
        if self._of_written is None:
            return held
        first = self._written - max(matcher.state for matcher in self._of_written)
        while self._hidden and self._hidden[0].stop <= first:
            self._forgotten += len(self._hidden.pop(0))
        return max(held, self._shown - self._shown_before(first))

    def _shown_before(self, place: int) -> int:
        """Shown characters before a place of the written text."""
        return place - self._forgotten - sum(len(range(span.start, min(place, span.stop))) for span in self._hidden)


class _Matcher:
    """One stop text, and how much of its beginning the text ends with."""

    def __init__(self, stop: str) -> None:
        self._stop = stop
        self._borders = [0, 0]  # by length: the longest shorter beginning with which the beginning so long ends
        self.state = 0

    def copy(self) -> _Matcher:
        """Another in the same state."""
        other = _Matcher(self._stop)
        other._borders, other.state = self._borders, self.state
        return other

    def feed(self, text: str) -> list[tuple[int, int]]:
        """Start and end, counted from the beginning of `text`, of each occurrence that ends in `text`."""
        stop, borders, state = self._stop, self._borders, self.state
        found = []
        for end, character in enumerate(text, 1):
            while state and stop[state] != character:
                state = borders[state]
            if stop[state] == character:
                state += 1
                if state == len(borders):
                    self._extend()
                if state == len(stop):
                    found.append((end - state, end))
                    state = borders[state]
        self.state = state
        return found

    def _extend(self) -> None:
        stop, borders = self._stop, self._borders
        length = len(borders)
        border = borders[length - 1]
        while border and stop[border] != stop[length - 1]:
            border = borders[border]
        borders.append(border + (stop[border] == stop[length - 1]))
