"""The CUDA kernels for neighbours, thread by thread on the CPU: the reference's answers."""

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


def nearest(x: Tensor, y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """From all distances, by differences in float64, rounded to float32; ties by smaller row."""
    gaps = (x.double()[:, None] - y.double()[None]).square().sum(2).sqrt().float()
    if y is x:
        gaps.fill_diagonal_(torch.inf)
    found = gaps.sort(dim=1, stable=True)
    return found.values[:, :k], found.indices[:, :k]


def equal(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("n", "m", "width", "k"),
    [
        (1, 1, 2, 1),  # one of everything
        (3, 7, 5, 7),  # all of a tile that is not full
        (65, 130, 17, 32),  # two parts, the longest list, an odd end of rows and columns
        (66, 0, 33, 5),  # the rows of x themselves
        (9, 400, 3, 2),  # seven parts
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_neighbours_are_those_of_all_distances(cuda, guarded, n, m, width, k, dtype) -> None:
    """bfloat16 around 40 has steps of 0.25: most of its distances tie."""
    x, y, _ = sets(n, m or n, width)
    x = x.to(dtype)
    y = y.to(dtype) if m else None
    assert equal(kernels.nearest_neighbours(x, y, k=k), nearest(x, x if y is None else y, k))


def test_equal_rows_are_neighbours_in_the_order_of_rows(cuda, guarded) -> None:
    """140 copies of one row, in three parts: of more than k, those that come first."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(150, 8, generator=g) + 3
    x[10:] = x[10]
    distance, index = kernels.nearest_neighbours(x, k=30)
    assert knn_cuda.split(150, 150, 30)[1] == 3
    assert not distance[10:].any()
    for i in (10, 11, 77, 149):
        assert index[i].tolist() == [j for j in range(10, 42) if j != i][:30]
    assert equal((distance[:10], index[:10]), tuple(t[:10] for t in nearest(x, x, 30)))


def test_parts_and_the_order_of_threads_do_not_matter(cuda, built, monkeypatch) -> None:
    x, y, _ = sets(67, 300, 19)
    want = kernels.nearest_neighbours(x, y, k=4)
    assert equal(want, nearest(x, y, 4))
    for order, parts in ((1, (320, 1)), (2, (128, 3)), (3, (64, 5))):
        monkeypatch.setattr(knn_cuda, "split", lambda *_, parts=parts: parts)
        built[1].cuda_on_cpu_order(order)
        try:
            got = kernels.nearest_neighbours(x.T.clone().T, torch.stack([y, y], 1)[:, 1], k=4)
        finally:
            built[1].cuda_on_cpu_order(0)
        assert equal(got, want)


@pytest.mark.parametrize(
    ("N", "M"), [(1, 1), (1, 10**6), (10**6, 64), (70_000, 70_001), (64, 1025)]
)
@pytest.mark.parametrize("k", [1, 5, 32])
def test_parts_cover_every_row_once(N, M, k) -> None:
    each, parts = knn_cuda.split(N, M, k)
    assert each % 64 == 0 and (parts - 1) * each < M <= parts * each
    assert parts * k * N <= max(80 * N, 1024 * 64 * k)


def test_more_than_65535_rows(cuda) -> None:
    """Of one number each: the answer is known from the order of these numbers. On a GPU, as many
    queries too (test_knn_gpu.py)."""
    x = torch.arange(65_600.0)[:, None]
    distance, index = kernels.nearest_neighbours(x[[0, 65_599]], x, k=2)
    assert distance.tolist() == [[0.0, 1.0]] * 2 and index.tolist() == [[0, 1], [65_599, 65_598]]


def test_numbers_that_are_none_come_last(cuda) -> None:
    """A mean of a set with a NaN would make all distances NaN: here only a query has one."""
    x, y, _ = sets(4, 40, 6)
    x[1, 2] = torch.nan
    distance, index = kernels.nearest_neighbours(x, y, k=3)
    assert distance[1].isnan().all() and index[1].tolist() == [0, 1, 2]
    others = [0, 2, 3]
    assert equal((distance[others], index[others]), nearest(x[others], y, 3))


def test_what_the_neighbours_kernel_does_not_take(cuda, monkeypatch) -> None:
    x, y, _ = sets(5, 40, 3)
    with pytest.raises(ValueError, match="k=5 of 4 rows"):
        kernels.nearest_neighbours(x, k=5)
    with pytest.raises(ValueError, match="k=41 of 40 rows"):
        kernels.nearest_neighbours(x, y, k=41)
    assert kernels.nearest_neighbours(x[:0], y, k=3)[0].shape == (0, 3)
    assert not kernels.nearest_neighbours(x[:, :0], y[:, :0], k=3)[0].any()
    got, want = kernels.nearest_neighbours(x, y, k=33)[0], nearest(x, y, 33)[0]
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    with pytest.raises(RuntimeError, match="no kernel for this k"):
        cuda.nearest_neighbours((1, 1, 1), [16] * 8, 33, False, 64, 1, (0, 0))
    op, tests = torch.ops.etude.cuda_nearest_neighbours.default, ("test_schema", "test_faketensor")
    torch.library.opcheck(op, (x, y, 2), test_utils=tests)
    monkeypatch.setattr(backends, "verifying", lambda: True)
    kernels.nearest_neighbours(x, y, k=2)
    wrong = kernels.nearest_neighbours(x, y, k=3)[0][:, 1:], None
    monkeypatch.setattr(knn_cuda.knn, "nearest_neighbours_reference", lambda *_: wrong)
    with pytest.raises(AssertionError, match="CUDA nearest_neighbours: output distance"):
        kernels.nearest_neighbours(x, y, k=2)


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
