"""Attention of short sequences: whole rows of the score matrix on chip.

The shapes of a DiT at 256 pixels: N = 256 tokens, 16 heads of 72, hundreds of samples. The work per
head is then as much memory traffic as arithmetic (4 N d numbers forward, 8 N d backward, against
4 N^2 d and 10 N^2 d operations: about one to one on a GPU of 4 TB/s and 800 TFLOP/s), so what a
kernel for long sequences does around the products is what has to go:

* forward: one program has all keys and values of a head in shared memory (256 x 80 x 2 x 2 bytes =
  80 KB, two programs per multiprocessor), and a block of 64 queries has all its scores in
  registers (64 x 256 float32 = 128 per thread). The softmax is one maximum, one exponential, one
  sum: no running maximum, no rescaling of the accumulator.
* backward: one program per head. All queries (up to 256) are ONE tile, and the loop is over blocks
  of 64 keys. dk and dv of a block are then complete within one turn, and dq is an accumulator in
  registers (256 x 80 float32 over 256 threads = 80 each) carried through the loop: the five
  products of the gradient and none twice, every tensor read once and written once, no float32 dq
  in global memory, no kernel before it for delta = rowsum(dout * out), no atomics. The other way
  around (a loop over blocks of queries inside one over keys) needs 7 products, or 80 KB of dq that
  Triton cannot address; it is the form of attention_long.py, for which there are more programs.
  The price is one program per multiprocessor: 80 accumulators, 64 scores and 64 of their gradients
  per thread fill the registers.

Programs are ordered (sample, head): a head's row is 144 bytes of a packed row of 3 x 16 x 144, so
it begins or ends in the middle of a 32-byte sector that a neighbouring head owns the other half of.
Neighbours run at the same time, and the half is a hit in L2. The same holds of the stores.

Launched by attention_triton.py.
"""

import triton
import triton.language as tl

from .attention_tiles import (
    LN2,
    LOG2E,
    arrange,
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
def short_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, lengths_ptr, offsets_ptr, bias_ptr,
    qw_ptr, qb_ptr, kw_ptr, kb_ptr, cos_ptr, sin_ptr,
    H, Nq, Nk, parts, q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, bias_b, bias_h, bias_n,
    scale, eps,
    LENGTHS: tl.constexpr, OFFSETS: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr,
    Q_AFFINE: tl.constexpr, K_AFFINE: tl.constexpr, ROPE: tl.constexpr,
    EVEN_Q: tl.constexpr, EVEN_K: tl.constexpr, BIAS_VEC: tl.constexpr,
    HEAD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, VEC: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out and lse of every parts-th block of ROWS queries of one head; KEYS >= Nk."""
    program = tl.program_id(0).to(tl.int64)
    part = (program % parts).to(tl.int32)
    b = program // parts // H
    h = program // parts % H
    first, length = key_range(b, lengths_ptr, offsets_ptr, Nk, LENGTHS, OFFSETS)
    keys = tl.arange(0, KEYS)
    live_k = within(keys, length, EVEN_K)
    # One 64-bit address per program, 32-bit offsets within a head: half the registers of addresses.
    k_ptr += tl.multiple_of(b * k_b + h * k_h, VEC)
    v_ptr += tl.multiple_of(b * v_b + h * v_h, VEC)
    if OFFSETS:
        k_ptr += tl.multiple_of(first * k_n, VEC)
        v_ptr += tl.multiple_of(first * v_n, VEC)
    q_ptr += tl.multiple_of(b * q_b + h * q_h, VEC)
    out_ptr += (b * Nq * H + h) * HEAD
    bias_ptr += tl.multiple_of(b * bias_b + h * bias_h, BIAS_VEC)
    lse_ptr += (b * H + h) * Nq
    k0, k1 = load_head(k_ptr, keys * k_n, live_k, HEAD, D0, D1, VEC)
    v0, v1 = load_head(v_ptr, keys * v_n, live_k, HEAD, D0, D1, VEC)
    k0, k1 = prepare(
        k0, k1, kw_ptr, kb_ptr, cos_ptr, sin_ptr, keys, live_k, eps,
        NORM, K_AFFINE, ROPE, HEAD, D0, D1,
    )  # fmt: skip
    for start in range(part * ROWS, Nq, parts * ROWS):
        rows = start + tl.arange(0, ROWS)
        live_q = within(rows, Nq, EVEN_Q)
        q0, q1 = load_head(q_ptr, rows * q_n, live_q, HEAD, D0, D1, VEC)
        q0, q1 = prepare(
            q0, q1, qw_ptr, qb_ptr, cos_ptr, sin_ptr, rows, live_q, eps,
            NORM, Q_AFFINE, ROPE, HEAD, D0, D1,
        )  # fmt: skip
        s = scores(q0, q1, k0, k1, D1, UPCAST) * (scale * LOG2E)
        if BIAS:
            s += bias_tile(bias_ptr, rows, keys, Nq, Nk, bias_n, BIAS_VEC)
        if not EVEN_K:
            s = tl.where(live_k[None, :], s, float("-inf"))
        top = tl.max(s, axis=1)
        top = tl.where(top == float("-inf"), 0.0, top)  # a row without keys: p = 0, not NaN
        p = tl.exp2(s - top[:, None])
        total = tl.sum(p, axis=1)
        o0, o1 = zeros_head(ROWS, D0, D1)
        o0, o1 = weigh(p.to(v_ptr.dtype.element_ty), v0, v1, o0, o1, D1, UPCAST)
        share = 1.0 / tl.where(total == 0.0, 1.0, total)[:, None]
        store_head(out_ptr, rows * (H * HEAD), live_q, o0 * share, o1 * share, HEAD, D0, D1, VEC)
        tl.store(lse_ptr + rows, (top + tl.log2(total)) * LN2, mask=live_q)


@triton.jit
def short_bwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, dout_ptr, dlse_ptr, dq_ptr, dk_ptr, dv_ptr, partial_ptr,
    lengths_ptr, offsets_ptr, bias_ptr, qw_ptr, qb_ptr, kw_ptr, kb_ptr, cos_ptr, sin_ptr,
    H, Nq, Nk, q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, o_b, o_n, o_h, dq_b, dq_n, dk_b, dk_n,
    bias_b, bias_h, bias_n, scale, eps,
    LENGTHS: tl.constexpr, OFFSETS: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr,
    Q_AFFINE: tl.constexpr, K_AFFINE: tl.constexpr, ROPE: tl.constexpr,
    EVEN_Q: tl.constexpr, EVEN_K: tl.constexpr, DLSE: tl.constexpr, PACKED: tl.constexpr,
    BIAS_VEC: tl.constexpr,
    HEAD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, VEC: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv of one head; ROWS >= Nq. o_b, o_n, o_h: strides of dout.

    partial[b, h]: this head's sums for the weights and biases of q and k, 4 x HEAD.
    PACKED: dk and dv lie H * HEAD and 2 H * HEAD numbers behind dq.
    """
    program = tl.program_id(0).to(tl.int64)
    b = program // H
    h = program % H
    if PACKED:
        dk_ptr = dq_ptr + H * HEAD
        dv_ptr = dq_ptr + 2 * H * HEAD
    first, length = key_range(b, lengths_ptr, offsets_ptr, Nk, LENGTHS, OFFSETS)
    k_ptr += tl.multiple_of(b * k_b + h * k_h, VEC)
    v_ptr += tl.multiple_of(b * v_b + h * v_h, VEC)
    q_ptr += tl.multiple_of(b * q_b + h * q_h, VEC)
    dout_ptr += tl.multiple_of(b * o_b + h * o_h, VEC)
    out_ptr += (b * Nq * H + h) * HEAD
    bias_ptr += tl.multiple_of(b * bias_b + h * bias_h, BIAS_VEC)
    dq_ptr += tl.multiple_of(b * dq_b + h * HEAD, VEC)
    dk_ptr += tl.multiple_of(b * dk_b + h * HEAD, VEC)
    dv_ptr += tl.multiple_of(b * dk_b + h * HEAD, VEC)
    if OFFSETS:
        k_ptr += tl.multiple_of(first * k_n, VEC)
        v_ptr += tl.multiple_of(first * v_n, VEC)
        dk_ptr += tl.multiple_of(first * dk_n, VEC)
        dv_ptr += tl.multiple_of(first * dk_n, VEC)

    # Prepared q and k wait where dq and dk will be written.
    hat_q, hat_q_n, hat_k, hat_k_n = q_ptr, q_n, k_ptr, k_n
    if NORM or ROPE:
        hat_q, hat_q_n, hat_k, hat_k_n = dq_ptr, dq_n, dk_ptr, dk_n
        arrange(
            q_ptr, q_n, dq_ptr, dq_n, Nq, qw_ptr, qb_ptr, cos_ptr, sin_ptr, eps,
            NORM, Q_AFFINE, ROPE, HEAD, D0, D1, VEC, CHUNK,
        )  # fmt: skip
        arrange(
            k_ptr, k_n, dk_ptr, dk_n, length, kw_ptr, kb_ptr, cos_ptr, sin_ptr, eps,
            NORM, K_AFFINE, ROPE, HEAD, D0, D1, VEC, CHUNK,
        )  # fmt: skip
        tl.debug_barrier()

    rows = tl.arange(0, ROWS)
    live_q = within(rows, Nq, EVEN_Q)
    g0, g1 = load_head(dout_ptr, rows * o_n, live_q, HEAD, D0, D1, VEC)
    o0, o1 = load_head(out_ptr, rows * (H * HEAD), live_q, HEAD, D0, D1, VEC)
    delta = row_sum(
        o0.to(tl.float32) * g0.to(tl.float32), o1.to(tl.float32) * g1.to(tl.float32), D1
    )
    at_lse = program * Nq + rows
    if DLSE:
        delta -= tl.load(dlse_ptr + at_lse, mask=live_q, other=0.0)
    lse = tl.load(lse_ptr + at_lse, mask=live_q, other=float("-inf")) * LOG2E
    # No keys, or no such row: exp2(score - inf) = 0.
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    q0, q1 = load_head(hat_q, rows * hat_q_n, live_q, HEAD, D0, D1, VEC)

    dq0, dq1 = zeros_head(ROWS, D0, D1)
    end = length if OFFSETS else Nk  # keys beyond a length get zeros
    for start in range(0, end, KEYS):
        keys = start + tl.arange(0, KEYS)
        live_k = within(keys, length, EVEN_K)
        live_out = within(keys, end, EVEN_K)
        k0, k1 = load_head(hat_k, keys * hat_k_n, live_k, HEAD, D0, D1, VEC)
        s = scores(q0, q1, k0, k1, D1, UPCAST) * (scale * LOG2E)
        if BIAS:
            s += bias_tile(bias_ptr, rows, keys, Nq, Nk, bias_n, BIAS_VEC)
        if not EVEN_K:
            s = tl.where(live_k[None, :], s, float("-inf"))
        # p lives on in 16 bits only: 32 registers per thread less, and ds is rounded so anyway.
        p = tl.exp2(s - lse[:, None]).to(dout_ptr.dtype.element_ty)
        dv0, dv1 = zeros_head(KEYS, D0, D1)
        dv0, dv1 = weigh(tl.trans(p), g0, g1, dv0, dv1, D1, UPCAST)
        store_head(dv_ptr, keys * dk_n, live_out, dv0, dv1, HEAD, D0, D1, VEC)
        v0, v1 = load_head(v_ptr, keys * v_n, live_k, HEAD, D0, D1, VEC)
        ds = p.to(tl.float32) * (scores(g0, g1, v0, v1, D1, UPCAST) - delta[:, None])
        ds = ds.to(q_ptr.dtype.element_ty)
        dq0, dq1 = weigh(ds, k0, k1, dq0, dq1, D1, UPCAST)
        dk0, dk1 = zeros_head(KEYS, D0, D1)
        dk0, dk1 = weigh(tl.trans(ds), q0, q1, dk0, dk1, D1, UPCAST)
        store_head(dk_ptr, keys * dk_n, live_out, dk0 * scale, dk1 * scale, HEAD, D0, D1, VEC)

    store_head(dq_ptr, rows * dq_n, live_q, dq0 * scale, dq1 * scale, HEAD, D0, D1, VEC)

    if NORM or ROPE:
        partial = partial_ptr + program * 4 * HEAD
        sums = settle(
            dq_ptr, dq_n, q_ptr, q_n, 0, Nq, zeros_sums(D0, D1), qw_ptr, cos_ptr, sin_ptr, eps,
            NORM, Q_AFFINE, ROPE, HEAD, D0, D1, VEC, CHUNK,
        )  # fmt: skip
        if Q_AFFINE:
            store_sums(partial, sums, HEAD, D0, D1)
        sums = settle(
            dk_ptr, dk_n, k_ptr, k_n, 0, length, zeros_sums(D0, D1), kw_ptr, cos_ptr, sin_ptr, eps,
            NORM, K_AFFINE, ROPE, HEAD, D0, D1, VEC, CHUNK,
        )  # fmt: skip
        if K_AFFINE:
            store_sums(partial + 2 * HEAD, sums, HEAD, D0, D1)
