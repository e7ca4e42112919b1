"""What may happen to a model while GRIFFIN is attached: held, copied, wrapped, offloaded, changed, used by threads."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM

import griffin
from conftest import tiny_llama
from griffin.engine import decoders
from griffin.engine.decoders import Decoders, EagerStep, NativeStep
from griffin.layouts import find_ff_blocks
from griffin.native import library
from griffin.weights.neuron_major import alone

needs_native = pytest.mark.skipif(library.why_not() is not None, reason=str(library.why_not()))
PROMPT = torch.tensor([[5, 17, 3, 88, 41, 9, 60, 22, 71, 13, 2]])
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
HALF: dict[str, Any] = {"density": 0.5, "selection": "topk"}


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_llama(torch.float32)


@pytest.fixture(autouse=True)
def warn_again() -> None:
    decoders._warn.cache_clear()
    from griffin.weights import neuron_major

    neuron_major._say.cache_clear()


def down(model: nn.Module) -> nn.Parameter:
    return model.get_submodule("model.layers.0.mlp.down_proj").weight  # type: ignore[return-value]


def generated(model: LlamaForCausalLM, **settings: Any) -> Tensor:
    """What a model of the same weights, to which nothing happens, generates with GRIFFIN."""
    fresh = tiny_llama(torch.float32)
    fresh.load_state_dict(model.state_dict())
    with griffin.attach(fresh, **HALF | settings):
        return fresh.generate(PROMPT, **GREEDY)


# -- fault 2: whoever holds the model's tensors keeps them as they are ------------------------------------------------


@needs_native
@pytest.mark.parametrize("held", ["state_dict", "detached", "numpy", "view"])
def test_what_others_hold_is_not_changed_by_attach_and_detach(
    model: LlamaForCausalLM, held: str, caplog: pytest.LogCaptureFixture
) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    takers: dict[str, Any] = {
        "state_dict": lambda: model.state_dict()[name],
        "detached": lambda: down(model).detach(),
        "numpy": lambda: down(model).detach().numpy(),
        "view": lambda: down(model).detach().view(-1)[:],
    }
    kept = takers[held]()
    values, address = torch.as_tensor(kept).clone(), down(model).data_ptr()
    expected = generated(model)
    with griffin.attach(model, **HALF, backend="native"):
        assert torch.equal(torch.as_tensor(kept), values)
        assert torch.equal(model.generate(PROMPT, **GREEDY), expected)
        assert torch.equal(torch.as_tensor(kept), values)
    assert torch.equal(torch.as_tensor(kept), values)
    assert down(model).data_ptr() == address
    assert down(model).is_contiguous()
    assert held == "numpy" or "copied instead of transposed in place" in caplog.text


@needs_native
def test_what_was_taken_while_attached_is_not_changed_by_detach(
    model: LlamaForCausalLM, caplog: pytest.LogCaptureFixture
) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with griffin.attach(model, **HALF, backend="native"):
        during = model.state_dict()
    after = model.state_dict()
    for name, tensor in before.items():
        assert torch.equal(during[name], tensor), name
        assert torch.equal(after[name], tensor), name
    assert down(model).is_contiguous()
    assert "the model gets copies" in caplog.text
    file = io.BytesIO()
    with griffin.attach(model, **HALF, backend="native"):
        torch.save(model.state_dict(), file)
    file.seek(0)
    for name, tensor in torch.load(file).items():
        assert torch.equal(tensor, before[name]), name


@needs_native
@torch.no_grad()
def test_memory_that_is_the_models_alone_is_transposed_in_place(
    model: LlamaForCausalLM, caplog: pytest.LogCaptureFixture
) -> None:
    address = down(model).data_ptr()
    with griffin.attach(model, **HALF, backend="native") as handle:
        assert (down(model).data_ptr(), down(model).stride()) == (address, (1, down(model).shape[0]))
        model.generate(PROMPT, **GREEDY)
        with handle.prompt_phase():
            model(PROMPT)
    assert (down(model).data_ptr(), down(model).is_contiguous()) == (address, True)
    assert "copied" not in caplog.text


def test_memory_that_torch_does_not_own_is_nobodys_alone() -> None:
    parameter = nn.Parameter(torch.zeros(3, 4))
    assert alone(parameter)
    assert not alone(torch.from_numpy(np.zeros((3, 4))))
    assert not alone(torch.zeros(6, 4)[:3])
    shared = torch.zeros(3, 4).share_memory_()
    assert not alone(shared)


# -- fault 3: copies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "gather", pytest.param("native", marks=needs_native)])
def test_an_attached_model_is_not_copied_or_pickled(model: LlamaForCausalLM, backend: str, tmp_path: Path) -> None:
    with griffin.attach(model, **HALF, backend=backend):
        for copied in (
            lambda: copy.deepcopy(model),
            lambda: pickle.dumps(model),
            lambda: torch.save(model, tmp_path / "model.pt"),
            lambda: copy.deepcopy(model.model.layers[1]),
        ):
            with pytest.raises(ValueError, match="detach before copying or pickling"):
                copied()
        model.generate(PROMPT, **GREEDY)  # it goes on
    again = copy.deepcopy(model)
    assert torch.equal(again(PROMPT).logits, model(PROMPT).logits)


# -- fault 4: wrappers that hand `generate` on ------------------------------------------------------------------------


def test_a_lora_model_is_computed_for_experts(model: LlamaForCausalLM) -> None:
    peft = pytest.importorskip("peft")
    expected = generated(model, backend="reference")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)).eval()
    plain = wrapped.generate(input_ids=PROMPT, **GREEDY)
    with griffin.attach(wrapped, **HALF, backend="reference") as handle:
        found = wrapped.generate(input_ids=PROMPT, **GREEDY)
        assert handle.sparse_calls == 3 * (GREEDY["max_new_tokens"] - 1)
    assert torch.equal(found, expected)  # an adapter begins as zeros
    assert torch.equal(wrapped.generate(input_ids=PROMPT, **GREEDY), plain)


def test_virtual_tokens_are_refused(model: LlamaForCausalLM) -> None:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    with pytest.raises(ValueError, match="virtual tokens before every prompt"):
        griffin.attach(wrapped, **HALF)


def test_a_compiled_model_is_computed_for_experts(model: LlamaForCausalLM) -> None:
    expected = generated(model, backend="reference")
    compiled: Any = torch.compile(model, backend="eager")
    with griffin.attach(compiled, **HALF, backend="reference") as handle:
        assert torch.equal(compiled.generate(PROMPT, **GREEDY), expected)
        assert handle.sparse_calls > 0


def test_a_generate_that_is_not_transformers_is_refused(model: LlamaForCausalLM) -> None:
    class Wrapper(nn.Module):
        config = model.config

        def __init__(self) -> None:
            super().__init__()
            self.decoder = model.model

        def generate(self, *args: Any) -> None:
            raise NotImplementedError

    with pytest.raises(ValueError, match=r"Wrapper\.generate is not that of Transformers"):
        griffin.attach(Wrapper().eval(), **HALF)


def test_a_generate_without_a_prompt_phase_is_told(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(model), "generate", lambda self, ids, **_: ids)
    with griffin.attach(model, **HALF), pytest.warns(RuntimeWarning, match="never reached"):
        model.generate(PROMPT)


# -- fault 5: weights that are there during a call only ---------------------------------------------------------------


def test_weights_on_disk_are_refused_with_their_layer(model: LlamaForCausalLM, tmp_path: Path) -> None:
    from accelerate import cpu_offload, disk_offload

    disk_offload(model, tmp_path / "weights")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp has its weights on the meta device"):
        griffin.attach(model, **HALF)
    other = tiny_llama(torch.float32)
    cpu_offload(other.model.layers[2])
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp has its weights on the meta device"):
        griffin.attach(other, **HALF)


# -- fault 6: weights that change -------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("change", ["data.copy_", "data.mul_", "data ="])
@pytest.mark.parametrize("when", ["between", "attached"])
@pytest.mark.parametrize("selection", ["topk", "dynamic+topk", "magnitude"])
@pytest.mark.parametrize("backend", ["native", "gather", "reference"])
def test_changed_weights_are_used(
    model: LlamaForCausalLM, change: str, when: str, selection: str, backend: str
) -> None:
    if (selection, backend) == ("dynamic+topk", "gather"):
        return
    settings = {"density": 0.5, "selection": selection, "backend": backend}

    def merge() -> None:
        for block in find_ff_blocks(model):
            for n, projection in enumerate((*block.inputs, block.output)):
                weight: Any = projection.weight
                torch.manual_seed(31 * block.layer + n)
                factors = torch.rand(weight.shape) + 0.5
                if change == "data.copy_":
                    weight.data.copy_(weight.data * factors)
                elif change == "data.mul_":
                    weight.data.mul_(factors)
                else:
                    weight.data = (weight.data * factors).contiguous()

    with griffin.attach(model, **settings) as handle:
        model.generate(PROMPT, **GREEDY)
        if when == "attached":
            merge()
            with handle.prompt_phase():
                cache = model(PROMPT, use_cache=True).past_key_values
            with handle.generation_phase():
                found = model(PROMPT[:, :3], past_key_values=cache).logits
    if when == "between":
        merge()
        with griffin.attach(model, **settings) as handle:
            with handle.prompt_phase():
                cache = model(PROMPT, use_cache=True).past_key_values
            with handle.generation_phase():
                found = model(PROMPT[:, :3], past_key_values=cache).logits
    assert all(block.output.weight.is_contiguous() for block in find_ff_blocks(model))  # type: ignore[operator, union-attr]
    fresh = tiny_llama(torch.float32)
    fresh.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    with griffin.attach(fresh, **settings) as handle:
        with handle.prompt_phase():
            cache = fresh(PROMPT, use_cache=True).past_key_values
        with handle.generation_phase():
            expected = fresh(PROMPT[:, :3], past_key_values=cache).logits
    torch.testing.assert_close(found, expected)


# -- fault 7: what goes wrong while attaching -------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "gather", pytest.param("native", marks=needs_native)])
def test_a_failed_attach_leaves_nothing(model: LlamaForCausalLM, backend: str) -> None:
    good = down(model).detach().clone()
    gate = model.model.layers[1].mlp.gate_proj.weight
    value = float(gate[0, 0])
    keys = [set(vars(module)) for module in model.modules()]
    gate.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="inf or nan"):
        griffin.attach(model, density=0.5, selection="magnitude", backend=backend)
    assert [set(vars(module)) for module in model.modules()] == keys
    assert torch.equal(down(model), good)
    assert down(model).is_contiguous()
    gate.data[0, 0] = value
    with griffin.attach(model, density=0.5, selection="magnitude", backend=backend):
        model.generate(PROMPT, **GREEDY)


# -- faults 1 and 12: the fast step, and what loses it ----------------------------------------------------------------


@needs_native
def test_the_fast_step_is_lost_with_a_warning_once(model: LlamaForCausalLM, caplog: pytest.LogCaptureFixture) -> None:
    with griffin.attach(model, **HALF) as handle, caplog.at_level(logging.WARNING, "griffin"):
        for _ in range(2):
            cache = DynamicCache(config=model.config)
            for _, _ in zip(range(3), griffin.generate_step(model, PROMPT, handle=handle, cache=cache), strict=False):
                pass
    lost = [record for record in caplog.records if "slower" in record.message]
    assert len(lost) == 1
    assert "DynamicCache" in lost[0].message
    assert "griffin.new_cache(model)" in lost[0].message
    caplog.clear()
    with griffin.attach(model, **HALF) as handle, caplog.at_level(logging.WARNING, "griffin"):
        cache = griffin.new_cache(model)
        for _, _ in zip(range(3), griffin.generate_step(model, PROMPT, handle=handle, cache=cache), strict=False):
            pass
        assert isinstance(Decoders(model, handle).decoder([cache], handle.selections), NativeStep)
    assert not caplog.records


@needs_native
def test_autocast_generates(model: LlamaForCausalLM, caplog: pytest.LogCaptureFixture) -> None:
    with griffin.attach(model, **HALF) as handle, torch.autocast("cpu", torch.bfloat16):
        tokens = [
            int(step.tokens)
            for _, step in zip(range(4), griffin.generate_step(model, PROMPT, handle=handle), strict=False)
        ]
        assert len(tokens) == 4
    assert "slower" in caplog.text
    with griffin.attach(model, **HALF) as handle:  # the prompt in one dtype, the steps in another
        cache = griffin.new_cache(model)
        with torch.autocast("cpu", torch.bfloat16), handle.prompt_phase(), torch.no_grad():
            model(PROMPT, past_key_values=cache)
        assert isinstance(Decoders(model, handle).decoder([cache], handle.selections), EagerStep)


# -- fault 13: threads, and streams beside each other -----------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
def test_threads_get_their_own_answers(model: LlamaForCausalLM, backend: str) -> None:
    prompts = [PROMPT, PROMPT.flip(1), PROMPT[:, :4], PROMPT[:, 5:]]
    with griffin.attach(model, **HALF, backend=backend):
        expected = [model.generate(ids, **GREEDY) for ids in prompts]
        found: dict[int, Tensor] = {}

        def run(which: int) -> None:
            for _ in range(5):
                found[which] = model.generate(prompts[which], **GREEDY)
                assert torch.equal(found[which], expected[which])

        threads = [threading.Thread(target=run, args=(which,)) for which in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [torch.equal(found[which], expected[which]) for which in range(4)] == [True] * 4


def test_experts_of_another_threads_prompt_are_refused(model: LlamaForCausalLM) -> None:
    with griffin.attach(model, **HALF) as handle, torch.no_grad():
        with handle.prompt_phase():
            model(PROMPT)
        selections = handle.selections

        def other() -> None:
            with handle.prompt_phase(), torch.no_grad():
                model(PROMPT.flip(1))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        with pytest.raises(ValueError, match="another thread has run a prompt"), handle.generation_phase():
            pass
        handle.use(selections)
        with handle.generation_phase():
            model(PROMPT[:, :1])


@pytest.mark.parametrize("backend", ["reference", "gather", pytest.param("native", marks=needs_native)])
def test_streams_beside_each_other_keep_their_experts(model: LlamaForCausalLM, backend: str) -> None:
    with griffin.attach(model, **HALF, backend=backend) as handle:

        def alone(ids: Tensor) -> list[int]:
            steps = griffin.generate_step(model, ids, handle=handle)
            return [int(next(steps).tokens) for _ in range(6)]

        expected = alone(PROMPT), alone(PROMPT.flip(1))
        assert expected[0] != expected[1]
        first, second = (griffin.generate_step(model, ids, handle=handle) for ids in (PROMPT, PROMPT.flip(1)))
        pairs = [(int(next(first).tokens), int(next(second).tokens)) for _ in range(6)]
    assert tuple(list(own) for own in zip(*pairs, strict=True)) == expected


# -- fault 14: phases that GRIFFIN cannot know ------------------------------------------------------------------------


def test_guidance_is_refused(model: LlamaForCausalLM) -> None:
    with griffin.attach(model, **HALF) as handle:
        with pytest.raises(ValueError, match=r"classifier-free guidance \(guidance_scale=1.5\)"):
            model.generate(PROMPT, guidance_scale=1.5, negative_prompt_ids=PROMPT.flip(1), **GREEDY)
        assert handle.phase is griffin.Phase.FULL
        model.generate(PROMPT, guidance_scale=1.0, **GREEDY)
