"""AdamW and weight averages in one pass over each tensor.

Called by the engine's `AdamWEMA` optimizer (plain torch and under ZeRO, where the tensors are one
rank's slices of the master weights). For each tensor, with t = step + 1:

    g = grad * grad_scale
    m = beta1 * m + (1 - beta1) * g             v = beta2 * v + (1 - beta2) * g * g
    p = p * (1 - lr * weight_decay) - (lr / (1 - beta1^t)) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    ema_k = decay_k * ema_k + (1 - decay_k) * p          for every profile k, with the new p

(AdamW of Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, as in
`torch.optim.AdamW`.) If `found_inf` is not zero nothing changes, the step counts included.

The C++ twin does the same operations in the same order, without fused multiply-add: it gives the
same bits at every processor level, for any number of threads and however a tensor is cut.
The reference differs from it in the last place, where torch's vectorised sqrt rounds otherwise.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import backends
from .catalogue import Operator

Scalar = float | Tensor


def _check(
    params: Sequence[Tensor], lists: dict[str, Sequence[Tensor]], steps: Sequence[Tensor]
) -> None:
    if len(steps) != len(params):
        raise ValueError(f"adamw_ema: {len(params)} params but {len(steps)} steps")
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            raise ValueError(f"adamw_ema: {len(params)} params but {len(tensors)} {name}")
        for i, (p, t) in enumerate(zip(params, tensors, strict=True)):
            if t.shape != p.shape or t.device != p.device:
                raise ValueError(
                    f"adamw_ema: {name}[{i}] is {tuple(t.shape)} on {t.device}, "
                    f"params[{i}] is {tuple(p.shape)} on {p.device}"
                )


def _corrections(step: Scalar, lr: Scalar, betas: tuple[float, float]) -> tuple[Scalar, Scalar]:
    """lr / (1 - beta1^t) and sqrt(1 - beta2^t), in float64, for t = step + 1."""
    first, second = 1 - betas[0] ** (step + 1), 1 - betas[1] ** (step + 1)
    root = second.sqrt() if isinstance(second, Tensor) else math.sqrt(second)
    return lr / first, root


def _on_device(value: Scalar, like: Tensor) -> Scalar:
    """A number for CPU tensors; for others a 0-d float64 tensor stays there: no synchronisation."""
    if not isinstance(value, Tensor):
        return value
    return value.item() if like.device.type == "cpu" else value.double()


def _reference_one(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    emas: Sequence[Tensor],
    step: Tensor,
    lr: Scalar,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    ema_decays: Sequence[Scalar],
    grad_scale: Scalar | None,
    skip: Tensor | None,
) -> None:
    """One tensor. `skip` is a 0-d bool tensor on the device; the caller has handled it on CPU."""
    wide = torch.float64 if param.dtype == torch.float64 else torch.float32
    step_size, root = _corrections(_on_device(step, param), lr, betas)
    g = grad.to(wide)
    if grad_scale is not None:
        g = g * grad_scale
    m = exp_avg.to(wide) * betas[0] + g * (1 - betas[0])
    v = exp_avg_sq.to(wide) * betas[1] + (g * g) * (1 - betas[1])
    p = param.to(wide) * (1 - lr * weight_decay) - (m * step_size) / (v.sqrt() / root + eps)
    made = [(param, p), (exp_avg, m), (exp_avg_sq, v)]
    for ema, decay in zip(emas, ema_decays, strict=True):
        made.append((ema, ema.to(wide) * decay + p.to(param.dtype).to(wide) * (1 - decay)))
    made.append((step, step + 1))
    for old, new in made:
        old.copy_(new if skip is None else torch.where(skip, old, new.to(old.dtype)))


@torch.no_grad()
def adamw_ema_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Sequence[Tensor]],
    steps: Sequence[Tensor],
    *,
    lr: Scalar,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    ema_decays: Sequence[Scalar],
    grad_scale: Scalar | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """`adamw_ema` in plain torch, in float32 (float64 for float64 params)."""
    for i, param in enumerate(params):
        skip = None
        if found_inf is not None:
            if param.device.type == "cpu" and found_inf.device.type == "cpu":
                if found_inf.item() != 0:
                    return
            else:
                skip = found_inf.to(param.device) != 0
        _reference_one(
            param,
            grads[i],
            exp_avgs[i],
            exp_avg_sqs[i],
            [profile[i] for profile in emas],
            steps[i],
            _on_device(lr, param),
            betas,
            eps,
            weight_decay,
            [_on_device(decay, param) for decay in ema_decays],
            None if grad_scale is None else _on_device(grad_scale, param),
            skip,
        )


def _fits_cpp(
    params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[Sequence[Tensor]]
) -> bool:
    """C++ takes float32 params and state, float32 or bfloat16 grads, all contiguous."""
    float32 = [*params, *(t for state in states for t in state)]
    if any(t.dtype != torch.float32 or not t.is_contiguous() for t in float32):
        return False
    return all(g.dtype in backends.DTYPES["cpp"] and g.is_contiguous() for g in grads)


def _adamw_ema_cpp(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Sequence[Tensor]],
    steps: Sequence[Tensor],
    *,
    lr: Scalar,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    ema_decays: Sequence[Scalar],
    grad_scale: Scalar | None = None,
    found_inf: Tensor | None = None,
) -> None:
    if found_inf is not None and found_inf.item() != 0:
        return
    lr = float(lr)
    library = backends.cpp()
    rows = []
    known: dict[float, tuple[float, float]] = {}
    for i, param in enumerate(params):
        step = steps[i].item()
        if step not in known:
            known[step] = _corrections(step, lr, betas)
        kind = library.BFLOAT16 if grads[i].dtype == torch.bfloat16 else library.FLOAT32
        rows.append(
            (
                param.data_ptr(),
                grads[i].data_ptr(),
                kind,
                exp_avgs[i].data_ptr(),
                exp_avg_sqs[i].data_ptr(),
                [profile[i].data_ptr() for profile in emas],
                param.numel(),
                *known[step],
            )
        )
    library.adamw_ema(
        rows,
        [float(decay) for decay in ema_decays],
        *betas,
        eps,
        1 - lr * weight_decay,
        1.0 if grad_scale is None else float(grad_scale),
        grad_scale is not None,
        torch.get_num_threads(),
    )
    for step_tensor in steps:
        step_tensor.add_(1)


def _verified(state: list[Tensor], before: list[Tensor], rerun: Callable[[], None]) -> None:
    """Run the reference on the saved state and compare it with what the C++ twin left."""
    after = [t.clone() for t in state]
    for t, old in zip(state, before, strict=True):
        t.copy_(old)
    rerun()
    names = tuple(f"tensor {i}" for i in range(len(state)))
    backends.verify("adamw_ema", names, tuple(after), tuple(state))


@torch.no_grad()
def adamw_ema(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Sequence[Tensor]],
    steps: Sequence[Tensor],
    *,
    lr: Scalar,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    ema_decays: Sequence[Scalar],
    grad_scale: Scalar | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One AdamW step with decoupled weight decay and every weight average, in place.

    params, grads, exp_avgs, exp_avg_sqs: lists of tensors of equal shapes. emas: per profile a list
    like params. steps: 0-d float32 tensors, steps already taken, each incremented here; one tensor
    must not serve two params. lr, ema_decays, grad_scale: numbers or 0-d tensors (in [0, 1] for the
    decays); every gradient is multiplied by grad_scale (a clip coefficient, or one over a loss
    scale). found_inf: 0-d tensor; where it is not zero nothing at all is changed. On a GPU nothing
    is read back to the host.

    Errors: ValueError where lists do not match.
    """
    if len(emas) != len(ema_decays):
        raise ValueError(f"adamw_ema: {len(emas)} emas but {len(ema_decays)} ema_decays")
    averages = {f"emas[{k}]": profile for k, profile in enumerate(emas)}
    moments = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    _check(params, {"grads": grads, **moments, **averages}, steps)
    if not params:
        return
    tensors = (params, grads, exp_avgs, exp_avg_sqs, emas, steps)
    settings = {
        "lr": lr,
        "betas": betas,
        "eps": eps,
        "weight_decay": weight_decay,
        "ema_decays": ema_decays,
        "grad_scale": grad_scale,
        "found_inf": found_inf,
    }
    states = [exp_avgs, exp_avg_sqs, *emas]
    device = params[0].device.type
    backend = (
        backends.pick("adamw_ema", device, params[0].dtype) if device == "cpu" else "reference"
    )
    if backend != "cpp" or not _fits_cpp(params, grads, states):
        return adamw_ema_reference(*tensors, **settings)
    state = [*params, *(t for s in states for t in s), *steps] if backends.verifying() else []
    before = [t.clone() for t in state]
    _adamw_ema_cpp(*tensors, **settings)
    if state:
        _verified(state, before, lambda: adamw_ema_reference(*tensors, **settings))


OPERATORS = (Operator("adamw_ema", "AdamW, clip scale and weight averages in one pass", ("cpp",)),)
