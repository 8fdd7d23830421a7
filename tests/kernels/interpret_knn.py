"""Run by test_knn_triton.py with TRITON_INTERPRET=1: against all distances in float64."""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_knn import exact, ordered, rows

from etude import kernels


def main() -> None:
    for n, m, width, k in ((70, 90, 33, 5), (3, 130, 5, 20), (1, 2, 1, 1)):
        x, y = rows(n, width, 0), rows(m, width, 1)
        if n > 2:
            x[2] = y[m // 2]
        distances = exact(x, y)
        want = ordered(distances, k)
        distance, index = kernels.nearest_neighbours(x, y, k=k)
        again = kernels.nearest_neighbours(x, y, k=k)
        row = {"case": [n, m, width, k], "own": False}
        row["distances"] = torch.equal(distance, want[0])
        row["rows"] = torch.equal(index, want[1])
        row["repeats"] = torch.equal(distance, again[0]) and torch.equal(index, again[1])
        # Radii between two distances, far from either by float32's measure.
        sorted_columns = distances.sort(0).values
        radii = sorted_columns[n // 2] * 1.001
        inside = distances < radii
        per_query, per_reference = kernels.membership_counts(x, y, radii)
        row["counts"] = torch.equal(per_query, inside.sum(1))
        row["counts"] &= torch.equal(per_reference, inside.sum(0))
        print(json.dumps(row))
    x = rows(67, 20, 2)
    want = ordered(exact(x, x).fill_diagonal_(torch.inf), 4)
    distance, index = kernels.nearest_neighbours(x, k=4)
    row = {"case": [67, 67, 20, 4], "own": True, "distances": torch.equal(distance, want[0])}
    row["rows"] = torch.equal(index, want[1])
    row["repeats"] = row["counts"] = float(distance[3, 0]) == 0.0 and int(index[3, 0]) == 11
    print(json.dumps(row))


main()
