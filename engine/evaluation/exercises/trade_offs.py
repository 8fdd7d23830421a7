"""Trade-offs: which models, checkpoints and guidance scales no other beats in two or three figures.

One is on the front when no other dominates it: nowhere worse and somewhere better (Pareto). Since
figures have errors, so has the front: with intervals each point has a probability to be on it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np

from etude.core.config import option
from etude.core.errors import UserError
from etude.core.log import number

from ..results import Results, Row
from . import Choice, Finding, Plot, Table, drawing, exercise
from .joint import (
    Joint,
    decisions,
    dominance,
    front_decided,
    front_probability,
    interval_of,
    joint_draws,
    on_front,
)
from .rows import (
    Chosen,
    Figure,
    Subject,
    choose,
    joined,
    selected_table,
    subject,
    subject_names,
)


class TradeOffOptions(Choice):
    """Options of the exercise trade-offs; `metrics` names two or three figures."""

    along: Literal["auto", "guidance", "images_seen", "model"] = option(
        "auto", "what the colours tell; auto: guidance or images_seen where a model varies in it"
    )


@dataclass(frozen=True)
class _Cloud:
    """The points of one data set: rows[m][s] holds figure m of subject s."""

    data_set: str
    figures: list[Figure]
    subjects: list[Subject]
    names: list[str]
    rows: list[list[Row]]
    joints: list[Joint]

    @property
    def known(self) -> bool:
        """Whether every figure has an error, so that probabilities mean something."""
        return all(joint.known.all() for joint in self.joints)

    def oriented(self, which: Sequence[int]) -> list[Joint]:
        """Some of the figures, larger is better."""
        return [self.joints[m].oriented(self.figures[m].sign) for m in which]


@exercise(
    "trade-offs",
    about="Which models and settings does no other beat in two or three figures at once?",
    options=TradeOffOptions,
)
def run(results: Results, options: TradeOffOptions) -> Finding:
    """Fronts of every pair, and of the triple, of the chosen figures within each data set.

    Raises:
        UserError: not two or three figures, rows of one figure that do not compare, or `along`
            names what does not vary.
    """
    chosen = choose(results, options)
    figures = chosen.figures
    if len(figures) not in (2, 3):
        there = ", ".join(figure.name for figure in figures)
        raise UserError(
            f"trade-offs takes two or three figures and has {len(figures)} ({there}); "
            "name them with metrics=[A, B]"
        )
    sets = [list(pair) for pair in combinations(range(len(figures)), 2)]
    sets += [[0, 1, 2]] if len(figures) == 3 else []
    sentences, notes, data, plots = [], list(chosen.notes), {}, {}
    points, dominated = [], []
    for place, data_set in enumerate(chosen.data_sets):
        cloud = _cloud(chosen, data_set, notes)
        if cloud is None:
            continue
        fronts = [_front(cloud, which, options.level) for which in sets]
        data[data_set] = fronts
        for front in fronts:
            sentences.append(_sentence(cloud, front, options.level))
            dominated += _dominated(cloud, front)
        points += _points(cloud, fronts, options.level)
        plots[f"front-{place}"] = _plot(cloud, fronts, chosen.selected, options, f"front-{place}")
    if not data:
        raise UserError(
            f"no data set has {joined(f.name for f in figures)} of two models or settings; "
            "evaluate them or name other figures with metrics=[A, B]"
        )
    tables = {"points": _point_table(figures, sets, points)}
    if dominated:
        tables["dominance"] = Table(
            "Who dominates whom",
            ("data set", "figures", "this", "dominates", "probability"),
            tuple(dominated),
            "Pairs with a probability of one half at least, or by their values where the table has "
            "no intervals.",
        )
    if chosen.selected:
        tables["selected"] = selected_table(chosen)
    title = f"Trade-offs of {joined(figure.name for figure in figures)}"
    return Finding("trade-offs", title, (*sentences, *notes), {"fronts": data}, tables, plots)


def _cloud(chosen: Chosen, data_set: str, notes: list[str]) -> _Cloud | None:
    """The subjects that have every figure; what is left out goes to the notes."""
    table = [
        {subject(row): row for row in chosen.of(figure, data_set)} for figure in chosen.figures
    ]
    everyone = list(dict.fromkeys(one for rows in table for one in rows))
    names = subject_names(row for rows in table for row in rows.values())
    subjects = [one for one in everyone if all(one in rows for rows in table)]
    for one in everyone:
        if one not in subjects:
            lacking = joined(
                figure.name
                for figure, rows in zip(chosen.figures, table, strict=True)
                if one not in rows
            )
            notes.append(f"Left out: {names[one]} on {data_set}, which has no {lacking}.")
    if len(subjects) < 2:
        notes.append(f"Left out: {data_set}, where fewer than two models have every figure.")
        return None
    rows = [[found[one] for one in subjects] for found in table]
    joint = joint_draws(chosen.results, [row for some in rows for row in some])
    count = len(subjects)
    joints = [joint.at(range(m * count, (m + 1) * count)) for m in range(len(rows))]
    cloud = _Cloud(
        data_set, chosen.figures, subjects, [names[one] for one in subjects], rows, joints
    )
    if not cloud.known:
        notes.append(
            f"{data_set}: some figures have no interval, so statements are about values alone."
        )
    return cloud


def _front(cloud: _Cloud, which: list[int], level: float) -> dict[str, Any]:
    """Membership and dominance of one pair or triple, as plain values.

    Shares of draws tell how close a point is. What is decided comes from tests of pairs: draws
    scatter around values that have scattered once already, and would decide too often.
    """
    joints = cloud.oriented(which)
    values = np.stack([joint.values for joint in joints])
    member = on_front(values)
    found = {
        "data_set": cloud.data_set,
        "figures": [cloud.figures[m].name for m in which],
        "subjects": cloud.names,
        "on_front": member.tolist(),
        "decided": None,
        "front_probability": None,
        "dominance": dominance(values[:, :, None]).tolist(),
    }
    if cloud.known:
        draws = np.stack([joint.draws for joint in joints])
        found["decided"] = front_decided(decisions(joints, level))
        found["front_probability"] = front_probability(draws).tolist()
        found["dominance"] = dominance(draws).tolist()
    return found


def _sentence(cloud: _Cloud, front: dict[str, Any], level: float) -> str:
    about = f"{cloud.data_set}, {joined(front['figures'])}"
    if front["front_probability"] is None:
        there = [n for n, on in zip(cloud.names, front["on_front"], strict=True) if on]
        return f"{about}: by their values alone, on the front: {joined(there)}."
    chance = front["front_probability"]
    order = np.argsort(chance, kind="stable")[::-1]
    parts = []
    for what, words in (("on", "on the front"), ("open", "open"), ("off", "off it")):
        some = [k for k in order if front["decided"][k] == what]
        shown = [cloud.names[k] + (f" ({chance[k]:.2f})" if what == "open" else "") for k in some]
        if shown:
            parts.append(f"{words}: {joined(shown)}")
    return f"{about}, decided with probability {level:g}: {'; '.join(parts)}."


def _dominated(cloud: _Cloud, front: dict[str, Any]) -> list[tuple]:
    table = np.asarray(front["dominance"])
    return [
        (
            cloud.data_set,
            " and ".join(front["figures"]),
            cloud.names[i],
            cloud.names[j],
            float(table[i, j]) if front["front_probability"] is not None else None,
        )
        for i, j in np.argwhere(table >= 0.5)
    ]


def _points(cloud: _Cloud, fronts: list[dict[str, Any]], level: float) -> list[tuple]:
    found = []
    for s, one in enumerate(cloud.subjects):
        row = [cloud.data_set, one.model, one.checkpoint, cloud.rows[0][s].images_seen]
        row.append(one.guidance)
        for m in range(len(cloud.figures)):
            interval = interval_of(cloud.rows[m][s], cloud.joints[m].draws[s], level)
            row += [float(cloud.joints[m].values[s]), *(interval or (None, None))]
        for front in fronts:
            chance = front["front_probability"]
            row += ["yes" if front["on_front"][s] else "no", None if chance is None else chance[s]]
        found.append(tuple(row))
    return found


def _point_table(figures: list[Figure], sets: list[list[int]], points: list[tuple]) -> Table:
    columns = ["data set", "model", "checkpoint", "images seen", "guidance"]
    for figure in figures:
        columns += [figure.name, f"{figure.name} low", f"{figure.name} high"]
    for which in sets:
        words = " and ".join(figures[m].name for m in which)
        columns += [f"on the front of {words}", f"probability of {words}"]
    return Table(
        "Every point",
        tuple(columns),
        tuple(points),
        "; ".join(figure.label for figure in figures)
        + ". The probability to be on the front is a share of joint draws around the values.",
    )


def _along(cloud: _Cloud, wanted: str) -> str:
    """What varies within a model, or what the option asks for."""
    values = {
        "guidance": [one.guidance for one in cloud.subjects],
        "images_seen": [row.images_seen for row in cloud.rows[0]],
    }
    varying = [n for n, v in values.items() if len({x for x in v if x is not None}) > 1]
    if wanted == "auto":
        return varying[0] if varying else "model"
    if wanted != "model" and wanted not in varying:
        raise UserError(
            f"trade-offs: {wanted} does not vary on {cloud.data_set}; leave `along` out or set "
            f"along={(varying or ['model'])[0]}"
        )
    return wanted


def _plot(
    cloud: _Cloud,
    fronts: list[dict[str, Any]],
    selected: list[Row],
    options: TradeOffOptions,
    id: str,
) -> Plot:
    along = _along(cloud, options.along)
    models = list(dict.fromkeys(one.model for one in cloud.subjects))
    swept = [
        one.guidance if along == "guidance" else cloud.rows[0][s].images_seen
        for s, one in enumerate(cloud.subjects)
    ]
    shades = drawing.ramp([v for v in swept if v is not None]) if along != "model" else {}
    looks = []
    for one, value in zip(cloud.subjects, swept, strict=True):
        look = drawing.series_look(models.index(one.model))
        looks.append(look | ({"color": shades.get(value, drawing.SOFT)} if shades else {}))
    pairs = list(combinations(range(len(cloud.figures)), 2))
    title = f"{cloud.data_set}: {joined(figure.name for figure in cloud.figures)}"
    size = 3.6 if len(pairs) > 1 else 4.6
    with drawing.panels(len(pairs), width=size, height=size * 0.95) as (figure, axes):
        for panel, pair, front in zip(axes[0], pairs, fronts, strict=False):
            _panel(panel, cloud, pair, front, looks, options.level)
            _selected_points(panel, cloud, pair, selected)
            x, y, on = *(cloud.joints[m].values for m in pair), np.array(front["on_front"])
            signs = tuple(cloud.figures[m].sign for m in pair)
            drawing.front_line(panel, x[on], y[on], signs)
            if shades:
                _name_points(panel, x, y, ["" if v is None else number(v) for v in swept])
        _legend(figure, models, along, shades)
        alt = " ".join(_sentence(cloud, front, options.level) for front in fronts)
        svg = drawing.finish(figure, id, title, alt)
    note = "Filled: on the front by its values. Dashed: the front. "
    if cloud.known:
        note += f"Bars: {options.level:.0%} of each figure; shaded: of both at once. "
    if shades:
        note += f"Numbers: {along.replace('_', ' ')}. "
    if selected:
        note += "Crosses: figures whose pictures chose the model, in no front."
    return Plot(title, svg, alt, note.strip())


def _panel(
    axes: Any, cloud: _Cloud, pair: tuple[int, int], front: dict, looks: list[dict], level: float
) -> None:
    (xs, ys), both = (cloud.joints[m] for m in pair), [cloud.rows[m] for m in pair]
    for model in dict.fromkeys(one.model for one in cloud.subjects):
        some = [s for s, one in enumerate(cloud.subjects) if one.model == model]
        axes.plot(xs.values[some], ys.values[some], color=drawing.RULE, linewidth=1, zorder=1)
    for s, look in enumerate(looks):
        x, y = xs.values[s], ys.values[s]
        across = interval_of(both[0][s], xs.draws[s], level)
        upright = interval_of(both[1][s], ys.draws[s], level)
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


def _selected_points(axes: Any, cloud: _Cloud, pair: tuple[int, int], rows: list[Row]) -> None:
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
    for place, model in enumerate(models):
        look = drawing.series_look(place) | ({"color": drawing.INK} if shades else {})
        handles.append(Line2D([], [], linestyle="none", label=drawing.cut(model), **look))
    ordered = sorted(shades)
    shown = sorted({round(k) for k in np.linspace(0, len(ordered) - 1, 7)}) if ordered else []
    for place in shown:
        value = ordered[place]
        label = f"{along.replace('_', ' ')} {number(value)}"
        handles.append(Line2D([], [], linewidth=5, color=shades[value], label=label))
    side_by_side = drawing.legend_columns(figure, [handle.get_label() for handle in handles])
    figure.legend(handles=handles, loc="outside lower center", ncols=side_by_side)
