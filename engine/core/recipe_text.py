"""Recipes as text: the catalogue, commented YAML, own copies, and the JSON schema for editors.

Called by `etude recipes list|copy`, by `etude start`, and by runs, which keep their checked recipe.
"""

import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .config import Config
from .errors import UserError
from .files import write_text_atomic
from .recipe import Recipe, field_help, load_recipe, load_tree, schema, shipped
from .recipe_tree import Node, resolve, to_plain

_WIDTH = 100
_PLAIN = re.compile(r"[A-Za-z_./][A-Za-z0-9_./+-]*( [A-Za-z0-9_./+-]+)*$")


@dataclass(frozen=True)
class Card:
    """A shipped recipe in the catalogue; `hours` is text ("not measured" where nobody has)."""

    name: str
    kind: str
    description: str
    data: str
    hardware: str
    hours: str
    result: str


def catalogue() -> list[Card]:
    """A card for every shipped recipe; reads the files alone, so it is quick."""
    return [_card(name) for name in shipped()]


def to_yaml(recipe: Recipe, *, comments: bool = True, skip: Iterable[str] = ()) -> str:
    """The recipe with every field, readable by `load_recipe` into an equal recipe.

    Args:
        comments: put help text and unit of each field behind it.
        skip: top-level fields to leave out.
    """
    lines: list[str] = []
    _emit(recipe, recipe, (), set(skip), comments, lines)
    return "\n".join(lines) + "\n"


def copy(name: str, destination: str | Path, *, standalone: bool = False) -> Path:
    """Write an own recipe from a shipped one (or from another file).

    Args:
        name: what to start from.
        destination: a file ending in `.yaml`, or a folder.
        standalone: write every field and extend nothing; otherwise the copy extends `name` and
            shows every field, with its default, as a comment.
    """
    path = Path(destination)
    if path.is_dir() or str(destination).endswith(os.sep):
        path = path / f"my-{Path(name).stem}.yaml"
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"{path}: a recipe's file name ends in .yaml")
    if path.exists():
        raise UserError(f"{path} exists; give another name or delete it")
    recipe = load_recipe(name)
    write_text_atomic(path, own_recipe(recipe, _parent(name, path), standalone=standalone))
    return path


def own_recipe(recipe: Recipe, parent: str, *, standalone: bool) -> str:
    """The text of an own recipe that starts from `recipe`, which is called `parent` in YAML."""
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
    required = result.pop("required", [])
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
    """A scalar or a list of scalars as YAML on one line, read back as the same value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(scalar(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{scalar(str(k))}: {scalar(v)}" for k, v in value.items()) + "}"
    return _text(str(value))


def _card(name: str) -> Card:
    _, tree = load_tree(name)
    data = to_plain(tree)
    expects = data.get("expects") if isinstance(data.get("expects"), dict) else {}
    hours = expects.get("hours")
    return Card(
        name=name,
        kind=str(data.get("kind", "")),
        description=str(data.get("description", "")),
        data=_data_of(tree),
        hardware=str(expects.get("hardware") or ""),
        hours=f"{hours:g}" if isinstance(hours, int | float) else "not measured",
        result=str(expects.get("result") or ""),
    )


def _data_of(tree: Node) -> str:
    """The first value called `shards` or `data`: what a recipe learns from or measures."""
    for key in ("shards", "data"):
        for path, value in _scalars(tree, ()):
            if path[-1] == key:
                return str(value)
    return ""


def _scalars(node: Node, path: tuple) -> Iterable[tuple[tuple, Any]]:
    if isinstance(node.value, dict):
        for key, child in node.value.items():
            yield from _scalars(child, (*path, key))
    elif path and not isinstance(node.value, list):
        yield path, node.value


def _parent(name: str, path: Path) -> str:
    if not name.endswith((".yaml", ".yml")):
        return name
    return os.path.relpath(Path(name).resolve(), path.resolve().parent)


def _emit(
    recipe: Recipe, value: Any, path: tuple, skip: set[str], comments: bool, lines: list[str]
) -> None:
    indent = "  " * len(path)
    items = (
        [(field, getattr(value, field)) for field in type(value).model_fields]
        if isinstance(value, Config)
        else [(str(key), item) for key, item in value.items()]
    )
    for key, item in items:
        here = (*path, key)
        if not path and key in skip:
            continue
        text, unit = field_help(recipe, here) if comments else ("", "")
        note = f"{text} [{unit}]" if unit and text else text or unit
        if _is_section(item):
            if note:
                lines.append(f"{indent}# {_one_line(note)}"[:_WIDTH])
            lines.append(f"{indent}{scalar(key)}:")
            _emit(recipe, item, here, skip, comments, lines)
            continue
        if isinstance(item, list | tuple) and any(_is_section(entry) for entry in item):
            item = [_plain(entry) for entry in item]
        line = f"{indent}{scalar(key)}: {scalar(_plain(item))}"
        lines.append(f"{line}  # {_one_line(note)}" if note else line)


def _is_section(value: Any) -> bool:
    return isinstance(value, Config) or (isinstance(value, dict) and bool(value))


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, Config) else value


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _number(value: float) -> str:
    if math.isinf(value):
        return "-.inf" if value < 0 else ".inf"
    text = repr(value)
    mantissa, e, exponent = text.partition("e")
    return f"{mantissa}.0e{exponent}" if e and "." not in mantissa else text


def _text(text: str) -> str:
    try:
        if _PLAIN.match(text) and resolve(text) == text:
            return text
    except UserError:
        pass
    quoted = json.dumps(text, ensure_ascii=False)
    return yaml.reader.Reader.NON_PRINTABLE.sub(_escape, quoted.replace("\x7f", "\\x7F")).replace(
        "\x85", "\\x85"
    )


def _escape(match: re.Match) -> str:
    return f"\\U{ord(match.group()):08X}"
