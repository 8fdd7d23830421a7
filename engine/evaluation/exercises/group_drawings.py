"""Drawings of the exercise groups: a radar and a forest; called by groups.py."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import Plot, drawing
from .gaps import GroupModel
from .joint import interval_of
from .names import Figure

MOST_ON_RADAR, MOST_IN_FOREST = 16, 40  # groups
MOST_MODELS_ON_RADAR = 6  # more outlines hide each other; the forest has all


def radar(
    data_set: str,
    figure: Figure,
    groups: list[str],
    models: list[GroupModel],
    level: float,
    id: str,
) -> Plot:
    """One spoke a group, one outline a model; outside is better."""
    title = f"{figure.name} by group of {data_set}"
    angles = np.linspace(0, 2 * np.pi, len(groups), endpoint=False)
    closed = np.append(angles, angles[0])
    with drawing.panels(1, width=5.6, height=4.8, subplot_kw={"projection": "polar"}) as (
        drawn,
        axes,
    ):
        panel = axes[0, 0]
        labels = drawing.shortened([model.name for model in models])
        for place, (model, label) in enumerate(zip(models, labels, strict=True)):
            look = drawing.series_look(place)
            line = {"linestyle": drawing.LINES[place % len(drawing.LINES)]}
            values = np.append(model.joint.values, model.joint.values[0])
            spans = _spans(model, range(len(groups)), level)
            if all(spans):
                ends = np.array([*spans, spans[0]]).T
                panel.fill_between(closed, *ends, color=look["color"], alpha=0.13, linewidth=0)
            panel.plot(closed, values, label=label, **look, **line)
        panel.set_theta_zero_location("N")
        panel.set_theta_direction(-1)
        panel.set_xticks(angles, [drawing.wrapped(g, 13) for g in drawing.shortened(groups)])
        panel.tick_params(axis="x", labelcolor=drawing.INK, pad=2)
        for angle, text in zip(angles, panel.get_xticklabels(), strict=True):
            side = np.sin(angle)  # zero on top and below, where the text stands centred
            text.set_ha("center" if abs(side) < 0.1 else "left" if side > 0 else "right")
        panel.set_rlim(*_reach(models, level, figure.sign))
        panel.set_rlabel_position(np.degrees(angles[1] / 2))
        panel.yaxis.set_major_locator(_few_ticks())
        panel.yaxis.set_major_formatter(drawing.ticks())
        heading = f"{figure.label}; outside is better"
        side_by_side = drawing.legend_columns(drawn, [model.name for model in models])
        drawn.legend(loc="outside lower center", ncols=side_by_side, title=heading)
        svg = drawing.finish(drawn, id, title, _alt(data_set, figure, groups, models))
    note = "Outside is better. The scale fits the values and does not begin at zero"
    note += f"; shaded: {level:.0%} of each group." if models[0].joint.known.all() else "."
    return Plot(title, svg, _alt(data_set, figure, groups, models), note)


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(4, prune="both")


def _spans(model: GroupModel, places: Sequence[int], level: float) -> list:
    joint = model.joint
    return [interval_of(model.rows[g], joint.draws[g], level, joint.limits[g]) for g in places]


def _reach(models: list[GroupModel], level: float, sign: float) -> tuple[float, float]:
    """Centre and rim of the radial axis: what is drawn, with room for the outline at the centre."""
    ends = [value for model in models for value in model.joint.values]
    for model in models:
        ends += [end for span in _spans(model, range(len(model.rows)), level) for end in span or ()]
    low, high = min(ends), max(ends)
    room = (high - low) or 0.1 * abs(high) or 1.0
    centre, rim = (low, high) if sign > 0 else (high, low)
    return centre - sign * 0.35 * room, rim + sign * 0.05 * room


def forest(
    data_set: str,
    figure: Figure,
    groups: list[str],
    models: list[GroupModel],
    level: float,
    id: str,
) -> Plot:
    """One line a group, one marker a model with its interval, best group on top."""
    title = f"{figure.name} by group of {data_set}, with intervals"
    mean = np.mean([figure.sign * model.joint.values for model in models], axis=0)
    order = np.argsort(-mean, kind="stable")
    note = f"Sorted by the mean of the models, best on top; bars: {level:.0%} of each group."
    if len(order) > MOST_IN_FOREST:
        half = MOST_IN_FOREST // 2
        order = np.concatenate([order[:half], order[-half:]])
        note += f" The {half} best and the {half} worst of {len(groups)} groups."
    height = 0.9 + len(order) * max(0.26, 0.11 * len(models))
    with drawing.panels(1, width=7.2, height=height) as (drawn, axes):
        panel = axes[0, 0]
        drawing.label_axes(panel, figure.label)
        series = [(m.name, m.joint.values[order], _spans(m, order, level)) for m in models]
        handles = drawing.strip(panel, [groups[g] for g in order], series)
        for handle, model in zip(handles, models, strict=True):
            panel.axvline(
                model.found["mean"], color=handle.get_color(), linewidth=0.8, linestyle=":"
            )
        side_by_side = drawing.legend_columns(drawn, [model.name for model in models])
        drawn.legend(loc="outside upper center", ncols=side_by_side)
        alt = _alt(data_set, figure, groups, models)
        svg = drawing.finish(drawn, id, title, alt)
    return Plot(title, svg, alt, f"{note} Dotted: the mean of a model's groups.")


def _alt(data_set: str, figure: Figure, groups: list[str], models: list[GroupModel]) -> str:
    parts = [
        f"{model.name}: "
        + ", ".join(f"{g} {v:.4g}" for g, v in zip(groups, model.joint.values, strict=True))
        for model in models[:4]
    ]
    return f"{figure.label} by group of {data_set}. " + ". ".join(parts) + "."
