"""Charts of pages at the edges: odd names, many series, values that are not drawn."""

import re

import numpy as np
import pytest

from etude.plots import SERIES, bar_chart, line_chart, map_chart


def texts(svg: str) -> list[str]:
    return [text.strip() for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]


def test_an_interval_need_not_hold_its_value() -> None:
    svg = bar_chart(["a"], {"s": [1.0]}, "x", "y", {"s": [(1.1, 1.2)]})
    paths = re.findall(r'<path d="([^"]+)" clip-path', svg)
    points = [np.array(re.findall(r"[ML] ([\d.-]+) ([\d.-]+)", p), float) for p in paths]
    (bar,) = (p for p in points if len(p) == 4)
    (whisker,) = (p for p in points if len(p) == 2 and p[0, 0] == p[1, 0])
    height, top = np.ptp(bar[:, 1]), bar[:, 1].min()  # of 1.0; SVG's y grows downwards
    above = sorted((top - whisker[:, 1]) / height)
    assert above == pytest.approx([0.1, 0.2], abs=1e-3)


@pytest.mark.parametrize("name", ["run_$x^$", "_hidden", "50% & <b>"])
def test_every_name_stands_in_the_legend_as_it_is(name: str) -> None:
    line = line_chart({name: ([0, 1], [1, 2]), "b": ([0, 1], [2, 1])}, "x", "y")
    bars = bar_chart(["p"], {name: [1.0], "b": [2.0]}, "x", "y")
    shown = name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert f"{shown}  2" in texts(line) and shown in texts(bars)


def test_the_legend_states_the_last_value_also_where_it_has_no_logarithm() -> None:
    assert "a  0" in texts(line_chart({"a": ([0, 1, 2], [1, 0.5, 0.0])}, "x", "y", log=True))
    ends = [0.5, float("nan")]
    assert "a  0.5" in texts(line_chart({"a": ([0, 1, 2], [1, *ends])}, "x", "y", log=True))


def test_more_than_eight_series_differ() -> None:
    count = 2 * len(SERIES) + 3
    svg = line_chart({f"r{k}": ([0, 1], [k, k + 1]) for k in range(count)}, "x", "y")
    styles = re.findall(r'style="fill: none; ([^"]*stroke: var\(--s\d\)[^"]*)"', svg)
    assert len(set(styles)) == count
    svg = bar_chart(["p"], {f"r{k}": [k + 1.0] for k in range(9)}, "x", "y")
    assert "<pattern" in svg and not re.findall(r"#[0-9a-f]{6}", svg)


def test_a_logarithmic_x_axis_has_no_mathematics() -> None:
    table = [[1.0, -1.0], [0.5, 2.0]]
    for svg in (
        line_chart({"a": ([2, 5], [1, 2])}, "x", "y", log_x=True),
        map_chart([2, 5], [0, 1], table, "x", "y"),
    ):
        assert "$" not in svg and "mathdefault" not in svg
        assert {"3", "4"} <= set(texts(svg))
