"""benchmarks/gpu.sh on a CPU, with tiny shapes: every section is there, and what is checked is right."""

from __future__ import annotations

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_kit_runs_on_a_cpu(tmp_path: Path) -> None:
    has_triton = importlib.util.find_spec("triton") is not None
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    output = tmp_path / "gpu.csv"
    run = subprocess.run(
        ["bash", "benchmarks/gpu.sh", "--tiny", "-o", str(output)],
        cwd=ROOT, env=environment | ({"TRITON_INTERPRET": "1"} if has_triton else {}), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    with output.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["section"] for row in rows} == {
        "machine", "check", "bandwidth", "ff call", "step", "latency", "memory",
    }  # fmt: skip
    assert not [row for row in rows if row["value"] == "not run" and row["section"] != "check"]
    assert {row["what"] for row in rows if row["section"] == "step" and row["unit"] == "ms"} == {
        "eager", "compiled", "captured", "compiled and captured", "selection",
    }  # fmt: skip
    checks = [row for row in rows if row["section"] == "check"]
    if has_triton:
        assert {"float32, shared", "bfloat16, per_sequence", "int8", "int4"} <= {row["what"] for row in checks}
        assert "triton" in {row["what"] for row in rows if row["section"] == "ff call"}
    else:
        assert [row["note"] for row in checks] == ["triton is not installed"]


def test_without_a_gpu_it_says_what_runs(tmp_path: Path) -> None:
    run = subprocess.run(
        ["bash", "benchmarks/gpu.sh", "-o", str(tmp_path / "gpu.csv")],
        cwd=ROOT, env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 1
    assert "--tiny" in run.stderr
