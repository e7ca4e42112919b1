"""Weights in groups: GGUF's blocks to the bit, quantisers, products, modules, conversion in place, GRIFFIN on them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import griffin
from conftest import tiny_llama
from griffin.engine.decoders import Decoders, NativeStep
from griffin.layouts import find_ff_blocks
from griffin.models.convert import convert
from griffin.native import grouped, kernel, library, operands
from griffin.weights.neuron_major import is_neuron_major
from griffin.weights.projection import rows
from griffin.weights.quantised import QuantisedEmbedding, QuantisedLinear, parameter_count, quantised_format

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
ROUNDED = 4e-2  # of a random model's logits: what meets the neurons' rows is rounded to 8 bits


def tiny(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family]))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.to(dtype).eval()


TYPES = tuple(grouped.GGUF_TYPES)


@pytest.fixture(params=library.isas() if library.why_not() is None else [])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    library.set_isa(request.param)
    yield request.param
    library.set_isa(None)


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def blocks(type: str, d_out: int, d_in: int) -> tuple[Tensor, Tensor]:
    """Random blocks of a GGUF type, and what the gguf package says that they mean."""
    _, weights, size = grouped.gguf_format(type)
    raw = torch.randint(0, 256, (d_out * d_in // weights, size), dtype=torch.uint8)
    first = {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208}.get(type, 0)
    two = type in ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")
    for at in (first, first + 2) if two else (first,):
        raw[:, at : at + 2] = (torch.randn(len(raw), 1) * 0.01).half().view(torch.uint8)
    truth = gguf.dequantize(raw.numpy().reshape(d_out, -1), gguf.GGMLQuantizationType[type])
    return raw.flatten(), torch.from_numpy(truth.astype(np.float32))


@pytest.mark.parametrize("type", TYPES)
def test_blocks_of_files_to_the_bit(type: str, isa: str) -> None:
    for d_out, d_in in ((37, 512), (300, 256), (1, 768)):
        raw, truth = blocks(type, d_out, d_in)
        packed = grouped.from_gguf(type, raw, d_out, d_in)
        down = grouped.from_gguf(type, raw, d_out, d_in, neuron_major=True)
        order = torch.randperm(d_out)
        assert torch.equal(packed.unpack(), truth)
        assert torch.equal(down.unpack(), truth.T)
        assert torch.equal(grouped.from_gguf(type, raw, d_out, d_in, row_order=order).unpack(), truth[order])
        assert torch.equal(packed.unpack(dtype=torch.bfloat16), truth.bfloat16())
        some = torch.tensor([0, d_out - 1, 0])
        assert torch.equal(packed.unpack(some), truth[some])
        if d_out > 256:
            assert torch.equal(down.unpack(first=5, last=9, columns=(256, 290)), truth.T[5:9, 256:290])


@pytest.mark.parametrize("type", TYPES)
def test_products_with_blocks_of_files(type: str, isa: str) -> None:
    raw, truth = blocks(type, 70, 512)
    for neuron_major in (False, True):
        made = grouped.from_gguf(type, raw, 70, 512, neuron_major=neuron_major)
        linear = QuantisedLinear([made], bias := torch.randn(70))
        for count in (1, 3, 70):
            x = torch.randn(count, 512)
            limit = 1e-2 if neuron_major else 1e-4  # inputs in steps of a group's max / 127, and / 16256
            assert relative(linear(x), x.double() @ truth.double().T + bias.double()) < limit


def test_wrong_blocks_are_refused() -> None:
    raw, _ = blocks("Q4_K", 4, 256)
    for call in (
        lambda: grouped.from_gguf("Q4_K", raw[:-1], 4, 256),
        lambda: grouped.from_gguf("Q4_K", raw, 4, 250),
        lambda: grouped.from_gguf("Q4_K", raw, 4, 256, row_order=torch.arange(3)),
        lambda: grouped.from_codes(grouped.INT8, torch.zeros(4, 32, dtype=torch.uint8), torch.ones(4, 2).half()),
        lambda: grouped.empty(grouped.INT8, 4, 131_073),
    ):
        with pytest.raises(ValueError, match=r"no matrix|row_order|expected"):
            call()


def test_the_quantisers() -> None:
    weight = torch.randn(40, 600)
    groups = nn.functional.pad(weight, (0, 8)).unflatten(1, (-1, 32))
    int8 = grouped.quantise(weight, "int8").unpack()
    step = groups.abs().amax(2, keepdim=True) / 127
    # half a step, and what the step's rounding to float16 makes of the largest code
    assert bool(((int8 - weight).abs() <= (step * 0.57).expand_as(groups).flatten(1)[:, :600]).all())
    low, high = groups.amin(2, keepdim=True).clamp_max(0), groups.amax(2, keepdim=True)
    plain = (high - low) / 15
    rounded = (((groups - low) / plain).round() * plain + low).flatten(1)[:, :600]
    int4 = grouped.quantise(weight, "int4").unpack()
    assert (int4 - weight).square().sum() < 0.9 * (rounded - weight).square().sum()
    importance = torch.rand(600) ** 4 + 1e-3
    weighted = grouped.quantise(weight, "int4", importance=importance).unpack()
    assert ((weighted - weight).square() @ importance).sum() < 0.97 * ((int4 - weight).square() @ importance).sum()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("width", [1, 20, 80, 300])
def test_the_layouts_mean_the_same(format: str, width: int) -> None:
    """Also where the last group of neurons is not whole."""
    weight = torch.randn(70, width)
    made = grouped.quantise(weight, format)
    assert torch.equal(grouped.quantise(weight, format, neuron_major=True).unpack().T, made.unpack())
    assert relative(made.unpack(), weight) < {"int8": 0.01, "int4": 0.1}[format]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linears(format: str, dtype: torch.dtype) -> None:
    parts = [grouped.quantise(torch.randn(n, 200), format) for n in (70, 33)]
    linear = QuantisedLinear(parts, torch.randn(103)).to(dtype)
    assert linear.bias is not None
    assert linear.bias.dtype == dtype
    assert linear(torch.empty(0, 200, dtype=dtype)).shape == (0, 103)
    for shape in ((1, 200), (2, 9, 200), (70, 200)):
        x = torch.randn(*shape).to(dtype)
        y = linear(x)
        assert (y.shape, y.dtype) == ((*shape[:-1], 103), dtype)
        expected = x.double() @ linear.dequantised().double().T + linear.bias.double()
        assert relative(y, expected) < {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]
    torch.testing.assert_close(torch.cat(linear.row_norms()), linear.dequantised().norm(dim=1))
    down = QuantisedLinear([grouped.quantise(torch.randn(70, 200), format, neuron_major=True)])
    torch.testing.assert_close(down.row_norms()[0], down.dequantised().norm(dim=1))
    with pytest.raises(ValueError, match="2 neuron-major parts"):
        QuantisedLinear([*down.parts, *down.parts])
    with pytest.raises(ValueError, match="for the CPU"):
        linear.to("meta")


@pytest.mark.parametrize("format", FORMATS)
def test_copies_and_states(format: str) -> None:
    linear = QuantisedLinear([grouped.quantise(torch.randn(70, 200), format)], torch.randn(70))
    other = QuantisedLinear([grouped.quantise(torch.randn(70, 200), format)], torch.randn(70))
    x = torch.randn(3, 200)
    expected = linear(x)
    other(x)
    other.load_state_dict(linear.state_dict())
    for twin in (other, copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert torch.equal(twin(x), expected)
        assert twin.parts[0].rows.data_ptr() == twin.rows_0.data_ptr() != linear.rows_0.data_ptr()
    embedding = QuantisedEmbedding(linear.parts[0], scale=torch.tensor(2.0), dtype=torch.bfloat16)
    ids = torch.tensor([[3, 69], [0, 3]])
    assert torch.equal(embedding(ids), (linear.dequantised()[ids]).bfloat16() * 2)
    assert torch.equal(embedding.to(torch.float32)(ids), linear.dequantised()[ids] * 2)
    assert torch.equal(pickle.loads(pickle.dumps(embedding))(ids), embedding(ids))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad: float, isa: str) -> None:
    x = torch.randn(2, 512)
    x[1, 300] = bad
    for neuron_major in (False, True):
        raw, _ = blocks("Q4_K", 70, 512)
        made = grouped.from_gguf("Q4_K", raw, 70, 512, neuron_major=neuron_major)
        y = kernel.matvec(operands.packed_matrix(made), x)
        assert y[0].isfinite().all()
        assert y[1].isnan().all()


@torch.no_grad()
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_griffin_on_quantised_models(family: str, format: str) -> None:
    model = tiny(family)
    convert(model, format)
    assert quantised_format(model) == format
    assert not any(type(m) is nn.Linear for m in model.modules())
    ids, step = torch.randint(3, 99, (1, 24)), torch.randint(3, 99, (1, 2))
    logits = {}
    for backend in ("reference", "native"):
        with griffin.attach(model, density=0.5, backend=backend, selection="topk") as handle:
            with handle.prompt_phase():
                out = model(ids, use_cache=True)
            with handle.generation_phase():
                logits[backend] = model(step, past_key_values=out.past_key_values).logits
            assert handle.sparse_calls == 2
    assert relative(logits["native"], logits["reference"]) < ROUNDED
    with pytest.raises(ValueError, match="quantised"):
        griffin.attach(model, backend="gather", selection="topk")
    # a copy with the numbers that the weights mean
    plain = tiny(family)
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantisedLinear):
            parent, _, child = name.rpartition(".")
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight.data = module.dequantised().T if module.neuron_major else module.dequantised()
            if module.bias is not None:
                linear.bias.data = module.bias.data
            setattr(plain.get_submodule(parent), child, linear)
    assert relative(model(ids).logits, plain(ids).logits) < ROUNDED
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids).logits, model(ids).logits)


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


def test_weights_are_counted_whatever_their_format_and_shared_ones_once() -> None:
    packed = grouped.quantise(torch.randn(96, 64), "int8")
    tied = nn.ModuleList([QuantisedEmbedding(packed), QuantisedLinear([packed]), nn.Linear(3, 2)])
    assert parameter_count(tied) == 96 * 64 + 3 * 2 + 2
    model = tiny("llama")
    count = parameter_count(model)
    convert(model, "int8")
    assert parameter_count(model) == count


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


@pytest.mark.model
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_real_files_mean_what_their_numbers_mean(name: str) -> None:
    """The native step over a file's own weights against the dequantised model in float32, token by token."""
    packed, tokenizer = griffin.load(name)
    exact, _ = griffin.load(name, dtype="f32")
    ids = tokenizer("The lighthouse keeper counted the ships that passed, and wrote", return_tensors="pt").input_ids
    with torch.no_grad(), griffin.attach(packed, density=1.0, selection="topk") as handle:
        cache = griffin.new_cache(packed)
        with handle.prompt_phase():
            logits = packed(ids, past_key_values=cache).logits[:, -1]
        decoder = Decoders(packed, handle).decoder([cache], handle.selections)
        assert isinstance(decoder, NativeStep)
        steps = [logits[0].float().log_softmax(-1)]
        for _ in range(63):  # the tokens that the packed model itself takes
            steps.append(decoder(steps[-1].argmax()[None])[0].float().log_softmax(-1))
        greedy = torch.stack(steps).argmax(-1)
        whole = exact(torch.cat([ids, greedy[None, :-1]], dim=1)).logits[0, ids.shape[1] - 1 :].log_softmax(-1)
    divergences = []
    for at, (found, expected) in enumerate(zip(steps, whole, strict=True)):
        divergences.append(float((expected.exp() * (expected - found)).sum()))
        margin = float(expected.max() - expected[found.argmax()])
        assert margin < 0.1, (at, margin)  # another token only where the two best are next to equal
    assert sum(divergences) / len(divergences) < 0.002


@pytest.mark.parametrize("step", ["native", "eager"])
def test_experts_are_copied_when_a_step_first_reads_them(step: str) -> None:
    model = tiny("llama")
    convert(model, "int8")
    prompts = torch.randint(1, 99, (2, 40), generator=torch.Generator().manual_seed(0))

    def logits(prompt: Tensor, compact: bool) -> list[Tensor]:
        with griffin.attach(model, selection="topk", compact=compact) as handle:
            steps = griffin.generate_step(model, prompt[None], handle=handle, step=step)
            made = [next(steps).logits]
            copied = [ff._copied for ff in handle.native_ff.values()]
            assert copied == [None, None]  # the first token waits for no copies
            made += [next(steps).logits for _ in range(4)]
            first = [ff._copied for ff in handle.native_ff.values()]
            assert all(pair is not None for pair in first) == compact
            del steps
            rooms = [pair[1].copies for pair in first if pair is not None]
            del first
            again = griffin.generate_step(model, prompts[1:], handle=handle, step=step)
            made += [next(again).logits for _ in range(3)]
            pairs = [ff._copied for ff in handle.native_ff.values() if ff._copied is not None]
            for room, pair in zip(rooms, pairs, strict=True):  # a new prompt's copies lie where the last one's did
                assert [copy.ctypes.data for copy in pair[1].copies] == [copy.ctypes.data for copy in room]
        return made

    for own, others in zip(logits(prompts[0], True), logits(prompts[0], False), strict=True):
        assert torch.equal(own, others)


def test_sequences_with_experts_of_their_own_are_computed_in_place() -> None:
    model = tiny("llama")
    convert(model, "int8")
    prompts = torch.randint(1, 99, (3, 20), generator=torch.Generator().manual_seed(0))
    with griffin.attach(model, selection="topk", batch="per_sequence") as handle:
        steps = griffin.generate_step(model, prompts, handle=handle)
        for _ in range(3):
            next(steps)
        assert all(ff._copied is None for ff in handle.native_ff.values())
