"""Rows of benchmarks/gpu.py, printed and written as they come, and its clock."""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

_COLUMNS = ("section", "shape", "what", "density", "batch", "value", "unit", "note")


class Report:
    """Prints rows and writes them as CSV, each at once: what was measured stays if something fails later.

    Args:
        path: the CSV.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", newline="", encoding="utf-8")
        self._csv = csv.DictWriter(self._file, _COLUMNS)
        self._csv.writeheader()

    def add(
        self, section: str, what: str, value: float | str, unit: str = "", *, shape: str = "",
        density: float | None = None, batch: int | None = None, note: str = "",
    ) -> None:  # fmt: skip
        """A row."""
        number = f"{value:.4g}" if isinstance(value, float) else str(value)
        row = {"section": section, "shape": shape, "what": what, "density": "" if density is None else density,
               "batch": "" if batch is None else batch, "value": number, "unit": unit, "note": note}  # fmt: skip
        self._csv.writerow(row)
        self._file.flush()
        place = " ".join(
            part for part in (shape, f"d={density}" if density else "", f"B={batch}" if batch else "") if part
        )
        print(f"{section:12} {place:26} {what:34} {number:>10} {unit} {note}".rstrip(), flush=True)


class Clock:
    """Times calls; on a GPU as a captured graph, so that launches are not what is timed.

    Args:
        device: the device.
        tiny: one repeat, for tests.
        minutes: when the benchmark has to be over.
    """

    def __init__(self, device: torch.device, tiny: bool, minutes: float) -> None:
        self._device, self.tiny = device, tiny
        self._repeats = 1 if tiny else 20
        self._end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        """Seconds until then."""
        return self._end - time.monotonic()

    def seconds(self, call: Callable[[], object]) -> float:
        """Median seconds of a call."""
        if self._device.type != "cuda":
            if not self.tiny:
                call()
            return statistics.median(self._timed(call) for _ in range(self._repeats))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        graph.replay()
        return statistics.median(self._events(graph.replay) for _ in range(self._repeats))

    def wall(self, call: Callable[[], object]) -> float:
        """Seconds of one call, until the device has done it."""
        self.wait()
        return self._timed(lambda: (call(), self.wait()))

    def wait(self) -> None:
        """Until the device has done everything."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def _timed(self, call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def _events(self, call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
