"""Float32GemmLinear: 16-bit weights, prompts in float32; and `load`, which uses it where 16 bits are slow."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

import griffin
from conftest import tiny_llama
from griffin.native import kernel, library
from griffin.weights import float32_gemm
from griffin.weights.float32_gemm import Float32GemmLinear, use_float32_gemm
from griffin.weights.quantised import QuantisedLinear
from test_attach import GREEDY, PROMPT, snapshot

NARROW = [torch.bfloat16, torch.float16]
LONG = torch.arange(3, 3 + 2 * 24).view(2, 24)
native = pytest.mark.skipif(library.why_not() is not None, reason=f"{library.why_not()}")


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that is slow with 16-bit matrices, whatever this one is."""
    monkeypatch.setattr(float32_gemm, "fast", lambda dtype: dtype not in NARROW)


@pytest.fixture
def model(slow: None) -> LlamaForCausalLM:
    llama = tiny_llama(torch.bfloat16, attention_bias=True, mlp_bias=True)
    assert use_float32_gemm(llama) == 3 * 7 + 1
    return llama


def make(
    d_out: int, d_in: int, dtype: torch.dtype, *, bias: bool = True, neuron_major: bool = False
) -> Float32GemmLinear:
    linear = nn.Linear(d_in, d_out, bias=bias, dtype=dtype)
    if neuron_major:
        linear.weight.data = linear.weight.data.t().contiguous().t()
    linear.__class__ = Float32GemmLinear
    return linear  # type: ignore[return-value]


def assert_rounded_once(found: Tensor, linear: nn.Linear, x: Tensor) -> None:
    """`found` is the float32 result, rounded once: nowhere further from the true one than half a unit and float32's own
    rounding, and nearly everywhere the very number that one float32 product rounds to (another order of the sum may
    fall on the other side of a tie)."""
    bias = None if linear.bias is None else linear.bias.double()
    true = F.linear(x.double(), linear.weight.double(), bias)
    sizes = F.linear(x.double().abs(), linear.weight.double().abs(), None if bias is None else bias.abs())
    half_unit = torch.finfo(x.dtype).eps / 2
    own = x.shape[-1] * torch.finfo(torch.float32).eps
    smallest = torch.finfo(x.dtype).tiny * half_unit  # float16 has subnormals in reach
    assert ((found.double() - true).abs() <= half_unit * true.abs() + own * sizes + smallest).all()
    expected = F.linear(x.float(), linear.weight.float(), None if bias is None else bias.float()).to(x.dtype)
    assert (found == expected).float().mean() > 0.99


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("neuron_major", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("recorded", [False, True])
def test_prompts_are_rounded_once(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, neuron_major: bool, bias: bool, recorded: bool
) -> None:
    monkeypatch.setattr(float32_gemm, "BLOCK_VALUES", 128 * 90)  # three blocks, the last one narrower
    linear = make(300, 90, dtype, bias=bias, neuron_major=neuron_major)
    assert linear.weight.is_contiguous() != neuron_major
    for shape in ((17, 90), (2, 40, 90)):
        x = torch.randn(shape).to(dtype)
        with torch.set_grad_enabled(recorded):
            y = linear(x)
        assert (y.shape, y.dtype, y.requires_grad) == ((*shape[:-1], 300), dtype, recorded)
        assert_rounded_once(y.detach(), linear, x)


def test_blocks_are_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks: list[tuple[int, ...]] = []
    multiply = float32_gemm.multiply

    def counted(x: Tensor, read: Any, out: Tensor, **how: Any) -> None:
        assert x.dtype == torch.float32
        multiply(x, lambda begin, block: (blocks.append((begin, *block.shape)), read(begin, block)), out, **how)

    monkeypatch.setattr(float32_gemm, "multiply", counted)
    monkeypatch.setattr(float32_gemm, "BLOCK_VALUES", 128 * 90)
    with torch.no_grad():
        make(300, 90, torch.bfloat16)(torch.randn(20, 90).bfloat16())
        make(300, 90, torch.bfloat16, neuron_major=True)(torch.randn(20, 90).bfloat16())
    assert blocks == [(0, 128, 90), (128, 128, 90), (256, 44, 90), (0, 90, 128), (128, 90, 128), (256, 90, 44)]


@native
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("bias", [False, True])
def test_few_rows_are_read_by_the_library(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bias: bool) -> None:
    linear = make(70, 96, dtype, bias=bias)
    with torch.no_grad():
        for count in (1, 3, kernel.MAX_ROWS):
            x, before = torch.randn(1, count, 96).to(dtype), library.calls()
            y = linear(x)
            assert library.calls() == before + 1
            assert (y.shape, y.dtype) == ((1, count, 70), dtype)
            assert_rounded_once(y, linear, x)
        before = library.calls()
        assert linear(torch.randn(0, 96).to(dtype)).shape == (0, 70)  # by torch
        column = make(70, 96, dtype, bias=bias, neuron_major=True)
        x = torch.randn(3, 96).to(dtype)
        assert_rounded_once(column(x), column, x)  # in float32: no row of this weight is contiguous
        assert library.calls() == before
        monkeypatch.setattr(library, "why_not", lambda: "not built")
        assert torch.equal(linear(x), F.linear(x, linear.weight, linear.bias))


def test_gradients_are_those_of_a_linear() -> None:
    linear, x = make(30, 20, torch.bfloat16), torch.randn(20, 20).bfloat16().requires_grad_()
    linear(x).sum().backward()
    expected = linear.weight.float().sum(0).bfloat16().expand(20, 20)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected)
    assert linear.weight.grad is not None


def test_what_is_not_narrow_is_a_plain_linear() -> None:
    linear, x = make(30, 20, torch.bfloat16), torch.randn(40, 20)
    with pytest.raises(RuntimeError, match="same dtype"):
        linear(x)
    linear.to(torch.float32)
    assert torch.equal(linear(x), F.linear(x, linear.weight, linear.bias))
    linear.to("meta")
    assert linear(x.to("meta")).shape == (40, 30)


def test_widening_changes_the_class_only(slow: None) -> None:
    llama = tiny_llama(torch.bfloat16)
    before, parameters = snapshot(llama), list(llama.parameters())
    kept = tiny_llama(torch.float32)
    assert (use_float32_gemm(llama), use_float32_gemm(llama), use_float32_gemm(kept)) == (22, 0, 0)
    assert not any(isinstance(module, Float32GemmLinear) for module in kept.modules())
    assert snapshot(llama) == before
    assert all(a is b for a, b in zip(llama.parameters(), parameters, strict=True))
    with torch.no_grad():
        again = copy.deepcopy(llama)
        assert torch.equal(again(LONG).logits, llama(LONG).logits)


def test_saved_and_converted(model: LlamaForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert not any(isinstance(module, Float32GemmLinear) for module in plain.modules())
    found, wanted = plain.state_dict(), model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    model.float()
    with torch.no_grad():
        logits = model(LONG).logits
        for module in model.modules():
            if isinstance(module, Float32GemmLinear):
                module.__class__ = nn.Linear
        assert torch.equal(model(LONG).logits, logits)


# -- GRIFFIN on a model of them ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "gather", pytest.param("native", marks=native)])
@torch.no_grad()
def test_undo_leaves_nothing(model: LlamaForCausalLM, backend: str) -> None:
    before, logits, tokens = snapshot(model), model(LONG).logits, model.generate(PROMPT, **GREEDY)
    with griffin.attach(model, density=0.25, backend=backend, selection="topk") as handle:
        assert not torch.equal(model.generate(PROMPT, **GREEDY), tokens)
        assert handle.sparse_calls > 0
    assert snapshot(model) == before
    assert torch.equal(model(LONG).logits, logits)
    with (
        pytest.raises(KeyError),
        griffin.attach(model, density=0.25, backend=backend, selection="topk") as h,
        h.prompt_phase(),
    ):
        model(LONG)
        raise KeyError
    assert snapshot(model) == before
    assert torch.equal(model(LONG).logits, logits)
    assert torch.equal(model.generate(PROMPT, **GREEDY), tokens)


@pytest.mark.parametrize("backend", ["reference", "gather"])
@torch.no_grad()
def test_density_one_is_the_full_model(model: LlamaForCausalLM, backend: str) -> None:
    logits, tokens = model(LONG).logits, model.generate(LONG[:1], **GREEDY)
    with griffin.attach(model, density=1.0, backend=backend, selection="topk") as handle:
        with handle.prompt_phase():
            assert torch.equal(model(LONG).logits, logits)
        assert torch.equal(model.generate(LONG[:1], **GREEDY), tokens)


# -- load ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    tiny_llama(torch.bfloat16).save_pretrained(tmp_path)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))  # type: ignore[arg-type, unused-ignore]
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2").save_pretrained(tmp_path)
    return tmp_path


def kinds(model: nn.Module) -> set[type[nn.Module]]:
    return {type(module) for module in model.modules() if isinstance(module, (nn.Linear, QuantisedLinear))}


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_load_widens_where_the_cpu_is_slow(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, dtype: str
) -> None:
    caplog.set_level(logging.INFO, logger="griffin")
    monkeypatch.setattr(float32_gemm, "fast", lambda dtype: True)
    plain, _ = griffin.load(folder, dtype=dtype, device="cpu")
    assert kinds(plain) == {nn.Linear}
    assert caplog.messages == []
    monkeypatch.setattr(float32_gemm, "fast", lambda dtype: dtype not in NARROW)
    model, _ = griffin.load(folder, dtype=dtype, device="cpu")
    assert kinds(model) == {nn.Linear if dtype == "f32" else Float32GemmLinear}
    assert len(caplog.messages) == (0 if dtype == "f32" else 1)
    if dtype != "f32":
        assert "22 projections multiply prompts in float32" in caplog.messages[0]
        assert str(model.dtype) in caplog.messages[0]
    expected = plain.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@native
@torch.no_grad()
def test_load_with_weights(folder: Path, slow: None) -> None:
    model, tokenizer = griffin.load(folder, weights="bf16")
    assert kinds(model) == {Float32GemmLinear}
    full, _ = griffin.load(folder, device="cpu")
    assert_close_logits(model(LONG).logits, full(LONG).logits)
    result = griffin.generate(
        model, tokenizer, "w5 w9 w11", griffin=griffin.GriffinConfig(density=0.5, selection="topk"), max_tokens=4
    )
    assert result.generated_tokens == 4
    assert kinds(griffin.load(folder, weights="int8")[0]) == {QuantisedLinear}


def assert_close_logits(found: Tensor, expected: Tensor) -> None:
    # the same sums in another order, rounded to bfloat16 in every layer: a few units of 2^-8
    assert (found.float() - expected.float()).norm() < 0.02 * expected.float().norm()


def test_what_is_fast() -> None:
    assert float32_gemm.fast(torch.float32)
    assert float32_gemm.fast(torch.float64)
    for dtype in NARROW:
        assert float32_gemm.product_dtype(dtype) == (dtype if float32_gemm.fast(dtype) else torch.float32)
