"""Kept beginnings of prompts: the same numbers as from scratch, to the bit, in bounded memory; only prompt tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import griffin
from conftest import tiny_llama
from families import random_model
from griffin.config import GriffinConfig
from griffin.engine.batch import Batch, Running
from griffin.engine.prefix import PrefixCache
from griffin.native import library

BLOCK = 4
TOPK = GriffinConfig(density=0.5, selection="topk")
DYNAMIC = GriffinConfig(density=0.5, selection="dynamic+topk")
BACKENDS = ["reference", pytest.param("native", marks=pytest.mark.skipif(library.why_not() is not None, reason="none"))]


def prompt(length: int, seed: int = 3) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 97, (length,), generator=generator).tolist()


def run(
    batch: Batch, ids: list[int], config: GriffinConfig, prefixes: PrefixCache | None
) -> tuple[Tensor, Running, int]:
    """Logits after a prompt, the sequence, and how many of its tokens were known."""
    prefill = batch.prefill(ids, config, prefixes=prefixes)
    assert prefill.left == len(ids) - prefill.reused
    logits = None
    while logits is None:
        logits = prefill.run(BLOCK)
    return logits, prefill.running(), prefill.reused


def assert_same(found: tuple[Tensor, Running, int], scratch: tuple[Tensor, Running, int]) -> None:
    torch.testing.assert_close(found[0], scratch[0], rtol=0, atol=0)
    assert found[1].selection.experts.keys() == scratch[1].selection.experts.keys()
    for layer, experts in scratch[1].selection.experts.items():
        assert torch.equal(found[1].selection.experts[layer], experts)
    for layer, dynamic in scratch[1].selection.dynamic.items():
        torch.testing.assert_close(found[1].selection.dynamic[layer].weights, dynamic.weights, rtol=0, atol=0)
    for ours, theirs in zip(found[1].cache.layers, scratch[1].cache.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=0, atol=0)
        torch.testing.assert_close(ours.values, theirs.values, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_conversation_goes_on_as_from_scratch(backend: str, dtype: torch.dtype) -> None:
    model = tiny_llama(dtype)
    conversation = prompt(50)
    with griffin.attach(model, DYNAMIC, backend=backend) as handle:
        batch, prefixes = Batch(model, handle), PrefixCache(10**8, BLOCK)
        known = 0
        for turn, length in enumerate([7, 8, 9, 22, 23, 50]):
            config = (TOPK, GriffinConfig(density=1.0, selection="topk"), DYNAMIC)[turn % 3]
            found = run(batch, conversation[:length], config, prefixes)
            assert found[2] == min(known, length - 1) // BLOCK * BLOCK
            known = length
            assert_same(found, run(batch, conversation[:length], config, None))
        again = run(batch, conversation, TOPK, prefixes)
        assert again[2] == 48
        other = [*conversation[:13], 5, *conversation[14:]]
        found = run(batch, other, TOPK, prefixes)
        assert found[2] == 12
        assert_same(found, run(batch, other, TOPK, None))


@pytest.mark.parametrize("family", ["gemma3_text", "qwen2", "gpt_neox", "opt", "phi3"])
def test_families_go_on_as_from_scratch(family: str) -> None:
    settings: dict[str, dict[str, Any]] = {
        "gemma3_text": {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
        "opt": {"ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    }
    common = {
        **{"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"intermediate_size": 64, "num_key_value_heads": 2, "pad_token_id": 0, "initializer_range": 0.3},
    }
    model = random_model(family, common | settings.get(family, {}), torch.float32)
    ids = prompt(21)
    with griffin.attach(model, TOPK) as handle:
        batch, prefixes = Batch(model, handle), PrefixCache(10**8, BLOCK)
        run(batch, ids[:14], TOPK, prefixes)
        found = run(batch, ids, TOPK, prefixes)
        assert found[2] == 12
        assert_same(found, run(batch, ids, TOPK, None))


def test_a_beginning_without_what_a_selection_needs_is_run_again_and_then_serves_both() -> None:
    model = tiny_llama(torch.float32)
    ids = prompt(21)
    with griffin.attach(model, TOPK) as handle:  # topk gathers no up projections, dynamic selection needs them
        batch, prefixes = Batch(model, handle), PrefixCache(10**8, BLOCK)
        run(batch, ids, TOPK, prefixes)
        nbytes = prefixes.nbytes
        found = run(batch, ids, DYNAMIC, prefixes)
        assert found[2] == 0
        assert prefixes.nbytes > nbytes
        for config in (TOPK, DYNAMIC):
            found = run(batch, ids, config, prefixes)
            assert found[2] == 20
            assert_same(found, run(batch, ids, config, None))


def test_generated_tokens_are_never_kept() -> None:
    model = tiny_llama(torch.float32)
    ids = prompt(8)
    with griffin.attach(model, TOPK) as handle:
        batch, prefixes = Batch(model, handle), PrefixCache(10**8, BLOCK)
        logits, sequence, _ = run(batch, ids, TOPK, prefixes)
        answer = []
        for _ in range(2 * BLOCK):
            sequence.token = int(logits.argmax())
            answer.append(sequence.token)
            (outcome,) = batch.step([sequence])
            assert isinstance(outcome, Tensor)
            logits = outcome
        continued = [*ids, *answer, *prompt(5, seed=4)]
        found = run(batch, continued, TOPK, prefixes)
        assert found[2] == 8  # the answer came from a pruned FF, so it is run again
        assert_same(found, run(batch, continued, TOPK, None))


def test_memory_is_bounded_and_the_least_recently_used_go_first() -> None:
    model: PreTrainedModel = tiny_llama(torch.float32)
    with griffin.attach(model, TOPK) as handle:
        batch, one = Batch(model, handle), PrefixCache(10**8, BLOCK)
        run(batch, prompt(BLOCK), TOPK, one)
        prefixes = PrefixCache(5 * one.nbytes, BLOCK)

        def reused(ids: list[int]) -> int:
            found = run(batch, ids, TOPK, prefixes)[2]
            assert prefixes.nbytes <= prefixes.limit
            return found

        first, second = prompt(9, seed=1), prompt(9, seed=2)
        assert [reused(first), reused(second), reused(first), reused(second)] == [0, 0, 8, 8]  # four blocks
        assert reused(prompt(9, seed=5)) == 0  # its two blocks take the fifth place and that of the first's end
        assert reused(second) == 8
        assert prefixes.nbytes == prefixes.limit
        assert reused(prompt(60, seed=6)) == 0  # longer than the memory: its beginning is kept
        assert reused(prompt(60, seed=6)) == 5 * BLOCK
        nothing = PrefixCache(one.nbytes - 1, BLOCK)
        run(batch, first, TOPK, nothing)
        assert nothing.nbytes == 0
