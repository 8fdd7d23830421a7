"""Metrics against other people's: scipy and scikit-learn here, six libraries by metrics.npz."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from etude.metrics.frechet import frechet_distance
from etude.metrics.inception_score import inception_score
from etude.metrics.kid import kid, kid_of_parts
from etude.metrics.prdc import prdc
from etude.metrics.vendi import vendi_score


def load_script():
    place = Path(__file__).parent / "make_metrics.py"
    spec = importlib.util.spec_from_file_location("make_metrics", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


made = load_script()
FRECHET = ("torch-fidelity", "pytorch-fid", "clean-fid", "torchmetrics")


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


@pytest.fixture(scope="module")
def theirs() -> dict[str, np.ndarray]:
    with np.load(made.FILE) as file:
        found = dict(file)
    assert str(found["fingerprint"]) == str(made.fingerprint()), "other features than they had"
    return found


def sides(size: str) -> list[torch.Tensor]:
    return [torch.from_numpy(made.features(size, side)) for side in (0, 1)]


@pytest.mark.parametrize("library", FRECHET)
def test_frechet_is_theirs_where_rows_are_many(theirs: dict, library: str) -> None:
    expected = float(theirs[f"many frechet {library}"])
    assert frechet_distance(*sides("many")) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("library", FRECHET)
def test_frechet_is_theirs_where_covariances_are_singular(theirs: dict, library: str) -> None:
    # Their square roots of a singular product are good to the root of float64's precision.
    expected = float(theirs[f"few frechet {library}"])
    assert frechet_distance(*sides("few"), warn=False) == pytest.approx(expected, rel=1e-6)


def test_kid_is_theirs_on_the_same_rows(theirs: dict) -> None:
    rows = [torch.from_numpy(theirs[f"kernel rows {side}"]) for side in (0, 1)]
    found = kid_of_parts(*sides("many"), *rows)
    np.testing.assert_allclose(found, theirs["kernel torchmetrics"], rtol=1e-10)
    assert float(found.mean()) == pytest.approx(float(theirs["kernel torch-fidelity"]), rel=1e-10)
    rows = [torch.from_numpy(theirs[f"kernel clean rows {side}"]) for side in (0, 1)]
    found = kid_of_parts(*sides("many"), *rows).mean()
    assert float(found) == pytest.approx(float(theirs["kernel clean-fid"]), rel=1e-10)


@pytest.mark.parametrize("size", made.ROWS)
def test_neighbourhoods_are_theirs_in_both_conventions(theirs: dict, size: str) -> None:
    real, generated = sides(size)
    # The count of each figure: a picture for three, a pair for density.
    per = np.array([len(generated), len(real), made.K * len(generated), len(real)])
    names = ("precision", "recall", "density", "coverage")
    found = prdc(real, generated, made.K)
    ours = np.array([found[name] for name in names])
    assert np.abs((ours - theirs[f"{size} neighbours prdc"]) * per).max() < 0.5
    closed = prdc(real, generated, 3, "torch-fidelity")
    ours = np.array([closed[name] for name in names[:2]])
    assert np.abs((ours - theirs[f"{size} neighbours torch-fidelity"]) * per[:2]).max() < 0.5


@pytest.mark.parametrize("size", made.ROWS)
def test_vendi_is_theirs_at_every_order(theirs: dict, size: str) -> None:
    x = sides(size)[0]
    ours = np.array([vendi_score(x, q) for q in made.ORDERS])
    np.testing.assert_allclose(ours[1:], theirs[f"{size} vendi gram"][1:], rtol=1e-9)
    # Below one the rounding of eigenvalues that are zero counts in theirs, by either matrix.
    smaller = "dual" if size == "many" else "gram"
    assert ours[0] == pytest.approx(theirs[f"{size} vendi {smaller}"][0], rel=1e-6)


def test_the_inception_score_is_theirs(theirs: dict) -> None:
    found = inception_score(torch.from_numpy(made.logits()), made.SPLITS, mixed=False)
    assert found == pytest.approx(float(theirs["many inception score"]), rel=1e-12)
