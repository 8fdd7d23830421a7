"""Which candidates go on after few pictures; called by running.py.

The rows that decide are marked `selected` in the table and enter no reported figure: who is chosen
for a low value has had luck, so its value is drawn again from other seeds.
"""

from collections.abc import Sequence

import numpy as np

from etude.core.errors import UserError

from ..results import Row
from .candidates import Candidate
from .recipe import ScreenConfig


def promoted(
    found: Sequence[Candidate], rows: Sequence[Row], screen: ScreenConfig
) -> list[Candidate]:
    """The candidates that go on, in their order: on any data set the best, or on the front.

    Raises:
        UserError: the plan measures no such figure.
    """
    check_names(rows, screen)
    kept: set[int] = set()
    for data_set in sorted({row.data_set for row in rows}):
        values = np.array(
            [
                [_value(candidate, rows, data_set, name) for name in screen.metrics]
                for candidate in found
            ]
        )
        if len(screen.metrics) == 1:
            kept |= set(np.argsort(values[:, 0], kind="stable")[: screen.keep].tolist())
        else:
            kept |= {i for i, one in enumerate(values) if not _dominated(one, values)}
    return [candidate for i, candidate in enumerate(found) if i in kept]


def check_names(rows: Sequence[Row], screen: ScreenConfig) -> None:
    """Raise where the figures of a data set are not those that the screen asks for."""
    for data_set in sorted({row.data_set for row in rows}):
        here = [row for row in rows if row.data_set == data_set and not row.group]
        for name in screen.metrics:
            if not _named(here, name):
                known = ", ".join(sorted({f"{row.metric}@{row.features}" for row in here}))
                raise UserError(f"screen.metrics: there is no figure {name!r}; choose of {known}")


def _named(rows: Sequence[Row], name: str) -> list[Row]:
    """The rows of a figure, named alone or with its features as FIGURE@FEATURES."""
    figure, _, features = name.partition("@")
    return [row for row in rows if row.metric == figure and features in ("", row.features)]


def _value(candidate: Candidate, rows: Sequence[Row], data_set: str, name: str) -> float:
    """A candidate's figure, so that lower is better; infinite where it has none."""
    checkpoint = "" if candidate.checkpoint is None else str(candidate.checkpoint)
    here = [row for row in rows if row.data_set == data_set and not row.group]
    mine = [
        row
        for row in _named(here, name)
        if (row.model, row.checkpoint, row.guidance, row.training_seed)
        == (candidate.model, checkpoint, candidate.guidance, candidate.config.training_seed)
    ]
    if len({row.protocol for row in mine}) > 1:
        raise UserError(
            f"screen.metrics: {name} of {candidate.title} has several protocols in this plan; give"
            " the metric once"
        )
    if not mine or not np.isfinite(mine[0].value):
        return float("inf")
    return mine[0].value if mine[0].better == "lower" else -mine[0].value


def _dominated(one: np.ndarray, others: np.ndarray) -> bool:
    """Whether another candidate is nowhere worse and somewhere better."""
    return bool(((others <= one).all(1) & (others < one).any(1)).any())
