"""Attention of the transformer denoisers: one function, many implementations.

Called by `engine/models/blocks.py`. For queries (B, Nq, H, d), keys and values (B, Nk, H, d),

    out[b, i, h] = sum_j softmax_j(scale * <q[b, i, h], k[b, j, h]> + bias[b, h, i, j]) v[b, j, h]

(Vaswani et al., "Attention Is All You Need", 2017, without a causal mask), in the layout in which
the linear maps write: heads beside d, no permutation. Options, in this order:

* `qk_norm`: RMSNorm or LayerNorm of every q and k vector over d (Esser et al., "Scaling Rectified
  Flow Transformers", 2024; LayerNorm: Dehghani et al., "Scaling Vision Transformers to 22B", 2023).
* `rope`: rotation of the pairs (x[2i], x[2i+1]) by an angle per position (Su et al., "RoFormer",
  2021); `rope_2d` makes the tables of a grid.
* `bias`: added to the scaled scores, with its gradient; `relative_position_bias` makes that of
  BEiT (Bao et al., 2021) which MDTv2 uses.
* `key_lengths`: keys at or beyond a picture's length do not exist. `key_offsets`: keys and values
  of all pictures one after another, as PixArt-alpha packs its text (Chen et al., 2023). A picture
  without keys gets 0, and gradients 0.

`joint_projection` and `joint_attention` are the two-stream attention of MMDiT (Esser et al. 2024):
text and image have weights of their own and attend to each other in one sequence, text first.

`attention_backends.py` says who computes a call; `attention_reference` is what all are held to.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, pad, rms_norm

from . import attention_backends, backends
from .attention_backends import BACKENDS, Options, QKNorm
from .catalogue import Operator
from .tensors import wide_dtype

Rope = tuple[Tensor, Tensor]


def _normalise(x: Tensor, norm: QKNorm, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """x (..., d), float32 or float64."""
    shape = x.shape[-1:]
    weight, bias = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    if norm.kind == "rmsnorm":
        return rms_norm(x, shape, weight, norm.eps)
    return layer_norm(x, shape, weight, bias, norm.eps)


def _rotate(x: Tensor, rope: Rope) -> Tensor:
    """x (B, N, H, d), float32 or float64; tables (N, d / 2)."""
    cos, sin = (t.to(x.dtype)[:, None, :] for t in rope)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def _prepare(q: Tensor, k: Tensor, norm: QKNorm | None, rope: Rope | None) -> tuple[Tensor, Tensor]:
    """QK-norm and rotary embedding in float32 (float64 for float64), kept so."""
    q, k = q.to(wide_dtype(q)), k.to(wide_dtype(k))
    if norm is not None:
        q = _normalise(q, norm, norm.q_weight, norm.q_bias)
        k = _normalise(k, norm, norm.k_weight, norm.k_bias)
    if rope is not None:
        q, k = _rotate(q, rope), _rotate(k, rope)
    return q, k


def _seen(q: Tensor, k: Tensor, options: Options) -> Tensor | None:
    """Which keys a picture has: bool (B, 1, 1, Nk or T), or None for all."""
    if options.key_lengths is not None:
        at = torch.arange(k.shape[1], device=k.device)
        return (at < options.key_lengths[:, None])[:, None, None, :]
    if options.key_offsets is not None:
        at = torch.arange(k.shape[0], device=k.device)
        first, end = options.key_offsets[:-1, None], options.key_offsets[1:, None]
        return ((at >= first) & (at < end))[:, None, None, :]
    return None


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    key_lengths: Tensor | None = None,
    key_offsets: Tensor | None = None,
    max_keys: int | None = None,
    bias: Tensor | None = None,
    qk_norm: QKNorm | None = None,
    rope: Rope | None = None,
) -> Tensor:
    """`dot_product_attention` in plain torch, differentiated by autograd; it stores all scores."""
    options = Options(key_lengths, key_offsets, max_keys, bias, qk_norm, rope)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype, wide = q.dtype, wide_dtype(q)
    q, k = _prepare(q, k, qk_norm, rope)
    q, v = q.transpose(1, 2), v.to(wide)
    # Packed keys (T, H, d) serve all pictures; (B, Nk, H, d) one picture each.
    k, v = (t.transpose(-3, -2) for t in (k, v))
    scores = scale * (q @ k.transpose(-1, -2))
    if bias is not None:
        scores = scores + bias.to(wide)
    seen = _seen(q, k.transpose(-3, -2), options)
    if seen is None:
        weights = scores.softmax(-1)
    else:
        # Without keys a row of equal scores stands in, and its weights are then set to zero.
        scores = scores.masked_fill(~seen, float("-inf"))
        scores = scores.masked_fill(~seen.any(-1, keepdim=True), 0.0)
        weights = scores.softmax(-1).masked_fill(~seen, 0.0)
    return (weights @ v).transpose(1, 2).to(dtype).contiguous()


class _Verified(torch.autograd.Function):
    """A backend's call beside the reference, forward and backward; raises where they differ."""

    @staticmethod
    def forward(ctx, fast: Callable, slow: Callable, name: str, *tensors: Tensor | None):
        def run(function: Callable) -> tuple[list[Tensor | None], Tensor]:
            leaves = [
                None if t is None else t.detach().requires_grad_(t.requires_grad) for t in tensors
            ]
            with torch.enable_grad():
                return leaves, function(*leaves)

        ctx.name, ctx.fast, ctx.slow = name, run(fast), run(slow)
        out = ctx.fast[1].detach()
        backends.verify(f"attention by {name}", ("out",), (out,), (ctx.slow[1].detach(),))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout: Tensor):
        def gradients(leaves: list[Tensor | None], out: Tensor) -> dict[int, Tensor]:
            wanted = {i: t for i, t in enumerate(leaves) if t is not None and t.requires_grad}
            found = torch.autograd.grad(out, list(wanted.values()), dout, allow_unused=True)
            return dict(zip(wanted, found, strict=True))

        got, want = gradients(*ctx.fast), gradients(*ctx.slow)
        names = [f"gradient of tensor {i}" for i in got]
        backends.verify(f"attention by {ctx.name}", names, list(got.values()), list(want.values()))
        count = len(ctx.fast[0])
        return None, None, None, *(got.get(i) for i in range(count))


def _verified(name: str, run: Callable, tensors: list[Tensor], options: Options) -> Tensor:
    """`run(tensors, options)` with every tensor that may need a gradient in sight of autograd."""
    norm = options.qk_norm or QKNorm()
    weights = (norm.q_weight, norm.k_weight, norm.q_bias, norm.k_bias)
    count = len(tensors)

    def rebuilt(given: tuple[Tensor | None, ...]) -> tuple[tuple[Tensor, ...], Options]:
        bias, (q_w, k_w, q_b, k_b) = given[count], given[count + 1 :]
        qk_norm = options.qk_norm
        if qk_norm is not None:
            qk_norm = QKNorm(qk_norm.kind, q_w, k_w, q_b, k_b, qk_norm.eps)
        return given[:count], options._replace(bias=bias, qk_norm=qk_norm)

    def fast(*given: Tensor | None) -> Tensor:
        return run(name, *rebuilt(given))

    def slow(*given: Tensor | None) -> Tensor:
        return run("reference", *rebuilt(given))

    return _Verified.apply(fast, slow, name, *tensors, options.bias, *weights)


def _run(name: str, scale: float, tensors: tuple[Tensor, ...], options: Options) -> Tensor:
    """One backend; what it leaves to torch is done first. tensors: (q, k, v), or (qkv,)."""
    backend, asked = BACKENDS[name], options.names()
    if len(tensors) == 1:
        if backend.packed is not None and all(o in backend.native for o in asked):
            return backend.packed(tensors[0], scale, options)
        # One stack of three gradients in the backward pass, where slices would each add to zeros.
        tensors = tensors[0].unbind(2)
    q, k, v = tensors
    if any(o in backend.outside for o in asked):
        dtype = q.dtype
        q, k = _prepare(q, k, options.qk_norm, options.rope)
        q, k = q.to(dtype), k.to(dtype)
        options = options._replace(qk_norm=None, rope=None)
    return backend.call(q, k, v, scale, options)


def _dispatch(scale: float | None, tensors: tuple[Tensor, ...], options: Options) -> Tensor:
    """Autocast, the choice of a backend, and verification."""
    lead = tensors[0]
    kind = lead.device.type
    known = kind in ("cpu", "cuda")  # torch raises for devices without autocast, such as meta
    if known and lead.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        # The rule of torch's own attention: inputs in the autocast dtype, nothing else changed.
        to = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            return _dispatch(scale, tuple(t.to(to) for t in tensors), options)
    head = lead.shape[-1]
    scale = head**-0.5 if scale is None else scale
    tensors = tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)
    compiling = torch.compiler.is_compiling()
    asked = attention_backends.wanted()
    name = attention_backends.choose(asked, kind, lead.dtype, head, options.names(), compiling)
    if backends.verifying() and name != "reference" and not compiling:

        def run(name: str, tensors: tuple[Tensor, ...], options: Options) -> Tensor:
            return _run(name, scale, tensors, options)

        return _verified(name, run, list(tensors), options)
    return _run(name, scale, tensors, options)


def _check(q: Tensor, k: Tensor, v: Tensor, options: Options) -> None:
    """Shapes, dtypes and devices; ValueError with one sentence."""
    if q.dim() != 4:
        raise ValueError(f"attention: q must be (B, Nq, H, d), got {tuple(q.shape)}")
    B, _, H, d = q.shape
    packed = options.key_offsets is not None
    what = "(T, H, d)" if packed else "(B, Nk, H, d)"
    Nk = k.shape[0 if packed else 1] if k.dim() > 1 else 0
    shape = (Nk, H, d) if packed else (B, Nk, H, d)
    for name, t in (("k", k), ("v", v)):
        if tuple(t.shape) != shape:
            raise ValueError(
                f"attention: {name} must be {what} = {shape} beside q {tuple(q.shape)}, "
                f"got {tuple(t.shape)}"
            )
        if t.dtype != q.dtype or t.device != q.device:
            raise ValueError(
                f"attention: {name} is {t.dtype} on {t.device}; q is {q.dtype} on {q.device}"
            )
    _check_options(q, Nk, options)


def _check_options(q: Tensor, Nk: int, options: Options) -> None:
    B, Nq, H, d = q.shape
    if not q.is_floating_point():
        raise ValueError(f"attention: q, k and v must be floating, got {q.dtype}")
    packed = options.key_offsets is not None
    _check_keys(options, B, Nk, packed)
    tables = (("rope", t) for t in options.rope or ())
    named = ("key_lengths", "key_offsets", "bias")
    for name, t in (*((n, getattr(options, n)) for n in named), *tables):
        if t is not None and t.device != q.device:
            raise ValueError(f"attention: {name} is on {t.device}; q is on {q.device}")
    _check_counts(options, Nk)
    if options.bias is not None:
        _check_bias(options.bias, (B, H, Nq, Nk), packed)
    if options.qk_norm is not None:
        _check_norm(options.qk_norm, d)
    if options.rope is not None:
        for t in options.rope:
            if packed or Nq != Nk or tuple(t.shape) != (Nq, d // 2) or d % 2:
                raise ValueError(
                    f"attention: rope needs Nq = Nk tokens and two tables {(Nq, d // 2)}, "
                    f"got {tuple(t.shape)} for {Nq} queries and {Nk} keys"
                )


def _check_keys(options: Options, batch: int, Nk: int, packed: bool) -> None:
    lengths = ("key_lengths", options.key_lengths, batch)
    for name, t, size in (lengths, ("key_offsets", options.key_offsets, batch + 1)):
        if t is not None and (tuple(t.shape) != (size,) or t.dtype != torch.int32):
            raise ValueError(
                f"attention: {name} must be ({size},) of int32, got {tuple(t.shape)} of {t.dtype}"
            )
    if packed and options.key_lengths is not None:
        raise ValueError("attention: give key_lengths or key_offsets, not both")


def _check_counts(options: Options, Nk: int) -> None:
    """Values are looked at on the CPU alone: elsewhere that would wait for the device."""

    def known(t: Tensor | None) -> bool:
        real = type(t) is Tensor and t.device.type == "cpu"  # not a fake one
        return real and t.numel() > 0 and not torch.compiler.is_compiling()

    lengths, offsets = options.key_lengths, options.key_offsets
    if known(lengths):
        for n in map(int, lengths.aminmax()):
            if not 0 <= n <= Nk:
                raise ValueError(f"attention: key_lengths holds {n}; there are {Nk} keys")
    if not known(offsets):
        return
    steps = offsets.diff()
    if int(offsets[0]) or int(offsets[-1]) != Nk or bool((steps < 0).any()):
        raise ValueError(f"attention: key_offsets must rise from 0 to {Nk}, the number of keys")
    if options.max_keys is not None and steps.numel() and int(steps.max()) > options.max_keys:
        raise ValueError(
            f"attention: max_keys={options.max_keys}, but a picture has {int(steps.max())} keys"
        )


def _check_bias(bias: Tensor, shape: tuple[int, int, int, int], packed: bool) -> None:
    if packed:
        raise ValueError("attention: bias does not go with key_offsets: pad the keys")
    if bias.dim() != 4 or bias.shape[0] not in (1, shape[0]) or bias.shape[1:] != shape[1:]:
        raise ValueError(f"attention: bias must be 1 or B of {shape}, got {tuple(bias.shape)}")
    if not bias.is_floating_point():
        raise ValueError(f"attention: bias must be added to scores, got {bias.dtype}")


def _check_norm(norm: QKNorm, d: int) -> None:
    if norm.kind not in ("rmsnorm", "layernorm"):
        raise ValueError(f"attention: qk_norm kind {norm.kind!r} is unknown: rmsnorm or layernorm")
    for name in ("q_weight", "k_weight", "q_bias", "k_bias"):
        t = getattr(norm, name)
        if t is not None and tuple(t.shape) != (d,):
            raise ValueError(f"attention: qk_norm {name} must be ({d},), got {tuple(t.shape)}")
        if t is not None and norm.kind == "rmsnorm" and name.endswith("bias"):
            raise ValueError(f"attention: qk_norm {name} needs kind layernorm")


def dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    key_lengths: Tensor | None = None,
    key_offsets: Tensor | None = None,
    max_keys: int | None = None,
    bias: Tensor | None = None,
    qk_norm: QKNorm | None = None,
    rope: Rope | None = None,
) -> Tensor:
    """softmax(scale q k^T + bias) v for every head.

    Args:
        q: (B, Nq, H, d); k, v: (B, Nk, H, d), or (T, H, d) with `key_offsets`; one dtype of
            float16, bfloat16, float32, float64; any strides, the last dimension best contiguous.
        scale: of the scores; 1 / sqrt(d) if not given.
        key_lengths: (B,) int32, 0 to Nk; keys at or beyond it are ignored (they must be finite).
        key_offsets: (B + 1,) int32, rising from 0; picture b has the keys from key_offsets[b] up
            to key_offsets[b + 1].
        max_keys: no picture has more keys than this (checked on the CPU alone); without it T stands
            in with `key_offsets`, which costs time in flash-attn and memory in torch.
        bias: (1 or B, H, Nq, Nk), floating; differentiable.
        qk_norm: see `QKNorm`; applied before rope.
        rope: (cos, sin), each (N, d / 2), with Nq = Nk = N; no gradient is given for them.

    Returns:
        (B, Nq, H, d), contiguous, of q's dtype (under autocast, of the autocast dtype).

    Errors: ValueError for shapes, dtypes and options that do not fit together; RuntimeError for a
    backend asked for by name that cannot take the call.
    """
    options = Options(key_lengths, key_offsets, max_keys, bias, qk_norm, rope)
    _check(q, k, v, options)
    return _dispatch(scale, (q, k, v), options)


def attention_packed(
    qkv: Tensor,
    *,
    scale: float | None = None,
    key_lengths: Tensor | None = None,
    bias: Tensor | None = None,
    qk_norm: QKNorm | None = None,
    rope: Rope | None = None,
) -> Tensor:
    """Self-attention of qkv (B, N, 3, H, d), the output of one linear map, without a permutation.

    Returns (B, N, H, d), contiguous. Options and errors as in `dot_product_attention`.
    """
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"attention: qkv must be (B, N, 3, H, d), got {tuple(qkv.shape)}")
    options = Options(key_lengths, bias=bias, qk_norm=qk_norm, rope=rope)
    _check_options(qkv[:, :, 0], qkv.shape[1], options)
    return _dispatch(scale, (qkv,), options)


# Two streams, one sequence: q, k and v of both lie in one tensor, which is never taken apart.
_library = torch.library.Library("etude", "FRAGMENT")
_library.define(
    "joint_projection(Tensor image, Tensor text, Tensor image_weight, Tensor? image_bias, "
    "Tensor text_weight, Tensor? text_bias) -> Tensor"
)

# Rows of one picture that a batched product takes without waste: whole tiles of the matrix kernels.
_TILE_ROWS = 128


def _direct(x: Tensor) -> bool:
    """Whether a stream's product should write into the common buffer itself.

    A batched product has a row stride per picture, so its result may lie in a larger tensor. With a
    bias, torch writes that first and the product adds to it: a write where a copy of the finished
    product would be a read and a write. A few rows per picture (a text of 77 or 154 tokens) would
    leave most of a tile empty, and on the CPU many small products are slower than one and a copy.
    """
    return x.device.type == "cuda" and x.shape[1] % _TILE_ROWS == 0


def _project_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """out (B, N, E), a slice of the rows of a larger tensor; x (B, N, D); weight (E, D)."""
    if not _direct(x):
        out.copy_(linear(x, weight, bias))
        return
    spread = weight.t().expand(x.shape[0], -1, -1)
    if bias is None:
        torch.bmm(x, spread, out=out)
    else:
        torch.baddbmm(bias.expand(x.shape[0], 1, -1), x, spread, out=out)


def _joint_projection(
    image: Tensor,
    text: Tensor,
    image_weight: Tensor,
    image_bias: Tensor | None,
    text_weight: Tensor,
    text_bias: Tensor | None,
) -> Tensor:
    B, Ni, _ = image.shape
    Nt, E = text.shape[1], image_weight.shape[0]
    out = image.new_empty((B, Nt + Ni, E))
    if Nt:
        _project_into(out[:, :Nt], text, text_weight, text_bias)
    if Ni:
        _project_into(out[:, Nt:], image, image_weight, image_bias)
    return out


_library.impl("joint_projection", _joint_projection, "CompositeExplicitAutograd")


@torch.library.register_fake("etude::joint_projection", lib=_library)
def _(image, text, image_weight, image_bias, text_weight, text_bias):
    rows = text.shape[1] + image.shape[1]
    return image.new_empty((image.shape[0], rows, image_weight.shape[0]))


def _joint_context(ctx, inputs, output) -> None:
    image, text, image_weight, image_bias, text_weight, text_bias = inputs
    ctx.save_for_backward(image, text, image_weight, text_weight)


def _joint_backward(ctx, dout: Tensor):
    """Plain torch, so that it is differentiable itself. A slice is made dense once for its three
    gradients: the weight's sums over all rows of the stream as one product."""
    image, text, image_weight, text_weight = ctx.saved_tensors
    Nt = text.shape[1]
    found = []
    streams = ((dout[:, Nt:], image, image_weight), (dout[:, :Nt], text, text_weight))
    needs = ctx.needs_input_grad
    for (d, x, weight), (dx, dw, db) in zip(
        streams, ((needs[0], needs[2], needs[3]), (needs[1], needs[4], needs[5])), strict=True
    ):
        flat = d.reshape(-1, d.shape[-1])
        found.append(
            (
                (flat @ weight).view(x.shape) if dx else None,
                flat.t() @ x.reshape(-1, x.shape[-1]) if dw else None,
                flat.sum(0) if db else None,
            )
        )
    (image_x, image_w, image_b), (text_x, text_w, text_b) = found
    return image_x, text_x, image_w, image_b, text_w, text_b


torch.library.register_autograd(
    "etude::joint_projection", _joint_backward, setup_context=_joint_context, lib=_library
)


def joint_projection(
    image: Tensor,
    text: Tensor,
    image_weight: Tensor,
    image_bias: Tensor | None,
    text_weight: Tensor,
    text_bias: Tensor | None,
    num_heads: int,
) -> Tensor:
    """Queries, keys and values of both streams in one tensor, text first.

    On CUDA long streams are written there by their own matrix product: nothing is concatenated.

    Args:
        image: (B, Ni, D); text: (B, Nt, D), of one floating dtype.
        image_weight, text_weight: (3 H d, D), as `nn.Linear` has them; biases: (3 H d,) or None.
        num_heads: H.

    Returns:
        (B, Nt + Ni, 3, H, d), contiguous, for `joint_attention`. Under autocast of that dtype.

    Errors: ValueError for shapes or dtypes that do not fit together.
    """
    _check_joint(image, text, image_weight, image_bias, text_weight, text_bias, num_heads)
    given = (image, text, image_weight, image_bias, text_weight, text_bias)
    kind = image.device.type
    known = kind in ("cpu", "cuda") and image.dtype != torch.float64
    if known and torch.is_autocast_enabled(kind):
        to = torch.get_autocast_dtype(kind)
        given = tuple(None if t is None else t.to(to) for t in given)
    dtypes = {t.dtype: None for t in given if t is not None}
    if len(dtypes) > 1:  # a copy into the common buffer would cast one stream without a word
        raise ValueError(f"joint_projection: one dtype is needed, got {list(dtypes)}")
    return torch.ops.etude.joint_projection(*given).unflatten(-1, (3, num_heads, -1))


def _check_joint(
    image: Tensor,
    text: Tensor,
    image_weight: Tensor,
    image_bias: Tensor | None,
    text_weight: Tensor,
    text_bias: Tensor | None,
    num_heads: int,
) -> None:
    if image.dim() != 3 or text.dim() != 3 or image.shape[::2] != text.shape[::2]:
        raise ValueError(
            f"joint_projection: image and text must be (B, Ni, D) and (B, Nt, D), got "
            f"{tuple(image.shape)} and {tuple(text.shape)}"
        )
    outputs, D = image_weight.shape[0], image.shape[2]
    if num_heads < 1 or outputs % (3 * num_heads):
        raise ValueError(f"joint_projection: {outputs} outputs are not 3 x {num_heads} heads x d")
    shapes = {"image_weight": (outputs, D), "text_weight": (outputs, D)}
    shapes |= {"image_bias": (outputs,), "text_bias": (outputs,)}
    given = {"image_weight": image_weight, "text_weight": text_weight}
    given |= {"image_bias": image_bias, "text_bias": text_bias}
    for name, shape in shapes.items():
        t = given[name]
        if t is not None and tuple(t.shape) != shape:
            raise ValueError(f"joint_projection: {name} must be {shape}, got {tuple(t.shape)}")


def joint_attention(
    qkv: Tensor,
    text_tokens: int,
    *,
    scale: float | None = None,
    qk_norm: QKNorm | None = None,
    text_qk_norm: QKNorm | None = None,
    key_lengths: Tensor | None = None,
    rope: Rope | None = None,
) -> tuple[Tensor, Tensor]:
    """(image, text): attention over both streams, handed back as views of one output.

    Args:
        qkv: (B, Nt + Ni, 3, H, d), text first, from `joint_projection`.
        text_tokens: Nt.
        qk_norm: of all tokens, or of the image alone where `text_qk_norm` is given: then both are
            applied here by torch, since a kernel has one pair of weights for the whole sequence.
        key_lengths: (B,) int32, of the whole sequence; a text with padding must come last for it,
            which is to give both functions the two streams in each other's place.
        rope: tables of Nt + Ni rows (`rope_2d` with prefix=Nt leaves the text unrotated).

    Returns:
        (B, Ni, H, d) and (B, Nt, H, d). Errors as in `dot_product_attention`.
    """
    if text_qk_norm is None:
        out = attention_packed(
            qkv, scale=scale, key_lengths=key_lengths, qk_norm=qk_norm, rope=rope
        )
    else:
        q, k, v = qkv.unbind(2)
        _check(q, k, v, Options(key_lengths, qk_norm=text_qk_norm, rope=rope))
        streams = (text_qk_norm, q[:, :text_tokens], k[:, :text_tokens])
        streams = (streams, (qk_norm, q[:, text_tokens:], k[:, text_tokens:]))
        made = [_prepare(q, k, norm, None) for norm, q, k in streams]
        q, k = (torch.cat(both, 1).to(qkv.dtype) for both in zip(*made, strict=True))
        out = dot_product_attention(q, k, v, scale=scale, key_lengths=key_lengths, rope=rope)
    return out[:, text_tokens:], out[:, :text_tokens]


def rope_2d(
    height: int,
    width: int,
    d: int,
    *,
    theta: float = 10000.0,
    prefix: int = 0,
    device: torch.device | str | None = None,
) -> Rope:
    """(cos, sin), each (prefix + height * width, d / 2) float32: axial rotary embedding of a grid.

    The first half of the pairs turns with the row, the second with the column, at frequencies
    theta ** (-4 i / d); tokens are in row-major order. The `prefix` tokens before them (text) are
    not rotated. Errors: ValueError if d is not a multiple of 4.
    """
    if d % 4:
        raise ValueError(f"rope_2d: d={d} must be a multiple of 4: pairs for two axes")
    frequency = theta ** (-torch.arange(0, d // 4, dtype=torch.float64) * 4 / d)
    rows = torch.arange(height, dtype=torch.float64)[:, None] * frequency
    columns = torch.arange(width, dtype=torch.float64)[:, None] * frequency
    rows = rows[:, None, :].expand(-1, width, -1)
    columns = columns[None, :, :].expand(height, -1, -1)
    angles = torch.cat((rows, columns), -1).flatten(0, 1)
    angles = pad(angles, (0, 0, prefix, 0))
    return angles.cos().float().to(device), angles.sin().float().to(device)


def relative_position_bias(table: Tensor, height: int, width: int) -> Tensor:
    """The bias (1, H, N, N) of a height x width grid from one row per relative position.

    table: ((2 height - 1) (2 width - 1) or more, H), any floating dtype; for tokens i and j in
    row-major order, bias[0, :, i, j] is its row (yi - yj + height - 1) (2 width - 1) + xi - xj +
    width - 1, as BEiT and MDTv2 number them; further rows (of class tokens) are not used.

    Two sliding windows over the table make the bias, so that its gradient is a sum over windows
    in a fixed order: no scattering, the same bits every time. Errors: ValueError for a table with
    too few rows.
    """
    rows = (2 * height - 1) * (2 * width - 1)
    if table.dim() != 2 or table.shape[0] < rows:
        raise ValueError(
            f"relative_position_bias: table must be ({rows} or more, H) for a {height} x {width} "
            f"grid, got {tuple(table.shape)}"
        )
    # Reversed, position yi - yj rises with yj, and the window of yi starts at height - 1 - yi.
    offsets = table[:rows].t().unflatten(1, (2 * height - 1, 2 * width - 1)).flip(1, 2)
    windows = offsets.unfold(1, height, 1).unfold(2, width, 1).flip(1, 2)
    tokens = height * width
    return windows.reshape(1, table.shape[1], tokens, tokens)


# The first is known by the name of the switch: `dot_product_attention` and `attention_packed`.
OPERATORS = (
    Operator(
        "attention",
        "softmax attention with QK-norm, RoPE, bias, lengths",
        ("triton",),
        others=tuple(name for name in BACKENDS if name not in ("etude", "reference")),
    ),
    Operator(
        "joint_projection",
        "queries, keys and values of two streams in one tensor",
        (),
        dtypes="those of torch's linear layers",
    ),
)
