"""CUDA twin of `optimizer.py`: `csrc/cuda/optimizer.cu`, in float64 like the C++ twin and with its
bits, for GPUs whose float64 units keep up with their memory.

Two launches per 40 tensors, whose addresses travel as kernel parameters: a captured graph holds
them, and nothing is copied to the GPU or read back.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backends
from .cuda_calls import dtype_code, place
from .optimizer import register


def _number(value: Tensor | None, default: float) -> tuple[int, int, float]:
    """A 0-d tensor by its address: it is read on the GPU."""
    if value is None:
        return 0, 0, default
    return value.data_ptr(), dtype_code(value.dtype), 0.0


def launch(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Tensor],
    steps: Sequence[Tensor],
    copies: Sequence[Tensor],
    lr: Tensor,
    ema_decays: Sequence[Tensor],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step; the arguments are those of `optimizer.register`."""
    library = backends.cuda()
    count = len(params)
    rows = []
    for i, param in enumerate(params):
        copy = copies[i] if copies else None
        addresses = [t[i].data_ptr() for t in (params, grads, exp_avgs, exp_avg_sqs)]
        addresses += [0 if copy is None else copy.data_ptr(), steps[i].data_ptr()]
        averages = [t.data_ptr() for t in emas[i::count]]
        codes = dtype_code(grads[i].dtype), 0 if copy is None else dtype_code(copy.dtype)
        rows.append((addresses, averages, param.numel(), *codes))
    if found_inf is not None and found_inf.dtype not in (torch.float32, torch.float64):
        found_inf = found_inf.float()
    numbers = [_number(lr, 0.0), _number(grad_scale, 1.0), _number(found_inf, 0.0)]
    numbers += [_number(decay, 0.0) for decay in ema_decays]
    size = library.SCALARS + 2 * count
    workspace = torch.empty(size, dtype=torch.float64, device=params[0].device)
    library.adamw_ema(
        rows, numbers, *betas, eps, weight_decay, workspace.data_ptr(), place(params[0])
    )


adamw_ema_cuda = register("cuda_adamw_ema", launch, "cuda")
