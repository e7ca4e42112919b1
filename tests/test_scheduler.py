"""Whose turn it is among the server's prompts, by a clock of the test's own."""

from __future__ import annotations

from typing import Any

import pytest

from griffin.config import GriffinConfig
from griffin.engine.step import Sampling
from griffin.integrations.server.scheduler import Prompt, Scheduler
from griffin.integrations.server.types import FullError, GenerationRequest, Limits

CHUNK = 64


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Run:
    """Stands for a prompt on its way through the model."""

    def __init__(self, tokens: int) -> None:
        self.left = tokens


def prompt(clock: Clock, tokens: int, n: int = 1, nbytes: int = 1) -> Prompt:
    request = GenerationRequest(
        [[1] * tokens], GriffinConfig(), Sampling(), lambda event: None, n=n, arrived_s=clock.now
    )
    return Prompt(request, 0, nbytes)


def begun(scheduler: Scheduler, places: int = 99) -> None:
    """Admit all that fit."""
    while (admitted := scheduler.admit(places, 10**9)) is not None:
        admitted.prefill = Run(admitted.tokens)  # type: ignore[assignment]


def run_chunk(scheduler: Scheduler, clock: Clock, token_s: float = 0.02) -> Prompt | None:
    """Run a chunk; returns its prompt if that is done."""
    turn = scheduler.turn()
    assert turn is not None
    run: Any = turn.prefill
    tokens = min(CHUNK, run.left)
    run.left -= tokens
    clock.now += tokens * token_s
    scheduler.ran(tokens, tokens * token_s)
    if run.left:
        return None
    scheduler.remove(turn.request)
    return turn


def test_a_short_prompt_waits_for_one_chunk_of_a_long_one() -> None:
    clock = Clock()
    scheduler = Scheduler(Limits(), clock)
    scheduler.add([prompt(clock, 1500)])
    begun(scheduler)
    for _ in range(3):
        assert run_chunk(scheduler, clock) is None
    clock.now += 0.1
    short = prompt(clock, 30)
    clock.now += 0.5  # it comes in the middle of a chunk
    scheduler.add([short])
    begun(scheduler)
    assert run_chunk(scheduler, clock) is short


def test_a_long_prompt_is_not_overtaken_for_ever() -> None:
    clock = Clock()
    scheduler = Scheduler(Limits(queue=1000), clock)
    long = prompt(clock, 640)  # 12.8 s alone
    scheduler.add([long])
    done = None
    for _ in range(400):  # a short prompt comes as often as one can be run
        scheduler.add([prompt(clock, CHUNK)])
        begun(scheduler)
        done = run_chunk(scheduler, clock)
        if done is long:
            break
    assert done is long
    assert clock.now - long.request.arrived_s < 120  # seconds: a share of the time is its own all along


def test_half_a_deadline_makes_a_prompt_the_first() -> None:
    clock = Clock()
    scheduler = Scheduler(Limits(deadline_s=20.0), clock)
    long = prompt(clock, 5000)
    scheduler.add([long])
    clock.now += 10.5
    scheduler.add([prompt(clock, 10)])
    begun(scheduler)
    assert scheduler.turn() is long


def test_what_does_not_fit_is_not_overtaken_by_what_would() -> None:
    clock = Clock()
    scheduler = Scheduler(Limits(), clock)
    large = prompt(clock, 10, n=4, nbytes=100)
    scheduler.add([large])
    clock.now += 1
    scheduler.add([prompt(clock, 10)])
    assert scheduler.admit(places=3, nbytes=1000) is None
    assert scheduler.admit(places=9, nbytes=99) is None
    assert scheduler.admit(places=4, nbytes=100) is large


def test_a_full_queue_tells_each_client_its_own_time_by_what_it_has_measured() -> None:
    clock = Clock()
    scheduler = Scheduler(Limits(queue=10), clock)
    for _ in range(60):  # a prompt leaves the queue every 3 seconds
        scheduler.add([prompt(clock, 10)] * (10 - len(scheduler.waiting)))
        clock.now += 3
        assert scheduler.admit(1, 10**9) is not None
    scheduler.add([prompt(clock, 10)])
    told = []
    for _ in range(14):
        with pytest.raises(FullError, match="10 prompts are waiting") as refused:
            scheduler.add([prompt(clock, 10)])
        told.append(refused.value.retry_after_s)
    assert told == [3, 6, 9, 12, 15, 18, 21, 24, 27, *[30] * 5]
    clock.now += 30
    with pytest.raises(FullError) as refused:  # nothing has left since, so it takes longer than it did
        scheduler.add([prompt(clock, 10)])
    assert refused.value.retry_after_s == 30
