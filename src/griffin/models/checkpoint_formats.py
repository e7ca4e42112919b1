"""Quantised checkpoints of Transformers folders: from a Linear's tensors, as the format stores them, to `Grouped`.

A format is a row of `FORMATS`: what its settings (`quantization_config`) may say, and an importer. Weights are
`scale * (code - zero)` or `scale * table[code]`, all of them taken from the file as they are.

Layouts, O outputs, I inputs, G groups of a row:

- GPTQ (AutoGPTQ, GPTQModel): qweight (I bits / 32, O) and qzeros (G, O bits / 32) int32, codes as a stream of bits from
  the lowest on; scales (G, O) float16; g_idx (I,) int32, each input's group. Format "gptq" stores zero - 1.
- AWQ (AutoAWQ, "gemm"): qweight (I, O / 8) and qzeros (G, O / 8) int32, outputs 0, 2, 4, 6, 1, 3, 5, 7 from the lowest
  nibble on; scales (G, O) float16.
- compressed-tensors: weight_packed (O, I bits / 32) int32, a stream of bits, codes plus 2^(bits-1); or weight (O, I)
  int8 or float8; weight_scale (O, G), (O, 1), (1,) or a value for a block; weight_zero_point alike, or packed as
  (O bits / 32, G) int32.
- bitsandbytes 4 bit: weight, two codes a byte, the first in the high nibble; weight.absmax, a scale for a block of
  values; weight.quant_map, the table. Double quantisation: absmax are bytes, nested_quant_map[byte] * nested_absmax of
  256 of them + nested_offset.
- FP8: weight (O, I) float8, weight_scale_inv for a block, a row or all, of MXFP8 as bytes, 2^(byte - 127); FBGEMM's
  weight_scale (O, 1).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from griffin.errors import GriffinError
from griffin.native import grouped

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output of each nibble, from the lowest on
_BITS = (2, 3, 4, 5, 6, 8)
_FP8 = {
    torch.float8_e4m3fn: "FP8-e4m3",
    torch.float8_e5m2: "FP8-e5m2",
    torch.float8_e4m3fnuz: "FP8-e4m3fnuz",
    torch.float8_e5m2fnuz: "FP8-e5m2fnuz",
}
Settings = Mapping[str, Any]


class RefusedError(ValueError):
    """A checkpoint that cannot be read exactly."""


@dataclass(frozen=True, eq=False)
class Grouped:
    """A weight (out, in) in groups: `scale * (code - zero)`, or with a table `scale * table[code]`.

    Args:
        name: of the format.
        bits: of a code.
        size: neighbouring weights of a row that share a scale; `in` or more: all.

    Shapes:
        codes: (out, in) uint8
        scale: (out, G) float, G = in / size rounded up
        zero: (out, G) uint8, or one for all
        table: (2^bits,) float32, or None
    """

    name: str
    bits: int
    size: int
    codes: Tensor
    scale: Tensor
    zero: Tensor | int = 0
    table: Tensor | None = None

    def rows(self, begin: int, end: int) -> Grouped:
        """Rows begin..end."""
        zero = self.zero if isinstance(self.zero, int) else self.zero[begin:end]
        return replace(self, codes=self.codes[begin:end], scale=self.scale[begin:end], zero=zero)

    def dequantised(self) -> Tensor:
        """Shapes: returns (out, in) float32."""
        at = torch.arange(self.codes.shape[1]) // self.size
        if self.table is not None:
            values = self.table[self.codes.int()]
        else:
            values = self.codes.float() - (self.zero if isinstance(self.zero, int) else self.zero[:, at].float())
        return values.mul_(self.scale.float()[:, at])

    def packed(self, *, neuron_major: bool = False) -> grouped.Packed:
        """As the native library reads it, the same numbers.

        Raises:
            RefusedError: the library has no such groups.
        """
        d_in = self.codes.shape[1]
        span = 256 if self.size >= d_in else math.gcd(self.size, 256)
        if span < 16:
            raise RefusedError(f"{self.name} with groups of {self.size}; expected a multiple of 16, or a whole row")
        zero = self.zero
        if isinstance(zero, Tensor) and bool((zero == zero[0, 0]).all()):
            zero = int(zero[0, 0])
        scale = self.scale if self.scale.dtype == torch.float16 else self.scale.float()
        format = grouped.Format(
            self.name,
            self.bits,
            min(span, 32),
            "f16" if scale.dtype == torch.float16 else "f32",
            "code" if isinstance(zero, Tensor) else "none",
            0 if isinstance(zero, Tensor) else zero,
            span,
            () if self.table is None else tuple(self.table.tolist()),
        )
        n = format.padded(d_in)
        codes = self.codes if n == d_in else torch.nn.functional.pad(self.codes, (0, n - d_in))
        at = torch.arange(-(-n // span)) * span // self.size
        at.clamp_(max=scale.shape[1] - 1)
        offset = zero[:, at] if isinstance(zero, Tensor) else None
        return grouped.from_codes(format, codes, scale[:, at], offset, d_in=d_in, neuron_major=neuron_major)


@dataclass(frozen=True, eq=False)
class Stored:
    """A Linear as a checkpoint stores it.

    Args:
        path: of the module in the model.
        kind: name of its class.
        d_out, d_in: its shape.
        tensors: by what follows the module's path in their names.
    """

    path: str
    kind: str
    d_out: int
    d_in: int
    tensors: Mapping[str, Tensor]

    def take(self, name: str, *shapes: tuple[int, ...]) -> Tensor:
        """A tensor of one of the shapes.

        Raises:
            GriffinError: it is missing or of another shape.
        """
        tensor = self.tensors.get(name)
        if tensor is None or tuple(tensor.shape) not in shapes:
            found = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
            raise GriffinError(
                f"the checkpoint's {self.path}.{name} is {found}, expected {' or '.join(map(str, shapes))}; "
                "fetch or save it again"
            )
        return tensor


@dataclass(frozen=True)
class CheckpointFormat:
    """How a `quant_method` is read.

    Args:
        check: refuses settings (raises RefusedError); returns whether they quantise activations too.
        read: a Linear's weight, or None if the checkpoint holds it as floats.
    """

    check: Callable[[Settings], bool]
    read: Callable[[Settings, Stored], Grouped | None]


def format_of(settings: Settings) -> CheckpointFormat:
    """The row of these settings' `quant_method`. Raises RefusedError for another one."""
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"  # which its first versions did not say
    if method not in FORMATS:
        raise RefusedError(
            f"the checkpoint is quantised by {method!r}, which is not read; expected one of {', '.join(FORMATS)}, a "
            ".gguf file or plain weights"
        )
    return FORMATS[method]


def stream(words: Tensor, bits: int) -> Tensor:
    """Codes that lie in int32 words one after the other, from the lowest bit on.

    Shapes: words (..., n) int32; returns (..., 32 n / bits rounded down) uint8.
    """
    period = math.lcm(bits, 32) // 32  # words that hold a whole number of codes
    count = words.shape[-1] * 32 // bits
    words = torch.nn.functional.pad(words, (0, -words.shape[-1] % period))
    parts = words.reshape(*words.shape[:-1], -1, period)
    codes = torch.empty(*parts.shape[:-1], 32 * period // bits, dtype=torch.uint8)
    for i in range(codes.shape[-1]):
        word, shift = divmod(i * bits, 32)
        code = parts[..., word] >> shift  # sign bits that come along lie above the code's
        if shift + bits > 32:
            code = code & (1 << (32 - shift)) - 1 | parts[..., word + 1] << (32 - shift)
        codes[..., i] = code & (1 << bits) - 1
    return codes.flatten(-2)[..., :count]


def _one_of(settings: Settings, name: str, expected: tuple[Any, ...], what: str) -> None:
    found = settings.get(name, expected[0])
    found = found.lower() if isinstance(found, str) else found
    if found not in expected:
        raise RefusedError(f"{what} with {name} {found!r} is not read; expected {' or '.join(map(repr, expected))}")


# -- GPTQ and AWQ -----------------------------------------------------------------------------------------------------


def _check_gptq(settings: Settings) -> bool:
    _one_of(settings, "bits", (4, 2, 3, 8), "GPTQ")
    _one_of(settings, "checkpoint_format", ("gptq", "gptq_v2", None), "GPTQ")
    _one_of(settings, "pack_dtype", ("int32", None), "GPTQ")
    if other := [rule for rule in settings.get("dynamic") or () if not rule.startswith("-:")]:
        raise RefusedError(f"GPTQ with settings of some modules' own (dynamic: {other[0]}) is not read")
    return False


def _read_gptq(settings: Settings, linear: Stored) -> Grouped | None:
    if "qweight" not in linear.tensors:
        return None
    bits, d_out, d_in = settings["bits"], linear.d_out, linear.d_in
    size, groups = _groups(settings["group_size"], d_in)
    if "g_idx" in linear.tensors and (linear.take("g_idx", (d_in,)) != torch.arange(d_in) // size).any():
        raise RefusedError(
            f"{linear.path}: GPTQ with desc_act, whose g_idx gives neighbouring weights different scales, is not read; "
            "take a checkpoint with desc_act=False (or static groups)"
        )
    zero = stream(linear.take("qzeros", (groups, -(-d_out * bits // 32))), bits)[:, :d_out].t()
    if settings.get("checkpoint_format") != "gptq_v2":
        zero = zero + 1 & (1 << bits) - 1
    codes = stream(linear.take("qweight", (-(-d_in * bits // 32), d_out)).t(), bits)[:, :d_in]
    return Grouped(f"GPTQ-int{bits}", bits, size, codes, linear.take("scales", (groups, d_out)).t(), zero)


def _check_awq(settings: Settings) -> bool:
    _one_of(settings, "version", ("gemm",), "AWQ")
    _one_of(settings, "bits", (4,), "AWQ")
    return False


def _read_awq(settings: Settings, linear: Stored) -> Grouped | None:
    if "qweight" not in linear.tensors:
        return None
    d_out, d_in = linear.d_out, linear.d_in
    size, groups = _groups(settings["group_size"], d_in)
    order = torch.tensor(_AWQ_ORDER).argsort()

    def outputs_first(name: str, rows: int) -> Tensor:
        nibbles = stream(linear.take(name, (rows, d_out // 8)), 4).view(rows, -1, 8)
        outputs: Tensor = nibbles[..., order].flatten(1).t()
        return outputs

    scale = linear.take("scales", (groups, d_out)).t()
    return Grouped("AWQ-int4", 4, size, outputs_first("qweight", d_in), scale, outputs_first("qzeros", groups))


def _groups(size: int, d_in: int) -> tuple[int, int]:
    """Weights of a group and groups of a row; -1: one."""
    size = d_in if size < 1 else size
    return size, -(-d_in // size)


# -- compressed-tensors -----------------------------------------------------------------------------------------------


def _check_compressed(settings: Settings) -> bool:
    what = "compressed-tensors"
    if (sparsity := (settings.get("sparsity_config") or {}).get("format", "dense")) != "dense":
        raise RefusedError(f"{what} with sparsity format {sparsity!r} is not read")
    if (settings.get("transform_config") or {}).get("config_groups"):
        raise RefusedError(f"{what} with transforms of the inputs (transform_config) is not read")
    wide = settings.get("kv_cache_scheme") is not None
    for group in settings["config_groups"].values():
        weights, layout = group["weights"], group.get("format") or settings["format"]
        if layout not in _LAYOUTS:
            raise RefusedError(f"{what} format {layout!r} is not read; expected one of {', '.join(_LAYOUTS)}")
        if (kind := (weights["type"], weights["num_bits"])) not in _LAYOUTS[layout]:
            raise RefusedError(f"{what} format {layout!r} with {kind[0]}{kind[1]} weights is not read")
        _one_of(weights, "strategy", ("tensor", "channel", "group", "block"), what)
        if weights.get("actorder") in ("group", True):
            raise RefusedError(
                f"{what} with actorder 'group', which gives neighbouring weights different scales, is not read; take a "
                "checkpoint with actorder 'static' or none"
            )
        wide |= any(group.get(name) is not None for name in ("input_activations", "output_activations"))
    return wide


_LAYOUTS = {
    "pack-quantized": tuple(("int", bits) for bits in _BITS),
    "int-quantized": (("int", 8), ("int", 4)),
    "float-quantized": (("float", 8),),
}
"""The formats of compressed-tensors, and the types that they are read with."""


def _read_compressed(settings: Settings, linear: Stored) -> Grouped | None:
    if "weight_packed" not in linear.tensors and "weight_scale" not in linear.tensors:
        return None
    d_out, d_in = linear.d_out, linear.d_in
    group = _config_group(settings, linear)
    weights = group["weights"]
    block = (1, d_in) if weights["strategy"] in ("tensor", "channel") else (1, weights.get("group_size"))
    if weights["strategy"] == "block":
        block = tuple(weights["block_structure"])
    scale = _scales(linear, "weight_scale", block)
    layout = group.get("format") or settings["format"]
    if layout == "float-quantized":
        return _fp8(linear, scale, block[1])
    bits = weights["num_bits"] if layout == "pack-quantized" else 8  # int4 in bytes too
    if layout == "pack-quantized":
        codes = stream(linear.take("weight_packed", (d_out, -(-d_in * bits // 32))), bits)[:, :d_in]
    else:
        codes = linear.take("weight", (d_out, d_in)).view(torch.uint8) ^ 128
    zero: Tensor | int = 1 << bits - 1
    if not weights.get("symmetric", True):
        points = linear.tensors.get("weight_zero_point")
        if points is not None and points.dtype == torch.int32:
            words = linear.take("weight_zero_point", (-(-d_out * bits // 32), scale.shape[1]))
            zero = stream(words.t(), bits)[:, :d_out].t()
        else:
            zero = (_scales(linear, "weight_zero_point", block).int() + zero).to(torch.uint8)
    return Grouped(f"CT-int{weights['num_bits']}", bits, block[1], codes, scale, zero)


def _config_group(settings: Settings, linear: Stored) -> Any:
    """The group of settings whose targets name this Linear: by its path, else by its class."""

    def names(target: str) -> bool:
        return re.match(target[3:], linear.path) is not None if target.startswith("re:") else target == linear.path

    groups = list(settings["config_groups"].values())
    by_path = [group for group in groups if any(map(names, group["targets"]))]
    found = by_path or [group for group in groups if linear.kind in group["targets"]]
    if not found:
        raise RefusedError(f"{linear.path} is quantised, but no target of the checkpoint's config_groups names it")
    return found[0]


# -- bitsandbytes -----------------------------------------------------------------------------------------------------


def _check_bitsandbytes(settings: Settings) -> bool:
    if settings.get("load_in_8bit") or settings.get("_load_in_8bit"):
        raise RefusedError(
            "bitsandbytes int8 (LLM.int8(), load_in_8bit) is not read, as its weights are code * SCB / 127, which no "
            "scale is exactly; expected 4 bits (nf4 or fp4)"
        )
    return False


def _read_bitsandbytes(settings: Settings, linear: Stored) -> Grouped | None:
    mark = "weight.quant_state.bitsandbytes__"
    kind = next((name.removeprefix(mark) for name in linear.tensors if name.startswith(mark)), None)
    if kind is None:
        return None
    state = json.loads(bytes(linear.tensors[mark + kind].tolist()))
    d_out, d_in, size = linear.d_out, linear.d_in, state["blocksize"]
    if d_in % size:
        raise RefusedError(f"{linear.path}: rows of {d_in} weights in blocks of {size}, which reach over rows")
    blocks = d_out * d_in // size
    scale = linear.take("weight.absmax", (blocks,))
    if scale.dtype == torch.uint8:
        step = state["nested_blocksize"]
        nested = linear.take("weight.nested_absmax", (-(-blocks // step),)).float().repeat_interleave(step)[:blocks]
        numbers = linear.take("weight.nested_quant_map", (256,)).float()
        scale = numbers[scale.int()] * nested + torch.tensor(state["nested_offset"], dtype=torch.float32)
    bytes_ = linear.tensors["weight"].contiguous().view(torch.uint8).flatten()
    if bytes_.numel() * 2 != d_out * d_in:
        raise GriffinError(
            f"the checkpoint's {linear.path}.weight has {bytes_.numel()} bytes, expected {d_out * d_in // 2}; "
            "fetch or save it again"
        )
    codes = torch.stack((bytes_ >> 4, bytes_ & 15), dim=-1).view(d_out, d_in)
    table = linear.take("weight.quant_map", (16,)).float()
    return Grouped(kind.upper(), 4, size, codes, scale.view(d_out, -1), table=table)


# -- FP8 --------------------------------------------------------------------------------------------------------------


def _check_fp8(settings: Settings) -> bool:
    return True


def _read_fp8(settings: Settings, linear: Stored) -> Grouped | None:
    weight = linear.tensors.get("weight")
    if weight is None or weight.dtype not in _FP8:
        return None
    name = "weight_scale_inv" if "weight_scale_inv" in linear.tensors else "weight_scale"
    block = tuple(settings.get("weight_block_size") or (1, linear.d_in))
    scale = _scales(linear, name, block)
    if scale.dtype == torch.uint8:
        scale = (scale.float() - 127).exp2()
    return _fp8(linear, scale, block[1])


def _fp8(linear: Stored, scale: Tensor, size: int) -> Grouped:
    weight = linear.take("weight", (linear.d_out, linear.d_in))
    if weight.dtype not in _FP8:
        raise RefusedError(f"{linear.path} has {weight.dtype} weights, expected one of {', '.join(_FP8.values())}")
    table = torch.arange(256, dtype=torch.uint8).view(weight.dtype).float()
    codes = weight.view(torch.uint8)
    if not bool(table.isfinite()[codes.int()].all()):
        raise GriffinError(f"the checkpoint's {linear.path}.weight has NaN or infinite values; fetch or save it again")
    return Grouped(_FP8[weight.dtype], 8, size, codes, scale.float(), table=table)


def _scales(linear: Stored, name: str, block: tuple[int, ...]) -> Tensor:
    """Values of blocks, of rows or of the whole matrix, for each row. Shapes: returns (out, groups of a row)."""
    d_out, groups = linear.d_out, -(-linear.d_in // block[1])
    rows = -(-d_out // block[0])
    whole = ((), (1,), (1, 1), (d_out,)) if groups == 1 and block[0] == 1 else ()
    values = linear.take(name, (rows, groups), *whole)
    if values.numel() == 1:
        return values.reshape(1, 1).expand(d_out, 1)
    return values.reshape(rows, groups).repeat_interleave(block[0], dim=0)[:d_out]


FORMATS = {
    "gptq": CheckpointFormat(_check_gptq, _read_gptq),
    "awq": CheckpointFormat(_check_awq, _read_awq),
    "compressed-tensors": CheckpointFormat(_check_compressed, _read_compressed),
    "bitsandbytes": CheckpointFormat(_check_bitsandbytes, _read_bitsandbytes),
    "fp8": CheckpointFormat(_check_fp8, _read_fp8),
    "fbgemm_fp8": CheckpointFormat(_check_fp8, _read_fp8),
}
"""By `quant_method`."""
