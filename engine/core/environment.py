"""What a job ran on: code revision, versions, machine; written by runs, compared between ranks.

Versions are read from package metadata, so nothing heavy is imported to learn them.
"""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path

PACKAGES = {  # import name -> names of the distributions that provide it
    "torch": ("torch",),
    "numpy": ("numpy",),
    "triton": ("triton", "pytorch-triton", "triton-windows"),
    "deepspeed": ("deepspeed",),
    "nvidia.dali": ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali-cuda110"),
    "webdataset": ("webdataset",),
    "diffusers": ("diffusers",),
    "transformers": ("transformers",),
    "safetensors": ("safetensors",),
    "xformers": ("xformers",),
    "flash_attn": ("flash-attn", "flash_attn"),
}


def environment() -> dict:
    """Revision, versions, kernels, command, host and date of this process, as plain JSON values."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpus": cpu_count(),
        "command": sys.argv,
        "python": platform.python_version(),
        "etude": version("etude") or "checkout",
        "revision": revision(),
        "versions": {name: version(name) for name in PACKAGES},
        "kernels": kernel_status(),
    }


def version(name: str) -> str | None:
    """The installed version of an import name, None when it is not installed."""
    for distribution in PACKAGES.get(name, (name,)):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(distribution)
    return None


def revision() -> str | None:
    """Git revision of the checkout that this code runs from, "+changes" if it was edited."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    head = _git(folder, "rev-parse", "HEAD")
    if head is None:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{head}+changes" if changed else head


def kernel_status() -> dict[str, str]:
    """Kernel backend -> what `etude.kernels.status()` says of it; empty when it cannot tell."""
    with contextlib.suppress(Exception):  # a broken build must not keep a job from its record
        rows = importlib.import_module("etude.kernels").status()
        return {row["backend"]: f"{row['available']}: {row['detail']}" for row in rows}
    return {}


def cpu_count() -> int:
    """Processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
