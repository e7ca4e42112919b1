"""The native backend and the native generation step, against the reference, in float32 on tiny random models."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

import griffin
from conftest import tiny_llama
from griffin import generate_step
from griffin.engine.cache import BufferedCache
from griffin.engine.decoders import Decoders, EagerStep, new_cache
from griffin.families import FAMILIES
from griffin.native import library

if (reason := library.why_not()) is not None:
    pytest.fail(f"these tests need the native library: {reason}", pytrace=False)

PROMPT = torch.tensor([[5, 17, 3, 88, 41, 9, 60, 22, 71, 13, 2]])
# Logits of tiny models are below 30; float32 sums of another order differ by some units in the last place.
CLOSE = {"rtol": 1e-4, "atol": 2e-4}

TINY: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 97,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}
STEPPED = {
    "llama": LlamaConfig(**TINY, attention_bias=True),
    "llama3 rope": LlamaConfig(
        **TINY,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "mistral": MistralConfig(**TINY, sliding_window=6),
    "qwen2": Qwen2Config(**{k: v for k, v in TINY.items() if k != "head_dim"}),
    "qwen3": Qwen3Config(**TINY, tie_word_embeddings=True),
    "smollm3": SmolLM3Config(**{**TINY, "no_rope_layers": [1, 1, 1, 0]}),
    "granite": GraniteConfig(
        **{k: v for k, v in TINY.items() if k != "head_dim"},
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        logits_scaling=2.0,
        attention_multiplier=0.3,
    ),
    "gemma": GemmaConfig(**TINY),
    "gemma2": Gemma2Config(**TINY, **SLIDING, query_pre_attn_scalar=16, attn_logit_softcapping=2.0),
    "gemma3": Gemma3TextConfig(**TINY, **SLIDING, query_pre_attn_scalar=16),
}


def test_every_family_with_a_native_step_is_tested() -> None:
    native = {family.model_type for family in FAMILIES if family.norm_offset is not None}
    assert native == {config.model_type for config in STEPPED.values()}


def build(config: Any) -> PreTrainedModel:
    torch.manual_seed(1)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():  # norms that are all ones would hide a wrong one
        parameter.data += torch.randn_like(parameter) * 0.05
    return model.eval()


def steps(model: PreTrainedModel, ids: torch.Tensor, count: int, **settings: Any) -> list[torch.Tensor]:
    return [step.logits for _, step in zip(range(count), generate_step(model, ids, **settings), strict=False)]


def native_steps(caplog: pytest.LogCaptureFixture) -> bool:
    return "model's own forward" not in caplog.text and "not the native one" not in caplog.text


# -- the backend -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", ["shared", "per_sequence"])
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("sequences", [1, 3, 20])
def test_the_backend_equals_the_reference(batch: str, tokens: int, sequences: int) -> None:
    model = tiny_llama(torch.float32)
    prompt, more = torch.randint(2, 97, (sequences, 9)), torch.randint(2, 97, (sequences, tokens))
    found = {}
    for backend in ("reference", "native"):
        with (
            griffin.attach(model, density=0.5, batch=batch, backend=backend, selection="topk") as handle,
            torch.no_grad(),
        ):
            with handle.prompt_phase():
                cache = model(prompt).past_key_values
            with handle.generation_phase():
                found[backend] = model(more, past_key_values=cache).logits
            assert handle.sparse_calls == 3
    torch.testing.assert_close(found["native"], found["reference"], **CLOSE)


@pytest.mark.parametrize(
    "config",
    [
        Phi3Config(**{k: v for k, v in TINY.items() if k != "head_dim"}),
        OPTConfig(
            hidden_size=48,
            word_embed_proj_dim=48,
            ffn_dim=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=97,
            init_std=0.2,
            pad_token_id=0,
            eos_token_id=None,
        ),
    ],
    ids=["fused", "ungated with biases"],
)
def test_other_layouts_equal_the_reference(config: Any) -> None:
    model = build(config)
    found = {}
    for backend in ("reference", "native"):
        with griffin.attach(model, density=0.4, backend=backend, selection="topk") as handle:
            found[backend] = torch.stack(steps(model, PROMPT, 6, handle=handle))
            assert handle.sparse_calls > 0
    torch.testing.assert_close(found["native"], found["reference"], **CLOSE)


def test_beam_search_runs_on_it() -> None:
    model = tiny_llama(torch.float32)
    found = {}
    for backend in ("reference", "native"):
        with griffin.attach(model, density=0.5, backend=backend, batch="per_sequence", selection="topk") as handle:
            ids = torch.cat([PROMPT, PROMPT.flip(1)])
            found[backend] = model.generate(ids, max_new_tokens=6, num_beams=3)
            assert handle.sparse_calls > 0
    assert torch.equal(found["native"], found["reference"])


@pytest.mark.parametrize("selection", ["topk", "dynamic+topk"])
def test_the_operator_and_a_compiled_model(selection: str) -> None:
    model = tiny_llama(torch.float32)
    torch._dynamo.reset()
    counter = CompileCounter()
    with griffin.attach(model, density=0.5, selection=selection, backend="native") as handle, torch.no_grad():
        with handle.prompt_phase():
            model(PROMPT)
        sparse = handle.native_ff[0]
        experts, mask, tier = sparse.sets[0]
        assert (tier is not None) == selection.startswith("dynamic")
        torch.library.opcheck(torch.ops.griffin.ff, (torch.randn(3, 48), experts, mask, sparse.number, 0))
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for prompt in (PROMPT, PROMPT.flip(1)):
            with handle.prompt_phase():
                model(prompt)
            with handle.generation_phase():
                found, expected = compiled(PROMPT, use_cache=False).logits, model(PROMPT, use_cache=False).logits
            torch.testing.assert_close(found, expected, **CLOSE)
        assert counter.frame_count == 1
    torch._dynamo.reset()


@torch.no_grad()  # a graph for the backward pass would hold the weights
def test_undo_restores_layout_values_and_addresses() -> None:
    model = tiny_llama(torch.float32)
    logits = model(PROMPT).logits
    before = {name: (tensor.data_ptr(), tensor.stride(), tensor.clone()) for name, tensor in model.state_dict().items()}
    for error in (None, RuntimeError):
        try:
            with griffin.attach(model, density=0.25, backend="native", selection="topk") as handle:
                down = model.model.layers[0].mlp.down_proj.weight
                assert down.stride() == (1, 48)
                during = model.state_dict()
                assert all(torch.equal(during[name], own[2]) for name, own in before.items())
                assert all(during[name].data_ptr() == own[0] for name, own in before.items())
                del during  # whoever holds a state_dict keeps it as it is: see test_attach.py
                with handle.prompt_phase():
                    model(PROMPT)
                with handle.generation_phase():
                    assert not torch.allclose(model(PROMPT).logits, logits, atol=0.1)
                if error is not None:
                    raise error
        except RuntimeError:
            pass
        after = model.state_dict()
        assert list(after) == list(before)
        for name, (address, stride, values) in before.items():
            assert after[name].data_ptr() == address
            assert after[name].stride() == stride
            assert torch.equal(after[name], values)
        del after
        assert torch.equal(model(PROMPT).logits, logits)


def test_auto_takes_it_and_says_why() -> None:
    with griffin.attach(tiny_llama(torch.float32), selection="topk") as handle:
        assert handle.backend.name == "native"
        assert "read in place" in handle.backend.reason
    with griffin.attach(tiny_llama(torch.float64), selection="topk") as handle:  # the library has no float64
        assert handle.backend.name == "gather"
        assert "float64" in handle.backend.reason


def test_what_it_cannot_read_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="float64"):
        griffin.attach(tiny_llama(torch.float64), backend="native", selection="topk")
    with pytest.raises(ValueError, match="Conv1D"):
        griffin.attach(
            build(GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=97)), backend="native", selection="topk"
        )


# -- the generation step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", STEPPED)
@pytest.mark.parametrize("density", [1.0, 0.5])
def test_a_native_step_equals_the_models_own_forward(
    family: str, density: float, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "griffin")
    model = build(STEPPED[family])
    found = {}
    for backend in ("reference", "native"):
        caplog.clear()
        calls = library.calls()
        with griffin.attach(model, density=density, backend=backend, selection="topk") as handle:
            found[backend] = torch.stack(steps(model, PROMPT, 12, handle=handle))
        assert native_steps(caplog) == (backend == "native")
        assert library.calls() - calls == (11 if backend == "native" else 0)  # one call a token
    torch.testing.assert_close(found["native"], found["reference"], **CLOSE)


@pytest.mark.parametrize("selection", ["topk", "dynamic+topk"])
@pytest.mark.parametrize("threads", [2, 3])
def test_a_step_shared_by_threads_is_that_of_one(selection: str, threads: int) -> None:
    model, before = build(STEPPED["gemma3"]), torch.get_num_threads()
    found = {}
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            with griffin.attach(model, density=0.5, selection=selection, backend="native") as handle:
                found[count] = torch.stack(steps(model, PROMPT, 8, handle=handle))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found[threads], found[1], **CLOSE)


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
@pytest.mark.parametrize("batch", ["shared", "per_sequence"])
@pytest.mark.parametrize("chunk", [None, 4])
def test_left_padded_batches(family: str, batch: str, chunk: int | None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "griffin")
    model = build(STEPPED[family])
    mask = torch.tensor([[1] * 11, [0] * 5 + [1] * 6, [0] * 9 + [1] * 2])
    ids = torch.randint(2, 97, (3, 11)) * mask
    found = {}
    for backend in ("reference", "native"):
        caplog.clear()
        with griffin.attach(model, density=0.5, backend=backend, batch=batch, selection="topk") as handle:
            own = steps(model, ids, 12, handle=handle, attention_mask=mask, prompt_chunk=chunk)
            found[backend] = torch.stack(own)
        assert native_steps(caplog) == (backend == "native")
    torch.testing.assert_close(found["native"], found["reference"], **CLOSE)


def test_a_long_answer_grows_the_cache_and_the_rotary_tables() -> None:
    model = build(STEPPED["llama"])
    ids = torch.randint(2, 97, (1, 1900))
    found = {}
    for backend in ("reference", "native"):
        with griffin.attach(model, density=0.5, backend=backend, selection="topk") as handle:
            found[backend] = torch.stack(steps(model, ids, 300, handle=handle))
    torch.testing.assert_close(found["native"], found["reference"], rtol=1e-3, atol=2e-3)  # 300 steps add their errors


def test_a_second_turn_on_a_kept_cache() -> None:
    model = build(STEPPED["gemma3"])
    found = {}
    for backend in ("reference", "native"):
        cache = new_cache(model)
        with griffin.attach(model, density=0.5, backend=backend, selection="topk") as handle:
            tokens = [
                step.tokens
                for _, step in zip(range(5), generate_step(model, PROMPT, handle=handle, cache=cache), strict=False)
            ]
            longer = torch.cat([PROMPT, torch.stack(tokens, dim=1), PROMPT.flip(1)], dim=1)
            found[backend] = torch.stack(steps(model, longer, 6, handle=handle, cache=cache))
            assert int(handle.gathered.tokens[0][0]) == 11 + 1 + 11
    torch.testing.assert_close(found["native"], found["reference"], **CLOSE)


def test_where_it_cannot_go_the_models_own_forward_runs_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "griffin")
    model = build(Phi3Config(**{k: v for k, v in TINY.items() if k != "head_dim"}))
    with griffin.attach(model, density=0.5, selection="topk") as handle:
        assert Decoders(model, handle).name == "the model's own forward (the native step does not know the family phi3)"
        steps(model, PROMPT, 3, handle=handle)
    assert "since the native step does not know the family phi3" in caplog.text
    model = build(STEPPED["llama"])
    with griffin.attach(model, density=0.5, backend="gather", selection="topk") as handle:
        assert Decoders(model, handle).name == "the model's own forward (the backend is gather)"
    with griffin.attach(model, density=0.5, selection="topk") as handle:
        assert Decoders(model, handle).name == "native"
        with handle.prompt_phase():
            model(torch.cat([PROMPT] * 17), past_key_values=(cache := new_cache(model)))
        assert isinstance(Decoders(model, handle).decoder([cache], handle.selections), EagerStep)
    assert "17 sequences, and the native step runs at most 16" in caplog.text


@torch.no_grad()
def test_the_cache_follows_transformers_own_operations() -> None:
    model = build(STEPPED["llama"])
    cache, other = new_cache(model), None
    assert isinstance(cache, BufferedCache)
    logits = model(PROMPT, past_key_values=cache).logits
    for removed in (3, 7):  # less than half, and more
        shorter = copy.deepcopy(cache)
        shorter.crop(-removed)
        assert shorter.get_seq_length() == 11 - removed
        rest = model(PROMPT[:, 11 - removed :], past_key_values=shorter).logits
        torch.testing.assert_close(rest, logits[:, 11 - removed :], **CLOSE)
    cache.crop(-3)
    assert cache.get_seq_length() == 8
    again = model(PROMPT[:, 8:], past_key_values=cache).logits
    torch.testing.assert_close(again, logits[:, 8:], **CLOSE)
    cache.reorder_cache(torch.tensor([0]))
    assert cache.get_seq_length() == 11
    more = model(PROMPT[:, :2], past_key_values=cache).logits
    other = model(torch.cat([PROMPT, PROMPT[:, :2]], dim=1)).logits[:, 11:]
    torch.testing.assert_close(more, other, **CLOSE)
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(model(PROMPT, past_key_values=cache).logits, logits, **CLOSE)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("batch", ["shared", "per_sequence"])
@pytest.mark.parametrize("selection", ["topk", "dynamic+topk"])
def test_rows_that_leave_the_batch_change_nothing_for_the_others(backend: str, batch: str, selection: str) -> None:
    model = tiny_llama(torch.float32)
    prompts = torch.cat([PROMPT, PROMPT.flip(1), PROMPT.roll(3, 1)])
    mask = torch.ones_like(prompts)
    mask[1, :4] = 0
    config = griffin.GriffinConfig(batch=batch, backend=backend, selection=selection)
    with griffin.attach(model, config) as handle:
        whole = generate_step(model, prompts, attention_mask=mask, handle=handle)
        expected = torch.stack([next(whole).tokens for _ in range(7)], dim=1)
        steps = generate_step(model, prompts, attention_mask=mask, handle=handle)
        found = [next(steps).tokens for _ in range(2)]
        assert torch.equal(torch.stack(found, dim=1), expected[:, :2])
        for kept, rows, at in (([1, 2], [1, 2], 2), (None, [1, 2], 3), ([0], [1], 4), (None, [1], 5)):
            tokens = next(steps).tokens if kept is None else steps.send(kept).tokens
            assert torch.equal(tokens, expected[rows, at])
