"""Attaching: phases, statistic, experts, generate, undo. On tiny random models in float64."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch._dynamo.testing import CompileCounter
from transformers import DynamicCache, LlamaForCausalLM, StaticCache, TextStreamer

import griffin
from conftest import tiny_llama
from griffin.attachment import Phase

PROMPT = torch.tensor([[5, 17, 3, 88, 41, 9, 60, 22, 71, 13, 2]])
GREEDY = {"do_sample": False, "max_new_tokens": 8}


def snapshot(model: torch.nn.Module) -> list[Any]:
    state = model.state_dict()
    return [
        {name: tensor.data_ptr() for name, tensor in state.items()},
        {name: sorted(vars(module)) for name, module in model.named_modules()},
        {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
            for name, module in model.named_modules()
        },
    ]


# -- against a naive implementation, written from the formulas alone -----------------------------------------------


def naive_griffin(
    model: LlamaForCausalLM, prompt: list[int], density: float, steps: int
) -> tuple[list[int], list[list[int]]]:
    """GRIFFIN by loops over tokens, layers and neurons: no cache, no slicing, plain matrix products.

    Positions of the prompt go through the whole FF; later positions only through the experts' terms of the sum.
    """
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    size = config.hidden_size // heads

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight

    def rope(x: torch.Tensor, position: int) -> torch.Tensor:
        theta = config.rope_parameters["rope_theta"]
        angles = torch.tensor([position / theta ** (2 * i / size) for i in range(size // 2)], dtype=torch.float64)
        cos, sin = angles.cos(), angles.sin()
        a, b = x[: size // 2], x[size // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin])

    energies = [[0.0] * config.intermediate_size for _ in range(config.num_hidden_layers)]
    experts: list[list[int]] = []
    keys: list[list[list[torch.Tensor]]] = [[[] for _ in range(kv_heads)] for _ in range(config.num_hidden_layers)]
    values: list[list[list[torch.Tensor]]] = [[[] for _ in range(kv_heads)] for _ in range(config.num_hidden_layers)]

    def token(identity: int, position: int) -> torch.Tensor:
        x = weights["model.embed_tokens.weight"][identity]
        for layer in range(config.num_hidden_layers):
            own = f"model.layers.{layer}."
            h = norm(x, weights[own + "input_layernorm.weight"])
            q, k, v = (weights[own + f"self_attn.{name}_proj.weight"] @ h for name in "qkv")
            for head in range(kv_heads):
                keys[layer][head].append(rope(k[head * size : (head + 1) * size], position))
                values[layer][head].append(v[head * size : (head + 1) * size])
            outputs = []
            for head in range(heads):
                query = rope(q[head * size : (head + 1) * size], position)
                kv = head // (heads // kv_heads)
                scores = torch.stack([query @ key / math.sqrt(size) for key in keys[layer][kv]]).softmax(0)
                outputs.append(sum(s * value for s, value in zip(scores, values[layer][kv], strict=True)))
            x = x + weights[own + "self_attn.o_proj.weight"] @ torch.cat(outputs)
            h = norm(x, weights[own + "post_attention_layernorm.weight"])
            gate, up, down = (weights[own + f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
            neurons = range(config.intermediate_size) if not experts else experts[layer]
            z = {j: float(torch.nn.functional.silu(gate[j] @ h) * (up[j] @ h)) for j in neurons}
            if not experts:
                length = math.sqrt(sum(value**2 for value in z.values()))
                for j, value in z.items():
                    energies[layer][j] += (value / length) ** 2
            x = x + sum(down[:, j] * value for j, value in z.items())
        return weights["lm_head.weight"] @ norm(x, weights["model.norm.weight"])

    for position, identity in enumerate(prompt):
        logits = token(identity, position)
    k = math.floor(density * config.intermediate_size)
    for energy in energies:
        order = sorted(range(len(energy)), key=lambda j: -math.sqrt(energy[j]))
        experts.append(sorted(order[:k]))
    answer = [int(logits.argmax())]
    for step in range(steps - 1):
        logits = token(answer[-1], len(prompt) + step)
        answer.append(int(logits.argmax()))
    return answer, experts


@pytest.mark.parametrize("density", [0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("backend", ["reference", "gather"])
def test_equals_a_naive_implementation(llama: LlamaForCausalLM, density: float, backend: str) -> None:
    tokens, experts = naive_griffin(llama, PROMPT[0].tolist(), density, steps=8)
    with griffin.attach(llama, density=density, backend=backend, selection="topk") as handle:
        found = llama.generate(PROMPT, **GREEDY)
        assert [handle.experts[layer].tolist() for layer in range(3)] == experts
        assert handle.sparse_calls == (0 if density == 1.0 else 3 * 7)
    assert found[0, PROMPT.shape[1] :].tolist() == tokens


# -- undo ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "gather"])
def test_undo_leaves_nothing(llama: LlamaForCausalLM, backend: str) -> None:
    before, logits, tokens = snapshot(llama), llama(PROMPT).logits, llama.generate(PROMPT, **GREEDY)
    for _ in range(3):
        with griffin.attach(llama, density=0.25, backend=backend, selection="topk"):
            assert not torch.equal(llama.generate(PROMPT, **GREEDY), tokens)
            assert torch.equal(llama(PROMPT).logits, logits)  # outside of a phase the model is whole
        assert snapshot(llama) == before
        assert torch.equal(llama(PROMPT).logits, logits)
        assert torch.equal(llama.generate(PROMPT, **GREEDY), tokens)


@pytest.mark.parametrize("where", ["with", "prompt_phase", "generation_phase", "generate"])
def test_undo_after_an_exception(llama: LlamaForCausalLM, where: str) -> None:
    before, logits = snapshot(llama), llama(PROMPT).logits

    class StopHereError(Exception):
        pass

    class Streamer(TextStreamer):
        def __init__(self) -> None:
            self.left = 3

        def put(self, value: Any) -> None:
            self.left -= 1
            if not self.left:
                raise StopHereError

    with pytest.raises(StopHereError), griffin.attach(llama, density=0.25, selection="topk") as handle:
        with handle.prompt_phase():
            llama(PROMPT)
            if where == "prompt_phase":
                raise StopHereError
        if where == "generation_phase":
            with handle.generation_phase():
                assert not torch.equal(llama(PROMPT).logits, logits)
                raise StopHereError
        if where == "generate":
            llama.generate(PROMPT, **GREEDY, streamer=Streamer())
        raise StopHereError
    assert handle.phase is Phase.FULL
    assert snapshot(llama) == before
    assert torch.equal(llama(PROMPT).logits, logits)


def test_an_exception_in_generate_leaves_the_handle_usable(llama: LlamaForCausalLM) -> None:
    with griffin.attach(llama, density=0.25, selection="topk") as handle:
        expected = llama.generate(PROMPT, **GREEDY)
        with pytest.raises(ValueError, match="max_new_tokens"):
            llama.generate(PROMPT, max_new_tokens=-1)
        assert handle.phase is Phase.FULL
        assert torch.equal(llama.generate(PROMPT, **GREEDY), expected)


def test_a_forward_that_the_instance_held_is_put_back(llama: LlamaForCausalLM) -> None:
    projection = llama.model.layers[0].mlp.down_proj
    own = projection.forward
    projection.forward = own
    with griffin.attach(llama, density=0.5, selection="topk"):
        assert vars(projection)["forward"] is not own
    assert vars(projection)["forward"] is own


# -- phases --------------------------------------------------------------------------------------------------------


def step_by_step(model: LlamaForCausalLM, handle: griffin.Griffin, chunks: list[int]) -> torch.Tensor:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        with handle.prompt_phase():
            for chunk in PROMPT.split(chunks, dim=1):
                logits = model(chunk, past_key_values=cache).logits[:, -1]
        tokens = [logits.argmax(-1)]
        with handle.generation_phase():
            for _ in range(7):
                tokens.append(model(tokens[-1][:, None], past_key_values=cache).logits[:, -1].argmax(-1))
    return torch.stack(tokens, dim=1)


@pytest.mark.parametrize("chunks", [[11], [4, 4, 3], [1] * 11, [10, 1]])
def test_an_own_loop_in_chunks_equals_generate(llama: LlamaForCausalLM, chunks: list[int]) -> None:
    with griffin.attach(llama, density=0.5, selection="topk") as handle:
        expected = llama.generate(PROMPT, **GREEDY)[:, PROMPT.shape[1] :]
        experts = {layer: own.clone() for layer, own in handle.experts.items()}
        assert torch.equal(step_by_step(llama, handle, chunks), expected)
        assert all(torch.equal(handle.experts[layer], own) for layer, own in experts.items())


@pytest.mark.parametrize("chunk", [1, 3, 10, 11, 50])
def test_chunked_prefill_equals_the_whole_prompt(llama: LlamaForCausalLM, chunk: int) -> None:
    with griffin.attach(llama, density=0.5, selection="topk") as handle:
        expected = llama.generate(PROMPT, **GREEDY)
        experts = {layer: own.clone() for layer, own in handle.experts.items()}
        found = llama.generate(PROMPT, **GREEDY, prefill_chunk_size=chunk)
        assert torch.equal(found, expected)
        assert all(torch.equal(handle.experts[layer], own) for layer, own in experts.items())


def test_a_one_token_prompt_is_a_prompt(llama: LlamaForCausalLM) -> None:
    with griffin.attach(llama, density=0.5, selection="topk") as handle:
        llama.generate(PROMPT[:, :1], **GREEDY)
        assert int(handle.gathered.tokens[0][0]) == 1
        assert handle.sparse_calls == 3 * 7


def padded_batch(llama: LlamaForCausalLM) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    prompts = [PROMPT[0], PROMPT[0].flip(0)[:6], torch.tensor([33, 44])]
    ids = torch.stack([torch.cat([torch.zeros(11 - len(own), dtype=torch.long), own]) for own in prompts])
    return prompts, {
        "input_ids": ids,
        "attention_mask": torch.stack([torch.arange(11) >= 11 - len(own) for own in prompts]).long(),
    }


@pytest.mark.parametrize("backend", ["reference", "gather"])
@pytest.mark.parametrize("chunk", [None, 4])
def test_a_left_padded_batch_equals_each_prompt_alone(llama: LlamaForCausalLM, backend: str, chunk: int | None) -> None:
    prompts, batch = padded_batch(llama)
    for selection in ("topk", "sample", "random"):
        with griffin.attach(llama, density=0.5, batch="per_sequence", backend=backend, selection=selection) as handle:
            together = llama.generate(**batch, **GREEDY, prefill_chunk_size=chunk)[:, 11:]
            experts = [[own.tolist() for own in handle.experts[layer]] for layer in range(3)]
            statistics = {layer: own.clone() for layer, own in handle.statistic.items()}
            for row, prompt in enumerate(prompts):
                alone = llama.generate(prompt[None], **GREEDY)[0, len(prompt) :]
                assert torch.equal(together[row], alone)
                for layer in range(3):
                    assert handle.experts[layer][0].tolist() == experts[layer][row]
                    # float32 sums whose blocks of tokens start elsewhere
                    torch.testing.assert_close(statistics[layer][row], handle.statistic[layer][0], rtol=1e-5, atol=1e-7)


def test_shared_experts_are_those_of_the_weighted_sum(llama: LlamaForCausalLM) -> None:
    prompts, batch = padded_batch(llama)
    expected = {layer: torch.zeros(80) for layer in range(3)}
    with griffin.attach(llama, density=0.5, selection="topk") as handle:
        for prompt in prompts:
            llama.generate(prompt[None], **GREEDY)
            for layer in range(3):
                expected[layer] += handle.statistic[layer] / math.sqrt(len(prompt))
        llama.generate(**batch, **GREEDY)
        for layer in range(3):
            torch.testing.assert_close(handle.statistic[layer], expected[layer], rtol=1e-5, atol=1e-7)  # float32 sums
            assert handle.experts[layer].tolist() == sorted(expected[layer].topk(40).indices.tolist())


@pytest.mark.parametrize("batch", ["shared", "per_sequence"])
@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 3, "do_sample": True, "top_k": 20}])
def test_beams_keep_the_experts_of_their_prompt(llama: LlamaForCausalLM, settings: dict[str, Any], batch: str) -> None:
    def run(backend: str) -> tuple[torch.Tensor, list[Any]]:
        torch.manual_seed(7)
        with griffin.attach(llama, density=0.5, backend=backend, batch=batch, selection="topk") as handle:
            out = llama.generate(torch.cat([PROMPT, PROMPT.flip(1)]), max_new_tokens=6, **settings)
            assert handle.sparse_calls > 0
            return out, [handle.experts[layer] for layer in range(3)]

    found, experts = run("gather")
    expected, _ = run("reference")
    assert torch.equal(found, expected)
    if batch == "per_sequence":
        assert all(len(own) == 6 and torch.equal(own[0], own[2]) and not torch.equal(own[0], own[3]) for own in experts)


def test_sampling_and_streamers_work(llama: LlamaForCausalLM) -> None:
    pieces = []

    class Streamer(TextStreamer):
        def __init__(self) -> None: ...

        def put(self, value: torch.Tensor) -> None:
            pieces.append(value)

        def end(self) -> None: ...

    with griffin.attach(llama, density=0.5, selection="topk"):
        torch.manual_seed(3)
        first = llama.generate(PROMPT, do_sample=True, max_new_tokens=8, streamer=Streamer())
        torch.manual_seed(3)
        assert torch.equal(first, llama.generate(PROMPT, do_sample=True, max_new_tokens=8))
    assert torch.equal(torch.cat([piece.reshape(-1) for piece in pieces]), first[0])


# -- conversations -------------------------------------------------------------------------------------------------


def test_a_second_turn_continues_the_statistic(llama: LlamaForCausalLM) -> None:
    with griffin.attach(llama, density=0.5, selection="topk") as handle:
        first = llama.generate(PROMPT, **GREEDY, return_dict_in_generate=True)
        turn_one = {layer: own.clone() for layer, own in handle.gathered.energies.items()}
        longer = torch.cat([first.sequences, PROMPT.flip(1)], dim=1)
        llama.generate(longer, **GREEDY, past_key_values=first.past_key_values)
        # The cache holds all but the last generated token, which is run with the second prompt.
        assert int(handle.gathered.tokens[0][0]) == 11 + 1 + 11
        for layer in range(3):
            assert bool((handle.gathered.energies[layer] >= turn_one[layer]).all())
            torch.testing.assert_close(handle.gathered.energies[layer].sum(), torch.tensor(23.0))


def test_two_conversations_take_turns_on_one_handle(llama: LlamaForCausalLM) -> None:
    def talk(handle: griffin.Griffin, ids: torch.Tensor, cache: Any = None) -> Any:
        return llama.generate(ids, **GREEDY, past_key_values=cache, return_dict_in_generate=True)

    with griffin.attach(llama, density=0.5, selection="topk") as handle:
        alone = talk(handle, PROMPT)
        alone = talk(handle, torch.cat([alone.sequences, PROMPT], dim=1), alone.past_key_values)
        a, b = talk(handle, PROMPT), talk(handle, PROMPT.flip(1))
        b = talk(handle, torch.cat([b.sequences, PROMPT], dim=1), b.past_key_values)
        a = talk(handle, torch.cat([a.sequences, PROMPT], dim=1), a.past_key_values)
    assert torch.equal(a.sequences, alone.sequences)
    assert not torch.equal(b.sequences, alone.sequences)


def test_a_copied_prompt_cache_brings_its_statistic(llama: LlamaForCausalLM) -> None:
    with griffin.attach(llama, density=0.5, selection="topk") as handle:
        whole = llama.generate(PROMPT, **GREEDY)
        cache = DynamicCache(config=llama.config)
        llama.generate(PROMPT[:, :8], max_new_tokens=1, do_sample=False, past_key_values=cache)
        for _ in range(2):
            found = llama.generate(PROMPT, **GREEDY, past_key_values=copy.deepcopy(cache))
            assert torch.equal(found, whole)
            assert int(handle.gathered.tokens[0][0]) == 11


def test_a_cache_that_was_filled_without_griffin_is_said(llama: LlamaForCausalLM) -> None:
    cache = DynamicCache(config=llama.config)
    llama(PROMPT[:, :8], past_key_values=cache)
    with griffin.attach(llama, density=0.5, selection="topk") as handle:
        with pytest.warns(UserWarning, match="holds 8 tokens"):
            llama.generate(PROMPT, **GREEDY, past_key_values=cache)
        assert int(handle.gathered.tokens[0][0]) == 3


def test_a_static_cache_with_padding(llama: LlamaForCausalLM) -> None:
    _, batch = padded_batch(llama)
    with griffin.attach(llama, density=0.5, batch="per_sequence", selection="topk"):
        expected = llama.generate(**batch, **GREEDY)
        found = llama.generate(**batch, **GREEDY, cache_implementation="static", disable_compile=True)
    assert torch.equal(found, expected)


# -- settings ------------------------------------------------------------------------------------------------------


def test_density_one_is_the_untouched_model_bit_for_bit(llama: LlamaForCausalLM) -> None:
    logits, tokens = llama(PROMPT).logits, llama.generate(PROMPT, **GREEDY)
    for backend in ("reference", "gather"):
        with griffin.attach(llama, density=1.0, backend=backend, selection="topk") as handle:
            assert torch.equal(llama.generate(PROMPT, **GREEDY), tokens)
            with handle.prompt_phase():
                assert torch.equal(llama(PROMPT).logits, logits)
            with handle.generation_phase():
                assert torch.equal(llama(PROMPT).logits, logits)
            assert handle.sparse_calls == 0
            assert handle.experts[0].tolist() == list(range(80))


def test_layers_that_are_not_named_stay_whole(llama: LlamaForCausalLM) -> None:
    with griffin.attach(llama, density=0.5, layers=(1,), selection="topk") as handle:
        llama.generate(PROMPT, **GREEDY)
        assert list(handle.experts) == [1]
        assert handle.sparse_calls == 7
        assert handle.ff_bytes_per_token == (2 + 0.5) * 3 * 80 * 48 * 8
    with pytest.raises(ValueError, match="layers 0 to 2"):
        griffin.attach(llama, layers=(3,), selection="topk")


def test_magnitude_needs_no_prompt(llama: LlamaForCausalLM) -> None:
    with griffin.attach(llama, density=0.5, selection="magnitude") as handle:
        mlp = llama.model.layers[1].mlp
        scores = mlp.gate_proj.weight.norm(dim=1) * mlp.up_proj.weight.norm(dim=1)
        expected = sorted(scores.topk(40).indices.tolist())
        assert handle.experts[1].tolist() == expected
        with handle.generation_phase():
            llama(PROMPT)
        llama.generate(torch.cat([PROMPT, PROMPT]), **GREEDY)
        assert handle.experts[1].tolist() == expected


def test_a_pruned_model_equals_a_model_built_smaller(llama: LlamaForCausalLM) -> None:
    small = tiny_llama(intermediate_size=40)
    with griffin.attach(llama, density=0.5, backend="reference", selection="topk") as handle:
        with handle.prompt_phase():
            llama(PROMPT)
        state = llama.state_dict()
        for layer, experts in handle.experts.items():
            own = f"model.layers.{layer}.mlp."
            state[own + "gate_proj.weight"] = state[own + "gate_proj.weight"][experts]
            state[own + "up_proj.weight"] = state[own + "up_proj.weight"][experts]
            state[own + "down_proj.weight"] = state[own + "down_proj.weight"][:, experts]
        small.load_state_dict(state)
        with handle.generation_phase():
            assert torch.equal(llama(PROMPT).logits, small(PROMPT).logits)


def test_a_new_selection_keeps_the_buffers_where_they_are(llama: LlamaForCausalLM) -> None:
    with griffin.attach(llama, density=0.5, backend="gather", selection="topk") as handle:
        llama.generate(PROMPT, **GREEDY)
        sparse = handle._sparse[1]
        places = [tensor.data_ptr() for tensor in (*sparse._weights, sparse._out)]
        first = handle.experts[1]
        llama.generate(PROMPT.flip(1), **GREEDY)
        assert not torch.equal(handle.experts[1], first)
        assert [tensor.data_ptr() for tensor in (*sparse._weights, sparse._out)] == places


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.6"), reason="torch 2.5 cannot trace transformers 5's forward"
)
def test_a_compiled_model_survives_a_new_selection(llama: LlamaForCausalLM) -> None:
    """One compilation serves every selection: the buffers stay, only their contents change."""
    torch._dynamo.reset()
    compiles = CompileCounter()
    cache = StaticCache(config=llama.config, max_cache_len=32)
    with griffin.attach(llama, density=0.5, backend="gather", selection="topk") as handle:

        def run(prompt: torch.Tensor, forward: Any) -> torch.Tensor:
            cache.reset()
            with torch.no_grad():
                with handle.prompt_phase():
                    token = llama(prompt, past_key_values=cache).logits[:, -1:].argmax(-1)
                logits = []
                with handle.generation_phase():
                    for _ in range(3):
                        logits.append(forward(token, past_key_values=cache).logits)
                        token = logits[-1].argmax(-1)
            return torch.cat(logits, dim=1)

        compiled = torch.compile(llama, backend=compiles, fullgraph=True)
        run(PROMPT, compiled)
        experts = handle.experts[1]
        found = run(PROMPT.flip(1), compiled)
        assert not torch.equal(handle.experts[1], experts)
        assert compiles.frame_count == 1
        assert handle.sparse_calls == 0  # compiled code does not count
        assert torch.equal(found, run(PROMPT.flip(1), llama))
        assert handle.sparse_calls == 3 * 3
    assert torch.equal(compiled(PROMPT).logits, llama(PROMPT).logits)  # detached: compiled anew, whole again
    torch._dynamo.reset()


# -- what cannot work ----------------------------------------------------------------------------------------------


def test_wrong_use_raises_and_says_why(llama: LlamaForCausalLM) -> None:
    with griffin.attach(llama, selection="topk") as handle:
        with pytest.raises(ValueError, match="attached to this model already"):
            griffin.attach(llama, selection="topk")
        with pytest.raises(ValueError, match="assisted_generation"):
            llama.generate(PROMPT, max_new_tokens=4, assistant_model=tiny_llama())
        with pytest.raises(ValueError, match="assisted_generation"):
            llama.generate(PROMPT, max_new_tokens=4, prompt_lookup_num_tokens=2)
        with pytest.raises(ValueError, match="custom_generate"):
            llama.generate(PROMPT, max_new_tokens=4, custom_generate=lambda *a, **k: None)
        with pytest.raises(ValueError, match="continuous batching"):
            llama.generate_batch([PROMPT[0].tolist()])
        with pytest.raises(ValueError, match="use_cache"):
            llama.generate(PROMPT, max_new_tokens=4, use_cache=False)
        with pytest.raises(ValueError, match="no experts yet"), handle.generation_phase():
            pass
        with pytest.raises(ValueError, match="no prompt token came"), handle.prompt_phase():
            pass
        with handle.prompt_phase():
            llama(PROMPT)
            with pytest.raises(ValueError, match="do not nest"), handle.generation_phase():
                pass
            with pytest.raises(ValueError, match="inside the prompt phase"):
                llama.generate(PROMPT, max_new_tokens=4)
        llama.train()
        with pytest.raises(ValueError, match="training mode"):
            llama.generate(PROMPT, max_new_tokens=4)
        llama.eval()
        with pytest.raises(ValueError, match="not two-dimensional"), handle.prompt_phase():
            llama(PROMPT, attention_mask=torch.zeros(1, 1, 11, 11, dtype=torch.float64))
    with pytest.raises(ValueError, match="detached"), handle.prompt_phase():
        pass
    handle.detach()
    llama.train()
    with pytest.raises(ValueError, match="training mode"):
        griffin.attach(llama, selection="topk")
    llama.eval()
    with pytest.raises(ValueError, match="did you mean 'density'"):
        griffin.attach(llama, densty=0.5, selection="topk")


def test_a_batch_of_another_size_is_refused(llama: LlamaForCausalLM) -> None:
    for backend in ("reference", "gather"):
        with griffin.attach(llama, batch="per_sequence", backend=backend, selection="topk") as handle:
            with handle.prompt_phase():
                llama(torch.cat([PROMPT, PROMPT]))
            with pytest.raises(ValueError, match="batch of 2 sequences"), handle.generation_phase():
                llama(PROMPT)
            with (
                pytest.raises(ValueError, match="has 2 sequences, but this prompt has 1"),
                handle.prompt_phase(statistics=handle.gathered),
            ):
                llama(PROMPT)


def test_overflown_activations_are_said(llama: LlamaForCausalLM) -> None:
    llama.model.layers[1].mlp.up_proj.weight.data[0] = float("inf")
    with griffin.attach(llama, selection="topk"), pytest.raises(ValueError, match="inf or nan"):
        llama.generate(PROMPT, **GREEDY)


def test_no_warning_in_ordinary_use(llama: LlamaForCausalLM) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with griffin.attach(llama, selection="topk"):
            llama.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **GREEDY)
