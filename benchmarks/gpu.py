"""What is to be measured on a GPU: see benchmarks/gpu.sh, which starts this.

Random weights in the shapes of real models. First the kernels are checked against float64 on the device; nothing is
timed if one is wrong. Then read bandwidth, FF calls, whole steps, the paper's latency table, memory.
"""

from __future__ import annotations

import argparse
import gc
import platform
from pathlib import Path

import torch
import transformers
from gpu_kernels import Size, check, time_calls, why_no_kernels
from gpu_report import Clock, Report
from gpu_steps import KINDS, memory, model_of, paper_latency, time_steps

from griffin.analysis.shapes import SHAPES, Shape
from griffin.version import __version__

PAPER = "llama2-13b"  # the model of the paper's latency table, on an L40: a prompt of 2048 tokens, then 128
OTHERS = ("llama2-7b", "qwen2.5-7b", "gemma-7b")
CUT = 8  # layers of the others: their time is compilation
TINY = Shape(
    "llama",
    {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
     "num_key_value_heads": 2, "max_position_embeddings": 512, "vocab_size": 64},
)  # fmt: skip


def read_bandwidth(clock: Clock, device: torch.device) -> float:
    """Bytes/s of summing a buffer larger than any cache."""
    buffer = torch.ones((2**22 if clock.tiny else 2**31) // 4, device=device)
    return buffer.nbytes / clock.seconds(buffer.sum)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, for tests; also on a CPU")
    parser.add_argument("--minutes", type=float, default=8.5, help="what does not fit is left out, and said so")
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu.csv"))
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.tiny:
        raise SystemExit("torch finds no GPU here; --tiny runs the same code on tiny shapes on a CPU")
    torch.manual_seed(0)
    report, clock = Report(args.output), Clock(device, args.tiny, args.minutes)
    no_kernels = why_no_kernels(device)
    machine(report, device)

    if no_kernels is None:
        small = Size(32, 16) if args.tiny else Size(1536, 4000, "gelu_tanh")
        check(report, device, small, [2] if args.tiny else list(range(1, 9)))
    else:
        report.add("check", "kernels", "not run", note=no_kernels)
    read = read_bandwidth(clock, device)
    report.add("bandwidth", "read", read / 1e9, "GB/s", note="torch sum")

    shapes = {"tiny": TINY} if args.tiny else {name: SHAPES[name] for name in (PAPER, *OTHERS)}
    for name, shape in shapes.items():
        text = shape.config().get_text_config()
        activation = "gelu_tanh" if name.startswith("gemma") else "silu"
        size = Size(text.hidden_size, text.intermediate_size, activation)
        time_calls(report, clock, device, name, size, [1, 2] if args.tiny else [1, 2, 4, 8], read)
        clean()
    backend = "triton" if no_kernels is None else "gather"
    for name, shape in shapes.items():
        if clock.left() < 90:
            report.add("step", "all", "not run", shape=name, note="no time left")
            continue
        prompt, count = (24, 2) if args.tiny else (2048, 128)
        whole = name in (PAPER, "tiny")
        model, note = model_of(shape, None if whole else CUT, prompt + count, device)
        note = "; ".join(part for part in (f"backend {backend}", note) if part)
        time_steps(report, clock, name, model, backend, note, KINDS, [1, 2] if args.tiny else [1, 4, 8], prompt // 4)
        if whole:
            paper_latency(report, clock, name, model, backend, note, prompt, count)
        memory(report, name, model, note)
        del model
        clean()
    print(f"written: {args.output}")


def machine(report: Report, device: torch.device) -> None:
    """What this runs on."""
    card = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {platform.machine()}"
    report.add("machine", "device", card)
    for package in (torch, transformers):
        report.add("machine", package.__name__, package.__version__)
    try:
        import triton

        report.add("machine", "triton", triton.__version__)
    except ImportError:
        report.add("machine", "triton", "not installed")
    report.add("machine", "griffin", __version__)


def clean() -> None:
    """Give memory back before the next shape."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
