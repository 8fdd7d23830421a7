"""Nearest neighbours on a real GPU against the float64 reference; run by `make gpu`."""

import pytest
import torch

from etude import kernels
from etude.kernels import backends

pytestmark = pytest.mark.gpu
no_cuda = pytest.mark.skipif(not backends.HAS_CUDA, reason="the CUDA kernels are not built")


def rows(count: int, width: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=g) * torch.linspace(1, 0.1, width) + 4.0
    x[count // 2] = x[0]
    return x


BACKENDS = ("triton", pytest.param("cuda", marks=no_cuda))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("n", "m", "width", "k"), [(3000, 5000, 2048, 5), (500, 700, 33, 16), (65, 40, 7, 32)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_neighbours_are_the_references(backend: str, n, m, width, k, dtype) -> None:
    x, y = rows(n, width, 0).to(dtype), rows(m, width, 1).to(dtype)
    x[1] = y[2]
    for other in (y, None):
        if other is None and k >= n:
            continue
        there = None if other is None else other.cuda()
        with kernels.use_backend(backend):
            distance, index = kernels.nearest_neighbours(x.cuda(), there, k=k)
            again = kernels.nearest_neighbours(x.cuda(), there, k=k)
        assert torch.equal(distance, again[0]) and torch.equal(index, again[1])
        with kernels.use_backend("reference"):
            want, _ = kernels.nearest_neighbours(x, other, k=k)
        torch.testing.assert_close(distance.cpu(), want, rtol=2e-7, atol=1e-6)
        at = (x if other is None else other).double()[index.cpu()]
        exact = (x.double()[:, None] - at).square().sum(2).sqrt().float()
        torch.testing.assert_close(distance.cpu(), exact, rtol=2e-7, atol=0)
        if other is not None:
            assert float(distance[1, 0]) == 0.0


@no_cuda
@pytest.mark.parametrize(("n", "m"), [(130, 70_000), (70_000, 130)])
def test_cuda_neighbours_of_many_rows(n: int, m: int) -> None:
    """Against the C++ twin, whose distances are exact: more than 65,535 rows on either side."""
    x, y = rows(n, 40, 5), rows(m, 40, 6)
    with kernels.use_backend("cuda"):
        distance, index = kernels.nearest_neighbours(x.cuda(), y.cuda(), k=3)
    with kernels.use_backend("cpp" if backends.HAS_CPP else "reference"):
        want, _ = kernels.nearest_neighbours(x, y, k=3)
    torch.testing.assert_close(distance.cpu(), want, rtol=2e-7, atol=1e-6)
    exact = (x.double()[:, None] - y.double()[index.cpu()]).square().sum(2).sqrt().float()
    torch.testing.assert_close(distance.cpu(), exact, rtol=2e-7, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_counts_are_the_references_but_for_pairs_at_a_radius(backend: str) -> None:
    x, y = rows(3000, 2048, 2), rows(5000, 2048, 3)
    with kernels.use_backend("reference"):
        radii = kernels.knn_radii(y, 5)
        low = kernels.membership_counts(x, y, radii * (1 - 1e-5))
        high = kernels.membership_counts(x, y, radii * (1 + 1e-5))
    with kernels.use_backend(backend):
        got = kernels.membership_counts(x.cuda(), y.cuda(), radii.cuda())
        again = kernels.membership_counts(x.cuda(), y.cuda(), radii.cuda())
    for found, repeated, least, most in zip(got, again, low, high, strict=True):
        assert torch.equal(found, repeated)
        assert bool(((least <= found.cpu()) & (found.cpu() <= most)).all())
    assert int(got[0].sum()) == int(got[1].sum()) > 0
