"""Triton twin of `optimizer.py`: all tensors of a call in one launch, for CUDA tensors.

Two kernels run per call. `corrections_kernel` has one lane per tensor: it reads the step count,
computes the coefficients of that tensor in float64, stores them as pairs of float32 and counts the
step. `adamw_ema_kernel` has one program per chunk of a tensor and reads only those coefficients,
so no program can see a step count before or after another one. Nothing is read by the host.

Where the tensors lie is told by a table of addresses (int64, one row per tensor) and a list of
chunks (tensor, first element), both on the device. They depend on addresses and sizes alone and are
kept under exactly these as their key: a table in use cannot be out of date, whatever became of the
tensors it was made for. A call recorded into a CUDA graph makes its own, see `_on_device`.

Accuracy without float64 units: a float32 pair (high, low) holds 48 bits. Products split exactly by
a fused multiply-add, sums by Knuth's two-sum, as in Dekker, "A floating-point technique for
extending the available precision", 1971. About 70 float32 operations per weight, of which none
waits for memory; float64 would take 20 conversions, divisions and a root at a small fraction of
that rate. Sums of pairs also survive cancellation: where beta1 * m meets -(1 - beta1) * g, what is
left is right to the last place. Every product that is added to something is written as a fused
multiply-add, so that no compiler can merge it with the addition that follows.

TRITON_INTERPRET=1 runs the kernels in Python on CPU tensors. Its fma rounds the product, which
loses the low halves: the tests put a true one in its place.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .compiling import Build
from .optimizer import register

# Columns of the table of addresses, and of the coefficients (pairs: high, low).
_PARAM, _GRAD, _EXP_AVG, _EXP_AVG_SQ, _STEP, _NUMEL, _ALIGNED, _COPY, _EMAS = range(9)
_COEFFICIENTS = 14
MOST_PROFILES = 4
_LANES = 128  # tensors per program of `corrections_kernel`
_KEPT = 16  # tables that eager calls find again


@dataclass(frozen=True)
class LaunchConfig:
    """How `adamw_ema_kernel` is launched for a call of so many elements."""

    block: int  # elements at a time: four per thread
    chunk: int  # elements per program
    warps: int

    @classmethod
    def for_total(cls, numel: int) -> "LaunchConfig":
        """A heuristic, not a measurement.

        Four elements per thread are 16 bytes of each float32 tensor, and keep 16-bit tensors in the
        same layout: with eight they would pass through shared memory. A program's start (a row of
        the table, a dozen coefficients) is dear, so chunks are long where that still leaves
        thousands of programs, which evens out the last wave.
        """
        warps = 4
        block = 4 * 32 * warps
        blocks = 1
        while blocks < 64 and numel > 4096 * blocks * block:
            blocks *= 2
        return cls(block, blocks * block, warps)


@triton.jit
def _product(x, y):
    """x * y as high + low, exactly (but for underflow)."""
    high = tl.fma(x, y, 0.0)
    return high, tl.fma(x, y, -high)


@triton.jit
def _sum(x, y):
    """x + y as high + low, exactly."""
    high = x + y
    part = high - x
    return high, (x - (high - part)) + (y - part)


@triton.jit
def _scaled(high, low, y_high, y_low):
    """(high + low) * (y_high + y_low), as a pair."""
    top, rest = _product(high, y_high)
    return top, tl.fma(low, y_high, tl.fma(high, y_low, rest))


@triton.jit
def _average(ema, p, pairs):
    """decay * ema + (1 - decay) * p, rounded once or little more (Kahan's a * b + c * d)."""
    decay, decay_low, rest, rest_low = pairs
    high, low = _product(p, rest)
    low = tl.fma(ema, decay_low, tl.fma(p, rest_low, low))
    return tl.fma(ema, decay, high) + low


@triton.jit
def _split_store(at, value, mask):
    """A float64 value as two float32 numbers that lie side by side."""
    high = value.to(tl.float32)
    tl.store(at, high, mask=mask)
    tl.store(at + 1, (value - high.to(tl.float64)).to(tl.float32), mask=mask)


@triton.jit
def corrections_kernel(
    table_ptr, settings_ptr, lr_ptr, scale_ptr, found_ptr,
    decay0_ptr, decay1_ptr, decay2_ptr, decay3_ptr, out_ptr, tensors,
    PROFILES: tl.constexpr, SCALED: tl.constexpr, GUARDED: tl.constexpr,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Coefficients of LANES tensors for step + 1, and the new step counts.

    settings: beta1, beta2, eps, weight decay in float64. out: (tensors, WIDTH) float32.
    """
    row = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    mask = row < tensors
    address = tl.load(table_ptr + row * COLUMNS + STEP, mask=mask, other=0)
    step_ptr = address.to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptr, mask=mask, other=0.0)
    beta1 = tl.load(settings_ptr)
    beta2 = tl.load(settings_ptr + 1)
    eps = tl.load(settings_ptr + 2)
    weight_decay = tl.load(settings_ptr + 3)
    lr = tl.load(lr_ptr).to(tl.float64)
    # beta^t by squaring: counts in float32 are exact up to 2^24, hence 25 bits.
    count = (step + 1.0).to(tl.int32)
    one = tl.full([LANES], 1.0, tl.float64)
    power1 = one
    power2 = one
    square1 = one * beta1
    square2 = one * beta2
    for _ in range(0, 25):
        odd = (count & 1) == 1
        power1 = tl.where(odd, power1 * square1, power1)
        power2 = tl.where(odd, power2 * square2, power2)
        square1 = square1 * square1
        square2 = square2 * square2
        count = count >> 1
    root = tl.sqrt(one - power2)
    rest1 = one - beta1
    rest2 = tl.sqrt(one - beta2)  # of g before it is squared: g * g could overflow
    if SCALED:
        scale = tl.load(scale_ptr).to(tl.float64)
        rest1 = rest1 * scale
        rest2 = rest2 * scale
    at = out_ptr + row * WIDTH
    _split_store(at, one * beta1, mask)
    _split_store(at + 2, rest1, mask)
    _split_store(at + 4, one * beta2, mask)
    _split_store(at + 6, rest2, mask)
    _split_store(at + 8, root * eps, mask)
    _split_store(at + 10, lr / (one - power1) * root, mask)
    _split_store(at + 12, one - lr * weight_decay, mask)
    if PROFILES > 0:
        decay = one * tl.load(decay0_ptr).to(tl.float64)
        _split_store(at + 14, decay, mask)
        _split_store(at + 16, one - decay, mask)
    if PROFILES > 1:
        decay = one * tl.load(decay1_ptr).to(tl.float64)
        _split_store(at + 18, decay, mask)
        _split_store(at + 20, one - decay, mask)
    if PROFILES > 2:
        decay = one * tl.load(decay2_ptr).to(tl.float64)
        _split_store(at + 22, decay, mask)
        _split_store(at + 24, one - decay, mask)
    if PROFILES > 3:
        decay = one * tl.load(decay3_ptr).to(tl.float64)
        _split_store(at + 26, decay, mask)
        _split_store(at + 28, one - decay, mask)
    taken = 1.0
    if GUARDED:
        taken = tl.where(tl.load(found_ptr) == 0, 1.0, 0.0)
    tl.store(step_ptr, step + taken, mask=mask)


@triton.jit
def _four(at):
    """Four coefficients, loaded once per program: stores in its loops forbid to move loads out."""
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def _adamw(p, g, m, v, first, second, rate, shrinking):
    """(new p, m, v) of a block."""
    beta1, beta1_low, rest1, rest1_low = first
    beta2, beta2_low, rest2, rest2_low = second
    eps, eps_low, size, size_low = rate
    shrink, shrink_low = shrinking
    # m = beta1 * m + rest1 * g
    kept, kept_low = _product(m, beta1)
    kept_low = tl.fma(m, beta1_low, kept_low)
    new, new_low = _product(g, rest1)
    new_low = tl.fma(g, rest1_low, new_low)
    m, m_low = _sum(kept, new)
    m, m_low = _sum(m, m_low + (kept_low + new_low))
    # v = beta2 * v + (rest2 * g)^2, rest2 being a root
    kept, kept_low = _product(v, beta2)
    kept_low = tl.fma(v, beta2_low, kept_low)
    side, side_low = _product(g, rest2)
    side_low = tl.fma(g, rest2_low, side_low)
    new, new_low = _product(side, side)
    new_low = tl.fma(side + side, side_low, new_low)
    v, v_low = _sum(kept, new)
    v, v_low = _sum(v, v_low + (kept_low + new_low))
    # sqrt(v) + eps: the root's own error is what v - root^2 leaves, over 2 root
    root = tl.sqrt_rn(v)
    left = tl.fma(-root, root, v) + v_low
    root_low = 0.5 * left / tl.where(root > 0.0, root, 1.0)
    bottom, bottom_low = _sum(root, eps)
    bottom_low = bottom_low + (root_low + eps_low)
    # m / bottom: a quotient, and what it leaves over bottom
    inverse = 1.0 / bottom
    ratio = tl.fma(m, inverse, 0.0)
    left = tl.fma(-ratio, bottom_low, tl.fma(-ratio, bottom, m) + m_low)
    update, update_low = _scaled(ratio, tl.fma(left, inverse, 0.0), size, size_low)
    # p = shrink * p - update
    kept, kept_low = _product(p, shrink)
    kept_low = tl.fma(p, shrink_low, kept_low)
    p, p_low = _sum(kept, -update)
    return p + (p_low + (kept_low - update_low)), m, v


@triton.jit
def _block(
    param, grad, exp_avg, exp_avg_sq, copy, ema0, ema1, ema2, ema3,
    first_moment, second_moment, rate, shrinking, decay0, decay1, decay2, decay3,
    first, live, cols,
    PROFILES: tl.constexpr, COPIED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of a tensor: elements first + cols below live (all of them unless MASKED)."""
    offsets = first + cols
    if MASKED:
        mask = offsets < live
    else:
        mask = None
    # All loads come before the first store, which they could not overtake: more bytes in flight.
    p = tl.load(param + offsets, mask=mask)
    g = tl.load(grad + offsets, mask=mask).to(tl.float32)
    m = tl.load(exp_avg + offsets, mask=mask)
    v = tl.load(exp_avg_sq + offsets, mask=mask)
    if PROFILES > 0:
        average0 = tl.load(ema0 + offsets, mask=mask)
    if PROFILES > 1:
        average1 = tl.load(ema1 + offsets, mask=mask)
    if PROFILES > 2:
        average2 = tl.load(ema2 + offsets, mask=mask)
    if PROFILES > 3:
        average3 = tl.load(ema3 + offsets, mask=mask)
    p, m, v = _adamw(p, g, m, v, first_moment, second_moment, rate, shrinking)
    tl.store(param + offsets, p, mask=mask)
    tl.store(exp_avg + offsets, m, mask=mask)
    tl.store(exp_avg_sq + offsets, v, mask=mask)
    if COPIED:
        tl.store(copy + offsets, p.to(copy.dtype.element_ty), mask=mask)
    if PROFILES > 0:
        tl.store(ema0 + offsets, _average(average0, p, decay0), mask=mask)
    if PROFILES > 1:
        tl.store(ema1 + offsets, _average(average1, p, decay1), mask=mask)
    if PROFILES > 2:
        tl.store(ema2 + offsets, _average(average2, p, decay2), mask=mask)
    if PROFILES > 3:
        tl.store(ema3 + offsets, _average(average3, p, decay3), mask=mask)


@triton.jit
def adamw_ema_kernel(
    table_ptr, chunks_ptr, coefficients_ptr, found_ptr,
    GRAD: tl.constexpr, COPY: tl.constexpr, COPIED: tl.constexpr, PROFILES: tl.constexpr,
    GUARDED: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk (tensor, first element) of the list. Columns are those of `_PARAM`, ..."""
    chunk = chunks_ptr + tl.program_id(0).to(tl.int64) * 2
    skip = False
    if GUARDED:
        skip = tl.load(found_ptr) != 0
    if not skip:
        tensor = tl.load(chunk)
        start = tl.multiple_of(tl.load(chunk + 1), 16)
        row = table_ptr + tensor * COLUMNS
        at = coefficients_ptr + tensor * WIDTH
        param = tl.load(row).to(tl.pointer_type(tl.float32))
        grad = tl.load(row + 1).to(tl.pointer_type(GRAD))
        exp_avg = tl.load(row + 2).to(tl.pointer_type(tl.float32))
        exp_avg_sq = tl.load(row + 3).to(tl.pointer_type(tl.float32))
        live = tl.minimum(tl.load(row + 5) - start, CHUNK).to(tl.int32)
        aligned = tl.load(row + 6).to(tl.int32)
        copy = param
        if COPIED:
            copy = tl.load(row + 7).to(tl.pointer_type(COPY)) + start
        first_moment = _four(at)
        second_moment = _four(at + 4)
        rate = _four(at + 8)
        shrinking = tl.load(at + 12), tl.load(at + 13)
        ema0 = param
        ema1 = param
        ema2 = param
        ema3 = param
        decay0 = first_moment
        decay1 = first_moment
        decay2 = first_moment
        decay3 = first_moment
        if PROFILES > 0:
            ema0 = tl.load(row + 8).to(tl.pointer_type(tl.float32)) + start
            decay0 = _four(at + 14)
        if PROFILES > 1:
            ema1 = tl.load(row + 9).to(tl.pointer_type(tl.float32)) + start
            decay1 = _four(at + 18)
        if PROFILES > 2:
            ema2 = tl.load(row + 10).to(tl.pointer_type(tl.float32)) + start
            decay2 = _four(at + 22)
        if PROFILES > 3:
            ema3 = tl.load(row + 11).to(tl.pointer_type(tl.float32)) + start
            decay3 = _four(at + 26)
        param += start
        grad += start
        exp_avg += start
        exp_avg_sq += start
        cols = tl.arange(0, BLOCK)
        whole = (live // BLOCK) * aligned
        # The promise of 16 bytes lets whole blocks be loaded and stored by vectors. A masked access
        # is by single elements whatever is promised, because the mask may end anywhere.
        for i in range(0, whole):
            _block(
                tl.multiple_of(param, 16), tl.multiple_of(grad, 16), tl.multiple_of(exp_avg, 16),
                tl.multiple_of(exp_avg_sq, 16), tl.multiple_of(copy, 16),
                tl.multiple_of(ema0, 16), tl.multiple_of(ema1, 16), tl.multiple_of(ema2, 16),
                tl.multiple_of(ema3, 16),
                first_moment, second_moment, rate, shrinking, decay0, decay1, decay2, decay3,
                i * BLOCK, live, cols, PROFILES, COPIED, False,
            )  # fmt: skip
        # The end of a tensor, and all of one that is not aligned.
        for i in range(whole, tl.cdiv(live, BLOCK)):
            _block(
                param, grad, exp_avg, exp_avg_sq, copy, ema0, ema1, ema2, ema3,
                first_moment, second_moment, rate, shrinking, decay0, decay1, decay2, decay3,
                i * BLOCK, live, cols, PROFILES, COPIED, True,
            )  # fmt: skip


_DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    None: tl.float32,
}
_tables: OrderedDict[Hashable, Tensor] = OrderedDict()
_recorded: list[tuple[StorageWeakRef, Tensor]] = []


def _on_device(key: tuple, make: Callable[[], Tensor], owner: Tensor) -> Tensor:
    """The tensor that `make` builds on the host, beside `owner`; `key` says all that it depends on.

    Eager calls on one stream find it again. It is copied from pinned memory, which nobody waits
    for. A CUDA graph repeats that copy at each replay, into memory of its own; the pinned source
    therefore stays for as long as `owner`'s memory exists, without which a replay has no meaning.
    """
    device = owner.device
    if device.type == "cpu":
        stream, recording = 0, False
    else:
        stream = torch.cuda.current_stream(device).cuda_stream
        recording = torch.cuda.is_current_stream_capturing()
    key = (device, stream, *key)
    if not recording and key in _tables:
        _tables.move_to_end(key)
        return _tables[key]
    host = make() if device.type == "cpu" else make().pin_memory()
    made = host.to(device, non_blocking=True)
    if recording:
        _recorded[:] = [(alive, kept) for alive, kept in _recorded if not alive.expired()]
        _recorded.append((StorageWeakRef(owner.untyped_storage()), host))
        return made
    _tables[key] = made
    if len(_tables) > _KEPT:
        _tables.popitem(last=False)
    return made


def _chunks(sizes: Sequence[int], chunk: int) -> Tensor:
    """(tensor, first element) of every chunk: (number of chunks, 2) int64."""
    counts = torch.tensor([-(-size // chunk) for size in sizes])
    tensor = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    before = counts.cumsum(0) - counts
    start = (torch.arange(len(tensor)) - before[tensor]) * chunk
    return torch.stack([tensor, start], 1)


def _launch_alike(
    lists: Sequence[Sequence[Tensor]],
    copies: Sequence[Tensor],
    emas: Sequence[Sequence[Tensor]],
    lr: Tensor,
    ema_decays: Sequence[Tensor],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    settings: tuple[float, ...],
) -> None:
    """Tensors whose gradients, and whose copies, have one dtype. lists: params, grads, exp_avgs,
    exp_avg_sqs, steps."""
    lead, profiles = lists[0][0], len(emas)
    addresses = [[t.data_ptr() for t in tensors] for tensors in (*lists, copies, *emas)]
    sizes = [p.numel() for p in lists[0]]
    columns, width = _EMAS + profiles, _COEFFICIENTS + 4 * profiles
    config = LaunchConfig.for_total(sum(sizes))

    def table() -> Tensor:
        rows = [*addresses[:5], sizes, [0] * len(sizes), addresses[5] or [0] * len(sizes)]
        made = torch.tensor([*rows, *addresses[6:]], dtype=torch.int64).T.contiguous()
        beside = made[:, [i for i in range(columns) if i not in (_STEP, _NUMEL, _ALIGNED)]]
        made[:, _ALIGNED] = (beside % 16 == 0).all(1)
        return made

    places = tuple(map(tuple, addresses))
    table_of = _on_device(("table", *places, *sizes), table, lead)
    listed = _on_device(
        ("chunks", config.chunk, *sizes), lambda: _chunks(sizes, config.chunk), lead
    )
    four = _on_device(
        ("settings", *settings), lambda: torch.tensor(settings, dtype=torch.float64), lead
    )
    coefficients = lead.new_empty((len(sizes), width), dtype=torch.float32)
    # What is absent is passed as `lr`; the constexpr flags keep the kernels away from it.
    found = lr if found_inf is None else found_inf
    decays = [*ema_decays, *[lr] * (MOST_PROFILES - profiles)]
    corrections_kernel[(triton.cdiv(len(sizes), _LANES),)](
        table_of, four, lr, lr if grad_scale is None else grad_scale, found, *decays,
        coefficients, len(sizes),
        PROFILES=profiles, SCALED=grad_scale is not None, GUARDED=found_inf is not None,
        COLUMNS=columns, WIDTH=width, STEP=_STEP, LANES=_LANES, num_warps=4,
    )  # fmt: skip
    if len(listed):
        adamw_ema_kernel[(len(listed),)](
            table_of, listed, coefficients, found,
            GRAD=_DTYPES[lists[1][0].dtype], COPY=_DTYPES[copies[0].dtype if copies else None],
            COPIED=bool(copies), PROFILES=profiles, GUARDED=found_inf is not None,
            COLUMNS=columns, WIDTH=width, CHUNK=config.chunk, BLOCK=config.block,
            num_warps=config.warps,
        )  # fmt: skip


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
    """The operator; see `optimizer.register` for its arguments.

    One launch where all gradients share a dtype and all copies do, else one for each combination.
    """
    alike: dict[tuple, list[int]] = {}
    for i, grad in enumerate(grads):
        alike.setdefault((grad.dtype, copies[i].dtype if copies else None), []).append(i)
    device = params[0].device
    guard = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with guard:
        for chosen in alike.values():
            lists = [
                [tensors[i] for i in chosen]
                for tensors in (params, grads, exp_avgs, exp_avg_sqs, steps)
            ]
            _launch_alike(
                lists,
                [copies[i] for i in chosen] if copies else [],
                [[emas[k * len(params) + i] for i in chosen] for k in range(len(ema_decays))],
                lr,
                ema_decays,
                grad_scale,
                found_inf,
                (*betas, eps, weight_decay),
            )


adamw_ema_triton = register("triton_adamw_ema", launch)


def builds() -> list[Build]:
    """The launches of DiT-XL/2 under the engine's own strategies, for `compiling`.

    Full fusion with bfloat16 weights, float32 weights, and a flat partition under ZeRO.
    """
    config = LaunchConfig.for_total(675_000_000)
    cases = (("bf16 weights", tl.bfloat16, True), ("float32", tl.float32, False))
    made = []
    for profiles in (1, 2, 4):
        columns, width = _EMAS + profiles, _COEFFICIENTS + 4 * profiles
        for name, dtype, copied in cases:
            constants = {
                "GRAD": tl.float32, "COPY": dtype, "COPIED": copied, "PROFILES": profiles,
                "GUARDED": True, "COLUMNS": columns, "WIDTH": width,
                "CHUNK": config.chunk, "BLOCK": config.block,
            }  # fmt: skip
            types = {"table_ptr": "*i64", "chunks_ptr": "*i64"}
            types |= {"coefficients_ptr": "*fp32", "found_ptr": "*fp32"}
            title = f"{name}, {profiles} averages"
            made.append(Build(title, adamw_ema_kernel, types, constants, warps=config.warps))
        if profiles == 1:
            narrow = constants | {"GRAD": tl.bfloat16, "COPY": tl.bfloat16, "COPIED": True}
            title = "bf16 gradients and copies, 1 average"
            made.append(Build(title, adamw_ema_kernel, types, narrow, warps=config.warps))
        constants = {
            "PROFILES": profiles, "SCALED": True, "GUARDED": True, "COLUMNS": columns,
            "WIDTH": width, "STEP": _STEP, "LANES": _LANES,
        }  # fmt: skip
        free = [n for n in corrections_kernel.arg_names if n not in constants]
        types = {n: "*fp32" for n in free} | {"tensors": "i32", "table_ptr": "*i64"}
        types |= {"settings_ptr": "*fp64", "lr_ptr": "*fp64"}
        made.append(
            Build(f"coefficients, {profiles} averages", corrections_kernel, types, constants)
        )
    return made
