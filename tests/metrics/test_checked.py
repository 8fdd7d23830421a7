"""Features that cannot be measured are refused by every public function, by side and row."""

import numpy as np
import pytest
import torch

import etude
from etude.core.errors import UserError
from etude.metrics.checked import check_features, options_of
from etude.metrics.figures import measure
from etude.metrics.frechet import FrechetReference
from etude.metrics.intervals import IntervalConfig
from etude.metrics.kid import KidOptions
from etude.metrics.moments import Moments
from etude.metrics.prdc import PrdcOptions
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


@pytest.mark.parametrize("name", PAIRS)
def test_rows_with_gradients_and_on_two_devices_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"features have gradients; give features.detach\(\)"):
        PAIRS[name](rows(0).requires_grad_(), rows(1))
    with pytest.raises(UserError, match=r"features are on cpu and .* ones on meta; .*\('cpu'\)"):
        PAIRS[name](rows(0), rows(1).to("meta"))


@pytest.mark.parametrize("kept", ["none", "first", "second", "both"])
def test_moments_and_references_are_held_to_one_width_too(kept: str) -> None:
    x, y = rows(0), rows(1, dim=5)
    first = Moments.of(x) if kept in ("first", "both") else x
    second = Moments.of(y) if kept in ("second", "both") else y
    with pytest.raises(UserError, match="first features have 4 dimensions and second ones 5"):
        etude.frechet_distance(first, second)
    with pytest.raises(UserError, match="real features have 4 dimensions and generated ones 5"):
        FrechetReference(first).distance(second)


def test_a_reference_takes_features_alone() -> None:
    with pytest.raises(UserError, match=r"real features must be .* got \(4,\)"):
        FrechetReference(rows(0)[0])
    with pytest.raises(UserError, match="row 3 of the generated features is not finite"):
        FrechetReference(rows(0)).distance(rows(1).index_fill(0, torch.tensor(3), torch.nan))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"k": 0}, "prdc.k: Input should be greater than or equal to 1, got 0"),
        (
            {"convention": "torch_fidelity"},
            "prdc.convention: Input should be 'prdc' or 'torch-fidelity', got 'torch_fidelity'",
        ),
        ({"n": 3}, "prdc.n: there is no such option; prdc has k, convention"),
    ],
)
def test_options_are_refused_in_one_sentence(given: dict, said: str) -> None:
    with pytest.raises(UserError) as caught:
        options_of(PrdcOptions, "prdc", given)
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda x: etude.prdc(x, x, convention="torch_fidelity"), "prdc.convention: Input"),
        (lambda x: etude.prdc(x, x, k=300), "prdc.k: Input should be less"),
        (lambda x: etude.mind(x, x, directions=0), "mind.directions: Input should be"),
        (lambda x: etude.fd_infinity(x, x, points=1), "fd_infinity.points: Input should be"),
        (lambda x: etude.inception_score(x, splits=0), "inception_score.splits: Input"),
        (lambda x: etude.vendi_score(x, q=-1), "vendi_score.q: Input should be"),
    ],
)
def test_functions_refuse_what_their_options_refuse(call, said: str) -> None:
    with pytest.raises(UserError, match=said) as found:
        call(torch.eye(40))
    assert "\n" not in str(found.value)


def test_what_an_options_class_itself_refuses_is_said_as_it_says_it() -> None:
    with pytest.raises(UserError, match=r"^kid: part_size has no effect without parts; set parts"):
        options_of(KidOptions, "kid", {"part_size": 10})
    assert options_of(KidOptions, "kid", {"parts": 3}) == KidOptions(parts=3)


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
