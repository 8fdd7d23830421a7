"""Yes-or-no questions about a picture and what their answers are worth; called by dsg.py.

A question may have parents, which it presupposes: "is the cat black?" counts only where "is there a
cat?" was answered yes. These graphs are Davidsonian scene graphs (Cho et al. 2024); the questions
of TIFA (Hu et al. 2023) are graphs without parents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from etude.core.errors import UserError


@dataclass(frozen=True)
class Question:
    """A yes-or-no question about a picture; it counts only where every parent was answered yes.

    Attributes:
        id: unique among the questions of a prompt.
        parents: ids of questions that this one presupposes.
    """

    id: str
    text: str
    parents: tuple[str, ...] = ()


class Asked(Protocol):
    """What a scorer needs of a prompt.

    Attributes:
        id: unique in its data set.
        text: the prompt.
        questions: about its pictures, empty where none were made.
    """

    @property
    def id(self) -> str: ...

    @property
    def text(self) -> str: ...

    @property
    def questions(self) -> tuple[Question, ...]: ...


@dataclass(frozen=True)
class Answer:
    """One question as it was answered of one picture.

    Attributes:
        said: the model's words; the probability of yes against no where that decides.
        yes: whether that is a yes.
        counts: whether it is a yes and so are its parents, their parents, and so on.
    """

    question: Question
    said: str
    yes: bool
    counts: bool


def parents_first(questions: Sequence[Question], where: str) -> list[int]:
    """Positions of `questions` in an order that has parents before their children.

    Args:
        where: what has the questions, for messages ("prompt 17").

    Raises:
        UserError: an id comes twice, a parent is not there, or questions presuppose each other.
    """
    place = {question.id: at for at, question in enumerate(questions)}
    if len(place) < len(questions):
        ids = [question.id for question in questions]
        twice = next(one for one in ids if ids.count(one) > 1)
        raise UserError(f"{where} has two questions with the id {twice!r}: rename one")
    for question in questions:
        for parent in question.parents:
            if parent not in place:
                raise UserError(
                    f"question {question.id!r} of {where} has the parent {parent!r}, which is not"
                    " there: add it, or leave the parent out"
                )
    order: list[int] = []
    waiting = list(range(len(questions)))
    while waiting:
        settled = {questions[at].id for at in order}
        ready = [at for at in waiting if settled.issuperset(questions[at].parents)]
        if not ready:
            ids = ", ".join(questions[at].id for at in waiting)
            raise UserError(
                f"questions {ids} of {where} presuppose each other in a circle: take a parent out"
            )
        order += ready
        waiting = [at for at in waiting if at not in ready]
    return order


def counting(questions: Sequence[Question], yes: Sequence[bool], where: str) -> list[bool]:
    """Whether each question counts: answered yes, and every parent counts.

    Raises:
        UserError: as `parents_first`.
    """
    counts: dict[str, bool] = {}
    for at in parents_first(questions, where):
        question = questions[at]
        counts[question.id] = bool(yes[at]) and all(counts[p] for p in question.parents)
    return [counts[question.id] for question in questions]
