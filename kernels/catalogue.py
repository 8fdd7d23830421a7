"""The list of operators: what `etude kernels list` prints and the README's table is made from.

Every family's file ends with its `OPERATORS`; `operators()` collects them. A family is a file
`<family>.py`, with its Triton kernels in `<family>_triton.py` and its tests in
tests/kernels/test_<family>.py.
"""

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
    """One operator: its public name, what it computes in a few words, and the twins it has."""

    name: str
    summary: str
    twins: tuple[str, ...]  # of cpp, triton, cuda; what `backends.pick` is given


def operators() -> dict[str, list[Operator]]:
    """{family: its operators}; loads every family."""
    return {f: list(import_module(f".{f}", __package__).OPERATORS) for f in FAMILIES}


def tests(family: str) -> list[Path]:
    """The family's test files, in a checkout; empty where Etude is installed without one."""
    root = Path(__file__).resolve().parent.parent
    return sorted(p.relative_to(root) for p in root.glob(f"tests/kernels/test_{family}*.py"))


def resources(family: str) -> str:
    """The committed budget on Hopper in words: the largest kernel, and bytes spilled by all."""
    from .compiling import budget

    rows = [
        row
        for toolchain, kernels in budget(family).items()
        if toolchain.endswith("sm_90")
        for row in kernels.values()
    ]
    if not rows:
        return ""
    largest = max(row["registers"] for row in rows)
    spills = sum(row["spills"] for row in rows)
    return f"{len(rows)} kernels, at most {largest} registers, {spills} B spilled"


def rows() -> list[dict[str, str]]:
    """One row per operator: name, what it computes, twins, dtypes, Triton budget, tests."""
    listed = []
    for family, known in operators().items():
        files = " ".join(file.name for file in tests(family))
        for operator in known:
            compiled = "triton" in operator.twins
            kinds = [DTYPES[twin] for twin in operator.twins if twin in DTYPES]
            dtypes = dict.fromkeys(str(d).removeprefix("torch.") for ds in kinds for d in ds)
            listed.append(
                {
                    "op": operator.name,
                    "computes": operator.summary,
                    "backends": ", ".join(("reference", *operator.twins)),
                    "dtypes": ", ".join((*dtypes, "float64 (reference)")),
                    "Triton budget (sm_90)": resources(family) if compiled else "",
                    "tests": files,
                }
            )
    return listed
