"""The table of results: rows and estimates come back, several writers lose nothing."""

import csv
import io
import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from etude.core.errors import UserError
from etude.core.lock import Lock
from etude.evaluation.results import Row
from etude.evaluation.table import ResultsTable, read_table
from etude.metrics.estimates import Estimate
from etude.metrics.intervals import IntervalConfig

ROW = Row(
    model="small, first",
    data_set="digits",
    metric="FID",
    value=1.0 / 3.0,
    better="lower",
    checkpoint="2560",
    images_seen=2560,
    guidance=2.0,
    features="inception",
    low=0.25,
    protocol="abc",
)
DRAWN = {0.5: np.linspace(-1, 1, 50) ** 3}
ESTIMATE = Estimate("FID", 1.0 / 3.0, DRAWN, drawn_by="same")


def test_rows_and_estimates_come_back(tmp_path) -> None:
    table = ResultsTable(tmp_path)
    table.add(ROW, ESTIMATE, {"n": 3})
    table.add(replace(ROW, guidance=None, metric="recall", better="higher"))
    found = table.read()
    assert [row.metric for row in found.rows] == ["FID", "recall"]
    assert replace(found.rows[0], estimate="") == ROW
    estimate, config = found.estimate(found.rows[0]), IntervalConfig()
    assert estimate.interval(config) == ESTIMATE.interval(config)
    assert estimate.drawn_by == "same" and found.estimate(found.rows[1]).replicates == {}
    assert json.loads((tmp_path / "protocols" / "abc.json").read_text()) == {"n": 3}
    assert found.where(guidance=None).rows[0].metric == "recall"


def test_a_row_of_the_same_things_replaces_the_earlier_one(tmp_path) -> None:
    table = ResultsTable(tmp_path)
    for changed in ({}, {"value": 2.0, "date": "later"}, {"seed": 1}, {"selected": True}):
        table.add(replace(ROW, **changed))
    assert sorted((row.value, row.seed, row.selected) for row in table.rows()) == [
        (1.0 / 3.0, 0, True),
        (1.0 / 3.0, 1, False),
        (2.0, 0, False),
    ]


def test_a_metric_is_complete_whatever_the_figure(tmp_path) -> None:
    table = ResultsTable(tmp_path)
    table.add_all([(ROW, None, None), (replace(ROW, metric="recall"), None, None)], "first")
    assert table.is_complete(replace(ROW, metric="recall", value=9.0), "first")
    for change in ({"protocol": "other"}, {"group": "a"}, {"seed": 1}, {"selected": True}):
        assert not table.is_complete(replace(ROW, **change), "first")
    assert not table.is_complete(ROW, "second")
    min((tmp_path / "rows").iterdir()).unlink()  # one figure is deleted: both are made again
    assert not table.is_complete(ROW, "first")


def test_a_value_that_is_no_number_comes_back(tmp_path) -> None:
    table = ResultsTable(tmp_path)
    table.add(replace(ROW, value=math.nan))
    assert math.isnan(table.rows()[0].value)


def test_the_tables_hold_every_row(tmp_path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    table = ResultsTable(tmp_path)
    rows = [table.add(replace(ROW, seed=seed, value=seed / 7)) for seed in (2, 0, 1)]
    path = table.write()
    expected = [asdict(row) for row in sorted(rows, key=lambda row: row.seed)]
    read = list(csv.DictReader(io.StringIO(path.read_text())))
    assert [float(row["value"]) for row in read] == [row["value"] for row in expected]
    assert read[0]["model"] == "small, first" and read[0]["high"] == ""
    assert parquet.read_table(tmp_path / "results.parquet").to_pylist() == expected


WRITER = """
import sys
from etude.evaluation.table import ResultsTable
from etude.evaluation.results import Row
table, first = ResultsTable(sys.argv[1]), int(sys.argv[2])
for seed in range(first, first + 6):
    table.add(Row("m", "d", "FID", float(seed), "lower", seed=seed))
    table.write()
"""


def test_two_processes_lose_nothing(tmp_path) -> None:
    both = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), first])
        for first in ("0", "100")
    ]
    assert [one.wait() for one in both] == [0, 0]
    written = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert sorted(int(row["seed"]) for row in written) == [*range(6), *range(100, 106)]


def test_a_table_is_found_from_its_run_or_file(tmp_path) -> None:
    with pytest.raises(UserError, match="holds no results; name the table of a plan"):
        read_table(tmp_path)
    table = ResultsTable(tmp_path / "run" / "results")
    table.add(ROW)
    path = table.write()
    for name in (tmp_path / "run", tmp_path / "run" / "results", path):
        assert read_table(name).rows == (ROW,)


def test_a_row_of_another_version_is_named(tmp_path) -> None:
    table = ResultsTable(tmp_path)
    table.add(ROW)
    (path,) = Path(tmp_path / "rows").iterdir()
    path.write_text(json.dumps({"model": "old"}))
    with pytest.raises(UserError, match="is no row of this version"):
        table.rows()


def test_writing_waits_for_the_lock(tmp_path) -> None:
    table = ResultsTable(tmp_path)
    table.add(ROW)
    lock = Lock(tmp_path)
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), "0"])
    with pytest.raises(subprocess.TimeoutExpired):
        writer.wait(3)
    assert not (tmp_path / "results.csv").exists()
    lock.release()
    assert writer.wait() == 0 and (tmp_path / "results.csv").exists()
