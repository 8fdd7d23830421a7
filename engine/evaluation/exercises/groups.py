"""Groups: figures of the groups of a data set, the worst groups, and the gap to the best.

gaps.py says how sure the gap is, group_drawings.py draws. Figures depend on the numbers of pictures
behind them, so groups of unequal numbers are compared only where the options say so, with a note.
"""

from dataclasses import replace
from typing import Literal

from etude.core.config import option
from etude.core.errors import UserError

from ..results import Results, Row
from . import Choice, Finding, Name, Table, exercise
from .gaps import GroupModel, decide, findings
from .group_drawings import MOST_MODELS_ON_RADAR, MOST_ON_RADAR, forest, radar
from .joint import interval_of, joint_draws
from .mixtures import (
    refuse_numbers,
    refuse_protocols,
    refuse_two_numbers,
    unequal_numbers,
)
from .names import ONE_RUN_EACH, Figure, all_of, joined, reasons, subject, subject_names
from .rows import Chosen, choose, selected_table

MOST_TIED = 3  # groups at one end that a sentence names


class GroupOptions(Choice):
    """Options of the exercise groups."""

    correction: Literal["holm", "bonferroni"] = option(
        "holm", "of the tests whether groups differ from their mean"
    )
    groups: tuple[Name, ...] = option((), "groups by name; none: all")
    unequal_n: bool = option(False, "also compare groups and models of unequal numbers of pictures")


@exercise(
    "groups",
    about="For which groups of pictures is a model worse, and by how much?",
    options=GroupOptions,
)
def run(results: Results, options: GroupOptions) -> Finding:
    """Worst group, gap and differences from the mean of the groups, per figure and model.

    Raises:
        UserError: the table has no groups, or not two of those that `groups` names, or unequal
            numbers of pictures in them that nobody allowed (`unequal_n`).
    """
    chosen = choose(results, options, groups=True)
    there = list(dict.fromkeys(row.group for row in chosen.rows))
    chosen = _of_groups(chosen, there, options.groups)
    notes, found = list(chosen.notes), []
    for data_set in chosen.data_sets:
        for figure in chosen.figures:
            groups, models = _models(chosen, figure, data_set, options, notes)
            if models:
                found.append((data_set, figure, groups, models))
    if not found:
        raise UserError(_nothing(chosen, there, options.groups, notes[len(chosen.notes) :]))
    every = [(figure, model.found) for _, figure, _, models in found for model in models]
    tests = decide(every, options.level, options.correction)
    sentences, data, plots, rows, gaps = [], {}, {}, [], []
    unequal: dict[tuple[str, str], list[str]] = {}  # data set and numbers: figures
    for number, (data_set, figure, groups, models) in enumerate(found):
        numbers = unequal_numbers([row for model in models for row in model.rows])
        if numbers:
            unequal.setdefault((data_set, numbers), []).append(figure.name)
        entry = {model.name: model.found for model in models}
        data.setdefault(data_set, {})[figure.name] = {"groups": groups, "models": entry}
        sentences += [_sentence(data_set, figure, groups, model, options) for model in models]
        rows += _table_rows(data_set, figure, groups, models, options.level)
        gaps += [_gap_row(data_set, figure, model) for model in models]
        if 3 <= len(groups) <= MOST_ON_RADAR and len(models) <= MOST_MODELS_ON_RADAR:
            id = f"radar-{number}"
            plots[id] = radar(data_set, figure, groups, models, options.level, id)
        id = f"forest-{number}"
        plots[id] = forest(data_set, figure, groups, models, options.level, id)
    if tests:
        notes.append(
            f"What is decided of groups holds together, over {tests} tests; intervals of gaps hold "
            f"one by one ({len(gaps)} of them, each with probability {options.level:g})."
        )
    for (data_set, numbers), figures in unequal.items():
        notes.append(
            f"{joined(figures)} on {data_set} {'is' if len(figures) == 1 else 'are'} of unequal "
            f"numbers of {numbers}: figures depend on them, so a part of a gap may come from that, "
            "and protocols are compared among equal numbers alone."
        )
    tables = {"groups": _table(rows, options), "gaps": _gap_table(gaps, options)}
    if chosen.selected:
        tables["selected"] = selected_table(chosen)
    title = f"Groups of {joined(data)}"
    said = (*sentences, *notes, ONE_RUN_EACH)
    return Finding("groups", title, said, {"groups": data}, tables, plots, chosen.protocols)


def _of_groups(chosen: Chosen, there: list[str], wanted: tuple[str, ...]) -> Chosen:
    """The rows of the groups that the options name; all where they name none."""
    for name in wanted:
        if name not in there:
            raise UserError(f"the table has no group {name!r} here; it has {', '.join(there)}")
    rows = [row for row in chosen.rows if not wanted or row.group in wanted]
    notes = list(chosen.notes)
    for data_set in chosen.data_sets:
        for figure in chosen.figures:
            before = [r for r in chosen.rows if figure.has(r) and r.data_set == data_set]
            if before and not any(row in rows for row in before):
                name = f"{figure.name} on {data_set}"
                notes.append(f"Left out: {name}, which has none of the chosen groups.")
    return replace(chosen, rows=rows, notes=notes)


def _nothing(chosen: Chosen, there: list[str], wanted: tuple[str, ...], notes: list[str]) -> str:
    """Why nothing was found, and what to type."""
    has = f"it has {', '.join(there)}"
    kept = list(dict.fromkeys(row.group for row in chosen.rows))
    if wanted and len(kept) < 2:
        return (
            f"groups compares two groups at least and is left with {kept[0]} alone; name more of "
            f"the table's with groups=[A, B]: {has}"
        )
    why = reasons(notes)
    if len(there) < 2:
        return f"no model has a figure in two groups or more; {has} alone, so evaluate another"
    return (
        f"no model has a figure in all groups of a data set{why}; choose groups that one has with "
        f"groups=[A, B]: {has}"
    )


def _models(
    chosen: Chosen, figure: Figure, data_set: str, options: GroupOptions, notes: list[str]
) -> tuple[list[str], list[GroupModel]]:
    """The groups, and the models that have the figure in all of them."""
    rows = [row for row in chosen.rows if figure.has(row) and row.data_set == data_set]
    groups = list(dict.fromkeys(row.group for row in rows))
    if len(groups) < 2:
        if groups:
            notes.append(f"Left out: {figure.name} on {data_set}, which has one group alone.")
        return groups, []
    _refuse(chosen, figure, data_set, rows, options)
    found = []
    for one, name in subject_names(rows).items():
        own = {row.group: row for row in rows if subject(row) == one}
        missing = [group for group in groups if group not in own]
        if missing:
            notes.append(f"Left out: {name}, without {figure.name} of {joined(missing)}.")
            continue
        ordered = [own[group] for group in groups]
        joint = joint_draws(chosen.results, ordered)
        what = findings(joint, figure, groups, options.level)
        found.append(GroupModel(name, ordered, joint, what))
    return groups, found


def _refuse(
    chosen: Chosen, figure: Figure, data_set: str, rows: list[Row], options: GroupOptions
) -> None:
    """`UserError` where rows of one figure on one data set do not compare."""
    remedy = "evaluate both the same way, or allow it with unequal_n=true"
    by_group: dict[str, list[Row]] = {}
    for row in rows:
        by_group.setdefault(row.group, []).append(row)
    for name, some in by_group.items():
        place = f"{data_set}, {name},"
        refuse_two_numbers(figure, place, some)
        if not options.unequal_n:
            refuse_numbers(figure, place, some, remedy)
        refuse_protocols(figure, place, some, chosen.rows, fewest=1)
    if not options.unequal_n:
        refuse_numbers(figure, data_set, rows, remedy)


def _sentence(
    data_set: str, figure: Figure, groups: list[str], model: GroupModel, options: GroupOptions
) -> str:
    found = model.found
    values = dict(zip(groups, found["values"], strict=True))
    worst, best = (
        f"{joined(found[end], MOST_TIED)} ({values[found[end][0]]:.4g})"
        for end in ("worst", "best")
    )
    ends = f"worst in {worst}, best in {best}"
    if len(found["worst"]) == len(groups):
        ends = f"equal in {all_of(len(groups))} groups ({found['mean']:.4g})"
    text = f"{model.name} on {data_set}, {figure.label}: {ends}, a gap of {found['gap']:.3g}"
    if found["gap_low"] is None:
        return f"{text}; without intervals this is about the values alone."
    text += f" [{found['gap_low']:.3g}, {found['gap_high']:.3g}]"
    if len(found["worst"]) == len(groups):
        return f"{text}."
    parts = []
    for verdict in ("worse", "better"):
        some = [d["group"] for d in found["differences"] if d["verdict"] == verdict]
        if some:
            parts.append(f"decidedly {verdict} than the mean of the groups: {joined(some)}")
    if parts:
        return f"{text}; {'; '.join(parts)}."
    if found["gap_low"] > 0.0:
        return f"{text}; no group alone differs decidedly from their mean."
    text += ", which equal groups can show too"
    if found["gap"] <= found["chance_gap"]:
        by_chance = f"up to {found['chance_gap']:.3g} by chance with probability"
        text += f" ({by_chance} {options.level:g})"
    return f"{text}."


def _table_rows(
    data_set: str, figure: Figure, groups: list[str], models: list[GroupModel], level: float
) -> list[tuple]:
    rows = []
    for model in models:
        for place, group in enumerate(groups):
            interval = interval_of(
                model.rows[place], model.joint.draws[place], level, model.joint.limits[place]
            )
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


def _gap_row(data_set: str, figure: Figure, model: GroupModel) -> tuple:
    found = model.found
    ends = (", ".join(found[end]) for end in ("worst", "best"))
    keys = ("gap", "gap_low", "gap_high", "p_equal", "chance_gap")
    return data_set, figure.name, model.name, *ends, *(found[key] for key in keys)


def _gap_table(rows: list[tuple], options: GroupOptions) -> Table:
    return Table(
        "Gaps between the worst and the best group",
        ("data set", "figure", "model", "worst", "best", "gap", "low", "high", "p", "by chance"),
        tuple(rows),
        f"Low and high hold with {options.level:.0%} for one model's gap; p is that of equal "
        "groups, from the differences of all pairs of groups after Holm. By chance: the gap that "
        f"equal groups stay below with probability {options.level:g}.",
    )


def _table(rows: list[tuple], options: GroupOptions) -> Table:
    columns = ("data set", "figure", "model", "group", "pictures", "value", "low", "high")
    columns += ("less the mean", "from", "to", "p", "verdict")
    return Table(
        "Every group",
        columns,
        tuple(rows),
        f"The last columns are the group less the mean of all groups: intervals that hold at once "
        f"for all groups of a model at {options.level:.0%} (Bonferroni), p values corrected over "
        f"the whole table after {options.correction.capitalize()}.",
    )
