from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from griffin.method import statistic


def naive_energy(z: torch.Tensor) -> list[float]:
    """A_j of one sequence, by the formula: plain loops, float64."""
    total = [0.0] * z.shape[1]
    for row in z.double().tolist():
        norm = math.sqrt(sum(value * value for value in row))
        for j, value in enumerate(row):
            if norm > 0:
                total[j] += (value / norm) ** 2
    return total


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 150), width=st.integers(1, 40), seed=st.integers(0, 1000))
def test_energy_is_the_formula(tokens: int, width: int, seed: int) -> None:
    z = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed))
    expected = torch.tensor(naive_energy(z[0]), dtype=torch.float64)
    found = statistic.energy(z)[0].double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # float32 sums of up to 150 terms


def test_energies_of_a_sequence_sum_to_its_tokens() -> None:
    z = torch.randn(2, 100, 64)
    torch.testing.assert_close(statistic.energy(z).sum(dim=1), torch.full((2,), 100.0))


def test_chunks_add_up_to_the_whole() -> None:
    z = torch.randn(2, 128, 64)
    odd = statistic.energy(z[:, :1]) + statistic.energy(z[:, 1:90]) + statistic.energy(z[:, 90:])
    torch.testing.assert_close(odd, statistic.energy(z), rtol=1e-5, atol=1e-7)  # float32 sums of another order


@pytest.mark.parametrize("rubbish", [0.0, 1e30, float("inf"), float("nan")])
def test_padding_never_counts_whatever_it_holds(rubbish: float) -> None:
    z = torch.randn(1, 70, 32)
    padded = torch.cat([torch.full((1, 58, 32), rubbish), z], dim=1)
    mask = torch.arange(128)[None] >= 58
    expected = statistic.energy(z)
    torch.testing.assert_close(statistic.energy(padded, mask), expected, rtol=1e-5, atol=1e-7)  # other sum order


def test_rows_of_zeros_add_nothing() -> None:
    z = torch.randn(1, 10, 8)
    with_zeros = torch.cat([z, torch.zeros(1, 5, 8)], dim=1)
    assert torch.equal(statistic.energy(with_zeros), statistic.energy(z))
    assert torch.equal(statistic.energy(torch.zeros(1, 3, 8)), torch.zeros(1, 8))


def test_a_tokens_scale_does_not_matter() -> None:
    z = torch.randn(1, 30, 16)
    scaled = z * torch.logspace(-6, 6, 30)[None, :, None]
    torch.testing.assert_close(statistic.energy(scaled), statistic.energy(z), rtol=1e-5, atol=1e-7)  # float32 scaling


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_result_is_float32_whatever_the_model_is(dtype: torch.dtype) -> None:
    z = torch.randn(1, 9, 8).to(dtype)
    assert statistic.energy(z).dtype == torch.float32
    torch.testing.assert_close(statistic.energy(z), statistic.energy(z.float()), rtol=1e-6, atol=0)  # from float64


def test_shared_is_the_papers_weighted_sum() -> None:
    energies, tokens = torch.rand(3, 16), torch.tensor([4, 9, 100])
    expected = [sum(math.sqrt(float(energies[i, j])) / math.sqrt(int(tokens[i])) for i in range(3)) for j in range(16)]
    torch.testing.assert_close(statistic.shared(energies, tokens), torch.tensor(expected))


def test_shared_of_one_sequence_is_its_own_statistic() -> None:
    energies = torch.rand(1, 16)
    assert torch.equal(statistic.shared(energies, torch.tensor([7])), energies[0].sqrt())


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \(B, S, D_ff\)"):
        statistic.energy(torch.randn(3, 4))
    with pytest.raises(ValueError, match="mask has shape"):
        statistic.energy(torch.randn(1, 3, 4), torch.ones(1, 4))
