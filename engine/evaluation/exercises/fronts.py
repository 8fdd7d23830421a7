"""Points of two or three figures and their Pareto fronts; called by trade_offs.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..results import Row
from .joint import (
    Joint,
    dominance,
    front_decided,
    front_probability,
    joint_draws,
    on_front,
)
from .names import Figure, Subject, joined, subject, subject_names
from .rows import Chosen


@dataclass(frozen=True)
class Cloud:
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


def cloud_of(chosen: Chosen, data_set: str, notes: list[str]) -> Cloud | None:
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
    cloud = Cloud(
        data_set, chosen.figures, subjects, [names[one] for one in subjects], rows, joints
    )
    if not cloud.known:
        notes.append(
            f"{data_set}: some figures have no interval, so statements are about values alone."
        )
    return cloud


def front_of(cloud: Cloud, which: list[int], decided: Sequence[np.ndarray]) -> dict[str, Any]:
    """Membership and dominance of one pair or triple, as plain values.

    Shares of draws tell how close a point is. What is decided comes from tests of pairs: draws
    scatter around values that have scattered once already, and would decide too often.

    Args:
        decided: of every figure of the cloud, (S, S) as of `decisions`, over all fronts at once.
    """
    joints = cloud.oriented(which)
    values = np.stack([joint.values for joint in joints])
    found = {
        "data_set": cloud.data_set,
        "figures": [cloud.figures[m].name for m in which],
        "subjects": cloud.names,
        "on_front": on_front(values).tolist(),
        "decided": None,
        "front_probability": None,
        "dominance": dominance(values[:, :, None]).tolist(),
    }
    if cloud.known:
        draws = np.stack([joint.draws for joint in joints])
        found["decided"] = front_decided([decided[m] for m in which])
        found["front_probability"] = front_probability(draws).tolist()
        found["dominance"] = dominance(draws).tolist()
    return found
