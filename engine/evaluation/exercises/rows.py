"""Which rows of a table an exercise may use, and how they are called; called by every exercise.

Rows that chose the model they describe are set apart, values that are not numbers are left out by
name, and one figure under two protocols or numbers of pictures is refused: they do not compare.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from etude.core.errors import UserError

from ..results import Results, Row, refuse_two_sources
from . import Choice, Table


@dataclass(frozen=True)
class Figure:
    """A metric of one kind of features, as the table has it.

    Attributes:
        name: "FID", or "precision@dinov2" where the table has it of several features.
        better: "lower" or "higher".
    """

    metric: str
    features: str
    name: str
    better: str

    @property
    def sign(self) -> float:
        """Times it, larger is better."""
        return 1.0 if self.better == "higher" else -1.0

    @property
    def label(self) -> str:
        """The name with the good direction, for axes and titles."""
        return f"{self.name} ({self.better} is better)"

    def has(self, row: Row) -> bool:
        """Whether a row holds this figure."""
        return (row.metric, row.features) == (self.metric, self.features)


@dataclass(frozen=True, order=True)
class Subject:
    """What drew the pictures of a row; empty text and None for what the table does not say."""

    model: str
    checkpoint: str
    guidance: float | None
    training_seed: int | None
    seed: int


@dataclass(frozen=True)
class Chosen:
    """The rows that an exercise works on.

    Attributes:
        rows: those that may enter a statement.
        selected: those whose pictures chose or promoted their model: only shown beside.
        notes: what was left out, one sentence each.
    """

    results: Results
    figures: list[Figure]
    rows: list[Row]
    selected: list[Row]
    notes: list[str] = field(default_factory=list)

    @property
    def data_sets(self) -> list[str]:
        """In the order of the table."""
        return list(dict.fromkeys(row.data_set for row in self.rows))

    def of(self, figure: Figure, data_set: str) -> list[Row]:
        """The rows of a figure on a data set, which must all compare."""
        found = [row for row in self.rows if figure.has(row) and row.data_set == data_set]
        refuse_mixture(figure, data_set, found)
        return found


def subject(row: Row) -> Subject:
    """What drew a row's pictures."""
    return Subject(row.model, row.checkpoint, row.guidance, row.training_seed, row.seed)


def subject_names(rows: Iterable[Row]) -> dict[Subject, str]:
    """The shortest names that tell the subjects of these rows apart, in the order of the rows."""
    found = list(dict.fromkeys(subject(row) for row in rows))
    more: dict[Subject, list[str]] = {one: [] for one in found}
    for name, words in (
        ("checkpoint", "checkpoint {}"),
        ("guidance", "guidance {:g}"),
        ("training_seed", "training seed {}"),
        ("seed", "seed {}"),
    ):
        by_model: dict[str, set] = {}
        for one in found:
            by_model.setdefault(one.model, set()).add(getattr(one, name))
        for one in found:
            value = getattr(one, name)
            if len(by_model[one.model]) > 1 and value not in (None, ""):
                more[one].append(words.format(value))
    return {one: f"{one.model} ({', '.join(w)})" if w else one.model for one, w in more.items()}


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
        ("n_generated", (options.n_generated,) if options.n_generated else ()),
    ):
        rows = _keep(rows, name, wanted)
    refuse_two_sources(rows)
    figures = _figures(rows, options.metrics)
    rows = [row for row in rows if any(figure.has(row) for figure in figures)]
    names, notes = subject_names(rows), []
    numbers = [row for row in rows if math.isfinite(row.value)]
    for row in rows:
        if not math.isfinite(row.value):
            where = f"{row.data_set}, {row.group}" if row.group else row.data_set
            notes.append(
                f"Left out: {names[subject(row)]} on {where}, whose {row.metric} is not a number."
            )
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
    return Chosen(results, figures, kept, selected, notes)


def refuse_mixture(figure: Figure, where: str, rows: list[Row], *, groups: bool = False) -> None:
    """`UserError` where rows of one figure differ in protocol or in numbers of pictures.

    Args:
        groups: rows are those of several groups, whose protocols may name different pictures.
    """
    for name, words in (
        ("n_generated", "{:,} generated pictures"),
        ("n_real", "{:,} real pictures"),
        ("protocol", "protocol {:.12}"),
    ):
        if groups and name == "protocol":
            continue
        first: dict = {}
        for row in rows:
            first.setdefault(getattr(row, name), row)
        if len(first) > 1:
            (a, one), (b, two) = list(first.items())[:2]
            remedy = "evaluate both the same way"
            if name == "n_generated" and not groups:
                remedy += " or choose with n_generated=COUNT"
            if name == "protocol":
                remedy += f" (the table's protocols/{a}.json and {b}.json say what differs)"
            raise UserError(
                f"{figure.name} on {where} cannot be compared: {_who(one)} has "
                f"{words.format(a)} and {_who(two)} {words.format(b)}; {remedy}"
            )


def find_figure(figures: list[Figure], spec: str) -> Figure | None:
    """The figure that "FID" or "precision@dinov2" names, None where it is not there.

    Raises:
        UserError: the table has it of several features and none are named.
    """
    metric, _, features = spec.partition("@")
    found = [f for f in figures if f.metric == metric and features in ("", f.features)]
    if len(found) > 1:
        spelled = " or ".join(f"{figure.metric}@{figure.features}" for figure in found)
        raise UserError(f"the table has {spec} of several features; write {spelled}")
    return found[0] if found else None


def selected_table(chosen: Chosen) -> Table:
    """The figures that are shown beside: their pictures chose the model."""
    names = subject_names(chosen.selected)
    rows = [
        (r.data_set, r.group, names[subject(r)], r.metric, r.value, r.low, r.high)
        for r in chosen.selected
    ]
    columns = ("data set", "group", "model", "figure", "value", "low", "high")
    return Table(
        "Figures whose pictures chose the model",
        columns,
        tuple(rows),
        "Too good by an unknown amount, since the best of several was taken; in no statement.",
    )


def joined(names: Iterable[str], most: int = 6) -> str:
    """Names as a sentence lists them: "a, b and c", the rest counted."""
    names = list(names)
    if len(names) > most:
        names = [*names[: most - 1], f"{len(names) - most + 1} more"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def all_of(count: int) -> str:
    """ "both" for two, "all 3" for three."""
    return "both" if count == 2 else f"all {count}"


def _keep(rows: list[Row], name: str, wanted: tuple) -> list[Row]:
    known = list(dict.fromkeys(getattr(row, name) for row in rows))
    for value in wanted:
        if value not in known:
            there = ", ".join(str(v) for v in known if v not in ("", None)) or "none"
            words = name.replace("_", " ")
            raise UserError(f"the table has no {words} {value!r} here; it has {there}")
    return [row for row in rows if not wanted or getattr(row, name) in wanted]


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
                f"the table has two values of {row.metric} of {_who(row)} on {row.data_set} "
                f"({old.value:.6g} and {row.value:.6g}) under one protocol; delete one row"
            )
    return list(found.values())


def _who(row: Row) -> str:
    more = [f"checkpoint {row.checkpoint}"] if row.checkpoint else []
    more += [f"guidance {row.guidance:g}"] if row.guidance is not None else []
    more += [f"group {row.group}"] if row.group else []
    return f"{row.model} ({', '.join(more)})" if more else row.model
