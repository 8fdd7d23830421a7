"""What a plan puts on its page: the table of pairs, verdicts in words, sections of data sets."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from etude.core.log import Log
from etude.evaluation.planned.running import Shown
from etude.evaluation.results import Results, Row
from etude.metrics.figures import mean_of_scores
from etude.metrics.intervals import IntervalConfig
from etude.page import Page
from etude.planning import (
    _show_pictures,
    figures_table,
    in_words,
    judged,
    pairs_table,
    show_plan,
    words_of_ids,
)
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


def test_that_comparisons_are_held_against_each_other_is_said_once() -> None:
    said = in_words(judged(scored(3, "one", "two", "six"), IntervalConfig()))
    assert len(said) == 4 and "\n".join(said).count("held against each other: intervals") == 1
    assert len(in_words(judged(scored(2, "one"), IntervalConfig()))) == 1  # one comparison


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
    assert said.count("CLIPScore") == 1 and said.endswith("results.where(protocol='').")


# Votes once, asks who drew the pictures, and tries to vote again.
VOTER = """<script>
var before = document.querySelector('details').open;
function count() {return document.querySelector('.count').textContent}
document.querySelector('.left').click();
var voted = count();
REVEAL
setTimeout(function () {
  document.querySelector('.right').click();
  document.body.dataset.found = JSON.stringify([before, voted, count(),
    document.querySelector('.left').disabled, document.querySelector('.result p').textContent]);
}, 200);
</script></body>"""


@pytest.mark.parametrize(
    "reveal",
    ["document.querySelector('.end').click();", "document.querySelector('details').open=true"],
)
def test_the_vote_is_blind_until_the_makers_are_shown(tmp_path, reveal: str) -> None:
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    pictures = {f"model {k}": np.full((2, 8, 8, 3), 90 * k, np.uint8) for k in range(2)}
    page = Page(tmp_path, "plan")
    look = Look(Log(None, quiet=True), page)
    _show_pictures(Shown("coco", ["red", "blue"], pictures), "coco", look, 1.0)
    text = page.render()
    assert text.index('class="vote"') < text.index('class="grid"')
    file = tmp_path / "voter.html"
    file.write_text(text.replace("</body>", VOTER.replace("REVEAL", reveal)))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000"]
    options += [f"--user-data-dir={tmp_path}/browser", "--dump-dom", file.as_uri()]
    shown = subprocess.run([browser, *options], capture_output=True, text=True, timeout=60)
    found = re.search(r'data-found="([^"]*)"', shown.stdout)
    assert found, shown.stderr
    before, voted, after, disabled, result = json.loads(html.unescape(found[1]))
    assert not before and disabled
    assert voted == after == "1 of 2 votes"
    assert "is preferred in" in result


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
