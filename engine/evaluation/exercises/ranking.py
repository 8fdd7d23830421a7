"""Ranking robustness: does the order of models hold under every figure, data set and n?

A column is one figure on one data set at one number of pictures. Statements about orders come from
pairs that tests decide (joint.py), so they hold all at once with the stated probability; shares of
joint draws stand beside them in the tables.
"""

from itertools import combinations
from typing import Any

import numpy as np

from etude.core.errors import UserError
from etude.core.log import number

from ..results import Results
from . import Choice, Finding, Plot, Table, drawing, exercise
from .joint import kendall_tau, rank_bounds, rank_distribution, ranks, tau_bounds
from .names import ONE_RUN_EACH, all_of, joined
from .orders import Column, compared, decided_orders, order_of_pairs, pair_table
from .rows import choose, selected_table

MOST_COLUMNS = 12  # that the drawings show; the tables have all


@exercise(
    "ranking",
    about="Does the order of models hold under every figure, data set and number of pictures?",
)
def run(results: Results, options: Choice) -> Finding:
    """Rankings, Kendall's tau between them, and the order of every pair of models.

    Raises:
        UserError: fewer than two models have every column, there are fewer than two columns, or
            rows of a column do not compare.
    """
    chosen = choose(results, options)
    notes = list(chosen.notes)
    names, columns = compared(chosen, options.level, notes)
    if len(columns) < 2:
        raise UserError(
            "ranking compares two figures, data sets or numbers of pictures at least and has "
            f"{len(columns)}; leave out some of metrics, data_sets and n_generated"
        )
    pairs = order_of_pairs(names, columns, options.level)
    taus = _taus(columns)
    distribution = _ranks(names, columns)
    tables = {
        "ranks": _rank_table(names, columns, distribution),
        "pairs": pair_table(names, columns, options.level),
        "orders": _order_table(pairs, columns),
        "kendall": _tau_table(taus),
    }
    if chosen.selected:
        tables["selected"] = selected_table(chosen)
    plots = {
        "heat": _heat(names, columns),
        "rank-intervals": _intervals(names, columns, distribution),
    }
    data = {
        "models": names,
        "columns": [column.name for column in columns],
        "kendall": taus,
        "pairs": pairs,
        "ranks": distribution,
    }
    title = f"Rankings of {len(names)} models under {len(columns)} columns"
    sentences = _sentences(pairs, taus, columns, options.level)
    said = (*sentences, *notes, ONE_RUN_EACH)
    return Finding("ranking", title, said, data, tables, plots, chosen.protocols)


def _taus(columns: list[Column]) -> list[dict[str, Any]]:
    found = []
    for one, two in combinations(columns, 2):
        low, high = tau_bounds(one.decided, two.decided)
        known = one.known and two.known
        tau = kendall_tau(one.joint.values, two.joint.values)
        found.append(
            {
                "columns": [one.name, two.name],
                "tau": tau,
                "low": low if known else None,
                "high": high if known else None,
            }
        )
    return found


def _ranks(names: list[str], columns: list[Column]) -> list[dict[str, Any]]:
    """Per model and column: value, rank, the ranks left open, and each rank's probability."""
    found = []
    for column in columns:
        rank = ranks(column.joint.values)
        bounds = rank_bounds(column.decided)
        chances = rank_distribution(column.joint)
        for place, name in enumerate(names):
            found.append(
                {
                    "model": name,
                    "column": column.name,
                    "value": column.rows[place].value,
                    "rank": int(rank[place]),
                    "low": bounds[place][0] if column.known else None,
                    "high": bounds[place][1] if column.known else None,
                    "probabilities": chances[place].tolist() if column.known else None,
                }
            )
    return found


def _sentences(
    pairs: list[dict], taus: list[dict], columns: list[Column], level: float
) -> list[str]:
    robust = decided_orders(pairs, list(range(len(columns))))
    reversed_pairs = [p for p in pairs if p["verdict"] == "reversed"]
    sentences = []
    if not any(column.known for column in columns):
        held = sum(p["same_by_value"] for p in pairs)
        sentences.append(
            f"{held} of {len(pairs)} pairs of models have the same order in {all_of(len(columns))} "
            "columns by their values; the table has no intervals to say whether that is chance."
        )
    else:
        where = f"in {all_of(len(columns))} columns at once (probability {level:g})"
        some = joined(robust) if robust else "no order of two models"
        sentences.append(f"Decided {where}: {some}.")
        sentences += _within(pairs, columns)
    for pair in reversed_pairs[:6]:
        first = [c.name for c, s in zip(columns, pair["decided"], strict=True) if s > 0]
        second = [c.name for c, s in zip(columns, pair["decided"], strict=True) if s < 0]
        sentences.append(
            f"The order reverses: {pair['a']} is better by {joined(first)}, {pair['b']} by "
            f"{joined(second)}."
        )
    if len(reversed_pairs) > 6:
        sentences.append(f"{len(reversed_pairs) - 6} more pairs reverse; see the table of orders.")
    still = sum(p["verdict"] == "open" for p in pairs)
    if still and any(column.known for column in columns):
        sentences.append(f"{still} of {len(pairs)} pairs of models are open.")
    return sentences + _agreement(taus)


def _agreement(taus: list[dict]) -> list[str]:
    """Which columns order the models most and least alike; ties name no winner."""
    numbers = [t for t in taus if np.isfinite(t["tau"])]
    if not numbers:
        return []
    least, most = (end(numbers, key=lambda t: t["tau"]) for end in (min, max))
    if len(numbers) == 1:
        return [f"{joined(least['columns'])} have a Kendall tau of {_tau(least)}."]
    if most["tau"] - least["tau"] < 1e-9:
        return [f"Every two columns have the same Kendall's tau, {least['tau']:.2f}."]
    found = []
    for words, one in (("least", least), ("most", most)):
        more = sum(abs(t["tau"] - one["tau"]) < 1e-9 for t in numbers) - 1
        beside = f" (and {more} more pairs of columns)" if more else ""
        found.append(f"{joined(one['columns'])}{beside} agree {words}: Kendall's tau {_tau(one)}.")
    return found


def _tau(one: dict) -> str:
    span = "" if one["low"] is None else f" [{one['low']:.2f}, {one['high']:.2f}]"
    return f"{one['tau']:.2f}{span}"


def _within(pairs: list[dict], columns: list[Column]) -> list[str]:
    """What is decided under one figure on every data set, and on one data set by every figure."""
    found = []
    for word, key in (("By", lambda c: c.figure.name), ("On", lambda c: c.data_set)):
        names = list(dict.fromkeys(key(column) for column in columns))
        for name in names:
            which = [k for k, column in enumerate(columns) if key(column) == name]
            orders = decided_orders(pairs, which)
            if 1 < len(which) < len(columns) and (orders or word == "By"):
                text = joined(orders) if orders else "no order of two models"
                found.append(f"{word} {name}, decided in {all_of(len(which))} columns: {text}.")
    return found


def _rank_table(names: list[str], columns: list[Column], found: list[dict]) -> Table:
    rows = []
    for entry in found:
        chances = entry["probabilities"] or [None] * len(names)
        rows.append(
            (
                entry["column"],
                entry["model"],
                entry["value"],
                *(entry[key] for key in ("rank", "low", "high")),
                *chances,
            )
        )
    heads = [f"share of draws, rank {rank}" for rank in range(1, len(names) + 1)]
    return Table(
        "Ranks",
        ("column", "model", "value", "rank", "best rank", "worst rank", *heads),
        tuple(rows),
        "Best and worst rank: what the decided pairs leave open, for all models and columns at "
        "once. Probabilities are shares of joint draws.",
    )


def _order_table(pairs: list[dict], columns: list[Column]) -> Table:
    words = {"open": "open", "reversed": "reversed"}
    heads = [f"share of draws, a better, {c.name}" for c in columns]
    rows = [
        (
            p["a"],
            p["b"],
            words.get(p["verdict"]) or f"{p[p['verdict']]} everywhere",
            p["inversion"],
            *p["a_better"],
        )
        for p in pairs
    ]
    return Table(
        "Order of every pair",
        ("a", "b", "decided", "share of draws inverted", *heads),
        tuple(rows),
        "Shares of joint draws: inverted, where the order is not the same in every column, and "
        "those in which a is better. Close models are inverted often because nothing is known of "
        "their order; no share is a probability.",
    )


def _tau_table(taus: list[dict]) -> Table:
    rows = tuple((*t["columns"], t["tau"], t["low"], t["high"]) for t in taus)
    return Table(
        "Kendall's tau-b between columns",
        ("column", "other column", "tau", "low", "high"),
        rows,
        "1: the same order, -1: the opposite one. The interval holds every order that the decided "
        "pairs leave open.",
    )


def _heat(names: list[str], columns: list[Column]) -> Plot:
    """Values in cells, darker for better ranks; models sorted by their mean rank."""
    from matplotlib.patches import Rectangle

    shown = columns[:MOST_COLUMNS]
    table = np.stack([ranks(column.joint.values) for column in shown], axis=1)
    order = np.argsort(table.mean(1), kind="stable")
    title = "Values and ranks of every model in every column"
    lines = max(drawing.wrapped(column.name, 18).count("\n") + 1 for column in shown)
    width, height = 2.2 + 1.15 * len(shown), 1.1 + 0.12 * lines + 0.34 * len(names)
    with drawing.panels(1, width=width, height=height) as (figure, axes):
        panel = axes[0, 0]
        for y, model in enumerate(order):
            for x, column in enumerate(shown):
                rank = int(table[model, x])
                shade = drawing.HEAT[round(6 * (rank - 1) / max(len(names) - 1, 1))]
                panel.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, color=shade))
                text = f"{number(column.rows[model].value)}  ({rank})"
                panel.text(x, y, text, ha="center", va="center", fontsize=8)
        drawing.name_rows(panel, [names[model] for model in order])
        panel.grid(False)
        panel.set_xlim(-0.5, len(shown) - 0.5)
        heads = [drawing.wrapped(c.name, 18) for c in shown]
        arrows = [
            f"{head}\n{c.figure.better} is better" for head, c in zip(heads, shown, strict=True)
        ]
        panel.set_xticks(range(len(shown)), arrows, fontsize=7)
        panel.xaxis.tick_top()
        panel.tick_params(axis="x", length=0, labelcolor=drawing.INK)
        for side in panel.spines.values():
            side.set_visible(False)
        best = [f"{c.name}: {_first(names, c)}" for c in shown]
        alt = f"{title}. First in {'; '.join(best)}."
        svg = drawing.finish(figure, "heat", title, alt)
    note = "In brackets: the rank in its column, 1 for the best. Sorted by the mean rank."
    if len(columns) > len(shown):
        note += f" The first {len(shown)} of {len(columns)} columns; the table has all."
    return Plot(title, svg, alt, note)


def _first(names: list[str], column: Column) -> str:
    """The models with the best value of a column."""
    values = column.joint.values
    first = [name for name, value in zip(names, values, strict=True) if value == values.max()]
    return f"{all_of(len(names))} equal" if len(first) == len(names) else joined(first)


def _intervals(names: list[str], columns: list[Column], found: list[dict]) -> Plot:
    """A panel a column: each model's rank, the ranks left open, and their probabilities."""
    shown = columns[:MOST_COLUMNS]
    across = min(len(shown), 4)
    down = -(-len(shown) // across)
    title = "Ranks and the ranks that are left open"
    height = 0.9 + 0.26 * len(names)
    order = np.argsort(np.mean([ranks(c.joint.values) for c in shown], axis=0), kind="stable")
    with drawing.panels(across, down, width=2.6, height=height, sharex=True, sharey=True) as (
        figure,
        axes,
    ):
        for place, panel in enumerate(axes.flat):
            if place >= len(shown):
                panel.set_visible(False)
                continue
            own = [e for e in found if e["column"] == shown[place].name]
            _rank_panel(panel, [own[k] for k in order])
            panel.set_title(drawing.wrapped(shown[place].name, 22))
            drawing.name_rows(panel, [names[k] for k in order])
            panel.set_xlim(0.5, len(names) + 0.5)
            panel.set_xticks(range(1, len(names) + 1) if len(names) <= 10 else [1, len(names)])
            panel.set_xlabel("rank (1 is best)")
        alt = f"{title}. " + "; ".join(
            f"{e['model']} in {e['column']}: {e['rank']}"
            + (f", {e['low']} to {e['high']}" if e["low"] else "")
            for e in found[:24]
        )
        svg = drawing.finish(figure, "rank-intervals", title, alt)
    note = "Points: ranks by value. Bars: ranks that the decided pairs leave open."
    note += " Larger squares: ranks of more joint draws."
    return Plot(title, svg, alt, note)


def _rank_panel(axes: Any, entries: list[dict]) -> None:
    for y, entry in enumerate(entries):
        for rank, chance in enumerate(entry["probabilities"] or [], start=1):
            axes.scatter(
                rank, y, s=90 * chance, marker="s", color=drawing.SERIES[0], alpha=0.35, zorder=1
            )
        if entry["low"] is not None:
            ends = [entry["low"], entry["high"]]
            axes.plot(ends, [y, y], color=drawing.SERIES[0], linewidth=1.4, zorder=2)
            axes.plot(ends, [y, y], "|", color=drawing.SERIES[0], markersize=7, zorder=2)
        axes.plot(entry["rank"], y, "o", color=drawing.INK, markersize=3.5, zorder=3)
