"""Writes metrics.npz: what other libraries make of stated features.

    python tests/peers/make_metrics.py

needs torch 2.13.0, numpy, scipy, scikit-learn, and without their dependencies torch-fidelity 0.4.0,
clean-fid 0.1.35, pytorch-fid 0.3.0, torchmetrics 1.9.0, prdc 0.2, vendi-score 0.0.3 and torchvision
0.28.0 (whose compiled operators do not fit a torch without CUDA; their schemas are enough here).
`test_metrics.py` compares with the file and needs none of them; the features that both sides start
from are drawn here, by name.
"""

import hashlib
import zlib
from pathlib import Path

import numpy as np

FILE = Path(__file__).parent / "metrics.npz"
DIM, K, SEED = 32, 5, 7
# "many" has more than four rows per dimension, "few" has fewer rows than dimensions.
ROWS = {"many": (200, 230), "few": (24, 20)}
PARTS, PART_SIZE, SPLITS = 6, 80, 4
ORDERS = (0.5, 1.0, 2.0, np.inf)


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers (float64) that follow from the name."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)


def features(size: str, side: int) -> np.ndarray:
    """Correlated features (N, DIM) float64, made entry by entry so that they are equal anywhere."""
    x = drawn(f"{size} {side}", (ROWS[size][side], DIM)) / np.arange(1, DIM + 1) ** 0.5
    return x + 0.6 * np.roll(x, 1, axis=1) - 0.3 * np.roll(x, 5, axis=1) + 0.05 * side


def logits() -> np.ndarray:
    """Logits (N, 10) of pictures whose class is clear for some and not for others."""
    return 3.0 * drawn("logits", (103, 10)) * (1 + np.arange(103) % 5)[:, None] / 3


def fingerprint() -> np.ndarray:
    """Tells whether both sides start from the same bits."""
    parts = [features(size, side).tobytes() for size in ROWS for side in (0, 1)]
    digest = hashlib.sha256(b"".join([*parts, logits().tobytes()])).hexdigest()
    return np.array(digest)


def parts_of(generator: np.random.RandomState, counts: tuple[int, int]) -> list[np.ndarray]:
    """Rows (PARTS, PART_SIZE) of each side in the order in which two libraries draw them."""
    rows = [
        [generator.choice(count, PART_SIZE, replace=False) for count in counts]
        for _ in range(PARTS)
    ]
    return [np.array([pair[side] for pair in rows]) for side in (0, 1)]


def import_peers() -> None:
    """torchvision's Python, where its compiled operators do not fit this torch."""
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import_peers.kept = library


def frechet(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    import torch
    from cleanfid.fid import fid_from_feats
    from pytorch_fid.fid_score import calculate_frechet_distance
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torchmetrics.image.fid import _compute_fid

    def moments(side: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return side.mean(0), np.cov(side, rowvar=False)

    sides = [fid_features_to_statistics(torch.from_numpy(side)) for side in (x, y)]
    one, two = ([torch.from_numpy(part) for part in moments(side)] for side in (x, y))
    return {
        "torch-fidelity": fid_statistics_to_metric(*sides, False)["frechet_inception_distance"],
        "pytorch-fid": calculate_frechet_distance(*moments(x), *moments(y)),
        "clean-fid": fid_from_feats(x, y),
        "torchmetrics": float(_compute_fid(*one, *two)),
    }


def kernel(x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray | float]:
    import torch
    from cleanfid.fid import kernel_distance
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torchmetrics.image.kid import poly_mmd

    one, two = torch.from_numpy(x), torch.from_numpy(y)
    rows = parts_of(np.random.RandomState(SEED), (len(x), len(y)))
    found = kid_features_to_metric(
        one, two, kid_subsets=PARTS, kid_subset_size=PART_SIZE, rng_seed=SEED, verbose=False
    )
    np.random.seed(SEED)  # clean-fid draws from here, the second side first
    clean = kernel_distance(x, y, num_subsets=PARTS, max_subset_size=PART_SIZE)
    second, first = parts_of(np.random.RandomState(SEED), (len(y), len(x)))
    each = [float(poly_mmd(one[a], two[b])) for a, b in zip(*rows, strict=True)]
    return {
        "rows 0": rows[0], "rows 1": rows[1], "clean rows 0": first, "clean rows 1": second,
        "torch-fidelity": found["kernel_inception_distance_mean"], "clean-fid": clean,
        "torchmetrics": np.array(each),
    }  # fmt: skip


def neighbours(x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    import torch
    from prdc import compute_prdc
    from torch_fidelity.metric_prc import prc_features_to_metric

    plain = compute_prdc(x, y, K)
    sides = torch.from_numpy(y), torch.from_numpy(x)  # it takes the generated side first
    closed = prc_features_to_metric(*sides, prc_neighborhood=3, verbose=False)
    return {
        "prdc": np.array([plain[name] for name in ("precision", "recall", "density", "coverage")]),
        "torch-fidelity": np.array([closed["precision"], closed["recall"]]),
    }


def alone(x: np.ndarray) -> dict[str, np.ndarray | float]:
    import torch
    from sklearn.preprocessing import normalize
    from torch_fidelity.metric_isc import isc_features_to_metric
    from vendi_score import vendi

    unit = normalize(x, axis=1)
    orders = ["inf" if np.isinf(q) else q for q in ORDERS]
    given = isc_features_to_metric(torch.from_numpy(logits()), SPLITS, shuffle=False)
    return {
        "vendi gram": np.array([vendi.score_K(unit @ unit.T, q=q) for q in orders]),
        "vendi dual": np.array([vendi.score_dual(x, q=q) for q in orders]),
        "inception score": given["inception_score_mean"],
    }


def main() -> None:
    import_peers()
    found: dict[str, np.ndarray | float] = {"fingerprint": fingerprint()}
    for size in ROWS:
        x, y = features(size, 0), features(size, 1)
        found |= {f"{size} frechet {name}": value for name, value in frechet(x, y).items()}
        found |= {f"{size} {name}": value for name, value in alone(x).items()}
        found |= {f"{size} neighbours {name}": v for name, v in neighbours(x, y).items()}
    found |= {
        f"kernel {name}": v
        for name, v in kernel(x=features("many", 0), y=features("many", 1)).items()
    }
    np.savez_compressed(FILE, **found)
    print(f"{FILE}: {FILE.stat().st_size:,} bytes, {len(found)} arrays")


if __name__ == "__main__":
    main()
