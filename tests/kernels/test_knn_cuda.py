"""The CUDA kernel of `membership_counts`, thread by thread on the CPU: the reference's counts."""

import pytest
import torch
from torch import Tensor

from etude import kernels
from etude.kernels import backends, compiling_cuda, knn, knn_cuda


def sets(n: int, m: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two sets far from zero that share a row, and radii among which some balls are empty."""
    g = torch.Generator().manual_seed(n + m)
    x, y = (torch.randn(count, width, generator=g) + 40.0 for count in (n, m))
    x[n // 2] = y[m // 2]
    radii = knn.distances_reference(x.double() - 40, y.double() - 40).quantile(0.4, 0)
    radii[0] = 0.0
    return x, y, radii


@pytest.mark.parametrize(
    ("n", "m", "width"), [(1, 1, 1), (64, 64, 16), (65, 40, 7), (70, 130, 33), (3, 129, 100)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_counts_are_the_references(cuda, guarded, n, m, width, dtype) -> None:
    x, y, radii = sets(n, m, width)
    x, y = x.to(dtype), y.to(dtype)
    got = kernels.membership_counts(x, y, radii)
    want = knn.membership_counts_reference(x, y, radii)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert n == 1 or 0 < int(got[0].sum()) < n * m


def test_a_pair_at_its_radius_is_outside_and_the_next_float_is_inside(cuda) -> None:
    """Strictly smaller, by the distance rounded to float32; an equal row is at 0."""
    x, y, _ = sets(66, 5, 20)
    gap = knn.distances_reference(*knn._centred(x, y))
    radii = gap[65].clone()
    assert torch.equal(kernels.membership_counts(x, y, radii)[1], (gap < radii).sum(0))
    radii = radii.nextafter(torch.tensor(torch.inf))
    assert int(kernels.membership_counts(x, y, radii)[0][65]) == 5
    tiny = torch.full((5,), 1e-30)
    assert kernels.membership_counts(x, y, tiny)[0].nonzero().tolist() == [[33]]


def test_strides_and_the_order_of_threads_do_not_matter(cuda, built) -> None:
    x, y, radii = sets(70, 66, 40)
    want = kernels.membership_counts(x, y, radii)
    others = (
        x.T.clone().T,
        torch.stack([y, x[:66]], 1)[:, 0],
        torch.stack([radii, radii], 1)[:, 0],
    )
    for order in (0, 1, 2):
        built[1].cuda_on_cpu_order(order)
        try:
            got = kernels.membership_counts(*others)
        finally:
            built[1].cuda_on_cpu_order(0)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_empty_sets_and_verification(cuda, monkeypatch) -> None:
    x, y, radii = sets(5, 4, 3)
    assert kernels.membership_counts(x[:0], y, radii)[1].tolist() == [0] * 4
    tests = ("test_schema", "test_faketensor")
    op = torch.ops.etude.cuda_membership_counts.default
    torch.library.opcheck(op, (x, y, radii), test_utils=tests)
    monkeypatch.setattr(backends, "verifying", lambda: True)
    kernels.membership_counts(x, y, radii)
    exact = knn.membership_counts_reference
    monkeypatch.setattr(
        knn_cuda.knn, "membership_counts_reference", lambda *a: [t + 1 for t in exact(*a)]
    )
    with pytest.raises(AssertionError, match="CUDA membership_counts: output per_query"):
        kernels.membership_counts(x, y, radii)


def test_registers_and_spills() -> None:
    budget = compiling_cuda.budget("knn")
    again = "type python -m etude.kernels.compiling_cuda knn --write"
    assert budget.pop("sources") == compiling_cuda.sources_hash("knn"), again
    assert all(row["spills"] == 0 for kernels_of in budget.values() for row in kernels_of.values())
    if compiling_cuda.find_nvcc() is None:
        pytest.skip("nvcc is not installed")
    for row in compiling_cuda.measure([compiling_cuda.SOURCES / "knn.cu"]):
        if row["toolchain"] in budget:
            numbers = {k: row[k] for k in ("registers", "spills")}
            assert budget[row["toolchain"]][row["kernel"]] == numbers, row
