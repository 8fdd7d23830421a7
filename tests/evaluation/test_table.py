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
from etude.evaluation.table import ResultsTable, read_table, to_csv
from etude.external.pyarrow import is_installed
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


def test_figures_that_another_job_replaced_in_part_are_made_again(tmp_path) -> None:
    """Of two jobs with one model and other intervals, the first ends last: a mixture is left."""
    mine = [(replace(ROW, metric=name, value=1.0), None, None) for name in ("precision", "recall")]
    theirs = [(replace(row, value=2.0), None, None) for row, *_ in mine]
    first, second = ResultsTable(tmp_path), ResultsTable(tmp_path)
    add, done = first.add, []

    def interrupted(*one) -> Row:
        if len(done) == 1:
            second.add_all(theirs, "theirs")
        done.append(one)
        return add(*one)

    first.add = interrupted
    first.add_all(mine, "mine")
    assert [row.value for row in ResultsTable(tmp_path).rows()] == [2.0, 1.0]
    assert not first.is_complete(ROW, "mine") and not first.is_complete(ROW, "theirs")
    # One that says the same another time has replaced nothing.
    later = [(replace(row, date="later"), None, None) for row, *_ in mine]
    second.add_all(mine, "mine")
    second.add(later[0][0])
    assert second.is_complete(ROW, "mine")


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


def test_a_file_that_was_copied_alone_is_read(tmp_path) -> None:
    table = ResultsTable(tmp_path / "results")
    rows = [
        replace(ROW, estimate="gone", selected=True, images_seen=None, high=2.5),
        replace(ROW, metric="recall", better="higher", value=math.nan, guidance=None, group="1"),
    ]
    for row in rows:
        table.add(row)
    written = table.write()
    for name in ("results.csv", "mine.csv", "results.parquet"):
        source = written.with_suffix(Path(name).suffix)
        if not source.exists():
            continue  # no pyarrow here
        path = tmp_path / name
        path.write_bytes(source.read_bytes())
        found = read_table(path)
        assert repr(sorted(found.rows, key=repr)) == repr(sorted(rows, key=repr))  # NaN too
        assert found.estimates == {}
    (tmp_path / "mine.csv").unlink()
    assert len(read_table(tmp_path).rows) == 2  # by its folder
    # Beside its rows the table is these, whatever somebody wrote into the CSV.
    written.write_text(written.read_text().replace("0.3333", "0.9333"))
    assert {row.value for row in read_table(written).rows if not row.group} == {1.0 / 3.0}


def test_a_file_that_pandas_wrote_is_read(tmp_path) -> None:
    """Empty for what is not a number, fractions where integers lack some, an index column."""
    (head, line) = to_csv([asdict(replace(ROW, value=7.5))]).splitlines()
    (tmp_path / "t.csv").write_text(
        f"\ufeff,{head}\n0,{line}\n1,{line.replace('7.5', '').replace(',2560,2.0', ',2560.0,2')}\n"
    )
    one, two = read_table(tmp_path / "t.csv").rows
    assert one == replace(ROW, value=7.5)
    assert math.isnan(two.value) and replace(two, value=7.5) == one


def test_a_parquet_file_that_pandas_wrote_is_read(tmp_path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    about = asdict(ROW) | {"images_seen": 2560.0, "high": math.nan}
    columns = {name: pyarrow.array([value]) for name, value in about.items()}
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    assert read_table(tmp_path / "t.parquet").rows == (ROW,)


@pytest.mark.parametrize(("name", "cell"), [("n_real", None), ("n_real", 60.7), ("level", None)])
def test_a_parquet_cell_that_fits_no_column_is_named(tmp_path, name: str, cell: object) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    columns = {n: pyarrow.array([value]) for n, value in (asdict(ROW) | {name: cell}).items()}
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=f"t.parquet, row 1: {name} is {cell}; write a"):
        read_table(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("protocol,", ""), r"t.csv has no column protocol; .* these columns: model, data_set"),
        (("better,", "bettr,"), r"t.csv has no column better"),
        (("model,data_set,", "a,b,"), r"t.csv has no columns model and data_set"),
        (("7.5", "high"), r"t.csv:2: value is 'high'; write a number"),
        ((",2560,2.0", ",2560.5,2.0"), r"t.csv:2: images_seen is '2560.5'; write a whole number"),
        (("False", "no"), r"t.csv:2: selected is 'no'; write true or false"),
        ((",7.5,", ",7.5,,"), r"t.csv:2: the line has 25 cells and the head 24"),
        (("small", "\udcff"), r"t.csv cannot be read"),
    ],
    ids=["protocol", "better", "two", "value", "images_seen", "selected", "cells", "bytes"],
)
def test_what_a_file_alone_lacks_is_named(tmp_path, change: tuple[str, str], words: str) -> None:
    text = to_csv([asdict(replace(ROW, value=7.5))])
    assert change[0] in text
    data = text.replace(*change, 1).encode("utf-8", "surrogateescape")
    (tmp_path / "t.csv").write_bytes(data)
    with pytest.raises(UserError, match=words):
        read_table(tmp_path / "t.csv")


def test_files_that_hold_no_table_are_refused(tmp_path) -> None:
    (tmp_path / "t.csv").write_text(to_csv([]))
    with pytest.raises(UserError, match="t.csv has no rows"):
        read_table(tmp_path / "t.csv")
    (tmp_path / "t.txt").write_text("x")
    with pytest.raises(UserError, match="t.txt is neither a CSV nor a Parquet file"):
        read_table(tmp_path / "t.txt")
    if is_installed():
        (tmp_path / "t.parquet").write_text("x")
        with pytest.raises(UserError, match="t.parquet cannot be read as Parquet"):
            read_table(tmp_path / "t.parquet")


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
