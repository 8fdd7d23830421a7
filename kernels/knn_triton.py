"""Triton twins of `knn.py`: products, selection and counting in one kernel, no N x M matrix.

Products are of centred float32 rows by three TF32 products each ("tf32x3"), which keeps nearly all
of float32's digits on tensor cores. `nearest_kernel` keeps, for 64 rows at a time, the KEEP columns
with the smallest |a|^2 + |b|^2 - 2 a.b seen so far: each tile's best are merged with them by a
bitonic network, on whole numbers that hold a distance's bits above and its index below, so that
ties have an order and no value needs a second array. `exact_kernel` then computes the KEEP
distances from the rows as given, by differences in float64, and the k smallest of them are the
answer. Distances are exact, equal rows at 0; a neighbour can only be missed if more than
KEEP - k >= 16 other rows lie within the screen's error (`knn.py`: about c (|a|^2 + |b|^2)) of the
k-th.

`count_kernel` compares |a|^2 + |b|^2 - 2 a.b with the squared radius: pairs closer to it than the
same error may fall on the other side. Counts of a tile fit a byte; they are added in order
afterwards. No atomics: bits repeat.

TRITON_INTERPRET=1 runs the kernels in Python on CPU tensors.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import backends, knn
from .compiling import Build

MOST = 32  # neighbours; more take the reference
_NONE = tl.constexpr(-(1 << 63))


@dataclass(frozen=True)
class LaunchConfig:
    """A tile of products, its step along the width, and the warps that hold it."""

    rows: int = 64
    columns: int = 64
    depth: int = 16  # twice that spills on sm_80: three products need both halves of two tiles
    warps: int = 8

    @classmethod
    def counting(cls) -> "LaunchConfig":
        """Larger: it keeps no candidates. With 128 columns or fewer, counts fit a byte."""
        return cls(128, 64, 32, 8)


def kept(k: int) -> int:
    """How many candidates are kept for k neighbours: a power of two, at least 16 more."""
    return max(32, triton.next_power_of_2(k + 16))


@triton.jit
def _products(
    a_ptr, b_ptr, rows, columns, N, M, D,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Inner products (ROWS, COLUMNS) of contiguous rows of two matrices."""
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    a_ptr += (rows.to(tl.int64) * D)[:, None]
    b_ptr += (columns.to(tl.int64) * D)[None, :]
    for start in range(0, D, DEPTH):
        d = start + tl.arange(0, DEPTH)
        a = tl.load(a_ptr + d[None, :], mask=(rows < N)[:, None] & (d < D)[None, :], other=0.0)
        b = tl.load(b_ptr + d[:, None], mask=(columns < M)[None, :] & (d < D)[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="tf32x3")
    return total


@triton.jit
def nearest_kernel(
    a_ptr, b_ptr, row_norms_ptr, column_norms_ptr, out_ptr, N, M, D,
    OWN: tl.constexpr, KEEP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out (N, KEEP) int64: the columns with the smallest approximate distances, in any order."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_norms = tl.load(row_norms_ptr + rows, mask=rows < N, other=0.0)
    # Keys are negated (bit by bit), so that the smallest distance is the largest number.
    best = tl.full([ROWS, KEEP], _NONE, dtype=tl.int64)
    for first in range(0, M, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        gram = _products(a_ptr, b_ptr, rows, columns, N, M, D, ROWS, COLUMNS, DEPTH)
        column_norms = tl.load(column_norms_ptr + columns, mask=columns < M, other=0.0)
        squared = tl.maximum(row_norms[:, None] + column_norms[None, :] - 2.0 * gram, 0.0)
        key = squared.to(tl.int32, bitcast=True).to(tl.int64) << 32
        live = (columns < M)[None, :] & (rows < N)[:, None]
        if OWN:
            live = live & (rows[:, None] != columns[None, :])
        key = tl.where(live, ~(key | columns.to(tl.int64)[None, :]), _NONE)
        found = tl.topk(key, KEEP)
        best = tl.topk(tl.reshape(tl.join(best, found), [ROWS, 2 * KEEP]), KEEP)
    index = ~best & 0xFFFFFFFF
    # M stands for a slot that nothing filled.
    index = tl.where(best == _NONE, M.to(tl.int64), index)
    at = out_ptr + (rows.to(tl.int64) * KEEP)[:, None] + tl.arange(0, KEEP)[None, :]
    tl.store(at, index, mask=(rows < N)[:, None])


@triton.jit
def exact_kernel(
    x_ptr, y_ptr, index_ptr, distance_ptr, M, D,
    KEEP: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """distance (N, KEEP) float32 of row n and its candidates; infinite where there is none."""
    n = tl.program_id(0).to(tl.int64)
    slots = n * KEEP + tl.arange(0, KEEP)
    index = tl.load(index_ptr + slots)
    total = tl.zeros([KEEP], dtype=tl.float64)
    for start in range(0, D, DEPTH):
        d = start + tl.arange(0, DEPTH)
        x = tl.load(x_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float64)
        live = (index < M)[:, None] & (d < D)[None, :]
        y = tl.load(y_ptr + (index * D)[:, None] + d[None, :], mask=live, other=0.0)
        gap = tl.where(live, x[None, :] - y.to(tl.float64), 0.0)
        total += tl.sum(gap * gap, axis=1)
    distance = tl.sqrt(total).to(tl.float32)
    tl.store(distance_ptr + slots, tl.where(index < M, distance, float("inf")))


@triton.jit
def count_kernel(
    a_ptr, b_ptr, row_norms_ptr, column_norms_ptr, squares_ptr, per_row_ptr, per_column_ptr,
    N, M, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile's counts: per_row (column tiles, N) and per_column (row tiles, M), uint8."""
    i = tl.program_id(0)
    j = tl.program_id(1)
    rows = i * ROWS + tl.arange(0, ROWS)
    columns = j * COLUMNS + tl.arange(0, COLUMNS)
    gram = _products(a_ptr, b_ptr, rows, columns, N, M, D, ROWS, COLUMNS, DEPTH)
    row_norms = tl.load(row_norms_ptr + rows, mask=rows < N, other=0.0)
    column_norms = tl.load(column_norms_ptr + columns, mask=columns < M, other=0.0)
    squares = tl.load(squares_ptr + columns, mask=columns < M, other=0.0)
    squared = tl.maximum(row_norms[:, None] + column_norms[None, :] - 2.0 * gram, 0.0)
    live = (columns < M)[None, :] & (rows < N)[:, None]
    inside = (live & (squared < squares[None, :])).to(tl.int32)
    at = per_row_ptr + j.to(tl.int64) * N + rows
    tl.store(at, tl.sum(inside, axis=1).to(tl.uint8), mask=rows < N)
    at = per_column_ptr + i.to(tl.int64) * M + columns
    tl.store(at, tl.sum(inside, axis=0).to(tl.uint8), mask=columns < M)


def _ready(x: Tensor, y: Tensor | None) -> tuple[Tensor, ...]:
    """(x, y, a, b, row norms, column norms): float32 rows as given, and centred."""
    x = x.to(torch.float32).contiguous()
    y = x if y is None else y.to(torch.float32).contiguous()
    centre = y.mean(0, dtype=torch.float64)

    def around(rows: Tensor) -> tuple[Tensor, Tensor]:
        parts = [(part.to(torch.float64) - centre).float() for part in rows.split(8192)]
        moved = torch.cat(parts) if parts else rows
        norms = [part.to(torch.float64).square().sum(1) for part in moved.split(8192)]
        return moved, torch.cat(norms).float()

    a, row_norms = around(x)
    b, column_norms = (a, row_norms) if y is x else around(y)
    return x, y, a, b, row_norms, column_norms


def nearest_neighbours(x: Tensor, y: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """`knn.nearest_neighbours`, arguments checked."""
    if k > MOST or 0 in x.shape or (y is not None and 0 in y.shape):
        return knn.nearest_neighbours_reference(x, y, k)
    return torch.ops.etude.triton_nearest_neighbours(x, y, k)


def membership_counts(query: Tensor, reference: Tensor, radii: Tensor) -> tuple[Tensor, Tensor]:
    """`knn.membership_counts`, arguments checked."""
    if 0 in query.shape or 0 in reference.shape:
        return knn.membership_counts_reference(query, reference, radii)
    return torch.ops.etude.triton_membership_counts(query, reference, radii)


@backends.on_its_device
def _nearest(x: Tensor, y: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    own, keep, config = y is None, kept(k), LaunchConfig()
    x, y, a, b, row_norms, column_norms = _ready(x, y)
    N, M, D = len(x), len(y), x.shape[1]
    index = x.new_empty((N, keep), dtype=torch.int64)
    distance = x.new_empty((N, keep))
    nearest_kernel[(triton.cdiv(N, config.rows),)](
        a, b, row_norms, column_norms, index, N, M, D, OWN=own, KEEP=keep,
        ROWS=config.rows, COLUMNS=config.columns, DEPTH=config.depth, num_warps=config.warps,
    )  # fmt: skip
    exact_kernel[(N,)](x, y, index, distance, M, D, KEEP=keep, DEPTH=64, num_warps=4)
    keys = distance.view(torch.int32).long() * knn._KEY + index
    keys = keys.sort(dim=1).values[:, :k]
    found = (keys // knn._KEY).to(torch.int32).view(torch.float32), keys % knn._KEY
    if backends.verifying():
        want = knn.nearest_neighbours_reference(x, None if own else y, k)[0]
        backends.verify("triton nearest_neighbours", ("distance",), found[:1], (want,))
    return found


@backends.on_its_device
def _counts(query: Tensor, reference: Tensor, radii: Tensor) -> tuple[Tensor, Tensor]:
    config = LaunchConfig.counting()
    _, _, a, b, row_norms, column_norms = _ready(query, reference)
    N, M, D = len(a), len(b), a.shape[1]
    grid = (triton.cdiv(N, config.rows), triton.cdiv(M, config.columns))
    per_row = a.new_empty((grid[1], N), dtype=torch.uint8)
    per_column = a.new_empty((grid[0], M), dtype=torch.uint8)
    squares = radii.double().clamp_min(0).square().float()
    count_kernel[grid](
        a, b, row_norms, column_norms, squares, per_row, per_column, N, M, D,
        ROWS=config.rows, COLUMNS=config.columns, DEPTH=config.depth, num_warps=config.warps,
    )  # fmt: skip
    return per_row.sum(0, dtype=torch.int64), per_column.sum(0, dtype=torch.int64)


_library = torch.library.Library("etude", "FRAGMENT")
_library.define("triton_nearest_neighbours(Tensor x, Tensor? y, int k) -> (Tensor, Tensor)")
_library.define(
    "triton_membership_counts(Tensor query, Tensor reference, Tensor radii) -> (Tensor, Tensor)"
)
for _key in ("CUDA", "CPU") if backends.interpreting() else ("CUDA",):
    _library.impl("triton_nearest_neighbours", _nearest, _key)
    _library.impl("triton_membership_counts", _counts, _key)


@torch.library.register_fake("etude::triton_nearest_neighbours", lib=_library)
def _(x, y, k):
    made = [x.new_empty((x.shape[0], k), dtype=kind) for kind in (torch.float32, torch.int64)]
    return made[0], made[1]


@torch.library.register_fake("etude::triton_membership_counts", lib=_library)
def _(query, reference, radii):
    counts = [t.new_empty((t.shape[0],), dtype=torch.int64) for t in (query, reference)]
    return counts[0], counts[1]


def builds() -> list[Build]:
    """Inception's 2048 features and k = 5, for `compiling`."""
    made = []
    for name, kernel, config in (
        ("nearest D=2048 k=5", nearest_kernel, LaunchConfig()),
        ("count D=2048", count_kernel, LaunchConfig.counting()),
    ):
        constants = {"ROWS": config.rows, "COLUMNS": config.columns, "DEPTH": config.depth}
        if kernel is nearest_kernel:
            constants |= {"OWN": True, "KEEP": kept(5)}
        types = {n: "*fp32" for n in kernel.arg_names if n.endswith("_ptr")}
        types |= {"N": "i32", "M": "i32", "D": "i32"}
        types |= {n: "*u8" for n in types if n.startswith("per_")}
        types |= {"out_ptr": "*i64"} if kernel is nearest_kernel else {}
        made.append(Build(name, kernel, types, constants, ("D",), config.warps))
    types = {"x_ptr": "*fp32", "y_ptr": "*fp32", "index_ptr": "*i64", "distance_ptr": "*fp32"}
    types |= {"M": "i32", "D": "i32"}
    constants = {"KEEP": kept(5), "DEPTH": 64}
    made.append(Build("exact D=2048 k=5", exact_kernel, types, constants, ("D",), 4))
    return made
