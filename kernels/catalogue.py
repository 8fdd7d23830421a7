"""The list of operators: what `etude kernels list` prints and the README's table is made from.

Every family's file ends with its `OPERATORS`; `operators()` collects them. A family is a file
`<family>.py`, with its Triton kernels in `<family>_triton.py` and its tests in
tests/kernels/test_<family>.py.
"""

import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from .backends import DTYPES

FAMILIES = (
    "adaln",
    "modulation",
    "attention",
    "activation",
    "groupnorm",
    "optimizer",
    "noising",
    "solver",
    "resizing",
    "statistics",
    "knn",
    "fp8",
)


@dataclass(frozen=True)
class Operator:
    """One operator: its public name, what it computes in a few words, and the twins it has.

    twins: of cpp, triton, cuda; what `backends.pick` is given. others: implementations that are not
    Etude's own. dtypes: in words, where they are not those of the twins.
    """

    name: str
    summary: str
    twins: tuple[str, ...]
    others: tuple[str, ...] = ()
    dtypes: str = ""


def operators() -> dict[str, list[Operator]]:
    """{family: its operators}; loads every family."""
    return {f: list(import_module(f".{f}", __package__).OPERATORS) for f in FAMILIES}


def tests(family: str) -> list[Path]:
    """The family's test files, in a checkout; empty where Etude is installed without one."""
    root = Path(__file__).resolve().parent.parent
    return sorted(p.relative_to(root) for p in root.glob(f"tests/kernels/test_{family}*.py"))


def resources(family: str, twins: tuple[str, ...]) -> str:
    """The committed budgets on Hopper in words: the largest kernel, and bytes spilled by all."""
    from . import compiling, compiling_cuda

    budgets = {"triton": compiling.budget, "cuda": compiling_cuda.budget}
    words = []
    for twin, read in budgets.items():
        rows = [
            row
            for toolchain, kernels in (read(family) if twin in twins else {}).items()
            if re.search(r"sm_90a?$", toolchain)
            for row in kernels.values()
        ]
        if rows:
            largest, spilled = (max(row[key] for row in rows) for key in ("registers", "spills"))
            words.append(f"{twin}: at most {largest} registers, {spilled} B spilled")
    return "; ".join(words)


def rows() -> list[dict[str, str]]:
    """One row per operator: name, what it computes, backends, dtypes, budgets, tests."""
    listed = []
    for family, known in operators().items():
        for operator in known:
            files = [file.name for file in tests(family)]
            if "cuda" in operator.twins and f"test_{family}_cuda.py" not in files:
                files.append("test_cuda.py")
            kinds = [DTYPES[twin] for twin in operator.twins]
            dtypes = dict.fromkeys(str(d).removeprefix("torch.") for ds in kinds for d in ds)
            listed.append(
                {
                    "op": operator.name,
                    "computes": operator.summary,
                    "backends": ", ".join((*operator.twins, *operator.others, "reference")),
                    "dtypes": operator.dtypes or ", ".join((*dtypes, "float64 (reference)")),
                    "budget on sm_90": resources(family, operator.twins),
                    "tests": " ".join(files),
                }
            )
    return listed
