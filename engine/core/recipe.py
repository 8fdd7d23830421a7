"""Recipes: from YAML and overrides to a checked, immutable description of one job.

A recipe is a mapping with a `kind`; each kind has its schema beside its owner, found here by name
so that this floor imports nothing above it. Files may extend others (`extends:`), mappings are
merged key by key, lists are replaced, and dotted overrides (`optim.lr=1e-4`) come last. Values are
checked strictly: text is not taken for a number, nor 1.5 for an integer. Every fault is one
`UserError` with file and line. Called by the command line, runs, studies and `etude.run`.
"""

import hashlib
import importlib
import importlib.resources
import json
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from .config import Config, option
from .errors import UserError
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

KINDS: dict[str, str | type["Recipe"]] = {
    "autoencoder": "etude.training:AutoencoderRecipe",
    "ldm": "etude.training:LatentDiffusionRecipe",
    "practice": "etude.practice.rounds:PracticeRecipe",
    "extract": "etude.evaluation.plan:ExtractRecipe",
    "evaluate": "etude.evaluation.plan:EvaluateRecipe",
    "study": "etude.study:StudyRecipe",
}
ABSENT = "(absent)"  # stands in `differences` for a field that only the other recipe has
_MISSING = object()


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
    """The checked recipe of plain values; `name` names the run."""
    if not isinstance(data, dict):
        raise UserError(f"recipe {name or '(dict)'}: expected a mapping, got {_kind_of(data)}")
    return _validate(from_plain(data, f"recipe {name}" if name else "the recipe"), name)


def sources(name_or_path: str | Path, overrides: Sequence[str] = ()) -> list[Origin]:
    """Every leaf of the checked recipe with the place its value came from."""
    name, tree = load_tree(name_or_path, overrides)
    recipe = _validate(tree, name)
    result = []
    for path, value, affects in leaves(recipe):
        node, taken = find(tree, path)
        given = len(taken) == len(path) or not isinstance(node.value, dict)
        source = str(node.place) if given and taken else "default"
        if path == ("name",) and "name" not in tree.value:
            source = "the recipe's file name"
        result.append(Origin(".".join(map(str, path)), value, source, affects))
    return result


def fingerprint(recipe: BaseModel) -> str:
    """SHA-256 (hex) over the fields that change results, at any depth; the identity of a run."""
    content = json.dumps(_identity(recipe), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(content.encode("utf-8")).hexdigest()


def differences(a: BaseModel, b: BaseModel) -> list[tuple[str, Any, Any]]:
    """Leaves where two recipes differ: (dotted field, value in `a`, value in `b`)."""
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


def schema(kind: str) -> type[Recipe]:
    """The pydantic model of a kind of recipe."""
    target = KINDS.get(kind) if isinstance(kind, str) else None
    if target is None:
        near = nearest(str(kind), list(KINDS))
        hint = f"did you mean `{near}`?" if near else f"give one of {', '.join(KINDS)}"
        raise UserError(f"`{kind}` is not a kind of recipe; {hint}")
    if isinstance(target, str):
        module, _, attribute = target.partition(":")
        target = getattr(importlib.import_module(module), attribute)
    return target


def field_help(recipe: BaseModel, path: tuple) -> tuple[str, str]:
    """(help text, unit) of the field at `path`; empty where the schema gives none."""
    owner: Any = recipe
    for step in path[:-1]:
        owner = getattr(owner, step) if isinstance(owner, BaseModel) else _item(owner, step)
    if not isinstance(owner, BaseModel):
        return "", ""
    info = type(owner).model_fields[path[-1]]
    extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
    return info.description or "", str(extra.get("unit", ""))


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


def shipped_root() -> Traversable:
    """The folder of the recipes that come with Etude."""
    return importlib.resources.files("etude.recipes")


def shipped() -> list[str]:
    """Names of the recipes that come with Etude, such as `ldm/digits`."""
    return sorted(_walk(shipped_root(), ""))


def _walk(folder: Traversable, prefix: str) -> Iterator[str]:
    for entry in folder.iterdir():
        if entry.name.startswith((".", "_")):  # `_base.yaml` is for extending only
            continue
        if entry.is_dir():
            yield from _walk(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".yaml") and prefix:
            yield prefix + entry.name.removesuffix(".yaml")


def _locate(name: str, beside: Path | None = None) -> tuple[str, Path | Traversable]:
    """(recipe name, file) of a shipped name or a path, relative to the folder `beside`."""
    path = Path(name) if beside is None else beside / name
    if name.endswith((".yaml", ".yml")):
        if not path.is_file():
            raise UserError(f"recipe file {path} does not exist; `etude recipes list` shows names")
        return path.stem, path
    parts = [part for part in name.split("/") if part]
    if parts and ".." not in parts and not any("\0" in part for part in parts):
        file = shipped_root().joinpath(*parts[:-1], parts[-1] + ".yaml")
        if file.is_file():
            return "/".join(parts), file
    near = nearest(name, shipped())
    hint = f"did you mean `{near}`?" if near else "`etude recipes list` shows the names"
    raise UserError(f"there is no recipe `{name}`; {hint} (a file's name ends in .yaml)")


def _read(source: Path | Traversable, chain: tuple[str, ...]) -> Node:
    """The tree of a file with everything that it extends; `chain` holds the files being read."""
    identity = str(source.resolve()) if isinstance(source, Path) else str(source)
    origin = str(source)
    if isinstance(source, Path):
        origin = _short(source)
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
        beside = source.parent if isinstance(source, Path) else None
        _, parent_source = _locate(parent.value, beside)
    except UserError as error:
        raise UserError(f"{parent.place}: {error}") from None
    base = _read(parent_source, (*chain, identity))
    inherited = {key: node for key, node in base.value.items() if key != "name"}
    return merge(Node(inherited, base.place), Node(values, tree.place))


def _short(path: Path) -> str:
    """A path as the person would type it: relative to the current folder where it lies inside."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)


def _validate(tree: Node, name: str) -> Recipe:
    kind = tree.value.get("kind")
    if kind is None:
        raise UserError(f"{tree.place}: `kind` is missing; add `kind:` with one of "
                        f"{', '.join(KINDS)}")  # fmt: skip
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


def explain(error: ValidationError, tree: Node, model: type[BaseModel]) -> str:
    """One sentence for the most telling of pydantic's errors: place, field, remedy."""
    faults = []
    for fault in error.errors(include_url=False, include_input=False):
        node, taken = find(tree, fault["loc"])
        faults.append((fault["type"] == "extra_forbidden", len(taken), fault, node, taken))
    # A value that fits no member of a union gives one error per member: the deepest says most.
    _, _, fault, node, taken = max(faults, key=lambda item: (item[0], item[1]))
    field = ".".join(map(str, taken)) or model.__name__
    distinct = {item[4] for item in faults}
    more = f" (and {len(distinct) - 1} more)" if len(distinct) > 1 else ""
    if fault["type"] == "extra_forbidden":
        return f"{node.place}: {_unknown(model, tree, taken)}{more}"
    if fault["type"] == "missing":
        wanted = ".".join([*map(str, taken), str(fault["loc"][-1])])
        return f"{node.place}: `{wanted}` is missing; add it{_about(model, tree, wanted)}{more}"
    reason = fault["msg"].removeprefix("Value error, ").removeprefix("Input ").rstrip(".")
    shown = json.dumps(to_plain(node), default=str)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return f"{node.place}: `{field}` is {shown}: {reason}{more}"


def _unknown(model: type[BaseModel], tree: Node, taken: tuple) -> str:
    *parents, key = taken
    owners = _models_at(model, tree, tuple(parents))
    names = sorted({field for owner in owners for field in owner.model_fields})
    where = f" in `{'.'.join(map(str, parents))}`" if parents else ""
    near = nearest(str(key), names)
    hint = f"did you mean `{near}`?" if near else f"the fields are {', '.join(names)}"
    return f"`{key}` is not a field{where}; {hint}"


def _about(model: type[BaseModel], tree: Node, dotted: str) -> str:
    *parents, key = dotted.split(".")
    for owner in _models_at(model, tree, tuple(parents)):
        if key in owner.model_fields and owner.model_fields[key].description:
            return f" ({owner.model_fields[key].description})"
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


def _fits(model: type[BaseModel], key: str, child: Node) -> bool:
    info = model.model_fields.get(key)
    if info is None or typing.get_origin(info.annotation) is not typing.Literal:
        return True
    return child.value in typing.get_args(info.annotation)


def _inside(annotation: Any, step: Any) -> list[Any]:
    found: list[Any] = []
    for member in _members(annotation):
        arguments = typing.get_args(member)
        if _is_model(member):
            info = member.model_fields.get(str(step))
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


def _affects(info: Any) -> bool:
    extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
    return bool(extra.get("affects_result", True))


def _identity(value: Any) -> Any:
    if isinstance(value, BaseModel):
        fields = type(value).model_fields.items()
        return {name: _identity(getattr(value, name)) for name, info in fields if _affects(info)}
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
        for name, info in type(value).model_fields.items():
            yield from _leaves(getattr(value, name), (*path, name), affects and _affects(info))
    elif isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, (*path, str(key)), affects)
    elif isinstance(value, list | tuple) and any(isinstance(i, BaseModel | dict) for i in value):
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, index), affects)
    else:
        yield path, value, affects


def _item(owner: Any, step: Any) -> Any:
    if not isinstance(owner, dict):
        return owner[step]
    return next(item for key, item in owner.items() if str(key) == step)


def _kind_of(value: Any) -> str:
    return type(value).__name__
