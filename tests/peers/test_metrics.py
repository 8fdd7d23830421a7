"""Metrics against other people's: scipy's matrix square root, scikit-learn, torchmetrics."""

import numpy as np
import pytest
import torch

from etude.metrics.frechet import frechet_distance
from etude.metrics.kid import kid
from etude.metrics.prdc import prdc


def features(rows: int, dim: int, seed: int, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    spectrum = np.arange(1, dim + 1) ** -0.5
    return rng.normal(size=(rows, dim)) * spectrum @ rng.normal(size=(dim, dim)) + shift


@pytest.mark.parametrize(("rows", "tolerance"), [(400, 1e-8), (40, 1e-5)])
def test_frechet_is_the_square_root_formula(rows: int, tolerance: float) -> None:
    scipy_linalg = pytest.importorskip("scipy.linalg")
    x, y = features(rows, 64, 0), features(rows + 30, 64, 1, 0.1)
    one, two = np.cov(x.T), np.cov(y.T)
    root = scipy_linalg.sqrtm(one @ two)
    offset = x.mean(0) - y.mean(0)
    expected = offset @ offset + np.trace(one) + np.trace(two) - 2 * np.trace(root).real
    found = frechet_distance(torch.from_numpy(x), torch.from_numpy(y), warn=False)
    assert found == pytest.approx(expected, rel=tolerance)


def prdc_by_definition(real: np.ndarray, generated: np.ndarray, k: int) -> dict[str, float]:
    """Naeem et al. 2020, section 3, written over full distance matrices."""
    pairwise = pytest.importorskip("sklearn.metrics").pairwise_distances

    def radii(x: np.ndarray) -> np.ndarray:
        return np.sort(pairwise(x), axis=1)[:, k]  # column 0 is the point itself

    across = pairwise(real, generated)
    in_real, in_generated = across < radii(real)[:, None], across < radii(generated)[None, :]
    return {
        "precision": in_real.any(0).mean(),
        "recall": in_generated.any(1).mean(),
        "density": in_real.sum() / (k * len(generated)),
        "coverage": (across.min(1) < radii(real)).mean(),
    }


@pytest.mark.parametrize(("rows", "k"), [((300, 260), 5), ((120, 400), 3), ((50, 50), 1)])
def test_prdc_is_the_definition(rows: tuple[int, int], k: int) -> None:
    real, generated = features(rows[0], 16, 2), features(rows[1], 16, 3, 0.3)
    found = prdc(torch.from_numpy(real), torch.from_numpy(generated), k)
    assert found == pytest.approx(prdc_by_definition(real, generated, k), abs=1e-12)


def test_float32_features_give_the_same_neighbours() -> None:
    real, generated = (features(200, 32, seed).astype(np.float32) + 50 for seed in (4, 5))
    found = prdc(torch.from_numpy(real), torch.from_numpy(generated))
    exact = prdc_by_definition(real.astype(np.float64), generated.astype(np.float64), 5)
    assert found == pytest.approx(exact, abs=1e-12)


def test_kid_is_sklearns_polynomial_kernel() -> None:
    kernel = pytest.importorskip("sklearn.metrics.pairwise").polynomial_kernel
    x, y = features(80, 16, 6), features(90, 16, 7, 0.2)
    xx, yy, xy = (kernel(a, b, degree=3, coef0=1) for a, b in ((x, x), (y, y), (x, y)))
    n, m = len(x), len(y)
    expected = (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1))
    expected -= 2 * xy.mean()
    assert kid(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected, rel=1e-10)


def test_frechet_is_torchmetrics() -> None:
    module = pytest.importorskip("torchmetrics.image.fid", reason="torchmetrics is not installed")
    x, y = (torch.from_numpy(features(200, 12, seed)) for seed in (8, 9))
    network = torch.nn.Flatten()
    network.num_features = 12
    metric = module.FrechetInceptionDistance(
        feature=network, input_img_size=(1, 3, 4), normalize=True
    ).set_dtype(torch.float64)
    metric.update(x.reshape(-1, 1, 3, 4), real=True)
    metric.update(y.reshape(-1, 1, 3, 4), real=False)
    assert frechet_distance(x, y) == pytest.approx(float(metric.compute()), rel=1e-5)
