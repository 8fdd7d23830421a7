"""The list of operators: what `etude kernels list` prints and the README's table is made from.

Every family's file ends with its `OPERATORS`; `operators()` collects them. A family is a file
`<family>.py`, with its Triton kernels in `<family>_triton.py` and its tests in
tests/kernels/test_<family>.py.
"""

from dataclasses import dataclass
from importlib import import_module

FAMILIES = ("adaln", "knn", "optimizer", "resizing", "statistics")


@dataclass(frozen=True)
class Operator:
    """One operator: its public name, what it computes in a few words, and the twins it has."""

    name: str
    summary: str
    twins: tuple[str, ...]  # of cpp, triton, cuda; what `backends.pick` is given


def operators() -> dict[str, list[Operator]]:
    """{family: its operators}; loads every family."""
    return {f: list(import_module(f".{f}", __package__).OPERATORS) for f in FAMILIES}
