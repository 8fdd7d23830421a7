"""Run by test_triton.py: compile the Triton kernels for sm_80, sm_90 and sm_100 without a GPU.

Prints registers, spills and shared memory of every kernel at D = 1152 in bfloat16, as JSON rows.
`python compile_adaln.py --budget` prints the file that test_triton.py compares with.
"""

import json
import os
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from etude.kernels import adaln_triton as kernels

WIDTH = 1152
CONFIG = kernels.LaunchConfig.for_width(WIDTH, 256)
FLOAT32 = ("mean_ptr", "rstd_ptr", "partial_ptr")
BOTH = {"GATED": True, "NORMED": True, "RMS": False}
# A stride or a width that is a multiple of 16 is told to the compiler at launch; N is not one.
ALIGNED_INTS = ("D", "x_b", "x_n", "h_b", "h_n", "gate_b", "shift_b", "scale_b")
ALIGNED_INTS += ("dout_b", "dout_n", "dy_b", "dy_n")
CASES = {
    "fwd_both": (kernels.adaln_fwd_kernel, BOTH | {"BLOCK": CONFIG.block}, CONFIG.warps),
    "fwd_modulate": (
        kernels.adaln_fwd_kernel,
        {"GATED": False, "NORMED": True, "RMS": True, "BLOCK": CONFIG.block},
        CONFIG.warps,
    ),
    "bwd_both": (
        kernels.adaln_bwd_kernel,
        BOTH | {"HAS_DOUT": True, "ROWS": CONFIG.rows, "BLOCK": CONFIG.block},
        CONFIG.backward_warps,
    ),
    "reduce": (kernels.reduce_kernel, {"GATED": True, "NORMED": True, "BLOCK": 256}, 4),
}


def kind(name: str) -> str:
    if name.endswith("_ptr"):
        return "*fp32" if name in FLOAT32 else "*bf16"
    return "fp32" if name == "eps" else "i32"


def build(kernel, constants: dict, warps: int, arch: int) -> dict:
    index = {name: i for i, name in enumerate(kernel.arg_names)}
    types = {n: "constexpr" if n in constants else kind(n) for n in kernel.arg_names}
    aligned = [n for n in kernel.arg_names if n.endswith("_ptr") or n in ALIGNED_INTS]
    source = ASTSource(
        kernel,
        types,
        {(index[k],): v for k, v in constants.items()},
        {(index[n],): [["tt.divisibility", 16]] for n in aligned},
    )
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})
    return resources(made, arch)


def resources(made, arch: int) -> dict:
    """What ptxas says of the kernel; cuobjdump reports no spills even where there are some."""
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
        "wide_loads": bool(re.search(r"ld\.global[.\w]*\.v4\.b32|ld\.global[.\w]*\.v2\.b64", ptx)),
    }


def main() -> None:
    budget = {}
    for arch in (80, 90, 100):
        for name, (kernel, constants, warps) in CASES.items():
            row = {"case": f"{name}_sm{arch}"} | build(kernel, constants, warps, arch)
            # Headroom for another minor version of Triton: eight registers.
            budget[row["case"]] = {"registers": row["registers"] + 8, "shared": row["shared"]}
            if "--budget" not in sys.argv:
                print(json.dumps(row))
    if "--budget" in sys.argv:
        print(json.dumps(budget, indent=1))


if __name__ == "__main__":
    main()
