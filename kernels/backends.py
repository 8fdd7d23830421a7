"""Which implementation of an operator runs: the reference, or its C++, Triton or CUDA twin.

Called by every operator's file (`pick`), by the engine's log (`announce`), by `etude kernels` and
`etude doctor` (`status`), and by tests (`use_backend`).

`ETUDE_KERNELS` = `auto` (default) | `reference` | `cpp` | `triton` | `cuda`, for all operators, and
`operator=backend` for one: `ETUDE_KERNELS=auto,attention=reference`; `@FILE` reads the same text
from a file, such as the one that `etude kernels tune` writes. `auto` takes C++ for CPU tensors and
Triton, else CUDA, for CUDA tensors where the operator has such a twin and it is available, the
reference otherwise. A backend asked for by name that cannot run is an error, never a silent
fallback; an operator without such a twin, and dtypes that a twin does not know (float64 everywhere,
float16 in C++), run the reference.

`ETUDE_VERIFY=1` also runs the reference after each eager call of a twin, forward and backward, and
raises at the first element that differs by more than the dtype's tolerance.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, wraps
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

CHOICES = ("auto", "reference", "cpp", "triton", "cuda")
# Names that `operator=` takes besides, and the one of `CHOICES` that each stands on: attention has
# rivals in other libraries (attention_backends.py), products several plans (activation.py).
_PLANS = {"split": "auto", "epilogue": "triton", "library": "triton"}
OWN_CHOICES = {
    "attention": {
        "etude": "triton",
        "flash-attn": "reference",
        "flash-attn-4": "reference",
        "flash-attn-3": "reference",
        "flash-attn-2": "reference",
        "xformers": "reference",
        "sdpa": "reference",
    },
    "linear_gelu": _PLANS,
    "mlp": _PLANS,
}
_ALL_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = {
    "cpp": (torch.float32, torch.bfloat16),
    "triton": _ALL_FLOATS,
    "cuda": _ALL_FLOATS,
}

# Largest accepted difference, relative to the largest magnitude of the tensor (plus one): float32
# sums in another order, and one rounding to the 16-bit type.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def _names(op: str) -> tuple[str, ...]:
    """What one operator, or with the empty string all, may be set to."""
    return tuple(dict.fromkeys((*CHOICES, *OWN_CHOICES.get(op, ()))))


def _parse(text: str) -> dict[str, str]:
    """`auto,attention=reference` as {"": "auto", "attention": "reference"}; `@FILE` is read."""
    given = text
    if text.startswith("@"):
        try:
            with open(text[1:]) as file:
                lines = [line for line in file if not line.startswith("#")]
        except OSError as error:
            raise ValueError(
                f"ETUDE_KERNELS={text} cannot be read ({error.strerror}): `etude kernels tune` "
                "writes such a file"
            ) from None
        given = ",".join(lines)
    chosen = {"": "auto"}
    for part in filter(None, (p.strip() for p in given.split(","))):
        op, _, name = part.rpartition("=")
        if name.lower() not in _names(op):
            raise ValueError(
                f"ETUDE_KERNELS={text}: backend {name} is unknown: set it to one of "
                f"{', '.join(_names(op))}"
            )
        chosen[op] = name.lower()
    return chosen


_choice = _parse(os.environ.get("ETUDE_KERNELS", "auto"))
_verify = os.environ.get("ETUDE_VERIFY", "0") not in ("", "0")


def choice(op: str = "") -> str:
    """The backend asked for, for one operator or for all: of `CHOICES` and `OWN_CHOICES`."""
    return _choice.get(op, _choice[""])


def overrides() -> dict[str, str]:
    """Operators with a choice of their own, and that choice."""
    return {op: name for op, name in _choice.items() if op}


def verifying() -> bool:
    """Whether every fast call is checked against the reference: eager ones only, since under
    torch.compile there are no values to look at."""
    return _verify and not torch.compiler.is_compiling()


@contextmanager
def use_backend(name: str, verify: bool | None = None, *, op: str = "") -> Iterator[None]:
    """Run the enclosed code with another backend (and, if given, with or without verification).

    `op` names one operator; the empty string means all, those with a choice of their own included.

    Errors: ValueError for a name that is not in `CHOICES` (nor the operator's `OWN_CHOICES`).
    """
    global _choice, _verify
    if name not in _names(op):
        raise ValueError(f"unknown kernel backend {name!r}: use one of {', '.join(_names(op))}")
    before = _choice, _verify
    _choice = {**_choice, op: name} if op else {"": name}
    _verify = _verify if verify is None else verify
    try:
        yield
    finally:
        _choice, _verify = before


@lru_cache(maxsize=2)
def _load(name: str) -> tuple[ModuleType | None, str]:
    """The extension `_cpu` or `_cuda`, or None and the reason."""
    try:
        return import_module(f".{name}", __package__), ""
    except ImportError as error:
        return None, f"not built or not loadable ({error}); `pip install -e .` builds it"


@lru_cache(maxsize=1)
def _missing_triton() -> str:
    """Why Triton kernels cannot run here; empty where they can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if interpreting() or torch.cuda.is_available():
        return ""
    return "no CUDA device (TRITON_INTERPRET=1 runs small cases on the CPU)"


def interpreting() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def on_its_device(launch: Callable[P, R]) -> Callable[P, R]:
    """`launch` with the device of its first tensor as the current one.

    Triton launches on the current device and its stream, wherever the tensors are: a model on
    cuda:1 in a process whose current device is cuda:0 would run on the wrong GPU.
    """

    @wraps(launch)
    def launched(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(a.device for a in args if isinstance(a, Tensor))
        with torch.cuda.device(device if device.type == "cuda" else -1):
            return launch(*args, **kwargs)

    return launched


def cpp() -> ModuleType:
    """The loaded C++ extension. Errors: RuntimeError with the reason where it is absent."""
    module, reason = _load("_cpu")
    if module is None:
        raise RuntimeError(f"the C++ kernels are {reason}")
    return module


def cuda() -> ModuleType:
    """The loaded CUDA extension. Errors: RuntimeError with the reason where it is absent."""
    module, reason = _load("_cuda")
    if module is None:
        raise RuntimeError(f"the CUDA kernels are {reason}")
    return module


def _missing_cuda() -> str:
    """Why CUDA kernels cannot run here; empty where they can."""
    return _load("_cuda")[1] or ("" if torch.cuda.is_available() else "no CUDA device")


# Read once: torch.compile then sees constants rather than imports.
HAS_CPP = _load("_cpu")[0] is not None
HAS_TRITON = not _missing_triton()
HAS_CUDA = not _missing_cuda()


def pick(
    op: str, device: str, *dtypes: torch.dtype, twins: tuple[str, ...] = ("cpp", "triton")
) -> str:
    """`reference` or one of `twins` for one call of `op` on `device` ("cpu", "cuda", ...).

    Errors: RuntimeError if a backend was asked for by name and cannot run on this device.
    """
    wanted = choice(op)
    wanted = OWN_CHOICES.get(op, {}).get(wanted, wanted)
    if wanted == "auto":
        wanted = "reference"
        if device == "cpu" and HAS_CPP and "cpp" in twins:
            wanted = "cpp"
        if device == "cuda" and HAS_TRITON and "triton" in twins:
            wanted = "triton"
        elif device == "cuda" and HAS_CUDA and "cuda" in twins:
            wanted = "cuda"
    elif wanted in twins:
        _require(op, wanted, device)
    elif op in _choice and wanted != "reference":
        raise RuntimeError(f"ETUDE_KERNELS={op}={_choice[op]}: {op} has only {', '.join(twins)}")
    if wanted not in twins:
        return "reference"
    return wanted if all(d in DTYPES[wanted] for d in dtypes) else "reference"


def _require(op: str, wanted: str, device: str) -> None:
    given = f"ETUDE_KERNELS={op}={_choice[op]}" if op in _choice else f"ETUDE_KERNELS={wanted}"
    if wanted == "cpp" and not HAS_CPP:
        raise RuntimeError(f"{given}: the C++ kernels are {_load('_cpu')[1]}")
    if wanted == "cpp" and device != "cpu":
        raise RuntimeError(f"{given}: {op} got a tensor on {device}; set auto or triton")
    if wanted == "triton" and not HAS_TRITON:
        raise RuntimeError(f"{given}: {_missing_triton()}; set auto")
    if wanted == "triton" and device != "cuda" and not interpreting():
        raise RuntimeError(f"{given}: {op} got a tensor on {device}; set auto or cpp")
    if wanted == "cuda" and not HAS_CUDA:
        raise RuntimeError(f"{given}: the CUDA kernels are {_missing_cuda()}; set auto")
    if wanted == "cuda" and device != "cuda":
        raise RuntimeError(f"{given}: {op} got a tensor on {device}; set auto or cpp")


def status() -> list[dict[str, str]]:
    """One row per backend: `backend`, `available` (yes or no), `detail` (version or reason)."""
    module, reason = _load("_cpu")
    detail = f"level {module.level()} of {', '.join(module.levels())}" if module else reason
    missing = {"cpp": reason, "triton": _missing_triton(), "cuda": _missing_cuda()}
    version = getattr(import_module("triton"), "__version__", "") if HAS_TRITON else ""
    found = {
        "reference": f"torch {torch.__version__}",
        "cpp": detail,
        "triton": f"triton {version}" + (", interpreted" * interpreting()),
        "cuda": f"built with CUDA {cuda().CUDA_VERSION}" if HAS_CUDA else "",
    }
    return [
        {
            "backend": name,
            "available": "no" if missing.get(name) else "yes",
            "detail": missing.get(name) or found[name],
        }
        for name in ("reference", "cpp", "triton", "cuda")
    ]


def announce(device: str) -> str:
    """One line for a log: which backend float32 operators use on `device`, and why."""
    backend = pick("", device, torch.float32, twins=("cpp", "triton", "cuda"))
    rows = {row["backend"]: row for row in status()}
    why = "auto" if choice() == "auto" else f"ETUDE_KERNELS={choice()}"
    why += "".join(f", {op}={name}" for op, name in overrides().items())
    absent = "; ".join(f"{n}: {r['detail']}" for n, r in rows.items() if r["available"] == "no")
    line = f"kernels on {device}: {backend} ({rows[backend]['detail']}; {why})"
    line += "; " + import_module(".attention_backends", __package__).announce(device)
    return line + (f"; not available: {absent}" if absent else "")


def verify(
    op: str, names: Sequence[str], got: Sequence[Tensor | None], want: Sequence[Tensor | None]
) -> None:
    """Compare a fast call's outputs with the reference's; what is None on a side is left out.

    Errors: AssertionError naming the operator, the output, the first bad index and both values.
    """
    for name, fast, slow in zip(names, got, want, strict=True):
        if fast is None or slow is None or fast.numel() == 0:
            continue
        a, b = fast.double(), slow.double()
        finite = b[torch.isfinite(b)]
        bound = TOLERANCE[fast.dtype] * (1 + (float(finite.abs().max()) if finite.numel() else 0.0))
        same = ((a - b).abs() <= bound) | (a == b) | (a.isnan() & b.isnan())
        if bool(same.all()):
            continue
        index = tuple(int(i) for i in (~same).nonzero()[0])
        raise AssertionError(
            f"ETUDE_VERIFY: {op}: output {name} differs first at {list(index)}: "
            f"{float(a[index]):.9g} where the reference has {float(b[index]):.9g} "
            f"({int((~same).sum())} of {fast.numel()} elements beyond {bound:.3g})"
        )


def verify_gradients(op: str, got: Sequence[Tensor | None], want: Sequence[Tensor | None]) -> None:
    """`verify` for (dx, dh, dgate, dshift, dscale)."""
    verify(op, ("dx", "dh", "dgate", "dshift", "dscale"), got, want)
