"""The order of models under several figures, data sets and numbers of pictures.

Called by ranking.py and prompt_types.py.
"""

from dataclasses import dataclass
from itertools import combinations
from typing import Any, NoReturn

import numpy as np

from etude.core.errors import UserError

from ..results import Row
from . import Table
from .joint import Joint, Tests, beats, joint_draws, pair_tests, signs_of
from .mixtures import refuse_mixture
from .names import Figure, Subject, joined, subject, subject_names
from .rows import Chosen


@dataclass(frozen=True)
class Column:
    """One ranking: a figure on a data set at one number of pictures.

    Attributes:
        joint: oriented, larger is better, in the order of the models.
        tests: of pairs of models (i, j), i minus j where larger is better, held against those of
            all columns.
        decided: (S, S) of 1 where the first is better, -1 and 0.
    """

    name: str
    data_set: str
    figure: Figure
    rows: list[Row]
    joint: Joint
    tests: Tests
    decided: np.ndarray

    @property
    def known(self) -> bool:
        """Whether every figure has an error."""
        return bool(self.joint.known.all())


def compared(chosen: Chosen, level: float, notes: list[str]) -> tuple[list[str], list[Column]]:
    """The names of the models that every column has, and the columns, decided together.

    Args:
        notes: gets a sentence for each model that is left out.
    """
    found: list[tuple[str, Figure, int, dict[Subject, Row]]] = []
    for data_set in chosen.data_sets:
        for figure in chosen.figures:
            rows = [row for row in chosen.rows if figure.has(row) and row.data_set == data_set]
            for n in sorted({row.n_generated for row in rows}):
                some = [row for row in rows if row.n_generated == n]
                refuse_mixture(figure, data_set, some, chosen.rows)
                found.append((data_set, figure, n, {subject(row): row for row in some}))
    called = subject_names(chosen.rows)
    models = [one for one in called if all(one in rows for *_, rows in found)]
    titles = _titles(found)
    for one in called:
        if one not in models:
            lacking = [
                title for title, (*_, rows) in zip(titles, found, strict=True) if one not in rows
            ]
            notes.append(f"Left out: {called[one]}, which has no {joined(lacking)}.")
    if len(models) < 2:
        _refuse_few(chosen, found, titles)
    rows = [[some[one] for one in models] for *_, some in found]
    joint = joint_draws(chosen.results, [row for some in rows for row in some])
    count = len(models)
    joints = [
        joint.at(range(k * count, (k + 1) * count)).oriented(figure.sign)
        for k, (_, figure, _, _) in enumerate(found)
    ]
    columns = [
        Column(title, data_set, figure, own, one, tests, signs_of(tests, count, level))
        for title, (data_set, figure, _, _), own, one, tests in zip(
            titles, found, rows, joints, pair_tests(joints, level), strict=True
        )
    ]
    without = [column.name for column in columns if not column.known]
    if without:
        notes.append(
            f"Without intervals, so that no order of some models is decided: {joined(without)}."
        )
    return [called[one] for one in models], columns


def _refuse_few(chosen: Chosen, found: list[tuple], titles: list[str]) -> NoReturn:
    """`UserError` that says what each model lacks where no two have every column."""
    names = subject_names([*chosen.rows, *chosen.no_numbers])
    if len(names) < 2:
        raise UserError(
            f"an order needs two models and {next(iter(names.values()))} is alone here; choose "
            "more of them, or evaluate another"
        )
    odd = {(subject(row), row.data_set, row.metric, row.features) for row in chosen.no_numbers}
    lacking = []
    for one, called in names.items():
        parts = [
            title + (" (not a number)" if (one, data_set, f.metric, f.features) in odd else "")
            for title, (data_set, f, _, rows) in zip(titles, found, strict=True)
            if one not in rows
        ]
        lacking += [f"{called} has no {joined(parts)}"] if parts else []
    raise UserError(
        f"fewer than two models have every figure on every data set: {'; '.join(lacking)}; name "
        "what they share with metrics=[...] and data_sets=[...]"
    )


def _titles(found: list[tuple]) -> list[str]:
    """What tells the columns apart: the data set, the figure, and n where it varies."""
    sets = {data_set for data_set, *_ in found}
    titles = []
    for data_set, figure, n, _ in found:
        sizes = {m for d, f, m, _ in found if (d, f) == (data_set, figure)}
        more = f", {n:,} pictures" if len(sizes) > 1 else ""
        titles.append((f"{figure.name} on {data_set}" if len(sets) > 1 else figure.name) + more)
    return titles


def order_of_pairs(names: list[str], columns: list[Column], level: float) -> list[dict[str, Any]]:
    """What is known of the order of each pair of models, as plain values.

    Per column the share of joint draws in which `a` is better; over all columns the share in which
    the order is not the same everywhere ("inversion"), and the verdict: "a" or "b" is decidedly
    better everywhere, "reversed" where columns decide in opposite ways, else "open".
    """
    probabilities = [beats(column.joint) for column in columns]
    # A figure without an error knows no probability, only an order.
    known = all(column.known for column in columns)
    found = []
    for i, j in combinations(range(len(names)), 2):
        signs = [int(column.decided[i, j]) for column in columns]
        ahead = [np.sign(c.joint.values[i] - c.joint.values[j]) for c in columns]
        drawn = np.stack([c.joint.draws[i] - c.joint.draws[j] for c in columns])
        same = (drawn >= 0).all(0) | (drawn <= 0).all(0)  # a tie inverts nothing
        verdict = "open"
        if all(signs) and len(set(signs)) == 1:
            verdict = "a" if signs[0] > 0 else "b"
        elif {1, -1} <= set(signs):
            verdict = "reversed"
        found.append(
            {
                "a": names[i],
                "b": names[j],
                "a_better": [
                    float(p[i, j]) if column.known else None
                    for p, column in zip(probabilities, columns, strict=True)
                ],
                "decided": signs,
                "same_by_value": not {1.0, -1.0} <= set(ahead),  # nor does a tie here
                "inversion": 1.0 - float(same.mean()) if known else None,
                "verdict": verdict,
            }
        )
    return found


def pair_table(names: list[str], columns: list[Column], level: float) -> Table:
    """The test of every pair of models in every column; what is decided rests on it alone."""
    rows = []
    for column in columns:
        for (i, j), one in column.tests.items():
            # In the figure's own direction: a's value minus b's.
            ends = sorted((column.figure.sign * one.low, column.figure.sign * one.high))
            sign = int(column.decided[i, j])
            verdict = names[i] if sign > 0 else names[j] if sign < 0 else "open"
            value = column.figure.sign * one.value
            row = column.name, names[i], names[j], value, *ends, one.adjusted_p_value, verdict
            rows.append(row)
    return Table(
        "Every pair in every column",
        ("column", "a", "b", "a minus b", "low", "high", "adjusted p", "better"),
        tuple(rows),
        f"Intervals hold at once with {level:.0%} over all pairs and columns (Bonferroni); p "
        "values are corrected over all of them after Holm. Pairs without an interval are left out.",
    )


def decided_orders(pairs: list[dict], which: list[int]) -> list[str]:
    """ "a before b" for each pair that is decided the same way in all of some columns."""
    found = []
    for pair in pairs:
        signs = {pair["decided"][k] for k in which}
        if len(signs) == 1 and 0 not in signs:
            first, second = ("a", "b") if signs == {1} else ("b", "a")
            found.append(f"{pair[first]} before {pair[second]}")
    return found
