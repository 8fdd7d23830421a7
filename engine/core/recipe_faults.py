"""From pydantic's list of errors to the one sentence a person needs; called by `core.recipe`.

The sentence names the place where the value was written, the field as YAML spells it, what is wrong
and, for an unknown field, the nearest one that exists there.
"""

import json
import types
import typing
from typing import Any

from pydantic import BaseModel, ValidationError

from .recipe_tree import Node, find, nearest, to_plain


def explain(error: ValidationError, tree: Node, model: type[BaseModel]) -> str:
    """One sentence for the most telling of pydantic's errors: place, field, remedy."""
    faults = []
    for fault in error.errors(include_url=False, include_input=False):
        node, taken = find(tree, fault["loc"])
        faults.append((fault["type"] == "extra_forbidden", len(taken), fault, node, taken))
    # A value that fits no member of a union gives one error per member: the deepest says most.
    _, _, fault, node, taken = max(faults, key=lambda item: item[:2])
    distinct = {item[4] for item in faults}
    more = f" (and {len(distinct) - 1} more)" if len(distinct) > 1 else ""
    if fault["type"] == "extra_forbidden":
        return f"{node.place}: {_unknown(model, tree, taken)}{more}"
    if fault["type"] == "missing":
        path = (*taken, fault["loc"][-1])
        wanted = ".".join(map(str, path))
        return f"{node.place}: `{wanted}` is missing; add it{_about(model, tree, path)}{more}"
    if fault["type"] == "union_tag_invalid":
        tag, known = fault["ctx"]["tag"], fault["ctx"]["expected_tags"].replace("'", "")
        near = nearest(tag, known.split(", "))
        hint = f"did you mean {near}?" if near else f"give one of {known}"
        return f"{node.place}: `{'.'.join(map(str, taken))}` cannot be {tag!r}; {hint}"
    reason = fault["msg"].removeprefix("Value error, ").removeprefix("Input ").rstrip(".")
    if isinstance(node.value, dict) and not fault["type"].endswith("_type"):
        field = ".".join(map(str, taken))
        return f"{node.place}: {f'`{field}`: ' if field else ''}{reason}{more}"
    shown = json.dumps(to_plain(node), default=str)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return f"{node.place}: `{'.'.join(map(str, taken))}` is {shown}: {reason}{more}"


def _unknown(model: type[BaseModel], tree: Node, taken: tuple) -> str:
    *parents, key = taken
    owners = _models_at(model, tree, tuple(parents))
    names = sorted({info.alias or n for m in owners for n, info in m.model_fields.items()})
    where = f" in `{'.'.join(map(str, parents))}`" if parents else ""
    near = nearest(str(key), names)
    hint = f"did you mean `{near}`?" if near else f"the fields are {', '.join(names)}"
    return f"`{key}` is not a field{where}; {hint}"


def _about(model: type[BaseModel], tree: Node, path: tuple) -> str:
    *parents, key = path
    for owner in _models_at(model, tree, tuple(parents)):
        info = _field(owner, str(key))
        if info is not None and info.description:
            return f" ({info.description})"
    return ""


def _models_at(model: type[BaseModel], tree: Node, path: tuple) -> list[type[BaseModel]]:
    """The sections a mapping at `path` may be, less those its literal fields rule out."""
    annotations: list[Any] = [model]
    for step in path:
        annotations = [inner for outer in annotations for inner in _inside(outer, step)]
    models = [m for a in annotations for m in _members(a) if _is_model(m)]
    node, _ = find(tree, path)
    given = node.value if isinstance(node.value, dict) else {}
    fitting = [m for m in models if all(_fits(m, key, child) for key, child in given.items())]
    return fitting or models


def _field(model: type[BaseModel], key: str) -> Any:
    """The field that YAML spells `key`, or None."""
    return next((i for n, i in model.model_fields.items() if (i.alias or n) == key), None)


def _fits(model: type[BaseModel], key: str, child: Node) -> bool:
    info = _field(model, key)
    if info is None or typing.get_origin(info.annotation) is not typing.Literal:
        return True
    return child.value in typing.get_args(info.annotation)


def _inside(annotation: Any, step: Any) -> list[Any]:
    found: list[Any] = []
    for member in _members(annotation):
        arguments = typing.get_args(member)
        if _is_model(member):
            info = _field(member, str(step))
            found += [info.annotation] if info else []
        elif typing.get_origin(member) is dict and len(arguments) == 2:
            found.append(arguments[1])
        else:
            found += [a for a in arguments if a is not Ellipsis]
    return found


def _members(annotation: Any) -> list[Any]:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _members(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [m for a in typing.get_args(annotation) for m in _members(a)]
    return [annotation]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
