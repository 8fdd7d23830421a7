"""Labels that stand in files beside pictures; called by labelled_folders.py.

Three kinds: a text file with a label per line in the order of the sorted picture names (ImageNet's
synset list of its validation pictures) or with a picture and a label per line; a CSV table with a
header (among them ImageNet's LOC_val_solution.csv); and JSON files that map a class folder to the
classes that count as right in it (ObjectNet's, or one of your own). A label is an identifier, a
name, or a number in the sorted identifiers of the whole list; several are separated by semicolons.
"""

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etude.core.errors import UserError
from etude.core.recipe_tree import nearest

Labels = list[str | int]  # what counts as right, as a file says it

_FILE_COLUMNS = ("file", "file_name", "filename", "image", "path", "ImageId")
_LABEL_COLUMNS = ("label", "class", "category", "wnid", "PredictionString")
_BOXES = re.compile(r"(n\d{8})( -?\d+){4}( .*)?")  # LOC_val_solution.csv: a wnid, then its box
_OWN_MAPPING = "mapping.json"
_OBJECTNET = "mappings"


def find_label_file(folder: Path, *, inside_only: bool) -> Path | None:
    """`labels.csv` or `labels.txt` in a folder; else, beside it, its own name with such an ending.

    Args:
        inside_only: do not look beside the folder, because its class folders say the labels.
    """
    places = [folder / f"labels{ending}" for ending in (".csv", ".txt")]
    if not inside_only:
        places += [folder.with_name(folder.name + ending) for ending in (".csv", ".txt")]
    return next((path for path in places if path.is_file()), None)


def read_label_file(path: Path, folder: Path, pictures: Sequence[str]) -> dict[str, Labels]:
    """Labels by picture, which is a path relative to `folder`.

    Args:
        pictures: sorted names of the pictures directly in the folder.

    Raises:
        UserError: a table without its two columns, a picture that is not there or is named twice,
            or another number of lines than of pictures.
    """
    rows = _table(path) if path.suffix == ".csv" else _lines(path, pictures)
    whole = set(pictures)
    stems: dict[str, str] = {}
    for name in pictures:
        stems.setdefault(name.rpartition(".")[0], name)
    found: dict[str, Labels] = {}
    for number, name, label in rows:
        file = name if name in whole else stems.get(name, name)
        where = f"{path}, line {number}"
        if file not in whole and not (folder / file).is_file():
            raise UserError(
                f"{where}: {name} is not in {folder}; remove the line or add the picture"
            )
        if file in found:
            raise UserError(f"{where}: {name} has a label already; keep one of them")
        found[file] = _labels(label, where)
    return found


def read_mapping(folder: Path) -> dict[str, Labels]:
    """Class folder -> labels that count as right; none for a folder that belongs to no class.

    Reads `mapping.json` of the folder ({"alarm_clock": ["analog clock", "n03196217"]}), or the
    files below `mappings/` that ObjectNet comes with.

    Raises:
        UserError: neither is there, or one of them does not hold what it should.
    """
    own = folder / _OWN_MAPPING
    if own.is_file():
        return {key: _mapped(value, f"{own}: {key}") for key, value in _json(own).items()}
    labels = folder / _OBJECTNET / "folder_to_objectnet_label.json"
    classes = folder / _OBJECTNET / "objectnet_to_imagenet_1k.json"
    if not (labels.is_file() and classes.is_file()):
        raise UserError(
            f"{folder} has neither {_OWN_MAPPING} nor {_OBJECTNET}/ with {labels.name} and "
            f"{classes.name}: name the unpacked folder of ObjectNet, or write {_OWN_MAPPING} with "
            "the right classes of each class folder"
        )
    numbers = _objectnet_numbers(folder / _OBJECTNET)
    right = {
        key: [numbers.get(text, text) for text in _mapped(value, f"{classes}: {key}")]
        for key, value in _json(classes).items()
    }
    return {key: right.get(str(label), []) for key, label in _json(labels).items()}


def explain(name: str, mapping: dict[str, Labels], where: str) -> Labels:
    """The labels of a class folder.

    Raises:
        UserError: the mapping does not know the folder; the message gives the nearest name.
    """
    if name not in mapping:
        near = nearest(name, list(mapping))
        raise UserError(
            f"{where}: the mapping has no class folder {name!r}"
            + (f"; the nearest is {near!r}" if near else "")
        )
    return mapping[name]


def _objectnet_numbers(folder: Path) -> dict[str, int]:
    """ImageNet's names as ObjectNet writes them -> numbers in the sorted identifiers.

    Line i of one file is the name of ID i, the other gives each number's ID. Empty without them:
    the class list's own names are compared then.
    """
    names, ids = folder / "imagenet_to_label_2012_v2", folder / "pytorch_to_imagenet_2012_id.json"
    if not (names.is_file() and ids.is_file()):
        return {}
    lines = names.read_text("utf-8").splitlines()
    by_id = {int(value): int(key) for key, value in _json(ids).items()}
    return {line.strip(): by_id[i] for i, line in enumerate(lines) if i in by_id}


def _table(path: Path) -> list[tuple[int, str, str]]:
    """(line, picture, label) of a CSV table with a header."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file)
        columns = table.fieldnames or ()
        picture = next((name for name in _FILE_COLUMNS if name in columns), None)
        label = next((name for name in _LABEL_COLUMNS if name in columns), None)
        if picture is None or label is None:
            raise UserError(
                f"{path} needs a first line that names a column of pictures (one of "
                f"{', '.join(_FILE_COLUMNS)}) and one of labels ({', '.join(_LABEL_COLUMNS)})"
            )
        return [(table.line_num, row[picture] or "", row[label] or "") for row in table]


def _lines(path: Path, pictures: Sequence[str]) -> list[tuple[int, str, str]]:
    """(line, picture, label) of a text file."""
    lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    known = set(pictures)
    first = lines[0].split(None, 1) if lines else []
    if len(first) == 2 and first[0] in known:
        return [(i, *(line.split(None, 1) + [""])[:2]) for i, line in enumerate(lines, 1) if line]
    if len(lines) != len(pictures):
        raise UserError(
            f"{path} has {len(lines):,} lines but its folder {len(pictures):,} pictures: it needs "
            "a label per picture, in the order of their sorted names, or a picture and a label in "
            "each line"
        )
    return [(i, name, line) for i, (name, line) in enumerate(zip(pictures, lines, strict=True), 1)]


def _labels(text: str, where: str) -> Labels:
    """Identifiers, names and numbers of one field."""
    if match := _BOXES.fullmatch(text.strip()):
        return [match[1]]
    parts = [part.strip() for part in text.split(";") if part.strip()]
    if not parts:
        raise UserError(f"{where}: a label is missing; write an identifier, a name or a number")
    return [int(part) if part.isdecimal() else part for part in parts]


def _mapped(value: Any, where: str) -> Labels:
    """A JSON value as labels: text with semicolons, a number, a list of both, or null for none."""
    items = [] if value is None else value if isinstance(value, list) else [value]
    found: Labels = []
    for item in items:
        if isinstance(item, bool) or not isinstance(item, str | int):
            raise UserError(f"{where}: {item!r} is no class; write identifiers, names or numbers")
        parts = [item] if isinstance(item, int) else [part.strip() for part in item.split(";")]
        found += [part for part in parts if part != ""]
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{path} is not JSON that can be read; copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} should hold a JSON object that maps names to classes")
    return content
