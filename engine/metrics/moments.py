"""Streaming mean and covariance in float64, mergeable exactly; called by frechet.py and evaluation.

A part holds (count, mean, scatter) with scatter = sum of (x - mean)(x - mean)^T. Two parts merge by
Chan, Golub and LeVeque (1979): with delta = mean_b - mean_a and n = n_a + n_b,

    mean = mean_a + delta n_b / n,    scatter = scatter_a + scatter_b + delta delta^T n_a n_b / n.

So shards, ranks and groups can be measured apart and put together in any order.
"""

from dataclasses import dataclass

import torch

from etude.kernels import moments


@dataclass(frozen=True)
class Moments:
    """Count, mean (D,) float64 and scatter (D, D) float64 of rows of features."""

    count: int
    mean: torch.Tensor
    scatter: torch.Tensor

    @classmethod
    def empty(cls, dim: int, device: torch.device | str = "cpu") -> "Moments":
        """The moments of no rows; the neutral element of `merge`."""
        zero = torch.zeros(dim, dtype=torch.float64, device=device)
        return cls(0, zero, torch.zeros(dim, dim, dtype=torch.float64, device=device))

    @classmethod
    def of(cls, features: torch.Tensor, block: int = 8192) -> "Moments":
        """Moments of features (N, D) of any float type, read `block` rows at a time."""
        total = cls.empty(features.shape[1], features.device)
        for rows in features.split(block):
            total = total.merge(cls(len(rows), *moments(rows)))
        return total

    def merge(self, other: "Moments") -> "Moments":
        """The moments of both parts' rows together."""
        if not self.count or not other.count:
            return other if not self.count else self
        count = self.count + other.count
        delta = other.mean - self.mean
        weight = self.count * other.count / count
        return Moments(
            count,
            self.mean + delta * (other.count / count),
            self.scatter + other.scatter + torch.outer(delta, delta) * weight,
        )

    def without(self, other: "Moments") -> "Moments":
        """The moments of what is left when rows that are part of these go; undoes `merge`."""
        count = self.count - other.count
        if count < 1:
            raise ValueError(f"{other.count} of {self.count} rows cannot go: none would be left")
        mean = self.mean - (other.mean - self.mean) * (other.count / count)
        delta = other.mean - mean
        weight = count * other.count / self.count
        scatter = self.scatter - other.scatter - torch.outer(delta, delta) * weight
        return Moments(count, mean, scatter)

    def covariance(self) -> torch.Tensor:
        """The unbiased covariance (D, D) float64; needs at least two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows, got {self.count}")
        return self.scatter / (self.count - 1)
