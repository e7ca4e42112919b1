from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import griffin
from conftest import tiny_llama
from griffin.config import GriffinConfig
from griffin.layouts import FFBlock
from griffin.method import selection
from griffin.method.scores import magnitude_of
from griffin.method.selection import Finite, select
from griffin.methods import METHODS, Method, register_method


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


SELECTIONS = [name for name, method in METHODS.items() if method.select is not None]


def one(scores: torch.Tensor, k: int, selection: str, seed: int = 0) -> torch.Tensor:
    return select(scores[None], k, selection, [seed])[0]


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 60), data=st.data())
def test_every_selection_gives_k_ascending_experts(width: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, width))
    scores = torch.rand(width, generator=generator(data.draw(st.integers(0, 99))))
    for name in SELECTIONS:
        experts = one(scores, k, name)
        assert experts.dtype == torch.int64
        assert experts.shape == (k,)
        assert bool((experts[1:] > experts[:-1]).all())
        assert 0 <= int(experts[0]) <= int(experts[-1]) < width


@settings(max_examples=40, deadline=None)
@given(scores=st.lists(st.integers(0, 5), min_size=1, max_size=30), data=st.data())
def test_topk_is_the_largest_and_of_equals_the_first(scores: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(scores)))
    expected = sorted(sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:k])
    assert one(torch.tensor(scores).float(), k, "topk").tolist() == expected


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 30), data=st.data())
def test_an_accelerator_selects_the_same_without_waiting(width: int, data: st.DataObject) -> None:
    """Its path on the CPU's numbers; and on the device meta, where reading a number would raise."""
    k = data.draw(st.integers(1, width))
    scores = torch.tensor(data.draw(st.lists(st.lists(st.integers(0, 5), min_size=width, max_size=width), min_size=1)))
    scores = scores.float()
    least = scores.topk(k, sorted=False).values.amin(dim=1, keepdim=True)
    found = selection._kept_columns(selection._first(scores, least, k), k)
    assert torch.equal(found, selection.topk(scores, k))
    finite = Finite()
    experts = select(scores.to("meta"), k, "topk", [0] * len(scores), finite)
    assert experts.shape == (len(scores), k)


def test_scores_that_are_not_finite_are_found_later_on_an_accelerator() -> None:
    finite = Finite()
    finite._flags = [torch.tensor(True), torch.tensor(False)]  # as a device leaves them
    for _ in range(2):
        with pytest.raises(ValueError, match="the scores hold inf or nan"):
            finite.check()
    mask = torch.tensor([[False, True, False]])  # nan compares false: fewer than k
    assert selection._kept_columns(mask, 2).tolist() == [[1, 0]]


def test_sample_draws_without_replacement_in_proportion_to_the_scores() -> None:
    scores, draws = torch.tensor([1.0, 2.0, 3.0, 6.0]), 6000
    total = scores.sum()
    # Chance of each pair: drawn in either order, the second from what the first left.
    expected = {
        pair: sum(
            float(scores[a] / total * scores[b] / (total - scores[a])) for a, b in itertools.permutations(pair, 2)
        )
        for pair in itertools.combinations(range(4), 2)
    }
    counts = dict.fromkeys(expected, 0)
    for seed in range(draws):
        counts[tuple(one(scores, 2, "sample", seed).tolist())] += 1
    for pair, chance in expected.items():
        spread = (chance * (1 - chance) / draws) ** 0.5
        assert abs(counts[pair] / draws - chance) < 4 * spread, pair


def test_sample_takes_neurons_of_score_zero_last() -> None:
    scores = torch.tensor([0.0, 1.0, 0.0, 2.0])
    for seed in range(50):
        assert {1, 3} <= set(one(scores, 3, "sample", seed).tolist())


def test_topk_sample_has_half_of_the_best() -> None:
    scores = torch.arange(100).float()
    seen = set()
    for seed in range(20):
        experts = set(one(scores, 10, "topk_sample", seed).tolist())
        assert set(range(95, 100)) <= experts
        seen |= experts
    assert len(seen) > 30


def test_a_seed_means_the_same_experts() -> None:
    scores = torch.rand(200)
    for name in ("sample", "topk_sample", "random"):
        first = one(scores, 50, name, 3)
        assert torch.equal(first, one(scores, 50, name, 3))
        assert not torch.equal(first, one(scores, 50, name, 4))


def test_magnitude_scores_are_products_of_row_norms() -> None:
    gate, up = torch.randn(6, 4), torch.randn(6, 4)
    expected = [float(gate[j].norm() * up[j].norm()) for j in range(6)]
    torch.testing.assert_close(magnitude_of([gate.norm(dim=1), up.norm(dim=1)]), torch.tensor(expected))
    torch.testing.assert_close(magnitude_of([up.norm(dim=1)]), up.norm(dim=1))


def test_wrong_calls_are_refused() -> None:
    with pytest.raises(ValueError, match="expected one of topk"):
        one(torch.rand(4), 2, "best")
    with pytest.raises(ValueError, match="k = 5"):
        one(torch.rand(4), 5, "topk")
    with pytest.raises(ValueError, match="expected \\(N, D_ff\\)"):
        select(torch.rand(4), 2, "topk", [0])
    with pytest.raises(ValueError, match="2 seeds for 3 rows"):
        select(torch.rand(3, 4), 2, "topk", [0, 1])
    for bad in ("nan", "inf"):
        with pytest.raises(ValueError, match="inf or nan"):
            one(torch.tensor([1.0, float(bad)]), 1, "topk")


def test_rows_are_selected_as_if_each_were_alone() -> None:
    scores = torch.rand(6, 40, generator=generator())
    scores[1] = 0.5  # equals at the edge in some rows
    scores[4, :30] = 2.0
    seeds = [3, 1, 4, 1, 5, 9]
    for name in SELECTIONS:
        together = select(scores, 13, name, seeds)
        alone = [one(own, 13, name, seed) for own, seed in zip(scores, seeds, strict=True)]
        assert torch.equal(together, torch.stack(alone)), name


def test_a_new_method_is_a_row() -> None:
    calls = []

    def last(scores: torch.Tensor, k: int, seeds: object) -> torch.Tensor:
        return torch.arange(scores.shape[1] - k, scores.shape[1]).repeat(len(scores), 1)

    def ones(blocks: list[FFBlock], statistics: griffin.Statistics, batch: str) -> torch.Tensor:
        calls.append(len(blocks))
        return torch.ones(len(blocks), 1, blocks[0].width)

    try:
        register_method(Method("last", "the last k neurons", select=last))
        register_method(Method("last_static", "the same, whatever the prompt", select=last, scores=ones, static=True))
        model, ids = tiny_llama(), torch.tensor([[5, 17, 3, 88]])
        with griffin.attach(model, GriffinConfig(density=0.5, selection="last")) as handle, handle.prompt_phase():
            model(ids)
        assert handle.experts[1].tolist() == list(range(40, 80))
        with griffin.attach(model, GriffinConfig(density=0.5, selection="last_static")) as handle:
            assert handle.experts[1].tolist() == list(range(40, 80))  # there before any prompt
            with handle.prompt_phase():
                model(ids)
            assert calls == [3]
            assert not handle.statistic
        with pytest.raises(ValueError, match="already"):
            register_method(Method("last", "", select=last))
        with pytest.raises(ValueError, match="letters, digits"):
            register_method(Method("a+b", "", select=last))
    finally:
        for name in ("last", "last_static"):
            METHODS.pop(name, None)
    with pytest.raises(ValueError, match="expected one of"):
        GriffinConfig(selection="last")
