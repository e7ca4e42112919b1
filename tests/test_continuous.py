"""Continuous batching equals every sequence alone, whoever joins and leaves, whatever computes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import griffin
from conftest import tiny_llama
from families import random_model
from griffin.config import GriffinConfig
from griffin.engine.batch import Batch, Running
from griffin.engine.step import generate_step
from griffin.native import library

needs_native = pytest.mark.skipif(library.why_not() is not None, reason=str(library.why_not()))
LENGTHS = (7, 1, 12, 5, 9)
CONFIGS = (
    GriffinConfig(density=0.5, selection="topk"),
    GriffinConfig(density=1.0, selection="topk"),
    GriffinConfig(density=0.3, selection="topk_sample", seed=4),
    GriffinConfig(density=0.75, selection="magnitude"),
    GriffinConfig(density=0.5, layers=(1,), selection="topk"),
)
TOKENS = 9


def prompts_of(lengths: Sequence[int], vocabulary: int = 97) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(2, vocabulary, (n,), generator=generator).tolist() for n in lengths]


def alone(model: PreTrainedModel, ids: list[int], config: GriffinConfig, backend: str) -> list[int]:
    with griffin.attach(model, config, backend=backend) as handle:
        steps = generate_step(model, torch.tensor([ids]), handle=handle)
        return [int(next(steps).tokens) for _ in range(TOKENS)]


def together(
    model: PreTrainedModel, prompts: list[list[int]], configs: Sequence[GriffinConfig], backend: str, chunk: int
) -> list[list[int]]:
    """Prompt i joins before step 2 i, and leaves after its tokens."""
    found: list[list[int]] = [[] for _ in prompts]
    with griffin.attach(model, density=0.5, backend=backend, selection="topk") as handle:
        batch = Batch(model, handle)
        going: dict[int, Running] = {}
        for step in range(2 * len(prompts) + TOKENS):
            if step % 2 == 0 and step // 2 < len(prompts):
                which = step // 2
                prompt = batch.prefill(prompts[which], configs[which], len(prompts[which]) + TOKENS)
                logits = None
                while logits is None:
                    logits = prompt.run(chunk)
                going[which] = prompt.running()
                going[which].token = int(logits.argmax())
                found[which].append(going[which].token)
            for which, logits_ in zip(list(going), batch.step(list(going.values())), strict=True):
                assert isinstance(logits_, torch.Tensor), logits_
                going[which].token = int(logits_.argmax())
                found[which].append(going[which].token)
            going = {which: row for which, row in going.items() if len(found[which]) < TOKENS}
        assert handle.sparse_calls > 0 or batch.step_name == "native"
    return found


@pytest.mark.parametrize("chunk", [3, 100])
@pytest.mark.parametrize("backend", ["reference", "gather", pytest.param("native", marks=needs_native)])
def test_together_equals_alone(backend: str, chunk: int) -> None:
    model = tiny_llama(torch.float32)
    prompts = prompts_of(LENGTHS)
    found = together(model, prompts, CONFIGS, backend, chunk)
    expected = [alone(model, ids, config, backend) for ids, config in zip(prompts, CONFIGS, strict=True)]
    assert found == expected
    assert len({tuple(own) for own in found}) == len(found)  # they differ, so none can pass for another


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
def test_sequences_with_and_without_dynamic_selection_step_together(backend: str) -> None:
    model = tiny_llama(torch.float32)
    configs = [
        GriffinConfig(density=0.5, selection="dynamic+topk"),
        GriffinConfig(density=0.5, selection="topk"),
        GriffinConfig(density=0.5, selection="dynamic+topk"),
        GriffinConfig(density=0.75, selection="dynamic+topk"),
        GriffinConfig(density=1.0, selection="dynamic+topk"),
    ]
    prompts = prompts_of(LENGTHS)
    expected = [alone(model, ids, config, backend) for ids, config in zip(prompts, configs, strict=True)]
    assert together(model, prompts, configs, backend, 4) == expected


@pytest.mark.parametrize("family", ["gemma3_text", "qwen2", "gpt_neox", "opt", "phi3"])
def test_families_step_together(family: str) -> None:
    settings: dict[str, dict[str, Any]] = {
        "gemma3_text": {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
        "opt": {"ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    }
    common = {
        **{"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"intermediate_size": 64, "num_key_value_heads": 2, "pad_token_id": 0, "initializer_range": 0.3},
    }
    model = random_model(family, common | settings.get(family, {}), torch.float32)
    prompts = prompts_of(LENGTHS[:3])
    configs = CONFIGS[:3]
    backend = "auto"
    expected = [alone(model, ids, config, backend) for ids, config in zip(prompts, configs, strict=True)]
    assert together(model, prompts, configs, backend, 5) == expected


def test_copies_go_on_by_themselves() -> None:
    model = tiny_llama(torch.float32)
    ids = prompts_of([6])[0]
    with griffin.attach(model, density=0.5, selection="topk") as handle:
        batch = Batch(model, handle)
        prompt = batch.prefill(ids, CONFIGS[0])
        prompt.run(6)
        first, second = prompt.running().copies(2)
        first.token, second.token = 5, 9
        both = batch.step([first, second])
        again = batch.prefill([*ids], CONFIGS[0])
        again.run(6)
        single = again.running()
        single.token = 9
        torch.testing.assert_close(both[1], batch.step([single])[0])
        assert not torch.allclose(both[0], both[1])  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
def test_what_is_wrong_with_one_sequence_does_not_end_another(backend: str) -> None:
    model = tiny_llama(torch.float32)
    prompts = prompts_of([5, 6, 7])
    with griffin.attach(model, density=0.5, backend=backend, selection="topk") as handle:
        batch = Batch(model, handle)
        rows = []
        for ids in prompts:
            prompt = batch.prefill(ids, CONFIGS[0])
            logits = prompt.run(99)
            assert logits is not None
            rows.append(prompt.running())
            rows[-1].token = int(logits.argmax())
        good = [row.token for row in rows]
        rows[1].token = 10**6  # no such token
        found = batch.step(rows)
        assert isinstance(found[1], Exception)
        assert [row.cache.length for row in rows] == [6, 6, 8]
    for which in (0, 2):
        expected = alone(model, prompts[which], CONFIGS[0], backend)
        assert [good[which], int(found[which].argmax())] == expected[:2]  # type: ignore[union-attr]


def test_what_cannot_be_is_refused_and_undone() -> None:
    model = tiny_llama(torch.float32)
    with griffin.attach(model, density=0.5, selection="topk") as handle:
        batch = Batch(model, handle)
        prompt = batch.prefill([1, 2, 3], CONFIGS[0])
        prompt.run(2)
        with pytest.raises(ValueError, match="1 tokens of the prompt have not been run"):
            prompt.running()
        prompt.run(2)
        with pytest.raises(ValueError, match="keeps single weights, not neurons"):
            batch.prefill([1, 2, 3], GriffinConfig(selection="wanda"))
        with pytest.raises(ValueError, match="this model has layers 0 to 2"):
            batch.prefill([1, 2, 3], GriffinConfig(layers=(9,), selection="topk"))
    assert not any("forward" in vars(module) for module in model.modules())  # and all is undone
