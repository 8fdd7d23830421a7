"""Is a generator copying? Distances to the nearest training picture; called by evaluation/.

Each generated picture's distance to its nearest training picture is set against the distances of
training pictures to their nearest other training picture. A median below their 5% quantile says
that generated pictures sit closer to training pictures than these do to each other: copies.
"""

from dataclasses import dataclass

import torch

from etude.kernels import nearest_neighbours

from .checked import check_features
from .prdc import own_neighbours


@dataclass(frozen=True)
class NearestPictures:
    """Distances (M,) float32 and rows (M,) int64 of the nearest training pictures, with figures."""

    distance: torch.Tensor
    row: torch.Tensor
    train_distance: torch.Tensor  # (N,) of training pictures to their nearest other one

    def figures(self, quantile: float = 0.05) -> dict[str, float]:
        """Median nearest distance, the train-train quantile, and the share of pictures below it."""
        limit = float(torch.quantile(self.train_distance.double(), quantile))
        return {
            "median nearest distance": float(self.distance.double().median()),
            "train-train quantile": limit,
            "share below the quantile": float((self.distance < limit).double().mean()),
        }

    def gallery(self, count: int) -> list[tuple[int, int, float]]:
        """(generated row, training row, distance) of the `count` closest pairs, closest first."""
        order = self.distance.argsort(stable=True)[:count]
        return [(int(i), int(self.row[i]), float(self.distance[i])) for i in order]


def nearest_pictures(generated: torch.Tensor, train: torch.Tensor) -> NearestPictures:
    """Nearest training pictures of features (M, D) among (N, D); of equals, the first."""
    check_features(generated=generated, training=train)
    distance, row = nearest_neighbours(generated, train)
    return NearestPictures(distance[:, 0], row[:, 0], own_neighbours(train, 1).distance[:, 0])


def label_agreement(
    predicted: torch.Tensor, asked: torch.Tensor, num_classes: int
) -> tuple[float, list[float]]:
    """Share of pictures labelled as asked, overall and per class (NaN where none was asked)."""
    hit = (predicted == asked).double()
    per_class = [float(hit[asked == label].mean()) for label in range(num_classes)]
    return float(hit.mean()), per_class
