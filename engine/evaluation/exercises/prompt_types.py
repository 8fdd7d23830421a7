"""Prompt types: how models fare on each data set of prompts, and whether their order changes.

Figures depend on the numbers of pictures, so data sets are compared at equal numbers only. Where
two models are decidedly in opposite orders on two data sets, the kind of prompt matters for which
one is better (a qualitative interaction); where nothing is decided, that is said instead.
"""

from typing import Any

import numpy as np

from etude.core.config import option
from etude.core.errors import UserError

from ..results import Results
from . import Choice, Finding, Plot, Table, drawing, exercise
from .joint import interval_of, kendall_tau
from .mixtures import refuse_mixture
from .names import ONE_RUN_EACH, Figure, all_of, find_figure, joined
from .orders import Column, compared, decided_orders, order_of_pairs, pair_table
from .rows import Chosen, choose, selected_table


class PromptTypeOptions(Choice):
    """Options of the exercise prompt-types."""

    pair: tuple[str, str] | None = option(
        None, "figures drawn against each other; none: precision and coverage, where there are any"
    )
    unequal_n: bool = option(False, "also compare data sets of unequal numbers of pictures")


@exercise(
    "prompt-types",
    about="Which models are good at which kind of prompt, and does their order change?",
    options=PromptTypeOptions,
)
def run(results: Results, options: PromptTypeOptions) -> Finding:
    """Every figure on every data set, and the order of models between data sets.

    Raises:
        UserError: there is one data set alone, or unequal numbers of pictures in them that nobody
            allowed (`unequal_n`).
    """
    chosen = choose(results, options)
    if len(chosen.data_sets) < 2:
        raise UserError(
            f"prompt-types compares two data sets at least and has {chosen.data_sets[0]} alone; "
            "evaluate another or leave data_sets out"
        )
    notes = list(chosen.notes)
    for figure in chosen.figures:
        _check_numbers(chosen, figure, options, notes)
    names, columns = compared(chosen, options.level, notes)
    pair = _pair(chosen.figures, options.pair)
    sentences, data, orders = [], {}, []
    for figure in chosen.figures:
        some = [column for column in columns if column.figure == figure]
        found = _figure(names, some, options.level)
        data[figure.name] = found
        sentences.append(_sentence(figure, found, options.level))
        orders += [(figure.name, *row) for row in _order_rows(found)]
    tables = {"values": _value_table(names, columns, options.level)}
    if any(column.tests for column in columns):
        tables["pairs"] = pair_table(names, columns, options.level)
    if orders:
        tables["orders"] = _order_table(orders)
    if chosen.selected:
        tables["selected"] = selected_table(chosen)
    plots = {"prompt-types": _plot(names, columns, chosen, pair, options.level)}
    title = f"{joined(names)} on {len(chosen.data_sets)} data sets"
    said = (*sentences, *notes, ONE_RUN_EACH)
    return Finding("prompt-types", title, said, {"figures": data}, tables, plots, chosen.protocols)


def _check_numbers(
    chosen: Chosen, figure: Figure, options: PromptTypeOptions, notes: list[str]
) -> None:
    """Equal numbers of pictures on every data set, or a note that they are not."""
    for data_set in chosen.data_sets:
        chosen.of(figure, data_set)
    rows = [row for row in chosen.rows if figure.has(row)]
    try:
        refuse_mixture(figure, joined(chosen.data_sets), rows, groups=True)
    except UserError as error:
        if not options.unequal_n:
            raise UserError(f"{error}, or allow it with unequal_n=true") from None
        notes.append(
            f"{figure.name} is of unequal numbers of pictures, so its values do not compare "
            "between data sets; the order of models within each does."
        )


def _pair(figures: list[Figure], wanted: tuple[str, str] | None) -> list[Figure]:
    """The two figures drawn against each other; empty where nobody asks and they are not there."""
    found = []
    for spec in wanted or ("precision", "coverage"):
        named = [f for f in figures if f.metric == spec]
        # By default, of several features the first: a wish that is spelled out must be clear.
        figure = find_figure(figures, spec) if wanted else (named[0] if named else None)
        if figure is None and wanted:
            there = ", ".join(figure.name for figure in figures)
            raise UserError(f"pair: the table has no figure {spec!r} here; it has {there}")
        found += [figure] if figure else []
    return found if len(found) == 2 else []


def _figure(names: list[str], columns: list[Column], level: float) -> dict[str, Any]:
    """One figure on all its data sets, as plain values."""
    sets = [column.data_set for column in columns]
    values = {
        name: [interval_row(column, place, level) for column in columns]
        for place, name in enumerate(names)
    }
    found: dict[str, Any] = {"data_sets": sets, "values": values, "pairs": [], "kendall": []}
    if len(columns) < 2:
        return found
    found["known"] = all(column.known for column in columns)
    found["pairs"] = order_of_pairs(names, columns, level)
    for k, one in enumerate(columns):
        for two in columns[k + 1 :]:
            tau = kendall_tau(one.joint.values, two.joint.values)
            found["kendall"].append({"data_sets": [one.data_set, two.data_set], "tau": tau})
    return found


def interval_row(column: Column, place: int, level: float) -> dict[str, Any]:
    """Value, low and high of one model in a column."""
    row = column.rows[place]
    draws = column.figure.sign * column.joint.draws[place]
    limits = column.joint.limits[place]
    low, high = interval_of(row, draws, level, limits) or (None, None)
    return {"value": row.value, "low": low, "high": high, "n_generated": row.n_generated}


def _sentence(figure: Figure, found: dict[str, Any], level: float) -> str:
    sets = found["data_sets"]
    if len(sets) < 2:
        return f"{figure.label}: on {sets[0]} alone, so no order can change."
    if not found["known"]:
        same = sum(pair["same_by_value"] for pair in found["pairs"])
        return (
            f"{figure.label}: {same} of {len(found['pairs'])} pairs of models have the same order "
            "on all data sets by their values; without intervals that may be chance."
        )
    changed = []
    for pair in found["pairs"]:
        if pair["verdict"] == "reversed":
            first = [s for s, d in zip(sets, pair["decided"], strict=True) if d > 0]
            second = [s for s, d in zip(sets, pair["decided"], strict=True) if d < 0]
            changed.append(
                f"{pair['a']} is better on {joined(first)} and {pair['b']} on {joined(second)}"
            )
    kept = decided_orders(found["pairs"], list(range(len(sets))))
    parts = [f"the order changes with the prompts: {'; '.join(changed[:4])}"] if changed else []
    if len(changed) > 4:
        parts.append(f"{len(changed) - 4} more pairs change")
    parts += [f"the same on {all_of(len(sets))} data sets: {joined(kept)}"] if kept else []
    still = sum(pair["verdict"] == "open" for pair in found["pairs"])
    if still:
        parts.append(f"open: {still} of {len(found['pairs'])} pairs")
    return f"{figure.label}, decided with probability {level:g}: {'; '.join(parts)}."


def _order_rows(found: dict[str, Any]) -> list[tuple]:
    words = {"open": "open", "reversed": "changes"}
    return [
        (
            pair["a"],
            pair["b"],
            words.get(pair["verdict"]) or f"{pair[pair['verdict']]} everywhere",
            pair["inversion"],
            "; ".join(
                f"{name} {chance:.3g}"
                for name, chance in zip(found["data_sets"], pair["a_better"], strict=True)
                if chance is not None
            ),
        )
        for pair in found["pairs"]
    ]


def _order_table(rows: list[tuple]) -> Table:
    return Table(
        "Does the order of models change between data sets?",
        ("figure", "a", "b", "decided", "share of draws that change", "share with a better"),
        tuple(rows),
        "Shares of joint draws: in which the order is not the same on all data sets, and, by data "
        "set, in which a is better. The first is high for close models, of whose order nothing is "
        "known; neither is a probability.",
    )


def _value_table(names: list[str], columns: list[Column], level: float) -> Table:
    rows = []
    for column in columns:
        for place, name in enumerate(names):
            entry = interval_row(column, place, level)
            ends = (entry["value"], entry["low"], entry["high"], entry["n_generated"] or None)
            rows.append((column.figure.name, column.data_set, name, *ends))
    return Table(
        "Every figure on every data set",
        ("figure", "data set", "model", "value", "low", "high", "pictures"),
        tuple(rows),
        f"Low and high: {level:.0%} of each figure.",
    )


def _plot(
    names: list[str], columns: list[Column], chosen: Chosen, pair: list[Figure], level: float
) -> Plot:
    """The pair against each other, and a strip for each other figure."""
    others = [figure for figure in chosen.figures if figure not in pair]
    sets = chosen.data_sets
    count = bool(pair) + len(others)
    across = min(count, 3)
    down = -(-count // across)
    title = f"Models on {joined(sets)}"
    height = max(3.2, 0.9 + len(sets) * max(0.3, 0.13 * len(names)))
    with drawing.panels(across, down, width=3.7, height=height) as (figure, axes):
        panels = list(axes.flat)
        if pair:
            by_figure = [[c for c in columns if c.figure == one] for one in pair]
            _scatter(panels.pop(0), by_figure, names, sets, level)
        for place, one in enumerate(others, start=int(bool(pair))):
            panel = panels.pop(0)
            _strip(panel, one, [c for c in columns if c.figure == one], names, sets, level)
            # The names of data sets stand once in a row of panels.
            if place % across and not (pair and place == 1):
                panel.tick_params(axis="y", labelleft=False)
        for panel in panels:
            panel.set_visible(False)
        side_by_side = drawing.legend_columns(figure, names)
        figure.legend(handles=_handles(names), loc="outside lower center", ncols=side_by_side)
        alt = _alt(names, columns)
        svg = drawing.finish(figure, "prompt-types", title, alt)
    note = f"Bars: {level:.0%} of each figure."
    if pair:
        letters = ", ".join(f"{_letter(k)} {name}" for k, name in enumerate(sets))
        note += f" Letters: {letters}."
    return Plot(title, svg, alt, note)


def _scatter(
    axes: Any, pair: list[list[Column]], names: list[str], sets: list[str], level: float
) -> None:
    found = [{column.data_set: column for column in columns} for columns in pair]
    for k, name in enumerate(sets):
        if name not in found[0] or name not in found[1]:
            continue
        for place in range(len(names)):
            look = drawing.series_look(place)
            x, y = (interval_row(side[name], place, level) for side in found)
            if x["low"] is not None:
                ends = [x["low"], x["high"]]
                axes.plot(ends, [y["value"]] * 2, color=look["color"], linewidth=1, zorder=2)
            if y["low"] is not None:
                ends = [y["low"], y["high"]]
                axes.plot([x["value"]] * 2, ends, color=look["color"], linewidth=1, zorder=2)
            axes.plot(x["value"], y["value"], linestyle="none", zorder=3, **look)
            axes.annotate(
                _letter(k),
                (x["value"], y["value"]),
                (4, 4),
                textcoords="offset points",
                fontsize=7.5,
            )
    axes.margins(0.1)
    drawing.label_axes(axes, *(columns[0].figure.label for columns in pair))


def _strip(
    axes: Any,
    figure: Figure,
    columns: list[Column],
    names: list[str],
    sets: list[str],
    level: float,
) -> None:
    here = {column.data_set: column for column in columns}
    series = []
    for place, name in enumerate(names):
        entries = [interval_row(here[s], place, level) if s in here else None for s in sets]
        values = [entry["value"] if entry else np.nan for entry in entries]
        spans = [
            (entry["low"], entry["high"]) if entry and entry["low"] is not None else None
            for entry in entries
        ]
        series.append((name, values, spans))
    drawing.label_axes(axes, figure.label)
    drawing.strip(axes, sets, series)
    drawing.name_rows(axes, sets, width=24)


def _handles(names: list[str]) -> list[Any]:
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], linestyle="none", label=label, **drawing.series_look(place))
        for place, label in enumerate(drawing.shortened(names))
    ]


def _letter(place: int) -> str:
    return chr(ord("A") + place) if place < 26 else str(place + 1)


def _alt(names: list[str], columns: list[Column]) -> str:
    parts = [
        f"{column.figure.name} on {column.data_set}: "
        + ", ".join(f"{n} {row.value:.4g}" for n, row in zip(names, column.rows, strict=True))
        for column in columns[:12]
    ]
    return ". ".join(parts) + "."
