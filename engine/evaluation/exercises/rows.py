"""Which rows of a table an exercise may use; called by every exercise.

Rows that chose the model they describe are set apart, and values that are not numbers are left out
by name. So is what an option leaves out beside that which it names. mixtures.py refuses one figure
under two protocols or numbers of pictures: they do not compare.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from etude.core.errors import UserError

from ..results import Results, Row, refuse_two_sources
from . import Choice, Table
from .mixtures import protocols_named, refuse_mixture
from .names import Figure, find_figure, joined, subject, subject_names, title, where

MOST_LEFT_OUT = 20  # entries of a note about what an option leaves out


@dataclass(frozen=True)
class Chosen:
    """The rows that an exercise works on.

    Attributes:
        rows: those that may enter a statement.
        selected: those whose pictures chose or promoted their model: only shown beside.
        no_numbers: those whose value is not a number.
        notes: what was left out, one sentence each.
    """

    results: Results
    figures: list[Figure]
    rows: list[Row]
    selected: list[Row]
    notes: list[str] = field(default_factory=list)
    no_numbers: list[Row] = field(default_factory=list)

    @property
    def data_sets(self) -> list[str]:
        """In the order of the table."""
        return list(dict.fromkeys(row.data_set for row in self.rows))

    @property
    def protocols(self) -> tuple[str, ...]:
        """Fingerprints of what the figures' protocols fix; none where the table does not say."""
        return tuple(dict.fromkeys(row.protocol for row in self.rows if row.protocol))

    def of(self, figure: Figure, data_set: str) -> list[Row]:
        """The rows of a figure on a data set, which must all compare."""
        found = [row for row in self.rows if figure.has(row) and row.data_set == data_set]
        refuse_mixture(figure, data_set, found, self.rows)
        return found


def choose(results: Results, options: Choice, *, groups: bool = False) -> Chosen:
    """The rows that the options ask for, checked.

    Args:
        groups: the rows of groups, instead of those of all pictures together.

    Raises:
        UserError: the options name what the table lacks, nothing is left, or a row stands there
            twice with different values.
    """
    rows = [row for row in results.rows if bool(row.group) == groups]
    if not rows:
        kind = "of groups" if groups else "of all pictures together (only of groups)"
        raise UserError(f"the table has no figures {kind}; evaluate a data set that has them")
    for name, wanted in (
        ("data_set", options.data_sets),
        ("model", options.models),
        ("checkpoint", options.checkpoints),
        ("guidance", options.guidance),
    ):
        rows = _keep(rows, name, wanted)
    asked = rows
    rows = _keep(rows, "n_generated", (options.n_generated,) if options.n_generated else ())
    numbered = rows
    known = list(dict.fromkeys(row.protocol for row in rows))
    rows = _keep(rows, "protocol", tuple(protocols_named(options.protocols, known)))
    refuse_two_sources(rows)
    figures = _figures(rows, options.metrics)
    rows = [row for row in rows if any(figure.has(row) for figure in figures)]
    notes = []
    for option, before, after in (
        (f"n_generated={options.n_generated}", asked, numbered),
        ("protocols", numbered, rows),
    ):
        notes += _left_out(option, before, after, options.metrics)
    names, no_numbers = subject_names(rows), []
    for row in rows:
        if not math.isfinite(row.value):
            no_numbers.append(row)
            who = f"{names[subject(row)]} on {where(row)}"
            notes.append(f"Left out: {who}, whose {row.metric} is not a number.")
    numbers = [row for row in rows if math.isfinite(row.value)]
    kept = _once([row for row in numbers if not row.selected])
    selected = [row for row in numbers if row.selected]
    if selected:
        whose = ", ".join(dict.fromkeys(names[subject(row)] for row in selected))
        notes.append(
            f"Shown beside, in no statement: {len(selected)} figures of {whose}, because their "
            "pictures chose the model."
        )
    if not kept:
        raise UserError("no row is left that may be reported; choose other rows or evaluate anew")
    figures = [figure for figure in figures if any(figure.has(row) for row in kept)]
    if any(row.estimate and row.estimate not in results.estimates for row in kept):
        notes.append(
            "The table came without its estimates: what two figures share, as the reference, does "
            "not cancel in their difference, so less is decided than with the table's folder."
        )
    return Chosen(results, figures, kept, selected, notes, no_numbers)


def selected_table(chosen: Chosen) -> Table:
    """The figures that are shown beside: their pictures chose the model."""
    names = subject_names(chosen.selected)
    features: dict[str, set[str]] = {}
    for row in chosen.selected:
        features.setdefault(row.metric, set()).add(row.features)
    rows = [
        (
            *(r.data_set, r.group, names[subject(r)]),
            f"{r.metric}@{r.features}" if len(features[r.metric]) > 1 else r.metric,
            *(r.value, r.low, r.high, r.n_generated or None, r.protocol),
        )
        for r in chosen.selected
    ]
    columns = ("data set", "group", "model", "figure", "value", "low", "high")
    return Table(
        "Figures whose pictures chose the model",
        (*columns, "pictures", "protocol"),
        tuple(rows),
        "Too good by an unknown amount, since the best of several was taken; in no statement.",
    )


def _keep(rows: list[Row], name: str, wanted: tuple) -> list[Row]:
    known = list(dict.fromkeys(getattr(row, name) for row in rows))
    for value in wanted:
        if value not in known:
            there = ", ".join(str(v) for v in known if v not in ("", None)) or "none"
            words = name.replace("_", " ")
            raise UserError(f"the table has no {words} {value!r} here; it has {there}")
    return [row for row in rows if not wanted or getattr(row, name) in wanted]


def _left_out(
    option: str, before: Sequence[Row], after: Sequence[Row], metrics: tuple[str, ...]
) -> list[str]:
    """A sentence on the models, data sets, groups and figures of which an option leaves nothing.

    Args:
        metrics: the figures that are asked for; none: all.
    """

    def keys(row: Row) -> list[tuple]:
        place = (subject(row), row.data_set)
        return [place, (*place, row.group), (*place, row.group, row.metric, row.features)]

    asked = {spec.partition("@")[0] for spec in metrics}
    kept = {key for row in after for key in keys(row)}
    names, gone = subject_names(before), {}
    for row in before:
        if asked and row.metric not in asked:
            continue
        # The widest of which nothing is left stands for all within.
        widest = next((key for key in keys(row) if key not in kept), None)
        if widest is None:
            continue
        who = f"{names[subject(row)]} on {row.data_set if len(widest) == 2 else where(row)}"
        # None: all figures of it.
        gone.setdefault(who, []).append(row.metric if len(widest) == 5 else None)
    told = [
        who if None in figures else f"{joined(dict.fromkeys(figures))} of {who}"
        for who, figures in gone.items()
    ]
    return [f"Left out by {option}: {joined(told, MOST_LEFT_OUT)}."] if told else []


def _figures(rows: list[Row], wanted: tuple[str, ...]) -> list[Figure]:
    features: dict[str, list[str]] = {}
    better: dict[tuple[str, str], str] = {}
    for row in rows:
        if row.features not in features.setdefault(row.metric, []):
            features[row.metric].append(row.features)
        key = (row.metric, row.features)
        if better.setdefault(key, row.better) != row.better or row.better not in (
            "lower",
            "higher",
        ):
            raise UserError(
                f"the table does not say whether a lower or a higher {row.metric} is better; "
                "write lower or higher in the column better of all its rows"
            )
    known = [
        Figure(m, f, f"{m}@{f}" if len(features[m]) > 1 else m, side)
        for (m, f), side in better.items()
    ]
    if not wanted:
        return known
    found = []
    for spec in wanted:
        figure = find_figure(known, spec)
        if figure is None:
            there = ", ".join(figure.name for figure in known)
            raise UserError(f"the table has no figure {spec!r} here; it has {there}")
        found.append(figure)
    return list(dict.fromkeys(found))


def _once(rows: list[Row]) -> list[Row]:
    """The rows without repetitions of an equal value; `UserError` on unequal ones."""
    found: dict[tuple, Row] = {}
    for row in rows:
        key = (subject(row), row.data_set, row.group, row.metric, row.features)
        key += (row.protocol, row.n_real, row.n_generated)
        old = found.setdefault(key, row)
        if old.value != row.value:
            raise UserError(
                f"the table has two values of {row.metric} of {title(row)} on {row.data_set} "
                f"({old.value!r} and {row.value!r}) under one protocol; delete the file in the "
                f'table\'s rows/ that says "value": {old.value!r} or {row.value!r}, which '
                "results.csv is written from, or, in a CSV that stands alone, its line"
            )
    return list(found.values())
