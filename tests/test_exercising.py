"""From a table to an exercise's page: whole, self-contained, equal to what was computed."""

import csv
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from scipy import stats

from etude.core.errors import UserError
from etude.evaluation.results import Results, Row
from etude.evaluation.table import ResultsTable, read_table
from etude.exercising import run_exercise, show_exercise

VOID = {"meta", "img", "br", "input", "hr", "link"}


class Reader(HTMLParser):
    """Titles of sections, text, and the tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.faults: list[str] = []
        self.sections: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list) -> None:
        if tag == "section":
            self.sections.append(dict(attributes)["id"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def rows() -> list[Row]:
    found = []
    for place, model in enumerate(("small", "large", "wide <x>")):
        for metric, better, value in (("FID", "lower", 30.0), ("recall", "higher", 0.5)):
            value += place * (0.03 if metric == "recall" else -3.0)
            half = 0.01 if metric == "recall" else 0.5
            about = {"low": value - half, "high": value + half, "n_generated": 100}
            found.append(Row(model, "digits", metric, value, better, **about))
            found += [
                Row(model, "digits", metric, value * (1 + k / 9), better, group=f"g{k}")
                for k in range(3)
            ]
    return found


@pytest.mark.parametrize("name", ["trade-offs", "groups", "ranking"])
def test_the_page_shows_what_was_found_and_asks_nobody(tmp_path: Path, name: str) -> None:
    page = show_exercise(name, Results(tuple(rows())), None, tmp_path / "out")
    text, result = page.read_text("utf-8"), json.loads((tmp_path / "out/result.json").read_text())
    reader = Reader(text)
    assert not reader.faults and not reader.open
    assert not re.search(r"https?:|@import|url\((?!#)", text)
    shown = "".join(reader.text)
    assert result["exercise"] == name and result["sentences"]
    assert all(sentence in shown for sentence in result["sentences"])
    files = {path.name for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert files == {"page.html", "result.json", *result["files"]}
    drawings = {f"plot-{file[:-4]}" for file in files if file.endswith(".svg")}
    tables = {f"table-{file[:-4]}" for file in files if file.endswith(".csv")}
    assert drawings and tables and set(reader.sections) == {"found", "asked", *drawings, *tables}
    assert text.count("<svg") == len(drawings)
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))  # no part of a drawing is another's


def test_what_was_asked_stands_in_the_answer(tmp_path: Path) -> None:
    table = ResultsTable(tmp_path / "plan" / "results")
    for row in rows():
        table.add(replace(row, protocol=f"7d{row.metric}c1"))
    source = tmp_path / "plan"
    page = run_exercise("ranking", source, ["metrics=[recall, FID]", "level=0.9"])
    result = json.loads(page.with_name("result.json").read_text())
    assert result["source"] == str(source) and result["protocols"] == ["7dFIDc1", "7drecallc1"]
    asked = {"metrics": ["recall", "FID"], "level": 0.9, "models": [], "n_generated": 0}
    assert result["options"].items() >= asked.items()
    assert result["newest_figure"] == max(row.date for row in read_table(source).rows)
    shown = "".join(Reader(page.read_text("utf-8")).text)
    line = 'options: metrics=["recall", "FID"], level=0.9; protocols: 7dFIDc1, 7drecallc1'
    assert f"Of {source}; {line}" in shown
    with page.with_name("pairs.csv").open(newline="") as stream:
        pairs = list(csv.DictReader(stream))
    assert len(pairs) == 6  # three models under two figures
    both = {"small", "large"}
    (one,) = (p for p in pairs if p["column"] == "FID" and {p["a"], p["b"]} == both)
    sign = 1 if one["a"] == "small" else -1
    error = 2**0.5 * 0.5 / stats.norm.ppf(0.975)  # of a difference, from ends 0.5 away
    half = stats.norm.ppf(1 - 0.05 / 6) * error
    assert float(one["a minus b"]) == 3.0 * sign and one["better"] == "large"
    assert float(one["low"]) == pytest.approx(3.0 * sign - half, abs=0.1)
    assert float(one["high"]) == pytest.approx(3.0 * sign + half, abs=0.1)


def test_the_table_reads_back_as_it_was(tmp_path: Path) -> None:
    show_exercise("trade-offs", Results(tuple(rows())), None, tmp_path)
    with (tmp_path / "points.csv").open(newline="") as stream:
        read = {line["model"]: line for line in csv.DictReader(stream)}
    for row in rows():
        if not row.group:
            assert float(read[row.model][row.metric]) == row.value
            assert float(read[row.model][f"{row.metric} low"]) == row.low
    assert read["small"]["guidance"] == ""


def test_asking_again_replaces_the_answer_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "mine.csv").write_text("kept")
    chosen = [*rows(), replace(rows()[0], model="best", selected=True)]
    first = show_exercise("trade-offs", Results(tuple(chosen)), None, folder)
    assert "best" in first.read_text() and (folder / "selected.csv").exists()
    again = show_exercise("trade-offs", Results(tuple(rows())), None, folder)
    fresh = show_exercise("trade-offs", Results(tuple(rows())), None, tmp_path / "fresh")
    assert again.read_bytes() == fresh.read_bytes()
    assert not (folder / "selected.csv").exists()
    assert (folder / "mine.csv").read_text() == "kept"
    (tmp_path / "run").mkdir()
    (tmp_path / "run/result.json").write_text('{"figures": 1}')
    with pytest.raises(UserError, match="the result of something else; name another folder"):
        show_exercise("trade-offs", Results(tuple(rows())), None, tmp_path / "run")


def test_a_plans_table_and_an_evalgim_file_are_asked_by_their_path(tmp_path: Path) -> None:
    table = ResultsTable(tmp_path / "plan" / "results")
    for row in rows():
        table.add(row)
    page = run_exercise("trade_offs", tmp_path / "plan", ["metrics=[recall, FID]", "level=0.9"])
    assert page == tmp_path / "plan/exercises/trade-offs/page.html"
    result = json.loads(page.with_name("result.json").read_text())
    assert result["fronts"]["digits"][0]["figures"] == ["recall", "FID"]
    assert "decided with probability 0.9:" in result["sentences"][0]
    wide = tmp_path / "wide.csv"
    wide.write_text("model_id,dataset,fid,recall,extra\na,x,3,0.5,2\nb,x,2,0.4,1\n")
    page = run_exercise("trade-offs", wide)
    assert page == tmp_path / "exercises/trade-offs/page.html"
    result = json.loads(page.with_name("result.json").read_text())
    assert result["fronts"]["x"][0]["on_front"] == [True, True]
    assert result["sentences"][-1].startswith("Not read, since nothing is known of them: extra (")
    options = ["better.extra=lower", "metrics=[FID, extra]"]
    found = json.loads(
        run_exercise("trade-offs", wide, options).with_name("result.json").read_text()
    )
    assert found["fronts"]["x"][0]["on_front"] == [False, True]  # b has less of both
    assert "extra (" not in found["sentences"][-1]
    with pytest.raises(UserError, match="better.extra is for EvalGIM's CSV"):
        run_exercise("trade-offs", tmp_path / "plan", ["better.extra=lower"])
    for option in ("better=higher", "better="):
        with pytest.raises(UserError, match="names no column; write better.COLUMN=higher"):
            run_exercise("ranking", wide, [option])


def test_what_does_not_fit_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no exercise 'pareto'; choose one of groups"):
        run_exercise("pareto", tmp_path)
    with pytest.raises(UserError, match="holds no results"):
        run_exercise("ranking", tmp_path)
    table = ResultsTable(tmp_path / "results")
    table.add(rows()[0])
    with pytest.raises(UserError, match="did you mean `level`"):
        run_exercise("ranking", tmp_path, ["levle=0.9"])
