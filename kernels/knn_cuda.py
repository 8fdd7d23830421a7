"""CUDA twins of `knn.py`: the kernels of `csrc/cuda/knn.cu`, registered on first use.

Unlike the Triton twins', their products are float64 and so the reference's: no pair falls on the
other side of a radius, and a neighbour can only be missed where k others are as near within
1e-13 (|a|^2 + |b|^2), squared. The k distances themselves are then made anew by differences.
"""

import torch
from torch import Tensor

from . import backends, knn
from .cuda_calls import place

MOST = 32  # neighbours, one per lane of a warp; more take the reference
_TILE = 64  # queries, and references, of a block


def nearest_neighbours(x: Tensor, y: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """`knn.nearest_neighbours`, arguments checked."""
    if k > MOST or 0 in x.shape or (y is not None and 0 in y.shape):
        return knn.nearest_neighbours_reference(x, y, k)
    return torch.ops.etude.cuda_nearest_neighbours(x, y, k)


def membership_counts(query: Tensor, reference: Tensor, radii: Tensor) -> tuple[Tensor, Tensor]:
    """`knn.membership_counts`, arguments checked."""
    if 0 in query.shape or 0 in reference.shape:
        return knn.membership_counts_reference(query, reference, radii)
    return torch.ops.etude.cuda_membership_counts(query, reference, radii)


def _norms(rows: Tensor, centre: Tensor) -> Tensor:
    """Squared norms of centred rows, a block at a time: no float64 copy of a set is made."""
    return torch.cat([(part.double() - centre).square().sum(1) for part in rows.split(8192)])


def _sets(query: Tensor, reference: Tensor) -> tuple[tuple[int, int, int], list[Tensor]]:
    """(N, M, D) and what every kernel reads: both sets in float32, a centre, squared norms."""
    a = query.to(torch.float32).contiguous()
    b = a if reference is query else reference.to(torch.float32).contiguous()
    centre = b.mean(0, dtype=torch.float64)
    norms = _norms(a, centre)
    other = norms if b is a else _norms(b, centre)
    return (len(a), len(b), a.shape[1]), [a, b, centre, norms, other]


def split(N: int, M: int, k: int) -> tuple[int, int]:
    """(rows of y in a part, parts): how `nearest_neighbours` cuts y.

    The answer does not depend on it. Enough blocks for the largest GPUs where x is short, and else
    about 80 candidates per row: 640 bytes, beside the row itself.
    """
    row_tiles, tiles = -(-N // _TILE), -(-M // _TILE)
    wanted = min(tiles, max(80 // k, 1024 // row_tiles))
    each = -(-tiles // wanted)
    return each * _TILE, -(-tiles // each)


def _nearest(x: Tensor, y: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    shape, sets = _sets(x, x if y is None else y)
    N, M, _ = shape
    columns, parts = split(N, M, k)
    keys = x.new_empty((N, parts, k), dtype=torch.int64)
    distance = x.new_empty((N, k), dtype=torch.float32)
    index = x.new_empty((N, k), dtype=torch.int64)
    memory = [t.data_ptr() for t in (*sets, keys, distance, index)]
    backends.cuda().nearest_neighbours(shape, memory, k, y is None, columns, parts, place(sets[0]))
    if backends.verifying():
        want = knn.nearest_neighbours_reference(x, y, k)[0]
        backends.verify("CUDA nearest_neighbours", ("distance",), (distance,), (want,))
    return distance, index


def _counts(query: Tensor, reference: Tensor, radii: Tensor) -> tuple[Tensor, Tensor]:
    shape, sets = _sets(query, reference)
    N, M, _ = shape
    per_query = radii.new_empty((-(-M // _TILE), N), dtype=torch.uint8)
    per_reference = radii.new_empty((-(-N // _TILE), M), dtype=torch.uint8)
    sets += [radii.contiguous(), per_query, per_reference]
    memory = [t.data_ptr() for t in sets]
    backends.cuda().membership_counts(shape, memory, place(sets[0]))
    made = tuple(part.sum(0, dtype=torch.int64) for part in (per_query, per_reference))
    if backends.verifying():
        want = knn.membership_counts_reference(query, reference, radii)
        got, names = [t.float() for t in made], ("per_query", "per_reference")
        backends.verify("CUDA membership_counts", names, got, [w.float() for w in want])
    return made


_library = torch.library.Library("etude", "FRAGMENT")
_library.define("cuda_nearest_neighbours(Tensor x, Tensor? y, int k) -> (Tensor, Tensor)")
_library.define(
    "cuda_membership_counts(Tensor query, Tensor reference, Tensor radii) -> (Tensor, Tensor)"
)
_library.impl("cuda_nearest_neighbours", _nearest, "CUDA")
_library.impl("cuda_membership_counts", _counts, "CUDA")


@torch.library.register_fake("etude::cuda_nearest_neighbours", lib=_library)
def _(x, y, k):
    made = [x.new_empty((x.shape[0], k), dtype=kind) for kind in (torch.float32, torch.int64)]
    return made[0], made[1]


@torch.library.register_fake("etude::cuda_membership_counts", lib=_library)
def _(query, reference, radii):
    counts = [t.new_empty((t.shape[0],), dtype=torch.int64) for t in (query, reference)]
    return counts[0], counts[1]
