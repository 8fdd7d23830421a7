"""Nearest neighbours and membership in balls, without a matrix of all distances.

Called by precision, recall, density and coverage (Kynkaanniemi et al. 2019; Naeem et al. 2020) and
by the search for copies. For rows x_i of (N, D) and y_j of (M, D):

    nearest_neighbours: the k smallest d_ij = |x_i - y_j| of every i, ascending, ties by smaller j
    knn_radii:          r_i, the distance of x_i to the k-th nearest other row of x
    membership_counts:  per i, how many j have d_ij < r_j; per j, how many i
    neighbour_pairs:    the (i, j, d_ij) with d_ij < r_i, and those with d_ij < s_j

`NearPairs` is the last for blocks of x with one y, whose preparation costs more than a few rows do.

A row is not its own neighbour, by index: an equal row elsewhere is one, at distance 0. Distances
are float32, rounded from float64, and all comparisons are of these, strictly.

How to get float64 answers at float32's cost (the C++ twin): rows are centred, a = float32(x - m)
with m the mean of y, and a block of a . b is one float32 matrix product. Whatever its order of
summation (Higham, "Accuracy and Stability of Numerical Algorithms", 2002, section 3.1), with unit
roundoff u = 2^-24 and s = |a|^2 + |b|^2,

    |a.b computed - a.b| <= D u / (1 - D u) |a||b|       so 2 a.b is off by at most about D u s
    |d_ij^2 - |a - b|^2| <= 4 u s                        rounding of the centred rows
    4 u s                                                rounding of |a|^2, |b|^2 and their sums

Hence | |a|^2 + |b|^2 - 2 a.b - d_ij^2 | <= c s with c = 1.01 (D + 16) u. Pairs that this bound
decides are decided; of the others (the k nearest, and about one pair in a thousand near a radius)
the distance is computed again from the rows as given, by differences in float64. The results do
not depend on how the product was rounded, blocked or threaded; equal rows have distance 0.

The reference works in float64 throughout: centred rows, |a|^2 + |b|^2 - 2 a.b, of which less than
1e-13 s counts as 0 (what rounding leaves of equal rows). It differs from exact distances by
1e-16 s / d_ij^2 before the rounding to float32.
"""

import copy
from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from . import backends
from .catalogue import Operator

_ROWS, _COLUMNS = 1024, 2048  # of a block: 8 MiB of products in float32
_KEY = 1 << 32
MOST = 1024  # neighbours
_TWINS = ("cpp", "triton", "cuda")
_LARGEST = 1e37  # squared norms beyond it leave float32 no room
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Pairs = tuple[Tensor, Tensor, Tensor]


def _centred(x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both sets in float64 around the mean of the second (of the first without a second)."""
    centre = (x if y is None else y).to(torch.float64).mean(0)
    x = x.to(torch.float64) - centre
    return x, x if y is None else y.to(torch.float64) - centre


def distances_reference(x: Tensor, y: Tensor) -> Tensor:
    """Distances (N, M) float32 of centred float64 rows (N, D) and (M, D)."""
    scale = x.square().sum(1)[:, None] + y.square().sum(1)[None, :]
    squared = scale - 2.0 * (x @ y.T)
    squared[squared < 1e-13 * scale] = 0.0  # equal rows: what is left is rounding
    return squared.sqrt_().to(torch.float32)


def nearest_neighbours_reference(
    x: Tensor, y: Tensor | None, k: int, block: int = _ROWS
) -> tuple[Tensor, Tensor]:
    """`nearest_neighbours` in plain torch and float64, `block` x `2 block` distances at a time.

    A distance and its index make one whole number, the bits of a non-negative float32 being in
    the order of their values; the k smallest of these are the answer, ties included.
    """
    own, (a, b) = y is None, _centred(x, y)
    found = []
    for first in range(0, len(a), block):
        rows = a[first : first + block]
        best = torch.empty((len(rows), 0), dtype=torch.int64, device=x.device)
        for start in range(0, len(b), 2 * block):
            gap = distances_reference(rows, b[start : start + 2 * block])
            index = torch.arange(start, start + gap.shape[1], device=x.device)
            if own:
                here = torch.arange(first, first + len(rows), device=x.device)
                gap.masked_fill_(here[:, None] == index, torch.inf)
            keys = gap.view(torch.int32).long() * _KEY + index
            best = torch.cat([best, keys], 1)
            best = best.topk(min(k, best.shape[1]), dim=1, largest=False, sorted=True).values
        found.append(best)
    keys = torch.cat(found) if found else torch.empty((0, k), dtype=torch.int64, device=x.device)
    return (keys // _KEY).to(torch.int32).view(torch.float32), keys % _KEY


def membership_counts_reference(
    query: Tensor, reference: Tensor, radii: Tensor, block: int = _ROWS
) -> tuple[Tensor, Tensor]:
    """`membership_counts` in plain torch and float64."""
    a, b = _centred(query, reference)
    per_query = torch.zeros(len(a), dtype=torch.int64, device=query.device)
    per_reference = torch.zeros(len(b), dtype=torch.int64, device=query.device)
    for first in range(0, len(a), block):
        for start in range(0, len(b), 2 * block):
            columns = slice(start, start + 2 * block)
            gap = distances_reference(a[first : first + block], b[columns])
            inside = gap < radii[columns]
            per_query[first : first + block] += inside.sum(1)
            per_reference[columns] += inside.sum(0)
    return per_query, per_reference


def neighbour_pairs_reference(
    x: Tensor, y: Tensor, reach_x: Tensor, reach_y: Tensor, block: int = _ROWS
) -> tuple[Pairs, Pairs]:
    """`neighbour_pairs` in plain torch and float64."""
    return _pairs_of_centred(*_centred(x, y), reach_x, reach_y, block)


def _pairs_of_centred(
    a: Tensor, b: Tensor, reach_x: Tensor, reach_y: Tensor, block: int
) -> tuple[Pairs, Pairs]:
    parts: tuple[list, list] = ([], [])
    for first in range(0, len(a), block):
        gap = distances_reference(a[first : first + block], b)
        reaches = reach_x[first : first + block, None], reach_y[None, :]
        for into, reach in zip(parts, reaches, strict=True):
            i, j = torch.nonzero(gap < reach, as_tuple=True)
            into.append((i + first, j, gap[i, j]))
    none = torch.empty(0, dtype=torch.int64, device=a.device)
    nothing = (none, none, none.to(torch.float32))
    one, two = (
        tuple(map(torch.cat, zip(*part, strict=True))) if part else nothing for part in parts
    )
    return one, two


class _Screen:
    """Both sets as the C++ kernels take them: rows as given, centred rows, norms, error bounds."""

    def __init__(self, x: Tensor, y: Tensor | None) -> None:
        self.y = (x if y is None else y).to(torch.float32).contiguous()
        self.width = x.shape[1]
        self.centre = torch.zeros(self.width, dtype=torch.float64)
        for rows in self.y.split(4 * _ROWS):
            self.centre += rows.sum(0, dtype=torch.float64) / max(1, len(self.y))
        self.b, self.column_norms = self._around(self.y, self.centre)
        self.relative = 1.01 * (self.width + 16) * 2.0**-24
        self.absolute = 1e-36  # below it float32 is no longer spaced relatively
        self._columns_fit = self.relative < 0.1 and bool((self.column_norms <= _LARGEST).all())
        if y is None:
            self._take(self.y, self.b, self.column_norms)
        else:
            self._take(x)

    def with_rows(self, x: Tensor) -> "_Screen":
        """The screen of other rows, with the columns that are prepared."""
        other = copy.copy(self)
        other._take(x)
        return other

    def _take(self, x: Tensor, *moved: Tensor) -> None:
        self.x = x.to(torch.float32).contiguous()
        self.a, self.row_norms = moved or self._around(self.x, self.centre)
        # Also wrong where a number is not finite.
        self.fits = self._columns_fit and bool((self.row_norms <= _LARGEST).all())
        self.gram = torch.empty(
            min(_ROWS, len(self.x)) * min(_COLUMNS, len(self.y)), dtype=torch.float32
        )

    @staticmethod
    def _around(x: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
        """(float32 rows around the centre, their squared norms from float64)."""
        moved, norms = torch.empty_like(x), x.new_empty(len(x))
        for first in range(0, len(x), _ROWS):
            rows = slice(first, first + _ROWS)
            moved[rows] = x[rows].to(torch.float64) - centre
            norms[rows] = moved[rows].to(torch.float64).square().sum(1)
        return moved, norms

    def row_blocks(self) -> Iterator[slice]:
        for first in range(0, len(self.x), _ROWS):
            yield slice(first, min(first + _ROWS, len(self.x)))

    def column_blocks(self) -> Iterator[slice]:
        for first in range(0, len(self.y), _COLUMNS):
            yield slice(first, min(first + _COLUMNS, len(self.y)))

    def block(self, rows: slice, columns: slice) -> tuple:
        """One block's products, and the addresses of what they were made from."""
        a, b = self.a[rows], self.b[columns]
        gram = self.gram[: len(a) * len(b)].view(len(a), len(b))
        torch.mm(a, b.T, out=gram)
        norms = self.row_norms[rows].data_ptr(), self.column_norms[columns].data_ptr()
        given = self.x[rows].data_ptr(), self.y[columns].data_ptr()
        shape = (len(a), len(b), self.width)
        return shape, (gram.data_ptr(), *norms, *given), self.relative, self.absolute


class _FullProducts:
    """Matrix products in float32 proper, whatever the process allows elsewhere."""

    def __enter__(self) -> None:
        self.before = torch.get_float32_matmul_precision()
        if self.before != "highest":
            torch.set_float32_matmul_precision("highest")
        self.cast = torch.autocast("cpu", enabled=False)
        self.cast.__enter__()

    def __exit__(self, *error: object) -> None:
        self.cast.__exit__(*error)
        if self.before != "highest":
            torch.set_float32_matmul_precision(self.before)


_library = torch.library.Library("etude", "FRAGMENT")
_library.define("nearest_neighbours(Tensor x, Tensor? y, int k) -> (Tensor, Tensor)")
_library.define(
    "membership_counts(Tensor query, Tensor reference, Tensor radii) -> (Tensor, Tensor)"
)
ops = torch.ops.etude


def _nearest_cpu(x: Tensor, y: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    distance = x.new_empty((len(x), k), dtype=torch.float32)
    index = x.new_empty((len(x), k), dtype=torch.int64)
    screen = _Screen(x, y)
    if not screen.fits:
        return nearest_neighbours_reference(x, y, k)
    cpp, threads = backends.cpp(), torch.get_num_threads()
    with _FullProducts():
        for rows in screen.row_blocks():
            lists = cpp.open_lists(rows.stop - rows.start, k)
            itself = rows.start if y is None else -(1 << 62)
            for columns in screen.column_blocks():
                block = screen.block(rows, columns)
                cpp.nearest_scan(block, lists, k, columns.start, itself, threads)
            cpp.nearest_finish(
                lists,
                rows.stop - rows.start,
                k,
                screen.width,
                screen.x[rows].data_ptr(),
                screen.y.data_ptr(),
                distance[rows].data_ptr(),
                index[rows].data_ptr(),
                threads,
            )
    if backends.verifying():
        want = nearest_neighbours_reference(x, y, k)[0]
        backends.verify("C++ nearest_neighbours", ("distance",), (distance,), (want,))
    return distance, index


def _counts_cpu(query: Tensor, reference: Tensor, radii: Tensor) -> tuple[Tensor, Tensor]:
    screen = _Screen(query, reference)
    if not screen.fits:
        return membership_counts_reference(query, reference, radii)
    per_query = torch.zeros(len(query), dtype=torch.int64)
    per_reference = torch.zeros(len(reference), dtype=torch.int64)
    radii = radii.contiguous()
    # A distance is rounded to float32 before it is compared: a margin of a few units around.
    squares = radii.double().clamp_min(0).square()  # nothing is closer than a negative radius
    inside = (squares * (1 - 2.0**-20)).float()
    outside = (squares * (1 + 2.0**-20)).float()
    cpp, threads = backends.cpp(), torch.get_num_threads()
    with _FullProducts():
        for rows in screen.row_blocks():
            for columns in screen.column_blocks():
                bounds = (t[columns].data_ptr() for t in (radii, inside, outside))
                made = per_query[rows].data_ptr(), per_reference[columns].data_ptr()
                cpp.count_scan(screen.block(rows, columns), *bounds, *made, threads)
    if backends.verifying():
        want = membership_counts_reference(query, reference, radii)
        got = (per_query.float(), per_reference.float())
        names = ("per_query", "per_reference")
        backends.verify("C++ membership_counts", names, got, [w.float() for w in want])
    return per_query, per_reference


_library.impl("nearest_neighbours", _nearest_cpu, "CPU")
_library.impl("membership_counts", _counts_cpu, "CPU")


@torch.library.register_fake("etude::nearest_neighbours", lib=_library)
def _(x, y, k):
    return x.new_empty((x.shape[0], k), dtype=torch.float32), x.new_empty(
        (x.shape[0], k), dtype=torch.int64
    )


@torch.library.register_fake("etude::membership_counts", lib=_library)
def _(query, reference, radii):
    counts = [t.new_empty((t.shape[0],), dtype=torch.int64) for t in (query, reference)]
    return counts[0], counts[1]


class NearPairs:
    """`neighbour_pairs` of any blocks of rows x with one set y, which is prepared once."""

    def __init__(self, y: Tensor, reach_y: Tensor) -> None:
        self.y, self.reach_y = y, reach_y.contiguous()
        kinds = (torch.int64, torch.int64, torch.float32, torch.uint8)
        self._room = [torch.empty(64 * _ROWS, dtype=kind) for kind in kinds]

    @torch.no_grad()
    def lists(self, x: Tensor, reach_x: Tensor) -> tuple[Pairs, Pairs]:
        """The two lists of `neighbour_pairs`."""
        screen = self._screen_of(x)
        if screen is None:
            return _pairs_of_centred(self._wide(x), self._wide_y, reach_x, self.reach_y, _ROWS)
        parts = [
            (i + rows.start, j + columns.start, d.clone(), whose.clone())
            for rows, columns, (i, j, d, whose) in self._scan(screen, reach_x)
        ]
        i, j, d, whose = (torch.cat(part) for part in zip(*parts, strict=True))
        # Blocks of columns come one after another: order the pairs by rows, then columns.
        order = torch.argsort(i * len(self.y) + j)
        i, j, d, whose = (t[order] for t in (i, j, d, whose))
        first, second = (whose & 1).bool(), (whose & 2).bool()
        return (i[first], j[first], d[first]), (i[second], j[second], d[second])

    @torch.no_grad()
    def distances(
        self, x: Tensor, reach_x: Tensor, sure_x: Tensor, sure_y: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Distances (N, M) float32 of the pairs of the first list and of the second, infinite for
        all others.

        Where almost all pairs are near, most of the time would go into distances in float64.
        `sure_x` (N,) and `sure_y` (M,) say from where on they matter: pairs that are seen to be
        closer may have any smaller distance.
        """
        screen = self._screen_of(x)
        if screen is None:
            gap = distances_reference(self._wide(x), self._wide_y)
            reaches = reach_x[:, None], self.reach_y
            return tuple(gap.masked_fill(gap >= reach, torch.inf) for reach in reaches)
        ends = [
            (sure.double().clamp_min(0).square() * (1 - 2.0**-20)).float()
            for sure in (sure_x, sure_y)
        ]
        ends += [
            (reach.double().clamp_min(0).square() * (1 + 2.0**-20)).float() + screen.absolute
            for reach in (reach_x, self.reach_y)
        ]
        first, second = (
            torch.full((len(x), len(self.y)), torch.inf, dtype=torch.float32) for _ in range(2)
        )

        def decide(rows: slice, columns: slice, gram: Tensor) -> None:
            scale = screen.row_norms[rows, None] + screen.column_norms[columns]
            square, margin = scale - 2.0 * gram, scale * screen.relative + screen.absolute
            low, high = square - margin, square + margin
            in_x, in_y = high < ends[0][rows, None], high < ends[1][columns]
            known = (in_x | (low > ends[2][rows, None])) & (in_y | (low > ends[3][columns]))
            first[rows, columns].masked_fill_(in_x & known, 0.0)
            second[rows, columns].masked_fill_(in_y & known, 0.0)
            gram.masked_fill_(known, -_LARGEST)  # now far away, and passed over by the scan

        for rows, columns, (i, j, d, whose) in self._scan(screen, reach_x, decide):
            for bit, found in ((1, first), (2, second)):
                own = (whose & bit).bool()
                found[rows, columns][i[own], j[own]] = d[own]
        return first, second

    def _scan(
        self,
        screen: _Screen,
        reach_x: Tensor,
        decide: Callable[[slice, slice, Tensor], None] | None = None,
    ) -> Iterator[tuple[slice, slice, tuple[Tensor, ...]]]:
        """Blocks of rows and columns with their pairs: places in the block, distance, and whose
        (1: the row's, 2: the column's); these tensors are filled again by the next block.

        Args:
            decide: sees the products of a block first, and may change them.
        """
        cpp, threads, reach_x = backends.cpp(), torch.get_num_threads(), reach_x.contiguous()
        for rows in screen.row_blocks():
            for columns in screen.column_blocks():
                with _FullProducts():
                    block = screen.block(rows, columns)
                if decide is not None:
                    (height, width), gram = block[0][:2], screen.gram
                    decide(rows, columns, gram[: height * width].view(height, width))
                reaches = reach_x[rows].data_ptr(), self.reach_y[columns].data_ptr()
                while True:
                    to = (t.data_ptr() for t in self._room)
                    count = cpp.pair_scan(block, *reaches, len(self._room[0]), *to, threads)
                    if count <= len(self._room[0]):
                        break
                    self._room = [torch.empty(2 * count, dtype=t.dtype) for t in self._room]
                yield rows, columns, tuple(t[:count] for t in self._room)

    def _screen_of(self, x: Tensor) -> _Screen | None:
        """The screen of rows x; None where the reference is to be taken."""
        if _pick("neighbour_pairs", x, self.y, twins=("cpp",)) != "cpp":
            return None
        if not len(x) or not len(self.y):
            return None
        screen = self._screen.with_rows(x)
        return screen if screen.fits else None

    @cached_property
    def _screen(self) -> _Screen:
        return _Screen(self.y[:0], self.y)

    @cached_property
    def _wide_y(self) -> Tensor:
        return self._wide(self.y)

    def _wide(self, x: Tensor) -> Tensor:
        return x.to(torch.float64) - self._centre

    @cached_property
    def _centre(self) -> Tensor:
        return self.y.to(torch.float64).mean(0)


def _check(op: str, **rows: Tensor | None) -> None:
    """Sets of rows (N, D) of one width and one device; ValueError with one sentence."""
    lead = next(iter(rows.values()))
    for name, t in rows.items():
        if t is None:
            continue
        if t.dim() != 2 or t.shape[1] != lead.shape[1]:
            shape = "(N, D)" if t is lead else f"(M, {lead.shape[1]})"
            raise ValueError(f"{op}: {name} must be {shape}, got {tuple(t.shape)}")
        if t.dtype not in _FLOATS or t.device != lead.device:
            raise ValueError(
                f"{op}: {name} is {t.dtype} on {t.device}; floats on {lead.device} are needed"
            )


def _check_radii(op: str, name: str, radii: Tensor, rows: Tensor) -> None:
    if tuple(radii.shape) != (len(rows),) or radii.dtype != torch.float32:
        shape = tuple(radii.shape)
        raise ValueError(f"{op}: {name} must be ({len(rows)},) float32, got {shape} {radii.dtype}")
    if radii.device != rows.device:
        raise ValueError(f"{op}: {name} is on {radii.device}, the rows are on {rows.device}")


def _pick(op: str, *sets: Tensor | None, twins: tuple[str, ...] = _TWINS) -> str:
    """16-bit floats are widened exactly, so what counts is whether there is a float64."""
    wide = [t for t in sets if t is not None and t.dtype == torch.float64]
    kind = torch.float64 if wide else torch.float32
    return backends.pick(op, sets[0].device.type, kind, twins=twins)


@torch.no_grad()
def nearest_neighbours(x: Tensor, y: Tensor | None = None, *, k: int = 1) -> tuple[Tensor, Tensor]:
    """Distances (N, k) float32, ascending, and rows (N, k) int64 of the k nearest of every x_i.

    x: (N, D), y: (M, D), any float type and strides; without y the neighbours are the other rows
    of x. float64 rows run the reference. Has no gradient. Errors: ValueError for shapes, dtypes or
    devices that do not fit together, and for fewer than k rows to choose from.
    """
    _check("nearest_neighbours", x=x, y=y)
    others = len(x) - 1 if y is None else len(y)
    if not 1 <= k <= MOST or (len(x) and k > others):
        raise ValueError(
            f"nearest_neighbours: k={k} of {max(others, 0)} rows; it may be 1 to {MOST}"
        )
    backend = _pick("nearest_neighbours", x, y)
    if backend == "triton":
        from . import knn_triton

        return knn_triton.nearest_neighbours(x, y, k)
    if backend == "cuda":
        from . import knn_cuda

        return knn_cuda.nearest_neighbours(x, y, k)
    if backend == "cpp" and len(x):
        return ops.nearest_neighbours(x, y, k)
    return nearest_neighbours_reference(x, y, k)


def knn_radii(x: Tensor, k: int) -> Tensor:
    """Distance (N,) float32 of every row of x (N, D) to its k-th nearest other row.

    Dtypes, strides and errors as in `nearest_neighbours`.
    """
    return nearest_neighbours(x, k=k)[0][:, k - 1]


@torch.no_grad()
def membership_counts(query: Tensor, reference: Tensor, radii: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) and (M,) int64: balls of the reference around each query, and queries in each ball.

    query: (N, D); reference: (M, D); radii: (M,) float32. A query is inside where its distance is
    smaller than the radius, strictly. Dtypes, strides and errors as in `nearest_neighbours`.
    """
    _check("membership_counts", query=query, reference=reference)
    _check_radii("membership_counts", "radii", radii, reference)
    backend = _pick("membership_counts", query, reference)
    if backend == "triton":
        from . import knn_triton

        return knn_triton.membership_counts(query, reference, radii)
    if backend == "cuda":
        from . import knn_cuda

        return knn_cuda.membership_counts(query, reference, radii)
    if backend == "cpp" and len(query) and len(reference):
        return ops.membership_counts(query, reference, radii)
    return membership_counts_reference(query, reference, radii)


@torch.no_grad()
def neighbour_pairs(x: Tensor, y: Tensor, reach_x: Tensor, reach_y: Tensor) -> tuple[Pairs, Pairs]:
    """The pairs (i, j, distance) closer than reach_x[i], and those closer than reach_y[j].

    x: (N, D); y: (M, D); reach_x: (N,), reach_y: (M,) float32. Each list is three tensors (P,) of
    int64, int64 and float32, ordered by i, then j; its length depends on the data. Dtypes, strides
    and errors as in `nearest_neighbours`.
    """
    _check("neighbour_pairs", x=x, y=y)
    _check_radii("neighbour_pairs", "reach_x", reach_x, x)
    _check_radii("neighbour_pairs", "reach_y", reach_y, y)
    return NearPairs(y, reach_y).lists(x, reach_x)


OPERATORS = (
    Operator("nearest_neighbours", "k nearest rows, no N x M matrix", _TWINS),
    Operator("membership_counts", "rows inside k-nearest-neighbour balls", _TWINS),
    Operator("neighbour_pairs", "pairs closer than either row's radius", ("cpp",)),
)
