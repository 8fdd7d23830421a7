"""Is a generator copying? Distances to the nearest training picture; called by evaluation/.

Each generated picture's distance to its nearest training picture is set against the distances of
training pictures to their nearest other training picture. A median below their 5% quantile says
that generated pictures sit closer to training pictures than these do to each other: copies.

A training picture that is there twice counts once among these distances: its own would be 0, and
one such picture in twenty would make the quantile 0, below which nothing lies.
"""

from dataclasses import dataclass

import torch

from etude.core.errors import UserError
from etude.kernels import nearest_neighbours

from .checked import check_features
from .prdc import own_neighbours


@dataclass(frozen=True)
class NearestPictures:
    """Distances (M,) float32 and rows (M,) int64 of the nearest training pictures, with figures."""

    distance: torch.Tensor
    row: torch.Tensor
    train_distance: torch.Tensor  # of distinct training pictures to their nearest other one
    duplicates: int  # training pictures that equal an earlier one

    def figures(self, quantile: float = 0.05) -> dict[str, float]:
        """Median nearest distance, the train-train quantile, the share of pictures below it, and
        how many training pictures are duplicates.
        """
        limit = float(torch.quantile(self.train_distance.double(), quantile))
        below = (self.distance < limit) | (self.distance == 0)
        return {
            "median nearest distance": float(torch.quantile(self.distance.double(), 0.5)),
            "train-train quantile": limit,
            "share below the quantile": float(below.double().mean()),
            "training duplicates": self.duplicates,
        }

    def gallery(self, count: int) -> list[tuple[int, int, float]]:
        """(generated row, training row, distance) of the `count` closest pairs, closest first."""
        order = self.distance.argsort(stable=True)[:count]
        return [(int(i), int(self.row[i]), float(self.distance[i])) for i in order]


def nearest_pictures(generated: torch.Tensor, train: torch.Tensor) -> NearestPictures:
    """Nearest training pictures of features (M, D) among (N, D); of equals, the first."""
    check_features(generated=generated, training=train)
    if len(train) < 2:
        raise UserError("training features need 2 rows, got 1: one has no other to be near to")
    distance, row = nearest_neighbours(generated, train)
    return NearestPictures(distance[:, 0], row[:, 0], *_among_distinct(train))


def _among_distinct(train: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Distances of distinct rows to their nearest other one, and how many rows are left out."""
    own = own_neighbours(train, 1).distance[:, 0]
    alone = own > 0
    if bool(alone.all()):
        return own, 0
    twice = torch.unique(train[~alone], dim=0)
    distinct = torch.cat([train[alone], twice])
    if len(distinct) < 2:
        raise UserError("the training features are all equal; give pictures that differ")
    # The nearest distinct row of each is itself.
    others = nearest_neighbours(twice, distinct, k=2)[0][:, 1]
    return torch.cat([own[alone], others]), len(train) - len(distinct)


def label_agreement(
    predicted: torch.Tensor, asked: torch.Tensor, num_classes: int
) -> tuple[float, list[float]]:
    """Share of pictures labelled as asked, overall and per class (NaN where none was asked)."""
    hit = (predicted == asked).double()
    per_class = [float(hit[asked == label].mean()) for label in range(num_classes)]
    return float(hit.mean()), per_class
