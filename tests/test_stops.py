"""Stop texts in a text that grows, against a plain search of the whole text after every piece."""

from __future__ import annotations

import time

from hypothesis import given, settings
from hypothesis import strategies as st

from griffin.generation.stops import Stops

Runs = list[tuple[str, bool]]  # pieces of text, and whether each is shown

_runs = st.lists(st.one_of(st.tuples(st.text("ab", min_size=1, max_size=4), st.just(True)),
                           st.tuples(st.sampled_from(["ba", "<ab>"]), st.just(False))), max_size=14)  # fmt: skip
_stops = st.lists(st.text("ab<>", min_size=1, max_size=6), min_size=1, max_size=3)


def naive_start(runs: Runs, stops: list[str]) -> int | None:
    """Shown characters before the first stop text in a whole text."""
    shown = "".join(text for text, visible in runs if visible)
    starts = [at for stop in stops if (at := shown.find(stop)) >= 0]
    written = "".join(text for text, _ in runs)
    places, inside = [], set()  # shown characters before each written one; places inside of a special token
    for text, visible in runs:
        inside |= set() if visible else set(range(len(places) + 1, len(places) + len(text)))
        done = places[-1][1] if places else 0
        places += [(done + (at if visible else 0), done + (at + 1 if visible else 0)) for at in range(len(text))]
    for stop in stops:
        ends = range(len(stop), len(written) + 1)
        begins = [end - len(stop) for end in ends if inside.isdisjoint((end - len(stop), end))]
        starts += [places[at][0] for at in begins if written.startswith(stop, at)]
    return min(starts, default=None)


def naive_held(text: str, stop: str) -> int:
    return max((n for n in range(1, min(len(text) + 1, len(stop))) if text.endswith(stop[:n])), default=0)


@settings(max_examples=400, deadline=None)
@given(_runs, _stops)
def test_stops_are_found_where_a_plain_search_finds_them(runs: Runs, stops: list[str]) -> None:
    matcher = Stops(stops)
    for count, (text, visible) in enumerate(runs, 1):
        start = matcher.feed(text, shown=visible)
        assert start == naive_start(runs[:count], stops)
        if start is not None:
            return
        shown = "".join(piece for piece, was in runs[:count] if was)
        written = "".join(piece for piece, _ in runs[:count])
        assert matcher.held >= max(naive_held(shown, stop) for stop in stops)
        if shown == written:
            assert matcher.held == max(naive_held(shown, stop) for stop in stops)


def test_the_time_is_linear_in_the_text_whatever_the_stop_texts_hold_back() -> None:
    def seconds(length: int) -> float:
        stops = Stops(["a" * length + str(number) for number in range(16)])
        start = time.process_time()
        for _ in range(length // 4):
            assert stops.feed("aaaa", shown=True) is None
        assert stops.held == length
        return time.process_time() - start

    short, long = min(seconds(1000) for _ in range(3)), min(seconds(8000) for _ in range(3))
    assert long < 24 * short  # 8 times the text: linear is 8, quadratic 64
