"""Weights in other formats: QuantisedLinear, conversion in place, GRIFFIN on it, the cache of packed models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import griffin
from conftest import tiny_llama
from griffin.backends.native import ff_records
from griffin.layouts import find_ff_blocks
from griffin.models.convert import convert, prepare
from griffin.native import kernel, library, operands, packing
from griffin.weights.neuron_major import is_neuron_major
from griffin.weights.projection import rows
from griffin.weights.quantised import QuantisedLinear

pytestmark = pytest.mark.skipif(library.why_not() is not None, reason=f"{library.why_not()}")
FORMATS = ("int8", "int4")
_SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99, "pad_token_id": 0, "eos_token_id": None}
_COMMON = _SIZES | {"hidden_size": 64, "num_key_value_heads": 2, "intermediate_size": 160, "initializer_range": 0.1}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _COMMON | {"mlp_bias": True, "attention_bias": True},
    "phi3": _COMMON,
    "gemma3_text": _COMMON | {"head_dim": 16, "hidden_activation": "gelu_pytorch_tanh"},
    "opt": _SIZES | {"hidden_size": 64, "ffn_dim": 160, "word_embed_proj_dim": 64, "init_std": 0.1},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 99, "n_inner": 160, "initializer_range": 0.1},
}


def tiny(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family]))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.to(dtype).eval()


def quantised(weight: Tensor, format: str, bias: Tensor | None = None) -> QuantisedLinear:
    tensors = operands.quantise_matrix(weight, format=format).tensors
    scales = tensors[1][None] if format == "int8" else None
    return QuantisedLinear(tensors[0][None], scales, length=weight.shape[1], bias=bias)


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(96, 64), (70, 200), (1, 32)])
def test_linear_against_its_dequantised_weights(format: str, dtype: torch.dtype, size: tuple[int, int]) -> None:
    weight, bias = torch.randn(*size), torch.randn(size[0])
    linear = quantised(weight, format, bias)
    assert relative(linear.dequantised(), weight) < {"int8": 0.01, "int4": 0.12}[format]  # half a step of the scale
    for count in (0, 1, 3, 16, 17, 40):
        x = torch.randn(2, count, size[1]).to(dtype) if count < 9 else torch.randn(count, size[1]).to(dtype)
        y = linear(x)
        assert y.shape == (*x.shape[:-1], size[0])
        assert y.dtype == dtype
        if count == 0:
            continue
        expected = x.double() @ linear.dequantised().double().T + bias.double()
        few = x.shape[:-1].numel() <= kernel.MAX_ROWS
        # few rows: inputs are rounded to 8 bits in groups of 32 (steps of max / 127, so about 0.6% of their norm);
        # many rows: weights and results are rounded to the dtype, 2^-9 each for bfloat16
        tolerance = 0.015 if few else {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 1e-5}[dtype]
        assert relative(y, expected) < tolerance


@pytest.mark.parametrize("format", FORMATS)
def test_more_blocks_than_one(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("griffin.weights.float32_gemm.BLOCK_VALUES", 128 * 130)
    linear = quantised(torch.randn(700, 130), format, torch.randn(700))
    x = torch.randn(20, 130)
    assert linear.bias is not None
    torch.testing.assert_close(linear(x), nn.functional.linear(x, linear.dequantised(), linear.bias))
    torch.testing.assert_close(linear.row_norms()[0], linear.dequantised().norm(dim=1))
    down = QuantisedLinear(linear.packed, linear.scales, length=130, bias=None, transposed=True)
    x = torch.randn(20, 700)
    torch.testing.assert_close(down(x), x @ linear.dequantised(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_unpacked_blocks_are_exact_on_every_instruction_set(format: str, isa: str) -> None:
    if isa not in library.isas():
        pytest.skip(f"this machine has no {isa}")
    packed = operands.quantise_matrix(torch.randn(37, 300), format=format)
    expected, scales = operands.unpack(packed)[0], packed.tensors[1] if format == "int8" else None
    try:
        library.set_isa(isa)
        for begin, columns in ((0, 300), (128, 100), (256, 44), (128, 1)):
            for dtype in (torch.float32, torch.bfloat16):
                out = torch.full((37, columns), float("nan"), dtype=dtype)
                packing.unpack_rows(packed.tensors[0], scales, out, d=300, begin=begin)
                assert torch.equal(out, expected[:, begin : begin + columns].to(dtype))
    finally:
        library.set_isa(None)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_converted_models(family: str, format: str) -> None:
    plain, model = tiny(family), tiny(family)
    convert(model, format)
    ids = torch.randint(3, 99, (2, 24))
    # the same model with the dequantised weights, in plain modules: what the quantised one must compute
    for before, after in zip(find_ff_blocks(plain), find_ff_blocks(model), strict=True):
        weights = before.input_weights()
        down, _ = rows(before.output)
        gate, up = weights if before.gated else (None, weights[0])
        expected = operands.quantise_ff(gate, up, down.T, format=format, activation="relu")
        records, scales = ff_records(after)
        assert torch.equal(records, expected.tensors[0])
        assert scales is None or torch.equal(scales, expected.tensors[1])
        assert after.nbytes == expected.weight_bytes + sum(p.bias.nbytes for p in after.inputs if p.bias is not None)
        assert (after.width, after.parameters) == (before.width, before.parameters)
        for norm, own in zip(after.input_norms(), before.input_norms(), strict=True):
            torch.testing.assert_close(norm, own, rtol=0.05, atol=0)
    names = {name: module for name, module in model.named_modules() if isinstance(module, QuantisedLinear)}
    for name, module in names.items():
        parent, _, child = name.rpartition(".")
        linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        weight = module.dequantised()
        linear.weight.data = weight.T.contiguous() if module.transposed else weight
        if module.bias is not None:
            linear.bias.data = module.bias.data
        setattr(plain.get_submodule(parent), child, linear)
    with torch.no_grad():
        # 48 rows go through float32 GEMMs of the same weights
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-3, atol=1e-3)
        assert relative(model(ids[:1, :5]).logits, plain(ids[:1, :5]).logits) < 0.04  # inputs rounded to 8 bits
    assert len(names) == sum(type(m).__name__ in ("Linear", "Conv1D") for m in plain.modules())
    assert not any(type(m) is nn.Linear for m in model.modules())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_griffin_on_quantised_models(family: str, format: str) -> None:
    model = tiny(family)
    convert(model, format)
    ids, step = torch.randint(3, 99, (1, 24)), torch.randint(3, 99, (1, 2))
    logits, calls = {}, {}
    for backend in ("reference", "native"):
        with griffin.attach(model, density=0.5, backend=backend, selection="topk") as handle, torch.no_grad():
            with handle.prompt_phase():
                out = model(ids, use_cache=True)
            with handle.generation_phase():
                logits[backend] = model(step, past_key_values=out.past_key_values).logits
            calls[backend] = handle.sparse_calls
    assert calls == {"reference": 2, "native": 2}
    assert relative(logits["native"], logits["reference"]) < 0.03  # the library rounds the FF's inputs to 8 bits
    with pytest.raises(ValueError, match="quantised"):
        griffin.attach(model, backend="gather", selection="topk")
    with griffin.attach(model, selection="magnitude") as handle:
        assert handle.backend.name == "native"
        assert len(handle.experts) == 2


@pytest.mark.parametrize("format", FORMATS)
def test_state_dict_and_copies(format: str) -> None:
    model, empty = tiny("phi3"), tiny("phi3")
    convert(model, format)
    prepare(empty, format)
    with torch.no_grad():
        for module in empty.modules():
            if isinstance(module, QuantisedLinear):
                module.packed.fill_(7)
    ids = torch.randint(3, 99, (1, 5))
    with torch.no_grad():
        expected = model(ids).logits
        empty.load_state_dict(model.state_dict())
        twin = copy.deepcopy(model)
        assert torch.equal(empty(ids).logits, expected)
        assert torch.equal(twin(ids).logits, expected)
    for other in (empty, twin, model.to(torch.float32)):
        for block, own in zip(find_ff_blocks(other), find_ff_blocks(model), strict=True):
            assert torch.equal(ff_records(block)[0], ff_records(own)[0])
    model.to(torch.bfloat16)
    head = model.get_output_embeddings()
    assert isinstance(head, QuantisedLinear)
    assert head.scales is None or head.scales.dtype == torch.float32


def test_tied_embeddings_stay_for_the_lookup() -> None:
    model = tiny_llama(torch.bfloat16, tie_word_embeddings=True)
    table = model.get_input_embeddings().weight
    before = table.detach().clone()
    convert(model, "int8")
    assert model.get_input_embeddings().weight is table
    assert torch.equal(table, before)
    head = model.get_output_embeddings()
    assert isinstance(head, QuantisedLinear)
    assert relative(head.dequantised(), table.float()) < 0.01


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f32", torch.float32)])
def test_float_weights_are_neuron_major(name: str, dtype: torch.dtype) -> None:
    model, plain = tiny_llama(torch.float32), tiny_llama(dtype)
    convert(model, name)
    assert model.dtype == dtype
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert all(is_neuron_major(rows(block.output)[0]) for block in find_ff_blocks(model))
    for parameter, own in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter, own)


def test_errors_leave_the_model_as_it_was() -> None:
    model = tiny_llama(torch.float32)
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="expected one of bf16, f32, int8, int4"):
        convert(model, "int3")
    with griffin.attach(model, selection="topk"), pytest.raises(ValueError, match="detach"):
        convert(model, "int8")
    own = model.model.layers[1].self_attn.q_proj

    class AdapterLinear(nn.Linear):
        pass

    model.model.layers[1].self_attn.q_proj = AdapterLinear(48, 48)
    with pytest.raises(ValueError, match="not a plain Linear"):
        convert(model, "int8")
    model.model.layers[1].self_attn.q_proj = own
    assert [type(module) for module in model.modules()] == before
    convert(model, "int8")
    with pytest.raises(ValueError, match="has int8 weights already"):
        convert(model, "int4")
    with pytest.raises(ValueError, match="for the CPU"):
        model.to("meta")
