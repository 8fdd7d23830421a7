"""The table of results on the disk; plans append to it, several jobs at once, and people read it.

    results.csv, results.parquet   the table (Parquet where pyarrow is installed)
    rows/                          a file a row, named by what the row is of: the table's source
    estimates/                     what intervals and comparisons are made from, by content
    protocols/                     what fixes the figures, by fingerprint
    complete/                      which metrics have all of their figures here, of which pictures

A row is one file that is renamed into place, so jobs never wait for each other and nothing is lost;
the two tables are written anew from all rows, by one job at a time under a lock. A row of the same
model, data set, figure and protocol replaces the earlier one.
"""

import contextlib
import csv
import hashlib
import io
import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from etude.core.errors import UserError
from etude.core.files import (
    read_json,
    to_json,
    write_bytes_atomic,
    write_json_atomic,
    write_text_atomic,
)
from etude.core.lock import Lock
from etude.metrics.estimates import Estimate

from .lone_tables import read_lone_table
from .results import Results, Row

# What a row is of: everything but what was found and when.
_IDENTITY = (
    "model",
    "checkpoint",
    "guidance",
    "seed",
    "training_seed",
    "data_set",
    "group",
    "metric",
    "features",
    "protocol",
    "selected",
)
_WAIT_S = 600.0


class ResultsTable:
    """The table in a folder, which is made when the first row comes."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def add(self, row: Row, estimate: Estimate | None = None, protocol: dict | None = None) -> Row:
        """Write a row with its estimate and protocol; the row as the table holds it."""
        if estimate is not None:
            # By its content: of two jobs that write one row at once, each row has its own estimate.
            data = estimate.to_bytes()
            row = replace(row, estimate=hashlib.sha256(data).hexdigest()[:24])
            write_bytes_atomic(self.folder / "estimates" / f"{row.estimate}.npz", data)
        if protocol is not None:
            path = self.folder / "protocols" / f"{row.protocol}.json"
            if not path.exists():
                write_json_atomic(path, protocol)
        write_json_atomic(self.folder / "rows" / f"{_digest(row)}.json", asdict(row))
        return row

    def add_all(
        self, found: Sequence[tuple[Row, Estimate | None, dict | None]], origin: str = ""
    ) -> None:
        """Write all the figures of a metric on the same pictures; then note that they are complete.

        Args:
            found: rows with estimates and protocols that differ in nothing but the figure.
            origin: what they were made from beside the protocol: the drawn pictures, the interval.
        """
        mark = self._mark(found[0][0])
        mark.unlink(missing_ok=True)  # of figures that these take the place of
        rows = [self.add(*one) for one in found]
        write_json_atomic(mark, [origin, {_digest(row): _content(asdict(row)) for row in rows}])

    def is_complete(self, row: Row, origin: str = "") -> bool:
        """Whether `add_all` wrote a row's figures, from this origin, and all are still there as it
        wrote them.

        Another plan may have evaluated other pictures, of a generator that has changed or with
        other intervals, under the model's name; the figures are then made again.
        """
        noted = None
        with contextlib.suppress(UserError):  # another job may take it away at any moment
            noted = read_json(self._mark(row))
        if not isinstance(noted, list) or noted[0] != origin or not isinstance(noted[1], dict):
            return False
        return all(self._holds(name, content) for name, content in noted[1].items())

    def _holds(self, name: str, content: str) -> bool:
        """Whether a row's file says what it said."""
        with contextlib.suppress(UserError):
            found = read_json(self.folder / "rows" / f"{name}.json")
            return isinstance(found, dict) and _content(found) == content
        return False

    def _mark(self, row: Row) -> Path:
        return self.folder / "complete" / f"{_digest(replace(row, metric=''))}.json"

    def rows(self) -> list[Row]:
        """Every row, by model, checkpoint, guidance, data set, group and figure."""
        known = {field.name for field in fields(Row)}
        found = []
        for path in sorted((self.folder / "rows").glob("*.json")):
            content = read_json(path)
            if not isinstance(content, dict) or set(content) != known:
                raise UserError(f"{path} is no row of this version; delete it and evaluate again")
            # JSON has no NaN.
            value = math.nan if content["value"] is None else content["value"]
            found.append(Row(**(content | {"value": value})))
        return sorted(found, key=_order)

    def read(self) -> Results:
        """Every row with its estimate.

        Raises:
            UserError: the folder holds no results.
        """
        rows = self.rows()
        if not rows:
            raise UserError(f"{self.folder} holds no results; name the table of a plan that ran")
        estimates = {}
        for row in rows:
            path = self.folder / "estimates" / f"{row.estimate}.npz"
            if row.estimate and path.exists():
                estimates[row.estimate] = Estimate.from_bytes(path.read_bytes())
        return Results(tuple(rows), estimates)

    def write(self) -> Path:
        """Write the tables of all rows; returns the CSV. Waits while another job does the same.

        Raises:
            UserError: another job held the lock for ten minutes.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = _held(self.folder)
        try:
            rows = [asdict(row) for row in self.rows()]
            path = self.folder / "results.csv"
            write_text_atomic(path, to_csv(rows))
            parquet = to_parquet(rows)
            if parquet is not None:
                write_bytes_atomic(self.folder / "results.parquet", parquet)
        finally:
            lock.release()
        return path


def read_table(path: str | Path) -> Results:
    """The results in a table's folder, in a plan's run, or in a CSV or Parquet file.

    A `results.csv` or `results.parquet` beside its `rows/` is answered from these, whatever is in
    it. Another file, or one that was copied without them, is read alone.

    Raises:
        UserError: there are none, or a file alone does not hold what a table does.
    """
    path = Path(path)
    if path.is_file():
        if path.stem == "results" and (path.parent / "rows").is_dir():
            return ResultsTable(path.parent).read()
        return read_lone_table(path)
    folders = path, path / "results", Path("runs") / path / "results"
    for folder in folders:
        if (folder / "rows").is_dir():
            return ResultsTable(folder).read()
    for folder in folders:
        for name in ("results.csv", "results.parquet"):
            if (folder / name).is_file():
                return read_lone_table(folder / name)
    raise UserError(f"{path} holds no results; name the table of a plan that ran")


def to_csv(rows: Iterable[dict[str, Any]]) -> str:
    """Rows as CSV, None as nothing, floats so that they read back equal."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: "" if value is None else value for name, value in row.items()})
    return stream.getvalue()


def to_parquet(rows: list[dict[str, Any]]) -> bytes | None:
    """Rows as Parquet; None where pyarrow is not installed."""
    from etude.external import pyarrow

    return pyarrow.parquet_bytes(rows, Row) if pyarrow.is_installed() else None


def _digest(row: Row) -> str:
    """The name of a row's files."""
    identity = {name: getattr(row, name) for name in _IDENTITY}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]


def _content(row: dict[str, Any]) -> str:
    """What a row's file says beside the date, as a hash."""
    said = {name: value for name, value in row.items() if name != "date"}
    return hashlib.sha256(to_json(said).encode()).hexdigest()[:24]


def _held(folder: Path) -> Lock:
    """The table's lock, waited for."""
    ends = time.monotonic() + _WAIT_S
    while True:
        try:
            return Lock(folder)
        except UserError:
            if time.monotonic() > ends:
                raise
            time.sleep(0.2)


def _order(row: Row) -> tuple:
    return (
        row.data_set,
        row.group,
        row.features,
        row.metric,
        row.model,
        row.training_seed or 0,
        row.images_seen or 0,
        row.checkpoint,
        -1.0 if row.guidance is None else row.guidance,
        row.selected,
        row.seed,
    )
