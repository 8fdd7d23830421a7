"""What a recipe is once it is checked: the base of every schema, its identity, its leaves.

A kind's schema lives beside its owner and is found here by name, so that this floor imports nothing
above it. A recipe's identity is the hash of the fields marked as changing results; speed, logging
and storage are left out. Called by `core.recipe` (which loads) and `core.recipe_text` (which
writes); other rooms import these names from `core.recipe`.
"""

import hashlib
import importlib
import json
from collections.abc import Iterator
from enum import Enum
from typing import Any

from pydantic import BaseModel

from .config import Config, option
from .errors import UserError
from .recipe_tree import nearest

KINDS: dict[str, "str | type[Recipe]"] = {
    "autoencoder": "etude.training:AutoencoderRecipe",
    "ldm": "etude.training:LatentDiffusionRecipe",
    "judge": "etude.evaluation.judge:JudgeRecipe",
    "practice": "etude.practice.recipe:PracticeRecipe",
    "theory": "etude.practice.theory_report:TheoryRecipe",
    "extract": "etude.evaluation.plan:ExtractRecipe",
    "evaluate": "etude.evaluation.plan:EvaluateRecipe",
    "plan": "etude.evaluation.planned.recipe:PlanRecipe",
    "study": "etude.study:StudyRecipe",
}
ABSENT = "(absent)"  # stands in `differences` for a field that only the other recipe has


class Expectation(Config):
    """What running a recipe takes and gives; shown by `etude recipes list`."""

    hardware: str = option("", "the hardware the hours were measured on", affects_result=False)
    hours: float | None = option(
        None, "measured time, or null for not measured", unit="hours", affects_result=False, ge=0
    )
    result: str = option("", "the result to expect", affects_result=False)


class Recipe(Config):
    """The fields that every kind of recipe has; the schema of a kind derives from this."""

    kind: str = option(..., "which job this is")
    name: str = option(
        "", "set from the recipe's file name unless given; names the run", affects_result=False
    )
    description: str = option("", "one sentence about the job", affects_result=False)
    seed: int = option(0, "seed of everything random", ge=0, lt=2**32)
    expects: Expectation = option(
        Expectation(), "what the job takes and gives", affects_result=False
    )


def schema(kind: str) -> type[Recipe]:
    """The pydantic model of a kind of recipe; `UserError` when there is no such kind."""
    target = KINDS.get(kind) if isinstance(kind, str) else None
    if target is None:
        near = nearest(str(kind), list(KINDS))
        hint = f"did you mean `{near}`?" if near else f"give one of {', '.join(KINDS)}"
        raise UserError(f"`{kind}` is not a kind of recipe; {hint}")
    if isinstance(target, str):
        module, _, attribute = target.partition(":")
        target = getattr(importlib.import_module(module), attribute)
    return target


def fingerprint(recipe: BaseModel) -> str:
    """SHA-256 (hex) over the fields that change results, at any depth; the identity of a run."""
    content = json.dumps(_identity(recipe), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(content.encode("utf-8")).hexdigest()


def differences(a: BaseModel, b: BaseModel) -> list[tuple[str, Any, Any]]:
    """Leaves where two recipes differ: (dotted field, value in `a`, value in `b`); not `name`."""
    first = {".".join(map(str, path)): value for path, value, _ in leaves(a)}
    second = {".".join(map(str, path)): value for path, value, _ in leaves(b)}
    fields = [*first, *(field for field in second if field not in first)]
    pairs = [(field, first.get(field, ABSENT), second.get(field, ABSENT)) for field in fields]
    return [(field, old, new) for field, old, new in pairs if field != "name" and old != new]


def leaves(recipe: BaseModel) -> Iterator[tuple[tuple, Any, bool]]:
    """(path, value, affects_result) of every leaf in the order of the schema.

    Sections and mappings are entered, and lists that hold sections; other lists are one leaf.
    """
    yield from _leaves(recipe, (), True)


def entries(section: BaseModel) -> list[tuple[str, Any, Any]]:
    """(key as YAML spells it, value, pydantic's field) of every field of a section."""
    return [
        (info.alias or name, getattr(section, name), info)
        for name, info in type(section).model_fields.items()
    ]


def affects_result(info: Any) -> bool:
    """Whether a field's value changes results; true unless its `option` says otherwise."""
    return bool(_extra(info).get("affects_result", True))


def help_of(info: Any) -> str:
    """Help text of a field with its unit in brackets, on one line."""
    unit = _extra(info).get("unit")
    text = " ".join((info.description or "").split())
    return f"{text} [{unit}]".strip() if unit else text


def _extra(info: Any) -> dict:
    return info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}


def _identity(value: Any) -> Any:
    if isinstance(value, BaseModel):
        kept = [(key, item) for key, item, info in entries(value) if affects_result(info)]
        return {key: _identity(item) for key, item in kept}
    if isinstance(value, dict):
        return {str(key): _identity(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_identity(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_identity(item) for item in value), key=repr)
    if isinstance(value, Enum):
        return _identity(value.value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _leaves(value: Any, path: tuple, affects: bool) -> Iterator[tuple[tuple, Any, bool]]:
    if isinstance(value, BaseModel):
        for key, item, info in entries(value):
            yield from _leaves(item, (*path, key), affects and affects_result(info))
    elif isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, (*path, str(key)), affects)
    elif isinstance(value, list | tuple) and any(isinstance(i, BaseModel | dict) for i in value):
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, index), affects)
    else:
        yield path, value, affects
