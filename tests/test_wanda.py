"""Adaptive Wanda against a brute-force loop over the weights; padding, chunks, turns and batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import griffin
from conftest import tiny_llama
from griffin.analysis.perplexity import measure
from griffin.analysis.wanda import mask, wanda
from griffin.config import GriffinConfig

IDS = torch.tensor([[5, 17, 3, 88, 41, 9, 60, 22, 71, 13, 2]])
NEXT = torch.tensor([[7]])


def brute_force(model: LlamaForCausalLM, prompts: list[Tensor], density: float) -> LlamaForCausalLM:
    """A model whose FF weights are masked by loops over the inputs of each prompt, run by itself."""
    inputs: dict[str, list[Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(lambda m, args, name=name: inputs.setdefault(name, []).append(args[0][0]))
        for name, module in model.named_modules()
        if name.endswith("_proj") and ".mlp." in name
    ]
    for ids in prompts:
        model(ids)
    for hook in hooks:
        hook.remove()
    masked = tiny_llama()
    masked.load_state_dict(model.state_dict())
    for name, xs in inputs.items():
        weight = masked.get_submodule(name).weight.data
        norms = torch.zeros(weight.shape[1], dtype=torch.float64)
        for x in xs:
            norms += x.norm(dim=0) / x.shape[0] ** 0.5
        for row in weight:
            scores = row.abs() * norms
            k = int(density * len(row))
            for j in scores.argsort()[: len(row) - k]:
                row[j] = 0.0
    return masked


def wanda_logits(model: LlamaForCausalLM, prompt: Tensor, tokens: Tensor, **settings: object) -> Tensor:
    with wanda(model, GriffinConfig(selection="wanda", **settings)) as handle:
        with handle.prompt_phase():
            model(prompt)
        with handle.generation_phase():
            return model(tokens).logits


@pytest.mark.parametrize("density", [0.5, 0.25])
def test_wanda_is_a_model_masked_by_loops(density: float) -> None:
    model = tiny_llama()
    expected = brute_force(model, [IDS], density)(IDS).logits
    found = wanda_logits(model, IDS, IDS, density=density)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)  # float64; the same weights, masked alike
    assert not torch.allclose(found, model(IDS).logits)
    (measured,) = measure(model, torch.cat([IDS, IDS], 1), 11, [GriffinConfig(density=density, selection="wanda")])
    alone = torch.nn.functional.cross_entropy
    with wanda(model, GriffinConfig(selection="wanda", density=density)) as handle:
        with handle.prompt_phase():
            out = model(IDS, use_cache=True)
        with handle.generation_phase():
            logits = model(IDS[:, :-1], past_key_values=out.past_key_values).logits
    loss = alone(logits[0], IDS[0, 1:], reduction="none").float()
    torch.testing.assert_close(measured.nll[0, 1:], loss, rtol=0, atol=5e-6)  # float32 losses of about 10


def test_a_shared_batch_sums_the_norms_and_padding_does_not_count() -> None:
    model, short = tiny_llama(), IDS[:, :6]
    expected = brute_force(model, [IDS, short], 0.5)(NEXT).logits
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.int64), short], dim=1)
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[1, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with wanda(model, GriffinConfig(selection="wanda", density=0.5)) as handle:
        with handle.prompt_phase():
            model(torch.cat([IDS, padded]), attention_mask=mask, position_ids=positions)
        with handle.generation_phase():
            found = model(NEXT).logits
        assert handle.sparse_calls == 3
        assert not handle.experts
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)  # float64
    with pytest.raises(ValueError, match="set batch to shared"):
        wanda_logits(model, torch.cat([IDS, IDS]), NEXT, batch="per_sequence")


def test_chunks_and_turns_add_up_and_undo_is_exact() -> None:
    model = tiny_llama()
    before = model(IDS).logits
    with wanda(model, GriffinConfig(selection="wanda")) as handle:
        with handle.prompt_phase():
            cache = model(IDS[:, :4], use_cache=True).past_key_values
            model(IDS[:, 4:8], past_key_values=cache)
        first = handle.gathered.copy()
        with handle.prompt_phase(statistics=first):
            model(IDS[:, 8:], past_key_values=cache)
        with handle.generation_phase():
            found = model(NEXT).logits
    torch.testing.assert_close(found, wanda_logits(model, IDS, NEXT), rtol=0, atol=1e-9)  # float64
    assert torch.equal(model(IDS).logits, before)
    with griffin.attach(model, selection="topk") as handle, handle.prompt_phase():
        model(IDS)
    with (
        wanda(model, GriffinConfig(selection="wanda")) as other,
        pytest.raises(ValueError, match="began with another selection"),
        other.prompt_phase(statistics=handle.gathered),
    ):
        model(IDS)


def test_generate_runs_it_and_other_backends_are_refused() -> None:
    model = tiny_llama()
    with wanda(model, GriffinConfig(selection="wanda", density=0.5)) as handle:
        tokens = model.generate(IDS, max_new_tokens=4, do_sample=False)
        assert tokens.shape == (1, 15)
        assert handle.sparse_calls == 9
    for backend in ("native", "gather"):
        with pytest.raises(ValueError, match="saves no time"):
            GriffinConfig(selection="wanda", backend=backend)
    assert torch.equal(wanda_logits(model, IDS, IDS, density=1.0), model(IDS).logits)
    with pytest.raises(ValueError, match=r"griffin\.analysis\.wanda"):
        griffin.attach(model, selection="wanda")


def test_of_every_row_the_weights_of_largest_score_are_kept() -> None:
    weight, norms = torch.randn(5, 12), torch.rand(12)
    kept = mask(weight, norms, 4)
    for row, masked in zip(weight, kept, strict=True):
        order = sorted(range(12), key=lambda j: -abs(float(row[j])) * float(norms[j]))
        expected = [float(row[j]) if j in order[:4] else 0.0 for j in range(12)]
        assert masked.tolist() == expected
