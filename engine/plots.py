"""Line and bar charts as inline SVG for the run's page: no plotting library, no script, no font.

Called by page.py each time the page is rewritten, while training uses the same cores: a chart takes
about a millisecond. Colours are CSS classes of the page, so one drawing serves light and dark, and
the numbers stay text that can be selected and read aloud. Hovering a mark shows its value.
"""

import math
from collections.abc import Sequence
from html import escape

import numpy as np

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 14, 46
MOST_POINTS = 400  # longer series are averaged in bins of equal count before drawing
SMOOTH_FROM = 40  # series with more points get a running mean over the faint raw line


def number(value: float) -> str:
    """A short human number: 0.0123, 1.2e-05, 12,000, 1.2M."""
    if not math.isfinite(value):
        return "-"
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e3:
        return f"{value:,.0f}"
    if value == 0 or size >= 1e-3:
        return f"{value:.4g}"
    return f"{value:.1e}"


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten) inside [low, high]."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten inside [low, high], with 2 and 5 between them when few decades are shown."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    marks = (1, 2, 5) if last - first <= 3 else (1,)
    ticks = [m * 10.0**k for k in range(first, last + 1) for m in marks]
    return [t for t in ticks if low * 0.999 <= t <= high * 1.001]


class Axis:
    """Maps values to pixels, linear or logarithmic."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool) -> None:
        self.log, self.low, self.high, self.start, self.end = log, low, high, start, end

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        part = (value - low) / (high - low) if high > low else 0.5
        return self.start + part * (self.end - self.start)

    def ticks(self) -> list[float]:
        return log_ticks(self.low, self.high) if self.log else linear_ticks(self.low, self.high)


def line_chart(
    series: dict[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    log: bool = False,
) -> str:
    """An SVG line chart.

    Args:
        series: name -> (x, y) of equal length; points that are not finite are left out, and those
            not above zero too when `log`. At most eight series have a colour of their own.
        log: logarithmic y axis.

    Returns:
        `<svg>...</svg>`, or a line of text when there is nothing to draw yet.
    """
    drawn = {name: _finite(x, y, log) for name, (x, y) in series.items()}
    drawn = {name: points for name, points in drawn.items() if len(points[0])}
    if not drawn:
        return '<p class="empty">no values yet</p>'
    every_x = np.concatenate([x for x, _ in drawn.values()])
    low, high = _range(np.concatenate([y for _, y in drawn.values()]), log)
    across = Axis(float(every_x.min()), float(every_x.max()), LEFT, WIDTH - RIGHT, False)
    up = Axis(low, high, HEIGHT - BOTTOM, TOP, log)
    parts = [_frame(up, xlabel, ylabel), _x_ticks(across)]
    for place, (name, (x, y)) in enumerate(drawn.items()):
        parts.append(_line(name, x, y, across, up, place % 8 + 1))
    return _svg("".join(parts), f"{ylabel} over {xlabel}") + _legend(drawn)


def bar_chart(
    labels: Sequence[str],
    series: dict[str, Sequence[float]],
    xlabel: str,
    ylabel: str,
    intervals: dict[str, Sequence[tuple[float, float]]] | None = None,
) -> str:
    """An SVG chart of grouped bars from zero.

    Args:
        labels: one per group.
        series: name -> one value per label; a value that is not finite leaves its place empty.
        intervals: name -> (low, high) per label, drawn as whiskers.
    """
    for name, values in series.items():
        if len(values) != len(labels):
            raise ValueError(f"bars of '{name}': {len(values)} values for {len(labels)} labels")
    intervals = intervals or {}
    ends = [v for values in series.values() for v in values]
    ends += [v for pairs in intervals.values() for pair in pairs for v in pair]
    ends = [float(v) for v in ends if math.isfinite(v)]
    if not ends:
        return '<p class="empty">no values yet</p>'
    low, high = min(0.0, min(ends)), max(0.0, max(ends))
    up = Axis(low, high + 0.06 * (high - low or 1.0), HEIGHT - BOTTOM, TOP, False)
    parts = [_frame(up, xlabel, ylabel)]
    slot = (WIDTH - LEFT - RIGHT) / len(labels)
    width = slot * 0.76 / len(series)
    for group, label in enumerate(labels):
        middle = LEFT + slot * (group + 0.5)
        parts.append(_text(middle, HEIGHT - BOTTOM + 16, label, "tick", "middle"))
        for place, (name, values) in enumerate(series.items()):
            left = middle - slot * 0.38 + place * width
            pair = intervals[name][group] if name in intervals else None
            parts.append(_bar(left, width, float(values[group]), pair, up, place + 1, name, label))
    legend = _legend({name: ((), values) for name, values in series.items()}, last=False)
    return _svg("".join(parts), f"{ylabel} by {xlabel}") + legend


def _finite(x: Sequence[float], y: Sequence[float], log: bool) -> tuple[np.ndarray, np.ndarray]:
    if len(x) != len(y):
        raise ValueError(f"a curve has {len(x)} x values and {len(y)} y values")
    ax, ay = np.asarray(x, np.float64), np.asarray(y, np.float64)
    keep = np.isfinite(ax) & np.isfinite(ay) & ((ay > 0) | (not log))
    ax, ay = ax[keep], ay[keep]
    if len(ax) <= MOST_POINTS:
        return ax, ay
    bins = np.array_split(np.arange(len(ax)), MOST_POINTS)
    return np.array([ax[b].mean() for b in bins]), np.array([ay[b].mean() for b in bins])


def _range(values: np.ndarray, log: bool) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    if log:
        return low / 1.1, high * 1.1
    room = 0.05 * (high - low) or abs(high) * 0.1 or 1.0
    # A loss is read against zero: the axis starts there unless that would flatten the curve.
    return (0.0 if 0 <= low < 0.6 * high else low - room), high + room


def _smooth(values: np.ndarray) -> np.ndarray:
    half = max(1, len(values) // 25)
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[last] - total[first]) / (last - first)


def _line(name: str, x: np.ndarray, y: np.ndarray, across: Axis, up: Axis, colour: int) -> str:
    def path(values: np.ndarray, extra: str = "") -> str:
        points = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in zip(x, values, strict=True))
        return f'<polyline class="line s{colour}{extra}" points="{points}"/>'

    head = f"<title>{escape(name)}: {number(y[-1])} at {number(x[-1])}</title>"
    dot = f'<circle class="dot s{colour}" cx="{across(x[-1]):.1f}" cy="%.1f" r="3.5"/>'
    if len(x) < SMOOTH_FROM:
        return f"<g>{head}{path(y)}{dot % up(y[-1])}</g>"
    mean = _smooth(y)
    return f"<g>{head}{path(y, ' faint')}{path(mean)}{dot % up(mean[-1])}</g>"


def _bar(
    left: float,
    width: float,
    value: float,
    interval: tuple[float, float] | None,
    up: Axis,
    colour: int,
    name: str,
    label: str,
) -> str:
    if not math.isfinite(value):
        return ""
    top, base = sorted((up(value), up(0.0)))
    shown = f"{name}, {label}: {number(value)}"
    whisker = ""
    if interval and all(math.isfinite(v) for v in interval):
        middle, low, high = left + width / 2, up(interval[0]), up(interval[1])
        whisker = f'<line class="whisker" x1="{middle:.1f}" x2="{middle:.1f}" '
        whisker += f'y1="{low:.1f}" y2="{high:.1f}"/>'
        shown += f" [{number(interval[0])}, {number(interval[1])}]"
    kind = f"bar s{(colour - 1) % 8 + 1}"
    return (
        f'<g><title>{escape(shown)}</title><rect class="{kind}" x="{left:.1f}" '
        f'y="{top:.1f}" width="{max(width - 1.5, 1):.1f}" height="{base - top:.1f}" rx="1.5"/>'
        f"{whisker}</g>"
    )


def _frame(up: Axis, xlabel: str, ylabel: str) -> str:
    parts = []
    for tick in up.ticks():
        y = up(tick)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" ')
        parts.append(f'y2="{y:.1f}"/>' + _text(LEFT - 8, y + 4, number(tick), "tick", "end"))
    base = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, xlabel, "label", "middle"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    turned = f' transform="rotate(-90 14 {middle:.0f})"'
    parts.append(_text(14, middle, ylabel, "label", "middle", turned))
    return "".join(parts)


def _x_ticks(across: Axis) -> str:
    y = HEIGHT - BOTTOM + 17
    return "".join(_text(across(t), y, number(t), "tick", "middle") for t in across.ticks())


def _text(x: float, y: float, text: str, kind: str, anchor: str, extra: str = "") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {place}{extra}>{escape(text)}</text>'


def _legend(series: dict[str, tuple], last: bool = True) -> str:
    items = []
    for place, (name, (_, values)) in enumerate(series.items()):
        ends = _smooth(values) if len(values) >= SMOOTH_FROM else values
        value = f" <b>{number(ends[-1])}</b>" if last else ""
        key = f'<i class="key s{place % 8 + 1}"></i>'
        items.append(f"<li>{key}{escape(name)}{value}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def _svg(body: str, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{body}</svg>'
    )
