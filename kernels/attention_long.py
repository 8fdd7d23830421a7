"""Attention of any length: scores live in tiles only (FlashAttention-2, Dao 2023, in Triton).

* forward: a block of queries walks over the keys with a running maximum and sum.
* backward: two kernels, 7 products for the 5 of the gradient, and many programs. One owns a block
  of keys and walks over the queries; it works on the transposed scores (keys x queries), so that p
  and ds are left operands of their products straight from registers. The other owns a block of
  queries and walks over the keys. Every gradient has one writer: no atomics, the same bits each
  time. delta = rowsum(dout * out) - dlse comes from a small kernel before them.
* the norm and rotation of q and k: a block would repeat them for every block it meets, as much time
  on the plain cores as its products take on the tensor cores. Here a kernel writes the prepared q
  and k once (4 N d of traffic next to 4 N^2 d of work). Their gradients are the epilogue of the two
  backward kernels.
* the gradient of a bias: its own kernel, which works out p and ds of a tile again and, where one
  bias serves the whole batch, sums a group of samples in registers before it writes.

Launched by attention_triton.py.
"""

import triton
import triton.language as tl

from .attention_tiles import (
    LN2,
    LOG2E,
    bias_tile,
    key_range,
    load_head,
    prepare,
    row_sum,
    scores,
    settle,
    store_head,
    store_sums,
    weigh,
    within,
    zeros_head,
    zeros_sums,
)


@triton.jit
def prepare_kernel(
    x_ptr, y_ptr, w_ptr, b_ptr, cos_ptr, sin_ptr, H, N, x_b, x_n, x_h, blocks, eps,
    NORM: tl.constexpr, AFFINE: tl.constexpr, ROPE: tl.constexpr,
    HEAD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """y (B, N, H, d) contiguous: rope(norm(x)). ROWS neighbouring heads, then tokens, a program."""
    program = tl.program_id(0).to(tl.int64)
    b = program // blocks
    index = (program % blocks) * ROWS + tl.arange(0, ROWS)
    n = index // H
    live = n < N
    at = b * x_b + n * x_n + (index % H) * x_h
    x0, x1 = load_head(x_ptr, at, live, HEAD, D0, D1, VEC)
    x0, x1 = prepare(
        x0, x1, w_ptr, b_ptr, cos_ptr, sin_ptr, n, live, eps, NORM, AFFINE, ROPE, HEAD, D0, D1
    )
    store_head(y_ptr, (b * N * H + index) * HEAD, live, x0, x1, HEAD, D0, D1, VEC)


@triton.jit
def delta_kernel(
    out_ptr, dout_ptr, dlse_ptr, delta_ptr, H, N, o_b, o_n, o_h, blocks,
    DLSE: tl.constexpr, HEAD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    VEC: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """delta (B, H, N): rowsum(dout * out) - dlse. ROWS neighbouring heads, then tokens."""
    program = tl.program_id(0).to(tl.int64)
    b = program // blocks
    index = (program % blocks) * ROWS + tl.arange(0, ROWS)
    n = index // H
    h = index % H
    live = n < N
    o0, o1 = load_head(out_ptr, (b * N * H + index) * HEAD, live, HEAD, D0, D1, VEC)
    g0, g1 = load_head(dout_ptr, b * o_b + n * o_n + h * o_h, live, HEAD, D0, D1, VEC)
    delta = row_sum(
        o0.to(tl.float32) * g0.to(tl.float32), o1.to(tl.float32) * g1.to(tl.float32), D1
    )
    at = (b * H + h) * N + n
    if DLSE:
        delta -= tl.load(dlse_ptr + at, mask=live, other=0.0)
    tl.store(delta_ptr + at, delta, mask=live)


@triton.jit
def long_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, lengths_ptr, offsets_ptr, bias_ptr,
    H, Nq, Nk, tiles, q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, bias_b, bias_h, bias_n, scale,
    LENGTHS: tl.constexpr, OFFSETS: tl.constexpr, BIAS: tl.constexpr, BIAS_VEC: tl.constexpr,
    EVEN_Q: tl.constexpr, EVEN_K: tl.constexpr,
    HEAD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, VEC: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out and lse of ROWS queries of one head; neighbouring programs share its keys in L2."""
    program = tl.program_id(0).to(tl.int64)
    rows = (program % tiles) * ROWS + tl.arange(0, ROWS)
    b = program // tiles // H
    h = program // tiles % H
    first, length = key_range(b, lengths_ptr, offsets_ptr, Nk, LENGTHS, OFFSETS)
    k_ptr += tl.multiple_of(b * k_b + h * k_h, VEC)
    v_ptr += tl.multiple_of(b * v_b + h * v_h, VEC)
    q_ptr += tl.multiple_of(b * q_b + h * q_h, VEC)
    bias_ptr += tl.multiple_of(b * bias_b + h * bias_h, BIAS_VEC)
    if OFFSETS:
        k_ptr += tl.multiple_of(first * k_n, VEC)
        v_ptr += tl.multiple_of(first * v_n, VEC)
    live_q = within(rows, Nq, EVEN_Q)
    q0, q1 = load_head(q_ptr, rows * q_n, live_q, HEAD, D0, D1, VEC)
    top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    o0, o1 = zeros_head(ROWS, D0, D1)
    for start in range(0, length, KEYS):
        keys = start + tl.arange(0, KEYS)
        live_k = within(keys, length, EVEN_K)
        at_key = keys.to(tl.int64)
        k0, k1 = load_head(k_ptr, at_key * k_n, live_k, HEAD, D0, D1, VEC)
        s = scores(q0, q1, k0, k1, D1, UPCAST) * (scale * LOG2E)
        if BIAS:
            s += bias_tile(bias_ptr, rows, keys, Nq, Nk, bias_n, BIAS_VEC)
        if not EVEN_K:
            s = tl.where(live_k[None, :], s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # no key yet: p = 0, not NaN
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, axis=1)
        o0 = o0 * shrink[:, None]
        if D1:
            o1 = o1 * shrink[:, None]
        v0, v1 = load_head(v_ptr, at_key * v_n, live_k, HEAD, D0, D1, VEC)
        o0, o1 = weigh(p.to(v_ptr.dtype.element_ty), v0, v1, o0, o1, D1, UPCAST)
        top = higher
    share = 1.0 / tl.where(total == 0.0, 1.0, total)[:, None]
    at_out = ((b * Nq + rows) * H + h) * HEAD
    store_head(out_ptr, at_out, live_q, o0 * share, o1 * share, HEAD, D0, D1, VEC)
    at_lse = lse_ptr + (b * H + h) * Nq + rows
    tl.store(at_lse, (top + tl.log2(total)) * LN2, mask=live_q)


@triton.jit
def _row_numbers(lse_ptr, delta_ptr, at, live):
    """(lse in powers of two, delta); inf where a row has no keys or does not exist: p = 0."""
    lse = tl.load(lse_ptr + at, mask=live, other=float("-inf")) * LOG2E
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    return lse, tl.load(delta_ptr + at, mask=live, other=0.0)


@triton.jit
def long_dkv_kernel(
    q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dout_ptr, dk_ptr, dv_ptr, partial_ptr, raw_ptr,
    lengths_ptr, offsets_ptr, bias_ptr, kw_ptr, cos_ptr, sin_ptr,
    H, Nq, Nk, tiles, q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, o_b, o_n, o_h, dk_b, dk_n,
    raw_b, raw_n, raw_h, bias_b, bias_h, bias_n, scale, eps,
    LENGTHS: tl.constexpr, OFFSETS: tl.constexpr, BIAS: tl.constexpr, BIAS_VEC: tl.constexpr,
    NORM: tl.constexpr,
    K_AFFINE: tl.constexpr, ROPE: tl.constexpr, EVEN_Q: tl.constexpr, EVEN_K: tl.constexpr,
    PACKED: tl.constexpr,
    HEAD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, VEC: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dk and dv of every tiles-th block of KEYS keys of one head.

    k: prepared; raw: k as it was given. PACKED: dk_ptr is dqkv, and dk and dv lie H * HEAD and
    2 H * HEAD numbers behind its start. partial[program]: sums for the weight and bias of k.
    """
    program = tl.program_id(0).to(tl.int64)
    b = program // tiles // H
    h = program // tiles % H
    if PACKED:
        dk_ptr += H * HEAD
        dv_ptr = dk_ptr + H * HEAD
    first, length = key_range(b, lengths_ptr, offsets_ptr, Nk, LENGTHS, OFFSETS)
    k_ptr += tl.multiple_of(b * k_b + h * k_h, VEC)
    v_ptr += tl.multiple_of(b * v_b + h * v_h, VEC)
    q_ptr += tl.multiple_of(b * q_b + h * q_h, VEC)
    bias_ptr += tl.multiple_of(b * bias_b + h * bias_h, BIAS_VEC)
    dout_ptr += tl.multiple_of(b * o_b + h * o_h, VEC)
    raw_ptr += tl.multiple_of(b * raw_b + h * raw_h, VEC)
    dk_ptr += tl.multiple_of(b * dk_b + h * HEAD, VEC)
    dv_ptr += tl.multiple_of(b * dk_b + h * HEAD, VEC)
    if OFFSETS:
        k_ptr += tl.multiple_of(first * k_n, VEC)
        v_ptr += tl.multiple_of(first * v_n, VEC)
        raw_ptr += tl.multiple_of(first * raw_n, VEC)
        dk_ptr += tl.multiple_of(first * dk_n, VEC)
        dv_ptr += tl.multiple_of(first * dk_n, VEC)
    end = length if OFFSETS else Nk  # keys beyond a length get zeros
    for start in range((program % tiles).to(tl.int32) * KEYS, end, tiles * KEYS):
        keys = start + tl.arange(0, KEYS)
        live_k = within(keys, length, EVEN_K)
        live_out = within(keys, end, EVEN_K)
        at_key = keys.to(tl.int64)
        k0, k1 = load_head(k_ptr, at_key * k_n, live_k, HEAD, D0, D1, VEC)
        v0, v1 = load_head(v_ptr, at_key * v_n, live_k, HEAD, D0, D1, VEC)
        dk0, dk1 = zeros_head(KEYS, D0, D1)
        dv0, dv1 = zeros_head(KEYS, D0, D1)
        for top in range(0, Nq, ROWS):
            rows = top + tl.arange(0, ROWS)
            live_q = within(rows, Nq, EVEN_Q)
            wide = rows.to(tl.int64)
            q0, q1 = load_head(q_ptr, wide * q_n, live_q, HEAD, D0, D1, VEC)
            lse, delta = _row_numbers(lse_ptr, delta_ptr, (b * H + h) * Nq + rows, rows < Nq)
            s = scores(k0, k1, q0, q1, D1, UPCAST) * (scale * LOG2E)
            if BIAS:
                s += tl.trans(bias_tile(bias_ptr, wide, keys, Nq, Nk, bias_n, BIAS_VEC))
            if not EVEN_K:
                s = tl.where(live_k[:, None], s, float("-inf"))
            p = tl.exp2(s - lse[None, :])
            g0, g1 = load_head(dout_ptr, wide * o_n, live_q, HEAD, D0, D1, VEC)
            dv0, dv1 = weigh(p.to(g0.dtype), g0, g1, dv0, dv1, D1, UPCAST)
            ds = p * (scores(v0, v1, g0, g1, D1, UPCAST) - delta[None, :])
            dk0, dk1 = weigh(ds.to(q0.dtype), q0, q1, dk0, dk1, D1, UPCAST)
        at_out = keys.to(tl.int64) * dk_n
        store_head(dv_ptr, at_out, live_out, dv0, dv1, HEAD, D0, D1, VEC)
        store_head(dk_ptr, at_out, live_out, dk0 * scale, dk1 * scale, HEAD, D0, D1, VEC)
    sums = zeros_sums(D0, D1)
    if NORM or ROPE:
        for start in range((program % tiles).to(tl.int32) * KEYS, length, tiles * KEYS):
            sums = settle(
                dk_ptr, dk_n, raw_ptr, raw_n, start, tl.minimum(start + KEYS, length), sums, kw_ptr,
                cos_ptr, sin_ptr, eps, NORM, K_AFFINE, ROPE, HEAD, D0, D1, VEC, CHUNK,
            )  # fmt: skip
    if K_AFFINE:
        store_sums(partial_ptr + program * 2 * HEAD, sums, HEAD, D0, D1)


@triton.jit
def long_dq_kernel(
    q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dout_ptr, dq_ptr, partial_ptr, raw_ptr,
    lengths_ptr, offsets_ptr, bias_ptr, qw_ptr, cos_ptr, sin_ptr,
    H, Nq, Nk, tiles, q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, o_b, o_n, o_h, dq_b, dq_n,
    raw_b, raw_n, raw_h, bias_b, bias_h, bias_n, scale, eps,
    LENGTHS: tl.constexpr, OFFSETS: tl.constexpr, BIAS: tl.constexpr, BIAS_VEC: tl.constexpr,
    NORM: tl.constexpr,
    Q_AFFINE: tl.constexpr, ROPE: tl.constexpr, EVEN_Q: tl.constexpr, EVEN_K: tl.constexpr,
    HEAD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, VEC: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq of ROWS queries of one head. q: prepared; raw: q as it was given."""
    program = tl.program_id(0).to(tl.int64)
    rows = (program % tiles) * ROWS + tl.arange(0, ROWS)
    b = program // tiles // H
    h = program // tiles % H
    first, length = key_range(b, lengths_ptr, offsets_ptr, Nk, LENGTHS, OFFSETS)
    k_ptr += tl.multiple_of(b * k_b + h * k_h, VEC)
    v_ptr += tl.multiple_of(b * v_b + h * v_h, VEC)
    q_ptr += tl.multiple_of(b * q_b + h * q_h, VEC)
    bias_ptr += tl.multiple_of(b * bias_b + h * bias_h, BIAS_VEC)
    dout_ptr += tl.multiple_of(b * o_b + h * o_h, VEC)
    raw_ptr += tl.multiple_of(b * raw_b + h * raw_h, VEC)
    dq_ptr += tl.multiple_of(b * dq_b + h * HEAD, VEC)
    if OFFSETS:
        k_ptr += tl.multiple_of(first * k_n, VEC)
        v_ptr += tl.multiple_of(first * v_n, VEC)
    live_q = within(rows, Nq, EVEN_Q)
    q0, q1 = load_head(q_ptr, rows * q_n, live_q, HEAD, D0, D1, VEC)
    g0, g1 = load_head(dout_ptr, rows * o_n, live_q, HEAD, D0, D1, VEC)
    lse, delta = _row_numbers(lse_ptr, delta_ptr, (b * H + h) * Nq + rows, rows < Nq)
    dq0, dq1 = zeros_head(ROWS, D0, D1)
    for start in range(0, length, KEYS):
        keys = start + tl.arange(0, KEYS)
        live_k = within(keys, length, EVEN_K)
        at_key = keys.to(tl.int64)
        k0, k1 = load_head(k_ptr, at_key * k_n, live_k, HEAD, D0, D1, VEC)
        s = scores(q0, q1, k0, k1, D1, UPCAST) * (scale * LOG2E)
        if BIAS:
            s += bias_tile(bias_ptr, rows, keys, Nq, Nk, bias_n, BIAS_VEC)
        if not EVEN_K:
            s = tl.where(live_k[None, :], s, float("-inf"))
        p = tl.exp2(s - lse[:, None])
        v0, v1 = load_head(v_ptr, at_key * v_n, live_k, HEAD, D0, D1, VEC)
        ds = p * (scores(g0, g1, v0, v1, D1, UPCAST) - delta[:, None])
        dq0, dq1 = weigh(ds.to(k0.dtype), k0, k1, dq0, dq1, D1, UPCAST)
    store_head(dq_ptr, rows * dq_n, live_q, dq0 * scale, dq1 * scale, HEAD, D0, D1, VEC)
    if NORM or ROPE:
        start = ((program % tiles) * ROWS).to(tl.int32)
        sums = settle(
            dq_ptr, dq_n, raw_ptr, raw_n, start, tl.minimum(start + ROWS, Nq), zeros_sums(D0, D1),
            qw_ptr, cos_ptr, sin_ptr, eps, NORM, Q_AFFINE, ROPE, HEAD, D0, D1, VEC, CHUNK,
        )  # fmt: skip
        if Q_AFFINE:
            store_sums(partial_ptr + program * 2 * HEAD, sums, HEAD, D0, D1)


@triton.jit
def dbias_kernel(
    q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dout_ptr, dbias_ptr, lengths_ptr, bias_ptr,
    B, H, Nq, Nk, q_tiles, k_tiles, group,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, o_b, o_n, o_h, bias_b, bias_h, bias_n, scale,
    LENGTHS: tl.constexpr, BIAS_VEC: tl.constexpr,
    HEAD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    VEC: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dbias[g, h] of one tile of scores: ds summed over samples g * group to (g + 1) * group."""
    program = tl.program_id(0).to(tl.int64)
    keys = (program % k_tiles) * KEYS + tl.arange(0, KEYS)
    rows = program // k_tiles % q_tiles * ROWS + tl.arange(0, ROWS)
    h = program // k_tiles // q_tiles % H
    g = program // k_tiles // q_tiles // H
    total = tl.zeros([ROWS, KEYS], dtype=tl.float32)
    for b in range(g * group, tl.minimum((g + 1) * group, B)):
        _, length = key_range(b, lengths_ptr, lengths_ptr, Nk, LENGTHS, False)
        live_k = keys < length
        live_q = rows < Nq
        q0, q1 = load_head(q_ptr, b * q_b + h * q_h + rows * q_n, live_q, HEAD, D0, D1, VEC)
        k0, k1 = load_head(k_ptr, b * k_b + h * k_h + keys * k_n, live_k, HEAD, D0, D1, VEC)
        s = scores(q0, q1, k0, k1, D1, UPCAST) * (scale * LOG2E)
        at_bias = bias_ptr + tl.multiple_of(b * bias_b + h * bias_h, BIAS_VEC)
        s += bias_tile(at_bias, rows, keys, Nq, Nk, bias_n, BIAS_VEC)
        s = tl.where(live_k[None, :], s, float("-inf"))
        lse, delta = _row_numbers(lse_ptr, delta_ptr, (b * H + h) * Nq + rows, live_q)
        p = tl.exp2(s - lse[:, None])
        g0, g1 = load_head(dout_ptr, b * o_b + h * o_h + rows * o_n, live_q, HEAD, D0, D1, VEC)
        v0, v1 = load_head(v_ptr, b * v_b + h * v_h + keys * v_n, live_k, HEAD, D0, D1, VEC)
        total += p * (scores(g0, g1, v0, v1, D1, UPCAST) - delta[:, None])
    at = ((g * H + h) * Nq + rows[:, None]) * Nk + keys[None, :]
    there = (rows < Nq)[:, None] & (keys < Nk)[None, :]
    tl.store(dbias_ptr + at, total.to(dbias_ptr.dtype.element_ty), mask=there)
