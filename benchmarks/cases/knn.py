"""Nearest neighbours and ball membership of features, beside scikit-learn's search."""

import torch
from torch import Tensor

from benchmarks.case import Case, Inputs, Run
from etude import kernels

SOURCES = (
    "kernels/knn.py",
    "kernels/knn_triton.py",
    "kernels/knn_cuda.py",
    "csrc/cpu/knn.cpp",
    "csrc/cuda/knn.cu",
)
CPU = {"2000 x 2048": (2000, 2048)}
GPU = {"50000 x 2048": (50_000, 2048)}
K = 5


def make(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Inputs:
    """Two sets with a decaying spectrum, radii near the 5th neighbour's distance."""
    rows, width = shape
    g = torch.Generator().manual_seed(0)
    scale = torch.linspace(1, 0.05, width)
    x, y = (torch.randn(rows, width, generator=g) * scale + 1 for _ in range(2))
    radii = torch.full((rows,), float((2 * scale.square().sum()).sqrt()) * 0.93)
    return {"x": x.to(device, dtype), "y": y.to(device, dtype), "radii": radii.to(device)}


def radii(inputs: Inputs) -> Tensor:
    return kernels.knn_radii(inputs["x"], K)


def counts(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return kernels.membership_counts(inputs["x"], inputs["y"], inputs["radii"].float())


def pairs(inputs: Inputs) -> tuple[Tensor, ...]:
    """The two lists, one after the other."""
    reach = inputs["radii"].float()
    one, two = kernels.neighbour_pairs(inputs["x"], inputs["y"], reach, reach)
    return *one, *two


def scikit_learn() -> Run:
    from sklearn.neighbors import NearestNeighbors

    def run(inputs: Inputs) -> Tensor:
        x = inputs["x"].cpu().float().numpy()
        found = NearestNeighbors(n_neighbors=K + 1, algorithm="brute").fit(x).kneighbors(x)[0]
        return torch.from_numpy(found[:, K])

    return run


def moved(inputs: Inputs) -> int:
    return sum(inputs[name].numel() * inputs[name].element_size() for name in ("x", "y"))


def flops(inputs: Inputs) -> int:
    """The inner products."""
    return 2 * len(inputs["x"]) * inputs["y"].numel()


CASES = (
    Case(
        "nearest_neighbours",
        "radii k=5",
        make,
        radii,
        CPU,
        GPU,
        lambda inputs: moved(inputs) // 2,
        flops,
        dtypes=("float32",),
        sources=SOURCES,
        rivals={"scikit-learn": scikit_learn},
        compiled=False,
    ),
    Case(
        "membership_counts",
        "k=5",
        make,
        counts,
        CPU,
        GPU,
        moved,
        flops,
        dtypes=("float32",),
        sources=SOURCES,
        compiled=False,
    ),
    Case(
        "neighbour_pairs",
        "radii of k=5",
        make,
        pairs,
        CPU,
        {},  # on a GPU it is the reference
        moved,
        flops,
        dtypes=("float32",),
        sources=SOURCES,
        compiled=False,
    ),
)
