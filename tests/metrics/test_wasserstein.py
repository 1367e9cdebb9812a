"""W2 against closed forms, POT and torchmetrics' Frechet distance."""

from __future__ import annotations

import ot
import pytest
import torch
from torchmetrics.image.fid import _compute_fid

from infusion.metrics.moments import Moments
from infusion.metrics.wasserstein import empirical_w2, gaussian_w2, principal


def features(n: int, d: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return scale * torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix + shift


def test_moments_of_a_stream_are_those_of_the_whole():
    x = features(97, 5, 0, shift=1000.0)  # a large mean, where a naive sum of squares loses digits
    stream = Moments(5)
    for part in x.split([1, 0, 40, 56]):
        stream.add(part)
    assert torch.allclose(stream.mean, x.mean(0), rtol=1e-12)
    assert torch.allclose(stream.covariance(), torch.cov(x.T), rtol=1e-9)
    assert stream.count == 97
    with pytest.raises(ValueError, match=r"must be \(n, 5\)"):
        stream.add(x[:, :3])
    with pytest.raises(ValueError, match="at least 2 samples"):
        Moments.of(x[:1]).covariance()


def test_gaussians_of_known_parameters():
    class Known(Moments):
        def __init__(self, mean: list[float], covariance: list[list[float]]) -> None:
            super().__init__(len(mean))
            self.mean, self._known = torch.tensor(mean, dtype=torch.float64), torch.tensor(covariance).double()

        def covariance(self) -> torch.Tensor:
            return self._known

    # commuting covariances: Tr (S1^1/2 - S2^1/2)^2
    w = gaussian_w2(Known([0, 0], [[4, 0], [0, 9]]), Known([3, 4], [[1, 0], [0, 1]]))
    assert w.mean == pytest.approx(25)
    assert w.covariance == pytest.approx((2 - 1) ** 2 + (3 - 1) ** 2)
    assert w.squared == pytest.approx(30)
    # one dimension: (s1 - s2)^2
    assert gaussian_w2(Known([1], [[0.25]]), Known([1], [[4]])).squared == pytest.approx(1.5**2)


def test_gaussian_form_equals_torchmetrics_and_pot():
    a, b = features(80, 7, 1), features(60, 7, 2, scale=0.5, shift=0.3)
    ours = gaussian_w2(Moments.of(a), Moments.of(b)).squared
    frechet = _compute_fid(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T))
    assert ours == pytest.approx(float(frechet), rel=1e-8)
    bures = ot.gaussian.bures_wasserstein_distance(a.mean(0), b.mean(0), torch.cov(a.T), torch.cov(b.T))
    assert ours == pytest.approx(float(bures) ** 2, rel=1e-6)
    assert gaussian_w2(Moments.of(a), Moments.of(a)).squared == pytest.approx(0, abs=1e-9)


def test_a_singular_covariance_is_no_trouble():
    a, b = features(4, 9, 3), features(5, 9, 4)  # fewer samples than dimensions
    assert gaussian_w2(Moments.of(a), Moments.of(b)).covariance >= 0
    assert gaussian_w2(Moments.of(a), Moments.of(a + 2)).mean == pytest.approx(36)


def test_empirical_form():
    a, b = features(12, 3, 5), features(9, 3, 6)
    cost = ot.dist(a.numpy(), b.numpy())
    assert empirical_w2(a, b) == pytest.approx(ot.emd2([], [], cost), rel=1e-9)
    assert empirical_w2(a, a[torch.randperm(12)]) == pytest.approx(0, abs=1e-12)
    # one dimension, equal sizes: sorted against sorted
    x, y = a[:9, :1], b[:, :1]
    assert empirical_w2(x, y) == pytest.approx(float((x.sort(0).values - y.sort(0).values).square().mean()))
    shifted = a + torch.tensor([1.0, 2.0, 2.0])
    assert empirical_w2(a, shifted) == pytest.approx(9)


def test_principal_components_keep_distances_that_lie_in_them():
    a = features(40, 3, 7) @ torch.randn(3, 20, generator=torch.Generator().manual_seed(8)).double()
    b = a[:10] * 0.5
    small_a, small_b = principal(a, b, dimensions=3)
    assert small_a.shape == (40, 3)
    assert torch.allclose(torch.cdist(small_a, small_b), torch.cdist(a, b), atol=1e-6)
    assert principal(a[:4])[0].shape == (4, 3)


def test_principal_components_hide_nothing_that_one_set_alone_shows():
    a = features(100, 60, 9)
    away = torch.zeros(60, dtype=torch.float64)
    away[7] = 300.0  # where neither set varies as much
    small_a, small_b = principal(a, a + away, dimensions=8)
    assert float((small_b - small_a).mean(0).norm()) == pytest.approx(300, rel=0.01)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="3 and 4 dimensions"):
        gaussian_w2(Moments(3), Moments(4))
    with pytest.raises(ValueError, match=r"\(0, 3\)"):
        empirical_w2(torch.zeros(0, 3), torch.zeros(2, 3))
