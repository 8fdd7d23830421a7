"""What the Triton kernels of attention share: tiles of a head, products, norm and rotation.

A head of d numbers is two tiles, D0 + D1 columns: D0 is the power of two at or below d, D1 the
power of two that holds the rest (0 where nothing is left). Triton's shapes are powers of two, so
one tile of d = 72 would be 128 wide and 44% of every product's work would multiply zeros; 64 + 16
is 80 wide, 10%, and both widths are multiples of the 16 columns a tensor core instruction takes.
Products over the head sum two `tl.dot`s; products that yield a head are two `tl.dot`s.

Called by the kernels of attention_short.py and attention_long.py.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def head_tiles(d: int) -> tuple[int, int]:
    """(D0, D1): the widths of a head's two tiles; (128, 0) rather than (64, 64) for d = 120."""
    whole = max(16, triton.next_power_of_2(d))
    first = whole if whole == d or whole == 16 else whole // 2
    if d <= first:
        return first, 0
    rest = max(16, triton.next_power_of_2(d - first))
    return (whole, 0) if first + rest >= whole else (first, rest)


@triton.jit
def load_head(
    base, offsets, live, HEAD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, VEC: tl.constexpr
):
    """Rows at base + offsets as two tiles, zeros where not live and beyond HEAD.

    VEC: numbers of which every offset is a multiple. Triton knows of an integer argument only
    whether 16 divides it, and a head stride of 72 it would take for unaligned: 2-byte loads. The
    host has looked at all strides, and says here what makes a row of 144 bytes nine 16-byte loads.
    Without a second tile the first is returned twice and the copy is dead code.
    """
    at = base + tl.multiple_of(offsets[:, None], [VEC, VEC])
    cols = tl.arange(0, D0)[None, :]
    if HEAD >= D0:
        x0 = tl.load(at + cols, mask=live[:, None], other=0.0)
    else:
        x0 = tl.load(at + cols, mask=live[:, None] & (cols < HEAD), other=0.0)
    x1 = x0
    if D1:
        more = D0 + tl.arange(0, D1)[None, :]
        x1 = tl.load(at + more, mask=live[:, None] & (more < HEAD), other=0.0)
    return x0, x1


@triton.jit
def store_head(
    base, offsets, live, x0, x1,
    HEAD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The inverse of `load_head`; rounds to the pointer's type."""
    at = base + tl.multiple_of(offsets[:, None], [VEC, VEC])
    cols = tl.arange(0, D0)[None, :]
    x0 = x0.to(base.dtype.element_ty)
    if HEAD >= D0:
        tl.store(at + cols, x0, mask=live[:, None])
    else:
        tl.store(at + cols, x0, mask=live[:, None] & (cols < HEAD))
    if D1:
        more = D0 + tl.arange(0, D1)[None, :]
        mask = live[:, None] & (more < HEAD)
        tl.store(at + more, x1.to(base.dtype.element_ty), mask=mask)


@triton.jit
def within(index, limit, EVEN: tl.constexpr):
    """index < limit, as a constant where all are: no masks, and no registers for them."""
    if EVEN:
        return tl.full([index.shape[0]], 1, tl.int1)
    else:
        return index < limit


@triton.jit
def dot(a, b, UPCAST: tl.constexpr):
    """a b in float32. UPCAST: multiply float32 copies (the interpreter cannot bfloat16)."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def dot_onto(a, b, acc, UPCAST: tl.constexpr):
    """acc + a b in float32."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def scores(a0, a1, b0, b1, D1: tl.constexpr, UPCAST: tl.constexpr):
    """a b^T over the head: (rows of a) x (rows of b)."""
    s = dot(a0, tl.trans(b0), UPCAST)
    if D1:
        s = dot_onto(a1, tl.trans(b1), s, UPCAST)
    return s


@triton.jit
def bias_tile(bias_ptr, rows, keys, Nq, Nk, bias_n, BIAS_VEC: tl.constexpr):
    """A tile of bias in powers of two. BIAS_VEC: numbers of which all its strides are multiples.

    Masked by what exists, not by lengths: a mask that ends anywhere would forbid wide loads.
    """
    at = bias_ptr + tl.multiple_of((rows * bias_n)[:, None], [BIAS_VEC, BIAS_VEC]) + keys[None, :]
    there = (rows < Nq)[:, None] & (keys < Nk)[None, :]
    return tl.load(at, mask=there, other=0.0).to(tl.float32) * LOG2E


@triton.jit
def weigh(p, x0, x1, acc0, acc1, D1: tl.constexpr, UPCAST: tl.constexpr):
    """acc + p x: a head per row of p."""
    acc0 = dot_onto(p, x0, acc0, UPCAST)
    if D1:
        acc1 = dot_onto(p, x1, acc1, UPCAST)
    return acc0, acc1


@triton.jit
def zeros_head(ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Two float32 accumulators."""
    x0 = tl.zeros([ROWS, D0], dtype=tl.float32)
    x1 = x0
    if D1:
        x1 = tl.zeros([ROWS, D1], dtype=tl.float32)
    return x0, x1


@triton.jit
def row_sum(x0, x1, D1: tl.constexpr):
    """Sum over the head."""
    total = tl.sum(x0, axis=1)
    if D1:
        total += tl.sum(x1, axis=1)
    return total


@triton.jit
def rotate(
    x, cos_ptr, sin_ptr, positions, live, FIRST: tl.constexpr,
    HEAD: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """Rotary embedding of the pairs (2i, 2i + 1) of a tile whose first column is FIRST.

    Both numbers of a pair belong to one thread, in a loaded tile (16 bytes per thread) as in an
    accumulator of a tensor core, so splitting and joining them moves no data. INVERSE: its
    transpose, for gradients.
    """
    rows: tl.constexpr = x.shape[0]
    width: tl.constexpr = x.shape[1]
    pairs = FIRST // 2 + tl.arange(0, width // 2)[None, :]
    at = positions.to(tl.int64)[:, None] * (HEAD // 2) + pairs
    mask = live[:, None] & (pairs < HEAD // 2)
    cos = tl.load(cos_ptr + at, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if INVERSE:
        sin = -sin
    a, b = tl.split(tl.reshape(x, [rows, width // 2, 2]))
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), [rows, width])


@triton.jit
def normalise(
    x0, x1, live, eps, NORM: tl.constexpr,
    HEAD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """(x0, x1, rstd): every row divided by its RMS (NORM 1), centred before where NORM is 2."""
    mean = row_sum(x0, x1, D1) / HEAD
    if NORM == 2:
        x0 = tl.where(tl.arange(0, D0)[None, :] < HEAD, x0 - mean[:, None], 0.0)
        if D1:
            x1 = tl.where(D0 + tl.arange(0, D1)[None, :] < HEAD, x1 - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(row_sum(x0 * x0, x1 * x1, D1) / HEAD + eps)
    # Rows that do not exist are zeros: without this they are 0 * inf where eps is 0.
    rstd = tl.where(live, rstd, 0.0)
    x0 = x0 * rstd[:, None]
    if D1:
        x1 = x1 * rstd[:, None]
    return x0, x1, rstd


@triton.jit
def head_row(ptr, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr):
    """(1, WIDTH) numbers of a (d,) weight, float32."""
    cols = FIRST + tl.arange(0, WIDTH)
    return tl.load(ptr + cols, mask=cols < HEAD, other=0.0).to(tl.float32)[None, :]


@triton.jit
def prepare(
    x0, x1, w_ptr, b_ptr, cos_ptr, sin_ptr, positions, live, eps,
    NORM: tl.constexpr, AFFINE: tl.constexpr, ROPE: tl.constexpr,
    HEAD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """rope(norm(x) * weight + bias) of loaded rows, in their type: what q and k enter with.

    AFFINE: 0 none, 1 weight, 2 weight and bias.
    """
    if NORM or ROPE:
        y0 = x0.to(tl.float32)
        y1 = x1.to(tl.float32)
        if NORM:
            y0, y1, _ = normalise(y0, y1, live, eps, NORM, HEAD, D0, D1)
            if AFFINE:
                y0 *= head_row(w_ptr, 0, D0, HEAD)
                if D1:
                    y1 *= head_row(w_ptr, D0, D1, HEAD)
            if AFFINE == 2:
                y0 = tl.where(live[:, None], y0 + head_row(b_ptr, 0, D0, HEAD), 0.0)
                if D1:
                    y1 = tl.where(live[:, None], y1 + head_row(b_ptr, D0, D1, HEAD), 0.0)
        if ROPE:
            y0 = rotate(y0, cos_ptr, sin_ptr, positions, live, 0, HEAD, False)
            if D1:
                y1 = rotate(y1, cos_ptr, sin_ptr, positions, live, D0, HEAD, False)
        x0 = y0.to(x0.dtype)
        x1 = y1.to(x1.dtype)
    return x0, x1


@triton.jit
def zeros_sums(D0: tl.constexpr, D1: tl.constexpr):
    """Accumulators of the gradients of a weight and a bias: (weight0, weight1, bias0, bias1)."""
    first = tl.zeros([D0], dtype=tl.float32)
    second = first
    if D1:
        second = tl.zeros([D1], dtype=tl.float32)
    return first, second, first, second


@triton.jit
def store_sums(partial, sums, HEAD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """partial[0:HEAD] and partial[HEAD:2 HEAD] of `zeros_sums`' accumulators."""
    w0, w1, b0, b1 = sums
    cols = tl.arange(0, D0)
    tl.store(partial + cols, w0, mask=cols < HEAD)
    tl.store(partial + HEAD + cols, b0, mask=cols < HEAD)
    if D1:
        more = D0 + tl.arange(0, D1)
        tl.store(partial + more, w1, mask=more < HEAD)
        tl.store(partial + HEAD + more, b1, mask=more < HEAD)


@triton.jit
def prepare_backward(
    g0, g1, sums, ptr, offsets, w_ptr, cos_ptr, sin_ptr, positions, live, eps,
    NORM: tl.constexpr, AFFINE: tl.constexpr, ROPE: tl.constexpr,
    HEAD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """(dx0, dx1, sums): gradient of what was loaded from ptr + offsets.

    g: gradient of what `prepare` made of it. The rows are loaded again (they are in a cache) rather
    than kept in registers over the products. Adds to the sums for weight and bias.
    """
    w0, w1, b0, b1 = sums
    if ROPE:
        g0 = rotate(g0, cos_ptr, sin_ptr, positions, live, 0, HEAD, True)
        if D1:
            g1 = rotate(g1, cos_ptr, sin_ptr, positions, live, D0, HEAD, True)
    if NORM:
        x0, x1 = load_head(ptr, offsets, live, HEAD, D0, D1, VEC)
        x0, x1, rstd = normalise(
            x0.to(tl.float32), x1.to(tl.float32), live, eps, NORM, HEAD, D0, D1
        )
        if AFFINE:
            w0 += tl.sum(g0 * x0, axis=0)
            b0 += tl.sum(g0, axis=0)
            g0 *= head_row(w_ptr, 0, D0, HEAD)
            if D1:
                w1 += tl.sum(g1 * x1, axis=0)
                b1 += tl.sum(g1, axis=0)
                g1 *= head_row(w_ptr, D0, D1, HEAD)
        slope = row_sum(g0 * x0, g1 * x1, D1) / HEAD
        average = slope * 0.0
        if NORM == 2:
            average = row_sum(g0, g1, D1) / HEAD
        g0 = rstd[:, None] * (g0 - average[:, None] - x0 * slope[:, None])
        if D1:
            g1 = rstd[:, None] * (g1 - average[:, None] - x1 * slope[:, None])
    return g0, g1, (w0, w1, b0, b1)


@triton.jit
def arrange(
    x_ptr, x_n, y_ptr, y_n, stop, w_ptr, b_ptr, cos_ptr, sin_ptr, eps,
    NORM: tl.constexpr, AFFINE: tl.constexpr, ROPE: tl.constexpr,
    HEAD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, VEC: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Rows 0 to stop of y = `prepare` of those of x, a chunk at a time; call `debug_barrier` after.

    y is memory that this program alone writes and will overwrite with a gradient: the prepared rows
    wait there, in a cache, without a tensor of their own.
    """
    for first in range(0, stop, CHUNK):
        rows = first + tl.arange(0, CHUNK)
        live = rows < stop
        x0, x1 = load_head(x_ptr, rows.to(tl.int64) * x_n, live, HEAD, D0, D1, VEC)
        x0, x1 = prepare(
            x0, x1, w_ptr, b_ptr, cos_ptr, sin_ptr, rows, live, eps,
            NORM, AFFINE, ROPE, HEAD, D0, D1,
        )  # fmt: skip
        store_head(y_ptr, rows.to(tl.int64) * y_n, live, x0, x1, HEAD, D0, D1, VEC)


@triton.jit
def settle(
    g_ptr, g_n, x_ptr, x_n, start, stop, sums, w_ptr, cos_ptr, sin_ptr, eps,
    NORM: tl.constexpr, AFFINE: tl.constexpr, ROPE: tl.constexpr,
    HEAD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, VEC: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Turns rows start to stop of g, this program's own stores, into gradients of x, in place.

    In chunks from a cache rather than where the products leave them: a tile of 256 accumulators
    beside its rows, cosines and sines would need twice the registers there are.
    """
    tl.debug_barrier()  # one thread's stores are another's loads
    for first in range(start, stop, CHUNK):
        rows = first + tl.arange(0, CHUNK)
        live = rows < stop
        at = rows.to(tl.int64) * g_n
        g0, g1 = load_head(g_ptr, at, live, HEAD, D0, D1, VEC)
        g0, g1, sums = prepare_backward(
            g0.to(tl.float32), g1.to(tl.float32), sums, x_ptr, rows.to(tl.int64) * x_n, w_ptr,
            cos_ptr, sin_ptr, rows, live, eps, NORM, AFFINE, ROPE, HEAD, D0, D1, VEC,
        )  # fmt: skip
        store_head(g_ptr, at, live, g0, g1, HEAD, D0, D1, VEC)
    return sums


@triton.jit
def key_range(
    b, lengths_ptr, offsets_ptr, Nk, LENGTHS: tl.constexpr, OFFSETS: tl.constexpr
):  # fmt: skip
    """(first row, rows) of sample b's keys; what lies beyond does not exist for it."""
    first = tl.zeros([], dtype=tl.int64)
    length = Nk
    if OFFSETS:
        first = tl.load(offsets_ptr + b).to(tl.int64)
        length = (tl.load(offsets_ptr + b + 1) - first).to(tl.int32)
    if LENGTHS:
        length = tl.minimum(length, tl.maximum(tl.load(lengths_ptr + b), 0))
    return first, length
