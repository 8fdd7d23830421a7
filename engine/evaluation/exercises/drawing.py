"""The drawings of the exercises as SVG text, by matplotlib; called by the exercises.

A drawing carries its own colours for light and dark, which are those of the run's page, so it
serves as a file and inside a page. Nothing is told by colour alone: every series has a marker and a
line of its own, and a filled marker means something else than a hollow one.
"""

import io
import math
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

import numpy as np

from etude.core.log import number

# Stand-ins while matplotlib draws; they become the CSS variables below.
INK, SOFT, RULE, CARD = "#010101", "#020202", "#030303", "#050505"
SERIES = [f"#0400{place:02x}" for place in range(1, 9)]
RAMP = [f"#0600{place:02x}" for place in range(1, 8)]  # ordered values, first to last
HEAT = [f"#0700{place:02x}" for place in range(1, 8)]  # behind text, best to worst
PIXELS_PER_INCH = 100  # of the largest size that a page shows a drawing at
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (7, 2)), (0, (1, 2)), (0, (4, 1)))

PALETTE = {  # variable: (light, dark); the first twelve are those of page_style.py
    "card": ("#fff", "#1f1d1a"),
    "ink": ("#1d1b18", "#ece7dd"),
    "soft": ("#6f6a61", "#a39c8f"),
    "rule": ("#e4dfd5", "#37332d"),
    "s1": ("#2f6db3", "#7fb2ec"),
    "s2": ("#d9772b", "#f0a35f"),
    "s3": ("#3c8c6a", "#6cc49d"),
    "s4": ("#8a56a8", "#c19ade"),
    "s5": ("#b0374e", "#ec8296"),
    "s6": ("#6b7a2a", "#b3c46a"),
    "s7": ("#2a8c9e", "#6fcbd9"),
    "s8": ("#8c6d46", "#cdae86"),
    # One hue would merge neighbours, so the ramp turns from gold to violet as it gets stronger.
    "r1": ("#b88a14", "#4a6fd0"),
    "r2": ("#b8762c", "#6d86dc"),
    "r3": ("#b05a44", "#9699dd"),
    "r4": ("#9c4560", "#bdaad2"),
    "r5": ("#833c77", "#d9b9b6"),
    "r6": ("#5b347f", "#ebc98d"),
    "r7": ("#2f2b78", "#f7dd62"),
    "h1": ("#8fc1ea", "#1f5d94"),
    "h2": ("#a9cfee", "#24537e"),
    "h3": ("#c3ddf2", "#294969"),
    "h4": ("#ddebf6", "#2d3f54"),
    "h5": ("#f1ece1", "#37352f"),
    "h6": ("#f3dcc0", "#513f2c"),
    "h7": ("#f2c798", "#6e4a26"),
}
_STANDS_FOR = {INK: "ink", SOFT: "soft", RULE: "rule", CARD: "card"}
_STANDS_FOR |= {colour: f"s{place}" for place, colour in enumerate(SERIES, start=1)}
_STANDS_FOR |= {colour: f"r{place}" for place, colour in enumerate(RAMP, start=1)}
_STANDS_FOR |= {colour: f"h{place}" for place, colour in enumerate(HEAT, start=1)}
_STYLE = {
    "svg.fonttype": "none",  # text as text
    "svg.hashsalt": "etude",  # the same drawing gives the same bytes
    "text.parse_math": False,  # names of models are names
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": RULE,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.4,
    "lines.markersize": 5.5,
}


@contextmanager
def panels(
    columns: int, rows: int = 1, *, width: float = 3.4, height: float = 3.2, **options: Any
) -> Iterator[tuple[Any, np.ndarray]]:
    """A figure with axes (rows, columns); the style holds inside the context.

    Args:
        width, height: of one panel in inches; the page scales the whole to its column.
        options: of matplotlib's `subplots`.
    """
    from matplotlib import rc_context  # half a second that only drawings need
    from matplotlib.figure import Figure

    with rc_context(_STYLE), warnings.catch_warnings():
        # Text is written as text: what shows the drawing has other fonts than this one.
        warnings.filterwarnings("ignore", r"Glyph .* missing from font")
        figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
        yield figure, figure.subplots(rows, columns, squeeze=False, **options)


def finish(figure: Any, id: str, title: str, alt: str) -> str:
    """The figure as SVG text without metadata, network addresses but its namespace, or size.

    Args:
        id: lower-case words joined by hyphens; tells its parts apart from those of other drawings.
        alt: what it shows, for those who cannot see it.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.S)
    text = re.sub(r' xmlns(:xlink)?="[^"]+"', "", text).replace("xlink:href", "href")
    head, body = text[text.index("<svg") :].split(">", 1)
    box = re.search(r'viewBox="[^"]+"', head).group()
    widest = f"max-width:{round(figure.get_figwidth() * PIXELS_PER_INCH)}px"
    body = re.sub(r'(id="|href="#|url\(#)', rf"\1{id}-", body)
    for colour, variable in _STANDS_FOR.items():
        body = body.replace(colour, f"var(--{variable})")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {box} style="{widest}" class="exercise" '
        f'role="img" aria-labelledby="{id}-title {id}-text">'
        f'<title id="{id}-title">{escape(title)}</title>'
        f'<desc id="{id}-text">{escape(alt)}</desc><style>{_colours()}</style>{body}'
    )


def legend_columns(figure: Any, names: Sequence[str]) -> int:
    """How many of these names stand side by side below a figure, at most four."""
    longest = max((len(name) for name in shortened(names)), default=0)
    columns = int(figure.get_figwidth() // (0.6 + 0.07 * longest))  # inches, at the legend's size
    return min(max(columns, 1), 4)


def series_look(place: int) -> dict[str, Any]:
    """Colour and marker of a series by its number; 64 numbers give different pairs."""
    return {
        "color": SERIES[place % len(SERIES)],
        "marker": MARKERS[(place + place // len(SERIES)) % len(MARKERS)],
    }


def ramp(values: Sequence[float]) -> dict[float, str]:
    """A colour for each value, in order."""
    ordered = sorted(set(values))
    last = max(len(ordered) - 1, 1)
    return {value: RAMP[round(6 * place / last)] for place, value in enumerate(ordered)}


def label_axes(axes: Any, xlabel: str = "", ylabel: str = "") -> None:
    """Axis labels, plain numbers on the ticks and a grid."""
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_formatter(ticks())
    axes.yaxis.set_major_formatter(ticks())
    axes.grid(True)


def ticks() -> Any:
    """A formatter of plain numbers with the digits that tell an axis's ticks apart."""
    from matplotlib.ticker import FuncFormatter

    class Ticks(FuncFormatter):
        def format_ticks(self, values: Sequence[float]) -> list[str]:
            return tick_texts(values)

    return Ticks(lambda value, _: number(round(value, 10)))


def tick_texts(values: Sequence[float]) -> list[str]:
    """Numbers at even steps as text, all with as many decimals as their step needs."""
    steps = np.diff(np.unique(values))
    largest = max(map(abs, values), default=0.0)
    if not len(steps) or largest < 1e-3:
        return [number(value) for value in values]
    unit, letter = (1e6, "M") if largest >= 1e6 else (1.0, "")
    shown, step = [value / unit for value in values], float(steps.min()) / unit
    decimals = next(
        (d for d in range(12) if all(abs(v - round(v, d)) <= 1e-3 * step for v in shown)), 12
    )
    return [f"{round(v, decimals) + 0.0:,.{decimals}f}{letter}" for v in shown]


def ellipse(
    axes: Any, centre: np.ndarray, covariance: np.ndarray, level: float, color: str
) -> None:
    """The region that holds a Gaussian point with probability `level`, as a thin outline."""
    from matplotlib.patches import Ellipse

    sizes, directions = np.linalg.eigh(covariance)
    reach = 2 * np.sqrt(np.maximum(sizes, 0.0) * -2 * math.log(1 - level))
    angle = math.degrees(math.atan2(directions[1, 1], directions[0, 1]))
    drawn = Ellipse(tuple(centre), reach[1], reach[0], angle=angle, facecolor=color, alpha=0.18)
    axes.add_patch(drawn)
    outline = Ellipse(tuple(centre), reach[1], reach[0], angle=angle, fill=False, edgecolor=color)
    outline.set_linewidth(0.8)
    axes.add_patch(outline)


def front_line(axes: Any, x: np.ndarray, y: np.ndarray, signs: tuple[float, float]) -> None:
    """The border of what the front's points (F,) dominate, as steps to the ends of the axes.

    Args:
        signs: 1 where larger is better, -1 where smaller is, along x and along y.
    """
    order = np.argsort(x)
    x, y = x[order], y[order]
    x_ends, y_ends = axes.get_xlim(), axes.get_ylim()
    # What lies on the worse side of a point in both directions is dominated by it.
    worst_x = x_ends[0] if signs[0] > 0 else x_ends[1]
    worst_y = y_ends[0] if signs[1] > 0 else y_ends[1]
    if signs[0] < 0:
        x, y = x[::-1], y[::-1]  # from the worst to the best along x
    xs, ys = [worst_x], [y[0]]
    for place in range(len(x)):
        xs.append(x[place])
        ys.append(y[place])
        xs.append(x[place])
        ys.append(y[place + 1] if place + 1 < len(x) else worst_y)
    axes.plot(xs, ys, color=SOFT, linestyle="--", linewidth=1.1, zorder=1.5)
    axes.set_xlim(x_ends)
    axes.set_ylim(y_ends)


def strip(
    axes: Any,
    names: Sequence[str],
    series: Sequence[tuple[str, Sequence[float], Sequence[tuple[float, float] | None]]],
) -> list[Any]:
    """Values with their intervals along x, one line a name from the top, one marker a series.

    Args:
        series: (name, a value per line or NaN, an interval or None per line).

    Returns:
        A handle per series, for a legend.
    """
    step, handles = min(0.8 / len(series), 0.2), []
    labels = shortened([name for name, *_ in series])
    for place, (_, values, intervals) in enumerate(series):
        look = series_look(place)
        heights = np.arange(len(names)) + (place - (len(series) - 1) / 2) * step
        for interval, height in zip(intervals, heights, strict=True):
            if interval is not None:
                axes.plot(interval, [height, height], color=look["color"], linewidth=1.6, zorder=2)
        drawn = axes.plot(values, heights, linestyle="none", label=labels[place], zorder=3, **look)
        handles.append(drawn[0])
    name_rows(axes, names)
    return handles


def name_rows(axes: Any, names: Sequence[str], width: int = 0) -> None:
    """Names along y, the first on top.

    Args:
        width: characters of a line, over which names are wrapped; 0: one line each.
    """
    texts = shortened(names)
    axes.set_yticks(range(len(names)), [wrapped(t, width) if width else t for t in texts])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")


def wrapped(name: str, width: int) -> str:
    """A name over lines of so many characters."""
    return "\n".join(textwrap.wrap(name, width)) or name


def shortened(names: Iterable[str], most: int = 56) -> list[str]:
    """Names that fit beside a panel; different ones stay different.

    Long ones are cut in the middle, or where else none is cut to the text of another.
    """
    names = list(names)
    different, kept = list(dict.fromkeys(names)), most - 3
    heads = sorted(range(kept + 1), key=lambda head: abs(head - kept // 2))
    for head in heads:
        texts = [_cut(name, head, kept - head) for name in different]
        if len(set(texts)) == len(texts):
            break
    else:  # they differ by more than fits
        texts = [_cut(name, kept // 2, kept - kept // 2) for name in different]
        texts = [f"{text} ({place})" for place, text in enumerate(texts, start=1)]
    found = dict(zip(different, texts, strict=True))
    # matplotlib keeps labels that begin with "_" out of legends
    return [f" {found[name]}" if name.startswith("_") else found[name] for name in names]


def _cut(name: str, head: int, tail: int) -> str:
    if len(name) <= head + tail + 3:
        return name
    return f"{name[:head]}...{name[len(name) - tail :]}"


def _colours() -> str:
    light, dark = (
        "".join(f"--{name}:{pair[side]};" for name, pair in PALETTE.items()) for side in (0, 1)
    )
    return (
        f"svg.exercise{{{light}color-scheme:light dark;background:var(--card)}}"
        f"@media(prefers-color-scheme:dark){{svg.exercise{{{dark}}}}}"
    )
