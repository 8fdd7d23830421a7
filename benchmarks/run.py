"""`make bench`: run the pytest-benchmark cases, print them side by side, keep the rows.

Refuses to report a number for operators that are wrong: their tests run first.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.results import append, machine

ROOT = Path(__file__).resolve().parent.parent
GATE = ["tests/kernels/test_adaln.py", "tests/kernels/test_optimizer.py"]


def pytest_run(*arguments: str) -> int:
    return subprocess.run([sys.executable, "-m", "pytest", "-q", *arguments], cwd=ROOT).returncode


def rows(report: dict) -> list[dict]:
    """One row per case: medians and quantiles in seconds."""
    common = machine()
    made = []
    for bench in report["benchmarks"]:
        stats = bench["stats"]
        times = {"median_s": stats["median"], "q1_s": stats["q1"], "q3_s": stats["q3"]}
        made.append(common | bench["extra_info"] | times | {"min_s": stats["min"]})
    return made


def main(arguments: list[str]) -> int:
    if pytest_run("-x", *GATE):
        print("the operators' tests fail: nothing is measured", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        code = pytest_run(
            "benchmarks/bench_operators.py",
            "--benchmark-enable",
            "--benchmark-only",
            "--benchmark-columns=min,median,iqr",
            "--benchmark-group-by=group",
            f"--benchmark-json={report}",
            *arguments,
        )
        if report.exists() and report.stat().st_size:
            path = append("operators_cpu", rows(json.loads(report.read_text())))
            print(f"rows added to {path}")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
