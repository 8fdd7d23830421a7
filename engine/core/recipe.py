"""Recipes: from YAML and overrides to a checked, immutable description of one job.

A recipe is a mapping with a `kind`. Files may extend others (`extends:` with a shipped name or a
path relative to the file); mappings are merged key by key, lists are replaced, and dotted overrides
(`optim.lr=1e-4`, read as YAML 1.2) come last. Values are checked strictly: text is not taken for a
number, nor 1.5 for an integer. Every fault is one `UserError` with file and line. Called by the
command line, runs, studies and `etude.run`.
"""

import importlib.resources
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .errors import UserError
from .files import write_text_atomic
from .recipe_faults import explain
from .recipe_schema import (
    ABSENT,
    KINDS,
    Expectation,
    Recipe,
    differences,
    fingerprint,
    leaves,
    schema,
)
from .recipe_text import json_schema, own_recipe, to_yaml
from .recipe_tree import (
    Node,
    find,
    from_plain,
    lay,
    merge,
    nearest,
    parse,
    parse_override,
    to_plain,
)

__all__ = [
    "ABSENT",
    "KINDS",
    "Expectation",
    "Origin",
    "Recipe",
    "copy_recipe",
    "describe_shipped",
    "differences",
    "fingerprint",
    "json_schema",
    "leaves",
    "load_recipe",
    "origins",
    "recipe_from_dict",
    "schema",
    "shipped",
    "sources",
    "to_yaml",
]


@dataclass(frozen=True)
class Origin:
    """Where the value of one leaf of a recipe came from.

    Attributes:
        field: dotted path.
        value: the checked value.
        source: `file:line`, `override ...`, or `default`.
        affects_result: whether changing it makes another run.
    """

    field: str
    value: Any
    source: str
    affects_result: bool


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The checked recipe of a shipped name (`ldm/digits`) or a YAML file, with overrides applied.

    Raises:
        UserError: no such recipe, not YAML, an unknown field, a value out of its range.
    """
    name, tree = load_tree(name_or_path, overrides)
    return _validate(tree, name)


def recipe_from_dict(data: dict, name: str = "") -> Recipe:
    """The checked recipe of plain values (dicts, lists, scalars, paths); `name` names the run."""
    origin = f"recipe {name}" if name else "the recipe"
    if not isinstance(data, dict):
        raise UserError(f"{origin}: expected a mapping of fields, got {type(data).__name__}")
    return _validate(from_plain(data, origin), name)


def origins(name_or_path: str | Path, overrides: Sequence[str] = ()) -> list[Origin]:
    """Every leaf of the checked recipe with the place its value came from."""
    name, tree = load_tree(name_or_path, overrides)
    result = []
    for path, value, affects in leaves(_validate(tree, name)):
        node, taken = find(tree, path)
        given = bool(taken) and (len(taken) == len(path) or not isinstance(node.value, dict))
        source = str(node.place) if given else "default"
        if path == ("name",) and "name" not in tree.value:
            source = "the recipe's file name"
        result.append(Origin(".".join(map(str, path)), value, source, affects))
    return result


def sources(name_or_path: str | Path, overrides: Sequence[str] = ()) -> list[list[str]]:
    """Rows of (field, value, where it came from) for `etude recipes show`."""
    return [[o.field, str(o.value), o.source] for o in origins(name_or_path, overrides)]


def shipped() -> list[str]:
    """Names of the recipes that come with Etude, such as `ldm/digits`."""
    return sorted(_walk(importlib.resources.files("etude.recipes"), ""))


def describe_shipped() -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the shipped recipes; reads the files alone, so it is quick."""
    columns = ["recipe", "task", "data", "hardware", "hours", "expected result"]
    return columns, [[name, *_card(to_plain(load_tree(name)[1]))] for name in shipped()]


def copy_recipe(name: str, destination: str | Path, *, standalone: bool = False) -> Path:
    """Write an own recipe from a shipped one, or from another file.

    Args:
        name: what to start from.
        destination: a file ending in `.yaml`, or a folder.
        standalone: write every field and extend nothing; otherwise the copy extends `name` and
            shows every field, with its value there, as a comment.
    """
    path = Path(destination)
    if path.is_dir() or str(destination).endswith(os.sep):
        path = path / f"my-{Path(name).stem}.yaml"
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"{path}: a recipe's file name ends in .yaml")
    if path.exists():
        raise UserError(f"{path} exists; give another name or delete it")
    recipe, parent = load_recipe(name), name
    if name.endswith((".yaml", ".yml")):
        parent = os.path.relpath(Path(name).resolve(), path.resolve().parent)
    try:
        write_text_atomic(path, own_recipe(recipe, parent, standalone=standalone))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    return path


def load_tree(name_or_path: str | Path, overrides: Sequence[str] = ()) -> tuple[str, Node]:
    """The name and the merged, unchecked tree of a recipe."""
    name, source = _locate(str(name_or_path))
    tree = _read(source, ())
    for override in overrides:
        over = parse_override(override)
        if "extends" in over.value:
            raise UserError(f"{over.place}: `extends` belongs in a recipe file")
        tree = lay(tree, over)
    return name, tree


def _walk(folder: Traversable, prefix: str) -> Iterator[str]:
    for entry in folder.iterdir():
        if entry.name.startswith((".", "_")):  # `_base.yaml` is for extending only
            continue
        if entry.is_dir():
            yield from _walk(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".yaml") and prefix:
            yield prefix + entry.name.removesuffix(".yaml")


def _card(data: dict) -> list[str]:
    """Task, data, hardware, hours and expected result of an unchecked recipe."""
    expects = data.get("expects") if isinstance(data.get("expects"), dict) else {}
    section = data.get("data")
    read = section.get("shards") if isinstance(section, dict) else data.get("real", section)
    hours = expects.get("hours")
    return [
        f"{data.get('kind', '')}: {data.get('description', '')}",
        str(read or ""),
        str(expects.get("hardware") or ""),
        "not measured" if hours is None else f"{hours:g}" if hours != "" else "",
        str(expects.get("result") or ""),
    ]


def _locate(name: str, beside: Path | None = None) -> tuple[str, Path | Traversable]:
    """(recipe name, file) of a shipped name or a path, relative to the folder `beside`."""
    if "\0" in name:
        raise UserError(f"{name!r} is not the name of a recipe")
    path = Path(name) if beside is None else beside / name
    if name.endswith((".yaml", ".yml")):
        if not path.is_file():
            raise UserError(f"recipe file {path} does not exist; `etude recipes list` shows names")
        return path.stem, path
    parts = [part for part in name.split("/") if part]
    if parts and ".." not in parts:
        root = importlib.resources.files("etude.recipes")
        file = root.joinpath(*parts[:-1], parts[-1] + ".yaml")
        try:
            if file.is_file():
                return "/".join(parts), file
        except OSError:  # a name too long for the file system
            pass
    near = nearest(name, shipped())
    hint = f"did you mean `{near}`?" if near else "`etude recipes list` shows the names"
    raise UserError(f"there is no recipe `{name[:200]}`; {hint} (a file's name ends in .yaml)")


def _read(source: Path | Traversable, chain: tuple[str, ...]) -> Node:
    """The tree of a file with everything that it extends; `chain` holds the files being read."""
    identity = str(source.resolve()) if isinstance(source, Path) else str(source)
    origin = _short(source) if isinstance(source, Path) else str(source)
    if identity in chain:
        files = " -> ".join([*chain[chain.index(identity) :], identity])
        raise UserError(f"{origin}: `extends` goes round in a circle: {files}")
    try:
        text = source.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{origin}: not UTF-8 text at byte {error.start}") from None
    except OSError as error:
        raise UserError(f"{origin}: cannot be read: {error.strerror}") from None
    tree = parse(text, origin)
    if not isinstance(tree.value, dict):
        raise UserError(f"{tree.place}: a recipe is a mapping; begin with `kind: ldm`")
    if "extends" not in tree.value:
        return tree
    values = dict(tree.value)
    parent = values.pop("extends")
    if not isinstance(parent.value, str) or not parent.value:
        raise UserError(f"{parent.place}: `extends` takes a recipe's name or a .yaml file")
    try:
        _, parent_source = _locate(
            parent.value, source.parent if isinstance(source, Path) else None
        )
    except UserError as error:
        raise UserError(f"{parent.place}: {error}") from None
    base = _read(parent_source, (*chain, identity))
    inherited = {key: node for key, node in base.value.items() if key != "name"}
    return merge(Node(inherited, base.place), Node(values, tree.place))


def _short(path: Path) -> str:
    """A file as the person would type it: a shipped name, or relative to the current folder."""
    try:
        shipped_root = Path(str(importlib.resources.files("etude.recipes"))).resolve()
        if path.resolve().is_relative_to(shipped_root):
            return path.resolve().relative_to(shipped_root).with_suffix("").as_posix()
        return str(path.resolve().relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)


def _validate(tree: Node, name: str) -> Recipe:
    kind = tree.value.get("kind")
    if kind is None:
        kinds = ", ".join(KINDS)
        raise UserError(f"{tree.place}: `kind` is missing; add `kind:` with one of {kinds}")
    try:
        model = schema(kind.value)
    except UserError as error:
        raise UserError(f"{kind.place}: {error}") from None
    data = to_plain(tree)
    data.setdefault("name", name)
    try:
        # JSON mode is strict about types and still takes lists for tuples and text for paths.
        return model.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise UserError(explain(error, tree, model)) from None
    except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
        # A schema's own check met a value of a type it did not expect.
        raise UserError(f"{tree.place}: a value has the wrong type or size: {error}") from error
