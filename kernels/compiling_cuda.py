"""What nvcc makes of the CUDA kernels, for GPUs that are not there: registers and spills.

`python -m etude.kernels.compiling_cuda FAMILY...` compiles `csrc/cuda/*.cu` of a checkout for
sm_80, sm_90a and sm_100 and prints one JSON row per kernel; `--write` stores the rows in
`budgets/<family>_cuda.json` under nvcc's version and the architecture, with a hash of the sources.
The tests compare with those files. Shared memory is not listed: it is given at each launch.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .compiling import BUDGETS

SOURCES = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
ARCHS = ("80", "90a", "100")


def family_of(source: Path) -> str:
    """adaln_bfloat16.cu and adaln.cu belong to adaln."""
    return source.stem.split("_")[0]


def find_nvcc() -> str | None:
    """nvcc's path, or None."""
    homes = [os.environ[k] + "/bin/nvcc" for k in ("CUDA_HOME", "CUDA_PATH") if k in os.environ]
    found = [c for c in (*homes, shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc") if c]
    return next((c for c in found if os.path.exists(c)), None)


def toolchain(nvcc: str, arch: str) -> str:
    """The key of a budget: nvcc's version and the architecture."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    return f"nvcc {re.search(r'V([0-9.]+)', said)[1]}, sm_{arch}"


def sources_hash(family: str) -> str:
    """Changes with any file that a family's kernels are compiled from."""
    names = [p for p in SOURCES.iterdir() if p.suffix in (".h", ".cuh") or family_of(p) == family]
    texts = b"".join(p.read_bytes() for p in sorted(names) if p.stem.startswith(("common", family)))
    return hashlib.sha256(texts).hexdigest()[:16]


def _readable(names: list[str]) -> list[str]:
    said = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
    texts = said.stdout.splitlines()
    short = (("(anonymous namespace)::", ""), ("etude::", ""), ("void ", ""), ("__nv_", ""))
    for old, new in short:
        texts = [t.replace(old, new) for t in texts]
    return [re.sub(r"\([^()]*\)$", "", t) for t in texts]


def measure(sources: Iterable[Path], archs: Iterable[str] = ARCHS) -> Iterator[dict[str, Any]]:
    """One row per kernel and architecture: family, toolchain, kernel, registers, spills.

    Errors: RuntimeError with what nvcc said.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("nvcc was not found: set CUDA_HOME to its folder")
    keys = {arch: toolchain(nvcc, arch) for arch in archs}

    def compiled(job: tuple[Path, str]) -> str:
        source, arch = job
        target = ["-gencode", f"arch=compute_{arch},code=sm_{arch}", "-Xptxas", "-v"]
        command = [nvcc, "-cubin", "-O3", "-std=c++17", *target, str(source), "-o", os.devnull]
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode:
            raise RuntimeError(f"{' '.join(command)}: {(made.stderr + made.stdout)[-2000:]}")
        return made.stderr + made.stdout

    jobs = [(source, arch) for source in sources for arch in keys]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (source, arch), said in zip(jobs, pool.map(compiled, jobs), strict=True):
            parts = said.split("Compiling entry function '")[1:]
            names = _readable([part.split("'")[0] for part in parts])
            for name, part in sorted(zip(names, parts, strict=True)):
                spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
                yield {
                    "family": family_of(source),
                    "toolchain": keys[arch],
                    "kernel": name,
                    "registers": int(re.search(r"Used (\d+) registers", part)[1]),
                    "spills": int(spills[1]) + int(spills[2]),
                }


def budget(family: str) -> dict[str, Any]:
    """{"sources": hash, toolchain: {kernel: {registers, spills}}}, as committed."""
    file = BUDGETS / f"{family}_cuda.json"
    return json.loads(file.read_text()) if file.exists() else {}


def write(rows: list[dict[str, Any]]) -> None:
    """Replace the budgets of the families in `rows`."""
    for family in sorted({row["family"] for row in rows}):
        kept: dict[str, dict[str, dict[str, int]]] = {}
        for row in rows:
            if row["family"] == family:
                numbers = {name: row[name] for name in ("registers", "spills")}
                kept.setdefault(row["toolchain"], {})[row["kernel"]] = numbers
        lines = [f' "sources": "{sources_hash(family)}"']
        for key in sorted(kept):
            kernels = ",\n".join(
                f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in kept[key].items()
            )
            lines.append(f" {json.dumps(key)}: {{\n{kernels}\n }}")
        (BUDGETS / f"{family}_cuda.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Compile CUDA kernels for absent GPUs.")
    parser.add_argument("families", nargs="*", help="such as adaln; none: all")
    parser.add_argument("--write", action="store_true", help="store the rows in budgets/")
    asked = parser.parse_args(arguments)
    wanted = asked.families or {family_of(p) for p in SOURCES.glob("*.cu")}
    rows = []
    for row in measure(p for p in sorted(SOURCES.glob("*.cu")) if family_of(p) in wanted):
        rows.append(row)
        print(json.dumps(row), flush=True)
    if asked.write:
        write(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
