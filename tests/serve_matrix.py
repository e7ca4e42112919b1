"""Every combination of weights, backend and selection that griffin serve offers: it starts and answers, or says
why not.

    python tests/serve_matrix.py [-m MODEL] [--weights LIST] [--backends LIST] [--selections LIST]

Each is a server of its own, asked for an answer, a stream, and an answer by another selection. Takes a quarter of an
hour; `tests/test_serve_matrix.py` does a sample of it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import re
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from forked import Griffin
from griffin.config import BACKENDS
from griffin.methods import METHODS

# By name: flags of the model. `gguf` is a quantised file, whose weights stay as they are stored.
WEIGHTS = {
    "f32": ("--dtype", "f32"),
    "bf16": ("--dtype", "bf16"),
    "int8": ("--weights", "int8"),
    "int4": ("--weights", "int4"),
    "gguf": (),
}
SELECTIONS = ("auto", *(name for name, method in METHODS.items() if method.select is not None), "dynamic+topk")
NAME = "matrix"


@contextlib.contextmanager
def server(*flags: str) -> Iterator[tuple[str | None, str]]:
    """A server; yields its address and what it said, or no address and why it did not start."""
    with Griffin(["serve", "--name", NAME, "--port", "0", *flags], "stderr") as process:
        said = ""
        try:
            for line in process.stderr:
                said += line
                if address := re.search(r"http://127\.0\.0\.1:\d+", line):
                    yield address[0], said
                    return
            yield None, f"{said}exit code {process.wait()}"
        finally:
            process.kill()


def post(url: str, **fields: Any) -> bytes:
    """The body of an answer.

    Raises:
        OSError: it is not 200.
    """
    body = {"model": NAME, "prompt": "The river and the sea", "max_tokens": 6, "temperature": 0, **fields}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return bytes(answer.read())


def outcome(*flags: str) -> str:
    """`answers` and by which step; `refused: ` and why, if that is one line; else what is wrong."""
    with server(*flags) as (url, said):
        if url is None:
            refused = re.fullmatch(r"(?:.*\n)*griffin: error: (.*)\nexit code 2", said)
            return f"refused: {refused[1]}" if refused and "Traceback" not in said else f"FAILED: {said}"
        whole = json.loads(post(url))
        streamed = post(url, stream=True)
        other = json.loads(post(url, griffin={"selection": "topk", "density": 0.75}))
        pieces = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith(b"data: {")]
        text = "".join(choice["text"] for piece in pieces for choice in piece["choices"])
        if not (whole["usage"]["completion_tokens"] and other["usage"]["completion_tokens"]):
            return f"FAILED: an answer has no tokens: {whole}, {other}"
        if text != whole["choices"][0]["text"]:
            return f"FAILED: {text!r} is streamed, {whole['choices'][0]['text']!r} answered"
        step = re.search(r"step: (native|the model's own forward)", said)
        return f"answers (step: {step[1] if step else '?'}, {whole['griffin']['selection']})"


def tiny_model(folder: Path) -> str:
    """A small random model of floats."""
    from evaluation_data import save_bytes_model

    return save_bytes_model(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", help="a model of floats (default: a small random one)")
    parser.add_argument("--weights", default=",".join(WEIGHTS))
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument("--selections", default=",".join(SELECTIONS))
    args = parser.parse_args()
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        floats = args.model or tiny_model(Path(folder))
        names = (args.weights.split(","), args.backends.split(","), args.selections.split(","))
        for weights, backend, selection in itertools.product(*names):
            model = "smollm2-135m" if weights == "gguf" else floats
            found = outcome("-m", model, *WEIGHTS[weights], "--backend", backend, "--selection", selection)
            failures += found.startswith("FAILED")
            print(f"{weights:5s} {backend:10s} {selection:14s} {found}", flush=True)
    print(f"{failures} failed")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
