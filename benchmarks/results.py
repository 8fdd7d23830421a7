"""Rows of benchmarks/results/*.jsonl: one measurement each, with all that it depends on.

Called by the benchmarks. A row whose `source_hash` is not that of the tree is stale.
"""

import json
import os
import platform
import statistics
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(os.environ.get("ETUDE_RESULTS") or Path(__file__).parent / "results")

# Etude's own requirements, and the rivals where they are installed.
LIBRARIES = ("torch", "triton", "numpy", "deepspeed", "liger-kernel", "quack-kernels", "xformers")
LIBRARIES += ("flash-attn", "flash-attn-3", "flash-attn-4")


def processor(device: str = "") -> str:
    """The CPU's name, or the GPU's where there is one and `device` is not "cpu"."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def revision() -> str:
    """The git revision, with `+changes` where the tree differs; outside a checkout what
    ETUDE_REVISION says, or "unknown".
    """

    def git(*words: str) -> str:
        command = ["git", *words]
        made = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
        return made.stdout.strip() if made.returncode == 0 else ""

    head = git("rev-parse", "HEAD") or os.environ.get("ETUDE_REVISION") or "unknown"
    own = ":(exclude)results"  # rows just written are no change of what is measured
    return head + ("+changes" if git("status", "-s", "--", ":/", own) else "")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine(device: str = "") -> dict:
    """What every row says of where it was measured; `device`: as for `processor`."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": processor(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "versions": versions(),
        "revision": revision(),
    }


def append(name: str, rows: list[dict]) -> Path:
    """Add rows to results/<name>.jsonl, at once on the disk: a cut run keeps what it measured."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.jsonl"
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return path


def quantiles(times: list[float]) -> dict[str, float]:
    """p20, p50 and p80 of one case's times, in seconds."""
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return {"p20_s": cuts[1], "p50_s": cuts[4], "p80_s": cuts[7], "rounds": len(times)}


def table(rows: list[dict]) -> str:
    """Providers side by side: p50 in ms and, against eager torch, how many times faster."""
    groups: dict[tuple, dict[str, float]] = {}
    for row in rows:
        key = (f"{row['op']} {row['variant']}", row["shape"], row["dtype"])
        groups.setdefault(key, {})[row["provider"]] = row["p50_s"]
    lines = []
    for (op, shape, dtype), times in groups.items():
        cells = [
            f"{name} {1e3 * t:.3g} ms ({times.get('eager', t) / t:.2f}x)"
            for name, t in times.items()
        ]
        lines.append(f"{op:42} {shape:18} {dtype:9} " + "  ".join(cells))
    return "\n".join(lines)
