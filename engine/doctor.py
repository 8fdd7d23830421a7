"""What is installed, what is lost without the rest, and what to type: `etude doctor`.

Called by the command line. Looks at package metadata and finders instead of importing, so it works
on a machine where an optional part is absent or broken. With a recipe it also says what that needs
(estimate.py); with `dist` it makes all ranks add up a number and names whoever does not answer.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from etude.core.environment import cpu_count, version
from etude.core.errors import UserError
from etude.core.log import Log

_HF_WINDOW = ((0, 18, 2), (0, 19))  # versions of `kernels` that transformers imports names from
_USUAL_NVCC = "/usr/local/cuda/bin/nvcc"  # where setup.py looks last


@dataclass(frozen=True)
class Part:
    """One row of the environment table.

    Attributes:
        name: the part.
        found: its version or place; "" when it is missing.
        lost: what cannot be done without it.
        command: what to type to get it.
        required: whether Etude does not work without it.
    """

    name: str
    found: str
    lost: str
    command: str
    required: bool = False

    def row(self) -> list[str]:
        """Cells of the table: a part that is there needs no remedy."""
        if self.found:
            return [self.name, self.found, "", ""]
        return [self.name, "missing", self.lost, self.command]


_OPTIONAL = (
    ("numpy", "everything", "pip install numpy", True),
    ("pydantic", "everything", "pip install pydantic", True),
    ("triton", "GPU kernels (the reference operators run instead)", "pip install triton", False),
    (
        "deepspeed",
        "ZeRO and offload: one process with strategy.kind=local still trains",
        "pip install deepspeed ninja",
        False,
    ),
    (
        "nvidia.dali",
        "fast decoding of JPEGs (the torch decoder runs instead)",
        "pip install nvidia-dali-cuda130",
        False,
    ),
    ("webdataset", "writing shards", "pip install webdataset", False),
    ("diffusers", "autoencoders (training in pixels still works)", "pip install diffusers", False),
    ("transformers", "text encoders", "pip install transformers", False),
    ("safetensors", "loading and saving weights", "pip install safetensors", True),
    ("sklearn", "the digits of `etude demo`", "pip install scikit-learn", False),
    ("rich", "progress bars (plain lines are printed instead)", "pip install rich", False),
    ("xformers", "nothing: one more attention to compare with", "pip install xformers", False),
    ("flash_attn", "nothing: one more attention to compare with", "pip install flash-attn", False),
)


def examine(
    recipe: str | None = None, *, dist: bool = False, price_per_hour: float | None = None
) -> int:
    """Print the report; returns the exit status, 0 when nothing needed is missing.

    Args:
        recipe: a recipe's name or file to check this machine for.
        price_per_hour: of one device, in any currency; the report then says what the recipe costs.
        dist: start all ranks of this job and make them add up a number within 60 s.

    Raises:
        UserError: the recipe cannot be read, ranks are missing or disagree, or a price without a
            recipe.
    """
    if price_per_hour is not None and recipe is None:
        raise UserError("--price-per-hour has no effect without a recipe: name one")
    rank = int(os.environ.get("RANK", 0))
    log = Log(None, rank=rank)
    if dist:
        log.table("ranks", *check_ranks())
        if recipe is None:
            return 0
    parts = environment_parts()
    columns = ["part", "found", "lost without it", "type this"]
    log.table("this machine", columns, [part.row() for part in parts])
    for warning in warnings():
        log.warn(warning)
    missing = [part.name for part in parts if part.required and not part.found]
    if recipe is not None:
        missing += _report_recipe(recipe, log, price_per_hour)
    if missing:
        log.warn(f"needed and missing: {', '.join(dict.fromkeys(missing))}")
    return 1 if missing else 0


def environment_parts() -> list[Part]:
    """Every part that Etude can use, found or not, without importing any but torch."""
    parts = [Part("python", f"{platform.python_version()}, {cpu_count()} CPUs", "", "", True)]
    parts += _torch_parts()
    for name, lost, command, required in _OPTIONAL:
        parts.append(Part(name, _found(name), lost, command, required))
    parts.append(_compiler())
    parts.append(_nvcc())
    return [*parts, *_kernel_parts()]


def warnings() -> list[str]:
    """Things that are there and will surprise."""
    try:
        installed = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return []
    spec = _spec("kernels")
    origin = Path(spec.origin).resolve() if spec is not None and spec.origin else None
    ours = Path(__file__).resolve().parents[1] / "kernels" / "__init__.py"
    if origin != ours:
        return []
    hides = f"the folder {ours.parent} hides the installed package kernels {installed}"
    if _HF_WINDOW[0] <= tuple(map(int, re.findall(r"\d+", installed)[:3])) < _HF_WINDOW[1]:
        return [
            f"{hides}, and transformers fails on it: run from another folder, take "
            f"{ours.parent.parent} off PYTHONPATH, or type: pip uninstall kernels"
        ]
    return [f"{hides}; run from another folder to use its get_kernel"]


def check_ranks(timeout_s: float = 60.0) -> tuple[list[str], list[list[str]]]:
    """Start this job's processes, add up their ranks, and compare code and versions.

    Returns:
        Columns and one row per rank: rank, host and device, seconds of the first all-reduce.

    Raises:
        UserError: ranks did not arrive in time, disagree, or got a wrong sum; they are named.
    """
    import torch
    import torch.distributed as group

    from etude.core import distributed

    began = time.monotonic()
    world = distributed.start(timeout_s)
    if world.size == 1:
        return ["rank", "host and device", "all-reduce"], [
            ["0", f"{socket.gethostname()}:{world.device}", "alone; start it with torchrun"]
        ]
    left = max(5.0, timeout_s - (time.monotonic() - began))
    value = torch.full((1 << 20,), float(world.rank), device=world.device)
    begun, outcome = time.monotonic(), ""
    try:
        work = group.all_reduce(value, async_op=True)
        work.wait(timedelta(seconds=left))
        total = float(value.mean())
        wanted = world.size * (world.size - 1) / 2
        outcome = "" if total == wanted else f"got {total:g} instead of {wanted:g}"
    except RuntimeError as error:
        outcome = str(error).splitlines()[0][:160]
    seconds = time.monotonic() - begun
    answers = distributed.exchange(world, "all-reduce", [outcome, seconds], left)
    bad = [f"rank {r} ({world.hosts[r]}): {a[0]}" for r, a in enumerate(answers) if a[0]]
    if bad:
        raise UserError("the all-reduce failed on " + "; ".join(bad))
    distributed.all_agree(world, distributed.local_facts())
    rows = [[str(r), world.hosts[r], f"{a[1]:.2f} s"] for r, a in enumerate(answers)]
    distributed.stop(world)
    return ["rank", "host and device", "all-reduce"], rows


def _report_recipe(name: str, log: Log, price_per_hour: float | None) -> list[str]:
    from etude.core.recipe import load_recipe

    from .estimate import describe, needed_files

    recipe = load_recipe(name)
    for table in describe(recipe, price_per_hour):
        log.table(*table)
    return [item.path for item in needed_files(recipe) if not item.present and not item.made]


def _found(name: str) -> str:
    """Version of an importable package, "installed" without metadata, "" when it is absent."""
    return (version(name) or "installed") if _spec(name) is not None else ""


def _spec(name: str) -> importlib.machinery.ModuleSpec | None:
    if name in sys.modules:
        return sys.modules[name].__spec__
    try:
        return importlib.util.find_spec(name)
    except Exception:  # a broken parent package counts as absent
        return None


def _torch_parts() -> list[Part]:
    command = "pip install torch (the CUDA build that fits the driver)"
    if not _found("torch"):
        return [Part("torch", "", "everything", command, True)]
    try:
        import torch
    except Exception as error:
        return [Part("torch", "", f"everything: {str(error).splitlines()[0][:80]}", command, True)]
    lost = "GPU training: the CPU is used, for small models"
    parts = [Part("torch", torch.__version__, "", "", True)]
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}; install an NVIDIA driver"
        remedy = built if torch.version.cuda else command
        return [*parts, Part("CUDA", "", lost, remedy)]
    names = ", ".join(sorted({torch.cuda.get_device_name(i) for i in range(_devices(torch))}))
    return [*parts, Part("CUDA", f"{torch.version.cuda}, {_devices(torch)} x {names}", "", "")]


def _devices(torch: object) -> int:
    return torch.cuda.device_count()  # type: ignore[attr-defined]


def _compiler() -> Part:
    chosen = os.environ.get("CXX")
    found = next((path for name in (chosen, "g++", "c++", "clang++") if (path := _which(name))), "")
    return Part(
        "C++ compiler",
        found,
        "C++ operators and DeepSpeed's (slower reference operators run instead)",
        "apt-get install g++",
    )


def _nvcc() -> Part:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    path = _which(str(Path(home) / "bin" / "nvcc")) if home else ""
    path = path or _which("nvcc") or _which(_USUAL_NVCC)
    found = f"{path} {_release(path)}".strip() if path else ""
    return Part(
        "nvcc",
        found,
        "CUDA operators of csrc/ (Triton needs no nvcc)",
        "install the CUDA toolkit of torch's CUDA version, then pip install -e .",
    )


def _release(nvcc: str) -> str:
    try:
        done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "(does not run)"
    marks = [line for line in done.stdout.splitlines() if "release" in line]
    return marks[0].rpartition("release ")[2].split(",")[0] if marks else ""


def _which(name: str | None) -> str:
    return (shutil.which(name) or "") if name else ""


def _kernel_parts() -> list[Part]:
    try:
        status: Callable = importlib.import_module("etude.kernels").status
        rows = status()
    except Exception as error:  # the report must come even if the operators do not load
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        return [Part("operators", "", f"all of them: {reason}", "pip install -e .")]
    parts = []
    for row in rows:
        found = row["detail"] if row["available"] == "yes" else ""
        name = f"operators: {row['backend']}"
        parts.append(Part(name, found, row["detail"], _KERNEL_COMMANDS.get(row["backend"], "")))
    return parts


_KERNEL_COMMANDS = {
    "cpp": "pip install -e . (with a C++ compiler)",
    "triton": "pip install triton, on a machine with an NVIDIA GPU",
    "cuda": "ETUDE_BUILD_CUDA=1 pip install -e . (with nvcc)",
}
