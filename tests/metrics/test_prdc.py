"""PRDC: hand-made cases, subsets against a fresh computation, ties."""

import numpy as np
import pytest
import torch

import etude.metrics.hits as hits
import etude.metrics.prdc as module
from etude.kernels import backends, knn
from etude.metrics.prdc import Neighbourhoods, enough, prdc
from etude.metrics.registry import METRICS, Pair


def cloud(rows: int, dim: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(shift, 1.0, (rows, dim)))


def test_a_line_by_hand() -> None:
    # Reals at 0, 1, 3: nearest distances 1, 1, 2. Generated at 0.5, 0.6, 9: radii .1, .1, 8.4.
    real = torch.tensor([[0.0], [1.0], [3.0]])
    generated = torch.tensor([[0.5], [0.6], [9.0]])
    found = prdc(real, generated, k=1)
    # 0.5 and 0.6 lie in the balls of 0 and 1 (4 pairs); 3 is 2.4 from 0.6, outside its radius 2.
    assert found["precision"] == pytest.approx(2 / 3)
    assert found["density"] == pytest.approx(4 / 3)
    assert found["coverage"] == pytest.approx(2 / 3)
    # Only 9's ball (radius 8.4) reaches 1 and 3; the balls of the others are 0.1 wide.
    assert found["recall"] == pytest.approx(2 / 3)


def test_the_comparison_is_strict() -> None:
    real = torch.tensor([[0.0], [1.0], [10.0]])
    generated = torch.tensor([[-1.0], [19.0], [30.0]])  # two at exactly the radii of 0 and of 10
    assert prdc(real, generated, k=1)["precision"] == 0.0


def test_features_of_float32_and_float64_give_one_answer() -> None:
    real, generated = cloud(90, 6, 0).float(), cloud(70, 6, 1, 0.5).float()
    assert prdc(real, generated, 3) == prdc(real.double(), generated.double(), 3)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("share", [0.5, 0.8])
@pytest.mark.parametrize("crowded", [0.0, 1.0])  # counted and by levels, or by lists of pairs
@pytest.mark.parametrize("rows_at_once", [7, 2048])
def test_a_subset_equals_a_fresh_computation(
    share: float, ties: bool, crowded: float, rows_at_once: int, monkeypatch
) -> None:
    monkeypatch.setattr(module, "_ROWS", rows_at_once)
    monkeypatch.setattr(module, "_CELLS", rows_at_once * 150)
    real, generated = cloud(120, 4, 2).float(), cloud(150, 4, 3, 0.4).float()
    if ties:
        real, generated = (2 * real).round(), (2 * generated).round()
    rng = np.random.default_rng(4)
    for _ in range(5):
        kept = [
            torch.from_numpy(rng.permutation(rows)[: int(rows * share)]).sort().values
            for rows in (120, 150)
        ]
        masks = [torch.zeros(rows, dtype=torch.bool) for rows in (120, 150)]
        for mask, rows in zip(masks, kept, strict=True):
            mask[rows] = True
        monkeypatch.setattr(module, "_CROWDED", crowded)
        found = Neighbourhoods.of(real, generated, k=4, kept_share=share).values(*masks)
        monkeypatch.setattr(module, "_CROWDED", 1.0 - crowded)
        assert found == prdc(real[kept[0]], generated[kept[1]], k=4)


def test_a_set_that_collapsed_or_is_noise_is_crowded() -> None:
    real, generated = cloud(300, 64, 15), cloud(400, 64, 16)
    for scale, crowded in ((0.1, True), (1.0, False), (10.0, True)):
        assert Neighbourhoods.of(real, scale * generated, 5)._crowded == crowded


def test_the_same_distribution_has_coverage_near_its_expectation() -> None:
    # Naeem et al. 2020: E coverage = 1 - prod (N - i) / (M + N - i) = 1 - 1 / 2^k for N = M large.
    found = [prdc(cloud(400, 3, s), cloud(400, 3, 100 + s), k=3)["coverage"] for s in range(12)]
    assert np.mean(found) == pytest.approx(1 - 0.5**3, abs=0.02)


def test_copies_of_reals_are_as_far_as_reals_are() -> None:
    real = cloud(60, 5, 7)
    found = prdc(real, real.clone(), k=3)
    assert found["precision"] == found["recall"] == found["coverage"] == 1.0
    # Each ball holds its centre and, the comparison being strict, the k - 1 nearest others.
    assert found["density"] == pytest.approx(1.0)


@pytest.mark.parametrize("listed", [0.0, 1.0])  # middle levels by products, or looked up
@pytest.mark.parametrize("crowded", [0.0, 1.0])
def test_a_collapsed_model_is_counted_in_pieces(crowded: float, listed, monkeypatch) -> None:
    """All generated rows lie in most balls: N x M pairs, by hand from the distances."""
    monkeypatch.setattr(hits, "_LISTED", listed)
    real, generated = cloud(64, 8, 12), 0.01 * cloud(50, 8, 13)
    monkeypatch.setattr(module, "_CROWDED", crowded)
    for place, name, most in ((module, "_ROWS", 5), (module, "_CELLS", 300), (hits, "_MOST", 100)):
        monkeypatch.setattr(place, name, most)
    masks = [torch.from_numpy(np.random.default_rng(14).random((9, n)) < 0.8) for n in (64, 50)]
    found = Neighbourhoods.of(real, generated, 3, kept_share=0.8).values_of_subsets(*masks)
    for subset, (x, y) in enumerate(zip(*masks, strict=True)):
        across = torch.cdist(real[x], generated[y])
        radius = [torch.cdist(s, s).sort(1).values[:, 3] for s in (real[x], generated[y])]
        inside = across < radius[0][:, None]
        assert found["density"][subset] == pytest.approx(float(inside.sum()) / (3 * int(y.sum())))
        assert found["precision"][subset] == pytest.approx(float(inside.any(0).double().mean()))
        assert found["coverage"][subset] == pytest.approx(float(inside.any(1).double().mean()))
        beside = (across < radius[1]).any(1)
        assert found["recall"][subset] == pytest.approx(float(beside.double().mean()))


@pytest.mark.skipif(not backends.HAS_CPP, reason="the C++ kernels are not built")
def test_a_crowded_set_is_prepared_once_for_all_blocks(monkeypatch) -> None:
    """The second set was centred for every few rows: hours for 50,000 of a collapsed model."""
    real, generated = cloud(64, 8, 12).float(), 0.01 * cloud(50, 8, 13).float()
    centred = []
    around = knn._Screen._around
    monkeypatch.setattr(
        knn._Screen, "_around", staticmethod(lambda x, c: centred.append(len(x)) or around(x, c))
    )
    near = Neighbourhoods.of(real, generated, 3, kept_share=0.8)
    assert near._crowded
    monkeypatch.setattr(module, "_CELLS", 100)  # two real rows at a time
    masks = [torch.ones(2, count, dtype=torch.bool) for count in (64, 50)]
    masks[0][1, 0] = False
    centred.clear()
    near.values_of_subsets(*masks)
    assert centred.count(50) == 1 and centred.count(2) == 32


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="k=5"):
        prdc(cloud(5, 2, 0), cloud(50, 2, 1))


@pytest.mark.parametrize(("k", "share"), [(5, 0.5), (3, 0.8), (5, 0.3)])
def test_enough_neighbours_are_listed(k: int, share: float) -> None:
    from scipy.stats import binom

    assert binom.cdf(k - 1, enough(k, share, 10_000), share) < 1e-5
    assert enough(k, 1.0, 10_000) == k


def test_by_torch_fidelitys_convention_the_edge_is_inside() -> None:
    real = torch.tensor([[0.0], [1.0], [10.0]])
    generated = torch.tensor([[-1.0], [19.0], [30.0]])  # two at exactly the radii of 0 and of 10
    found = prdc(real, generated, 1, "torch-fidelity")
    assert found["precision"] == pytest.approx(2 / 3)
    # Radii of the generated are 20, 11 and 11, of which 20 reaches all from -1.
    assert found["recall"] == 1.0


def test_subsets_by_torch_fidelitys_convention(monkeypatch) -> None:
    real, generated = ((2 * cloud(80, 3, seed)).round() for seed in (8, 9))
    masks = [torch.arange(80) % 2 == side for side in (0, 1)]
    expected = prdc(real[masks[0]], generated[masks[1]], 3, "torch-fidelity")
    for crowded in (0.0, 1.0):
        monkeypatch.setattr(module, "_CROWDED", crowded)
        near = Neighbourhoods.of(real, generated, 3, kept_share=0.5, convention="torch-fidelity")
        assert near.values(*masks) == expected
    assert expected != prdc(real[masks[0]], generated[masks[1]], 3)


def test_the_registered_figures_take_their_options() -> None:
    real, generated = cloud(50, 3, 10), cloud(40, 3, 11)
    metric = METRICS.get("prdc")
    options = metric.options(k=3, convention="torch-fidelity")
    pair = Pair(real, generated, "inception", options)
    found = metric.values(pair, 1.0, *pair.everything())
    expected = prdc(real, generated, 3, "torch-fidelity")
    assert {name: float(value[0]) for name, value in found.items()} == expected
