"""llama.cpp's programs, each a process of its own; see `compare_llamacpp.py`."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from griffin.errors import GriffinError

CONTEXT = 1024  # tokens; by default llama.cpp has memory for the model's whole context
BUSY_SHARE = 0.05  # of a core that this process may take while llama.cpp has its turn
VARIATION = 1.5  # of llama.cpp's rounds, from which on it is told: beside other load it collapses
_WATCH_S = 0.02
_LOADED = re.compile(r"^(\d+)\.(\d+)\.(\d+)\.(\d+) I generate: n_ctx", re.MULTILINE)  # minutes, s, ms, us
_ESTIMATE = re.compile(r"Final estimate: PPL = ([0-9.]+) \+/- ([0-9.]+)")


@dataclass(frozen=True)
class Done:
    """A process that ended well.

    Args:
        stdout, stderr: what it wrote.
        first_output_s: seconds from its start to its first byte on stdout.
        peak_rss_bytes: peak memory in use, mapped files included; `None` where the system does not report it.
    """

    stdout: str
    stderr: str
    first_output_s: float
    peak_rss_bytes: int | None


@dataclass(frozen=True)
class Start:
    """From nothing to an answer, in a process of its own.

    Args:
        load_s: seconds that loading took.
        first_token_s: seconds from the start of the process to the first token.
        peak_rss_bytes: see `Done`.
    """

    load_s: float
    first_token_s: float
    peak_rss_bytes: int | None


@dataclass
class LlamaBench:
    """llama-bench as a process of its own for every measurement, after its own warm-up and without the load time."""

    path: Path
    threads: int
    build: str = "unknown"
    prompt: list[float] = field(default_factory=list)
    generation: list[float] = field(default_factory=list)

    def measure_prompt(self, file: Path, tokens: int) -> None:
        """Measure the prompt phase once."""
        self.prompt.append(self._tokens_per_s(file, "-p", tokens, "-n", 0))

    def measure_generation(self, file: Path, tokens: int, prompt_tokens: int) -> None:
        """Measure the generation phase once, after a prompt of this length."""
        self.generation.append(self._tokens_per_s(file, "-p", 0, "-n", tokens, "-d", prompt_tokens))

    def tell_variation(self) -> None:
        """Warn of a machine that was not quiet."""
        for phase, speeds in (("prompt", self.prompt), ("generation", self.generation)):
            if max(speeds) > VARIATION * min(speeds):
                print(
                    f"warning: llama.cpp's rounds of the {phase} phase went from {min(speeds):.1f} to "
                    f"{max(speeds):.1f} tokens/s: this machine was not quiet, and llama.cpp suffers more from that "
                    "than griffin",
                    file=sys.stderr,
                )

    def _tokens_per_s(self, file: Path, *what: str | int) -> float:
        begin, own = time.perf_counter(), time.process_time()
        done = watched([self.path, "-m", file, *what, "-t", self.threads, "-r", 1, "-o", "json"])
        busy = (time.process_time() - own) / (time.perf_counter() - begin)
        try:
            (result,) = json.loads(done.stdout)
            self.build = f"b{result['build_number']} ({result['build_commit']})"
            speed = float(result["avg_ts"])
        except (ValueError, KeyError) as error:
            raise GriffinError(f"llama-bench measured nothing: {_last_line(done.stderr)}") from error
        if busy > BUSY_SHARE:
            raise GriffinError(
                f"this process took {busy:.0%} of a core in llama.cpp's turn: the comparison is not fair"
            )
        return speed


def start(bench: LlamaBench, file: Path, prompt: str, tokens: int) -> Start:
    """Load a file and answer a prompt with llama-completion, without its warm-up."""
    options = ["-n", tokens, "-c", CONTEXT, "-t", bench.threads, "--temp", 0, "--ignore-eos", "--no-warmup"]
    command = [bench.path.with_name("llama-completion"), "-m", file, "-p", prompt, *options]
    done = watched([*command, "-no-cnv", "--no-display-prompt", "--log-timestamps", "-lv", 4])
    loaded = _LOADED.search(done.stderr)  # what it calls its load time includes the prompt phase where nothing warms up
    if loaded is None:
        raise GriffinError(f"llama-completion did not tell when it had loaded: {_last_line(done.stderr)}")
    minutes, seconds, milliseconds, _ = map(int, loaded.groups())
    return Start(60 * minutes + seconds + milliseconds / 1e3, done.first_output_s, done.peak_rss_bytes)


def perplexity(
    bench: LlamaBench, file: Path, text: Path, window: int, windows: int, logits: Path
) -> tuple[float, float]:
    """Perplexity by llama-perplexity, and its standard error; `logits` gets the windows and their distributions."""
    told = watched([bench.path.with_name("llama-perplexity"), "--version"])
    bench.build = (told.stdout + told.stderr).strip().splitlines()[0]
    options = ["-c", window, "--chunks", windows, "-t", bench.threads, "--no-escape", "--save-all-logits", logits]
    done = watched([bench.path.with_name("llama-perplexity"), "-m", file, "-f", text, *options])
    estimate = _ESTIMATE.search(done.stdout + done.stderr)
    if estimate is None:
        raise GriffinError(f"llama-perplexity measured nothing: {_last_line(done.stderr)}")
    return float(estimate[1]), float(estimate[2])


def watched(command: Sequence[object]) -> Done:
    """Run a program to its end.

    Raises:
        GriffinError: it cannot be run, or it failed.
    """
    words = list(map(str, command))
    name = Path(words[0]).name
    begin = time.perf_counter()
    try:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=False
        )
    except OSError as error:
        raise GriffinError(f"{words[0]} cannot be run: {error.strerror}; expected a program of llama.cpp") from error
    peaks: list[int] = []
    errors: list[bytes] = []
    watchers = [
        threading.Thread(target=_watch_memory, args=(process, peaks)),
        threading.Thread(target=lambda: errors.append(process.stderr.read())),  # type: ignore[union-attr]
    ]
    for watcher in watchers:
        watcher.start()
    assert process.stdout is not None
    first = process.stdout.read(1)
    first_output_s = time.perf_counter() - begin
    output = first + process.stdout.read()
    code = process.wait()
    for watcher in watchers:
        watcher.join()
    stderr = errors[0].decode(errors="replace")
    if code < 0:
        raise GriffinError(f"{name} died of {signal.Signals(-code).name}; with AMX see the head of compare_llamacpp.py")
    if code > 0:
        raise GriffinError(f"{name} failed with exit code {code}: {_last_line(stderr)}")
    return Done(output.decode(errors="replace"), stderr, first_output_s, max(peaks, default=None))


def _watch_memory(process: subprocess.Popen[bytes], peaks: list[int]) -> None:
    """The system's own peak: what `wait4` reports would include this process's, from before the other began."""
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        try:
            lines = status.read_text(encoding="utf-8").splitlines()
        except OSError:
            return
        peaks += [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
        time.sleep(_WATCH_S)


def _last_line(text: str) -> str:
    return (text.strip() or "it told nothing").splitlines()[-1]
