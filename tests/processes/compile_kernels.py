"""Compile the Triton kernels for an NVIDIA architecture (80, 90, ...), which needs no GPU, and print their registers.

    python tests/processes/compile_kernels.py 90

Fails where a kernel does not compile, or spills registers to memory.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from griffin.backends import triton_kernels as kernels

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
FLOATS = dict.fromkeys(("X", "GATE", "UP", "GATE_BIAS", "UP_BIAS", "DOWN", "BIAS", "Y"), "*bf16")
POINTERS = FLOATS | {"IDX": "*i32", "COUNT": "*i32", "Z": "*fp32", "PARTS": "*fp32"}
ALIGNED = ("hidden", "F", "gate_stride", "up_stride", "stride", "padded")


def groups(bits: int, prefix: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Pointers and constants of a matrix in groups: int8, or int4 with scales of two levels."""
    names = {"": "CODES", "GATE_": "GATE", "UP_": "UP"}
    pointers = {names[prefix]: "*u8", f"{prefix}SCALE": "*fp16", f"{prefix}SUB": "*u8", f"{prefix}OFFSET": "*fp16"}
    values = {"BITS": bits, "ZERO": 128 if bits == 8 else 0, "GROUP": 32, "SPAN": 32 if bits == 8 else 256}
    values |= {"SUBS": bits == 4, "OFFSETS": "none" if bits == 8 else "sub"}
    return pointers | {f"{prefix}SUB_OFFSET": "*u8"}, {prefix + name: value for name, value in values.items()}


def compiled(
    kernel: Any, constants: dict[str, Any], architecture: int, pointers: dict[str, str] | None = None, warps: int = 1
) -> None:
    """Compile, print what it needs, and refuse spills."""
    types = POINTERS | (pointers or {})
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in ALIGNED
    }
    target = GPUTarget("cuda", architecture, 32)
    binary = triton.compile(
        ASTSource(kernel, signature, constants, attributes), target=target, options={"num_warps": warps}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
    print(f"{kernel.__name__}: {registers} registers, {stack} bytes spilled", flush=True)
    if stack:
        raise SystemExit(f"{kernel.__name__} {constants} spills {stack} bytes")


def main() -> None:
    architecture = int(sys.argv[1])
    ff = {"GATED": True, "BIASED": False, "ACTIVATION": "silu"}
    for rows, columns, chunk in ((1, 1024, 16), (8, 512, 8)):
        compiled(kernels.read, ff | {"ROWS": rows, "M": 4, "C": columns}, architecture)
        compiled(kernels.write, {"SPLITS": 32, "ROWS": rows, "K": chunk, "C": 256}, architecture)
    compiled(kernels.finish, {"SPLITS": 32, "BIASED": True, "C": 1024}, architecture, warps=4)
    gate, gate_constants = groups(8, "GATE_")
    up, up_constants = groups(8, "UP_")
    tile = {"ROWS": 1, "M": 4, "G": 16}
    compiled(kernels.read_groups, ff | gate_constants | up_constants | tile, architecture, gate | up)
    gate, gate_constants = groups(4, "GATE_")
    up, up_constants = groups(4, "UP_")
    compiled(kernels.read_groups, ff | gate_constants | up_constants | tile, architecture, gate | up)
    down, down_constants = groups(4, "")
    compiled(kernels.write_groups, down_constants | {"SPLITS": 32, "ROWS": 1, "K": 16, "C": 128}, architecture, down)


if __name__ == "__main__":
    main()
