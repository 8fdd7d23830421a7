"""`python -m benchmarks.plot`: docs/operators-cpu.svg, every case beside the fastest eager way.

One row per case (op, variant, shape, dtype) of the newest results: how many times faster than the
fastest of eager torch and the rivals torch.compile and the C++ twin are. Called after `make bench`.
"""

import sys

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from benchmarks.case import ROOT
from benchmarks.readme import newest

SHOWN = {"compiled": ("torch.compile", "#c44e52"), "cpp v3": ("C++, AVX2", "#8da0cb")}
SHOWN |= {"cpp v4": ("C++, AVX-512", "#1f4e9c")}


def ratios(rows: list[dict]) -> dict[str, dict[str, float]]:
    """{case: {provider: times faster than the fastest eager way}}."""
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        dtype = {"float32": "fp32", "bfloat16": "bf16"}.get(row["dtype"], row["dtype"])
        case = f"{row['op']} {row['variant']}, {row['shape']}, {dtype}"
        groups.setdefault(case, {})[row["provider"]] = row["p50_s"]
    found = {}
    for case, times in groups.items():
        written = [
            t for name, t in times.items() if name != "compiled" and not name.startswith("cpp")
        ]
        if written and any(name.startswith("cpp") for name in times):
            found[case] = {n: min(written) / t for n, t in times.items() if n in SHOWN}
    return found


def main() -> int:
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "etude"})
    cases = ratios(newest("operators_cpu"))
    figure, axes = plt.subplots(figsize=(9, 0.5 + 0.16 * len(cases)))
    names = sorted(cases, reverse=True)
    labelled: set[str] = set()
    for place, case in enumerate(names):
        for name, value in cases[case].items():
            label, color = SHOWN[name]
            axes.plot(value, place, "o", ms=4, color=color, label=label * (name not in labelled))
            labelled.add(name)
    axes.axvline(1.0, color="black", lw=0.8)
    axes.set(xscale="log", xlabel="times faster than the fastest eager way", ylim=(-1, len(names)))
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.grid(axis="y", lw=0.3)
    axes.legend(loc="lower right", fontsize=7)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "operators-cpu.svg", metadata={"Date": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
