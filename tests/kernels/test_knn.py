"""Nearest neighbours and ball membership: C++ and reference against all distances in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from etude import kernels
from etude.kernels import backends, knn

needs_cpp = pytest.mark.skipif(not backends.HAS_CPP, reason="the C++ kernels are not built")
CHOICES = (pytest.param("cpp", marks=needs_cpp), "reference")
poisoned = pytest.mark.usefixtures("poisoned_empty")


def rows(count: int, width: int, seed: int, mean: float = 4.0) -> Tensor:
    """Rows around a mean that is large beside their spread, a few of them equal."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=g) * torch.linspace(1, 0.1, width) + mean
    if count > 12:
        x[11] = x[3]
    return x


def exact(x: Tensor, y: Tensor) -> Tensor:
    """All distances, by differences in float64, rounded to float32."""
    return (x.double()[:, None] - y.double()[None]).square().sum(2).sqrt().float()


def ordered(distances: Tensor, k: int) -> tuple[Tensor, Tensor]:
    found = distances.sort(dim=1, stable=True)
    return found.values[:, :k], found.indices[:, :k]


@poisoned
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(
    ("n", "m", "width", "k"),
    [(70, 90, 33, 5), (1, 1, 3, 1), (5, 300, 1, 16), (200, 17, 129, 17), (40, 1100, 8, 300)],
)
def test_nearest_rows_are_those_of_all_distances(choice: str, n, m, width, k) -> None:
    x, y = rows(n, width, 0), rows(m, width, 1)
    if n > 3:
        x[2] = y[m // 2]  # a copy: distance 0
    with kernels.use_backend(choice):
        distance, index = kernels.nearest_neighbours(x, y, k=k)
    want = ordered(exact(x, y), k)
    if width > 1:
        assert torch.equal(index, want[1])
    assert torch.equal(distance, want[0])
    assert n <= 3 or float(distance[2, 0]) == 0.0


@pytest.mark.parametrize("choice", CHOICES)
def test_blocks_do_not_matter_and_a_row_is_not_its_own_neighbour(
    choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = rows(150, 20, 2)
    want = ordered(exact(x, x).fill_diagonal_(torch.inf), 6)
    for block in (knn._ROWS, 7):
        monkeypatch.setattr(knn, "_ROWS", block)
        monkeypatch.setattr(knn, "_COLUMNS", 2 * block)
        monkeypatch.setattr(knn.nearest_neighbours_reference, "__defaults__", (block,))
        with kernels.use_backend(choice):
            distance, index = kernels.nearest_neighbours(x, k=6)
            radii = kernels.knn_radii(x, 4)
        assert torch.equal(distance, want[0]) and torch.equal(index, want[1])
        assert torch.equal(radii, want[0][:, 3])
    assert float(distance[3, 0]) == 0.0 and int(index[3, 0]) == 11


@pytest.mark.parametrize("choice", CHOICES)
def test_ties_go_to_the_first(choice: str) -> None:
    x = torch.zeros(30, 4)
    x[::2, 0] = 1.0
    with kernels.use_backend(choice):
        distance, index = kernels.nearest_neighbours(x[:2], x, k=4)
    assert torch.equal(distance, torch.zeros(2, 4))
    assert index.tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    grid = torch.arange(9.0)[:, None]
    with kernels.use_backend(choice):
        distance, index = kernels.nearest_neighbours(grid, k=2)
    assert index[4].tolist() == [3, 5] and distance[4].tolist() == [1.0, 1.0]


@poisoned
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(("n", "m", "width"), [(70, 90, 33), (1, 40, 5), (130, 1, 64)])
def test_membership_is_that_of_all_distances(choice: str, n: int, m: int, width: int) -> None:
    x, y = rows(n, width, 3), rows(m, width, 4)
    if n > 8:
        x[5] = y[min(8, m - 1)]
    distances = exact(x, y)
    # A radius at the median, one at exactly a distance (outside: strict), one of 0, one infinite,
    # one negative.
    radii = distances.median(0).values
    radii[0] = distances[0, 0]
    if m > 10:
        radii[8], radii[9], radii[10] = 0.0, torch.inf, -100.0
    inside = distances < radii
    with kernels.use_backend(choice):
        per_query, per_reference = kernels.membership_counts(x, y, radii)
    assert torch.equal(per_query, inside.sum(1)) and torch.equal(per_reference, inside.sum(0))


@pytest.mark.parametrize("choice", CHOICES)
def test_pairs_are_those_of_all_distances(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = rows(70, 9, 5), rows(90, 9, 6)
    x[5] = y[8]
    distances = exact(x, y)
    reach_x, reach_y = distances.median(1).values, distances.median(0).values
    reach_x[0], reach_y[0] = distances[0, 1], 0.0
    for block in (knn._ROWS, 16):  # 16 x 32 pairs a block: more than the room they have at first
        monkeypatch.setattr(knn, "_ROWS", block)
        monkeypatch.setattr(knn, "_COLUMNS", 2 * block)
        with kernels.use_backend(choice):
            found = kernels.neighbour_pairs(x, y, reach_x, reach_y)
        for (i, j, d), inside in zip(
            found, (distances < reach_x[:, None], distances < reach_y), strict=True
        ):
            want = torch.nonzero(inside, as_tuple=True)
            assert torch.equal(i, want[0]) and torch.equal(j, want[1])
            assert torch.equal(d, distances[want])


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("scale", [1.0, 1e25])  # the second leaves float32 no room
def test_a_set_that_is_prepared_once_has_the_distances_of_all_pairs(
    choice: str, scale: float
) -> None:
    x, y = rows(70, 9, 5) * scale, rows(90, 9, 6) * scale
    distances = exact(x, y)
    reach_x, reach_y = distances.median(1).values, distances.median(0).values
    reach_x[0], reach_y[0] = distances[0, 1], 0.0
    sure_x, sure_y = 0.8 * reach_x, 0.8 * reach_y
    with kernels.use_backend(choice):
        near = knn.NearPairs(y, reach_y)
        blocks = (slice(first, first + 8) for first in range(0, 70, 8))
        parts = [near.distances(x[b], reach_x[b], sure_x[b], sure_y) for b in blocks]
    seen = 0
    for found, reach, sure in zip(
        map(torch.cat, zip(*parts, strict=True)),
        (reach_x[:, None], reach_y),
        (sure_x[:, None], sure_y),
        strict=True,
    ):
        want = distances.where(distances < reach, torch.inf)
        assert torch.equal(found[distances >= sure], want[distances >= sure])
        assert (found < sure)[distances < sure].all()
        seen += int((found != want).sum())
    assert (seen > 1000) == (choice == "cpp" and scale == 1.0)  # most are not computed


@needs_cpp
@pytest.mark.parametrize("spread", [1e-3, 1e-6])
def test_decisions_do_not_suffer_from_cancellation(spread: float) -> None:
    """Two far clusters, each tiny: |a|^2 + |b|^2 - 2 a.b has no correct digit in float32."""
    g = torch.Generator().manual_seed(7)
    x = torch.randn(400, 64, generator=g) * spread
    x[:200] += 100.0
    want = ordered(exact(x, x).fill_diagonal_(torch.inf), 5)
    with kernels.use_backend("cpp"):
        distance, index = kernels.nearest_neighbours(x, k=5)
        counts = kernels.membership_counts(x, x, want[0][:, 4].contiguous())
    assert torch.equal(distance, want[0]) and torch.equal(index, want[1])
    inside = exact(x, x) < want[0][:, 4]
    assert torch.equal(counts[0], inside.sum(1)) and torch.equal(counts[1], inside.sum(0))


@needs_cpp
def test_the_error_bound_holds_where_float32_is_worst() -> None:
    """Products of one sign sum up their roundings; the screen must still enclose the truth."""
    g = torch.Generator().manual_seed(8)
    x = torch.rand(60, 4096, generator=g) * 10 + 1e3
    screen = knn._Screen(x, None)
    gram = screen.a @ screen.a.T
    about = screen.row_norms[:, None] + screen.column_norms - 2 * gram
    error = (about.double() - exact(x, x).double().square()).abs()
    allowed = screen.relative * (screen.row_norms[:, None] + screen.column_norms)
    assert bool((error <= allowed).all())


@needs_cpp
def test_bits_do_not_depend_on_threads_levels_or_precision() -> None:
    x, y = rows(90, 70, 9), rows(333, 70, 10)
    radii = kernels.knn_radii(y, 3)
    before, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    seen = []
    for level in backends.cpp().levels():
        kept = backends.cpp().set_level(level)
        try:
            for threads, words in ((1, "highest"), (3, "highest"), (2, "medium")):
                torch.set_num_threads(threads)
                torch.set_float32_matmul_precision(words)
                with torch.autocast("cpu", torch.bfloat16):
                    made = kernels.nearest_neighbours(x, y, k=7)
                    counts = kernels.membership_counts(x, y, radii)
                    pairs = kernels.neighbour_pairs(x, y, radii[:90], radii)
                assert torch.get_float32_matmul_precision() == words
                seen.append([*made, *counts, *pairs[0], *pairs[1]])
        finally:
            torch.set_num_threads(before)
            torch.set_float32_matmul_precision(precision)
            backends.cpp().set_level(kept)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes_and_strides(dtype: torch.dtype) -> None:
    x, y = rows(60, 24, 11).to(dtype), rows(80, 24, 12).to(dtype)
    want = ordered(exact(x, y), 3)
    wide = torch.stack([x, x], -1)[..., 0]
    for one, two in ((x, y), (wide, y.T.contiguous().T)):
        distance, index = kernels.nearest_neighbours(one, two, k=3)
        assert torch.equal(distance, want[0]) and torch.equal(index, want[1])


@needs_cpp
def test_numbers_that_leave_float32_no_room_take_the_reference() -> None:
    x = rows(30, 6, 13, mean=0.0)
    for scale in (1e25, 1e-25):
        want = ordered(exact(x * scale, x * scale).fill_diagonal_(torch.inf), 3)
        with kernels.use_backend("cpp"):
            distance, index = kernels.nearest_neighbours(x * scale, k=3)
        assert torch.equal(distance, want[0]) and torch.equal(index, want[1])


@pytest.mark.parametrize("choice", CHOICES)
def test_no_rows(choice: str) -> None:
    none, some = torch.empty(0, 5), rows(6, 5, 14)
    with kernels.use_backend(choice):
        assert kernels.nearest_neighbours(none, some, k=2)[1].shape == (0, 2)
        counts = kernels.membership_counts(none, some, torch.ones(6))
        assert counts[0].shape == (0,) and torch.equal(counts[1], torch.zeros(6).long())
        pairs = kernels.neighbour_pairs(some, none, torch.ones(6), torch.ones(0))
        assert [t.shape for part in pairs for t in part] == [(0,)] * 6


@needs_cpp
def test_against_scikit_learn() -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    x = rows(300, 40, 15)
    searcher = neighbors.NearestNeighbors(n_neighbors=6, algorithm="kd_tree").fit(x.double())
    want = searcher.kneighbors(x.double(), return_distance=True)
    distance, _ = kernels.nearest_neighbours(x, x, k=6)
    np.testing.assert_allclose(distance, want[0], rtol=1e-6, atol=0)


@needs_cpp
def test_compiles_without_a_break_and_keeps_the_rules() -> None:
    x, y = rows(20, 8, 16), rows(30, 8, 17)
    torch._dynamo.reset()

    def call(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        radii = kernels.knn_radii(y, 3)
        return kernels.membership_counts(x, y, radii * 1.5)

    compiled = torch.compile(call, fullgraph=True)
    for got, want in zip(compiled(x, y), call(x, y), strict=True):
        assert torch.equal(got, want)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(knn.ops.nearest_neighbours.default, (x, y, 3), test_utils=tests)
    torch.library.opcheck(knn.ops.nearest_neighbours.default, (x, None, 3), test_utils=tests)
    radii = torch.ones(30)
    torch.library.opcheck(knn.ops.membership_counts.default, (x, y, radii), test_utils=tests)


@needs_cpp
def test_verification_sees_a_wrong_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows(40, 8, 18)
    with kernels.use_backend("cpp", verify=True):
        kernels.nearest_neighbours(x, k=2)
        exact_one = knn.nearest_neighbours_reference

        def wrong(x, y, k):
            distance, index = exact_one(x, y, k)
            distance[5, 1] *= 1.01
            return distance, index

        monkeypatch.setattr(knn, "nearest_neighbours_reference", wrong)
        with pytest.raises(AssertionError, match=r"differs first at \[5, 1\]"):
            kernels.nearest_neighbours(x, k=2)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: kernels.nearest_neighbours(x[0]), "x must be (N, D), got (3,)"),
        (lambda x: kernels.nearest_neighbours(x, x[:, :2]), "y must be (M, 3), got (4, 2)"),
        (lambda x: kernels.nearest_neighbours(x.int()), "x is torch.int32"),
        (lambda x: kernels.knn_radii(x, 4), "k=4 of 3 rows"),
        (lambda x: kernels.nearest_neighbours(x, x, k=0), "k=0 of 4 rows"),
        (lambda x: kernels.membership_counts(x, x, torch.ones(3)), "radii must be (4,) float32"),
        (
            lambda x: kernels.neighbour_pairs(x, x, torch.ones(4), torch.ones(4).double()),
            "reach_y must be (4,) float32, got (4,) torch.float64",
        ),
    ],
)
def test_bad_input_gets_one_sentence(call, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        call(torch.zeros(4, 3))
    assert words in str(caught.value) and "\n" not in str(caught.value)
