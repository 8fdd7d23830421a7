"""Mean and scatter matrix of rows of features, in float64; called by engine/metrics/moments.py.

For x of (N, D):

    mean = sum_n x_n / N,        scatter = sum_n (x_n - mean)(x_n - mean)^T

so scatter / (N - 1) is the covariance. Two passes (Chan, Golub and LeVeque, "Algorithms for
Computing the Sample Variance", 1983): centred first, a mean far from zero costs no digits. Parts of
a set merge by the same paper's formula with delta = mean_b - mean_a and n = n_a + n_b:

    mean = mean_a + delta n_b / n,   scatter = scatter_a + scatter_b + delta delta^T n_a n_b / n

All sums are float64. With u = 2^-53 and sigma_i^2 = scatter_ii, an entry of scatter is off by at
most about (N + 3) u sigma_i sigma_j from rounding the sums in whatever order, plus N e_i e_j from
e, the error of the mean, |e_i| <= (N + 1) u max |x_i|; merging parts in any order adds a few u of
the parts' entries each time. So two ways of computing agree to N u relative to sigma_i sigma_j,
typically to its square root, and a way repeats its bits.

The C++ twin computes the upper triangle alone, straight from float32 rows; the Triton and
CUDA twins too, on the double-precision units.
"""

import torch
from torch import Tensor

from . import backends
from .catalogue import Operator

_BLOCK = 8192  # rows that the reference widens at a time
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def moments_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """`moments` in plain torch, `_BLOCK` rows at a time."""
    N, D = x.shape
    mean = x.new_zeros(D, dtype=torch.float64)
    scatter = x.new_zeros((D, D), dtype=torch.float64)
    if N == 0:
        return mean, scatter
    for rows in x.split(_BLOCK):
        mean = mean + rows.sum(0, dtype=torch.float64)
    mean = mean / N
    for rows in x.split(_BLOCK):
        centred = rows.to(torch.float64) - mean
        scatter.addmm_(centred.T, centred)
    return mean, scatter


_library = torch.library.Library("etude", "FRAGMENT")
_library.define("moments(Tensor x) -> (Tensor, Tensor)")
_library.define("triton_moments(Tensor x) -> (Tensor, Tensor)")
_library.define("cuda_moments(Tensor x) -> (Tensor, Tensor)")
ops = torch.ops.etude


def _made(x: Tensor) -> tuple[Tensor, Tensor]:
    D = x.shape[1]
    return x.new_empty((D,), dtype=torch.float64), x.new_empty((D, D), dtype=torch.float64)


def _moments_cpu(x: Tensor) -> tuple[Tensor, Tensor]:
    mean, scatter = _made(x)
    if x.numel() == 0:
        return mean.zero_(), scatter.zero_()
    wide = x.to(torch.float32)
    wide = wide if wide.stride(1) == 1 else wide.contiguous()
    backends.cpp().moments(
        *wide.shape,
        wide.data_ptr(),
        wide.stride(0),
        mean.data_ptr(),
        scatter.data_ptr(),
        torch.get_num_threads(),
    )
    if backends.verifying():
        verify("C++ moments", x, mean, scatter)
    return mean, scatter


def verify(op: str, x: Tensor, mean: Tensor, scatter: Tensor) -> None:
    """Compare with the reference; scatter relative to the deviations of its row and column."""
    want_mean, want = moments_reference(x)
    size = want.diagonal().sqrt()
    scale = torch.outer(size, size).clamp_min(1e-300)
    names = ("mean", "scatter")
    got = (mean.float(), (scatter / scale).float())
    backends.verify(op, names, got, (want_mean.float(), (want / scale).float()))


_library.impl("moments", _moments_cpu, "CPU")


@torch.library.register_fake("etude::moments", lib=_library)
def _(x):
    return _made(x)


@torch.library.register_fake("etude::triton_moments", lib=_library)
@torch.library.register_fake("etude::cuda_moments", lib=_library)
def _(x):
    return _made(x)


@torch.no_grad()
def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """(mean (D,), scatter (D, D)) float64 of x (N, D), any float type; zeros for no rows.

    Any strides; float64 rows run the reference. Has no gradient. Errors: ValueError for anything
    but a matrix of floats; RuntimeError for a backend asked for by name that cannot run.
    """
    if x.dim() != 2 or x.dtype not in _FLOATS:
        raise ValueError(f"moments: x must be (N, D) of floats, got {tuple(x.shape)} {x.dtype}")
    # 16-bit floats are widened exactly, so only float64 is beyond the twins.
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    backend = backends.pick("moments", x.device.type, kind, twins=_TWINS)
    if backend == "triton":
        from . import statistics_triton  # noqa: F401

        return ops.triton_moments(x)
    if backend == "cuda":
        from . import statistics_cuda  # noqa: F401

        return ops.cuda_moments(x)
    if backend == "cpp":
        return ops.moments(x)
    return moments_reference(x)


_TWINS = ("cpp", "triton", "cuda")
OPERATORS = (Operator("moments", "mean and scatter matrix of rows, in float64", _TWINS),)
