"""Mean and covariance of features that stream by: 10,000 pictures need no more memory than 100."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Running mean and covariance of features of one width, in float64 (Chan, Golub and LeVeque, 1979)."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self._scatter = torch.zeros(width, width, dtype=torch.float64)

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """The moments of one set (n, d)."""
        moments = cls(features.shape[1])
        moments.add(features)
        return moments

    def add(self, features: Tensor) -> None:
        """Take in a batch (n, d). Raises ValueError for another width."""
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"Features are of shape {tuple(features.shape)}; they must be (n, {len(self.mean)}).")
        if not len(features):
            return
        x = features.detach().cpu().double()
        n, m = self.count, len(x)
        delta = x.mean(0) - self.mean
        centred = x - x.mean(0)
        self._scatter += centred.T @ centred + torch.outer(delta, delta) * (n * m / (n + m))
        self.mean = self.mean + delta * (m / (n + m))
        self.count = n + m

    def covariance(self) -> Tensor:
        """The unbiased covariance (d, d). Raises ValueError for fewer than two samples."""
        if self.count < 2:
            raise ValueError(f"A covariance needs at least 2 samples; there is {self.count}.")
        return self._scatter / (self.count - 1)
