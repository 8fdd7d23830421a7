"""Wide tables in EvalGIM's layout, with made-up figures, read as results."""

import math
from pathlib import Path

import pytest

from etude.core.errors import UserError
from etude.evaluation.evalgim_tables import is_evalgim_table, read_evalgim_table
from etude.evaluation.exercises import answer

HEAD = "model_id,dataset,cfg_scale,output_dir,fid_torchmetrics,precision,clipscore,speed"
GROUPS = "fid_torchmetrics_North,fid_torchmetrics_South_East"
WIDE = f""",{HEAD},{GROUPS}
0,one,sets_x,2.0,/some/where,31.5,0.61,24.25,9,40.5,38.0
1,two,sets_x,7.5,/some/where,28.25,,25.5,8,35.0,nan
"""


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    path = tmp_path / "wide.csv"
    path.write_text(WIDE)
    return path


def test_every_number_finds_its_row(wide: Path) -> None:
    table = read_evalgim_table(wide)
    found = {
        (r.model, r.metric, r.group): (r.value, r.better, r.features, r.guidance, r.data_set)
        for r in table.results.rows
        if not math.isnan(r.value)
    }
    assert found == {
        ("one", "FID", ""): (31.5, "lower", "inception", 2.0, "sets_x"),
        ("one", "precision", ""): (0.61, "higher", "inception", 2.0, "sets_x"),
        ("one", "CLIPScore", ""): (24.25, "higher", "clip", 2.0, "sets_x"),
        ("one", "FID", "North"): (40.5, "lower", "inception", 2.0, "sets_x"),
        ("one", "FID", "South_East"): (38.0, "lower", "inception", 2.0, "sets_x"),
        ("two", "FID", ""): (28.25, "lower", "inception", 7.5, "sets_x"),
        ("two", "CLIPScore", ""): (25.5, "higher", "clip", 7.5, "sets_x"),
        ("two", "FID", "North"): (35.0, "lower", "inception", 7.5, "sets_x"),
    }
    (missing,) = [r for r in table.results.rows if math.isnan(r.value)]
    assert (missing.model, missing.group) == ("two", "South_East")
    assert table.unknown == ("speed",)
    assert is_evalgim_table(wide) and not is_evalgim_table(wide.parent)


def test_a_column_of_ones_own_needs_a_direction(wide: Path) -> None:
    table = read_evalgim_table(wide, {"speed": "higher"})
    found = [(r.model, r.value, r.better) for r in table.results.rows if r.metric == "speed"]
    assert found == [("one", 9.0, "higher"), ("two", 8.0, "higher")] and table.unknown == ()
    with pytest.raises(UserError, match="spede=higher names no column"):
        read_evalgim_table(wide, {"spede": "higher"})


def test_how_a_figure_scatters_is_no_group(tmp_path: Path) -> None:
    path = tmp_path / "spread.csv"
    spreads = ["precision_std", "precision_Err", "fid_North_stderr", "fid_var"]
    spreads += ["fid_ci", "fid_ci_low", "fid_CI_high", "fid_North_mean", "precision_n"]
    head = ",".join(["model_id", "fid", "fid_North", "precision", *spreads])
    path.write_text(f"{head}\na,3,4,0.5{',1' * len(spreads)}\n")
    table = read_evalgim_table(path)
    found = [(row.metric, row.group, row.value) for row in table.results.rows]
    assert found == [("FID", "", 3.0), ("FID", "North", 4.0), ("precision", "", 0.5)]
    assert table.unknown == tuple(spreads)
    own = read_evalgim_table(path, {"precision_std": "lower"})
    assert [row.metric for row in own.results.rows][3:] == ["precision_std"]


def test_exercises_work_on_what_is_read(wide: Path) -> None:
    results = read_evalgim_table(wide).results
    fronts = answer("trade-offs", results, {"metrics": ["FID", "CLIPScore"]}).data["fronts"]
    assert fronts["sets_x"][0]["on_front"] == [False, True]
    found = answer("groups", results)
    assert found.data["groups"]["sets_x"]["FID"]["models"]["one"]["worst"] == ["North"]
    assert any("two on sets_x, South_East, whose FID is not a number" in s for s in found.sentences)


def test_both_kinds_of_fid_stay_apart(tmp_path: Path) -> None:
    path = tmp_path / "two.csv"
    path.write_text("model_id,dataset,fid_torchmetrics,fid_torcheval\na,x,1,2\nb,x,2,1\n")
    results = read_evalgim_table(path).results
    assert answer("ranking", results).data["columns"] == [
        "FID@inception",
        "FID@inception-torchvision",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model,fid\na,1\n", "no column model_id"),
        ("model_id,dataset,speed\na,x,1\n", "no column of a known metric .* it has model_id"),
        ("model_id,dataset,fid\na,x,low\n", "t.csv:2: fid is 'low'; write a number"),
        ("model_id,dataset,fid\n,x,1\n", "t.csv:2: the row names no model"),
        ("model_id,dataset,fid\n\na,x,8,1\n", "t.csv:3: the line has 4 cells and the head 3"),
        ("model_id,dataset,fid\na,x,1\nb,1\n", "t.csv:3: the line has 2 cells and the head 3"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        read_evalgim_table(path)
    with pytest.raises(UserError, match="does not exist"):
        read_evalgim_table(tmp_path / "absent.csv")
