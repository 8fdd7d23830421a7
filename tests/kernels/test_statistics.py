"""Mean and scatter matrix: C++ and reference against numpy in extended precision."""

import numpy as np
import pytest
import torch
from torch import Tensor

from etude import kernels
from etude.kernels import backends, statistics

needs_cpp = pytest.mark.skipif(not backends.HAS_CPP, reason="the C++ kernels are not built")
CHOICES = (pytest.param("cpp", marks=needs_cpp), "reference")
poisoned = pytest.mark.usefixtures("poisoned_empty")


def rows(count: int, width: int, seed: int = 0, mean: float = 3.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=g) / width**0.5
    return torch.randn(count, width, generator=g) @ mixing + mean


def exact(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """In 80-bit floats: 11 more bits than what is tested."""
    wide = x.double().numpy().astype(np.longdouble)
    mean = wide.mean(0)
    return mean, (wide - mean).T @ (wide - mean)


def assert_close(got: tuple[Tensor, Tensor], x: Tensor, slack: float = 1.0) -> None:
    """Within N u, relative to the largest row (mean) or the two deviations (scatter).

    u = 2^-53; the bound of kernels/statistics.py, whose N e_i e_j is of second order here.
    """
    bound = slack * (len(x) + 3) * 2.0**-53
    mean, scatter = exact(x)
    assert got[0].dtype == got[1].dtype == torch.float64
    largest = np.abs(x.double().numpy()).max()
    assert np.abs(got[0].numpy() - mean).max() <= bound * largest
    size = np.sqrt(np.diag(scatter))
    assert (np.abs(got[1].numpy() - scatter) <= bound * np.outer(size, size) + 1e-300).all()


@poisoned
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("shape", [(7, 1), (400, 24), (385, 25), (1000, 199), (40, 130)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sums_are_those_of_extended_precision(choice: str, shape, dtype: torch.dtype) -> None:
    x = rows(*shape).to(dtype)
    with kernels.use_backend(choice):
        got = kernels.moments(x)
    assert_close(got, x)
    assert torch.equal(got[1], got[1].T) or choice == "reference"


@pytest.mark.parametrize("choice", CHOICES)
def test_a_large_mean_costs_no_digits(choice: str) -> None:
    x = rows(500, 30) + 2.0**14
    with kernels.use_backend(choice):
        mean, scatter = kernels.moments(x)
        _, centred = kernels.moments(x - 2.0**14)
    # x - 2^14 is exact in float32, so both are the scatter of the same numbers; the mean is off by
    # u 2^14 and a few more, which enters squared.
    torch.testing.assert_close(scatter, centred, rtol=0, atol=float(centred.diag().max()) * 1e-13)
    assert float((mean - 2.0**14 - x.double().sub(2.0**14).mean(0)).abs().max()) < 1e-9


@needs_cpp
def test_bits_do_not_depend_on_threads_or_strides() -> None:
    x = rows(900, 250, 1)
    before = torch.get_num_threads()
    want = kernels.moments(x)
    gaps = torch.stack([x, x], -1)[..., 0]
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for other in (x, gaps, x.T.contiguous().T, torch.cat([x, x], 1)[:, :250]):
                got = kernels.moments(other)
                assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    finally:
        torch.set_num_threads(before)


@needs_cpp
@pytest.mark.parametrize("level", backends.cpp().levels() if backends.HAS_CPP else [])
def test_every_processor_level(level: str) -> None:
    kept = backends.cpp().set_level(level)
    try:
        for shape in ((500, 61), (5, 200)):
            assert_close(kernels.moments(rows(*shape, seed=2)), rows(*shape, seed=2))
    finally:
        backends.cpp().set_level(kept)


@pytest.mark.parametrize("choice", CHOICES)
def test_parts_merge_to_the_whole_in_any_order(choice: str) -> None:
    from etude.metrics.moments import Moments

    x = rows(700, 40, 3)
    parts = x.split([1, 300, 9, 390])
    with kernels.use_backend(choice):
        for order in ((0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)):
            total = Moments.empty(40)
            for number in order:
                total = total.merge(Moments.of(parts[number]))
            # One more rounding of the sums for each of the three merges, and of its product.
            assert_close((total.mean, total.scatter), x, slack=2.0)


@pytest.mark.parametrize("choice", CHOICES)
def test_few_rows_and_none(choice: str) -> None:
    with kernels.use_backend(choice):
        mean, scatter = kernels.moments(torch.zeros(0, 3))
        assert torch.equal(mean, torch.zeros(3).double())
        assert torch.equal(scatter, torch.zeros(3, 3).double())
        mean, scatter = kernels.moments(torch.tensor([[1.5, -2.0]]))
        assert mean.tolist() == [1.5, -2.0] and not scatter.any()
        assert kernels.moments(torch.zeros(4, 0))[1].shape == (0, 0)


def test_float64_rows_take_the_reference() -> None:
    x = rows(50, 9).double() * (1 + 2.0**-40)
    assert_close(kernels.moments(x), x)


@needs_cpp
def test_compiles_without_a_break_and_keeps_the_rules() -> None:
    x = rows(30, 8)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: kernels.moments(x)[1] / 29, fullgraph=True)
    got = compiled(x)
    torch.testing.assert_close(got, x.double().T.cov(), rtol=1e-12, atol=1e-12)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(statistics.ops.moments.default, (x,), test_utils=tests)


@needs_cpp
def test_verification_sees_a_wrong_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows(60, 12)
    with kernels.use_backend("cpp", verify=True):
        kernels.moments(x)
        right = statistics.moments_reference

        def wrong(x: Tensor) -> tuple[Tensor, Tensor]:
            mean, scatter = right(x)
            scatter[3, 7] += 1e-3 * scatter[3, 3]
            return mean, scatter

        monkeypatch.setattr(statistics, "moments_reference", wrong)
        with pytest.raises(AssertionError, match=r"scatter differs first at \[3, 7\]"):
            kernels.moments(x)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.zeros(3), "must be (N, D) of floats, got (3,)"),
        (torch.zeros(3, 2, dtype=torch.int32), "got (3, 2) torch.int32"),
    ],
)
def test_bad_input_gets_one_sentence(x: Tensor, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        kernels.moments(x)
    assert words in str(caught.value) and "\n" not in str(caught.value)
