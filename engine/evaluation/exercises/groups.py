"""Groups: figures of the groups of a data set, the worst group, and the gap to the best.

The gap of noisy figures is too large: even equal groups show one. Its interval therefore comes from
intervals of the differences of all pairs of groups that hold at once (Bonferroni): where they hold,
the true gap, the largest of the true differences, lies between the largest lower end and the
largest upper end. Beside it stands the gap that equal groups would show by chance.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from etude.core.config import option
from etude.core.errors import UserError
from etude.core.log import number
from etude.metrics.comparing import holm, level_of_each, tested

from ..results import Results, Row
from . import Choice, Finding, Plot, Table, drawing, exercise
from .joint import Joint, interval_of, joint_draws
from .rows import (
    Chosen,
    Figure,
    choose,
    joined,
    refuse_mixture,
    selected_table,
    subject,
    subject_names,
)

MOST_ON_RADAR, MOST_IN_FOREST = 16, 40


class GroupOptions(Choice):
    """Options of the exercise groups."""

    correction: Literal["holm", "bonferroni"] = option(
        "holm", "of the tests whether groups differ from their mean"
    )
    groups: tuple[str, ...] = option((), "groups by name; none: all")
    unequal_n: bool = option(False, "also compare groups of unequal numbers of pictures")


@dataclass(frozen=True)
class _Model:
    """One figure of one model in every group."""

    name: str
    rows: list[Row]
    joint: Joint
    found: dict[str, Any]


@exercise(
    "groups",
    about="For which groups of pictures is a model worse, and by how much?",
    options=GroupOptions,
)
def run(results: Results, options: GroupOptions) -> Finding:
    """Worst group, gap and differences from the mean of the groups, per figure and model.

    Raises:
        UserError: the table has no groups, or unequal numbers of pictures in them that nobody
            allowed (`unequal_n`).
    """
    chosen = choose(results, options, groups=True)
    sentences, notes, data, plots = [], list(chosen.notes), {}, {}
    rows_of_table, number = [], 0
    for data_set in chosen.data_sets:
        for figure in chosen.figures:
            groups, models = _models(chosen, figure, data_set, options, notes)
            if not models:
                continue
            entry = {model.name: model.found for model in models}
            data.setdefault(data_set, {})[figure.name] = {"groups": groups, "models": entry}
            sentences += [_sentence(data_set, figure, groups, model, options) for model in models]
            rows_of_table += _table_rows(data_set, figure, groups, models, options.level)
            if 3 <= len(groups) <= MOST_ON_RADAR:
                id = f"radar-{number}"
                plots[id] = _radar(data_set, figure, groups, models, options.level, id)
            id = f"forest-{number}"
            plots[id] = _forest(data_set, figure, groups, models, options.level, id)
            number += 1
    if not data:
        raise UserError(
            "no model has a figure in two groups or more; evaluate a data set with groups"
        )
    tables = {"groups": _table(rows_of_table, options)}
    if chosen.selected:
        tables["selected"] = selected_table(chosen)
    title = f"Groups of {joined(data)}"
    return Finding("groups", title, (*sentences, *notes), {"groups": data}, tables, plots)


def _models(
    chosen: Chosen, figure: Figure, data_set: str, options: GroupOptions, notes: list[str]
) -> tuple[list[str], list[_Model]]:
    """The groups, and the models that have the figure in all of them."""
    rows = [row for row in chosen.rows if figure.has(row) and row.data_set == data_set]
    there = list(dict.fromkeys(row.group for row in rows))
    for name in options.groups:
        if name not in there:
            raise UserError(f"{data_set} has no group {name!r}; it has {', '.join(there)}")
    groups = [name for name in there if not options.groups or name in options.groups]
    rows = [row for row in rows if row.group in groups]
    if len(groups) < 2:
        if groups:
            notes.append(f"Left out: {figure.name} on {data_set}, which has one group alone.")
        return groups, []
    for name in groups:
        some = [row for row in rows if row.group == name]
        refuse_mixture(figure, f"{data_set}, {name},", some)
    if not options.unequal_n:
        _refuse_unequal(figure, data_set, rows)
    names = subject_names(rows)
    found = []
    for one, name in names.items():
        own = {row.group: row for row in rows if subject(row) == one}
        missing = [group for group in groups if group not in own]
        if missing:
            notes.append(f"Left out: {name}, without {figure.name} of {joined(missing)}.")
            continue
        ordered = [own[group] for group in groups]
        joint = joint_draws(chosen.results, ordered)
        found.append(_Model(name, ordered, joint, _findings(joint, figure, groups, options)))
    return groups, found


def _refuse_unequal(figure: Figure, data_set: str, rows: list[Row]) -> None:
    try:
        refuse_mixture(figure, data_set, rows, groups=True)
    except UserError as error:
        raise UserError(f"{error}, or allow it with unequal_n=true") from None


def _findings(
    joint: Joint, figure: Figure, groups: list[str], options: GroupOptions
) -> dict[str, Any]:
    """Worst and best group, gap with interval, differences from the mean, as plain values."""
    better = figure.sign * joint.values
    worst, best = int(np.argmin(better)), int(np.argmax(better))
    found: dict[str, Any] = {
        "values": joint.values.tolist(),
        "mean": float(joint.values.mean()),
        "worst": groups[worst],
        "best": groups[best],
        "gap": float(better[best] - better[worst]),
        "gap_low": None,
        "gap_high": None,
        "chance_gap": None,
        "p_equal": None,
        "differences": None,
    }
    if not joint.known.all():
        return found
    found["gap_low"], found["gap_high"] = gap_interval(joint, options.level)
    by_chance = np.ptp(joint.draws - joint.draws.mean(1, keepdims=True), axis=0)
    found["chance_gap"] = float(np.quantile(by_chance, options.level))
    # One more on both sides: a test by draws is never surer than their number, of which half
    # counts, since draws come in pairs of opposite signs with one range.
    count = len(by_chance) // 2
    share = float((by_chance >= found["gap"]).mean())
    found["p_equal"] = (1 + count * share) / (1 + count)
    found["differences"] = _differences(joint, figure, groups, options)
    return found


def gap_interval(joint: Joint, level: float) -> tuple[float, float]:
    """Low and high end for the true difference of the best and the worst of (S,) figures."""
    pairs = list(itertools.combinations(range(len(joint.values)), 2))
    apart = [
        tested(
            abs(float(joint.values[i] - joint.values[j])),
            joint.error({i: 1.0, j: -1.0}),
            level_of_each(level, len(pairs)),
        )
        for i, j in pairs
    ]
    return max(0.0, *(one.low for one in apart)), max(one.high for one in apart)


def _differences(
    joint: Joint, figure: Figure, groups: list[str], options: GroupOptions
) -> list[dict[str, Any]]:
    """Each group less the mean of all, with intervals that hold at once and corrected p values."""
    values, count = joint.values - joint.values.mean(), len(groups)
    apart = [
        tested(
            float(values[place]),
            joint.error({k: float(k == place) - 1.0 / count for k in range(count)}),
            level_of_each(options.level, count),
        )
        for place in range(count)
    ]
    p = [one.p_value for one in apart]
    adjusted = holm(p) if options.correction == "holm" else np.minimum(count * np.array(p), 1.0)
    found = []
    for place, group in enumerate(groups):
        verdict = "not decided"
        if adjusted[place] <= 1 - options.level:
            verdict = "better" if figure.sign * values[place] > 0 else "worse"
        found.append(
            {
                "group": group,
                "difference": apart[place].value,
                "low": apart[place].low,
                "high": apart[place].high,
                "p": float(adjusted[place]),
                "verdict": verdict,
            }
        )
    return found


def _sentence(
    data_set: str, figure: Figure, groups: list[str], model: _Model, options: GroupOptions
) -> str:
    found = model.found
    values = dict(zip(groups, found["values"], strict=True))
    text = (
        f"{model.name} on {data_set}, {figure.label}: worst in {found['worst']} "
        f"({values[found['worst']]:.4g}), best in {found['best']} ({values[found['best']]:.4g}), "
        f"a gap of {found['gap']:.3g}"
    )
    if found["gap_low"] is None:
        return f"{text}; without intervals this is about the values alone."
    text += f" [{found['gap_low']:.3g}, {found['gap_high']:.3g}]"
    if found["p_equal"] > 1 - options.level:
        return (
            f"{text}, which equal groups can show too (up to {found['chance_gap']:.3g} by chance "
            f"with probability {options.level:g})."
        )
    parts = []
    for verdict in ("worse", "better"):
        some = [d["group"] for d in found["differences"] if d["verdict"] == verdict]
        if some:
            parts.append(f"{verdict} than the mean of the groups: {joined(some)}")
    return f"{text}; {'; '.join(parts) or 'no group alone differs decidedly from their mean'}."


def _table_rows(
    data_set: str, figure: Figure, groups: list[str], models: list[_Model], level: float
) -> list[tuple]:
    rows = []
    for model in models:
        for place, group in enumerate(groups):
            interval = interval_of(model.rows[place], model.joint.draws[place], level)
            apart = (model.found["differences"] or [None] * len(groups))[place]
            keys = ("difference", "low", "high", "p", "verdict")
            rows.append(
                (
                    data_set,
                    figure.name,
                    model.name,
                    group,
                    model.rows[place].n_generated or None,
                    float(model.joint.values[place]),
                    *(interval or (None, None)),
                    *(apart[key] if apart else None for key in keys),
                )
            )
    return rows


def _table(rows: list[tuple], options: GroupOptions) -> Table:
    columns = ("data set", "figure", "model", "group", "pictures", "value", "low", "high")
    columns += ("less the mean", "from", "to", "p", "verdict")
    return Table(
        "Every group",
        columns,
        tuple(rows),
        f"The last columns are the group less the mean of all groups: intervals that hold at once "
        f"for all groups of a model at {options.level:.0%} (Bonferroni), p values corrected after "
        f"{options.correction.capitalize()}.",
    )


def _alt(data_set: str, figure: Figure, groups: list[str], models: list[_Model]) -> str:
    parts = [
        f"{model.name}: "
        + ", ".join(f"{g} {v:.4g}" for g, v in zip(groups, model.joint.values, strict=True))
        for model in models[:4]
    ]
    return f"{figure.label} by group of {data_set}. " + ". ".join(parts) + "."


def _radar(
    data_set: str, figure: Figure, groups: list[str], models: list[_Model], level: float, id: str
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
        for place, model in enumerate(models):
            look = drawing.series_look(place)
            line = {"linestyle": drawing.LINES[place % len(drawing.LINES)]}
            values = np.append(model.joint.values, model.joint.values[0])
            spans = _spans(model, range(len(groups)), level)
            if all(spans):
                ends = np.array([*spans, spans[0]]).T
                panel.fill_between(closed, *ends, color=look["color"], alpha=0.13, linewidth=0)
            panel.plot(closed, values, label=drawing.cut(model.name), **look, **line)
        panel.set_theta_zero_location("N")
        panel.set_theta_direction(-1)
        panel.set_xticks(angles, [drawing.cut(group, 18) for group in groups])
        panel.tick_params(axis="x", labelcolor=drawing.INK, pad=2)
        for angle, text in zip(angles, panel.get_xticklabels(), strict=True):
            side = np.sin(angle)  # zero on top and below, where the text stands centred
            text.set_ha("center" if abs(side) < 0.1 else "left" if side > 0 else "right")
        panel.set_rlim(*_reach(models, level, figure.sign))
        panel.set_rlabel_position(np.degrees(angles[1] / 2))
        panel.yaxis.set_major_locator(_few_ticks())
        panel.yaxis.set_major_formatter(lambda value, _: number(round(value, 10)))
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


def _spans(model: _Model, places: Sequence[int], level: float) -> list:
    return [interval_of(model.rows[g], model.joint.draws[g], level) for g in places]


def _reach(models: list[_Model], level: float, sign: float) -> tuple[float, float]:
    """Centre and rim of the radial axis: what is drawn, with room for the outline at the centre."""
    ends = [value for model in models for value in model.joint.values]
    for model in models:
        ends += [end for span in _spans(model, range(len(model.rows)), level) for end in span or ()]
    low, high = min(ends), max(ends)
    room = (high - low) or 0.1 * abs(high) or 1.0
    centre, rim = (low, high) if sign > 0 else (high, low)
    return centre - sign * 0.35 * room, rim + sign * 0.05 * room


def _forest(
    data_set: str, figure: Figure, groups: list[str], models: list[_Model], level: float, id: str
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
