"""Drawings of the exercise trade-offs: figures against each other; called by trade_offs.py."""

from itertools import combinations
from typing import Any

import numpy as np

from etude.core.errors import UserError
from etude.core.log import number

from ..results import Row
from . import Plot, drawing
from .fronts import Cloud
from .joint import interval_of
from .names import Subject, joined, subject


def _along(cloud: Cloud, wanted: str) -> str:
    """What varies within a model, or what the option asks for."""
    varying = []
    for name in ("guidance", "images_seen"):
        of_model: dict[str, set] = {}
        for one, value in zip(cloud.subjects, _values(cloud, name), strict=True):
            of_model.setdefault(one.model, set()).add(value)
        if any(len(values - {None}) > 1 for values in of_model.values()):
            varying.append(name)
    if wanted == "auto":
        return varying[0] if varying else "model"
    if wanted != "model" and wanted not in varying:
        raise UserError(
            f"trade-offs: {wanted} does not vary within a model on {cloud.data_set}; leave `along` "
            f"out or set along={(varying or ['model'])[0]}"
        )
    return wanted


def _values(cloud: Cloud, along: str) -> list:
    """What the colours tell, of every point; None where nobody knows."""
    return [
        one.guidance if along == "guidance" else row.images_seen if along != "model" else None
        for one, row in zip(cloud.subjects, cloud.rows[0], strict=True)
    ]


def _lines(cloud: Cloud, along: str, swept: list) -> list[list[int]]:
    """Points that differ in what is swept alone, in its order; none where nothing is swept."""
    found: dict[tuple, list[int]] = {}
    for place, (one, value) in enumerate(zip(cloud.subjects, swept, strict=True)):
        if value is not None:
            fixed = one.checkpoint if along == "guidance" else one.guidance
            found.setdefault((one.model, fixed, one.training_seed, one.seed), []).append(place)
    return [sorted(places, key=lambda k: swept[k]) for places in found.values()]


def _labels(cloud: Cloud, looks: list[dict], swept: list) -> tuple[list[str], str]:
    """A text at each point, and a note on them; numbers where markers and colours repeat."""
    shown = ["" if value is None else number(value) for value in swept]
    told = [(*map(str, look.values()), text) for look, text in zip(looks, shown, strict=True)]
    if len(set(told)) == len(told):
        return shown, ""
    numbers = [str(k) for k in range(1, len(told) + 1)]
    listed = "; ".join(f"{k} {name}" for k, name in zip(numbers, cloud.names, strict=True))
    return numbers, f"Points: {listed}."


def plot(
    cloud: Cloud,
    fronts: list[dict[str, Any]],
    selected: list[Row],
    wanted: str,
    level: float,
    id: str,
    alt: str,
) -> Plot:
    """A panel a pair of figures.

    Args:
        wanted: the option `along`.
        id, alt: the drawing's name, and what it shows in words.
    """
    along = _along(cloud, wanted)
    models = list(dict.fromkeys(one.model for one in cloud.subjects))
    swept = _values(cloud, along)
    shades = drawing.ramp([v for v in swept if v is not None])
    looks = []
    for one, value in zip(cloud.subjects, swept, strict=True):
        look = drawing.series_look(models.index(one.model))
        looks.append(look | ({"color": shades.get(value, drawing.SOFT)} if shades else {}))
    labels, listed = _labels(cloud, looks, swept)
    lines = _lines(cloud, along, swept)
    pairs = list(combinations(range(len(cloud.figures)), 2))
    title = f"{cloud.data_set}: {joined(figure.name for figure in cloud.figures)}"
    size = 3.6 if len(pairs) > 1 else 4.6
    with drawing.panels(len(pairs), width=size, height=size * 0.95) as (figure, axes):
        for panel, pair, front in zip(axes[0], pairs, fronts, strict=False):
            _panel(panel, cloud, pair, front, looks, lines, level)
            _selected_points(panel, cloud, pair, selected)
            x, y, on = *(cloud.joints[m].values for m in pair), np.array(front["on_front"])
            signs = tuple(cloud.figures[m].sign for m in pair)
            drawing.front_line(panel, x[on], y[on], signs)
            _name_points(panel, x, y, labels)
        _legend(figure, models, along, shades)
        svg = drawing.finish(figure, id, title, alt)
    note = "Filled: on the front by its values. Dashed: the front. "
    if cloud.known:
        note += f"Bars: {level:.0%} of each figure; shaded: of both at once. "
    if listed or shades:
        note += f"{listed or 'Numbers: ' + along.replace('_', ' ') + '.'} "
    if selected:
        note += "Crosses: figures whose pictures chose the model, in no front."
    return Plot(title, svg, alt, note.strip())


def _panel(
    axes: Any,
    cloud: Cloud,
    pair: tuple[int, int],
    front: dict,
    looks: list[dict],
    lines: list[list[int]],
    level: float,
) -> None:
    (xs, ys), both = (cloud.joints[m] for m in pair), [cloud.rows[m] for m in pair]
    for some in lines:
        axes.plot(xs.values[some], ys.values[some], color=drawing.RULE, linewidth=1, zorder=1)
    for s, look in enumerate(looks):
        x, y = xs.values[s], ys.values[s]
        across = interval_of(both[0][s], xs.draws[s], level, xs.limits[s])
        upright = interval_of(both[1][s], ys.draws[s], level, ys.limits[s])
        if across:
            axes.plot(across, [y, y], color=look["color"], linewidth=1, zorder=2)
        if upright:
            axes.plot([x, x], upright, color=look["color"], linewidth=1, zorder=2)
        if across and upright:
            covariance = np.cov(np.stack([xs.draws[s], ys.draws[s]]))
            drawing.ellipse(axes, np.array([x, y]), covariance, level, look["color"])
        face = look["color"] if front["on_front"][s] else drawing.CARD
        axes.plot(x, y, linestyle="none", markerfacecolor=face, zorder=3, **look)
    axes.margins(0.1)
    drawing.label_axes(axes, *(cloud.figures[m].label for m in pair))


def _selected_points(axes: Any, cloud: Cloud, pair: tuple[int, int], rows: list[Row]) -> None:
    """Crosses for the models that were chosen by these very pictures."""
    found: list[dict[Subject, float]] = [
        {
            subject(row): row.value
            for row in rows
            if cloud.figures[m].has(row) and row.data_set == cloud.data_set
        }
        for m in pair
    ]
    for one in found[0]:
        if one in found[1]:
            axes.plot(found[0][one], found[1][one], "x", color=drawing.INK, markersize=7)


def _name_points(axes: Any, x: np.ndarray, y: np.ndarray, names: list[str]) -> None:
    for place, name in enumerate(names):
        axes.annotate(name, (x[place], y[place]), (4, 4), textcoords="offset points", fontsize=7)


def _legend(figure: Any, models: list[str], along: str, shades: dict[float, str]) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for place, label in enumerate(drawing.shortened(models)):
        look = drawing.series_look(place) | ({"color": drawing.INK} if shades else {})
        handles.append(Line2D([], [], linestyle="none", label=label, **look))
    ordered = sorted(shades)
    shown = sorted({round(k) for k in np.linspace(0, len(ordered) - 1, 7)}) if ordered else []
    for place in shown:
        value = ordered[place]
        label = f"{along.replace('_', ' ')} {number(value)}"
        handles.append(Line2D([], [], linewidth=5, color=shades[value], label=label))
    side_by_side = drawing.legend_columns(figure, [handle.get_label() for handle in handles])
    figure.legend(handles=handles, loc="outside lower center", ncols=side_by_side)
