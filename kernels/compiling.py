"""Ahead-of-time compilation of the Triton kernels for GPUs that are not there.

`python -m etude.kernels.compiling FAMILY...` compiles what each `<family>_triton.py` lists in
`builds()` for sm_80, sm_90 and sm_100 and prints one JSON row per kernel: registers, bytes
spilled, bytes of shared memory. `--write` stores them in `budgets/<family>.json` under the versions
of Triton and ptxas; the tests compare with that file, `etude kernels list` prints it. Needs no GPU
and no driver, and a process without TRITON_INTERPRET.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

ARCHS = (80, 90, 100)
BUDGETS = Path(__file__).parent / "budgets"


@dataclass(frozen=True)
class Build:
    """One kernel with the argument types and constants of one real launch.

    types: Triton type per argument that is no constant, such as "*bf16", "i32", "fp32".
    aligned: integer arguments that are multiples of 16 in that launch; pointers always are.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    warps: int = 4
    stages: int = 3
    archs: tuple[int, ...] = ARCHS


def compile_for(build: Build, arch: int) -> Any:
    """The compiled kernel; `.asm` holds its PTX and cubin."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = build.kernel.arg_names
    missing = [n for n in names if n not in build.types and n not in build.constants]
    if missing:
        raise ValueError(f"{build.name}: no type or constant for {', '.join(missing)}")
    index = {name: i for i, name in enumerate(names)}
    pointers = [n for n, kind in build.types.items() if kind.startswith("*")]
    source = ASTSource(
        build.kernel,
        {n: build.types.get(n, "constexpr") for n in names},
        {(index[n],): value for n, value in build.constants.items()},
        {(index[n],): [["tt.divisibility", 16]] for n in (*pointers, *build.aligned)},
    )
    options = {"num_warps": build.warps, "num_stages": build.stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(made: Any, arch: int) -> dict[str, int]:
    """What ptxas says of a kernel; cuobjdump reports no spills even where there are some."""
    from triton.backends.nvidia.compiler import get_ptxas

    ptx = made.asm["ptx"]
    target = re.search(r"\.target (\w+)", ptx).group(1)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(arch).path, "-v", "-arch", target, file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True).stderr
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    return {
        "registers": int(re.search(r"Used (\d+) registers", said).group(1)),
        "spills": int(spills[1]) + int(spills[2]),
        "shared": made.metadata.shared,
    }


@lru_cache
def toolchain(arch: int) -> str:
    """The key of a budget: versions of Triton and of the ptxas it uses for `arch`, and the GPU."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas

    return f"triton {triton.__version__}, ptxas {get_ptxas(arch).version}, sm_{arch}"


def measure(family: str) -> Iterator[dict[str, Any]]:
    """One row per build and GPU: family, toolchain, kernel, registers, spills, shared."""
    for build in import_module(f".{family}_triton", __package__).builds():
        for arch in build.archs:
            row = {"family": family, "toolchain": toolchain(arch), "kernel": build.name}
            yield row | resources(compile_for(build, arch), arch)


def families() -> list[str]:
    """Every family that has Triton kernels."""
    files = Path(__file__).parent.glob("*_triton.py")
    return sorted(file.stem.removesuffix("_triton") for file in files)


def budget(family: str) -> dict[str, dict[str, dict[str, int]]]:
    """{toolchain: {kernel: {registers, spills, shared}}}, as committed; {} if there is none."""
    file = BUDGETS / f"{family}.json"
    return json.loads(file.read_text()) if file.exists() else {}


def differences(rows: list[dict[str, Any]]) -> list[str]:
    """What is wrong with measured rows: spills, or other numbers than the committed budget.

    A toolchain that the budget does not know is held to spilling nothing.
    """
    wrong = []
    for row in rows:
        known = budget(row["family"]).get(row["toolchain"])
        now = {name: row[name] for name in ("registers", "spills", "shared")}
        allowed = (known or {}).get(row["kernel"])
        where = f"{row['family']}: {row['kernel']} ({row['toolchain']})"
        if known is None and now["spills"]:
            wrong.append(f"{where} spills {now['spills']} bytes")
        elif known is not None and now != allowed:
            wrong.append(f"{where} is {now}, the budget says {allowed}")
    return wrong


def write(rows: list[dict[str, Any]]) -> None:
    """Replace the rows of the toolchains in use; rows of other versions of Triton stay."""
    for family in {row["family"] for row in rows}:
        kept = budget(family)
        for row in rows:
            if row["family"] == family:
                kept[row["toolchain"]] = {}
        for row in rows:
            if row["family"] == family:
                kept[row["toolchain"]][row["kernel"]] = {
                    name: row[name] for name in ("registers", "spills", "shared")
                }
        lines = []
        for key in sorted(kept):
            kernels = ",\n".join(
                f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in kept[key].items()
            )
            lines.append(f" {json.dumps(key)}: {{\n{kernels}\n }}")
        BUDGETS.mkdir(exist_ok=True)
        (BUDGETS / f"{family}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Compile Triton kernels for absent GPUs.")
    parser.add_argument("families", nargs="*", help="such as adaln; none: all")
    parser.add_argument("--write", action="store_true", help="store the rows in budgets/")
    parser.add_argument("--check", action="store_true", help="fail where budgets/ says otherwise")
    asked = parser.parse_args(arguments)
    rows = []
    for family in asked.families or families():
        for row in measure(family):
            rows.append(row)
            print(json.dumps(row), flush=True)
    if asked.write:
        write(rows)
    if asked.check and differences(rows):
        raise SystemExit("\n".join(differences(rows)))


if __name__ == "__main__":
    main(sys.argv[1:])
