from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from griffin.selection import SELECTIONS, magnitude_scores, select


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 60), data=st.data())
def test_every_selection_gives_k_ascending_experts(width: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, width))
    scores = torch.rand(width, generator=generator(data.draw(st.integers(0, 99))))
    for name in SELECTIONS:
        experts = select(scores, k, name, generator())
        assert experts.dtype == torch.int64
        assert experts.shape == (k,)
        assert bool((experts[1:] > experts[:-1]).all())
        assert 0 <= int(experts[0]) <= int(experts[-1]) < width


@settings(max_examples=40, deadline=None)
@given(scores=st.lists(st.integers(0, 5), min_size=1, max_size=30), data=st.data())
def test_topk_is_the_largest_and_of_equals_the_first(scores: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(scores)))
    expected = sorted(sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:k])
    assert select(torch.tensor(scores).float(), k, "topk", generator()).tolist() == expected


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
        counts[tuple(select(scores, 2, "sample", generator(seed)).tolist())] += 1
    for pair, chance in expected.items():
        spread = (chance * (1 - chance) / draws) ** 0.5
        assert abs(counts[pair] / draws - chance) < 4 * spread, pair


def test_sample_takes_neurons_of_score_zero_last() -> None:
    scores = torch.tensor([0.0, 1.0, 0.0, 2.0])
    for seed in range(50):
        assert {1, 3} <= set(select(scores, 3, "sample", generator(seed)).tolist())


def test_topk_sample_has_half_of_the_best() -> None:
    scores = torch.arange(100).float()
    seen = set()
    for seed in range(20):
        experts = set(select(scores, 10, "topk_sample", generator(seed)).tolist())
        assert set(range(95, 100)) <= experts
        seen |= experts
    assert len(seen) > 30


def test_a_seed_means_the_same_experts() -> None:
    scores = torch.rand(200)
    for name in ("sample", "topk_sample", "random"):
        first = select(scores, 50, name, generator(3))
        assert torch.equal(first, select(scores, 50, name, generator(3)))
        assert not torch.equal(first, select(scores, 50, name, generator(4)))


def test_magnitude_scores_are_products_of_row_norms() -> None:
    gate, up = torch.randn(6, 4), torch.randn(6, 4)
    expected = [float(gate[j].norm() * up[j].norm()) for j in range(6)]
    torch.testing.assert_close(magnitude_scores([gate.norm(dim=1), up.norm(dim=1)]), torch.tensor(expected))
    torch.testing.assert_close(magnitude_scores([up.norm(dim=1)]), up.norm(dim=1))


def test_wrong_calls_are_refused() -> None:
    with pytest.raises(ValueError, match="expected one of topk"):
        select(torch.rand(4), 2, "best", generator())
    with pytest.raises(ValueError, match="k = 5"):
        select(torch.rand(4), 5, "topk", generator())
    with pytest.raises(ValueError, match="inf or nan"):
        select(torch.tensor([1.0, float("nan")]), 1, "topk", generator())
