"""The C interface of `libgriffin_native` (`native/include/*.h`) as ctypes sees it: structs, functions, numbers.

`bind` compares `ABI` and the layout of every struct with the library's when it is loaded.
"""

from __future__ import annotations

import ctypes
from typing import Any

ABI = 11
"""Raise it, here and in `griffin_native.h`, with every change of a struct, a function or a number."""

FORMATS = ("f32", "bf16", "f16", "grouped")
"""Weight formats; the place in the tuple is the interface's number."""
GROUPED = FORMATS.index("grouped")
SCALES = ("sub unsigned", "sub signed", "f16", "f32")
OFFSETS = ("none", "sub", "f16", "code")
"""Of grouped formats; the place in the tuple is the interface's number."""
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
"""Those of `griffin.activation`; the place in the tuple is the interface's number."""
STATUS = {
    1: "bad argument",
    2: "an expert outside 0..D_ff-1",
    3: "out of memory",
    4: "no such instruction set",
    5: "the file cannot be read",
    6: "the file has become shorter",
}

_pointer, _i32, _i64, _f32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float
_int = ctypes.c_int

# -- griffin_native.h -------------------------------------------------------------------------------------------------


class GroupedStruct(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_uint8) for name in ("bits", "group", "scale", "offset")],
        *[(name, ctypes.c_uint16) for name in ("zero", "span")],
    ]


class MatrixStruct(ctypes.Structure):
    _fields_ = [
        *[(name, _i32) for name in ("d_in", "d_out", "format", "neuron_major")],
        ("grouped", GroupedStruct),
        ("weight", _pointer),
        ("stride", _i64),
        ("scales", _pointer),
        ("bias", _pointer),
        ("table", _pointer),
    ]


class BlockStruct(ctypes.Structure):
    _fields_ = [*[(name, MatrixStruct) for name in ("gate", "up", "down")], ("activation", _i32), ("reserved", _i32)]


class DynamicStruct(ctypes.Structure):
    _fields_ = [
        ("gate", MatrixStruct),
        ("weight", _pointer),
        ("weight_stride", _i64),
        ("k", _i64),
        ("whole", _pointer),
        ("levels", _i64 * 4),
        ("n_levels", _i32),
        ("first", _i32),
    ]


class IoStruct(ctypes.Structure):
    _fields_ = [
        ("x", _pointer),
        ("y", _pointer),
        ("x_stride", _i64),
        ("y_stride", _i64),
        *[(name, _i32) for name in ("x_type", "y_type", "rows", "index_bytes")],
        ("experts", _pointer),
        ("n_experts", _i64),
        ("row_mask", _pointer),
        ("dynamic", _pointer),
        ("compact", _pointer),
    ]


# -- griffin_decode.h -------------------------------------------------------------------------------------------------


class NormStruct(ctypes.Structure):
    _fields_ = [("weight", _pointer), ("eps", _f32), ("reserved", _i32)]


class LayerStruct(ctypes.Structure):
    _fields_ = [
        *[(name, NormStruct) for name in ("attention", "query", "key", "after_attention")],
        *[(name, NormStruct) for name in ("feedforward", "after_feedforward")],
        *[(name, MatrixStruct) for name in ("q", "k", "v", "o")],
        ("ff", BlockStruct),
        ("rope", _i32),
        ("window", _i32),
    ]


class DecoderStruct(ctypes.Structure):
    _fields_ = [
        *[(name, _i32) for name in ("n_layers", "d_model", "heads", "kv_heads", "head_size", "vocabulary")],
        *[(name, _i32) for name in ("rotary", "positions")],
        *[(name, _f32) for name in ("attention_scale", "embedding_scale", "residual_scale", "logits_scale")],
        *[(name, _f32) for name in ("attention_softcap", "logits_softcap")],
        ("layers", _pointer),
        ("embedding", MatrixStruct),
        ("final", NormStruct),
        ("head", MatrixStruct),
        ("cosines", _pointer * 2),
        ("sines", _pointer * 2),
    ]


class CacheStruct(ctypes.Structure):
    _fields_ = [
        *[(name, _pointer) for name in ("keys", "values", "head_stride", "length", "start")],
        ("type", _i32),
        ("reserved", _i32),
    ]


class ExpertsStruct(ctypes.Structure):
    _fields_ = [
        ("experts", _pointer),
        ("n_experts", _i64),
        ("row_mask", _pointer),
        ("index_bytes", _i32),
        ("reserved", _i32),
        ("dynamic", _pointer),
        ("compact", _pointer),
    ]


# -- griffin_gguf.h ---------------------------------------------------------------------------------------------------


class CodesStruct(ctypes.Structure):
    _fields_ = [(name, _pointer) for name in ("codes", "scale", "offset", "sub", "sub_offset")]


class PartsStruct(ctypes.Structure):
    _fields_ = [("block", _i32), ("planes", _i32), ("codes", _i64), ("begin", _i64 * 5), ("bytes", _i64)]


class GgufTensorStruct(ctypes.Structure):
    _fields_ = [
        ("matrix", MatrixStruct),
        ("row_order", _pointer),
        *[(name, _i64) for name in ("offset", "bytes")],
        *[(name, _i32) for name in ("file", "type")],
    ]


STRUCTS: dict[str, type[ctypes.Structure]] = {
    "griffin_grouped": GroupedStruct,
    "griffin_codes": CodesStruct,
    "griffin_gguf_tensor": GgufTensorStruct,
    "griffin_parts": PartsStruct,
    "griffin_ff_block": BlockStruct,
    "griffin_matrix": MatrixStruct,
    "griffin_dynamic": DynamicStruct,
    "griffin_io": IoStruct,
    "griffin_norm": NormStruct,
    "griffin_layer": LayerStruct,
    "griffin_decoder": DecoderStruct,
    "griffin_cache": CacheStruct,
    "griffin_experts": ExpertsStruct,
}
"""By their names in C."""

# -- functions --------------------------------------------------------------------------------------------------------

FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "griffin_abi": (_int, []),
    "griffin_sizeof": (_i64, [ctypes.c_char_p]),
    "griffin_last_offset": (_i64, [ctypes.c_char_p]),
    "griffin_use_openmp": (None, [_pointer] * 3),
    "griffin_set_isa": (_int, [ctypes.c_char_p]),
    "griffin_isa": (ctypes.c_char_p, []),
    "griffin_isas": (ctypes.c_char_p, []),
    "griffin_threading": (ctypes.c_char_p, []),
    "griffin_calls": (_i64, []),
    "griffin_ff_bytes": (_i64, []),
    "griffin_ff": (_int, [_pointer, _pointer, _int]),
    "griffin_matvec": (_int, [_pointer, _pointer, _int]),
    "griffin_decode": (_int, [_pointer, _pointer, _pointer, _pointer, _int, _pointer, _int]),
    "griffin_union": (_i64, [_pointer, _int, _int, _i64, _i64, _pointer, _pointer]),
    "griffin_gguf_format": (_int, [_int, _pointer, _pointer, _pointer]),
    "griffin_grouped_bytes": (_i64, [_pointer, _pointer]),
    "griffin_pack_gguf": (_int, [_pointer, _int, _pointer, _pointer, _int]),
    "griffin_pack_tensors": (_int, [_pointer, _i64, _pointer]),
    "griffin_pack_codes": (_int, [_pointer, _pointer, _int]),
    "griffin_quantise": (_int, [_pointer, _pointer, _i64, _i64, _pointer, _pointer, _int]),
    "griffin_unpack": (_int, [_pointer, _pointer, *[_i64] * 4, _pointer, _int, _i64, _int]),
    "griffin_row_norms": (_int, [_pointer, _pointer, _int]),
    "griffin_copy_rows": (_int, [_pointer, _pointer, _int, _i64, _pointer, _int]),
    "griffin_advise_huge": (_int, [_pointer, _i64]),
    "griffin_read_bandwidth": (ctypes.c_double, [_pointer, _i64, _int]),
}
"""Result and arguments."""


def bind(library: ctypes.CDLL) -> str | None:
    """Declare an opened library's functions, and compare its number and struct layouts with this file's.

    Returns how they differ, or `None`. Raises AttributeError if a function is missing.
    """
    if (number := library.griffin_abi()) != ABI:
        return f"has interface {number}, this package needs {ABI}"
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    for name, struct in STRUCTS.items():
        if (size := library.griffin_sizeof(name.encode())) != (expected := ctypes.sizeof(struct)):
            return f"has a {name} of {size} bytes, this package needs {expected}"
        last = struct._fields_[-1][0]
        if (offset := library.griffin_last_offset(name.encode())) != (expected := getattr(struct, last).offset):
            return f"has the last field of {name} at byte {offset}, this package needs {last} at {expected}"
    return None
