"""Checked recipes as text: commented YAML for own copies and runs, the JSON schema for editors.

Called by `core.recipe` (copies), `core.run` (the recipe a run keeps) and `etude recipes schema`.
"""

import json
import math
import re
from collections.abc import Iterable
from typing import Any

import yaml
from pydantic import BaseModel

from .errors import UserError
from .recipe_schema import Recipe, entries, help_of, schema
from .recipe_tree import resolve

_PLAIN = re.compile(r"[A-Za-z_./][A-Za-z0-9_./+-]*( [A-Za-z0-9_./+-]+)*$")


def to_yaml(recipe: Recipe, *, comments: bool = True, skip: Iterable[str] = ()) -> str:
    """The recipe with every field, readable by `load_recipe` into an equal recipe.

    Args:
        comments: put help text and unit of each field behind it.
        skip: top-level fields to leave out.
    """
    lines: list[str] = []
    fields = [entry for entry in entries(recipe) if entry[0] not in set(skip)]
    _emit(fields, "", comments, lines)
    return "\n".join(lines) + "\n"


def own_recipe(recipe: Recipe, parent: str, *, standalone: bool) -> str:
    """The text of an own recipe that starts from `recipe`, which YAML calls `parent`."""
    body = to_yaml(recipe, skip=("name", "expects"))
    if standalone:
        return f"# Own recipe, copied from {parent}: every field, none inherited.\n{body}"
    commented = "".join(f"# {line}\n" for line in body.splitlines() if line[:5] != "kind:")
    return (
        f"# Own recipe: everything comes from {parent} but what is written here.\n"
        "# Remove the `# ` before a field, and before the sections around it, to change it.\n"
        f"extends: {scalar(parent)}\n\n{commented}"
    )


def json_schema(kind: str) -> dict:
    """JSON schema of a kind of recipe, for editors: fields, help, ranges, plus `extends`."""
    result = schema(kind).model_json_schema()
    required = [key for key in result.pop("required", []) if key != "name"]
    for definition in result.get("$defs", {}).values():
        definition.pop("required", None)  # a file that extends another may give any part
    result["properties"]["extends"] = {
        "type": "string",
        "description": "a shipped recipe's name or a .yaml file, relative to this file",
    }
    result["anyOf"] = [{"required": ["extends"]}, {"required": required}]
    result["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    result["title"] = f"Etude recipe: {kind}"
    return result


def scalar(value: Any) -> str:
    """A scalar, list or mapping as YAML on one line, read back as the same value."""
    if isinstance(value, BaseModel):
        value = {key: item for key, item, _ in entries(value)}
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, list | tuple | set | frozenset):
        return "[" + ", ".join(scalar(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{scalar(str(k))}: {scalar(v)}" for k, v in value.items()) + "}"
    return _text(str(value))


def _emit(
    fields: list[tuple[str, Any, Any]], indent: str, comments: bool, lines: list[str]
) -> None:
    for key, value, info in fields:
        note = help_of(info) if comments and info is not None else ""
        below = _below(value)
        if below is None:
            line = f"{indent}{scalar(key)}: {scalar(value)}"
            lines.append(f"{line}  # {note}" if note else line)
            continue
        if note:
            lines.append(f"{indent}# {note}")
        lines.append(f"{indent}{scalar(key)}:")
        _emit(below, indent + "  ", comments, lines)


def _below(value: Any) -> list[tuple[str, Any, Any]] | None:
    """The fields of a section or mapping, None for what is written on one line."""
    if isinstance(value, BaseModel):
        return entries(value) or None
    if isinstance(value, dict) and value:
        return [(str(key), item, None) for key, item in value.items()]
    return None


def _number(value: float) -> str:
    if math.isinf(value):
        return "-.inf" if value < 0 else ".inf"
    text = repr(float(value))
    mantissa, e, exponent = text.partition("e")
    return f"{mantissa}.0e{exponent}" if e and "." not in mantissa else text


def _text(text: str) -> str:
    try:
        if _PLAIN.fullmatch(text) and resolve(text) == text:
            return text
    except UserError:
        pass
    quoted = json.dumps(text, ensure_ascii=False).replace("\x7f", "\\x7F").replace("\x85", "\\x85")
    quoted = quoted.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return yaml.reader.Reader.NON_PRINTABLE.sub(_escape, quoted)


def _escape(match: re.Match) -> str:
    return f"\\U{ord(match.group()):08X}"
