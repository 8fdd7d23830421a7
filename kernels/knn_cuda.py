"""CUDA twin of `knn.membership_counts`: the kernel of `csrc/cuda/knn.cu`, registered on first use.

Unlike the Triton twin's, its distances are float64 and so the reference's: no pair falls on the
other side of a radius.
"""

import torch
from torch import Tensor

from . import backends, knn
from .cuda_calls import place

_TILE = 64  # queries, and balls, of a block


def membership_counts(query: Tensor, reference: Tensor, radii: Tensor) -> tuple[Tensor, Tensor]:
    """`knn.membership_counts`, arguments checked."""
    if 0 in query.shape or 0 in reference.shape:
        return knn.membership_counts_reference(query, reference, radii)
    return torch.ops.etude.cuda_membership_counts(query, reference, radii)


def _norms(rows: Tensor, centre: Tensor) -> Tensor:
    """Squared norms of centred rows, a block at a time: no float64 copy of a set is made."""
    return torch.cat([(part.double() - centre).square().sum(1) for part in rows.split(8192)])


def _counts(query: Tensor, reference: Tensor, radii: Tensor) -> tuple[Tensor, Tensor]:
    a, b = (t.to(torch.float32).contiguous() for t in (query, reference))
    N, D = a.shape
    M = b.shape[0]
    centre = b.mean(0, dtype=torch.float64)
    norms = _norms(a, centre), _norms(b, centre)
    per_query = a.new_empty((-(-M // _TILE), N), dtype=torch.uint8)
    per_reference = a.new_empty((-(-N // _TILE), M), dtype=torch.uint8)
    tensors = [a, b, centre, *norms, radii.contiguous(), per_query, per_reference]
    memory = [t.data_ptr() for t in tensors]
    backends.cuda().membership_counts((N, M, D), memory, place(a))
    made = tuple(part.sum(0, dtype=torch.int64) for part in (per_query, per_reference))
    if backends.verifying():
        want = knn.membership_counts_reference(query, reference, radii)
        got, names = [t.float() for t in made], ("per_query", "per_reference")
        backends.verify("CUDA membership_counts", names, got, [w.float() for w in want])
    return made


_library = torch.library.Library("etude", "FRAGMENT")
_library.define(
    "cuda_membership_counts(Tensor query, Tensor reference, Tensor radii) -> (Tensor, Tensor)"
)
_library.impl("cuda_membership_counts", _counts, "CUDA")


@torch.library.register_fake("etude::cuda_membership_counts", lib=_library)
def _(query, reference, radii):
    counts = [t.new_empty((t.shape[0],), dtype=torch.int64) for t in (query, reference)]
    return counts[0], counts[1]
