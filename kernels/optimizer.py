"""AdamW, weight averages and the 16-bit weights of the next forward, in one pass over each tensor.

Called by the engine's `AdamWEMA` optimizer (plain torch and under ZeRO, where the tensors are one
rank's slices of the master weights). For each tensor, with t = step + 1:

    g = grad * grad_scale
    m = beta1 * m + (1 - beta1) * g             v = beta2 * v + (1 - beta2) * g * g
    p = p * (1 - lr * weight_decay) - (lr / (1 - beta1^t)) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    ema_k = decay_k * ema_k + (1 - decay_k) * p          for every profile k, with p as it is stored
    copy = p                                             in bfloat16 or float16, where there is one

(AdamW of Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, as in
`torch.optim.AdamW`.) The root of 1 - beta2^t is multiplied out of the fraction, which leaves one
division per element. If `found_inf` is not zero nothing changes, the step counts included.

What separate kernels read and write twice is touched once: 28 bytes per float32 weight for AdamW
itself, 8 for each average, 2 for the copy.

Everything is computed in float64 and rounded once, when it is stored: a coefficient such as 0.999
rounded to float32 alone would shift the second moment by 1e-5 over some thousand steps. Each result
is therefore within a unit in the last place of float64, whatever cancels. The C++ and CUDA twins
take float32 seeds of root and quotient and refine each by a Newton step in float64, which leaves
half a unit and a hundredth (csrc/cpu/optimizer.cpp has the bound). The Triton twin reaches the same
accuracy by pairs of float32 numbers, because many GPUs have next to no float64 units. A gradient
beyond 5e20 in magnitude, whose second moment float32 does not hold, leaves a weight to its decay in
that step and makes it NaN in the next one in the C++ and CUDA twins: `found_inf` is for such steps.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import backends
from .catalogue import Operator

Scalar = float | Tensor
Tensors = Sequence[Tensor]
_TWINS = ("cpp", "triton", "cuda")
_LOW = (torch.bfloat16, torch.float16)
_MOST_PROFILES = {"cpp": math.inf, "triton": 4, "cuda": 4}


def _check(params: Tensors, lists: dict[str, Tensors], steps: Tensors) -> None:
    if len(steps) != len(params):
        raise ValueError(f"adamw_ema: {len(params)} params but {len(steps)} steps")
    shapes, devices = [p.shape for p in params], [p.device for p in params]
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            raise ValueError(f"adamw_ema: {len(params)} params but {len(tensors)} {name}")
        if [t.shape for t in tensors] == shapes and [t.device for t in tensors] == devices:
            continue
        for i, (p, t) in enumerate(zip(params, tensors, strict=True)):
            if t.shape != p.shape or t.device != p.device:
                raise ValueError(
                    f"adamw_ema: {name}[{i}] is {tuple(t.shape)} on {t.device}, "
                    f"params[{i}] is {tuple(p.shape)} on {p.device}"
                )
    for i, copy in enumerate(lists.get("copies", ())):
        if copy.dtype not in _LOW:
            raise ValueError(
                f"adamw_ema: copies[{i}] is {copy.dtype}; a copy is torch.bfloat16 or torch.float16"
            )


def _on_device(value: Scalar, like: Tensor) -> Scalar:
    """A number for CPU tensors; for others a 0-d float64 tensor stays there: no synchronisation."""
    if not isinstance(value, Tensor):
        return value
    return value.item() if like.device.type == "cpu" else value.double()


def corrected(
    step: Scalar, lr: Scalar, betas: tuple[float, float], eps: float
) -> tuple[Scalar, Scalar]:
    """(step size, eps) with both bias corrections multiplied in, for t = step + 1, in float64.

    p -= size * m / (sqrt(v) + eps) is then the update of the equations above.
    """
    first, second = 1 - betas[0] ** (step + 1), 1 - betas[1] ** (step + 1)
    root = second.sqrt() if isinstance(second, Tensor) else math.sqrt(second)
    return lr / first * root, eps * root


def _reference_one(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    emas: Tensors,
    step: Tensor,
    copy: Tensor | None,
    lr: Scalar,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    ema_decays: Sequence[Scalar],
    grad_scale: Scalar,
    skip: Tensor | None,
) -> None:
    """One tensor. `skip` is a 0-d bool tensor on the device; the caller has handled it on CPU."""
    size, eps = corrected(_on_device(step, param), lr, betas, eps)
    g = grad.double() * grad_scale
    m = exp_avg.double() * betas[0] + g * (1 - betas[0])
    v = exp_avg_sq.double() * betas[1] + (g * g) * (1 - betas[1])
    p = param.double() * (1 - lr * weight_decay) - (m * size) / (v.sqrt() + eps)
    p = p.to(param.dtype)
    made = [(param, p), (exp_avg, m), (exp_avg_sq, v)]
    for ema, decay in zip(emas, ema_decays, strict=True):
        made.append((ema, ema.double() * decay + p.double() * (1 - decay)))
    if copy is not None:
        made.append((copy, p))
    made.append((step, step + 1))
    for old, new in made:
        old.copy_(new if skip is None else torch.where(skip, old, new.to(old.dtype)))


@torch.no_grad()
def adamw_ema_reference(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    emas: Sequence[Tensors],
    steps: Tensors,
    copies: Tensors | None = None,
    *,
    lr: Scalar,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    ema_decays: Sequence[Scalar],
    grad_scale: Scalar | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """`adamw_ema` in plain torch: float64 inside, rounded once to what is stored."""
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
            None if copies is None else copies[i],
            _on_device(lr, param),
            betas,
            eps,
            weight_decay,
            [_on_device(decay, param) for decay in ema_decays],
            1.0 if grad_scale is None else _on_device(grad_scale, param),
            skip,
        )


def _dense(t: Tensor) -> bool:
    """Whether the elements fill their memory without gaps, in torch's own order or channels last.

    The pass is element by element: any order will do that all tensors of a parameter share.
    """
    return t.is_contiguous() or (
        t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)
    )


def _fits(
    backend: str,
    params: Tensors,
    grads: Tensors,
    states: Sequence[Tensors],
    steps: Tensors,
    copies: Tensors,
) -> bool:
    """Whether a twin takes these tensors.

    Params, states and steps are float32; gradients and copies have a dtype that the twin knows; all
    are on one device; each is dense, in the memory order of its param.
    """
    wide = [*params, *(t for s in states for t in s)]
    if any(t.dtype != torch.float32 for t in (*wide, *steps)):
        return False
    if len({t.device for t in (*params, *steps)}) > 1 or len(states) > 2 + _MOST_PROFILES[backend]:
        return False
    others = [*grads, *copies]
    if any(t.dtype not in backends.DTYPES[backend] for t in others):
        return False
    if all(t.is_contiguous() for t in (*wide, *others)):
        return True
    lists = [grads, *states, *((copies,) if copies else ())]
    for i, p in enumerate(params):
        beside = [tensors[i] for tensors in lists]
        plain = p.is_contiguous() and all(t.is_contiguous() for t in beside)
        if not plain and not (_dense(p) and all(t.stride() == p.stride() for t in beside)):
            return False
    return True


Launch = Callable[..., None]


def register(name: str, launch: Launch, device_types: str | None = None) -> Callable[..., None]:
    """The torch operator `etude::<name>` of one twin, with this schema:

    (params[], grads[], exp_avgs[], exp_avg_sqs[], emas[], steps[], copies[], lr, ema_decays[],
    grad_scale?, found_inf?, beta1, beta2, eps, weight_decay) -> ()

    emas holds one profile after the other, copies is empty or as long as params, lr and the decays
    are 0-d tensors. All but grads and the scalars are changed in place; torch.compile and CUDA
    graphs treat a call as one opaque step.
    """

    def run(
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
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
    ) -> None:
        launch(
            params, grads, exp_avgs, exp_avg_sqs, emas, steps, copies, lr, ema_decays,
            grad_scale, found_inf, (beta1, beta2), eps, weight_decay,
        )  # fmt: skip

    changed = ("params", "exp_avgs", "exp_avg_sqs", "emas", "steps", "copies")
    op = torch.library.custom_op(
        f"etude::{name}", run, mutates_args=changed, device_types=device_types
    )
    op.register_fake(lambda *args: None)
    return op


def _launch_cpp(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    emas: Tensors,
    steps: Tensors,
    copies: Tensors,
    lr: Tensor,
    ema_decays: Tensors,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    if found_inf is not None and found_inf.item() != 0:
        return
    rate = lr.item()
    library = backends.cpp()
    rows = []
    known: dict[float, tuple[float, float]] = {}
    for i, param in enumerate(params):
        step = steps[i].item()
        if step not in known:
            known[step] = corrected(step, rate, betas, eps)
        kind = library.BFLOAT16 if grads[i].dtype == torch.bfloat16 else library.FLOAT32
        rows.append(
            (
                param.data_ptr(),
                grads[i].data_ptr(),
                kind,
                exp_avgs[i].data_ptr(),
                exp_avg_sqs[i].data_ptr(),
                [profile.data_ptr() for profile in emas[i :: len(params)]],
                copies[i].data_ptr() if copies else 0,
                param.numel(),
                *known[step],
            )
        )
    library.adamw_ema(
        rows,
        [decay.item() for decay in ema_decays],
        *betas,
        1 - rate * weight_decay,
        1.0 if grad_scale is None else grad_scale.item(),
        torch.get_num_threads(),
    )
    torch._foreach_add_(list(steps), 1)


_cpp = register("adamw_ema", _launch_cpp, "cpu")


def _twin(backend: str) -> tuple[Launch, Callable[..., None]]:
    """A twin's launch function and torch operator; a GPU twin's file is loaded at its first use."""
    if backend == "triton":
        from . import optimizer_triton

        return optimizer_triton.launch, optimizer_triton.adamw_ema_triton
    if backend == "cuda":
        from . import optimizer_cuda

        return optimizer_cuda.launch, optimizer_cuda.adamw_ema_cuda
    return _launch_cpp, _cpp


def _run(
    backend: str, lists: Sequence[list[Tensor]], scalars: Sequence[object], settings: Sequence
) -> None:
    """The operator where a graph is recorded, its launch function elsewhere."""
    launch, op = _twin(backend)
    eager = all(type(t) in (Tensor, torch.nn.Parameter) for t in lists[0])
    if not eager or torch.compiler.is_compiling():
        return op(*lists, *scalars, *settings)
    launch(*lists, *scalars, settings[:2], *settings[2:])
    changed = [*lists[0], *(t for tensors in lists[2:] for t in tensors)]
    torch.autograd.graph.increment_version(changed)


def _tensor(value: Scalar, device: torch.device) -> Tensor:
    """A 0-d tensor on the device; a number becomes one by a fill there, which nobody waits for."""
    if isinstance(value, Tensor):
        return value if value.device == device else value.to(device, non_blocking=True)
    return torch.full((), value, dtype=torch.float64, device=device)


def _verified(backend: str, state: Tensors, before: Tensors, rerun: Callable[[], None]) -> None:
    """Run the reference on the saved state and compare it with what the twin left."""
    after = [t.clone() for t in state]
    for t, old in zip(state, before, strict=True):
        t.copy_(old)
    rerun()
    names = tuple(f"tensor {i}" for i in range(len(state)))
    backends.verify(f"adamw_ema ({backend})", names, tuple(after), tuple(state))


@torch.no_grad()
def adamw_ema(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    emas: Sequence[Tensors],
    steps: Tensors,
    copies: Tensors | None = None,
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
    must not serve two params. copies: None, or bfloat16 or float16 tensors like params that receive
    the new weights. lr, ema_decays, grad_scale: numbers or 0-d tensors (in [0, 1] for the decays);
    every gradient is multiplied by grad_scale (a clip coefficient, or one over a loss scale).
    found_inf: 0-d tensor; where it is not zero nothing at all is changed. On a GPU nothing is read
    back to the host. Twins take float32 params and states, dense and in one memory order per param;
    other calls run the reference.

    Errors: ValueError where lists do not match.
    """
    if len(emas) != len(ema_decays):
        raise ValueError(f"adamw_ema: {len(emas)} emas but {len(ema_decays)} ema_decays")
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    lists |= {f"emas[{k}]": profile for k, profile in enumerate(emas)}
    lists |= {} if copies is None else {"copies": copies}
    _check(params, lists, steps)
    if not params:
        return
    settings = {"betas": betas, "eps": eps, "weight_decay": weight_decay}
    scalars = {
        "lr": lr,
        "ema_decays": ema_decays,
        "grad_scale": grad_scale,
        "found_inf": found_inf,
    }

    def by_reference() -> None:
        adamw_ema_reference(
            params, grads, exp_avgs, exp_avg_sqs, emas, steps, copies, **settings, **scalars
        )

    states = [exp_avgs, exp_avg_sqs, *emas]
    device = params[0].device
    backend = backends.pick("adamw_ema", device.type, params[0].dtype, twins=_TWINS)
    if backend == "reference" or not _fits(backend, params, grads, states, steps, copies or ()):
        return by_reference()
    check = backends.verifying()
    state = [*params, *(t for s in states for t in s), *steps, *(copies or ())] if check else []
    before = [t.clone() for t in state]
    averages = [t for profile in emas for t in profile]
    lists = [params, grads, exp_avgs, exp_avg_sqs, averages, steps, copies or ()]
    numbers = (
        _tensor(lr, device),
        [_tensor(decay, device) for decay in ema_decays],
        None if grad_scale is None else _tensor(grad_scale, device),
        None if found_inf is None else _tensor(found_inf, device),
    )
    _run(backend, [list(x) for x in lists], numbers, (*betas, eps, weight_decay))
    if check:
        _verified(backend, state, before, by_reference)


OPERATORS = (
    Operator("adamw_ema", "AdamW, clip scale, weight averages and 16-bit copy in one pass", _TWINS),
)
