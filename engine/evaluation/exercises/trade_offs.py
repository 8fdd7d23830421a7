"""Trade-offs: which models, checkpoints and guidance scales no other beats in two or three figures.

One is on the front when no other dominates it: nowhere worse and somewhere better (Pareto). Since
figures have errors, so has the front: with intervals tests decide which points are on it or off it.
"""

from itertools import combinations
from typing import Any, Literal

import numpy as np

from etude.core.config import option
from etude.core.errors import UserError

from ..results import Results
from . import Choice, Finding, Table, exercise
from .fronts import Cloud, cloud_of, front_of
from .joint import decisions, interval_of
from .names import ONE_RUN_EACH, Figure, joined, reasons
from .rows import choose, selected_table
from .trade_off_drawings import plot


class TradeOffOptions(Choice):
    """Options of the exercise trade-offs; `metrics` names two or three figures."""

    along: Literal["auto", "guidance", "images_seen", "model"] = option(
        "auto", "what the colours tell; auto: guidance or images_seen where a model varies in it"
    )


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
    found = [cloud_of(chosen, data_set, notes) for data_set in chosen.data_sets]
    clouds = [cloud for cloud in found if cloud is not None]
    # One correction over all figures and data sets, so that all fronts hold at once.
    every = [joint for cloud in clouds for joint in cloud.oriented(range(len(figures)))]
    decided = decisions(every, options.level)
    for place, cloud in enumerate(clouds):
        own = decided[place * len(figures) : (place + 1) * len(figures)]
        fronts = [front_of(cloud, which, own) for which in sets]
        data[cloud.data_set] = fronts
        told = [_sentence(cloud, front, options.level) for front in fronts]
        sentences += told
        for front in fronts:
            dominated += _dominated(cloud, front)
        points += _points(cloud, fronts, options.level)
        id = f"front-{place}"
        plots[id] = plot(
            cloud, fronts, chosen.selected, options.along, options.level, id, " ".join(told)
        )
    if len(sets) * len(clouds) > 1 and any(cloud.known for cloud in clouds):
        notes.append(
            f"What is decided holds on all {len(sets) * len(clouds)} fronts at once, with "
            f"probability {options.level:g}."
        )
    if not data:
        why = reasons(notes)
        raise UserError(
            f"no data set has {joined(f.name for f in figures)} of two models or settings{why}; "
            "evaluate them or name other figures with metrics=[A, B]"
        )
    tables = {"points": _point_table(figures, sets, points)}
    if dominated:
        tables["dominance"] = Table(
            "Who dominates whom",
            ("data set", "figures", "this", "dominates", "share of draws"),
            tuple(dominated),
            "Pairs in half of the joint draws at least, or by their values where the table has no "
            "intervals.",
        )
    if chosen.selected:
        tables["selected"] = selected_table(chosen)
    title = f"Trade-offs of {joined(figure.name for figure in figures)}"
    said = (*sentences, *notes, ONE_RUN_EACH)
    return Finding("trade-offs", title, said, {"fronts": data}, tables, plots, chosen.protocols)


def _sentence(cloud: Cloud, front: dict[str, Any], level: float) -> str:
    about = f"{cloud.data_set}, {joined(front['figures'])}"
    if front["front_probability"] is None:
        there = [n for n, on in zip(cloud.names, front["on_front"], strict=True) if on]
        return f"{about}: by their values alone, on the front: {joined(there)}."
    chance = front["front_probability"]
    order = np.argsort(chance, kind="stable")[::-1]
    parts = []
    for what, words in (("on", "on the front"), ("open", "open"), ("off", "off it")):
        some = [k for k in order if front["decided"][k] == what]
        if some:
            parts.append(f"{words}: {joined(cloud.names[k] for k in some)}")
    return f"{about}, decided with probability {level:g}: {'; '.join(parts)}."


def _dominated(cloud: Cloud, front: dict[str, Any]) -> list[tuple]:
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


def _points(cloud: Cloud, fronts: list[dict[str, Any]], level: float) -> list[tuple]:
    found = []
    for s, one in enumerate(cloud.subjects):
        row = [cloud.data_set, one.model, one.checkpoint, cloud.rows[0][s].images_seen]
        row += [one.guidance, one.training_seed, one.seed]
        for m, joint in enumerate(cloud.joints):
            interval = interval_of(cloud.rows[m][s], joint.draws[s], level, joint.limits[s])
            row += [float(cloud.joints[m].values[s]), *(interval or (None, None))]
        for front in fronts:
            chance = front["front_probability"]
            row += ["yes" if front["on_front"][s] else "no"]
            row += [None, None] if chance is None else [front["decided"][s], chance[s]]
        found.append(tuple(row))
    return found


def _point_table(figures: list[Figure], sets: list[list[int]], points: list[tuple]) -> Table:
    columns = ["data set", "model", "checkpoint", "images seen", "guidance"]
    columns += ["training seed", "seed"]
    for figure in figures:
        columns += [figure.name, f"{figure.name} low", f"{figure.name} high"]
    for which in sets:
        words = " and ".join(figures[m].name for m in which)
        columns += [f"on the front of {words} by value", f"decided on {words}"]
        columns += [f"share of draws on {words}"]
    return Table(
        "Every point",
        tuple(columns),
        tuple(points),
        "; ".join(figure.label for figure in figures)
        + ". Decided: on or off the front, by tests, or open. Share of draws: of joint draws "
        "around the values, in which the point is on the front; no probability that it is.",
    )
