"""Seconds that /health takes beside each attack of test_attacks.py, by a server of a real model.

    python tests/attack_times.py [-m MODEL] [-o FILE.csv]

The goal is 50 ms. The machine should do nothing else; that the attack itself and the one who asks share it with the
server is part of the figure.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import test_attacks as attacks
from griffin.analysis import files
from griffin.analysis.machine import machine, versions
from test_server import process

GOAL_S = 0.05


def idle(url: str) -> None:
    """No attack."""
    with attacks.health_timed(url) as seconds:
        attacks.until(lambda: len(seconds) > 50)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="smollm2-135m")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    made: dict[str, Callable[[str], None]] = {"none": idle}
    made["the first answer of a form"] = attacks.test_health_beside_the_first_answer_of_a_form
    rounds = dict.fromkeys(attacks.ATTACKS, 5)  # these are over in no time
    made |= {name: partial(attacks.test_health_beside_a_body_that_is_refused, name=name) for name in attacks.ATTACKS}
    made["texts tokenised at once"] = attacks.test_health_beside_texts_that_are_tokenised_at_once
    made["flocking pictures and a stream"] = attacks.test_health_and_a_stream_beside_flocking_pictures
    made["stop texts that hold everything back"] = attacks.test_health_beside_stop_texts_that_hold_everything_back
    taken: list[float] = []
    timed = attacks.health_timed

    @contextlib.contextmanager
    def recorded(url: str) -> Iterator[list[float]]:
        with timed(url) as seconds:
            try:
                yield seconds
            finally:
                taken.extend(seconds)

    attacks.health_timed = recorded
    rows = []
    with process(args.model, "--queue", "8", "--allowed-hosts", "*") as (_, url):
        for name, attack in made.items():
            failure = ""
            taken.clear()
            for _ in range(rounds.get(name, 1)):
                try:
                    attack(url)
                except AssertionError as error:
                    failure = f"; FAILED: {str(error)[:200]}"
            late = sum(each > GOAL_S for each in taken)
            middle, slowest = statistics.median(taken), max(taken)
            print(
                f"{name:37s} {len(taken):4d} times, median {1000 * middle:5.1f} ms, most {1000 * slowest:6.1f} ms, "
                f"{late} over {1000 * GOAL_S:.0f}{failure}",
                flush=True,
            )
            row = {"model": args.model, "attack": name, "samples": len(taken), "median_s": middle, "most_s": slowest}
            rows.append({**row, "over_goal": late})
    if args.output is not None:
        files.write_text(args.output, files.csv_text(rows, machine(), versions()))
    return int(any(row["over_goal"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
