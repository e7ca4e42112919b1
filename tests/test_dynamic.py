"""Dynamic neuron selection, against a naive implementation and against itself in every other form."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Gemma2Config, GPTNeoXConfig, OPTConfig, Phi3Config

import griffin
from conftest import tiny_llama
from griffin import GriffinConfig, generate_step
from griffin.analysis import perplexity
from griffin.engine.step import Sampling
from griffin.layouts import find_ff_blocks
from griffin.method import dynamic
from griffin.models.convert import convert
from griffin.native import grouped, kernel, library, operands

PROMPT = torch.tensor([[5, 17, 3, 88, 41, 9, 60, 22, 71, 13, 2], [7, 7, 12, 90, 4, 33, 18, 2, 61, 50, 11]])
LATER = torch.tensor([[8, 30, 77], [19, 5, 64]])
native = pytest.mark.skipif(library.why_not() is not None, reason="the native library was not built")
# Where inputs meet weights in integers (a sketch, int8, int4) they are rounded to 15 bits, in groups of 32, so that now
# and then a neuron at the edge changes places with the next one. Floats differ by the order of their sums.
ROUNDED, FLOAT, BF16 = 0.08, 1e-5, 0.02


@pytest.fixture
def own_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    """No sketches: the gates themselves are read."""
    monkeypatch.setattr(dynamic, "_NOISE", {None: 0.0, "int8": 1e9, "int4": 1e9})


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference, as a share of the spread."""
    return float((found.double() - expected.double()).square().mean().sqrt() / expected.double().std())


def later(model: Any, handle: Any, prompt: torch.Tensor = PROMPT, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        with handle.prompt_phase():
            cache = model(prompt, **kwargs).past_key_values
        if "attention_mask" in kwargs:
            mask = torch.cat([kwargs["attention_mask"], torch.ones_like(LATER)], dim=1)
            kwargs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)[:, -3:]}
        with handle.generation_phase():
            return model(LATER, past_key_values=cache, **kwargs).logits


def naive(model: Any, block: Any, split: dynamic.Split, prompt: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """One sequence's FF block, token by token and neuron by neuron. Shapes: prompt (S, D), x (T, D)."""
    gate, up, down = (p.weight for p in (*block.inputs, block.output))
    ups = prompt @ up.T
    rms = ups.square().mean(dim=0).sqrt()
    z = F.silu(prompt @ gate.T) * ups
    statistic = (z / z.norm(dim=1, keepdim=True)).square().sum(dim=0).sqrt()
    experts = statistic.topk(split.experts).indices
    read = gate if split.gate is None else dynamic.sketch(block, split.gate).unpack().to(gate.dtype)
    rows = []
    for token in x:
        gates = {int(j): F.silu(read[j] @ token) for j in experts}
        worth = {j: float(abs(g) * rms[j] * down[:, j].norm()) for j, g in gates.items()}
        best = sorted(worth, key=worth.__getitem__, reverse=True)[: split.chosen]
        rows.append(sum(gates[j] * (up[j] @ token) * down[:, j] for j in best))
    return torch.stack(rows)


@torch.no_grad()
@pytest.mark.parametrize("density", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("sketched", [False, True])
def test_the_reference_is_the_naive_computation(
    density: float, sketched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not sketched:
        monkeypatch.setattr(library, "why_not", lambda: "not built")
    model = tiny_llama()
    mlp = model.model.layers[0].mlp
    with griffin.attach(model, selection="dynamic+topk", density=density, backend="reference") as handle:
        split = handle.splits[0]
        assert (split.gate is not None) == sketched
        seen: list[torch.Tensor] = []
        hook = mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        wrote = mlp.register_forward_hook(lambda _, args, output: seen.append(output))
        later(model, handle, PROMPT[:1].repeat(2, 1))
        hook.remove(), wrote.remove()
        prompt, _, x, y = seen
        torch.testing.assert_close(y[0], naive(model, handle.blocks[0], split, prompt[0], x[0]))
        assert handle.sparse_calls == 3  # layers


def both(model: Any, layers: int, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the native backend and of the reference."""
    found = []
    for backend in ("native", "reference"):
        calls = library.calls()
        with griffin.attach(model, selection="dynamic+topk", backend=backend, **settings) as handle:
            found.append(later(model, handle))
            assert handle.sparse_calls == layers
            assert all(0 < split.chosen <= split.experts for split in handle.splits.values())
        if backend == "native":
            assert library.calls() > calls
    return found[0], found[1]


@native
@pytest.mark.parametrize("batch", ["shared", "per_sequence"])
@pytest.mark.parametrize(
    ("weights", "tolerance"), [("f32", FLOAT), ("bf16", BF16), ("int8", ROUNDED), ("int4", ROUNDED)]
)
@pytest.mark.usefixtures("own_gates")
def test_native_is_the_reference(batch: str, weights: str, tolerance: float) -> None:
    model = tiny_llama(torch.float32, hidden_size=64, intermediate_size=160)
    convert(model, weights)
    assert off(*both(model, 3, density=0.6, batch=batch)) < tolerance


@native
@pytest.mark.parametrize("batch", ["shared", "per_sequence"])
@pytest.mark.parametrize("weights", ["f32", "bf16", "int8"])
def test_native_is_the_reference_with_sketches(batch: str, weights: str) -> None:
    model = tiny_llama(torch.float32, hidden_size=256, intermediate_size=160)
    convert(model, weights)
    with griffin.attach(model, selection="dynamic+topk", density=0.6) as handle:
        assert handle.splits[0].gate is not None
    assert off(*both(model, 3, density=0.6, batch=batch)) < ROUNDED


FAMILIES = {
    "opt": OPTConfig(hidden_size=32, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=97),
    "gpt_neox": GPTNeoXConfig(
        hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=97
    ),
    "phi3": Phi3Config(
        hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=97, pad_token_id=0
    ),
    "gemma2": Gemma2Config(
        hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=97,
    ),
}  # fmt: skip


@native
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("batch", ["shared", "per_sequence"])
def test_families_with_and_without_a_gate(name: str, batch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(FAMILIES[name]).float().eval()
    for module in model.modules():
        if isinstance(getattr(module, "bias", None), torch.nn.Parameter):
            torch.nn.init.normal_(module.bias, std=0.3)
    settings: dict[str, Any] = {"density": 0.5, "batch": batch}
    with torch.no_grad():
        plain = model(torch.cat([PROMPT, LATER], dim=1)).logits[:, -3:]
    sketched = both(model, 2, **settings)
    assert off(*sketched) < ROUNDED
    assert off(sketched[0], plain) > 1e-4
    monkeypatch.setattr(dynamic, "_NOISE", {None: 0.0, "int8": 1e9, "int4": 1e9})
    assert off(*both(model, 2, **settings)) < FLOAT


@native
@pytest.mark.usefixtures("own_gates")
def test_weights_that_were_ignored_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(torch.float32, hidden_size=64, intermediate_size=160)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data *= 3 * torch.rand(160)
    with griffin.attach(model, selection="dynamic+topk", density=0.6, backend="native") as handle:
        right = later(model, handle)
    monkeypatch.setattr("griffin.method.dynamic.output_norms", lambda block: torch.ones(block.width))
    with griffin.attach(model, selection="dynamic+topk", density=0.6, backend="native") as handle:
        assert off(later(model, handle), right) > ROUNDED


@native
@pytest.mark.parametrize("weights", ["f32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("density", [0.3, 0.5, 0.75])
def test_bytes_counted_are_bytes_claimed(weights: str, density: float) -> None:
    model = tiny_llama(torch.float32, hidden_size=64, intermediate_size=160)
    convert(model, weights)
    full = sum(block.nbytes for block in find_ff_blocks(model))
    with griffin.attach(model, selection="dynamic+topk", density=density, backend="native") as handle:
        steps = generate_step(model, PROMPT[:1], handle=handle, sampling=Sampling(temperature=0))
        next(steps)
        before = library.ff_bytes()
        for _ in islice(steps, 3):
            pass
        read = (library.ff_bytes() - before) / 3
        if weights in grouped.MADE:  # scales of a group of down's neurons are read whole, where one of them is chosen
            scales = sum(part.scales.numel() for block in find_ff_blocks(model) for part in block.output.parts)
            assert handle.ff_bytes_per_token - 4 <= read < handle.ff_bytes_per_token + scales
        else:
            assert read == pytest.approx(handle.ff_bytes_per_token, abs=4)  # rounding
        assert 0.9 * density * full < handle.ff_bytes_per_token <= density * full + 4


def test_padding_chunks_and_the_batch_change_nothing() -> None:
    model = tiny_llama()
    settings: dict[str, Any] = {"selection": "dynamic+topk", "density": 0.5, "batch": "per_sequence"}
    with griffin.attach(model, backend="reference", **settings) as handle:
        whole = later(model, handle)
        padded = torch.cat([torch.zeros(2, 4, dtype=torch.int64), PROMPT], dim=1)
        mask = torch.ones_like(padded)
        mask[:, :4] = 0
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        torch.testing.assert_close(later(model, handle, padded, attention_mask=mask, position_ids=positions), whole)
        with torch.no_grad():
            with handle.prompt_phase():
                cache = model(PROMPT[:, :4]).past_key_values
                model(PROMPT[:, 4:], past_key_values=cache)
            with handle.generation_phase():
                torch.testing.assert_close(model(LATER, past_key_values=cache).logits, whole)
            with handle.generation_phase(rows=[1, 1]):
                pass
    for row in range(2):
        with griffin.attach(model, backend="reference", **settings) as handle, torch.no_grad():
            with handle.prompt_phase():
                cache = model(PROMPT[row : row + 1]).past_key_values
            with handle.generation_phase():
                alone = model(LATER[row : row + 1], past_key_values=cache).logits
        torch.testing.assert_close(alone, whole[row : row + 1])


def test_rows_name_the_prompts_that_are_continued() -> None:
    model = tiny_llama()
    settings: dict[str, Any] = {"selection": "dynamic+topk", "batch": "per_sequence", "backend": "reference"}
    with griffin.attach(model, **settings) as handle, torch.no_grad():
        with handle.prompt_phase():
            model(PROMPT)
        outputs = {}
        for rows in (None, [1, 0], [1, 1]):
            with handle.generation_phase(rows=rows):
                outputs[str(rows)] = model(LATER if rows is None else LATER[rows]).logits
    whole = outputs["None"]
    torch.testing.assert_close(outputs["[1, 0]"], whole[[1, 0]])
    torch.testing.assert_close(outputs["[1, 1]"], whole[[1, 1]])


def test_density_one_is_the_model_and_topk_is_the_papers() -> None:
    model = tiny_llama()
    with torch.no_grad():
        expected = model(torch.cat([PROMPT, LATER], dim=1)).logits[:, -3:]
    with griffin.attach(model, selection="dynamic+topk", density=1.0) as handle:
        assert not handle.splits
        torch.testing.assert_close(later(model, handle), expected)
    with griffin.attach(model, density=0.5, selection="topk") as handle:
        later(model, handle)
        assert not handle.splits
        assert not handle.gathered.ups
        assert len(handle.experts[0]) == 40


def test_teacher_forced_is_step_by_step() -> None:
    model = tiny_llama()
    text = torch.cat([PROMPT, LATER, PROMPT.flip(1)], dim=1)
    config = GriffinConfig(selection="dynamic+topk", backend="reference")
    measured = perplexity.measure(model, text, 11, [config, GriffinConfig(selection="topk", backend="reference")])
    for row in range(2):
        with griffin.attach(model, config) as handle, torch.no_grad():
            with handle.prompt_phase():
                outputs = model(text[row : row + 1, :11])
            for at in range(11, text.shape[1]):
                logprobs = outputs.logits[0, -1].log_softmax(-1)
                assert float(measured[0].nll[row, at - 11]) == pytest.approx(-float(logprobs[text[row, at]]), abs=1e-4)
                with handle.generation_phase():
                    outputs = model(text[row : row + 1, at : at + 1], past_key_values=outputs.past_key_values)


def test_what_has_no_dynamic_selection_is_refused() -> None:
    with pytest.raises(ValueError, match="gather backend copies"):
        griffin.attach(tiny_llama(), selection="dynamic+topk", backend="gather")
    for selection in ("dynamic+wanda", "dynamic+magnitude"):
        with pytest.raises(ValueError, match="cannot be refined by dynamic"):
            GriffinConfig(selection=selection)
    with pytest.raises(ValueError, match=r"refinement is 'dynamik'.*did you mean 'dynamic'"):
        GriffinConfig(selection="dynamik+topk")
    model = tiny_llama()
    model.model.layers[1].mlp.act_fn = torch.nn.Hardtanh()
    with pytest.raises(ValueError, match="activation that dynamic neuron selection does not know"):
        griffin.attach(model, selection="dynamic+topk")


def test_a_conversation_without_what_dynamic_selection_needs_is_refused() -> None:
    model = tiny_llama()
    with griffin.attach(model, density=0.5, selection="topk") as handle, torch.no_grad(), handle.prompt_phase():
        model(PROMPT)
    earlier = handle.gathered
    with (
        griffin.attach(model, selection="dynamic+topk", backend="reference") as handle,
        torch.no_grad(),
        pytest.raises(ValueError, match="dynamic neuron selection needs are unknown"),
        handle.prompt_phase(statistics=earlier),
    ):
        model(PROMPT)


def test_undo_leaves_nothing() -> None:
    model = tiny_llama()
    with torch.no_grad():
        before = model(PROMPT).logits
    keys = [set(vars(module)) for module in model.modules()]
    with griffin.attach(model, selection="dynamic+topk", density=0.3) as handle:
        assert not torch.equal(later(model, handle), model(torch.cat([PROMPT, LATER], 1)).logits[:, -3:])
    assert keys == [set(vars(module)) for module in model.modules()]
    with torch.no_grad():
        assert torch.equal(model(PROMPT).logits, before)


@native
def test_sketches_are_made_once_and_anew_for_other_weights() -> None:
    model = tiny_llama(torch.float32)
    block = find_ff_blocks(model)[0]
    first = dynamic.sketch(block, "int4")
    assert dynamic.sketch(find_ff_blocks(model)[0], "int4") is first
    with torch.no_grad():
        block.inputs[0].weight.mul_(2.0)
    assert dynamic.sketch(block, "int4") is not first


@native
@pytest.mark.parametrize("rows", [1, 2, 7, 16])
@pytest.mark.parametrize("k", [1, 50, 96])
def test_the_kernel_takes_exactly_k_a_row(rows: int, k: int) -> None:
    """Scores that are equal, zero or few: of equals the first are taken."""
    d, width = 32, 96
    gate = torch.zeros(width, d)
    gate[::3, 0] = 1.0  # a third of the neurons have equal gates, the others zero
    up, down = torch.randn(width, d), torch.randn(width, d)
    block = operands.ff_block(
        operands.matrix(gate), operands.matrix(up), operands.matrix(down, neuron_major=True), activation="relu"
    )
    x = torch.rand(rows, d) + 0.5
    y = kernel.ff(block, x, dynamic=operands.dynamic(block, torch.ones(width), k))
    active = torch.arange(0, width, 3)[:k]
    expected = ((x @ gate[active].T) * (x @ up[active].T)) @ down[active]
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)  # float32 sums of another order
