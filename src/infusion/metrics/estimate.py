"""Figures with their uncertainty: a value, how many samples it rests on, and an interval."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.stats import t as student_t
from torch import Tensor

FEW = 20  # samples below which the bootstrap's interval is too narrow (docs/log.md)


@dataclass(frozen=True)
class Estimate:
    """`value` over `n` independent samples, with its 95 % interval [low, high]: the bootstrap's, unless said otherwise."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}] (n = {self.n})"


def bootstrap(
    samples: Tensor,
    statistic: Callable[[Tensor], Tensor] | None = None,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """The statistic (mean of the first axis, if not given) of samples (n, ...) with a percentile interval
    (Efron and Tibshirani, 1993, chapter 13); of fewer than FEW samples (n,) the mean with Student's, since the bootstrap's is too narrow
    there. Samples must be independent: give one per picture, not one per pixel.

    Raises ValueError without samples. One sample has no spread that could be known: its interval is
    unbounded.
    """
    n = len(samples)
    if n == 0:
        raise ValueError("There are no samples; give at least one.")
    values = samples.detach().cpu().double()  # MPS has no float64
    if statistic is None and values.ndim == 1 and n < FEW:
        return mean(values, level)
    of = statistic or (lambda x: x.mean(0))
    value = float(of(values))
    if n == 1:
        return Estimate(value, float("-inf"), float("inf"), 1)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.stack([of(values[torch.randint(n, (n,), generator=generator)]) for _ in range(resamples)])
    tail = (1 - level) / 2
    low, high = torch.quantile(drawn, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Estimate(value, low, high, n)


def mean(samples: Tensor, level: float = 0.95) -> Estimate:
    """The mean of a few samples (n,) with Student's interval.

    Raises ValueError without samples. The interval of one sample is unbounded, that of equal samples has no width.
    """
    n = len(samples)
    if n == 0:
        raise ValueError("There are no samples; give at least one.")
    values = samples.detach().cpu().double()
    value = float(values.mean())
    if n == 1:
        return Estimate(value, float("-inf"), float("inf"), 1)
    half = float(student_t.ppf((1 + level) / 2, n - 1)) * float(values.std()) / n**0.5
    return Estimate(value, value - half, value + half, n)


def jackknife(statistic: Callable[[Tensor], float], n: int) -> Estimate:
    """A statistic of n samples with Student's interval by leaving out each in turn (Efron and Tibshirani, 1993, chapter 11): for distances between
    sets, which a bootstrap's repeated samples would push upwards. statistic: of the samples whose indices (k,) it is given.

    Raises ValueError for fewer than two samples.
    """
    if n < 2:
        raise ValueError(f"There is {n} sample; the jackknife needs at least 2.")
    everyone = torch.arange(n)
    without = torch.tensor([statistic(everyone[everyone != i]) for i in range(n)], dtype=torch.float64)
    error = float(((n - 1) / n * (without - without.mean()).square().sum()).sqrt())
    value, half = statistic(everyone), float(student_t.ppf(0.975, n - 1)) * error
    return Estimate(value, value - half, value + half, n)


def rate(hits: Tensor, level_z: float = 1.959964) -> Estimate:
    """A share of hits (n,) bool with Wilson's interval, which is right also near 0 and 1, where the bootstrap is not
    (Wilson, 1927). Raises ValueError without samples."""
    n = len(hits)
    if n == 0:
        raise ValueError("There are no samples; give at least one.")
    p, z2 = float(hits.cpu().double().mean()), level_z**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = level_z * ((p * (1 - p) + z2 / (4 * n)) / n) ** 0.5 / (1 + z2 / n)
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half), n)


def paired_rates(a: Tensor, b: Tensor) -> Estimate:
    """The share of hits a (n,) bool minus that of b, of samples that share prompt and seed, with an interval that has a width also where
    neither hits (Newcombe, 1998, Statistics in Medicine 17, 2635, method 10). Raises ValueError without samples."""
    x, y = a.cpu(), b.cpu()
    p, q = rate(x), rate(y)
    both, one, other, none = (float(part.sum()) for part in (x & y, x & ~y, ~x & y, ~x & ~y))
    margins = (both + one) * (other + none) * (both + other) * (one + none)
    agree = both * none - one * other
    agree = (
        max(0.0, agree - len(x) / 2) if agree > 0 else agree
    )  # his correction, without which full agreement has no width
    phi = agree / margins**0.5 if margins else 0.0

    def reach(up: float, down: float) -> float:
        return max(0.0, up**2 - 2 * phi * up * down + down**2) ** 0.5

    above = p.value - q.value
    low = above - reach(p.value - p.low, q.high - q.value)
    high = above + reach(p.high - p.value, q.value - q.low)
    return Estimate(above, low, high, len(x))


def paired(a: Tensor, b: Tensor, resamples: int = 1000, seed: int = 0) -> Estimate:
    """Mean of a - b over samples that share prompt and seed (n,), which is far sharper than two intervals side by side."""
    if a.shape != b.shape:
        raise ValueError(
            f"{tuple(a.shape)} and {tuple(b.shape)} samples cannot be paired; give both for the same seeds."
        )
    return bootstrap(a.cpu().double() - b.cpu().double(), resamples=resamples, seed=seed)
