"""2-Wasserstein distance between two sets of features: as Gaussians, and exactly by optimal transport.

    W2^2 = |mu_1 - mu_2|^2 + Tr(S_1 + S_2 - 2 (S_1^1/2 S_2 S_1^1/2)^1/2)        Gaussians

(Dowson and Landau, 1982; as a metric of overfitting, Infusion, arXiv 2404.14007.) Learning a subject must move the mean;
lost diversity shows in the covariance term, so the two are reported apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import ot
import torch
from torch import Tensor

from infusion.metrics.moments import Moments


@dataclass(frozen=True)
class GaussianW2:
    """W2^2 between two Gaussians, in squared units of the features: `mean` + `covariance`."""

    mean: float
    covariance: float

    @property
    def squared(self) -> float:
        """W2^2."""
        return self.mean + self.covariance


def gaussian_w2(a: Moments, b: Moments) -> GaussianW2:
    """Closed form from mean and covariance, in float64. Raises ValueError for other widths or fewer than two samples."""
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"Features have {len(a.mean)} and {len(b.mean)} dimensions; both sets need the same space.")
    s1, s2 = a.covariance(), b.covariance()
    root = _square_root(s1)
    inner = torch.linalg.eigvalsh(root @ s2 @ root).clamp_min(0).sqrt().sum()
    covariance = float(s1.trace() + s2.trace() - 2 * inner)
    return GaussianW2(float((a.mean - b.mean).square().sum()), max(0.0, covariance))


def empirical_w2(a: Tensor, b: Tensor) -> float:
    """W2^2 between the two point sets (n, d) and (m, d) by exact optimal transport (POT's network simplex).

    It shrinks with n towards the truth: compare only at equal n. Raises ValueError for other widths or an empty set.
    """
    if a.shape[1:] != b.shape[1:] or not len(a) or not len(b):
        raise ValueError(
            f"Sets of shape {tuple(a.shape)} and {tuple(b.shape)} cannot be compared; give (n, d) and (m, d)."
        )
    cost = torch.cdist(a.cpu().double(), b.cpu().double()).square().numpy()
    return float(ot.emd2(ot.unif(len(a)), ot.unif(len(b)), cost, numItermax=1_000_000))


def principal(*sets: Tensor, dimensions: int = 64) -> tuple[Tensor, ...]:
    """All sets (n_i, d) in the first principal components of their union; for sets not much larger than their dimension.

    The union's, since axes of one set alone would hide what the others add and overstate its own spread. Give sets of
    equal size. Keeps at most one component less than there are samples, as there are no more.
    """
    union = torch.cat([x.cpu().double() for x in sets])
    centre = union.mean(0)
    _, _, axes = torch.linalg.svd(union - centre, full_matrices=False)
    axes = axes[: min(dimensions, len(union) - 1)]
    return tuple((x.cpu().double() - centre) @ axes.T for x in sets)


def _square_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
