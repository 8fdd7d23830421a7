"""The README's table of operators, made from the catalogue, the budgets and the newest results.

`python -m benchmarks.readme` rewrites what is between the two `<!-- operators -->` marks; a test
compares the columns that come from the catalogue. A cell stays empty where no row of the present
sources exists: a number is measured or absent.
"""

import json
import math
import sys
from pathlib import Path

from benchmarks import registry
from benchmarks.case import ROOT
from benchmarks.results import RESULTS
from etude.kernels import catalogue

MARK = "<!-- operators -->"
HEAD = (
    "| op | backends | tests | budget on sm_90 | CPU, times eager: AVX2, AVX-512 "
    "| CPU, times compile | GPU, share of copy or matmul |"
)


def newest(name: str) -> list[dict]:
    """The last row of every case and provider whose shape and sources are those of the tree."""
    file = RESULTS / f"{name}.jsonl"
    if not file.exists():
        return []
    cases = registry.cases()
    now = {case.name: case.source_hash() for case in cases}
    shapes = {case.name: {*case.cpu_shapes, *case.gpu_shapes} for case in cases}
    rows = {}
    for line in file.read_text().splitlines():
        row = json.loads(line)
        case = f"{row['op']} {row.get('variant', '')}"
        known = row["shape"] in shapes.get(case, ())
        if known and now[case] == row.get("source_hash") and "p50_s" in row:
            rows[case, row["shape"], row["dtype"], row["provider"]] = row
    return list(rows.values())


def mean(ratios: list[float]) -> str:
    """The geometric mean, in two digits; nothing for nothing."""
    return f"{math.exp(sum(map(math.log, ratios)) / len(ratios)):.2g}" if ratios else ""


def cpu_ratios(op: str, rows: list[dict], provider: str, against: str) -> list[float]:
    """Times faster than the fastest of what a person would write (`eager`), or than `compiled`."""
    groups: dict[tuple, dict[str, float]] = {}
    for row in rows:
        if row["op"] == op:
            key = (row["variant"], row["shape"], row["dtype"])
            groups.setdefault(key, {})[row["provider"]] = row["p50_s"]
    ratios = []
    for times in groups.values():
        ours = [t for name, t in times.items() if name == provider]
        if against == "compiled":
            theirs = [t for name, t in times.items() if name == "compiled"]
        else:
            written = [n for n in times if n != "compiled" and not n.startswith("cpp")]
            theirs = [min(times[n] for n in written)] if written else []
        if ours and theirs:
            ratios.append(theirs[0] / ours[0])
    return ratios


def gpu_share(op: str, rows: list[dict]) -> str:
    shares = [
        max(row["of_copy"], row["of_matmul"])
        for row in rows
        if row["op"] == op and row["provider"] in ("triton", "cuda")
    ]
    return f"{100 * max(shares):.0f}%" if shares else ""


def table() -> list[str]:
    cpu, gpu = newest("operators_cpu"), newest("operators_gpu")
    lines = [HEAD, "|" + "---|" * (HEAD.count("|") - 1)]
    for row in catalogue.rows():
        op = row["op"]
        levels = [mean(cpu_ratios(op, cpu, f"cpp {level}", "eager")) for level in ("v3", "v4")]
        cells = [
            f"`{op}`", row["backends"], row["tests"], row["budget on sm_90"],
            ", ".join(filter(None, levels)), mean(cpu_ratios(op, cpu, "cpp v4", "compiled")),
            gpu_share(op, gpu),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def replaced(text: str, mark: str, lines: list[str]) -> str:
    """`text` with other lines between its two lines `mark`. Errors: ValueError without them."""
    parts = text.split(mark)
    if len(parts) != 3:
        raise ValueError(f"the page needs two lines {mark}")
    return mark.join((parts[0], "\n" + "\n".join(lines) + "\n", parts[2]))


def main() -> int:
    file = Path(ROOT / "README.md")
    file.write_text(replaced(file.read_text(), MARK, table()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
