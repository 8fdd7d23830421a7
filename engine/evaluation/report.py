"""A result of plan.py as a table for terminal, log and page."""

from typing import Any

from etude.metrics.intervals import Interval

PAIRS = {"generated": "generated", "matched": "generated", "real": "real against real"}


def result_table(result: dict[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows of what `evaluate` returned, as `Log.table` takes them.

    The columns are generated against real; the same with as many pictures as real against real
    has; and real against real. Only the last two compare.
    """
    counts = result["counts"]
    columns = [f"{words} ({counts[n][0]}:{counts[n][1]})" for n, words in PAIRS.items()]
    rows = [
        [figure, *(show(measured[name]) for name in PAIRS)]
        for figure, measured in result["figures"].items()
    ]
    if "labels" in result:
        labels = result["labels"]
        lowest = f"{labels['lowest']:.4g}"
        rows.append(["labelled as asked", show(labels["agreement"]), "", ""])
        rows.append(["labelled as asked, lowest class", lowest, "", ""])
    if "nearest" in result:
        drawn, real = result["nearest"]["generated"], result["nearest"]["real"]
        limit = f"{drawn['train-train quantile']:.4g}"
        name = "median distance to the nearest training picture"
        rows.append([name, show(drawn["interval"]), "", show(real["interval"])])
        rows.append(["train-train 5% quantile of that distance", limit, "", limit])
    title = f"{result['generated']['name']}, protocol {result['protocol_fingerprint'][:10]}"
    return title, ["figure (real:other pictures)", *columns], rows


def show(interval: dict[str, Any]) -> str:
    """An interval of a result as text."""
    return str(Interval(**interval))
