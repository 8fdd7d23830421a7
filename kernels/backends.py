"""Which implementation of an operator runs: the reference, the C++ twin or the Triton twin.

Called by every operator's file (`pick`), by the engine's log (`announce`), by `etude kernels` and
`etude doctor` (`status`), and by tests (`use_backend`).

`ETUDE_KERNELS` = `auto` (default) | `reference` | `cpp` | `triton`. `auto` takes C++ for CPU
tensors and Triton for CUDA tensors where they are available, the reference otherwise. A backend
asked for by name that cannot run is an error, never a silent fallback; dtypes that a twin does not
know (float64 everywhere, float16 in C++) always run the reference.

`ETUDE_VERIFY=1` also runs the reference after each C++ or eager Triton call, forward and backward,
and raises at the first element that differs by more than the dtype's tolerance.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

CHOICES = ("auto", "reference", "cpp", "triton")
CPP_DTYPES = (torch.float32, torch.bfloat16)
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Largest accepted difference, relative to the largest magnitude of the tensor (plus one): float32
# sums in another order, and one rounding to the 16-bit type.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def _from_environment() -> str:
    name = os.environ.get("ETUDE_KERNELS", "auto").lower()
    if name not in CHOICES:
        raise ValueError(f"ETUDE_KERNELS={name} is unknown: set it to one of {', '.join(CHOICES)}")
    return name


_choice = _from_environment()
_verify = os.environ.get("ETUDE_VERIFY", "0") not in ("", "0")


def choice() -> str:
    """The backend asked for: one of `CHOICES`."""
    return _choice


def verifying() -> bool:
    """Whether every fast call is checked against the reference."""
    return _verify


@contextmanager
def use_backend(name: str, verify: bool | None = None) -> Iterator[None]:
    """Run the enclosed code with another backend (and, if given, with or without verification).

    Errors: ValueError for a name that is not in `CHOICES`.
    """
    global _choice, _verify
    if name not in CHOICES:
        raise ValueError(f"unknown kernel backend {name!r}: use one of {', '.join(CHOICES)}")
    before = _choice, _verify
    _choice, _verify = name, _verify if verify is None else verify
    try:
        yield
    finally:
        _choice, _verify = before


@lru_cache(maxsize=1)
def _load_cpp() -> tuple[ModuleType | None, str]:
    """The C++ extension, or None and the reason."""
    try:
        return import_module("._cpu", __package__), ""
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


def cpp() -> ModuleType:
    """The loaded C++ extension. Errors: RuntimeError with the reason where it is absent."""
    module, reason = _load_cpp()
    if module is None:
        raise RuntimeError(f"the C++ kernels are {reason}")
    return module


# Read once: torch.compile then sees constants rather than imports.
HAS_CPP = _load_cpp()[0] is not None
HAS_TRITON = not _missing_triton()


def pick(op: str, device: str, *dtypes: torch.dtype) -> str:
    """`reference`, `cpp` or `triton` for one call of `op` on `device` ("cpu", "cuda", ...).

    Errors: RuntimeError if a backend was asked for by name and cannot run on this device.
    """
    if _choice == "reference":
        return "reference"
    if _choice == "auto":
        wanted = "cpp" if device == "cpu" and HAS_CPP else "reference"
        if device == "cuda" and HAS_TRITON:
            wanted = "triton"
    else:
        wanted = _choice
        _require(op, wanted, device)
    known = CPP_DTYPES if wanted == "cpp" else TRITON_DTYPES
    return wanted if all(d in known for d in dtypes) else "reference"


def _require(op: str, wanted: str, device: str) -> None:
    if wanted == "cpp" and not HAS_CPP:
        raise RuntimeError(f"ETUDE_KERNELS=cpp: the C++ kernels are {_load_cpp()[1]}")
    if wanted == "cpp" and device != "cpu":
        raise RuntimeError(f"ETUDE_KERNELS=cpp: {op} got a tensor on {device}; set auto or triton")
    if wanted == "triton" and not HAS_TRITON:
        raise RuntimeError(f"ETUDE_KERNELS=triton: {_missing_triton()}; set auto")
    if wanted == "triton" and device != "cuda" and not interpreting():
        raise RuntimeError(f"ETUDE_KERNELS=triton: {op} got a tensor on {device}; set auto or cpp")


def status() -> list[dict[str, str]]:
    """One row per backend: `backend`, `available` (yes or no), `detail` (version or reason)."""
    module, reason = _load_cpp()
    detail = f"level {module.level()} of {', '.join(module.levels())}" if module else reason
    missing = _missing_triton()
    version = getattr(import_module("triton"), "__version__", "") if not missing else ""
    return [
        {"backend": "reference", "available": "yes", "detail": f"torch {torch.__version__}"},
        {"backend": "cpp", "available": "yes" if module else "no", "detail": detail},
        {
            "backend": "triton",
            "available": "no" if missing else "yes",
            "detail": missing or f"triton {version}" + (", interpreted" * interpreting()),
        },
    ]


def announce(device: str) -> str:
    """One line for a log: which backend float32 operators use on `device`, and why."""
    backend = pick("any operator", device, torch.float32)
    rows = {row["backend"]: row for row in status()}
    why = f"ETUDE_KERNELS={_choice}" if _choice != "auto" else "auto"
    absent = "; ".join(f"{n}: {r['detail']}" for n, r in rows.items() if r["available"] == "no")
    line = f"kernels on {device}: {backend} ({rows[backend]['detail']}; {why})"
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
