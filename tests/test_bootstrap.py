"""Bootstrap intervals: coverage, pairing, weights, and what cannot be resampled."""

import math

import pytest
import torch

from griffin.analysis.bootstrap import geometric_interval, mean_interval, paired_interval


def test_the_interval_covers_the_true_mean_as_often_as_it_says():
    generator = torch.Generator().manual_seed(7)
    trials, inside = 400, 0
    for trial in range(trials):
        interval = mean_interval(torch.randn(60, generator=generator) * 3.0 + 5.0, resamples=400, level=0.9, seed=trial)
        inside += interval.low <= 5.0 <= interval.high
    # 0.9 of 400, with five standard errors (0.015 each): the percentile interval is a little narrow at 60 examples.
    assert inside / trials == pytest.approx(0.9, abs=0.075)


def test_a_wider_level_and_fewer_examples_widen_the_interval():
    values = torch.randn(200, generator=torch.Generator().manual_seed(0))
    narrow, wide = (mean_interval(values, level=level) for level in (0.5, 0.99))
    few = mean_interval(values[:20], level=0.5)
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high
    assert few.high - few.low > narrow.high - narrow.low


def test_the_width_is_that_of_the_standard_error():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(3)).double()
    interval = mean_interval(values)
    error = float(values.std()) / math.sqrt(1000)
    assert interval.value == pytest.approx(float(values.mean()), abs=1e-12)  # the same sum in another order
    assert (interval.high - interval.low) / 2 == pytest.approx(1.96 * error, rel=0.1)  # 2000 resamples: 3 % of noise


def test_paired_is_narrower_than_unpaired_and_finds_a_small_real_difference():
    generator = torch.Generator().manual_seed(1)
    hardness = torch.randn(100, generator=generator) * 10.0
    others = hardness + torch.randn(100, generator=generator) * 0.1
    values = hardness + 0.2 + torch.randn(100, generator=generator) * 0.1
    paired, alone = paired_interval(values, others), mean_interval(values)
    assert paired.value == pytest.approx(float(values.mean() - others.mean()), abs=1e-5)  # float32 means of the test
    assert paired.high - paired.low < 0.05 * (alone.high - alone.low)
    assert 0.0 < paired.low < 0.2 < paired.high


def test_no_difference_is_exactly_zero():
    values = [0.1, 0.7, 0.4]
    interval = paired_interval(values, values)
    assert (interval.value, interval.low, interval.high) == (0.0, 0.0, 0.0)


def test_weights_count_examples_as_often_as_they_say():
    weighted = mean_interval([1.0, 4.0], weights=[3.0, 1.0])
    assert weighted.value == 1.75
    assert paired_interval([1.0, 4.0], [0.0, 0.0], weights=[3.0, 1.0]).value == 1.75
    ignored = mean_interval([1.0, 1.0, 50.0], weights=[1.0, 1.0, 0.0])
    assert (ignored.value, ignored.low, ignored.high) == (1.0, 1.0, 1.0)


def test_groups_are_drawn_whole():
    values, groups = [1.0, 1.0, 4.0, 6.0], [7, 7, 3, 3]
    alone, together = mean_interval(values), mean_interval(values, groups=groups)
    assert together.value == alone.value == 3.0
    assert (together.low, together.high) == (1.0, 5.0)  # two groups: all of one, all of the other, or both
    pairs = paired_interval([2.0, 2.0, 9.0], [1.0, 1.0, 1.0], groups=[0, 0, 1], weights=[1.0, 3.0, 2.0])
    assert pairs.value == pytest.approx((1.0 + 3.0 + 16.0) / 6)
    assert math.isnan(mean_interval(values, groups=[1, 1, 1, 1]).low)
    with pytest.raises(ValueError, match="2 groups for 4 values"):
        mean_interval(values, groups=[1, 2])


def test_a_geometric_mean_is_the_exponential_of_the_logarithms_mean():
    values, weights = [2.0, 8.0, 32.0], [1.0, 2.0, 1.0]
    found = geometric_interval(values, weights=weights)
    logarithms = mean_interval(list(map(math.log, values)), weights=weights)
    assert found.value == pytest.approx(8.0)
    assert (found.low, found.high) == pytest.approx((math.exp(logarithms.low), math.exp(logarithms.high)))
    with pytest.raises(ValueError, match="inf or nan"):
        geometric_interval([1.0, 0.0])


def test_the_seed_decides():
    values = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert mean_interval(values, seed=4) == mean_interval(values, seed=4) != mean_interval(values, seed=5)


def test_many_examples_are_drawn_in_parts():
    interval = mean_interval(torch.arange(100_000).double(), resamples=100)
    assert interval.low < 49999.5 == interval.value < interval.high
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * 100_000 / math.sqrt(12 * 100_000), rel=0.3)  # noise


def test_one_example_has_no_spread():
    for interval in (mean_interval([0.5]), paired_interval([0.5], [0.0])):
        assert interval.value == 0.5
        assert math.isnan(interval.low)
        assert math.isnan(interval.high)


def test_truth_values_are_shares():
    assert mean_interval(torch.tensor([True, False, True, True])).value == 0.75


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: mean_interval([]), "at least one example"),
        (lambda: mean_interval(torch.ones(2, 2)), "shape"),
        (lambda: mean_interval([1.0, math.nan]), "inf or nan"),
        (lambda: mean_interval([1.0, 2.0], weights=[1.0]), "weights"),
        (lambda: mean_interval([1.0, 2.0], weights=[1.0, -1.0]), "weights"),
        (lambda: mean_interval([1.0, 2.0], weights=[0.0, 0.0]), "weights"),
        (lambda: mean_interval([1.0, 2.0], level=95), "level"),
        (lambda: mean_interval([1.0, 2.0], resamples=0), "resamples"),
        (lambda: paired_interval([1.0, 2.0], [1.0]), "pair"),
    ],
)
def test_what_cannot_be_resampled_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
