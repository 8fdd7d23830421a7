"""Line, bar and map charts of the run's page, drawn by matplotlib as inline SVG; called by page.py.

matplotlib draws with stand-in colours that become the page's own CSS variables afterwards, so one
drawing serves the light and the dark page, and text stays text.
"""

import io
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, wraps
from html import escape
from typing import Any

import numpy as np

from etude.core.log import number

SIZE = (5.6, 3.1)  # inches; the page scales the drawing to its column
MOST_POINTS = 400  # longer series are averaged in bins of equal count before drawing
KEPT = 128  # drawings that a process has at hand: a study's page has this many charts
SMOOTH_FROM = 40  # series with more points get a running mean over the faint raw line
INK, SOFT, RULE = "#010101", "#020202", "#030303"
SERIES = [f"#0400{place:02x}" for place in range(1, 9)]
# Of every eight series, which have the colours of the first eight.
LINES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
HATCHES = (None, "//", "xx", "..", "--")
VARIABLES = {INK: "--ink", SOFT: "--soft", RULE: "--rule"}
VARIABLES |= {colour: f"--s{place}" for place, colour in enumerate(SERIES, start=1)}
STYLE = {
    "svg.fonttype": "none",  # text as text
    "svg.hashsalt": "etude",  # the same drawing gives the same bytes
    "text.parse_math": False,  # names of series are names
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


def _drawn_once(draw: Callable[..., str]) -> Callable[..., str]:
    """A page is written again and again while few of its charts change; the others are at hand."""

    @lru_cache(KEPT)
    def drawn(pickled: bytes) -> str:
        values, named = pickle.loads(pickled)
        return draw(*values, **named)

    @wraps(draw)
    def chart(*values: Any, **named: Any) -> str:
        return drawn(pickle.dumps((values, named)))

    return chart


@_drawn_once
def line_chart(
    series: dict[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    log: bool = False,
    id: str = "chart",
    *,
    log_x: bool = False,
) -> str:
    """Lines as SVG; a line of text when there is nothing to draw yet.

    Args:
        series: name -> (x, y) of equal length; points that are not finite are left out, and those
            not above zero too when `log`. The legend states each line's last value, drawn or not.
        log, log_x: logarithmic y axis, x axis.
        id: tells the drawing's parts apart from those of other charts on the page.
    """
    drawn = {name: drawable(x, y, log) for name, (x, y) in series.items()}
    drawn = {name: points for name, points in drawn.items() if len(points[0])}
    if not drawn:
        return '<p class="empty">no values yet</p>'
    scales = {"yscale": "log" if log else "linear", "xscale": "log" if log_x else "linear"}
    with _axes(xlabel, ylabel, **scales) as axes:
        axes.xaxis.set_major_formatter(lambda value, _: number(value))
        for place, (name, (x, y)) in enumerate(drawn.items()):
            look = {"color": SERIES[place % len(SERIES)]}
            look["linestyle"] = LINES[place // len(SERIES) % len(LINES)]
            if len(x) >= SMOOTH_FROM:
                axes.plot(x, y, alpha=0.25, linewidth=1, **look)
                y = running_mean(y)
            marker = "o" if len(x) == 1 else None
            last = drawable(*series[name], False)[1][-1]
            # Not drawn, but the last that there is: a loss of zero has no logarithm.
            last = last if log and last <= 0.0 else y[-1]
            axes.plot(x, y, marker=marker, label=_label(f"{name}  {number(last)}"), **look)
        low, high = axes.get_ylim()
        if log and high < 10 * low:  # within a decade the powers of ten alone say too little
            axes.yaxis.set_minor_formatter(lambda value, _: number(value))
        axes.legend()
        return _svg(axes.figure, f"{ylabel} over {xlabel}", id)


@_drawn_once
def bar_chart(
    labels: Sequence[str],
    series: dict[str, Sequence[float]],
    xlabel: str,
    ylabel: str,
    intervals: dict[str, Sequence[tuple[float, float]]] | None = None,
    id: str = "chart",
) -> str:
    """Groups of bars from zero as SVG.

    Args:
        labels: one per group.
        series: name -> one value per label; a value that is not finite leaves its place empty.
        intervals: name -> (low, high) per label, drawn as whiskers.
        id: as in `line_chart`.
    """
    for name, values in series.items():
        if len(values) != len(labels):
            raise ValueError(f"bars of '{name}': {len(values)} values for {len(labels)} labels")
    with _axes(xlabel, ylabel) as axes:
        middles, width = np.arange(len(labels)), 0.8 / max(len(series), 1)
        for place, (name, values) in enumerate(series.items()):
            at = middles + (place - (len(series) - 1) / 2) * width
            heights = np.asarray(values, np.float64)
            look = {"color": SERIES[place % len(SERIES)], "edgecolor": INK, "linewidth": 0}
            look["hatch"] = HATCHES[place // len(SERIES) % len(HATCHES)]
            axes.bar(at, heights, width * 0.92, label=_label(name), **look)
            if intervals and name in intervals:
                low, high = np.asarray(intervals[name], np.float64).T
                # Around its own middle: an interval need not hold the value.
                half = (high - low) / 2
                axes.errorbar(at, low + half, half, fmt="none", ecolor=INK, capsize=2)
        axes.set_xticks(middles, labels)
        axes.legend()
        return _svg(axes.figure, f"{ylabel} by {xlabel}", id)


@_drawn_once
def map_chart(
    x: Sequence[float],
    y: Sequence[float],
    values: Sequence[Sequence[float]],
    xlabel: str,
    ylabel: str,
    id: str = "chart",
) -> str:
    """Values (len(y), len(x)) as a map in SVG, blue above zero, red below, with the line of zero.

    Args:
        x: above zero, on a logarithmic axis.
        id: as in `line_chart`.
    """
    table = np.asarray(values, np.float64)
    if table.shape != (len(y), len(x)):
        raise ValueError(f"a map of {len(x)} by {len(y)} places has {table.shape} values")
    most = float(np.abs(table).max()) or 1.0
    with _axes(xlabel, ylabel, xscale="log") as axes:
        axes.grid(False)
        levels = np.linspace(-most, most, 17)
        drawn = axes.contourf(x, y, table, levels=levels, cmap="RdBu", alpha=0.85)
        if table.min() < 0.0 < table.max():
            axes.contour(x, y, table, levels=[0.0], colors=[INK], linewidths=1.5)
        axes.xaxis.set_major_formatter(lambda value, _: number(value))
        axes.figure.colorbar(drawn, ax=axes, format=lambda value, _: number(value))
        return _svg(axes.figure, f"{ylabel} and {xlabel}", id)


def drawable(x: Sequence[float], y: Sequence[float], log: bool) -> tuple[np.ndarray, np.ndarray]:
    """The points that can be drawn, averaged in equal bins where there are very many."""
    if len(x) != len(y):
        raise ValueError(f"a curve has {len(x)} x values and {len(y)} y values")
    ax, ay = np.asarray(x, np.float64), np.asarray(y, np.float64)
    keep = np.isfinite(ax) & np.isfinite(ay) & ((ay > 0) | (not log))
    ax, ay = ax[keep], ay[keep]
    if len(ax) <= MOST_POINTS:
        return ax, ay
    bins = np.array_split(np.arange(len(ax)), MOST_POINTS)
    return np.array([ax[b].mean() for b in bins]), np.array([ay[b].mean() for b in bins])


def running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a 25th of the points on either side of each."""
    half = max(1, len(values) // 25)
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[last] - total[first]) / (last - first)


def _label(name: str) -> str:
    """A name as a legend takes it: matplotlib keeps those that begin with "_" out."""
    return f" {name}" if name.startswith("_") else name


@contextmanager
def _axes(xlabel: str, ylabel: str, **options: Any) -> Iterator[Any]:
    """Empty axes in the page's style, which holds inside the context."""
    from matplotlib import rc_context  # half a second that only pages need
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel, **options)
        axes.yaxis.set_major_formatter(lambda value, _: number(value))
        axes.yaxis.set_minor_formatter("")
        if options.get("xscale") == "log":
            axes.xaxis.set_minor_formatter(_plain_minor())
        yield axes


def _plain_minor() -> Any:
    """Labels between powers of ten where there are few of these, not written as mathematics."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, value: float, place: int | None = None) -> str:
            return number(value) if super().__call__(value, place) else ""

    return Plain(labelOnlyBase=False)


def _svg(figure: Any, title: str, id: str) -> str:
    """The drawing without XML header, metadata and fixed size, in the page's colours."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", f"<title>{escape(title)}</title>", text, flags=re.S)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.S)
    # HTML needs no namespaces, and the page asks nobody for anything.
    text = re.sub(r' xmlns(:xlink)?="[^"]+"', "", text).replace("xlink:href", "href")
    text = re.sub(r'<svg ([^>]*?)width="[^"]+"', r"<svg \1", text[text.index("<svg") :])
    text = re.sub(r'<svg ([^>]*?)height="[^"]+"', r"<svg \1", text)
    text = re.sub(r'(id="|href="#|url\(#)', rf"\1{id}-", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text
