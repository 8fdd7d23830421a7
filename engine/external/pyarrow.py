"""Parquet files, by pyarrow where it is installed; called by evaluation/ for tables of results."""

import dataclasses
import importlib.util
import io
import types
import typing
from pathlib import Path
from typing import Any


def is_installed() -> bool:
    """Whether Parquet can be written here."""
    return importlib.util.find_spec("pyarrow") is not None


def parquet_bytes(rows: list[dict[str, Any]], row: type) -> bytes:
    """A Parquet file of rows whose columns and types are those of the dataclass `row`."""
    import pyarrow
    import pyarrow.parquet

    kinds = {
        str: pyarrow.string(),
        int: pyarrow.int64(),
        float: pyarrow.float64(),
        bool: pyarrow.bool_(),
    }
    hints = typing.get_type_hints(row)
    columns = [(field.name, kinds[_plain(hints[field.name])]) for field in dataclasses.fields(row)]
    table = pyarrow.Table.from_pylist(rows, schema=pyarrow.schema(columns))
    stream = io.BytesIO()
    pyarrow.parquet.write_table(table, stream, compression="zstd")
    return stream.getvalue()


def parquet_rows(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """The columns of a Parquet file and its rows as plain values.

    Raises:
        ValueError, OSError: it cannot be read.
    """
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    return table.column_names, table.to_pylist()


def _plain(hint: Any) -> type:
    """The type of an annotation without None."""
    if isinstance(hint, types.UnionType):
        return next(one for one in typing.get_args(hint) if one is not type(None))
    return hint
