"""The native library `libgriffin_native`: thin, checked calls over torch tensors.

The library (folder `native/`, C interface in `native/include/griffin_native.h`) knows nothing of torch; this module
hands it addresses, shapes and strides, and the addresses of the OpenMP runtime that torch has loaded, so that both run
on one pool of threads. Nothing is loaded before the first use.

Words: D model width, D_ff feedforward width, B rows of input (1 to 16), k experts.
"""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ABI = 1
MAX_ROWS = 16
GROUP = 32
"""Weights that share an int4 scale, and inputs that share a scale where int8 or int4 weights meet them."""
FORMATS = ("f32", "bf16", "f16", "int8", "int4")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
"""`gelu` is the exact one (erf); `relu2` is relu(x)^2."""
_FLOAT_FORMATS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
_ROW_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_STATUS = {1: "bad argument", 2: "an expert outside 0..D_ff-1", 3: "out of memory", 4: "no such instruction set"}

_pointer, _i32, _i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class _Block(ctypes.Structure):
    _fields_ = [
        *[(name, _i32) for name in ("d_model", "d_ff", "format", "activation")],
        *[(name, _pointer) for name in ("gate", "up", "down")],
        *[(name, _i64) for name in ("gate_stride", "up_stride", "down_stride")],
        *[(name, _pointer) for name in ("gate_scale", "up_scale", "down_scale")],
        ("scale_stride", _i64),
        *[(name, _pointer) for name in ("gate_bias", "up_bias", "out_bias")],
    ]


class _Matrix(ctypes.Structure):
    _fields_ = [
        *[(name, _i32) for name in ("d_in", "d_out", "format", "reserved")],
        ("weight", _pointer),
        ("stride", _i64),
        ("scale", _pointer),
        ("bias", _pointer),
    ]


class _Rows(ctypes.Structure):
    _fields_ = [
        ("x", _pointer),
        ("y", _pointer),
        ("x_stride", _i64),
        ("y_stride", _i64),
        *[(name, _i32) for name in ("x_type", "y_type", "rows", "index_bytes")],
        ("experts", _pointer),
        ("n_experts", _i64),
        ("row_mask", _pointer),
    ]


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "griffin_abi": (ctypes.c_int, []),
    "griffin_use_openmp": (None, [_pointer] * 3),
    "griffin_set_isa": (ctypes.c_int, [ctypes.c_char_p]),
    "griffin_isa": (ctypes.c_char_p, []),
    "griffin_isas": (ctypes.c_char_p, []),
    "griffin_threading": (ctypes.c_char_p, []),
    "griffin_calls": (_i64, []),
    "griffin_ff": (ctypes.c_int, [_pointer, _pointer, ctypes.c_int]),
    "griffin_matvec": (ctypes.c_int, [_pointer, _pointer, ctypes.c_int]),
    "griffin_decode": (ctypes.c_int, [_pointer, _pointer, _pointer, _pointer, ctypes.c_int, _pointer, ctypes.c_int]),
    "griffin_union": (_i64, [_pointer, ctypes.c_int, ctypes.c_int, _i64, _i64, _pointer, _pointer]),
    "griffin_row_bytes": (_i64, [ctypes.c_int, _i64]),
    "griffin_pack": (ctypes.c_int, [ctypes.c_int, _pointer, _i64, _i64, _i64, _pointer, _i64, _pointer, _i64]),
    "griffin_unpack": (ctypes.c_int, [ctypes.c_int, _pointer, _i64, _i64, _i64, _pointer, _i64, _pointer, _i64]),
    "griffin_unpack_block": (
        ctypes.c_int,
        [ctypes.c_int, _pointer, _i64, _i64, _i64, _pointer, *[_i64] * 3, _pointer, ctypes.c_int, _i64, ctypes.c_int],
    ),
    "griffin_advise_huge": (ctypes.c_int, [_pointer, _i64]),
    "griffin_read_bandwidth": (ctypes.c_double, [_pointer, _i64, ctypes.c_int]),
}


# -- loading --------------------------------------------------------------


def _find() -> Path | None:
    """GRIFFIN_NATIVE_LIBRARY if set, else the library in any folder of the package (an editable install has two)."""
    if named := os.environ.get("GRIFFIN_NATIVE_LIBRARY"):
        return Path(named)
    import griffin

    folders = [Path(folder) for folder in griffin.__path__]
    try:  # an editable install keeps what was built in site-packages, beside the redirected sources
        from importlib.metadata import files

        installed = [
            Path(str(f.locate())) for f in files("griffin-llm") or [] if f.name.startswith("libgriffin_native")
        ]
    except Exception:  # not installed at all: run from a source folder
        installed = []
    names = [f"libgriffin_native.{ending}" for ending in ("so", "dylib")]
    candidates = [folder / name for folder in folders for name in names] + installed
    return next((path for path in candidates if path.is_file()), None)


def _torch_openmp() -> tuple[int, int, int] | None:
    """Addresses of GOMP_parallel, omp_get_thread_num and omp_get_num_threads in the GNU OpenMP runtime that torch uses.

    A second pool of threads, spinning for work beside torch's own, can halve the speed of both.
    """
    maps = Path("/proc/self/maps")
    if not sys.platform.startswith("linux") or not maps.exists():
        return None
    loaded = {line.split(maxsplit=5)[5].strip() for line in maps.read_text().splitlines() if "libgomp" in line}
    # torch's own copy first, in case another package has brought one too
    for path in sorted(loaded, key=lambda path: ("torch" not in path, path)):
        try:
            runtime = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            functions = [getattr(runtime, n) for n in ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")]
        except (OSError, AttributeError):
            continue
        a, b, c = (ctypes.cast(function, _pointer).value or 0 for function in functions)
        return a, b, c
    return None


@cache
def _load() -> ctypes.CDLL | str:
    """The library, ready for use, or why there is none."""
    path = _find()
    if path is None:
        return (
            "the native library was not built: install a C++17 compiler (g++ or clang++) and reinstall griffin-llm, "
            "or set GRIFFIN_NATIVE_LIBRARY to a libgriffin_native"
        )
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return f"the native library {path} cannot be loaded: {error}"
    if (found := library.griffin_abi()) != ABI:
        return f"the native library {path} has interface {found}, this package wants {ABI}: reinstall griffin-llm"
    if (openmp := _torch_openmp()) is not None:
        library.griffin_use_openmp(*openmp)
    forced = os.environ.get("GRIFFIN_NATIVE_ISA")
    if forced and library.griffin_set_isa(forced.encode()) != 0:
        return f"GRIFFIN_NATIVE_ISA={forced}: this machine has {library.griffin_isas().decode()}"
    return library


def _library() -> ctypes.CDLL:
    library = _load()
    if isinstance(library, str):
        raise ValueError(library)
    return library


def available() -> str | None:
    """None if the library can be used, else the reason why not, with what to do."""
    library = _load()
    return library if isinstance(library, str) else None


def isa() -> str:
    """The instruction set in use, such as "avx512 vnni bf16"."""
    return str(_library().griffin_isa().decode())


def isas() -> list[str]:
    """The instruction sets that `set_isa` accepts on this machine, best first."""
    return list(_library().griffin_isas().decode().split())


def set_isa(name: str | None) -> None:
    """Force "avx512", "avx2" or "portable"; None for the best. Raises ValueError if it is not on this machine."""
    if _library().griffin_set_isa(name.encode() if name else None) != 0:
        raise ValueError(f"instruction set {name!r}: expected one of {isas()}")


def threading() -> str:
    """ "openmp" (torch's own pool) or "own pool"."""
    return str(_library().griffin_threading().decode())


def calls() -> int:
    """`ff` and `matvec` calls finished in this process: proves which path ran."""
    return int(_library().griffin_calls())


# -- weights --------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """One feedforward block as the library sees it; keeps its tensors alive. Made by `ff_block` or `quantise_ff`."""

    d_model: int
    d_ff: int
    format: str
    gated: bool
    weight_bytes: int
    """of gate, up and down, scales included: what a dense call reads"""
    struct: Any = field(repr=False)
    tensors: tuple[Tensor, ...] = field(repr=False)


@dataclass(frozen=True)
class Matrix:
    """One matrix (out, in) as the library sees it. Make one by `matrix` or `quantise_matrix`."""

    d_in: int
    d_out: int
    format: str
    weight_bytes: int
    struct: Any = field(repr=False)
    tensors: tuple[Tensor, ...] = field(repr=False)


def _check_rows(name: str, weight: Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
    if weight.shape != shape or weight.dtype != dtype or weight.device.type != "cpu" or weight.dim() != 2:
        raise ValueError(
            f"{name}: {tuple(weight.shape)} {weight.dtype} on {weight.device}, expected {tuple(shape)} {dtype}"
        )
    if weight.shape[1] > 1 and weight.stride(1) != 1:
        raise ValueError(f"{name}: strides {weight.stride()}, expected contiguous rows")


def _bias(name: str, bias: Tensor | None, length: int) -> Tensor | None:
    if bias is None:
        return None
    if bias.shape != (length,):
        raise ValueError(f"{name}: shape {tuple(bias.shape)}, expected ({length},)")
    return bias.detach().to(device="cpu", dtype=torch.float32).contiguous()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _activation(name: str) -> int:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r}: expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS.index(name)


def ff_block(
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    *,
    activation: str,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    out_bias: Tensor | None = None,
) -> Block:
    """A block over float weights, read where they are.

    Shapes:
        gate, up: (D_ff, D), rows contiguous; gate None: ungated
        down: (D_ff, D), neuron-major, rows contiguous: `down_proj.weight.T` of a transposed storage
        gate_bias, up_bias: (D_ff,); out_bias: (D,); copied to float32 if they are not

    Raises ValueError for other shapes, dtypes (float32, bfloat16, float16; all alike) or strides.
    """
    if up.dtype not in _FLOAT_FORMATS:
        raise ValueError(f"up: {up.dtype}, expected one of {', '.join(map(str, _FLOAT_FORMATS))}")
    for name, weight in (("gate", gate), ("up", up), ("down", down)):
        if weight is not None:
            _check_rows(name, weight, up.shape, up.dtype)
    d_ff, d = up.shape
    biases = _bias("gate_bias", gate_bias, d_ff), _bias("up_bias", up_bias, d_ff), _bias("out_bias", out_bias, d)
    size, fmt = up.element_size(), _FLOAT_FORMATS[up.dtype]
    struct = _Block(d, d_ff, FORMATS.index(fmt), _activation(activation))
    struct.gate, struct.up, struct.down = _address(gate), up.data_ptr(), down.data_ptr()
    struct.gate_stride = gate.stride(0) * size if gate is not None else 0
    struct.up_stride, struct.down_stride = up.stride(0) * size, down.stride(0) * size
    struct.gate_bias, struct.up_bias, struct.out_bias = map(_address, biases)
    kept = tuple(t for t in (gate, up, down, *biases) if t is not None)
    return Block(d, d_ff, fmt, gate is not None, (3 if gate is not None else 2) * d_ff * d * size, struct, kept)


def quantise_ff(
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    *,
    format: str,
    activation: str,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    out_bias: Tensor | None = None,
) -> Block:
    """A block of int8 or int4 weights, quantised from float ones of any dtype (shapes as in `ff_block`).

    A neuron's gate, up and down rows follow one another in one record: `tensors[0]` is (D_ff, record bytes) uint8, and
    for int8 `tensors[1]` is (D_ff, 3 or 2) float32, the rows' scales. int4's are in the rows (float16, groups of 32).
    """
    parts = [part for part in (gate, up, down) if part is not None]
    for part in parts:
        if part.shape != up.shape or part.dim() != 2:
            raise ValueError(f"shapes {[tuple(p.shape) for p in parts]}: expected all (D_ff, D)")
    d_ff, d = up.shape
    row_bytes, n = _row_bytes(format, d), len(parts)
    records = torch.empty(d_ff, n * row_bytes, dtype=torch.uint8)
    advise_huge(records)
    scales = torch.ones(d_ff, n, dtype=torch.float32) if format == "int8" else None
    for i, part in enumerate(parts):
        _pack(format, part, records[:, i * row_bytes :], scales[:, i:] if scales is not None else None)
    biases = {"gate_bias": gate_bias, "up_bias": up_bias, "out_bias": out_bias}
    return ff_records(records, scales, d_model=d, gated=gate is not None, activation=activation, **biases)


def ff_records(
    records: Tensor,
    scales: Tensor | None,
    *,
    d_model: int,
    gated: bool,
    activation: str,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    out_bias: Tensor | None = None,
) -> Block:
    """A block over records that were quantised before (`quantise_ff(...).tensors`), read where they are.

    Shapes:
        records: (D_ff, bytes of a record) uint8: gate, up and down row of a neuron, without gate if not `gated`
        scales: int8: (D_ff, 3), or 2 if not gated, float32; None says int4
    """
    d_ff, d, n = records.shape[0], d_model, 3 if gated else 2
    format = "int4" if scales is None else "int8"
    row_bytes = _row_bytes(format, d)
    _check_rows("records", records, torch.Size((d_ff, n * row_bytes)), torch.uint8)
    if scales is not None and not scales.is_contiguous():
        raise ValueError("scales: expected a contiguous tensor")
    if scales is not None:
        _check_rows("scales", scales, torch.Size((d_ff, n)), torch.float32)
    struct = _Block(d, d_ff, FORMATS.index(format), _activation(activation))
    ungated = [] if gated else [None]
    struct.gate, struct.up, struct.down = ungated + [records.data_ptr() + i * row_bytes for i in range(n)]
    struct.gate_stride = struct.up_stride = struct.down_stride = records.stride(0)
    if scales is not None:
        struct.gate_scale, struct.up_scale, struct.down_scale = ungated + [scales.data_ptr() + 4 * i for i in range(n)]
        struct.scale_stride = 4 * n
    biases = _bias("gate_bias", gate_bias, d_ff), _bias("up_bias", up_bias, d_ff), _bias("out_bias", out_bias, d)
    struct.gate_bias, struct.up_bias, struct.out_bias = map(_address, biases)
    data = (records,) if scales is None else (records, scales)
    kept = data + tuple(b for b in biases if b is not None)
    return Block(d, d_ff, format, gated, sum(t.numel() * t.element_size() for t in data), struct, kept)


def matrix(weight: Tensor, bias: Tensor | None = None) -> Matrix:
    """A float matrix (out, in) with contiguous rows, read where it is. Raises ValueError as `ff_block` does."""
    if weight.dtype not in _FLOAT_FORMATS:
        raise ValueError(f"weight: {weight.dtype}, expected one of {', '.join(map(str, _FLOAT_FORMATS))}")
    _check_rows("weight", weight, weight.shape, weight.dtype)
    d_out, d_in = weight.shape
    bias = _bias("bias", bias, d_out)
    fmt, size = _FLOAT_FORMATS[weight.dtype], weight.element_size()
    struct = _Matrix(
        d_in, d_out, FORMATS.index(fmt), 0, weight.data_ptr(), weight.stride(0) * size, None, _address(bias)
    )
    return Matrix(d_in, d_out, fmt, weight.numel() * size, struct, tuple(t for t in (weight, bias) if t is not None))


def quantise_matrix(weight: Tensor, *, format: str, bias: Tensor | None = None) -> Matrix:
    """An int8 (a scale a row) or int4 (groups of 32) matrix from float weights (out, in); `tensors[0]` has the rows."""
    d_out, d_in = weight.shape
    rows = torch.empty(d_out, _row_bytes(format, d_in), dtype=torch.uint8)
    advise_huge(rows)
    scale = torch.ones(d_out, dtype=torch.float32) if format == "int8" else None
    _pack(format, weight, rows, scale)
    bias = _bias("bias", bias, d_out)
    struct = _Matrix(
        d_in, d_out, FORMATS.index(format), 0, rows.data_ptr(), rows.stride(0), _address(scale), _address(bias)
    )
    kept = tuple(t for t in (rows, scale, bias) if t is not None)
    return Matrix(d_in, d_out, format, rows.numel() + (4 * d_out if scale is not None else 0), struct, kept)


def matrix_rows(rows: Tensor, scale: Tensor | None, *, d_in: int, bias: Tensor | None = None) -> Matrix:
    """A matrix over rows that were quantised before, read where they are; scales that are not contiguous are copied.

    Shapes:
        rows: (out, bytes of a row) uint8, rows contiguous, at any stride (a part of a neuron's record)
        scale: int8: (out,) float32; None says int4
    """
    d_out, format = rows.shape[0], "int4" if scale is None else "int8"
    _check_rows("rows", rows, torch.Size((d_out, row_bytes(format, d_in))), torch.uint8)
    if scale is not None:
        if scale.shape != (d_out,) or scale.dtype != torch.float32:
            raise ValueError(f"scale: {tuple(scale.shape)} {scale.dtype}, expected ({d_out},) float32")
        scale = scale.contiguous()
    bias = _bias("bias", bias, d_out)
    struct = _Matrix(
        d_in, d_out, FORMATS.index(format), 0, rows.data_ptr(), rows.stride(0), _address(scale), _address(bias)
    )
    kept = tuple(t for t in (rows, scale, bias) if t is not None)
    return Matrix(d_in, d_out, format, rows.numel() + (4 * d_out if scale is not None else 0), struct, kept)


def unpack_rows(
    rows: Tensor, scale: Tensor | None, out: Tensor, *, d: int, begin: int = 0, threads: int | None = None
) -> Tensor:
    """Columns begin, begin + 1, ... of quantised rows, as many as `out` has, dequantised into it.

    Shapes:
        rows: (n, bytes of a row of d weights) uint8, rows contiguous; scale: int8: (n,) float32; None says int4
        out: (n, columns) float32 or bfloat16, rows contiguous; begin is a multiple of 128
    """
    n, format = rows.shape[0], "int4" if scale is None else "int8"
    _check_rows("rows", rows, torch.Size((n, row_bytes(format, d))), torch.uint8)
    if out.dtype not in _ROW_TYPES or out.dim() != 2 or out.shape[0] != n or (out.shape[1] > 1 and out.stride(1) != 1):
        raise ValueError(f"out: {tuple(out.shape)} {out.dtype}, expected ({n}, columns) float32 or bfloat16")
    if scale is not None and (scale.shape != (n,) or scale.dtype != torch.float32):
        raise ValueError(f"scale: {tuple(scale.shape)} {scale.dtype}, expected ({n},) float32")
    if out.numel() == 0:
        return out
    scale_stride = 0 if scale is None else 4 * scale.stride(0)
    _check(
        _library().griffin_unpack_block(
            FORMATS.index(format), rows.data_ptr(), n, d, rows.stride(0), _address(scale), scale_stride, begin,
            begin + out.shape[1], out.data_ptr(), _ROW_TYPES[out.dtype], out.stride(0),
            threads or torch.get_num_threads(),
        )
    )  # fmt: skip
    return out


def row_bytes(format: str, d: int) -> int:
    """Bytes of a row of d int8 or int4 weights, int8's scale not included."""
    return _row_bytes(format, d)


def _row_bytes(format: str, d: int) -> int:
    if format not in ("int8", "int4"):
        raise ValueError(f"format {format!r}: expected 'int8' or 'int4'")
    return int(_library().griffin_row_bytes(FORMATS.index(format), d))


def _pack(format: str, source: Tensor, rows: Tensor, scale: Tensor | None) -> None:
    n, d = source.shape
    for begin in range(0, n, 1024):  # float32 of a slice at a time
        part = source[begin : begin + 1024].detach().to(device="cpu", dtype=torch.float32).contiguous()
        out, s = rows[begin:], scale[begin:] if scale is not None else None
        _check(
            _library().griffin_pack(
                FORMATS.index(format), part.data_ptr(), len(part), d, d, out.data_ptr(), rows.stride(0),
                _address(s), 4 * s.stride(0) if s is not None else 0,
            )
        )  # fmt: skip


def unpack(block: Block | Matrix, first: int = 0, last: int | None = None) -> list[Tensor]:
    """The block's weights as float32: [gate, up, down] or [up, down], or [weight] of a matrix; rows first..last only.

    Shapes:
        each: (last - first, D), down neuron-major
    """
    s = block.struct
    if isinstance(block, Matrix):
        d, total, parts = block.d_in, block.d_out, [(s.weight, s.stride, s.scale, 4)]
    else:
        d, total = block.d_model, block.d_ff
        parts = [(s.up, s.up_stride, s.up_scale, s.scale_stride), (s.down, s.down_stride, s.down_scale, s.scale_stride)]
        if block.gated:
            parts.insert(0, (s.gate, s.gate_stride, s.gate_scale, s.scale_stride))
    n = (total if last is None else min(last, total)) - first
    out = []
    for base, stride, scale, scale_stride in parts:
        weight = torch.empty(n, d, dtype=torch.float32)
        at = scale + first * scale_stride if scale else None
        _check(
            _library().griffin_unpack(
                s.format, base + first * stride, n, d, stride, at, scale_stride, weight.data_ptr(), d
            )
        )
        out.append(weight)
    return out


# -- calls --------------------------------------------------------------


def _check(status: int) -> None:
    if status != 0:
        raise ValueError(f"native library: {_STATUS.get(status, status)}")


def _rows(x: Tensor, d_in: int, d_out: int, out: Tensor | None) -> tuple[_Rows, Tensor]:
    if x.dim() != 2 or x.shape[1] != d_in or not 1 <= x.shape[0] <= MAX_ROWS or x.dtype not in _ROW_TYPES:
        raise ValueError(f"x: {tuple(x.shape)} {x.dtype}, expected (1..{MAX_ROWS}, {d_in}) float32 or bfloat16")
    if x.stride(1) != 1 and d_in > 1:
        x = x.contiguous()
    if out is None:
        out = torch.empty(x.shape[0], d_out, dtype=x.dtype)
    elif out.shape != (x.shape[0], d_out) or out.dtype not in _ROW_TYPES or (d_out > 1 and out.stride(1) != 1):
        raise ValueError(f"out: {tuple(out.shape)} {out.dtype}, expected ({x.shape[0]}, {d_out}), rows contiguous")
    if x.device.type != "cpu" or out.device.type != "cpu":
        raise ValueError(f"x on {x.device}, out on {out.device}: expected both on cpu")
    rows = _Rows(
        x.data_ptr(), out.data_ptr(), x.stride(0) * x.element_size(), out.stride(0) * out.element_size(),
        _ROW_TYPES[x.dtype], _ROW_TYPES[out.dtype], x.shape[0], 8, None, 0, None,
    )  # fmt: skip
    rows.keep = x  # a copy made above lives as long as its address
    return rows, out


def ff(
    block: Block,
    x: Tensor,
    experts: Tensor | None = None,
    row_mask: Tensor | None = None,
    *,
    out: Tensor | None = None,
    threads: int | None = None,
) -> Tensor:
    """y = W_2[:, E] (act(W_g[E] x + b_g) * (W_1[E] x + b_1)) + b_2; ungated: W_2[:, E] act(W_1[E] x + b_1) + b_2.

    Shapes:
        x: (B, D) float32 or bfloat16, 1 <= B <= 16
        experts: (k,) int32 or int64, contiguous, each in 0..D_ff-1 (not checked here: selection made them), shared by
            all rows; None: all neurons. With row_mask: the union of the rows' sets, both from `union`
        row_mask: (k,) uint16, bit r of entry i: row r wants expert i
        out: (B, D) float32 or bfloat16, must not overlap x; default a new tensor of x's dtype
        returns out

    `threads` defaults to torch.get_num_threads(). Raises ValueError for other shapes, dtypes or devices.
    """
    rows, out = _rows(x, block.d_model, block.d_model, out)
    if experts is not None:
        if experts.dim() != 1 or experts.dtype not in (torch.int32, torch.int64) or not experts.is_contiguous():
            raise ValueError(
                f"experts: {tuple(experts.shape)} {experts.dtype}, expected (k,) int32 or int64, contiguous"
            )
        rows.index_bytes, rows.n_experts = experts.element_size(), experts.shape[0]
        rows.experts = experts.data_ptr() or block.struct.up  # an empty tensor has no address, and NULL means all
    if row_mask is not None:
        if experts is None or row_mask.shape != experts.shape or row_mask.dtype != torch.uint16:
            raise ValueError(
                f"row_mask: {tuple(row_mask.shape)} {row_mask.dtype}, expected uint16, one for each expert"
            )
        rows.row_mask = row_mask.data_ptr()
    _check(
        _library().griffin_ff(
            ctypes.addressof(block.struct), ctypes.addressof(rows), threads or torch.get_num_threads()
        )
    )
    return out


def matvec(matrix: Matrix, x: Tensor, *, out: Tensor | None = None, threads: int | None = None) -> Tensor:
    """y = W x + bias for every row of x.

    Shapes:
        x: (B, in) float32 or bfloat16, 1 <= B <= 16
        out: (B, out) float32 or bfloat16; default a new tensor of x's dtype
    """
    rows, out = _rows(x, matrix.d_in, matrix.d_out, out)
    address = ctypes.addressof(matrix.struct)
    _check(_library().griffin_matvec(address, ctypes.addressof(rows), threads or torch.get_num_threads()))
    return out


def decode(
    decoder: ctypes.Structure,
    cache: ctypes.Structure,
    experts: Any,
    tokens: Tensor,
    logits: Tensor,
    *,
    threads: int | None = None,
) -> None:
    """One generation step of a whole decoder (`native/include/griffin_decode.h`); fills `logits`.

    Shapes:
        tokens: (B,) int64; logits: (B, V) float32, contiguous; 1 <= B <= 16
    """
    _check(
        _library().griffin_decode(
            ctypes.addressof(decoder), ctypes.addressof(cache), ctypes.addressof(experts), tokens.data_ptr(),
            tokens.shape[0], logits.data_ptr(), threads or torch.get_num_threads(),
        )
    )  # fmt: skip


def union(experts: Tensor, d_ff: int) -> tuple[Tensor, Tensor]:
    """One expert set a row, as `ff` wants them: their union, ascending, and who wants which.

    Shapes:
        experts: (B, k) int32 or int64, 1 <= B <= 16
        returns: (n,) int32, (n,) uint16 with bit r of entry i set if row r has expert i

    Raises ValueError for an expert outside 0..d_ff-1.
    """
    if experts.dim() != 2 or experts.dtype not in (torch.int32, torch.int64) or not 1 <= experts.shape[0] <= MAX_ROWS:
        raise ValueError(f"experts: {tuple(experts.shape)} {experts.dtype}, expected (1..{MAX_ROWS}, k) int32 or int64")
    experts = experts.contiguous()
    rows, k = experts.shape
    room = max(1, min(rows * k, d_ff))
    indices, mask = torch.empty(room, dtype=torch.int32), torch.empty(room, dtype=torch.uint16)
    if k == 0:
        return indices[:0], mask[:0]
    n = int(
        _library().griffin_union(
            experts.data_ptr(), experts.element_size(), rows, k, d_ff, indices.data_ptr(), mask.data_ptr()
        )
    )
    _check(max(0, -n))
    return indices[:n], mask[:n]


def advise_huge(tensor: Tensor) -> bool:
    """Ask for huge pages under a tensor's storage, best before its first write. True if the system took the advice."""
    storage = tensor.untyped_storage()
    return int(_library().griffin_advise_huge(storage.data_ptr(), storage.nbytes())) == 0


def read_bandwidth(buffer: Tensor, *, threads: int | None = None) -> float:
    """Bytes per second of one plain multi-threaded float sum over a contiguous buffer (use 1 GB or more)."""
    size = buffer.numel() * buffer.element_size()
    return float(_library().griffin_read_bandwidth(buffer.data_ptr(), size, threads or torch.get_num_threads()))
