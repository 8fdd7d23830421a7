"""`make bench`, `etude kernels bench [OP...]`: time the cases, print a table, keep the rows.

Refuses to report a number for operators that are wrong: their tests run first, and each provider's
result is compared with the float64 reference before it is timed.
"""

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
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment).returncode


def gate(operators: list[str]) -> list[str]:
    """The test files of the families that hold these operators (all, if none is named)."""
    wanted = {
        family
        for family, listed in catalogue.operators().items()
        for operator in listed
        if not operators or operator.name in operators
    }
    return [str(file) for family in sorted(wanted) for file in catalogue.tests(family)]


def rows(report: dict) -> list[dict]:
    """One row per case and provider; times in seconds."""
    common = machine()
    return [common | b["extra_info"] | quantiles(b["stats"]["data"]) for b in report["benchmarks"]]


def main(operators: list[str]) -> int:
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
        )
        if report.exists() and report.stat().st_size:
            made = rows(json.loads(report.read_text()))
            print(table(made))
            print(f"rows added to {append('operators_cpu', made)}")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
