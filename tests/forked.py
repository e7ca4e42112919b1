"""A `griffin` process that starts at once, forked off a process that has imported what its commands import.

These imports take five seconds. Tests of a process's streams, signals and exit code do not wait for them; tests of its
start run Python.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Self

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        *(f"griffin.cli.commands.{name}" for name in ("generate", "serve", "sweep")),
        *("griffin.generation.generate", "griffin.models.load", "griffin.integrations.server.run"),
        *("griffin.analysis.jobs", "griffin.analysis.sweep", "transformers.models.llama.modeling_llama"),
    ]
)


class Griffin:
    """As much of `subprocess.Popen` as the tests use; its streams are pipes, or null."""

    stdout: TextIOWrapper
    stderr: TextIOWrapper

    def __init__(self, words: Sequence[str], *pipes: str, **environment: str) -> None:
        ends: dict[str, Connection] = {}
        for name in pipes:
            reader, ends[name] = _CONTEXT.Pipe(duplex=False)
            setattr(self, name, os.fdopen(os.dup(reader.fileno()), encoding="utf-8"))
            reader.close()
        self._process = _CONTEXT.Process(target=_main, args=(list(words), ends, {**os.environ, **environment}))
        self._process.start()
        self._open = [getattr(self, name) for name in pipes]
        for end in ends.values():
            end.close()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("griffin", timeout or 0.0)
        return self._process.exitcode

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in self._open:
            stream.close()
        self.wait()


def _main(words: list[str], ends: dict[str, Connection], environment: dict[str, str]) -> None:
    """In the process: as if Python had been started with these words."""
    from griffin.cli import main

    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
    os.environ.clear()
    os.environ.update(environment)
    null = os.open(os.devnull, os.O_RDWR)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.dup2(ends[name].fileno() if name in ends else null, number)
        setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))
    sys.stderr.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    for end in ends.values():
        end.close()
    sys.exit(main(words))
