"""What a plan puts on its page: the table of pairs, verdicts in words, sections of data sets."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from etude.core.log import Log
from etude.evaluation.planned.running import Shown
from etude.evaluation.results import Results, Row
from etude.metrics.figures import mean_of_scores
from etude.metrics.intervals import IntervalConfig
from etude.page import Page
from etude.planning import figures_table, in_words, judged, pairs_table, show_plan, words_of_ids
from etude.training import Look


def scored(models: int, *metrics: str) -> Results:
    """Rows of models with the means of scores."""
    rows, estimates = [], {}
    for metric in metrics:
        for k in range(models):
            scores = np.random.default_rng(k).normal(0.1 * k, 1.0, 50)
            key = f"{metric} {k}"
            estimates[key] = mean_of_scores(metric, scores, IntervalConfig())
            about = {"n_generated": 50, "estimate": key}
            value = estimates[key].value
            rows.append(Row(f"model {k}", "coco", metric, value, "higher", **about))
    return Results(tuple(rows), estimates)


def test_the_table_of_pairs_has_the_best_of_every_figure_and_says_what_it_leaves_out() -> None:
    found = judged(scored(21, "one", "two", "six"), IntervalConfig())  # 210 pairs each
    columns, rows, note = pairs_table(found)
    assert len(rows) == 200 and "430 are left out" in note
    assert [row[0] for row in rows] == ["one"] * 67 + ["two"] * 67 + ["six"] * 66
    for verdict, told in zip(found, (rows[:67], rows[67:134], rows[134:]), strict=True):
        pairs = [(row[columns.index("this")], row[columns.index("that")]) for row in told]
        assert pairs[:20] == [(verdict.ranking[0], other) for other in verdict.ranking[1:]]
        for pair, row in zip(pairs, told, strict=True):
            one = verdict.differences[pair]
            said = dict(zip(columns, row, strict=True))
            assert (said["difference"], said["low"], said["high"]) == (one.value, one.low, one.high)
            assert said["decided"] == ("yes" if said["adjusted p"] <= 0.05 else "no")
    assert {row[-1] for row in rows} == {"yes", "no"}
    # All pairs fit, and words tell those of three models.
    assert "left out" not in pairs_table(judged(scored(20, "one"), IntervalConfig()))[2]
    assert pairs_table(judged(scored(3, "one"), IntervalConfig()))[1] == []


def test_pictures_of_two_seeds_have_two_rows() -> None:
    one = scored(2, "one").rows
    columns, rows = figures_table(Results(one))
    assert "seed" not in columns
    assert len(rows) == 2
    other = [replace(row, seed=7, value=row.value + 1.0) for row in one]
    columns, rows = figures_table(Results((*one, *other)))
    found = {(row[0], row[columns.index("seed")]): row[-1] for row in rows}
    assert len(rows) == 4 and found["model 0", "0"] != found["model 0", "7"]


def test_rows_that_do_not_compare_are_said_once() -> None:
    found = scored(2, "CLIPScore")
    first, second = found.rows
    unlike = Results((first, replace(second, protocol="other")), found.estimates)
    (said,) = in_words(judged(unlike, IntervalConfig()))
    assert said.startswith("rows of CLIPScore on coco have different protocols")
    assert said.count("CLIPScore") == 1 and said.endswith("rows.")


def test_every_data_set_has_sections_of_its_own(tmp_path) -> None:
    """Also where their names have the same plain letters or none."""
    names = ["held out", "\N{CJK UNIFIED IDEOGRAPH-4EBA}", "held-out", "set", "held-out-3"]
    words = words_of_ids(names)
    assert list(words.values()) == ["held-out", "set", "held-out-3", "set-4", "held-out-3-5"]
    assert words_of_ids(names[:3]).items() <= words.items()
    begun = scored(2, "CLIPScore")
    rows = tuple(replace(row, data_set=name) for name in names for row in begun.rows)
    pictures = {f"model {k}": np.zeros((1, 8, 8, 3), np.uint8) for k in range(2)}
    plan = SimpleNamespace(
        recipe=SimpleNamespace(data_sets=dict.fromkeys(names), interval=IntervalConfig()),
        results=lambda: (Results(rows, begun.estimates), {}),
        short={},
        shown={name: Shown(name, ["red"], pictures) for name in names},
    )
    page = Page(tmp_path, "plan")
    show_plan(plan, Look(Log(None, quiet=True), page))
    sections = [json.loads(path.read_text()) for path in page.parts.glob("*.json")]
    titles = [section["title"] for section in sections]
    for name in names:
        for title in (name, f"{name}: the same prompts and seeds", f"{name}: blind vote"):
            assert titles.count(title) == 1
