"""The CUDA kernels of `moments`, thread by thread on the CPU, against numpy in extended precision.

Products of 8 x 8 x 4 are made by `cuda_on_cpu/mma.h`, each lane from the operands of its warp.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from etude import kernels
from etude.kernels import backends, compiling_cuda, statistics, statistics_cuda


def rows(count: int, width: int, mean: float = 3.0) -> Tensor:
    g = torch.Generator().manual_seed(width)
    mixing = torch.randn(width, width, generator=g) / width**0.5
    return torch.randn(count, width, generator=g) @ mixing + mean


def assert_close(got: tuple[Tensor, Tensor], x: Tensor) -> None:
    """Within N u of 80-bit sums, relative to the two deviations: the bound of the operator."""
    wide = x.double().numpy().astype(np.longdouble)
    mean = wide.mean(0)
    scatter = (wide - mean).T @ (wide - mean)
    bound = (len(x) + 3) * 2.0**-53
    assert got[0].dtype == got[1].dtype == torch.float64
    assert np.abs(got[0].numpy() - mean).max() <= bound * np.abs(wide).max()
    size = np.sqrt(np.diag(scatter))
    assert (np.abs(got[1].numpy() - scatter) <= bound * np.outer(size, size) + 1e-300).all()
    assert torch.equal(got[1], got[1].T)


@pytest.fixture
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of 32 rows: a few rows are then several blocks' work."""

    def config(N: int, D: int) -> statistics_cuda.LaunchConfig:
        tiles = -(-D // 64)
        return statistics_cuda.LaunchConfig(32, tiles * (tiles + 1) // 2)

    monkeypatch.setattr(statistics_cuda.LaunchConfig, "for_shape", config)


SHAPES = ((7, 1), (2, 64), (16, 65), (33, 24), (70, 130), (97, 63))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sums_are_those_of_extended_precision(cuda, guarded, shape, dtype) -> None:
    x = rows(*shape).to(dtype)
    assert_close(kernels.moments(x), x)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_runs_of_rows_are_added(cuda, guarded, short_runs, shape) -> None:
    x = rows(*shape)
    assert_close(kernels.moments(x), x)


def test_a_large_mean_costs_no_digits(cuda) -> None:
    """Rows that fill no whole step must not count as minus the mean."""
    x = rows(45, 30) + 2.0**14
    _, scatter = kernels.moments(x)
    _, centred = kernels.moments(x - 2.0**14)
    torch.testing.assert_close(scatter, centred, rtol=0, atol=float(centred.diag().max()) * 1e-13)


def test_bits_do_not_depend_on_strides_or_the_order_of_threads(cuda, built, short_runs) -> None:
    x = rows(70, 100)
    want = kernels.moments(x)
    for other in (torch.stack([x, x], -1)[..., 0], torch.cat([x, x], 1)[:, :100], x.T.clone().T):
        got = kernels.moments(other)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    for order in (1, 2, 3):
        built[1].cuda_on_cpu_order(order)
        try:
            got = kernels.moments(x)
        finally:
            built[1].cuda_on_cpu_order(0)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("shape", [(0, 5), (4, 0)], ids=str)
def test_no_rows_and_no_columns(cuda, shape) -> None:
    mean, scatter = kernels.moments(torch.zeros(shape))
    assert torch.equal(mean, torch.zeros(shape[1], dtype=torch.float64))
    assert torch.equal(scatter, torch.zeros(shape[1], shape[1], dtype=torch.float64))


def test_runs_fill_a_gpu_and_cover_all_rows() -> None:
    config = statistics_cuda.LaunchConfig.for_shape
    assert config(50_000, 2048) == statistics_cuda.LaunchConfig(50_000, 528)
    small = config(1_000_001, 64)
    assert small.tiles == 1 and small.rows % 16 == 0
    assert 500 <= -(-1_000_001 // small.rows) <= 512
    assert config(10, 64).rows == 1024


def test_compiles_keeps_the_rules_and_verifies(cuda, monkeypatch) -> None:
    x = rows(40, 20)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: kernels.moments(x)[1] * 2, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), kernels.moments(x)[1] * 2)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(statistics.ops.cuda_moments.default, (x,), test_utils=tests)
    monkeypatch.setattr(backends, "verifying", lambda: True)
    kernels.moments(x)
    exact = statistics.moments_reference
    monkeypatch.setattr(
        statistics, "moments_reference", lambda x: (exact(x)[0], exact(x)[1] * (1 + 1e-3))
    )
    with pytest.raises(AssertionError, match="CUDA moments: output scatter differs"):
        kernels.moments(x)


def test_registers_and_spills() -> None:
    budget = compiling_cuda.budget("statistics")
    again = "type python -m etude.kernels.compiling_cuda statistics --write"
    assert budget.pop("sources") == compiling_cuda.sources_hash("statistics"), again
    assert all(row["spills"] == 0 for kernels_of in budget.values() for row in kernels_of.values())
    if compiling_cuda.find_nvcc() is None:
        pytest.skip("nvcc is not installed")
    for row in compiling_cuda.measure([compiling_cuda.SOURCES / "statistics.cu"]):
        if row["toolchain"] in budget:
            numbers = {k: row[k] for k in ("registers", "spills")}
            assert budget[row["toolchain"]][row["kernel"]] == numbers, row
