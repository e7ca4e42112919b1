"""The Triton kernels: interpreted on a CPU, in a process of its own, and compiled for GPUs that are not here."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import griffin
from conftest import tiny_llama
from griffin import backends

ROOT = Path(__file__).parents[1]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install triton (290 MB)"
)


@needs_triton
def test_under_the_interpreter() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/processes"],
        cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


@needs_triton
@pytest.mark.parametrize("architecture", [80, 90])
def test_the_kernels_compile_without_spilling(architecture: int) -> None:
    """Compiled in a process without the interpreter, whose kernels are Python."""
    run = subprocess.run(
        [sys.executable, "tests/processes/compile_kernels.py", str(architecture)],
        cwd=ROOT, env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert run.stdout.count("registers") == 8


def test_auto_takes_it_on_a_gpu_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    block: Any = SimpleNamespace(device=torch.device("cuda"), quantised=False)
    monkeypatch.setattr(backends.native, "why_not", lambda block: "it is on cuda")
    monkeypatch.setattr(backends.triton, "why_not", lambda block: None)
    assert backends.resolve("auto", [block]).name == "triton"
    monkeypatch.setattr(backends.triton, "why_not", lambda block: "triton is not installed")
    assert backends.resolve("auto", [block]).name == "gather"


def test_on_a_cpu_it_is_refused_by_name() -> None:
    missing = importlib.util.find_spec("triton") is None
    expected = "triton is not installed" if missing else "Triton kernels run on a GPU"
    with pytest.raises(ValueError, match=expected):
        griffin.attach(tiny_llama(torch.float32), backend="triton", selection="topk")
    with pytest.raises(ValueError, match=r"reads a list of experts .* without dynamic"):
        griffin.attach(tiny_llama(torch.float32), backend="triton", selection="dynamic+topk")
