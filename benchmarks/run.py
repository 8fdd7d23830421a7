"""`make bench`, `etude kernels bench [OP...]`: time the cases, print a table, keep the rows.

Refuses to report a number for operators that are wrong: their tests run first, and each provider's
result is compared with the float64 reference before it is timed. A row that fails costs no other:
what was measured is printed and kept, and the exit status says that something is missing.
`--seconds-per-row 0.02` is for a look at the whole in less time; its numbers are rough.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import registry
from benchmarks.results import append, machine, quantiles, table
from etude.kernels import catalogue

ROOT = Path(__file__).resolve().parent.parent


def pytest_run(*arguments: str, **environment: str) -> int:
    """One run that shows a bar on a terminal, and failures."""
    shown = ("-qq", "-rfE", "--disable-warnings", "-p", "benchmarks.progress")
    command = [sys.executable, "-m", "pytest", *shown, *arguments]
    # A worker of pytest-xdist would hand its own settings on, under which nothing is timed, and a
    # GPU beside this CPU is none of its rivals' business.
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    seen = kept | {"CUDA_VISIBLE_DEVICES": ""} | environment
    return subprocess.run(command, cwd=ROOT, env=seen).returncode


def gate(operators: list[str]) -> list[str]:
    """The test files of the families that hold these operators (all, if none is named).

    Without those of the Triton and CUDA twins, which this run does not time.
    """
    wanted = {
        family
        for family, listed in catalogue.operators().items()
        for operator in listed
        if not operators or operator.name in operators
    }
    files = [file for family in sorted(wanted) for file in catalogue.tests(family)]
    return [str(file) for file in files if not file.stem.endswith(("_triton", "_cuda", "_gpu"))]


def rows(report: dict) -> list[dict]:
    """One row per case and provider; times in seconds."""
    common = machine("cpu")
    return [common | b["extra_info"] | quantiles(b["stats"]["data"]) for b in report["benchmarks"]]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Time the operators on this CPU.")
    parser.add_argument("operators", nargs="*", help="such as adaln_modulate; none: all")
    parser.add_argument("--seconds-per-row", type=float, default=0.3, help="0.3 if not given")
    asked = parser.parse_args(arguments)
    operators = asked.operators
    try:
        registry.cases(*operators)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if pytest_run("-x", *gate(operators)):
        print("the operators' tests fail: nothing is measured", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        code = pytest_run(
            "benchmarks/bench_operators.py",
            "--benchmark-enable",
            "--benchmark-only",
            "--benchmark-save-data",
            "--benchmark-columns=median",
            "--benchmark-quiet",
            f"--benchmark-json={report}",
            ETUDE_BENCH=",".join(operators),
            ETUDE_BENCH_SECONDS=str(asked.seconds_per_row),
        )
        if report.exists() and report.stat().st_size:
            made = rows(json.loads(report.read_text()))
            print(table(made))
            print(f"rows added to {append('operators_cpu', made)}")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
