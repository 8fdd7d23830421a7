"""YAML as a tree that remembers where every value was written; read by `core.recipe` alone.

Scalars follow YAML 1.2 rather than PyYAML's 1.1: `1e-4` and `.5` are numbers, `no`, `on` and `1:30`
are text, only `true` and `false` are booleans, and a power of ten without a fraction (`2e6`) is an
integer. Duplicate keys, foreign tags and several documents are refused. `!replace` before a mapping
makes it take the place of the inherited one instead of being merged into it.
"""

import contextlib
import json
import math
import re
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.parser import Parser
from yaml.reader import Reader
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from .errors import UserError

_CORE = "tag:yaml.org,2002:"
_MOST_NODES = 20_000  # aliases can otherwise expand without bound
_DEEPEST = 50
_INTEGER = re.compile(r"[-+]?[0-9][0-9_]*$")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?$")
_POWER = re.compile(r"([-+]?[0-9]+)[eE]\+?([0-9]+)$")


@dataclass(frozen=True)
class Place:
    """Where something was written: a file with a line, or an override."""

    origin: str
    line: int | None = None

    def __str__(self) -> str:
        return self.origin if self.line is None else f"{self.origin}:{self.line}"


@dataclass(frozen=True)
class Node:
    """A value of the tree.

    Attributes:
        value: a scalar, a list of nodes, or a dict from text to nodes.
        place: where the value was written.
        replaces: a mapping that takes the place of an inherited one.
    """

    value: Any
    place: Place
    replaces: bool = False


class _Loader(Reader, Scanner, Parser, Composer, BaseResolver):
    """PyYAML up to the composed nodes, with no implicit types: scalars are resolved below."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        BaseResolver.__init__(self)


def parse(text: str, origin: str) -> Node:
    """The tree of one YAML document; `UserError` names origin and line of the first fault."""
    try:
        loader = _Loader(text)
        composed = loader.get_single_node()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        place = Place(origin, mark.line + 1 if mark else None)
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or "bad text"
        raise UserError(f"{place}: this is not YAML: {reason}") from None
    except RecursionError:
        raise UserError(f"{origin}: nested too deeply; at most {_DEEPEST} levels") from None
    except (ValueError, OverflowError) as error:  # impossible \U escapes
        raise UserError(f"{origin}: this is not YAML: {error}") from None
    if composed is None:
        return Node(None, Place(origin, 1))
    return _Builder(origin).build(composed, 0)


class _Builder:
    def __init__(self, origin: str) -> None:
        self.origin, self.count = origin, 0

    def place(self, node: yaml.Node) -> Place:
        return Place(self.origin, node.start_mark.line + 1)

    def build(self, node: yaml.Node, depth: int) -> Node:
        self.count += 1
        place = self.place(node)
        if self.count > _MOST_NODES:
            raise UserError(f"{place}: more than {_MOST_NODES} values; are aliases nested?")
        if depth > _DEEPEST:
            raise UserError(f"{place}: nested too deeply; at most {_DEEPEST} levels")
        if isinstance(node, yaml.MappingNode):
            self.require_tag(node, ("map",))
            return Node(self.mapping(node, depth), place, replaces=node.tag == "!replace")
        if isinstance(node, yaml.SequenceNode):
            self.require_tag(node, ("seq",))
            return Node([self.build(item, depth + 1) for item in node.value], place)
        return Node(self.scalar(node), place)

    def mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Node]:
        result: dict[str, Node] = {}
        for key_node, value_node in node.value:
            place = self.place(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                raise UserError(f"{place}: a key must be plain text; write `key: value`")
            key = key_node.value
            if key in result:
                raise UserError(
                    f"{place}: `{key}` is given twice (first on line {result[key].place.line}); "
                    "remove one of them"
                )
            if key == "<<":
                raise UserError(f"{place}: `<<` is not supported; write `extends:` instead")
            built = self.build(value_node, depth + 1)
            result[key] = replace(built, place=place)
        return result

    def scalar(self, node: yaml.ScalarNode) -> Any:
        self.require_tag(node, ("str", "int", "float", "bool", "null"))
        explicit_text = node.tag == _CORE + "str" and node.style is None
        if any("\ud800" <= character <= "\udfff" for character in node.value):
            raise UserError(f"{self.place(node)}: half a character (a surrogate) in text")
        if node.style is not None or (explicit_text and self.tagged(node)):
            return node.value
        try:
            return resolve(node.value)
        except UserError as error:
            raise UserError(f"{self.place(node)}: {error}") from None

    @staticmethod
    def tagged(node: yaml.ScalarNode) -> bool:
        start = node.start_mark
        return start.buffer is not None and start.buffer[start.pointer : start.pointer + 1] == "!"

    def require_tag(self, node: yaml.Node, allowed: tuple[str, ...]) -> None:
        known = {_CORE + name for name in allowed} | ({"!replace"} if "map" in allowed else set())
        if node.tag not in known:
            raise UserError(
                f"{self.place(node)}: the tag {node.tag} is not supported; remove it"
                + (" (`!replace` goes before a mapping)" if node.tag == "!replace" else "")
            )


def resolve(text: str) -> Any:
    """The value of an unquoted scalar: null, boolean, integer, number or text.

    Raises:
        UserError: it reads as a number that a recipe cannot hold (NaN, beyond 64-bit floats).
    """
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return text.lower() == "true"
    if text.lower() in (".inf", "+.inf", "-.inf"):
        return -math.inf if text[0] == "-" else math.inf
    if text.lower() == ".nan":
        raise UserError("a recipe cannot hold not-a-number; give a number")
    if len(text) > 100:
        return text
    if _INTEGER.match(text):
        return int(text.replace("_", ""))
    power = _POWER.match(text)
    if power and int(power[2]) <= 18:
        return int(power[1]) * 10 ** int(power[2])
    if _FLOAT.match(text):
        number = float(text.replace("_", ""))
        if math.isinf(number):
            raise UserError(f"{text} is too large for a number; write .inf for no limit")
        return number
    return text


def merge(base: Node, over: Node) -> Node:
    """`over` laid on `base`: mappings merge key by key, everything else is replaced."""
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)) or over.replaces:
        return over
    merged = dict(base.value)
    for key, child in over.value.items():
        merged[key] = merge(merged[key], child) if key in merged else child
    return Node(merged, over.place)


def parse_override(text: str) -> Node:
    """The tree of `a.b=VALUE`, VALUE read as YAML; ready to be laid on a recipe with `lay`."""
    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise UserError(f"override `{text}`: write field=value, for example optim.lr=1e-4")
    place = Place(f"override {text}")
    if value.startswith('"'):  # as JSON where it is: YAML has no pairs of \u escapes
        with contextlib.suppress(ValueError):
            return _chain(keys, Node(json.loads(value), place), place)
    return _chain(keys, _relocate(parse(value, f"override {text}"), place), place)


def lay(base: Node, over: Node) -> Node:
    """Like `merge`, but keys of `over` reach into the lists of `base`: an entry's number, its
    `name`, or several of them with commas between.
    """
    if isinstance(base.value, list) and isinstance(over.value, dict):
        items = list(base.value)
        for keys, child in over.value.items():
            for key in keys.split(","):
                index = _entry(items, key, over.place)
                items[index] = lay(items[index], child)
        return Node(items, base.place)
    if isinstance(base.value, dict) and isinstance(over.value, dict) and not over.replaces:
        merged = dict(base.value)
        for key, child in over.value.items():
            merged[key] = lay(merged[key], child) if key in merged else child
        return Node(merged, base.place)
    return over


def _entry(items: list[Node], key: str, place: Place) -> int:
    """The number of a list's entry that `key` means."""
    entries = [item.value for item in items]
    names = [str(e["name"].value) for e in entries if isinstance(e, dict) and "name" in e]
    if len(names) == len(items) and key in names:
        return names.index(key)
    if key.isdecimal() and int(key) < len(items):
        return int(key)
    known = f"use 0 to {len(items) - 1}" if items else "give the whole list"
    if names:
        near = nearest(key, names)
        known = f"did you mean `{near}`?" if near else f"give one of {', '.join(names)}"
    raise UserError(
        f"{place}: `{key}` is not an entry of a list with {len(items)} entries; {known}"
    )


def from_plain(value: Any, origin: str) -> Node:
    """The tree of plain Python values (dicts, lists, scalars, paths), all placed at `origin`."""
    place = Place(origin)
    if isinstance(value, dict):
        return Node({str(key): from_plain(item, origin) for key, item in value.items()}, place)
    if isinstance(value, list | tuple):
        return Node([from_plain(item, origin) for item in value], place)
    if isinstance(value, float) and math.isnan(value):
        raise UserError(f"{place}: a recipe cannot hold not-a-number; give a number")
    if value is None or isinstance(value, bool | int | float | str):
        return Node(value, place)
    return Node(str(value), place)


def to_plain(node: Node) -> Any:
    """Plain dicts, lists and scalars."""
    if isinstance(node.value, dict):
        return {key: to_plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [to_plain(child) for child in node.value]
    return node.value


def find(node: Node, path: tuple) -> tuple[Node, tuple]:
    """The deepest node on `path` that was written, and the part of the path that leads to it.

    Steps that are not in the tree (pydantic puts names of union members into its paths) are
    skipped.
    """
    taken: tuple = ()
    for step in path:
        if isinstance(node.value, dict) and str(step) in node.value:
            node, taken = node.value[str(step)], (*taken, str(step))
        elif isinstance(node.value, list) and isinstance(step, int) and step < len(node.value):
            node, taken = node.value[step], (*taken, step)
    return node, taken


def nearest(word: str, candidates: list[str]) -> str | None:
    """The candidate most like `word`, or None when none is near."""
    close = get_close_matches(word.lower(), [c.lower() for c in candidates], n=1, cutoff=0.5)
    return next((c for c in candidates if close and c.lower() == close[0]), None)


def _chain(keys: list[str], leaf: Node, place: Place) -> Node:
    for key in reversed(keys):
        leaf = Node({key: leaf}, place)
    return leaf


def _relocate(node: Node, place: Place) -> Node:
    value = node.value
    if isinstance(value, dict):
        value = {key: _relocate(child, place) for key, child in value.items()}
    elif isinstance(value, list):
        value = [_relocate(child, place) for child in value]
    return Node(value, place, node.replaces)
