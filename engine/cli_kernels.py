"""The noun `kernels` of the command: which backend serves each op, and how fast.

Nothing here is needed before its verb is typed, so operators are imported inside the functions.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from etude.cli_output import print_table
from etude.core.errors import UserError

app = typer.Typer(no_args_is_help=True, help="Kernels: which backend serves each op.")


def check_backends() -> None:
    """A backend that `ETUDE_KERNELS` demands and this machine lacks, said in one sentence."""
    if os.environ.get("ETUDE_KERNELS"):
        try:
            from etude.kernels import backends

            backends.status()
        except (ValueError, RuntimeError) as error:
            raise UserError(str(error)) from None


@app.command("status")
def kernels_status() -> None:
    """Which backends serve each op on this machine, and why the others do not.

    Example: etude kernels status
    """
    from etude import kernels

    print_table("kernels", *_cells(kernels.status()))
    print_table("attention", *_cells(kernels.attention_status()))


@app.command("list")
def kernels_list() -> None:
    """Every op: what it computes, its backends, dtypes, Triton budget and tests.

    Example: etude kernels list
    """
    from etude.kernels import catalogue

    print_table("ops", *_cells(catalogue.rows()))


@app.command("bench")
def kernels_bench(
    ops: Annotated[list[str] | None, typer.Argument(help="Ops to time; none: all.")] = None,
) -> None:
    """Time ops on this CPU beside eager torch, torch.compile and others (in a checkout).

    Example: etude kernels bench gate_residual_adaln
    """
    _in_checkout("run", *(ops or []))


@app.command("tune")
def kernels_tune(
    file: Annotated[str, typer.Argument(help="File to write, for ETUDE_KERNELS=@FILE.")],
    ops: Annotated[list[str] | None, typer.Argument(help="Ops to tune; none: all.")] = None,
) -> None:
    """Measure each op's backends on this machine and write the faster choices (in a checkout).

    Example: etude kernels tune kernels.txt
    """
    _in_checkout("tune", str(Path(file).absolute()), *(ops or []))


def _in_checkout(module: str, *arguments: str) -> None:
    """Run benchmarks/<module>.py, which is part of a checkout and not of an installed package."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "benchmarks" / f"{module}.py").exists():
        raise UserError(
            "benchmarks are not installed with the package: clone the repository and type it there"
        )
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    raise typer.Exit(subprocess.run(command, cwd=root).returncode)


def _cells(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    columns = list(rows[0])
    return columns, [[str(row[column]) for column in columns] for row in rows]
