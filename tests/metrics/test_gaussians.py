"""The root of the covariances' product: its certificate, its fallbacks, batches and subsets."""

import numpy as np
import pytest
import torch

from etude.metrics import gaussians
from etude.metrics.frechet import FrechetReference, distances_of_subsets, frechet_distance
from etude.metrics.gaussians import Gaussian, trace_root
from etude.metrics.moments import Moments
from etude.metrics.registry import METRICS, Pair


def rows(count: int, dim: int, seed: int, decay: float = 0.5) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    mix = np.linalg.qr(rng.normal(size=(dim, dim)))[0] * np.arange(1, dim + 1) ** -decay
    return torch.from_numpy(rng.normal(size=(count, dim)) @ mix + 0.1 * seed)


def exact(first: torch.Tensor, second: torch.Tensor) -> float:
    """The nuclear norm of the centred rows' products, by numpy."""
    x, y = (side.numpy() - side.numpy().mean(0) for side in (first, second))
    values = np.linalg.svd(x @ y.T, compute_uv=False)
    return float(values.sum() / ((len(x) - 1) * (len(y) - 1)) ** 0.5)


@pytest.mark.parametrize("counts", [(700, 800), (40, 55), (30, 700), (700, 30), (65, 64)])
def test_every_route_gives_the_nuclear_norm_within_its_stated_error(counts) -> None:
    x, y = (rows(count, 64, seed) for seed, count in enumerate(counts))
    root = trace_root(Gaussian(x), Gaussian(y))
    assert root.residual < 1e-12 and root.route == "eigenvalues"
    assert abs(root.value - exact(x, y)) <= max(root.error, 1e-14)
    assert root.value == pytest.approx(exact(x, y), rel=1e-9)


def test_several_blocks_of_columns_are_one_product() -> None:
    x, y = rows(900, 600, 0), rows(700, 600, 1)
    root = trace_root(Gaussian(Moments.of(x)), Gaussian(Moments.of(y)))
    assert root.value == pytest.approx(exact(x, y), rel=1e-10)


def test_spectra_beyond_the_root_of_float64_go_to_singular_values() -> None:
    x, y = rows(300, 48, 2, decay=6.0), rows(300, 48, 3, decay=6.0)
    root = trace_root(Gaussian(x), Gaussian(y))
    assert root.route == "singular values"
    assert root.value == pytest.approx(exact(x, y), rel=1e-12)


def test_a_wrong_factor_is_seen_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = rows(300, 24, 4), rows(300, 24, 5)
    right = torch.linalg.cholesky_ex

    def wrong(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        factor, failed = right(matrix)
        factor[7, 3] += 1e-6
        return factor, failed

    monkeypatch.setattr(torch.linalg, "cholesky_ex", wrong)
    one = Gaussian(x)
    assert one.cholesky is None
    assert trace_root(one, Gaussian(y)).value == pytest.approx(exact(x, y), rel=1e-8)


def test_wrong_eigenvalues_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = rows(300, 24, 4), rows(300, 24, 5)
    right = torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda matrix: right(matrix) * (1 + 1e-7))
    assert trace_root(Gaussian(x), Gaussian(y)).route == "singular values"
    monkeypatch.setattr(torch.linalg, "svdvals", lambda matrix: torch.ones(24).double())
    with pytest.raises(ArithmeticError, match="broken"):
        trace_root(Gaussian(x), Gaussian(y))


def test_features_that_are_not_finite_are_refused() -> None:
    x = rows(50, 8, 6)
    x[3, 2] = torch.inf
    with pytest.raises(ValueError, match="finite"):
        frechet_distance(x, rows(50, 8, 7))


def test_a_reference_gives_each_checkpoint_its_distance() -> None:
    real = rows(200, 16, 8)
    others = [rows(150, 16, 9), rows(12, 16, 10), Moments.of(rows(90, 16, 11))]
    reference = FrechetReference(real)
    with pytest.warns(UserWarning, match="12 pictures in 16"):
        found = [reference.distance(other) for other in others]
    for value, other in zip(found, others, strict=True):
        # From the other side, so by another factor.
        expected = frechet_distance(other, Moments.of(real), warn=False)
        assert value == pytest.approx(expected, rel=1e-9)


# Few dimensions at once; few rows by their products; many rows one by one, either way of dropping.
@pytest.mark.parametrize(
    ("dim", "count", "share"), [(6, 80, 0.5), (60, 50, 0.6), (70, 120, 0.9), (70, 190, 0.45)]
)
def test_subsets_have_the_distance_of_their_rows(dim: int, count: int, share: float) -> None:
    x, y = rows(count, dim, 12), rows(count + 5, dim, 13)
    rng = np.random.default_rng(14)
    keep = []
    for side in (x, y):
        order = np.argsort(rng.random((4, len(side))), axis=1)
        keep.append(torch.from_numpy(order < round(share * len(side))))
    found = distances_of_subsets(x, y, *keep)
    for value, one, two in zip(found, *keep, strict=True):
        expected = frechet_distance(x[one], y[two], warn=False)
        assert value == pytest.approx(expected, rel=1e-8)


def test_the_registered_metric_is_named_by_its_features() -> None:
    x, y = rows(60, 5, 15), rows(70, 5, 16)
    names = {"inception": "FID", "inception/spatial": "sFID", "dinov2": None}
    for features, name in names.items():
        pair = Pair(x, y, features)
        values = METRICS.get("frechet").values(pair, 1.0, *pair.everything())
        ((found, value),) = values.items()
        assert found == (name or "Fréchet distance (dinov2 features)")
        assert value[0] == pytest.approx(frechet_distance(x, y), rel=1e-12)


def test_the_signs_are_signs() -> None:
    found = gaussians.signs(1000, torch.zeros(0))
    assert set(found.tolist()) == {-1.0, 1.0} and abs(float(found.mean())) < 0.15
