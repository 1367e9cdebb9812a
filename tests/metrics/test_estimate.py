"""Intervals that hold what they promise."""

from __future__ import annotations

import math

import pytest
import torch

from infusion.metrics.estimate import bootstrap, jackknife, mean, paired, paired_rates, rate


def test_the_interval_of_a_mean_is_the_normal_one():
    x = torch.randn(400, generator=torch.Generator().manual_seed(0))
    e = bootstrap(x)
    assert e.value == pytest.approx(float(x.mean()), abs=1e-6)
    half = 1.96 * float(x.std()) / 20
    assert e.low == pytest.approx(e.value - half, abs=0.02)
    assert e.high == pytest.approx(e.value + half, abs=0.02)
    assert e.n == 400


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(1)
    inside = 0
    for trial in range(200):
        e = bootstrap(torch.rand(40, generator=generator) ** 2, resamples=300, seed=trial)
        inside += e.low <= 1 / 3 <= e.high
    assert 0.88 <= inside / 200 <= 0.99


def test_any_statistic_and_the_same_seed_the_same_interval():
    x = torch.arange(101.0)
    median = lambda v: v.median()  # noqa: E731
    assert bootstrap(x, median).value == 50
    assert bootstrap(x, median) == bootstrap(x, median)
    assert bootstrap(x, median) != bootstrap(x, median, seed=1)


def test_few_samples():
    with pytest.raises(ValueError, match="no samples"):
        bootstrap(torch.zeros(0))
    one = bootstrap(torch.tensor([3.0]))
    assert (one.value, one.n) == (3.0, 1)
    assert math.isinf(one.high)
    x = torch.rand(20, generator=torch.Generator().manual_seed(4)) ** 2
    assert bootstrap(x[:19]) == mean(x[:19])  # Student's
    assert bootstrap(x) != mean(x)


def test_a_rate_near_its_ends_keeps_an_interval():
    none = rate(torch.zeros(50, dtype=torch.bool))
    assert none.value == 0
    assert none.low == 0
    assert none.high == pytest.approx(0.0714, abs=1e-3)  # Wilson, 0 of 50
    half = rate(torch.tensor([True, False] * 25))
    assert (half.low, half.high) == (pytest.approx(0.366, abs=1e-3), pytest.approx(0.634, abs=1e-3))


def test_pairs_are_sharper_than_two_intervals():
    generator = torch.Generator().manual_seed(2)
    common = torch.randn(100, generator=generator)
    a, b = common + 0.1, common + 0.01 * torch.randn(100, generator=generator)
    difference = paired(a, b)
    assert difference.low > 0.09
    assert bootstrap(a).low < bootstrap(b).high
    with pytest.raises(ValueError, match="cannot be paired"):
        paired(a, b[:5])


def test_a_difference_of_rates_has_a_width_where_neither_hits():
    none = torch.zeros(20, dtype=torch.bool)
    found = paired_rates(none, none)
    assert (found.value, found.low, found.high) == (0, -rate(none).high, rate(none).high)
    some = torch.arange(20) < 5
    alike, apart = paired_rates(some, some), paired_rates(some, some.flip(0))
    assert alike.value == apart.value == 0
    assert alike.high < apart.high  # pictures that agree tell more
    half = torch.arange(20) < 10
    assert paired_rates(half, half).high > 0.05
    against = paired_rates(none, some)
    forth = paired_rates(some, none)
    assert (against.low, against.high) == pytest.approx((-forth.high, -forth.low))
    assert forth.low > 0


def test_an_interval_of_a_difference_of_rates_covers_the_truth():
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(400):
        u = torch.rand(40, generator=generator)
        again = torch.where(torch.rand(40, generator=generator) < 0.5, u, torch.rand(40, generator=generator))
        found = paired_rates(u < 0.3, again < 0.1)
        held += found.low <= 0.2 <= found.high
    assert held >= 0.92 * 400


def test_the_jackknife_of_a_mean_is_students():
    x = torch.randn(17, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours, students = jackknife(lambda kept: float(x[kept].mean()), 17), mean(x)
    assert (ours.value, ours.low, ours.high, ours.n) == pytest.approx(
        (students.value, students.low, students.high, 17), rel=1e-9
    )
    with pytest.raises(ValueError, match="There is 1 sample"):
        jackknife(lambda kept: 0.0, 1)


def test_the_jackknife_covers_a_squared_distance_that_the_bootstrap_overstates():
    """Squared distance of the means of two sets a unit apart; resampling adds the means' own variance once more."""
    generator = torch.Generator().manual_seed(2)
    inside = 0
    for _ in range(200):
        x, y = torch.randn(2, 30, generator=generator, dtype=torch.float64)
        e = jackknife(lambda kept, x=x, y=y: float((x[kept].mean() - y[kept].mean() - 1) ** 2), 30)
        inside += e.low <= 1 <= e.high
    assert 0.9 <= inside / 200 <= 0.99
