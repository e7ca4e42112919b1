"""Every dense decoder family of Transformers that the layout rows claim, and those that must be refused.

Tiny random models in float64, so that "sliced equals masked" can be asked to 1e-12. The masking here is written from
the paper's definition alone (zero the other neurons' z before the output projection), shared with nothing.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import griffin
from families import FAMILIES, LAYERS, REFUSED, VOCABULARY, Family, Refused, build, random_model
from griffin import families as rows

DENSITY = 0.25
PROMPT_TOKENS = 7
PADDING = 3  # of the first sequence, on its left
GREEDY: Any = {"max_new_tokens": 5, "do_sample": False, "use_cache": True}  # MPT's config turns the cache off

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices: a second thread only costs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- the test's own machinery -----------------------------------------------------------------------------------------


def prompt() -> tuple[Tensor, Tensor]:
    """Two different prompts, the first left-padded: token ids and mask, both (2, S)."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, PROMPT_TOKENS), generator=generator)
    mask = torch.ones_like(ids)
    ids[0, :PADDING], mask[0, :PADDING] = 0, 0
    return ids, mask


@torch.no_grad()
def run(model: Any, ids: Tensor, mask: Tensor, cache: Any = None) -> Any:
    """One forward pass, with the positions that `generate` would give where the model takes positions."""
    kwargs: dict[str, Any] = {}
    if "position_ids" in inspect.signature(model.forward).parameters:
        kwargs["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    if cache is not None:
        kwargs["past_key_values"] = copy.deepcopy(cache)  # a step writes into it, and every caller starts from the same
    return model(input_ids=ids, attention_mask=mask, use_cache=True, **kwargs)


def longer(mask: Tensor, tokens: int) -> Tensor:
    return torch.cat([mask, mask.new_ones(mask.shape[0], tokens)], dim=1)


def output_projections(model: nn.Module, family: Family) -> list[nn.Module]:
    return [model.get_submodule(family.output.format(layer)) for layer in range(LAYERS)]


@contextmanager
def hooked(modules: Sequence[nn.Module], hook: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """Call `hook(layer, z)` before every output projection."""
    handles = [
        module.register_forward_pre_hook(lambda _, args, layer=layer: hook(layer, args[0]))
        for layer, module in enumerate(modules)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def masked(model: nn.Module, family: Family, experts: dict[int, list[Tensor]]) -> Iterator[None]:
    """The full model with z zeroed outside of the experts: one set for all sequences, or one each."""

    def zero(layer: int, z: Tensor) -> Tensor:
        keep = torch.zeros(len(experts[layer]), 1, family.width, dtype=z.dtype)
        for row, own in zip(keep, experts[layer], strict=True):
            row[:, own] = 1
        return (z.reshape(2, -1, family.width) * keep).view(z.shape)  # OPT flattens its tokens

    with hooked(output_projections(model, family), zero):
        yield


def as_lists(experts: Any) -> dict[int, list[Tensor]]:
    return {layer: own if isinstance(own, list) else [own] for layer, own in experts.items()}


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Equal but for the order of the sums."""
    rtol = 1e-12 if expected.dtype == torch.float64 else 2e-6  # sums of another order: some thousand, and 16, roundings
    assert torch.isfinite(expected).all()
    assert (found - expected).abs().max() <= rtol * expected.abs().max()


def state(model: nn.Module) -> Any:
    """What undo has to put back: state_dict keys and data pointers; attributes and hook counts of every module."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return (
        {name: tensor.data_ptr() for name, tensor in model.state_dict().items()},
        {
            name: (set(vars(module)), [len(vars(module)[hook]) for hook in hooks])
            for name, module in model.named_modules()
        },
    )


# -- every family that is claimed -------------------------------------------------------------------------------------


@every_family
def test_ff_blocks_are_found(family: Family) -> None:
    model = build(family)
    blocks = griffin.find_ff_blocks(model)
    assert [block.layer for block in blocks] == list(range(LAYERS))
    for block, output in zip(blocks, output_projections(model, family), strict=True):
        assert block.output is output
        assert f"{block.path}.{block.layout.output}" == family.output.format(block.layer)
        assert block.width == family.width
        assert block.gated is family.gated
        assert [weight.shape for weight in block.input_weights()] == [(family.width, 32)] * (1 + family.gated)


@pytest.mark.parametrize("row", rows.FAMILIES, ids=lambda row: row.model_type)
def test_every_row_is_tested_with_its_layout(row: rows.Family) -> None:
    tested = [family for family in FAMILIES if row.model_type in (family.model_type, family.name)]
    assert tested, f"{row.model_type} needs a row in tests/families.py"
    for family in tested:
        assert {block.layout for block in griffin.find_ff_blocks(build(family))} == {row.layout}
        assert family.gated is row.layout.gated


def test_rows_are_unique() -> None:
    assert len(rows.BY_TYPE) == len(rows.FAMILIES)
    assert len({row.title for row in rows.FAMILIES}) == len(rows.FAMILIES)


@every_family
@pytest.mark.parametrize("batch", ["shared", "per_sequence"])
def test_sliced_equals_masked(family: Family, batch: str) -> None:
    model = build(family)
    ids, mask = prompt()
    for backend in ("reference", "gather"):
        with griffin.attach(model, density=DENSITY, batch=batch, backend=backend, selection="topk") as handle:
            with handle.prompt_phase():
                cache = run(model, ids, mask).past_key_values
            experts = as_lists(handle.experts)
            assert {len(own) for own in experts.values()} == {1 if batch == "shared" else 2}
            assert {len(one) for own in experts.values() for one in own} == {family.width // 4}
            if batch == "per_sequence":
                assert any(not torch.equal(*own) for own in experts.values())  # or the test shows nothing
            for step, tokens in enumerate(family.steps, start=1):
                new = torch.arange(5, 5 + 2 * tokens).view(2, tokens)
                with handle.generation_phase():
                    sliced = run(model, new, longer(mask, tokens), cache).logits
                assert handle.sparse_calls == step * len(experts)
                full = run(model, new, longer(mask, tokens), cache).logits
                with masked(model, family, experts):
                    expected = run(model, new, longer(mask, tokens), cache).logits
                assert not torch.equal(full, expected)
                assert_close(sliced, expected)


@every_family
def test_density_one_is_exact(family: Family) -> None:
    model = build(family)
    ids, mask = prompt()
    new = torch.tensor([[5], [6]])
    before = run(model, ids, mask)
    step = run(model, new, longer(mask, 1), before.past_key_values)
    tokens = model.generate(ids, attention_mask=mask, **GREEDY)
    with griffin.attach(model, density=1.0, backend="reference", selection="topk") as handle:
        with handle.prompt_phase():
            during = run(model, ids, mask)
        with handle.generation_phase():
            assert torch.equal(run(model, new, longer(mask, 1), during.past_key_values).logits, step.logits)
        assert torch.equal(during.logits[mask.bool()], before.logits[mask.bool()])
        assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), tokens)
        assert all(own.tolist() == list(range(family.width)) for own in handle.experts.values())
        assert handle.sparse_calls == 0


@every_family
def test_undo_is_exact(family: Family) -> None:
    model = build(family)
    ids, mask = prompt()
    new = torch.tensor([[5], [6]])
    cache = run(model, ids, mask).past_key_values

    def step() -> Tensor:
        return run(model, new, longer(mask, 1), cache).logits

    before, kept = step(), state(model)
    with griffin.attach(model, density=DENSITY, selection="topk") as handle:
        with handle.prompt_phase():
            run(model, ids, mask)
        with handle.generation_phase():
            assert not torch.equal(step(), before)
        if handle.backend.name == "native":  # outside of a phase too, over neuron-major storage: other sum order
            torch.testing.assert_close(step(), before, rtol=1e-4, atol=1e-4, equal_nan=True)
        else:
            assert torch.equal(step(), before)
    assert torch.equal(step(), before)
    assert state(model) == kept

    with pytest.raises(RuntimeError, match="stop"), griffin.attach(model, density=DENSITY, selection="topk") as handle:
        with handle.prompt_phase():
            run(model, ids, mask)
        with handle.generation_phase():
            assert not torch.equal(step(), before)
            raise RuntimeError("stop")
    assert torch.equal(step(), before)
    assert state(model) == kept


@every_family
def test_statistic_is_the_papers(family: Family) -> None:
    model = build(family)
    ids, mask = prompt()
    captured: dict[int, Tensor] = {}
    with hooked(output_projections(model, family), lambda layer, z: captured.update({layer: z.detach().clone()})):
        run(model, ids, mask)
    expected: dict[int, list[Tensor]] = {}
    for layer, z in captured.items():
        expected[layer] = []
        for sequence, real in zip(z.view(2, -1, family.width), mask, strict=True):
            energy = torch.zeros(family.width, dtype=torch.float64)
            for token in range(PROMPT_TOKENS):
                if real[token]:
                    energy += (sequence[token] / sequence[token].norm()) ** 2
            expected[layer].append(energy.sqrt())

    for batch in ("shared", "per_sequence"):
        with griffin.attach(model, density=DENSITY, batch=batch, selection="topk") as handle:
            with handle.prompt_phase():
                run(model, ids, mask)
            assert set(handle.statistic) == set(expected)
            for layer, own in expected.items():
                weighted = [s / n.sqrt() for s, n in zip(own, mask.sum(1).double(), strict=True)]
                s = sum(weighted) if batch == "shared" else torch.stack(own)
                found = handle.statistic[layer]
                assert found.dtype == torch.float32
                torch.testing.assert_close(found, s.float(), rtol=1e-5, atol=1e-7)  # the statistic is float32
                best = s.topk(family.width // 4).indices.sort().values.reshape(-1, family.width // 4)
                assert torch.equal(torch.stack(as_lists(handle.experts)[layer]), best)


@every_family
def test_generate_equals_a_naive_loop(family: Family) -> None:
    model = build(family)
    ids, mask = prompt()
    with griffin.attach(model, density=0.5, selection="topk") as handle:
        found = model.generate(ids, attention_mask=mask, **GREEDY)
        experts = as_lists(handle.experts)
        assert handle.sparse_calls == 4 * len(experts)  # the prompt gives the first of the five tokens

    outputs = run(model, ids, mask)
    tokens, seen = ids, mask
    with masked(model, family, experts):
        for _ in range(4):
            new = outputs.logits[:, -1:].argmax(-1)
            tokens, seen = torch.cat([tokens, new], dim=1), longer(seen, 1)
            outputs = run(model, new, seen, outputs.past_key_values)
    tokens = torch.cat([tokens, outputs.logits[:, -1:].argmax(-1)], dim=1)
    assert found.shape == (2, PROMPT_TOKENS + 5)
    assert torch.equal(found, tokens)


# -- a pruned model is a smaller model --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-bias", "gpt2"])
def test_pruned_equals_a_model_of_the_smaller_width(name: str) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    model: Any = build(family)
    ids, mask = prompt()
    new = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with griffin.attach(model, density=DENSITY, selection="topk") as handle:
        with handle.prompt_phase():
            cache = run(model, ids, mask).past_key_values
        with handle.generation_phase():
            pruned = run(model, new, longer(mask, 3), cache).logits
        assert handle.sparse_calls == 2
        experts = dict(handle.experts)

    k = family.width // 4
    own = {"n_inner": k} if name == "gpt2" else {"intermediate_size": k}
    kind, config = (GPT2LMHeadModel, GPT2Config) if name == "gpt2" else (LlamaForCausalLM, LlamaConfig)
    small = kind(config(**family.settings | own)).double().eval()
    weights = model.state_dict()
    for layer, chosen in experts.items():
        for parameter in list(weights):
            if f"h.{layer}.mlp.c_fc" in parameter:  # Conv1D: weight (D, D_ff), bias (D_ff,)
                weights[parameter] = weights[parameter][..., chosen]
            elif f"h.{layer}.mlp.c_proj.weight" in parameter:  # Conv1D: (D_ff, D)
                weights[parameter] = weights[parameter][chosen]
            elif f"layers.{layer}.mlp.down_proj.weight" in parameter:
                weights[parameter] = weights[parameter][:, chosen]
            elif f"layers.{layer}.mlp." in parameter and "down_proj" not in parameter:
                weights[parameter] = weights[parameter][chosen]
    small.load_state_dict(weights)
    assert_close(pruned, run(small, new, longer(mask, 3), cache).logits)


# -- what must be refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: refused.name)
def test_refused_by_name(refused: Refused) -> None:
    model = random_model(refused.name, refused.settings)
    before = state(model)
    with pytest.raises(ValueError, match=f"^{refused.name}") as caught:
        griffin.attach(model, selection="topk")
    for words in refused.words:
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert state(model) == before


class RenamedMLP(nn.Module):
    """A gated FF block whose projections have names that no row knows."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.wi_0, self.wi_1, self.wo, self.act = mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(self.act(self.wi_0(x)) * self.wi_1(x))


@pytest.fixture
def renamed() -> Any:
    model = fresh_llama()
    for layer in model.model.layers:
        layer.mlp = RenamedMLP(layer.mlp)
    return model


def fresh_llama() -> Any:
    """A model of one's own to change."""
    return random_model("llama", FAMILIES[0].settings)


def test_an_unknown_layout_is_refused_with_the_way_out(renamed: Any) -> None:
    with pytest.raises(ValueError, match=r"^llama: layer 0 has no FF block of a known layout") as caught:
        griffin.attach(renamed, selection="topk")
    for words in (
        "mlp.wi_0 (48, 32), mlp.wi_1 (48, 32), mlp.wo (32, 48)",
        *(str(layout) for layout in griffin.LAYOUTS),
        "griffin.attach(model, layout=griffin.Layout(inputs=('gate', 'up'), output='down'))",
    ):
        assert words in str(caught.value)


def test_a_row_of_ones_own(renamed: Any) -> None:
    family = Family("renamed", {}, output="model.layers.{}.mlp.wo")
    ids, mask = prompt()
    new = torch.tensor([[5], [6]])
    layout = griffin.Layout(inputs=("wi_0", "wi_1"), output="wo")
    with griffin.attach(renamed, density=DENSITY, layout=layout, selection="topk") as handle:
        assert [block.gated for block in handle.blocks] == [True, True]
        with handle.prompt_phase():
            cache = run(renamed, ids, mask).past_key_values
        with handle.generation_phase():
            sliced = run(renamed, new, longer(mask, 1), cache).logits
        assert handle.sparse_calls == 2
        experts = as_lists(handle.experts)
    with masked(renamed, family, experts):
        expected = run(renamed, new, longer(mask, 1), cache).logits
    assert_close(sliced, expected)


def test_a_row_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Tried: wi -> wo\. If it has one"):
        griffin.attach(fresh_llama(), layout=griffin.Layout(inputs=("wi",), output="wo"), selection="topk")
    with pytest.raises(ValueError, match=r"mlp\.up_proj \(Linear\) has weights of its own inside the FF block"):
        griffin.attach(
            fresh_llama(),
            layout=griffin.Layout(inputs=("gate_proj",), output="down_proj", fused=True),
            selection="topk",
        )


@pytest.mark.parametrize("inputs", [(), ("gate", "up")])
def test_a_row_that_makes_no_sense_is_refused(inputs: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="exactly one if it is fused"):
        griffin.Layout(inputs=inputs, output="down", fused=True)


class QuantisedLinear(nn.Linear):
    """Stands for bitsandbytes' Linear4bit and its like: a subclass whose forward does something else."""


def adapter() -> nn.Module:
    """Stands for `peft.tuners.lora.layer.Linear`: named as the plain one, but no `nn.Linear`, and wraps one."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Linear(48, 32, dtype=torch.float64)

        weight = property(lambda self: self.base_layer.weight)
        bias = property(lambda self: self.base_layer.bias)

        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x) + 1

    return Linear()


class TensorSubclass(Tensor):
    """Stands for torchao's quantised tensors: they sit in a plain `nn.Linear` and call themselves bfloat16."""


def subclassed() -> nn.Module:
    linear = nn.Linear(48, 32, dtype=torch.float64)
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(TensorSubclass))
    return linear


@pytest.mark.parametrize(
    "projection",
    [
        pytest.param(lambda: QuantisedLinear(48, 32, dtype=torch.float64), id="subclass"),
        pytest.param(adapter, id="adapter"),
        pytest.param(subclassed, id="tensor subclass"),
        pytest.param(
            lambda: nn.utils.parametrizations.weight_norm(nn.Linear(48, 32, dtype=torch.float64)),
            id="parametrised",
        ),
        pytest.param(lambda: nn.Linear(48, 32).to(torch.float8_e4m3fn), id="float8"),
    ],
)
def test_a_projection_that_is_not_plain_is_refused(projection: Callable[[], nn.Module]) -> None:
    model = fresh_llama()
    model.model.layers[1].mlp.down_proj = projection().eval()
    before = set(vars(model.model.layers[0].mlp.down_proj))
    with pytest.raises(
        ValueError, match=r"^llama: model\.layers\.1\.mlp\.down_proj is a .*Linear.* unquantised"
    ) as caught:
        griffin.attach(model, selection="topk")
    assert "without adapters" in str(caught.value)
    assert set(vars(model.model.layers[0].mlp.down_proj)) == before


def test_two_ff_blocks_in_a_layer_are_refused() -> None:
    model = fresh_llama()
    model.model.layers[0].second = copy.deepcopy(model.model.layers[0].mlp)
    with pytest.raises(ValueError, match=r"^llama: layer 0 has 2 FF blocks \(mlp, second\)"):
        griffin.attach(model, selection="topk")
