"""Run by test_knn_triton.py with TRITON_INTERPRET=1: against all distances in float64."""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_knn import exact, ordered, rows

from etude import kernels
from etude.kernels import knn_triton

# Tiles small enough for the interpreter and several of them, the last ones short.
SMALL = knn_triton.LaunchConfig(16, 64, 16, 4)


class Small(knn_triton.LaunchConfig):
    def __new__(cls) -> knn_triton.LaunchConfig:
        return SMALL

    @classmethod
    def counting(cls) -> knn_triton.LaunchConfig:
        return SMALL


def main() -> None:
    knn_triton.LaunchConfig = Small
    x, y = rows(19, 33, 0), rows(70, 33, 1)
    x[2] = y[35]
    distances = exact(x, y)
    want = ordered(distances, 5)
    distance, index = kernels.nearest_neighbours(x, y, k=5)
    again = kernels.nearest_neighbours(x, y, k=5)
    # Radii a thousandth beyond a distance: far from every distance by float32's measure.
    radii = distances.sort(0).values[9] * 1.001
    radii[3] = -radii[3]
    inside = distances < radii
    per_query, per_reference = kernels.membership_counts(x, y, radii)
    row = {
        "distances": torch.equal(distance, want[0]) and float(distance[2, 0]) == 0.0,
        "rows": torch.equal(index, want[1]),
        "repeats": torch.equal(distance, again[0]) and torch.equal(index, again[1]),
        "per query": torch.equal(per_query, inside.sum(1)),
        "per reference": torch.equal(per_reference, inside.sum(0)),
    }
    x = rows(17, 5, 2)
    want = ordered(exact(x, x).fill_diagonal_(torch.inf), 16)
    distance, index = kernels.nearest_neighbours(x, k=16)
    row["all others"] = torch.equal(distance, want[0]) and torch.equal(index, want[1])
    print(json.dumps(row))


main()
