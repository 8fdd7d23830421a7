"""`moments` on a real GPU against the reference in float64; run by `make gpu`."""

import pytest
import torch

from etude import kernels
from etude.kernels import backends

pytestmark = pytest.mark.gpu
no_cuda = pytest.mark.skipif(not backends.HAS_CUDA, reason="the CUDA kernels are not built")
each_twin = pytest.mark.parametrize("backend", ["triton", pytest.param("cuda", marks=no_cuda)])


@each_twin
@pytest.mark.parametrize(
    "shape", [(5000, 2048), (70_000, 64), (300, 1000), (3, 7), (1, 1)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_sums_are_the_references(backend: str, shape, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(*shape, generator=g) * 2 + 5).to("cuda", dtype)
    with kernels.use_backend(backend):
        mean, scatter = kernels.moments(x)
        again = kernels.moments(x)
    with kernels.use_backend("reference"):
        want_mean, want = kernels.moments(x.cpu())
    assert torch.equal(mean, again[0]) and torch.equal(scatter, again[1])
    assert torch.equal(scatter, scatter.T)
    # Both sides are within N u of the truth (kernels/statistics.py).
    bound = 2 * (shape[0] + 3) * 2.0**-53
    size = want.diagonal().sqrt()
    assert bool(((scatter.cpu() - want).abs() <= bound * torch.outer(size, size) + 1e-300).all())
    assert float((mean.cpu() - want_mean).abs().max()) <= bound * float(x.abs().max())


@each_twin
def test_no_host_synchronisation(backend: str) -> None:
    x = torch.randn(500, 100, device="cuda")
    with kernels.use_backend(backend):
        kernels.moments(x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            kernels.moments(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@each_twin
def test_rows_beyond_two_to_the_31_elements(backend: str) -> None:
    x = torch.zeros(1_100_000, 2048, device="cuda", dtype=torch.float16)  # 2.25e9 elements
    x[-1, 3], x[-1, 2047] = 2.0, 4.0
    with kernels.use_backend(backend):
        mean, scatter = kernels.moments(x)
    n = len(x)
    assert float(mean[3]) == pytest.approx(2 / n) and float(mean[0]) == 0.0
    assert float(scatter[3, 2047]) == pytest.approx(8 - 8 / n, rel=1e-9)
    assert int((scatter != 0).sum()) == 4
