"""Features that cannot be measured are refused by every public function, by side and row."""

import numpy as np
import pytest
import torch

import etude
from etude.core.errors import UserError
from etude.metrics.checked import check_features
from etude.metrics.figures import measure
from etude.metrics.intervals import IntervalConfig
from etude.metrics.registry import METRICS, Pair

PAIRS = {
    "frechet_distance": etude.frechet_distance,
    "kid": etude.kid,
    "cmmd": etude.cmmd,
    "mind": etude.mind,
    "prdc": etude.prdc,
    "fd_infinity": lambda *sides: etude.fd_infinity(*sides, warn=False),
    "authentic": etude.authentic,
    "nearest_pictures": etude.nearest_pictures,
}
ALONE = {"vendi_score": etude.vendi_score, "inception_score": etude.inception_score}


def rows(seed: int, count: int = 60, dim: int = 4) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, dim)))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("name", PAIRS)
def test_a_number_that_is_not_finite_is_no_figure(name: str, side: int, bad: float) -> None:
    given = [rows(0), rows(1)]
    given[side][7, 2] = bad
    with pytest.raises(ValueError, match="row 7 of the (first|second|real|generated|training) f"):
        PAIRS[name](*given)


@pytest.mark.parametrize("name", PAIRS)
def test_sides_of_two_widths_are_not_compared(name: str) -> None:
    with pytest.raises(ValueError, match="have 4 dimensions and .* ones 5; take both from one"):
        PAIRS[name](rows(0), rows(1, dim=5))


@pytest.mark.parametrize("name", ALONE)
def test_one_set_is_held_to_the_same(name: str) -> None:
    features = rows(2)
    features[3, 0] = torch.nan
    with pytest.raises(ValueError, match="row 3 of the given features is not finite"):
        ALONE[name](features)
    with pytest.raises(UserError, match="must be a tensor, got ndarray"):
        ALONE[name](features.numpy())


def test_few_rows_and_whole_numbers_are_named() -> None:
    with pytest.raises(ValueError, match="second features need 2 rows, got 1"):
        etude.kid(rows(0), rows(1, count=1))
    with pytest.raises(ValueError, match=r"given features must be .* got \(3, 2\) torch.int64"):
        check_features(given=torch.zeros(3, 2, dtype=torch.int64))


@pytest.mark.parametrize("name", METRICS.names())
def test_a_figure_of_a_plan_neither(name: str) -> None:
    real, drawn = rows(0, 80), rows(1, 80)
    drawn[5, 1] = torch.inf
    with pytest.raises(ValueError, match="row 5 of the generated features"):
        measure(Pair(real, drawn, "inception"), name, IntervalConfig(replicates=0))


@pytest.mark.parametrize("scale", [1.0, 0.05])
def test_a_process_of_another_default_dtype_measures_the_same(scale: float) -> None:
    given = rows(0, 90, 32).float(), scale * rows(1, 70, 32).float()
    expected = etude.prdc(*given), etude.nearest_pictures(*given).figures()
    torch.set_default_dtype(torch.float64)
    try:
        assert (etude.prdc(*given), etude.nearest_pictures(*given).figures()) == expected
        pair = Pair(*given, "inception")
        found = measure(pair, "prdc", IntervalConfig(replicates=20))
    finally:
        torch.set_default_dtype(torch.float32)
    for name, one in measure(pair, "prdc", IntervalConfig(replicates=20)).items():
        np.testing.assert_array_equal(one.drawn, found[name].drawn)
