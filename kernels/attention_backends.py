"""Who computes attention: Etude's own kernel, flash-attn, xformers, torch, or the reference.

Called by `attention.py` (`choose`, `Backend.call`), by the log and `etude kernels` (`announce`,
`attention_status`). The only file that imports xformers or flash_attn.

Every backend says as data what it can take (`Backend`); what a call needs beyond plain attention is
a set of `OPTIONS`. An option is done by the backend itself (`native`), by torch before the call
(`outside`), or it makes the backend ineligible: none is ever ignored. `ETUDE_KERNELS=auto` takes
the first of `BACKENDS` that can serve the call; `ETUDE_KERNELS=auto,attention=sdpa` takes that one
and raises where it cannot.

    etude        Triton, `attention_triton.py`: all options inside the kernel
    flash-attn   the newest working one of flash-attn 4 (CuTe), 3 (Hopper) and 2
    xformers     memory_efficient_attention
    sdpa         torch: on CUDA cuDNN, flash, memory-efficient in this order; on the CPU its own
    reference    `attention_reference`: scores in memory, float32 inside
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from . import backends

OPTIONS = ("key_lengths", "key_offsets", "bias", "qk_norm", "rope")
_HALVES = (torch.float16, torch.bfloat16)
_FLOATS = (torch.float32, *_HALVES)


@dataclass(frozen=True)
class QKNorm:
    """Normalisation of every query and key vector over its d elements, before RoPE.

    kind: "rmsnorm" (as in Stable Diffusion 3.5) or "layernorm"; the weights, and for "layernorm"
    the biases, are (d,) tensors shared by all heads, or None.
    """

    kind: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    eps: float = 1e-6


class Options(NamedTuple):
    """What a call asks for beyond plain attention; see `attention.dot_product_attention`."""

    key_lengths: Tensor | None = None
    key_offsets: Tensor | None = None
    max_keys: int | None = None
    bias: Tensor | None = None
    qk_norm: QKNorm | None = None
    rope: tuple[Tensor, Tensor] | None = None

    def names(self) -> tuple[str, ...]:
        """Those of `OPTIONS` that are set."""
        given = (self.key_lengths, self.key_offsets, self.bias, self.qk_norm, self.rope)
        return tuple(n for n, value in zip(OPTIONS, given, strict=True) if value is not None)


@dataclass(frozen=True)
class Backend:
    """One implementation and what it can take."""

    name: str
    call: Callable[[Tensor, Tensor, Tensor, float, Options], Tensor]
    packed: Callable[[Tensor, float, Options], Tensor] | None = None  # of qkv (B, N, 3, H, d)
    package: str = "torch"  # the distribution whose version is reported
    module: str = ""  # imported for it; empty: nothing beyond torch
    devices: tuple[str, ...] = ("cuda",)
    capability: tuple[int, int] = (0, 99)  # first and last major compute capability
    dtypes: tuple[torch.dtype, ...] = _HALVES
    largest_head: int = 256
    head_multiple: int = 8
    native: frozenset[str] = frozenset()
    outside: frozenset[str] = frozenset()
    compiles: bool = True  # inside torch.compile without a graph break


def _triton(q: Tensor, k: Tensor, v: Tensor, scale: float, options: Options) -> Tensor:
    from . import attention_triton  # noqa: F401

    norm = _triton_norm(options.qk_norm)
    cos, sin = options.rope or (None, None)
    op = torch.ops.etude.triton_attention
    lengths, offsets = options.key_lengths, options.key_offsets
    return op(q, k, v, scale, lengths, offsets, options.bias, *norm, cos, sin)[0]


def _triton_packed(qkv: Tensor, scale: float, options: Options) -> Tensor:
    from . import attention_triton  # noqa: F401

    norm = _triton_norm(options.qk_norm)
    cos, sin = options.rope or (None, None)
    op = torch.ops.etude.triton_attention_packed
    return op(qkv, scale, options.key_lengths, options.bias, *norm, cos, sin)[0]


def _triton_norm(norm: QKNorm | None) -> tuple[Tensor | None | int | float, ...]:
    """(q_weight, q_bias, k_weight, k_bias, kind, eps) as the operator takes them.

    A bias comes with a weight there, so one that has none is given ones.
    """
    if norm is None:
        return None, None, None, None, 0, 0.0
    weights = []
    for weight, bias in ((norm.q_weight, norm.q_bias), (norm.k_weight, norm.k_bias)):
        weights += [torch.ones_like(bias) if weight is None and bias is not None else weight, bias]
    return *weights, 1 if norm.kind == "rmsnorm" else 2, norm.eps


def _query_offsets(q: Tensor) -> Tensor:
    """Where each picture's queries begin, and where the last ones end: (B + 1,) int32."""
    B, Nq = q.shape[:2]
    return torch.arange(B + 1, dtype=torch.int32, device=q.device) * Nq


def _flash_attn(module: str) -> Callable[[Tensor, Tensor, Tensor, float, Options], Tensor]:
    """flash-attn 2, 3 and 4 name their functions alike; 3 and 4 may return (out, lse)."""

    @torch.compiler.disable
    def call(q: Tensor, k: Tensor, v: Tensor, scale: float, options: Options) -> Tensor:
        library = _module(module)
        # The same rule as torch's own: two runs have the same bits only where that is asked for.
        more = {
            "softmax_scale": scale,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }
        if options.key_offsets is None:
            out = library.flash_attn_func(q, k, v, **more)
        else:
            out = library.flash_attn_varlen_func(
                q.reshape(-1, *q.shape[2:]),
                k,
                v,
                cu_seqlens_q=_query_offsets(q),
                cu_seqlens_k=options.key_offsets,
                max_seqlen_q=q.shape[1],
                max_seqlen_k=options.max_keys or k.shape[0],
                **more,
            )
        return (out[0] if isinstance(out, tuple) else out).reshape(q.shape)

    return call


@torch.compiler.disable
def _flash_attn_packed(qkv: Tensor, scale: float, options: Options) -> Tensor:
    """flash-attn 2 writes one gradient of the packed tensor: three slices need no stacking."""
    library = _module("flash_attn")
    fixed = torch.are_deterministic_algorithms_enabled()
    return library.flash_attn_qkvpacked_func(qkv, softmax_scale=scale, deterministic=fixed)


@torch.compiler.disable
def _xformers(q: Tensor, k: Tensor, v: Tensor, scale: float, options: Options) -> Tensor:
    return _module("xformers.ops").memory_efficient_attention(q, k, v, scale=scale)


# cuDNN first: it is the newest of the three on Hopper and later. With a mask or a bias the
# memory-efficient kernel, the only one of them that also gives the gradient of a bias.
_ON_CUDA = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
_ON_CUDA_MASKED = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

# Keys up to which 16-bit gradients on the CPU are taken in float32: there the backward of torch's
# fused 16-bit kernel is the slower one (docs/which-kernels-run.md has the numbers).
_SHORT_ON_CPU = 128


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, options: Options) -> Tensor:
    dtype, device = q.dtype, q.device.type
    lengths = options.key_lengths
    if options.key_offsets is not None:
        k, v, lengths = _unpack(k, v, options.key_offsets, options.max_keys)
    mask, live = _mask(q, k, lengths, options.bias)
    if device == "cpu" and dtype in _HALVES and k.shape[1] <= _SHORT_ON_CPU:
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            q, k, v = q.float(), k.float(), v.float()
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if device == "cuda":
        order = _ON_CUDA if mask is None else _ON_CUDA_MASKED
        with sdpa_kernel(order, set_priority=True):
            out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    else:
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    out = out.transpose(1, 2).to(dtype)
    if live is not None:
        out = out.masked_fill(~live, 0.0)
    return out.contiguous()


def _unpack(
    k: Tensor, v: Tensor, offsets: Tensor, max_keys: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed keys and values (T, H, d) as (B, max_keys, H, d), and their numbers (B,)."""
    lengths = offsets[1:] - offsets[:-1]
    most = k.shape[0] if max_keys is None else min(max_keys, k.shape[0])
    if k.shape[0] == 0:  # nothing to gather from: one row of zeros that every query masks
        k, v, most = pad(k, (0, 0, 0, 0, 0, 1)), pad(v, (0, 0, 0, 0, 0, 1)), 1
    steps = torch.arange(most, device=k.device)
    rows = (offsets[:-1, None] + steps).clamp(max=k.shape[0] - 1)
    # A row that fills a gap comes with a gradient of zero: adding it changes no bit of the sum.
    shape = (lengths.shape[0], most, *k.shape[1:])
    k, v = (t.index_select(0, rows.reshape(-1)).view(shape) for t in (k, v))
    return k, v, lengths


def _mask(
    q: Tensor, k: Tensor, lengths: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """What is added to the scores (or a bool mask), and which pictures have keys (B, 1, 1, 1).

    A softmax over no keys is undefined and gives NaN in some kernels: such a picture attends to
    its first key, and the caller sets its output to zero.
    """
    if lengths is None:
        return (None if bias is None else bias.expand(q.shape[0], -1, -1, -1)), None
    at = torch.arange(k.shape[1], device=k.device)
    seen = (at < lengths.clamp(min=1)[:, None])[:, None, None, :]
    if bias is not None:
        seen = bias.masked_fill(~seen, float("-inf"))
        # A bias of -inf over all that is left would be NaN as well, but that the caller asked for.
    seen = seen.expand(q.shape[0], q.shape[2] if bias is not None else 1, q.shape[1], -1)
    return seen, (lengths > 0)[:, None, None, None]


def _reference(q: Tensor, k: Tensor, v: Tensor, scale: float, options: Options) -> Tensor:
    from .attention import attention_reference

    return attention_reference(q, k, v, scale=scale, **options._asdict())


_TORCH_FIRST = frozenset({"qk_norm", "rope"})
BACKENDS = {
    b.name: b
    for b in (
        Backend(
            "etude",
            _triton,
            _triton_packed,
            package="triton",
            module="triton",
            dtypes=_FLOATS,
            head_multiple=1,
            native=frozenset(OPTIONS),
        ),
        Backend(
            "flash-attn-4",
            _flash_attn("flash_attn.cute"),
            package="flash-attn-4",
            module="flash_attn.cute",
            capability=(9, 10),
            largest_head=128,
            native=frozenset({"key_offsets"}),
            outside=_TORCH_FIRST,
            compiles=False,
        ),
        Backend(
            "flash-attn-3",
            _flash_attn("flash_attn_interface"),
            package="flash-attn-3",
            module="flash_attn_interface",
            capability=(9, 9),
            native=frozenset({"key_offsets"}),
            outside=_TORCH_FIRST,
            compiles=False,
        ),
        Backend(
            "flash-attn-2",
            _flash_attn("flash_attn"),
            _flash_attn_packed,
            package="flash-attn",
            module="flash_attn",
            capability=(8, 99),
            native=frozenset({"key_offsets"}),
            outside=_TORCH_FIRST,
            compiles=False,
        ),
        Backend(
            "xformers",
            _xformers,
            package="xformers",
            module="xformers.ops",
            outside=_TORCH_FIRST,
            compiles=False,
        ),
        Backend(
            "sdpa",
            _sdpa,
            devices=("cuda", "cpu"),
            dtypes=(*_FLOATS, torch.float64),
            largest_head=2**31,
            head_multiple=1,
            native=frozenset({"key_lengths", "key_offsets", "bias"}),
            outside=_TORCH_FIRST,
        ),
        Backend(
            "reference",
            _reference,
            devices=(),  # any
            dtypes=(*_FLOATS, torch.float64),
            largest_head=2**31,
            head_multiple=1,
            native=frozenset(OPTIONS),
        ),
    )
}


@lru_cache(maxsize=8)
def _import(name: str) -> tuple[ModuleType | None, str]:
    """A library, or None and the reason; its own warnings at import are left out of the log."""
    logging.getLogger(name.split(".")[0]).setLevel(logging.ERROR)
    try:
        return import_module(name), ""
    except Exception as error:  # a broken build may raise anything
        return None, _sentence(error)


def _module(name: str) -> ModuleType:
    module, reason = _import(name)
    if module is None:
        raise RuntimeError(f"{name}: {reason}")
    return module


def _sentence(error: Exception) -> str:
    """An exception in one line; of a list of reasons (`... because:`) each once, and no more."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = next((i for i, line in enumerate(lines) if line.endswith("because:")), None)
    if first is not None:
        reasons = [line for line in lines[first:] if not line.endswith("because:")]
        lines = [lines[0].rstrip(":") + ":", "; ".join(dict.fromkeys(reasons))]
    return f"{type(error).__name__}: {' '.join(lines)}"[:400]


@lru_cache(maxsize=32)
def unusable(name: str, device: str) -> str:
    """Why a backend cannot run on `device` here; empty where it can.

    A library's own word counts: it is given a tiny call, forward and backward, once per process.
    """
    backend = BACKENDS[name]
    if name == "etude":
        return _no_triton(device)
    if backend.module:
        module, reason = _import(backend.module)
        if module is None:
            return reason
        first, last = backend.capability
        major = torch.cuda.get_device_capability()[0] if device == "cuda" else first
        if not first <= major <= last:
            return f"needs compute capability {first}.x to {last}.x; this device has {major}.x"
        return _try(backend, device)
    if backend.devices and device not in backend.devices:
        return f"runs on {', '.join(backend.devices)}, not on {device}"
    return ""


def _no_triton(device: str) -> str:
    if find_spec(f"{__package__}.attention_triton") is None:
        return "this installation has no attention_triton.py"
    if not backends.HAS_TRITON:
        return backends.status()[2]["detail"]
    if device != "cuda" and not backends.interpreting():
        return f"runs on cuda, not on {device}"
    return ""


def _try(backend: Backend, device: str) -> str:
    """Forward and backward of the smallest call; the library's refusal in one line, or nothing."""
    try:
        with torch.enable_grad():
            shape = (1, 16, 1, 64)
            q, k, v = (
                torch.zeros(shape, dtype=torch.bfloat16, device=device, requires_grad=True)
                for _ in range(3)
            )
            backend.call(q, k, v, 0.125, Options()).sum().backward()
    except Exception as error:
        return _sentence(error)
    return ""


def _unfit(
    backend: Backend,
    device: str,
    dtype: torch.dtype,
    head: int,
    options: tuple[str, ...],
    compiling: bool,
) -> str:
    """Why a backend does not take such a call; empty where it does."""
    lacking = [o for o in options if o not in backend.native | backend.outside]
    if lacking:
        return f"has no {', '.join(lacking)}"
    if dtype not in backend.dtypes:
        return f"does not take {dtype}"
    if head > backend.largest_head or head % backend.head_multiple:
        return f"does not take head dimension {head}"
    if compiling and not backend.compiles:
        return "cannot be part of a compiled graph"
    return unusable(backend.name, device)


def wanted() -> str:
    """The backend asked for: `auto`, `reference`, or one of `backends.OWN_CHOICES`.

    Of the choices for all operators, `triton` means `etude`; `cpp` and `cuda`, in which attention
    has no twin, leave it at `auto`.
    """
    asked = backends.choice("attention")
    return {"triton": "etude", "cpp": "auto", "cuda": "auto"}.get(asked, asked)


@lru_cache(maxsize=256)
def _chosen(
    asked: str,
    device: str,
    dtype: torch.dtype,
    head: int,
    options: tuple[str, ...],
    compiling: bool,
) -> str:
    if asked == "auto":
        for name, backend in BACKENDS.items():
            # The interpreter runs a kernel on the CPU only where it is asked for.
            idle = device not in backend.devices if backend.devices else False
            if not idle and not _unfit(backend, device, dtype, head, options, compiling):
                return name
    names = [n for n in BACKENDS if n == asked or (asked == "flash-attn" and n.startswith(asked))]
    if dtype == torch.float64 and all(dtype not in BACKENDS[n].dtypes for n in names):
        return "reference"  # as everywhere: no kernel knows float64
    reasons = []
    for name in names:
        # One that breaks the graph may still be asked for by name: then it does break it.
        reason = _unfit(BACKENDS[name], device, dtype, head, options, False)
        if not reason:
            return name
        reasons.append(f"{name} {reason}")
    raise RuntimeError(f"ETUDE_KERNELS=attention={asked}: {'; '.join(reasons)}; set attention=auto")


@torch.compiler.assume_constant_result
def choose(
    asked: str,
    device: str,
    dtype: torch.dtype,
    head: int,
    options: tuple[str, ...] = (),
    compiling: bool = False,
) -> str:
    """The name of the backend that serves a call; a constant for torch.compile.

    `asked`: `wanted()`; `head`: d; `options`: `Options.names()`. Errors: RuntimeError with the
    reason for a backend asked for by name that cannot serve the call.
    """
    return _chosen(asked, device, dtype, head, options, compiling)


def attention_status(device: str | None = None) -> list[dict[str, str]]:
    """One row per backend: `backend`, `importable`, `version`, `available` (yes or no), `detail`.

    `device`: "cuda" or "cpu"; by default CUDA where there is a device. `detail` says why a backend
    cannot run there, or the options it leaves to torch.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for name, backend in BACKENDS.items():
        reason = unusable(name, device)
        importable = not backend.module or _import(backend.module)[0] is not None
        outside = ", ".join(sorted(backend.outside))
        lacking = ", ".join(o for o in OPTIONS if o not in backend.native | backend.outside)
        notes = (outside and f"{outside} by torch", lacking and f"without {lacking}")
        rows.append(
            {
                "backend": name,
                "importable": "yes" if importable else "no",
                "version": _version(backend.package),
                "available": "no" if reason else "yes",
                "detail": reason or "; ".join(filter(None, notes)) or "all options",
            }
        )
    return rows


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def announce(device: str) -> str:
    """`attention: sdpa` for plain 16-bit calls on CUDA and float32 on the CPU; for a log line."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    try:
        return f"attention: {choose(wanted(), device, dtype, 64)}"
    except RuntimeError as error:
        return f"attention: {error}"
