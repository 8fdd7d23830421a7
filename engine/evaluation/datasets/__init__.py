"""Data sets of evaluation: real pictures, prompts with groups, or both; one file a data set.

Real pictures and prompts need not belong together picture by picture. A new data set is one file in
this folder, or anywhere, with a class under `@data_set("name")`. Most are lists of items
(items.py); each states the layout of the files that its publisher gives, and refuses files of
another number unless `whole=false` says that a part is meant.
"""

import hashlib
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from etude.core.errors import UserError
from etude.core.registry import Registry
from etude.metrics.alignment.questions import Question

from ..sets import PictureSet


@dataclass(frozen=True)
class Prompt:
    """What one picture, or several, are asked by.

    Attributes:
        id: unique in its data set and stable: seeds of pictures are made from it.
        text: the prompt; "" where a class alone is asked for.
        label: class index, -1 without.
        group: the group that its pictures count towards, "" without.
        questions: for DSG and TIFA; empty without.
    """

    id: str
    text: str
    label: int = -1
    group: str = ""
    questions: tuple[Question, ...] = ()


@dataclass(frozen=True)
class Prompts:
    """The prompts of a data set in their order."""

    name: str
    prompts: tuple[Prompt, ...]
    classes: tuple[str, ...] = ()
    fingerprint: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        ids = [prompt.id for prompt in self.prompts]
        if len(set(ids)) != len(ids):
            twice = next(one for one in ids if ids.count(one) > 1)
            raise ValueError(f"{self.name}: the prompt id {twice!r} is there twice")
        parts = [
            [p.id, p.text, p.label, p.group, [[q.id, q.text, q.parents] for q in p.questions]]
            for p in self.prompts
        ]
        text = json.dumps([parts, self.classes], sort_keys=True)
        object.__setattr__(self, "fingerprint", hashlib.sha256(text.encode()).hexdigest())

    def __len__(self) -> int:
        return len(self.prompts)


class DataSet(Protocol):
    """One data set of evaluation.

    Attributes:
        name: as it is registered.
    """

    name: str

    def pictures(
        self, *, size: int = 0, fit: str = "crop", channels: int = 3, limit: int = 0
    ) -> PictureSet | None:
        """Its real pictures, `limit` of them spread over all (0: all); None for prompts alone."""
        ...

    def prompts(self) -> Prompts | None:
        """Its prompts; None for pictures alone."""
        ...


DATA_SETS: Registry[Callable[..., DataSet]] = Registry(
    "data set", "etude.evaluation.datasets", "etude.data_sets"
)
data_set = DATA_SETS.named


def open_data_set(name: str, folder: str | Path = "", **options: Any) -> DataSet:
    """The data set `name` in `folder`, where its official files lie.

    Args:
        options: the data set's own, as its class says.

    Raises:
        UserError: there is no such data set or option, or its files are missing or wrong.
    """
    made = DATA_SETS.get(name)
    known = [*inspect.signature(made).parameters][1:]
    for option in options:
        if option not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise UserError(f"the data set {name} has no option {option!r}; {has}")
    return made(Path(folder), **options)
