"""Triton twins of the attention operators, registered on first use: launches, schemas, autograd.

    out = softmax(scale * q k^T + bias) v       lse = log of the softmax's denominator

with q and k normalised per head and rotated before, where asked for; float32 inside. Two forms:
whole rows of scores on chip (attention_short.py) where they fit, tiles (attention_long.py)
everywhere else. Which one, and its tiles, is `LaunchConfig`. Both are deterministic: every number
has one writer, and sums over programs are written apart and added in a second stage.

    etude::triton_attention          q (B, Nq, H, d); k, v (B, Nk, H, d), or (T, H, d) with
                                     key_offsets; any strides but the last
    etude::triton_attention_packed   qkv (B, N, 3, H, d), read in place; its gradient is one tensor

TRITON_INTERPRET=1 runs the kernels in Python on CPU tensors (tests). The interpreter multiplies
bfloat16 wrongly, so operands are float32 there (UPCAST), and it truncates where bfloat16 rounds.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import triton
from torch import Tensor, ops
from torch.library import triton_op, wrap_triton

from . import backends
from .attention_config import CHUNK, ENOUGH, LaunchConfig
from .attention_long import (
    dbias_kernel,
    delta_kernel,
    long_dkv_kernel,
    long_dq_kernel,
    long_fwd_kernel,
    prepare_kernel,
)
from .attention_short import short_bwd_kernel, short_fwd_kernel
from .attention_tiles import head_tiles
from .compiling import Build
from .tensors import dense


@dataclass(frozen=True)
class Options:
    """What both operators take beside their tensors."""

    scale: float
    key_lengths: Tensor | None
    key_offsets: Tensor | None
    bias: Tensor | None
    q_weight: Tensor | None
    q_bias: Tensor | None
    k_weight: Tensor | None
    k_bias: Tensor | None
    norm: int
    eps: float
    cos: Tensor | None
    sin: Tensor | None

    @property
    def prepares(self) -> bool:
        return self.norm != 0 or self.cos is not None


def _affine(weight: Tensor | None, bias: Tensor | None) -> int:
    return 0 if weight is None else 1 if bias is None else 2


def _major(x: Tensor) -> int:
    """The compute capability that launches are chosen for. 12.x has neither Hopper's wgmma nor
    Blackwell's tensor memory, and 99 KB of shared memory per block, which 8.x's tiles fit."""
    major = torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 9
    return 8 if major == 12 else major


def _strides(x: Tensor) -> tuple[int, int, int]:
    """(batch, row, head) strides of (B, N, H, d), or of (T, H, d), which has no batch."""
    return (0, x.stride(0), x.stride(1)) if x.dim() == 3 else x.stride()[:3]


def _vector(d: int, *tensors: Tensor) -> int:
    """Numbers of which d and every stride are multiples: at most 16 bytes of them."""
    steps = (d, *(s for t in tensors for s in _strides(t)))
    return _power_within(16 // tensors[0].element_size(), *steps)


def _power_within(lanes: int, *steps: int) -> int:
    """The largest power of two, up to `lanes`, that divides every step."""
    while lanes > 1 and any(step % lanes for step in steps):
        lanes //= 2
    return lanes


def _check(q: Tensor, k: Tensor, v: Tensor, o: Options) -> None:
    """What these kernels lack or assume; shapes in general are the public functions' to check."""
    d = q.shape[-1]
    if len({q.dtype, k.dtype, v.dtype}) != 1 or q.dtype not in backends.DTYPES["triton"]:
        raise ValueError(
            f"triton_attention: q, k and v must share float32, float16 or bfloat16, "
            f"got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if d > 256:
        raise ValueError(f"triton_attention: heads of up to 256 numbers, got {d}")
    if o.norm not in (0, 1, 2):
        raise ValueError(f"triton_attention: norm={o.norm} is unknown: use 0, 1 or 2")
    if o.key_offsets is not None and (o.bias is not None or o.cos is not None):
        raise ValueError("triton_attention: key_offsets go with neither bias nor cos and sin")
    if (o.cos is None) != (o.sin is None) or (o.cos is not None and d % 2):
        raise ValueError(f"triton_attention: cos and sin go together and need even heads, got {d}")
    if o.q_bias is not None and o.q_weight is None or o.k_bias is not None and o.k_weight is None:
        raise ValueError("triton_attention: a norm's bias needs its weight")
    if (o.q_weight is not None or o.k_weight is not None) and not o.norm:
        raise ValueError("triton_attention: q_weight and k_weight need norm=1 or norm=2")
    if o.bias is not None and tuple(o.bias.shape[1:]) != (q.shape[2], q.shape[1], k.shape[1]):
        raise ValueError(
            f"triton_attention: bias must be (1 or B, H, Nq, Nk), got {tuple(o.bias.shape)}"
        )


@dataclass(frozen=True)
class _Call:
    """The arguments that most launches share."""

    B: int
    Nq: int
    Nk: int
    H: int
    d: int
    D0: int
    D1: int
    itemsize: int
    major: int
    lengths: Tensor | None
    offsets: Tensor | None
    bias: Tensor | None
    bias_strides: tuple[int, int, int]
    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, q: Tensor, k: Tensor, o: Options) -> "_Call":
        B, Nq, H, d = q.shape
        bias = None if o.bias is None else dense(o.bias)
        steps = (0, 0, 0)
        if bias is not None:
            steps = (bias.stride(0) if bias.shape[0] > 1 else 0, bias.stride(1), bias.stride(2))
        rotation = [q if t is None else t.float().contiguous() for t in (o.cos, o.sin)]
        counts = (o.key_lengths, o.key_offsets)
        counts = [None if t is None else t.to(torch.int32).contiguous() for t in counts]
        return cls(
            B, Nq, k.shape[-3], H, d, *head_tiles(d), q.element_size(), _major(q),
            *counts, bias, steps, *rotation,
        )  # fmt: skip

    @property
    def width(self) -> int:
        return self.D0 + self.D1

    def absent(self, *tensors: Tensor | None) -> list[Tensor]:
        """Some dense tensor for every pointer; constants keep kernels away from what is None."""
        return [self.cos if t is None else t.contiguous() for t in tensors]

    def masks(self) -> list[Tensor]:
        return [self.cos if t is None else t for t in (self.lengths, self.offsets, self.bias)]

    def flags(self, config: LaunchConfig, vec: int) -> dict[str, Any]:
        """The constants of every kernel with scores."""
        whole = self.lengths is None and self.offsets is None and self.Nk % config.keys == 0
        return {
            "CHUNK": CHUNK,
            "LENGTHS": self.lengths is not None,
            "OFFSETS": self.offsets is not None,
            "BIAS": self.bias is not None,
            "BIAS_VEC": self.bias_vector(),
            "EVEN_Q": self.Nq % config.rows == 0,
            "EVEN_K": whole,
            "ROWS": config.rows,
            "KEYS": config.keys,
            "UPCAST": backends.interpreting(),
        } | self.launch(config, vec)

    def bias_vector(self) -> int:
        if self.bias is None:
            return 1
        return _power_within(16 // self.bias.element_size(), self.Nk, *self.bias_strides)

    def launch(self, config: LaunchConfig, vec: int) -> dict[str, Any]:
        return {
            "HEAD": self.d,
            "D0": self.D0,
            "D1": self.D1,
            "VEC": vec,
            "num_warps": config.warps,
            "num_stages": config.stages,
        }


def _without(flags: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if name not in names}


def _fits_32_bits(*tensors: Tensor) -> bool:
    """Whether offsets within one sample do: the short form's do not leave 32 bits."""
    return all(t.shape[-3] * t.stride(-3) < 2**31 for t in tensors)


def _prepared(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, c: _Call, o: Options
) -> Tensor:
    """rope(norm(x)), contiguous; x itself where neither is asked for."""
    if not o.prepares:
        return x
    y = x.new_empty(x.shape)
    B, N = (1, x.shape[0]) if x.dim() == 3 else x.shape[:2]
    rows = 32
    blocks = triton.cdiv(N * c.H, rows)
    wrap_triton(prepare_kernel)[(B * blocks,)](
        x, y, *c.absent(weight, bias), c.cos, c.sin, c.H, N, *_strides(x), blocks, o.eps,
        NORM=o.norm, AFFINE=_affine(weight, bias), ROPE=o.cos is not None, ROWS=rows,
        **c.launch(LaunchConfig(rows, 0, 4, 1), _vector(c.d, x)),
    )  # fmt: skip
    return y


def _forward(q: Tensor, k: Tensor, v: Tensor, o: Options) -> tuple[Tensor, Tensor]:
    _check(q, k, v, o)
    q, k, v = dense(q), dense(k), dense(v)
    c = _Call.of(q, k, o)
    out = q.new_empty((c.B, c.Nq, c.H, c.d))
    lse = q.new_empty((c.B, c.H, c.Nq), dtype=torch.float32)
    if out.numel() == 0 or c.Nk == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    config = LaunchConfig.short_forward(
        c.Nk, c.width, c.itemsize, c.major, o.prepares, o.bias is not None
    )
    if config is not None and _fits_32_bits(q, k, v, out):
        blocks = triton.cdiv(c.Nq, config.rows)
        parts = 1 if c.B * c.H >= ENOUGH else blocks
        wrap_triton(short_fwd_kernel)[(c.B * c.H * parts,)](
            q, k, v, out, lse, *c.masks(), *c.absent(o.q_weight, o.q_bias, o.k_weight, o.k_bias),
            c.cos, c.sin, c.H, c.Nq, c.Nk, parts, *_strides(q), *_strides(k), *_strides(v),
            *c.bias_strides, o.scale, o.eps, NORM=o.norm, Q_AFFINE=_affine(o.q_weight, o.q_bias),
            K_AFFINE=_affine(o.k_weight, o.k_bias), ROPE=o.cos is not None,
            **_without(c.flags(config, _vector(c.d, q, k, v)), "CHUNK"),
        )  # fmt: skip
        return out, lse
    config = LaunchConfig.long_forward(c.width, c.itemsize, c.major)
    q, k = _prepared(q, o.q_weight, o.q_bias, c, o), _prepared(k, o.k_weight, o.k_bias, c, o)
    tiles = triton.cdiv(c.Nq, config.rows)
    wrap_triton(long_fwd_kernel)[(c.B * c.H * tiles,)](
        q, k, v, out, lse, *c.masks(), c.H, c.Nq, c.Nk, tiles, *_strides(q), *_strides(k),
        *_strides(v), *c.bias_strides, o.scale,
        **_without(c.flags(config, _vector(c.d, q, k, v)), "CHUNK"),
    )  # fmt: skip
    return out, lse


def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    o: Options,
    packed: bool,
    need_bias: bool,
) -> list[Tensor]:
    """[dq, dk, dv, dbias, dq_weight, dq_bias, dk_weight, dk_bias]; empty where there is none.

    packed: dq is (B, N, 3, H, d), and dk and dv are empty.
    """
    q, k, v, dout = dense(q), dense(k), dense(v), dense(dout)
    c = _Call.of(q, k, o)
    if packed:
        dq = q.new_empty((c.B, c.Nq, 3, c.H, c.d))
        dk, dv = q.new_empty(0), q.new_empty(0)
        steps = (dq.stride(0), dq.stride(1))
        q_steps, k_steps = steps, steps
    else:
        dq = q.new_empty(q.shape)
        # Rows of no sample are nobody's to write.
        make = k.new_empty if c.offsets is None else k.new_zeros
        dk, dv = make(k.shape), make(v.shape)
        q_steps, k_steps = (dq.stride(0), dq.stride(1)), _strides(dk)[:2]
    weights = (o.q_weight, o.q_bias, o.k_weight, o.k_bias)
    sums = [q.new_empty(0) if t is None else t.new_zeros(t.shape) for t in weights]
    need_bias = need_bias and o.bias is not None
    dbias = o.bias.new_zeros(o.bias.shape) if need_bias else q.new_empty(0)
    if prod((c.B, c.Nq, c.H, c.d)) == 0 or c.Nk == 0:
        return [dq.zero_(), dk.zero_(), dv.zero_(), dbias, *sums]
    if dlse is not None:
        dlse = dlse.float().contiguous()
    vec = _vector(c.d, q, k, v, dout)
    q_affine, k_affine = _affine(o.q_weight, o.q_bias), _affine(o.k_weight, o.k_bias)
    config = LaunchConfig.short_backward(
        c.Nq, c.Nk, c.width, c.itemsize, c.major, o.bias is not None
    )
    short = config is not None and _fits_32_bits(q, k, v, dout, out)
    if short:
        programs = c.B * c.H if q_affine or k_affine else 0
        partial = q.new_empty((programs, 4, c.d), dtype=torch.float32)
        flags = c.flags(config, vec) | {"EVEN_Q": c.Nq == config.rows}
        wrap_triton(short_bwd_kernel)[(c.B * c.H,)](
            q, k, v, out, lse, dout, *c.absent(dlse), dq, *((q, q) if packed else (dk, dv)),
            partial, *c.masks(), *c.absent(o.q_weight, o.q_bias, o.k_weight, o.k_bias),
            c.cos, c.sin, c.H, c.Nq, c.Nk, *_strides(q), *_strides(k), *_strides(v),
            *_strides(dout), *q_steps, *k_steps, *c.bias_strides, o.scale, o.eps, NORM=o.norm,
            Q_AFFINE=q_affine, K_AFFINE=k_affine, ROPE=o.cos is not None, DLSE=dlse is not None,
            PACKED=packed, **flags,
        )  # fmt: skip
        _second_stage(partial, weights, sums, 0)
    if not short or need_bias:
        raw_q, raw_k = q, k
        q, k = _prepared(q, o.q_weight, o.q_bias, c, o), _prepared(k, o.k_weight, o.k_bias, c, o)
        delta = _delta(out, dout, dlse, c)
    if not short:
        _long_backward(
            q, k, v, raw_q, raw_k, lse, delta, dout, dq, dk, dv, sums, q_steps, k_steps, c, o,
            packed,
        )  # fmt: skip
    if need_bias:
        dbias = _bias_gradient(q, k, v, lse, delta, dout, dbias, c, o)
    return [dq, dk, dv, dbias, *sums]


def _second_stage(
    partial: Tensor, weights: tuple[Tensor | None, ...], sums: list[Tensor], first: int
) -> None:
    """sums[first:]: the gradients of weights, added over the programs in torch's fixed order."""
    for i, weight in enumerate(weights):
        if weight is not None:
            sums[first + i] = partial[:, i].sum(0).to(weight.dtype)


def _delta(out: Tensor, dout: Tensor, dlse: Tensor | None, c: _Call) -> Tensor:
    rows = 64
    blocks = triton.cdiv(c.Nq * c.H, rows)
    delta = out.new_empty((c.B, c.H, c.Nq), dtype=torch.float32)
    wrap_triton(delta_kernel)[(c.B * blocks,)](
        out, dout, *c.absent(dlse), delta, c.H, c.Nq, *_strides(dout), blocks,
        DLSE=dlse is not None, ROWS=rows,
        **c.launch(LaunchConfig(rows, 0, 4, 1), _vector(c.d, out, dout)),
    )  # fmt: skip
    return delta


def _long_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    raw_q: Tensor,
    raw_k: Tensor,
    lse: Tensor,
    delta: Tensor,
    dout: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    sums: list[Tensor],
    q_steps: tuple[int, int],
    k_steps: tuple[int, int],
    c: _Call,
    o: Options,
    packed: bool,
) -> None:
    """Fills dq, dk, dv, and `sums` where there are weights."""
    vec = _vector(c.d, q, k, v, dout, raw_q, raw_k)
    shared = {"NORM": o.norm, "ROPE": o.cos is not None}
    q_affine, k_affine = _affine(o.q_weight, o.q_bias), _affine(o.k_weight, o.k_bias)
    config = LaunchConfig.long_dkv(c.width, c.itemsize, c.major)
    # With offsets nobody knows here how long the longest sample is: few programs, that walk.
    tiles = triton.cdiv(c.Nk, config.keys)
    tiles = tiles if c.offsets is None else min(tiles, 4)
    partial = q.new_empty((c.B * c.H * tiles if k_affine else 0, 2, c.d), dtype=torch.float32)
    wrap_triton(long_dkv_kernel)[(c.B * c.H * tiles,)](
        q, k, v, lse, delta, dout, *((dq, q) if packed else (dk, dv)), partial, raw_k, *c.masks(),
        *c.absent(o.k_weight), c.cos, c.sin, c.H, c.Nq, c.Nk, tiles, *_strides(q), *_strides(k),
        *_strides(v), *_strides(dout), *k_steps, *_strides(raw_k), *c.bias_strides, o.scale, o.eps,
        K_AFFINE=k_affine, PACKED=packed, **shared, **c.flags(config, vec),
    )  # fmt: skip
    _second_stage(partial, (o.k_weight, o.k_bias), sums, 2)
    config = LaunchConfig.long_dq(c.width, c.itemsize, c.major)
    tiles = triton.cdiv(c.Nq, config.rows)
    partial = q.new_empty((c.B * c.H * tiles if q_affine else 0, 2, c.d), dtype=torch.float32)
    wrap_triton(long_dq_kernel)[(c.B * c.H * tiles,)](
        q, k, v, lse, delta, dout, dq, partial, raw_q, *c.masks(), *c.absent(o.q_weight),
        c.cos, c.sin, c.H, c.Nq, c.Nk, tiles, *_strides(q), *_strides(k), *_strides(v),
        *_strides(dout), *q_steps, *_strides(raw_q), *c.bias_strides, o.scale, o.eps,
        Q_AFFINE=q_affine, **shared, **c.flags(config, vec),
    )  # fmt: skip
    _second_stage(partial, (o.q_weight, o.q_bias), sums, 0)


def _bias_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    dout: Tensor,
    dbias: Tensor,
    c: _Call,
    o: Options,
) -> Tensor:
    """One sample per group where every sample has its bias; else groups, added afterwards."""
    side = 64 if c.itemsize == 2 else 32
    config = LaunchConfig(side, side, 4, 2 if c.itemsize == 2 else 1)
    q_tiles, k_tiles = triton.cdiv(c.Nq, side), triton.cdiv(c.Nk, side)
    groups = c.B
    if dbias.shape[0] == 1:
        groups = min(c.B, triton.cdiv(ENOUGH, c.H * q_tiles * k_tiles))
    group = triton.cdiv(c.B, groups)
    groups = triton.cdiv(c.B, group)
    apart = dbias.shape[0] == 1 and groups > 1
    made = dbias.new_empty((groups, *dbias.shape[1:]), dtype=torch.float32) if apart else dbias
    flags = c.flags(config, _vector(c.d, q, k, v, dout))
    flags = _without(flags, "CHUNK", "OFFSETS", "BIAS", "EVEN_Q", "EVEN_K")
    wrap_triton(dbias_kernel)[(groups * c.H * q_tiles * k_tiles,)](
        q, k, v, lse, delta, dout, made, c.masks()[0], c.bias, c.B, c.H, c.Nq, c.Nk,
        q_tiles, k_tiles, group, *_strides(q), *_strides(k), *_strides(v), *_strides(dout),
        *c.bias_strides, o.scale, **flags,
    )  # fmt: skip
    return made.sum(0, keepdim=True).to(dbias.dtype) if apart else made


@triton_op("etude::triton_attention", mutates_args={})
@backends.on_its_device
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    key_lengths: Tensor | None,
    key_offsets: Tensor | None,
    bias: Tensor | None,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    norm: int,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
) -> tuple[Tensor, Tensor]:
    options = Options(
        scale, key_lengths, key_offsets, bias, q_weight, q_bias, k_weight, k_bias, norm, eps, cos,
        sin,
    )  # fmt: skip
    return _forward(q, k, v, options)


@triton_op("etude::triton_attention_packed", mutates_args={})
@backends.on_its_device
def _attention_packed(
    qkv: Tensor,
    scale: float,
    key_lengths: Tensor | None,
    bias: Tensor | None,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    norm: int,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
) -> tuple[Tensor, Tensor]:
    options = Options(
        scale, key_lengths, None, bias, q_weight, q_bias, k_weight, k_bias, norm, eps, cos, sin
    )
    return _forward(*dense(qkv).unbind(2), options)


@triton_op("etude::triton_attention_backward", mutates_args={})
@backends.on_its_device
def _attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    need_bias: bool,
    scale: float,
    key_lengths: Tensor | None,
    key_offsets: Tensor | None,
    bias: Tensor | None,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    norm: int,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = Options(
        scale, key_lengths, key_offsets, bias, q_weight, q_bias, k_weight, k_bias, norm, eps, cos,
        sin,
    )  # fmt: skip
    return tuple(_backward(dout, dlse, q, k, v, out, lse, options, False, need_bias))


@triton_op("etude::triton_attention_packed_backward", mutates_args={})
@backends.on_its_device
def _attention_packed_backward(
    dout: Tensor,
    dlse: Tensor | None,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    need_bias: bool,
    scale: float,
    key_lengths: Tensor | None,
    bias: Tensor | None,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    norm: int,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = Options(
        scale, key_lengths, None, bias, q_weight, q_bias, k_weight, k_bias, norm, eps, cos, sin
    )
    q, k, v = dense(qkv).unbind(2)
    made = _backward(dout, dlse, q, k, v, out, lse, options, True, need_bias)
    return made[0], *made[3:]


def _register_gradients() -> None:
    def context(ctx, inputs, output) -> None:
        q, k, v, ctx.scale, lengths, offsets, bias, qw, qb, kw, kb, ctx.norm, ctx.eps, *rope = (
            inputs
        )
        ctx.save_for_backward(q, k, v, *output, lengths, offsets, bias, qw, qb, kw, kb, *rope)
        ctx.set_materialize_grads(False)

    def backward(ctx, dout, dlse):
        q, k, v, out, lse, *options, cos, sin = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        made = ops.etude.triton_attention_backward(
            dout, dlse, q, k, v, out, lse, ctx.needs_input_grad[6], ctx.scale, *options, ctx.norm,
            ctx.eps, cos, sin,
        )  # fmt: skip
        dq, dk, dv, *rest = (g if want else None for g, want in _wanted(made, ctx, 0, 1, 2, 6))
        return dq, dk, dv, None, None, None, *rest, None, None, None, None

    def packed_context(ctx, inputs, output) -> None:
        qkv, ctx.scale, *options, ctx.norm, ctx.eps, cos, sin = inputs
        ctx.save_for_backward(qkv, *output, *options, cos, sin)
        ctx.set_materialize_grads(False)

    def packed_backward(ctx, dout, dlse):
        qkv, out, lse, *options, cos, sin = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        made = ops.etude.triton_attention_packed_backward(
            dout, dlse, qkv, out, lse, ctx.needs_input_grad[3], ctx.scale, *options, ctx.norm,
            ctx.eps, cos, sin,
        )  # fmt: skip
        dqkv, *rest = (g if want else None for g, want in _wanted(made, ctx, 0, 3))
        return dqkv, None, None, *rest, None, None, None, None

    register = torch.library.register_autograd
    register("etude::triton_attention", backward, setup_context=context)
    register("etude::triton_attention_packed", packed_backward, setup_context=packed_context)


def _wanted(made: tuple[Tensor, ...], ctx: Any, *inputs: int) -> list[tuple[Tensor, bool]]:
    """Every gradient and whether its input asks for it; after the last, inputs are consecutive."""
    last = inputs[-1]
    following = range(last + 1, last + 1 + len(made) - len(inputs))
    return [(g, ctx.needs_input_grad[i]) for g, i in zip(made, (*inputs, *following), strict=True)]


_register_gradients()


def _build(name: str, kernel: Any, d: int, config: LaunchConfig, arch: int, **chosen: Any) -> Build:
    """A kernel as DiT launches it: bfloat16, whole tiles, and `chosen` constants instead."""
    D0, D1 = head_tiles(d)
    flags = {"LENGTHS": False, "OFFSETS": False, "BIAS": False, "DLSE": False, "PACKED": True}
    flags |= {"NORM": 0, "AFFINE": 0, "Q_AFFINE": 0, "K_AFFINE": 0, "ROPE": False}
    flags |= {"EVEN_Q": True, "EVEN_K": True, "UPCAST": False, "VEC": 8}
    flags |= {
        "BIAS_VEC": 8,
        "CHUNK": CHUNK,
        "HEAD": d,
        "D0": D0,
        "D1": D1,
        "ROWS": config.rows,
        "KEYS": config.keys,
    } | chosen
    dtype = flags.pop("dtype", "bf16")
    constants = {n: v for n, v in flags.items() if n in kernel.arg_names}
    wide = ("lse_ptr", "dlse_ptr", "delta_ptr", "partial_ptr", "cos_ptr", "sin_ptr")
    wide += ("w_ptr", "b_ptr", "qw_ptr", "qb_ptr", "kw_ptr", "kb_ptr")
    types = {}
    for n in kernel.arg_names:
        if n in constants:
            continue
        if n.endswith("_ptr"):
            integer = n in ("lengths_ptr", "offsets_ptr")
            types[n] = "*i32" if integer else "*fp32" if n in wide else f"*{dtype}"
        else:
            types[n] = "fp32" if n in ("scale", "eps") else "i32"
    aligned = tuple(n for n in types if n.endswith(("_b", "_n")))
    return Build(
        f"{name} d={d}", kernel, types, constants, aligned, config.warps, config.stages, (arch,)
    )


def builds() -> list[Build]:
    """Launches of a DiT in bfloat16: N = 256 packed, long sequences, and Hopper's options."""
    made = []
    norm = {"NORM": 1, "Q_AFFINE": 1, "K_AFFINE": 1, "AFFINE": 1, "ROPE": True}
    text = {"PACKED": False, "EVEN_K": False}
    for arch in (80, 90, 100):
        major = arch // 10
        for d in (64, 72, 128):
            width = sum(head_tiles(d))
            config = LaunchConfig.short_forward(256, width, 2, major, False, False)
            if config is not None:
                made.append(_build("short forward N=256", short_fwd_kernel, d, config, arch))
            config = LaunchConfig.short_backward(256, 256, width, 2, major, False)
            if config is not None:
                made.append(_build("short backward N=256", short_bwd_kernel, d, config, arch))
            config = LaunchConfig.long_forward(width, 2, major)
            made.append(_build("long forward", long_fwd_kernel, d, config, arch))
            config = LaunchConfig.long_dkv(width, 2, major)
            made.append(_build("long dk dv", long_dkv_kernel, d, config, arch))
            config = LaunchConfig.long_dq(width, 2, major)
            made.append(_build("long dq", long_dq_kernel, d, config, arch))
        forward, dkv, dq = LaunchConfig.long_forward, LaunchConfig.long_dkv, LaunchConfig.long_dq
        short = LaunchConfig.short_forward
        listed = [
            ("long dk dv rmsnorm rope", long_dkv_kernel, dkv(80, 2, major), norm),
            ("long dq bias", long_dq_kernel, dq(80, 2, major), {"BIAS": True}),
            (
                "short forward Nk=120 lengths bias",
                short_fwd_kernel,
                short(120, 80, 2, major, False, True),
                text | {"LENGTHS": True, "BIAS": True},
            ),
        ]
        if arch == 90:
            rows = LaunchConfig(64, 64, 4, 2)
            packed = LaunchConfig.short_backward(256, 120, 80, 2, major, False)
            exact = {"dtype": "fp32", "VEC": 4}
            listed += [
                ("short forward N=256 rmsnorm rope", short_fwd_kernel,
                 short(256, 80, 2, major, True, False), norm),
                ("short backward N=256 rmsnorm rope", short_bwd_kernel, packed, norm),
                ("short backward Nk=120 offsets", short_bwd_kernel, packed,
                 text | {"OFFSETS": True}),
                ("long forward bias", long_fwd_kernel, forward(80, 2, major), {"BIAS": True}),
                ("long forward float32", long_fwd_kernel, forward(80, 4, major), exact),
                ("long dk dv float32", long_dkv_kernel, dkv(80, 4, major), exact),
                ("long dq float32", long_dq_kernel, dq(80, 4, major), exact),
                ("prepare", prepare_kernel, LaunchConfig(32, 0, 4, 1), norm),
                ("delta", delta_kernel, LaunchConfig(64, 0, 4, 1), {}),
                ("dbias", dbias_kernel, rows, {}),
            ]  # fmt: skip
        made += [
            _build(name, kernel, 72, config, arch, **chosen)
            for name, kernel, config, chosen in listed
        ]
    return made
