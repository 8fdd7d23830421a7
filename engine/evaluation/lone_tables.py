"""Tables of results that stand alone: a CSV or Parquet file without its folder; called by table.py.

Its columns are the fields of `Row`, others are passed over. There are no estimates beside it, so
figures have the intervals of its columns, and of two figures nothing is known to be shared.
"""

import contextlib
import csv
import math
import types
import typing
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from etude.core.errors import UserError

from .results import Results, Row

COLUMNS = tuple(field.name for field in fields(Row))
_HINTS = typing.get_type_hints(Row)


def read_lone_table(path: Path) -> Results:
    """The rows of a CSV or Parquet file.

    Raises:
        UserError: it is neither, lacks a column or has no rows, or a cell does not fit its column.
    """
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".parquet"):
        raise UserError(f"{path} is neither a CSV nor a Parquet file; name a plan's table")
    lines = _csv(path) if suffix == ".csv" else _parquet(path)
    rows = tuple(
        Row(**{name: _cell(line[name], name, where) for name in COLUMNS}) for where, line in lines
    )
    if not rows:
        raise UserError(f"{path} has no rows; name a table that has some")
    return Results(rows)


def _csv(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Where each line is, and its cells by column."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream)
            head = [name.strip() for name in next(reader, [])]
            _refuse_missing(path, head)
            for cells in reader:
                where = f"{path}:{reader.line_num}"
                if not cells:
                    continue  # an empty line
                if len(cells) != len(head):
                    raise UserError(
                        f"{where}: the line has {len(cells)} cells and the head {len(head)}; write "
                        "text that holds a comma in quotes"
                    )
                yield where, dict(zip(head, cells, strict=True))
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise UserError(f"{path} cannot be read as CSV ({error}); write it again") from None


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """As `_csv`, of a Parquet file."""
    from etude.external import pyarrow

    if not pyarrow.is_installed():
        raise UserError(f"{path}: reading Parquet needs pyarrow; install it or name the CSV")
    try:
        head, rows = pyarrow.parquet_rows(path)
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet ({error}); write it again") from None
    _refuse_missing(path, head)
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", row


def _refuse_missing(path: Path, head: list[str]) -> None:
    missing = [name for name in COLUMNS if name not in head]
    if missing:
        names = " and ".join(missing) if len(missing) < 3 else ", ".join(missing)
        raise UserError(
            f"{path} has no column{'s' * (len(missing) > 1)} {names}; a table of results has these "
            f"columns: {', '.join(COLUMNS)}"
        )


def _cell(value: Any, name: str, where: str) -> Any:
    """A cell as its field holds it; empty, None and NaN are None where the field may be None."""
    kinds = typing.get_args(_HINTS[name]) or (_HINTS[name],)
    optional, kind = types.NoneType in kinds, kinds[0]
    empty = value is None or value == "" or (isinstance(value, float) and math.isnan(value))
    if kind is str:
        return "" if empty else str(value)
    if empty and optional:
        return None
    if empty and name == "value":
        return math.nan  # as pandas writes it
    wanted = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
    try:
        return _KINDS[kind](value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{where}: {name} is {value!r}; write {wanted}") from None


def _truth(value: Any) -> bool:
    found = {"true": True, "1": True, "false": False, "0": False}.get(str(value).strip().lower())
    if found is None:
        raise ValueError(value)
    return found


def _whole(value: Any) -> int:
    """An integer; pandas writes 2560.0 where a column has empty cells."""
    with contextlib.suppress(ValueError):
        if isinstance(value, (int, str)):
            return int(value)
    number = float(value)
    if number != int(number):
        raise ValueError(value)
    return int(number)


_KINDS = {int: _whole, float: float, bool: _truth}
