"""Quantised Transformers checkpoints: weights to the bit, logits, generation at two densities, refusals by name.

Every format is written here by a packer of its own, so that the tests need no package but Transformers.
"""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import griffin
from evaluation_data import bytes_tokenizer
from griffin.engine.decoders import Decoders, NativeStep, new_cache
from griffin.layouts import find_ff_blocks
from griffin.native import grouped, kernel, library, operands
from griffin.weights.quantised import QuantisedLinear, prompt_dtype

pytestmark = pytest.mark.skipif(library.why_not() is not None, reason=f"{library.why_not()}")

D, D_FF, VOCABULARY = 128, 256, 260
LINEARS = ("Linear", "Conv1D")
Tensors = dict[str, Tensor]
"""Of a Linear: by what follows its path."""
Packer = Callable[[Tensor], tuple[Tensors, Tensor]]
"""From a weight (out, in) float32 to its tensors and the weight that they mean, (out, in) float32."""


# -- packers ----------------------------------------------------------------------------------------------------------


def codes_of(weight: Tensor, bits: int, size: int, symmetric: bool, scale_dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Codes (out, in), scales and zeros (out, groups) and the weight that they mean; any sensible rounding will do."""
    d_out, d_in = weight.shape
    groups = weight.view(d_out, -1, size)
    top = 2**bits - 1
    if symmetric:
        scale = groups.abs().amax(-1).mul(2 / top).to(scale_dtype)
        zero = torch.full_like(scale, 2 ** (bits - 1), dtype=torch.int32)
    else:
        least, most = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
        scale = ((most - least) / top).to(scale_dtype)
        zero = (-least / scale.float()).round().int().clamp(1, top)
    codes = (groups / scale.float()[..., None] + zero[..., None]).round().clamp(0, top).int()
    meant = (codes - zero[..., None]).float() * scale.float()[..., None]
    return codes.view(d_out, d_in), scale, zero, meant.view(d_out, d_in)


def bit_stream(codes: Tensor, bits: int) -> Tensor:
    """(rows, n) codes as (rows, n bits / 32) int32, from the lowest bit on, by way of big integers."""
    words = []
    for row in codes.tolist():
        number = sum(code << bits * i for i, code in enumerate(row))
        words.append([number >> 32 * i & 0xFFFFFFFF for i in range(-(-len(row) * bits // 32))])
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)


def gptq(bits: int, size: int, symmetric: bool, version: int = 1) -> Packer:
    def pack(weight: Tensor) -> tuple[Tensors, Tensor]:
        group = weight.shape[1] if size < 0 else size
        codes, scale, zero, meant = codes_of(weight, bits, group, symmetric, torch.float16)
        tensors = {
            "qweight": bit_stream(codes, bits).t(),
            "qzeros": bit_stream(zero.t() - (2 - version), bits),
            "scales": scale.t(),
            "g_idx": (torch.arange(weight.shape[1]) // group).int(),
        }
        return tensors, meant

    return pack


def awq(size: int) -> Packer:
    def interleaved(codes: Tensor) -> Tensor:
        return bit_stream(codes.view(len(codes), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1), 4)

    def pack(weight: Tensor) -> tuple[Tensors, Tensor]:
        codes, scale, zero, meant = codes_of(weight, 4, size, False, torch.float16)
        return {"qweight": interleaved(codes.t()), "qzeros": interleaved(zero.t()), "scales": scale.t()}, meant

    return pack


def compressed(bits: int, size: int, symmetric: bool, layout: str = "pack") -> Packer:
    def pack(weight: Tensor) -> tuple[Tensors, Tensor]:
        group = weight.shape[1] if size < 0 else size
        codes, scale, zero, meant = codes_of(weight, bits, group, symmetric, torch.bfloat16)
        if layout == "pack":
            shape = torch.tensor(weight.shape)
            tensors = {"weight_packed": bit_stream(codes, bits), "weight_shape": shape, "weight_scale": scale}
            packed = bit_stream(zero.t(), bits).t()
            return tensors | ({} if symmetric else {"weight_zero_point": packed}), meant
        middle = 2 ** (bits - 1)
        tensors = {"weight": (codes - middle).to(torch.int8), "weight_scale": scale}
        return tensors | ({} if symmetric else {"weight_zero_point": (zero - middle).to(torch.int8)}), meant

    return pack


def float8(name: str, block: tuple[int, int], dtype: torch.dtype = torch.float8_e4m3fn, shape: str = "") -> Packer:
    def pack(weight: Tensor) -> tuple[Tensors, Tensor]:
        d_out, d_in = weight.shape
        high, wide = (size if size > 0 else whole for size, whole in zip(block, weight.shape, strict=True))
        blocks = weight.view(d_out // high, high, d_in // wide, wide)
        scale = blocks.abs().amax((1, 3)) / 240
        exponents = scale.log2().ceil()
        if shape in ("mx", "e8m0"):
            scale = exponents.exp2()
        stored = (blocks / scale[:, None, :, None]).to(dtype)
        meant = (stored.float() * scale[:, None, :, None]).view(d_out, d_in)
        kept = {
            "": scale,
            "one": scale.view(-1)[:1],
            "none": scale.view(-1)[0],
            "mx": (exponents + 127).to(torch.uint8),
            "e8m0": (exponents + 127).to(torch.uint8),
        }[shape]
        kept = kept.view(torch.float8_e8m0fnu) if shape == "e8m0" else kept  # which torch has from 2.7 on
        return {"weight": stored.view(d_out, d_in), name: kept}, meant

    return pack


NF4 = torch.erfinv(torch.linspace(-0.93, 0.93, 16)) / torch.erfinv(torch.tensor(0.93))
"""Any 16 numbers will do: the file has its own."""


def bitsandbytes(size: int, nested: bool, kind: str = "nf4") -> Packer:
    def pack(weight: Tensor) -> tuple[Tensors, Tensor]:
        blocks = weight.view(-1, size)
        scale = blocks.abs().amax(1)
        state: dict[str, Any] = {"quant_type": kind, "blocksize": size, "dtype": "bfloat16", "shape": weight.shape}
        tensors: Tensors = {}
        if nested:
            offset, numbers = scale.mean(), torch.linspace(-1, 1, 256)
            rest = scale - offset
            outer = torch.stack([part.abs().max() for part in rest.split(256)])
            spread = outer.repeat_interleave(256)[: len(rest)]
            stored = (rest / spread * 127.5 + 127.5).round().to(torch.uint8)
            scale = numbers[stored.int()] * spread + offset
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset.item()}
            tensors |= {"weight.nested_absmax": outer, "weight.nested_quant_map": numbers}
        codes = ((blocks / scale[:, None])[..., None] - NF4).abs().argmin(-1)
        meant = (NF4[codes] * scale[:, None]).view(weight.shape)
        pairs = codes.view(-1, 2)
        text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        tensors |= {
            "weight": (pairs[:, 0] << 4 | pairs[:, 1]).to(torch.uint8)[:, None],
            "weight.absmax": stored if nested else scale,
            "weight.quant_map": NF4,
            f"weight.quant_state.bitsandbytes__{kind}": text,
        }
        return tensors, meant

    return pack


# -- checkpoints ------------------------------------------------------------------------------------------------------


def ct_settings(layout: str, kind: str, bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, "group_size": None} | more
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}, "ignore": []}


@dataclass(frozen=True)
class Case:
    pack: Packer
    settings: dict[str, Any]
    format: str
    family: str = "llama"
    changes: dict[str, Any] = field(default_factory=dict)


def gptq_case(bits: int, size: int, symmetric: bool, version: int = 1, **more: Any) -> Case:
    settings = {"quant_method": "gptq", "bits": bits, "group_size": size, "sym": symmetric, "desc_act": False}
    if version == 2:
        settings["checkpoint_format"] = "gptq_v2"
    return Case(gptq(bits, size, symmetric, version), settings, f"GPTQ-int{bits}", **more)


def awq_case(size: int) -> Case:
    settings = {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True, "version": "gemm"}
    return Case(awq(size), settings, "AWQ-int4")


def ct_case(bits: int, size: int, symmetric: bool, **more: Any) -> Case:
    strategy = "channel" if size < 0 else "group"
    extra = {"symmetric": symmetric, "group_size": None if size < 0 else size}
    settings = ct_settings("pack-quantized", "int", bits, strategy, **extra)
    return Case(compressed(bits, size, symmetric), settings, f"CT-int{bits}", **more)


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
BLOCKS = {"weight_block_size": [128, 128]}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
E5M2 = torch.float8_e5m2
CASES = {
    **{f"gptq-{bits}-32": gptq_case(bits, 32, False) for bits in (2, 3, 4, 8)},
    "gptq-4-64-sym": gptq_case(4, 64, True),
    "gptq-4-128-v2": gptq_case(4, 128, False, 2),
    "gptq-4-row": gptq_case(4, -1, False),
    "gptq-4-16": gptq_case(4, 16, False),
    "gptq-4-phi3": gptq_case(4, 32, False, family="phi3"),
    "gptq-4-tied": gptq_case(4, 32, False, changes={"tie_word_embeddings": True}),
    "gptq-4-bias": gptq_case(4, 32, False, changes={"attention_bias": True, "mlp_bias": True}),
    "gptq-8-gpt2": gptq_case(8, 32, False, family="gpt2"),
    **{f"awq-{size}": awq_case(size) for size in (32, 64, 128)},
    **{f"ct-{bits}-{size}": ct_case(bits, size, True) for bits in (4, 8) for size in (32, 128)},
    **{f"ct-{bits}-64-asym": ct_case(bits, 64, False) for bits in (3, 4, 8)},
    "ct-4-row": ct_case(4, -1, True),
    "ct-bytes": Case(compressed(8, -1, True, "bytes"), ct_settings("int-quantized", "int", 8, "channel"), "CT-int8"),
    "ct-bytes-asym": Case(
        compressed(8, 32, False, "bytes"),
        ct_settings("int-quantized", "int", 8, "group", group_size=32, symmetric=False),
        "CT-int8",
    ),
    "ct-fp8-row": Case(
        float8("weight_scale", (1, -1)), ct_settings("float-quantized", "float", 8, "channel"), "FP8-e4m3"
    ),
    "ct-fp8-all": Case(
        float8("weight_scale", (-1, -1), shape="one"), ct_settings("float-quantized", "float", 8, "tensor"), "FP8-e4m3"
    ),
    "ct-fp8-block": Case(
        float8("weight_scale", (64, 128)),
        ct_settings("float-quantized", "float", 8, "block", block_structure=[64, 128]),
        "FP8-e4m3",
    ),
    "fp8-block": Case(float8("weight_scale_inv", (64, 64)), FP8 | {"weight_block_size": [64, 64]}, "FP8-e4m3"),
    "fp8-all": Case(float8("weight_scale_inv", (-1, -1), shape="none"), FP8, "FP8-e4m3"),
    "fp8-mx": Case(float8("weight_scale_inv", (1, 32), shape="mx"), FP8 | {"weight_block_size": [1, 32]}, "FP8-e4m3"),
    "fp8-e8m0": Case(
        float8("weight_scale_inv", (64, 64), shape="e8m0"), FP8 | {"weight_block_size": [64, 64]}, "FP8-e4m3"
    ),
    "fp8-e5m2": Case(float8("weight_scale_inv", (-1, -1), E5M2, shape="none"), FP8, "FP8-e5m2"),
    "fbgemm": Case(float8("weight_scale", (1, -1)), {"quant_method": "fbgemm_fp8"}, "FP8-e4m3"),
    "nf4": Case(bitsandbytes(64, False), BNB, "NF4"),
    "nf4-nested": Case(bitsandbytes(64, True), BNB, "NF4"),
    "nf4-128": Case(bitsandbytes(128, True), BNB, "NF4", family="phi3"),
    "fp4": Case(bitsandbytes(64, False, "fp4"), BNB, "FP4"),
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": D, "intermediate_size": D_FF, "num_attention_heads": 4, "num_key_value_heads": 2},
    "phi3": {"hidden_size": D, "intermediate_size": D_FF, "num_attention_heads": 4, "num_key_value_heads": 2},
    "gpt2": {"n_embd": D, "n_inner": D_FF, "n_head": 4},
}
_COMMON = {"num_hidden_layers": 2, "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}


def tiny(family: str = "llama", **changes: Any) -> PreTrainedModel:
    torch.manual_seed(3)
    config = AutoConfig.for_model(family, **(_COMMON | FAMILIES[family] | {"tie_word_embeddings": False} | changes))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, 1.0 if "norm" in name or "ln_" in name else 0.0, 0.1)
    return model


def checkpoint(case: Case, folder: Path, *, shards: int = 1) -> PreTrainedModel:
    """Writes the folder; returns the float32 model of the weights that it means."""
    model = tiny(case.family, **case.changes)
    tensors: Tensors = {}
    paths = {path for path, m in model.named_modules() if type(m).__name__ in LINEARS and "head" not in path}
    for name, value in model.state_dict().items():
        path, _, kind = name.rpartition(".")
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if path not in paths or kind == "bias":
            tensors[name] = value.clone()
            continue
        conv = type(model.get_submodule(path)).__name__ == "Conv1D"
        own, meant = case.pack(value.t().contiguous() if conv else value)
        tensors |= {f"{path}.{key}": tensor.contiguous().clone() for key, tensor in own.items()}
        value.copy_(meant.t() if conv else meant)
    folder.mkdir(exist_ok=True)
    config = copy.deepcopy(model.config)
    config.quantization_config = case.settings
    config.architectures = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    bytes_tokenizer().save_pretrained(folder)
    names = ["model.safetensors"] if shards == 1 else [f"model-{i}.safetensors" for i in range(shards)]
    where = {key: names[i % shards] for i, key in enumerate(tensors)}
    for name in names:
        save_file({key: tensor for key, tensor in tensors.items() if where[key] == name}, folder / name)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return model


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def error_of(model: nn.Module) -> float:
    """What logits may differ by: products in integers round their inputs to 15 bits, those with a table do not."""
    tables = [part.format.table for m in model.modules() if isinstance(m, QuantisedLinear) for part in m.parts]
    return 1e-5 if all(tables) else 4e-2


# -- tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_weights_logits_and_generation(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    meant = checkpoint(case, tmp_path)
    model, tokenizer = griffin.load(tmp_path)
    linears = {path: m for path, m in model.named_modules() if isinstance(m, QuantisedLinear)}
    assert {m.format for m in linears.values()} == {case.format}
    assert len(linears) == sum(type(m).__name__ in LINEARS for m in meant.modules()) - 1
    for path, module in linears.items():
        weight = meant.get_submodule(path).weight
        expected = weight.t() if type(meant.get_submodule(path)).__name__ == "Conv1D" else weight
        found = module.dequantised()
        assert torch.equal(found.t() if module.neuron_major else found, expected), path
    assert all(block.output.neuron_major for block in find_ff_blocks(model))
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        assert relative(model(ids).logits, meant(ids).logits) < error_of(model)
    for density in (1.0, 0.5):
        result = griffin.generate(model, tokenizer, "the sea is", density=density, max_tokens=6)
        assert result.generated_tokens == 6


@pytest.mark.parametrize("name", ["gptq-4-32", "awq-128", "ct-4-64-asym", "nf4-nested", "fp8-block", "ct-fp8-row"])
@pytest.mark.parametrize("density", [1.0, 0.5])
def test_native_step(name: str, density: float, tmp_path: Path) -> None:
    """Whole steps run natively, and their logits are the float model's."""
    meant = checkpoint(CASES[name], tmp_path)
    model, _ = griffin.load(tmp_path)
    ids = torch.arange(4, 24)[None]
    logits = []
    with torch.no_grad():
        for each in (model, meant):
            handle = griffin.attach(each, density=density, selection="topk")
            cache = new_cache(each)
            with handle.prompt_phase():
                each(ids, past_key_values=cache)
            decoder = Decoders(each, handle).decoder([cache], handle.selections)
            assert isinstance(decoder, NativeStep)
            logits.append(torch.stack([decoder(torch.tensor([token])) for token in (5, 6, 7)]))
    # at half of the neurons the two may also choose some others
    assert relative(*logits) < error_of(model) * (1 if density == 1.0 else 4)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", ["best", "avx2", "portable"])
def test_table_products(bits: int, dtype: torch.dtype, isa: str) -> None:
    """Rows and neuron-major, any number of inputs, odd sizes, every selection of the FF."""
    if isa != "best" and isa not in library.loaded().griffin_isas().decode().split():
        pytest.skip(f"no {isa} here")
    library.loaded().griffin_set_isa(None if isa == "best" else isa.encode())
    try:
        _table_products(bits, dtype)
    finally:
        library.loaded().griffin_set_isa(None)


def _table_products(bits: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    d, d_ff = 330, 200
    format = grouped.Format("table", bits, 32, "f32", "none", 0, 64, tuple(torch.randn(2**bits).tolist()))

    def made(d_out: int, d_in: int, neuron_major: bool = False) -> tuple[operands.Matrix, Tensor]:
        n = format.padded(d_in)
        codes = torch.randint(0, 2**bits, (d_out, n), dtype=torch.uint8)
        scale = torch.rand(d_out, -(-n // 64)) * 0.1
        packed = grouped.from_codes(format, codes, scale, d_in=d_in, neuron_major=neuron_major)
        weight = (torch.tensor(format.table)[codes.int()] * scale.repeat_interleave(64, 1)[:, :n])[:, :d_in]
        found = packed.unpack()
        assert torch.equal(found.t() if neuron_major else found, weight)
        return operands.packed_matrix(packed), weight.double()

    (gate, w_g), (up, w_1), (down, w_2) = made(d_ff, d), made(d_ff, d), made(d, d_ff, True)
    worst = 1e-5 if dtype == torch.float32 else 1e-2
    for rows in (1, 3, 16, 70):
        x, z = torch.randn(rows, d).to(dtype), torch.randn(rows, d_ff).to(dtype)
        assert relative(kernel.matvec(up, x), x.double() @ w_1.t()) < worst
        assert relative(kernel.matvec(down, z), z.double() @ w_2.t()) < worst
    experts = torch.randperm(d_ff)[:77].sort().values
    for gated in (True, False):
        block = operands.ff_block(gate if gated else None, up, down, activation="silu")
        for rows in (1, 2, 16):
            x = torch.randn(rows, d).to(dtype)
            z = x.double() @ w_1.t()
            z = nn.functional.silu(x.double() @ w_g.t()) * z if gated else nn.functional.silu(z)
            assert relative(kernel.ff(block, x), z @ w_2.t()) < worst
            assert relative(kernel.ff(block, x, experts), z[:, experts] @ w_2[:, experts].t()) < worst
            dynamic = operands.dynamic(block, torch.ones(d_ff), 50)
            scores = (nn.functional.silu(x.double() @ w_g.t()) if gated else z).abs()
            kept = torch.zeros_like(z).scatter_(1, scores.topk(50).indices, 1.0)
            if dtype == torch.float32:
                assert relative(kernel.ff(block, x, dynamic=dynamic), (z * kept) @ w_2.t()) < 1e-5


def test_sharded_and_dequantised(tmp_path: Path) -> None:
    meant = checkpoint(CASES["gptq-4-32"], tmp_path, shards=3)
    model, _ = griffin.load(tmp_path, dtype="f32")
    assert not hasattr(model.config, "quantization_config")
    for (name, found), expected in zip(model.named_parameters(), meant.parameters(), strict=True):
        assert torch.equal(found, expected), name
    model, _ = griffin.load(tmp_path, weights="bf16")
    assert model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="GPTQ-int4 weights, and weights='int8' would round them a second time"):
        griffin.load(tmp_path, weights="int8")


def test_some_linears_plain_and_generation_config(tmp_path: Path) -> None:
    """What the checkpoint keeps in floats stays so."""
    case = CASES["fp8-block"]

    def pack(weight: Tensor) -> tuple[Tensors, Tensor]:
        if weight.shape != (D, D):
            return case.pack(weight)
        return {"weight": weight.bfloat16()}, weight.bfloat16().float()

    meant = checkpoint(Case(pack, case.settings, case.format), tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    model, _ = griffin.load(tmp_path)
    assert type(model.model.layers[0].self_attn.o_proj) is nn.Linear
    assert torch.equal(model.model.layers[0].self_attn.o_proj.weight, meant.model.layers[0].self_attn.o_proj.weight)
    assert model.generation_config.eos_token_id == [7, 8]
    assert prompt_dtype(model, model.dtype) == torch.float32


def test_wide_activations_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = copy.deepcopy(CASES["ct-bytes"])
    case.settings["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "type": "int"}
    checkpoint(case, tmp_path)
    with caplog.at_level(logging.INFO, "griffin"):
        griffin.load(tmp_path)
    assert sum("quantises activations too" in record.message for record in caplog.records) == 1


def test_targets_by_path(tmp_path: Path) -> None:
    """Two groups of settings: by a pattern of paths, and by class for the rest."""
    four, eight = ct_case(4, 32, True), ct_case(8, 64, False)
    settings = copy.deepcopy(four.settings)
    groups = settings["config_groups"]
    groups["group_1"] = eight.settings["config_groups"]["group_0"] | {"targets": ["re:.*down_proj$"]}

    def pack(weight: Tensor) -> tuple[Tensors, Tensor]:
        return (eight if weight.shape == (D, D_FF) else four).pack(weight)

    meant = checkpoint(Case(pack, settings, ""), tmp_path)
    model, _ = griffin.load(tmp_path)
    mlp = model.model.layers[1].mlp
    assert (mlp.up_proj.format, mlp.down_proj.format) == ("CT-int4", "CT-int8")
    assert torch.equal(mlp.down_proj.dequantised().t(), meant.model.layers[1].mlp.down_proj.weight)


REFUSED = {
    "by 'quanto'.*expected one of gptq, awq": {"quant_method": "quanto"},
    "GPTQ with bits 5": CASES["gptq-4-32"].settings | {"bits": 5},
    "GPTQ with checkpoint_format 'marlin'": CASES["gptq-4-32"].settings | {"checkpoint_format": "marlin"},
    "dynamic: .*down": CASES["gptq-4-32"].settings | {"dynamic": {r"+:.*down": {"bits": 8}}},
    "AWQ with version 'gemv'": CASES["awq-32"].settings | {"version": "GEMV"},
    "'nvfp4-pack-quantized' is not read": ct_settings("nvfp4-pack-quantized", "float", 4, "tensor_group"),
    "'pack-quantized' with float4": ct_settings("pack-quantized", "float", 4, "group"),
    "strategy 'token'": ct_settings("pack-quantized", "int", 4, "token"),
    "actorder 'group'": ct_settings("pack-quantized", "int", 4, "group", actorder="group"),
    "sparsity format 'sparse-24": ct_settings("pack-quantized", "int", 4, "group")
    | {"sparsity_config": {"format": "sparse-24-bitmask"}},
    "transform_config": ct_settings("pack-quantized", "int", 4, "group")
    | {"transform_config": {"config_groups": {"a": {}}}},
    r"LLM.int8\(\)": {"quant_method": "bitsandbytes", "load_in_8bit": True},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_by_name(message: str, tmp_path: Path) -> None:
    checkpoint(Case(CASES["gptq-4-32"].pack, REFUSED[message], ""), tmp_path)
    with pytest.raises(ValueError, match=message):
        griffin.load(tmp_path)


def test_refused_by_what_a_linear_holds(tmp_path: Path) -> None:
    base = CASES["gptq-4-32"]

    def shuffled(weight: Tensor) -> tuple[Tensors, Tensor]:
        tensors, meant = base.pack(weight)
        return tensors | {"g_idx": tensors["g_idx"].flip(0)}, meant

    checkpoint(Case(shuffled, base.settings | {"desc_act": True}, ""), tmp_path / "order")
    with pytest.raises(ValueError, match=r"q_proj: GPTQ with desc_act, whose g_idx"):
        griffin.load(tmp_path / "order")
    checkpoint(gptq_case(4, 8, False), tmp_path / "small")
    with pytest.raises(ValueError, match=r"GPTQ-int4 with groups of 8; expected a multiple of 16"):
        griffin.load(tmp_path / "small")
    checkpoint(Case(bitsandbytes(256, False), BNB, ""), tmp_path / "wide")
    with pytest.raises(ValueError, match=re.escape("rows of 128 weights in blocks of 256, which reach over rows")):
        griffin.load(tmp_path / "wide")


@pytest.mark.parametrize("name", ["gptq-4-32", "awq-32", "ct-4-32", "fp8-block", "nf4"])
def test_damaged(name: str, tmp_path: Path) -> None:
    """A tensor of another shape, a missing one."""
    case = CASES[name]

    def cut(weight: Tensor) -> tuple[Tensors, Tensor]:
        tensors, meant = case.pack(weight)
        key = next(key for key in tensors if key.startswith(("scales", "weight_scale", "weight.absmax")))
        return tensors | {key: tensors[key][:-1]}, meant

    checkpoint(Case(cut, case.settings, ""), tmp_path)
    with pytest.raises(griffin.GriffinError, match=r"expected .*; fetch or save it again"):
        griffin.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(griffin.GriffinError, match="cannot be loaded"):
        griffin.load(tmp_path)


def test_missing_weights(tmp_path: Path) -> None:
    checkpoint(CASES["gptq-4-32"], tmp_path, shards=2)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {k: v for k, v in index["weight_map"].items() if v == "model-0.safetensors"}})
    )
    with pytest.raises(griffin.GriffinError, match=r"missing|lacks weights"):
        griffin.load(tmp_path)
