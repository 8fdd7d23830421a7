"""The exercises on small tables with made-up figures: what they find, leave out and refuse."""

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from etude.core.errors import UserError
from etude.evaluation.exercises import EXERCISES, answer
from etude.evaluation.results import Results, Row

BETTER = {"FID": "lower", "precision": "higher", "recall": "higher", "CLIPScore": "higher"}
Z = stats.norm.ppf(0.975)


def row(model: str, metric: str, value: float, error: float | None = None, **more: object) -> Row:
    """A row on the data set "sets/a" with an interval of this standard error."""
    about = {"data_set": "sets/a", "n_real": 1000, "n_generated": 1000, "protocol": "p"}
    if error is not None:
        about |= {"low": value - Z * error, "high": value + Z * error}
    better = BETTER[metric.split("@")[0]]
    return Row(model=model, metric=metric, value=value, better=better, **(about | more))


def results(*rows: Row) -> Results:
    return Results(tuple(rows))


def said(finding: object) -> str:
    return "\n".join(finding.sentences)


def test_the_four_exercises_are_found_by_name() -> None:
    assert {"trade-offs", "groups", "ranking", "prompt-types"} <= set(EXERCISES.names())


# Trade-offs.


def cloud(count: int, error: float | None = None, seed: int = 0) -> list[Row]:
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        for metric in ("FID", "precision", "recall"):
            value = float(rng.integers(0, 8))
            rows.append(row(f"m{number}", metric, value, error))
    return rows


def test_fronts_of_every_pair_and_triple_are_those_of_the_definition() -> None:
    rows = cloud(25)
    values = {}
    for one in rows:
        sign = -1 if one.metric == "FID" else 1
        values.setdefault(one.model, {})[one.metric] = sign * one.value
    found = answer("trade-offs", results(*rows)).data["fronts"]["sets/a"]
    assert [front["figures"] for front in found] == [
        *map(list, combinations(("FID", "precision", "recall"), 2)),
        ["FID", "precision", "recall"],
    ]
    for front in found:
        points = [tuple(values[m][f] for f in front["figures"]) for m in front["subjects"]]
        expected = [
            not any(all(x >= y for x, y in zip(b, a, strict=True)) and a != b for b in points)
            for a in points
        ]
        assert front["on_front"] == expected
        assert front["front_probability"] is None  # the table has no intervals


def test_the_probability_to_be_on_the_front_is_analytic_for_two_models() -> None:
    table = results(
        row("a", "FID", 20.0, 0.5),
        row("a", "recall", 0.60, 0.02),
        row("b", "FID", 20.6, 0.4),
        row("b", "recall", 0.61, 0.02),
    )
    (front,) = answer("trade-offs", table).data["fronts"]["sets/a"]
    a_lower = stats.norm.cdf(0.6 / math.hypot(0.5, 0.4))
    b_higher = stats.norm.cdf(0.01 / math.hypot(0.02, 0.02))
    dominated = (1 - a_lower) * b_higher, a_lower * (1 - b_higher)
    expected = [1 - dominated[0], 1 - dominated[1]]
    assert front["front_probability"] == pytest.approx(expected, abs=0.035)
    assert front["dominance"][0][1] == pytest.approx(dominated[1], abs=0.035)


def test_a_selected_figure_and_one_that_is_no_number_are_beside_and_left_out() -> None:
    rows = cloud(6)
    rows[0] = row("m0", "FID", math.nan)  # the first: positions behind it must not shift
    best = [row("winner", m, v, selected=True) for m, v in (("FID", -9.0), ("recall", 99.0))]
    options = {"metrics": ["FID", "recall"]}
    without = answer("trade-offs", results(*rows), options)
    found = answer("trade-offs", results(*best, *rows), options)
    assert found.data == without.data
    (front,) = found.data["fronts"]["sets/a"]
    assert front["subjects"] == ["m1", "m2", "m3", "m4", "m5"]
    values = {(one.model, one.metric): one.value for one in rows}
    for name, on in zip(front["subjects"], front["on_front"], strict=True):
        one = values[name, "FID"], values[name, "recall"]
        others = [(values[m, "FID"], values[m, "recall"]) for m in front["subjects"]]
        assert on == (not any(f <= one[0] and r >= one[1] and (f, r) != one for f, r in others))
    assert "Left out: m0 on sets/a, whose FID is not a number." in found.sentences
    assert "winner" in said(found) and "in no statement" in said(found)
    assert [line[2:5] for line in found.tables["selected"].rows] == [
        ("winner", "FID", -9.0),
        ("winner", "recall", 99.0),
    ]


def test_decisions_about_fronts_hold_on_all_of_them() -> None:
    """A pair 2.8 errors apart: enough among 2 comparisons, too little among 20."""
    rows = []
    for k in range(10):
        for metric, sign in (("FID", -1.0), ("recall", 1.0)):
            for model, value in (("a", 2.8 * 2**0.5), ("b", 0.0)):
                more = {"data_set": f"sets/{k}"}
                rows.append(row(model, metric, sign * value, 1.0, **more))
    alone = answer("trade-offs", results(*rows), {"data_sets": ["sets/3"]})
    assert alone.data["fronts"]["sets/3"][0]["decided"] == ["on", "off"]
    found = answer("trade-offs", results(*rows))
    assert all(front["decided"] == ["open", "open"] for (front,) in found.data["fronts"].values())
    assert "What is decided holds on all 10 fronts at once, with probability 0.95." in (
        found.sentences
    )
    line = found.tables["points"].rows[0]
    at = found.tables["points"].columns.index("decided on FID and recall")
    assert line[at] == "open" and 0.9 < line[at + 1] <= 1.0


def test_settings_of_one_model_are_told_apart() -> None:
    rows = []
    for guidance, fid, recall in ((1.0, 30.0, 0.7), (2.0, 20.0, 0.6), (4.0, 25.0, 0.5)):
        rows += [row("m", "FID", fid, 0.1, guidance=guidance)]
        rows += [row("m", "recall", recall, 0.001, guidance=guidance)]
    found = answer("trade-offs", results(*rows))
    (front,) = found.data["fronts"]["sets/a"]
    assert front["subjects"] == ["m (guidance 1)", "m (guidance 2)", "m (guidance 4)"]
    assert front["on_front"] == [True, True, False]
    assert front["decided"] == ["on", "on", "off"]
    assert "decided with probability 0.95: on the front: m (guidance" in said(found)
    assert "off it: m (guidance 4)" in said(found)
    with pytest.raises(UserError, match="images_seen does not vary.*along=guidance"):
        answer("trade-offs", results(*rows), {"along": "images_seen"})


# Groups.


def by_group(values: dict[str, float], error: float | None, metric: str = "FID", **more) -> list:
    return [row("m", metric, v, error, group=g, **more) for g, v in values.items()]


@pytest.mark.parametrize("metric", ["FID", "recall"])
def test_worst_group_gap_and_decisions_know_the_direction(metric: str) -> None:
    values = {"north": 10.0, "south": 16.0, "east": 11.0, "west": 11.0}
    found = answer("groups", results(*by_group(values, 0.3, metric)))
    one = found.data["groups"]["sets/a"][metric]["models"]["m"]
    worst, best = ("south", "north") if metric == "FID" else ("north", "south")
    assert (one["worst"], one["best"], one["gap"]) == ([worst], [best], pytest.approx(6.0))
    # Bonferroni over the six pairs: the largest lower end is that of north and south.
    half = stats.norm.ppf(1 - 0.025 / 6) * 0.3 * 2**0.5
    assert one["gap_low"] == pytest.approx(6.0 - half, abs=0.06)
    assert one["gap_high"] == pytest.approx(6.0 + half, abs=0.06)
    verdicts = {d["group"]: d["verdict"] for d in one["differences"]}
    assert verdicts["south"] == ("worse" if metric == "FID" else "better")
    assert verdicts["north"] == ("better" if metric == "FID" else "worse")
    # A group less the mean of four: its error is sqrt(3 / 4) of a group's.
    south = next(d for d in one["differences"] if d["group"] == "south")
    half = stats.norm.ppf(1 - 0.025 / 4) * 0.3 * 0.75**0.5
    assert south["difference"] == pytest.approx(4.0)
    assert south["high"] - south["low"] == pytest.approx(2 * half, rel=0.06)
    assert f"worst in {worst}" in said(found)


def test_equal_groups_show_the_gap_of_the_studentized_range() -> None:
    values = {f"g{k}": 5.0 + 0.05 * (k % 2) for k in range(6)}
    found = answer("groups", results(*by_group(values, 0.2)))
    one = found.data["groups"]["sets/a"]["FID"]["models"]["m"]
    expected = 0.2 * stats.studentized_range.ppf(0.95, 6, np.inf)
    assert one["chance_gap"] == pytest.approx(expected, rel=0.06)
    chance = stats.studentized_range.sf(0.05 / 0.2, 6, np.inf)
    assert one["p_equal"] == pytest.approx(chance, abs=0.03)
    assert one["gap_low"] == 0.0 and "which equal groups can show too" in said(found)
    # What equal groups show does not depend on how unequal these are.
    values = {f"g{k}": 5.0 + 2.0 * k for k in range(6)}
    found = answer("groups", results(*by_group(values, 0.2)))
    one = found.data["groups"]["sets/a"]["FID"]["models"]["m"]
    assert one["chance_gap"] == pytest.approx(expected, rel=0.06)
    assert one["p_equal"] < 1e-50  # 10 apart with an error of 0.2 each


def test_a_group_of_large_error_hides_no_gap_of_the_others() -> None:
    errors = {"north": 0.01, "south": 0.01, "east": 0.01, "west": 0.5}
    values = {"north": 10.0, "south": 10.5, "east": 10.25, "west": 10.25}
    rows = [row("m", "FID", v, errors[g], group=g) for g, v in values.items()]
    found = answer("groups", results(*rows))
    one = found.data["groups"]["sets/a"]["FID"]["models"]["m"]
    half = stats.norm.ppf(1 - 0.025 / 6) * 0.01 * 2**0.5
    assert one["gap_low"] == pytest.approx(0.5 - half, abs=0.003)
    assert one["p_equal"] < 1e-6 and "equal groups can show" not in said(found)
    (line,) = found.tables["gaps"].rows
    assert line[:6] == ("sets/a", "FID", "m", "south", "north", 0.5)
    assert line[6:9] == (one["gap_low"], one["gap_high"], one["p_equal"])


def test_the_sentence_on_a_gap_agrees_with_its_interval() -> None:
    rng, told = np.random.default_rng(4), 0
    rows = []
    for k in range(8):
        values, errors = 10 + rng.normal(0, 1.0, 4), rng.choice([0.3, 1.0], 4)
        for g in range(4):
            rows.append(row(f"m{k}", "FID", values[g], errors[g], group=f"g{g}"))
    found = answer("groups", results(*rows))
    for name, one in found.data["groups"]["sets/a"]["FID"]["models"].items():
        (sentence,) = (s for s in found.sentences if s.startswith(f"{name} on"))
        assert (one["gap_low"] == 0.0) == (one["p_equal"] > 0.05)
        assert ("equal groups can show too" in sentence) == (one["gap_low"] == 0.0)
        told += one["gap_low"] == 0.0
    assert 2 <= told <= 6


def test_decisions_about_groups_hold_over_the_whole_table() -> None:
    """A group 2.9 errors from its mean: enough among 4 tests, too little among 48."""
    values = {"north": 10.0, "south": 10.0, "east": 10.0, "west": 10.0 + 2.9 * 0.5 / 0.75**0.5}
    rows = [
        row(f"m{k}", metric, v, 0.5, group=g)
        for k in range(6)
        for metric in ("FID", "recall")
        for g, v in values.items()
    ]
    alone = answer("groups", results(*rows), {"models": ["m3"], "metrics": ["FID"]})
    assert "decidedly worse than the mean of the groups: west" in said(alone)
    assert "over 4 tests; intervals of gaps hold one by one (1 of them" in said(alone)
    found = answer("groups", results(*rows))
    assert "decidedly" not in said(found)
    assert "over 48 tests; intervals of gaps hold one by one (12 of them, each" in said(found)


def test_holm_decides_more_than_bonferroni_and_never_other_groups() -> None:
    # z of the differences from the mean; Bonferroni asks for 2.39, Holm's second step for 2.24.
    error = 1.0 / (2 / 3) ** 0.5
    values = {"a": 2.62, "b": -2.32, "c": -0.3}
    verdicts = {}
    for correction in ("holm", "bonferroni"):
        found = answer("groups", results(*by_group(values, error)), {"correction": correction})
        one = found.data["groups"]["sets/a"]["FID"]["models"]["m"]
        verdicts[correction] = {
            d["group"] for d in one["differences"] if d["verdict"] != "not decided"
        }
    assert verdicts == {"holm": {"a", "b"}, "bonferroni": {"a"}}


def test_groups_of_unequal_numbers_are_refused_unless_told() -> None:
    rows = by_group({"north": 10.0, "south": 16.0}, 0.3)
    rows += by_group({"east": 12.0}, 0.3, n_generated=500)
    with pytest.raises(UserError, match=r"group north.* 1,000 .*group east.* 500 .*unequal_n=true"):
        answer("groups", results(*rows))
    found = answer("groups", results(*rows), {"unequal_n": True})
    assert found.data["groups"]["sets/a"]["FID"]["groups"] == ["north", "south", "east"]
    found = answer("groups", results(*rows), {"groups": ["north", "south"]})
    assert found.data["groups"]["sets/a"]["FID"]["groups"] == ["north", "south"]
    with pytest.raises(UserError, match="no figures of groups"):
        answer("groups", results(row("m", "FID", 1.0)))


def test_groups_without_intervals_are_about_values_alone() -> None:
    found = answer("groups", results(*by_group({"north": 10.0, "south": 16.0}, None)))
    one = found.data["groups"]["sets/a"]["FID"]["models"]["m"]
    assert (one["gap"], one["gap_low"], one["p_equal"], one["differences"]) == (6.0, *[None] * 3)
    assert "about the values alone" in said(found)


# Ranking.


def ladder(error: float | None) -> list[Row]:
    """c, b, a under FID on two data sets; recall turns a and b around."""
    rows = []
    for place, model in enumerate("abc"):
        for data_set in ("sets/a", "sets/b"):
            rows.append(row(model, "FID", 30.0 - 2 * place, error, data_set=data_set))
        rows.append(row(model, "recall", [0.6, 0.5, 0.9][place], error and error / 100))
    return rows


def test_ranking_says_what_holds_everywhere_and_what_reverses() -> None:
    found = answer("ranking", results(*ladder(0.1)))
    assert found.data["columns"] == ["FID on sets/a", "recall on sets/a", "FID on sets/b"]
    verdicts = {(p["a"], p["b"]): p["verdict"] for p in found.data["pairs"]}
    assert verdicts == {("a", "b"): "reversed", ("a", "c"): "b", ("b", "c"): "b"}
    assert "Decided in all 3 columns at once (probability 0.95): c before a and c before b." in (
        found.sentences
    )
    assert (
        "The order reverses: a is better by recall on sets/a, b by FID on sets/a and FID on sets/b."
        in found.sentences
    )
    for tau in found.data["kendall"]:
        fid = [-30.0, -28.0, -26.0]
        pair = [fid if "FID" in name else [0.6, 0.5, 0.9] for name in tau["columns"]]
        assert tau["tau"] == pytest.approx(stats.kendalltau(*pair).statistic)
        assert tau["low"] == tau["tau"] == tau["high"]  # every pair is decided
    ranks = {
        (e["model"], e["column"]): (e["low"], e["rank"], e["high"]) for e in found.data["ranks"]
    }
    assert ranks["c", "FID on sets/a"] == (1, 1, 1)
    assert ranks["a", "recall on sets/a"] == (2, 2, 2)


def test_the_probability_of_an_inversion_is_that_of_two_gaussian_columns() -> None:
    table = results(
        row("a", "FID", 20.0, 0.5),
        row("b", "FID", 20.5, 0.5),
        row("a", "recall", 0.60, 0.02),
        row("b", "recall", 0.61, 0.02),
    )
    (pair,) = answer("ranking", table).data["pairs"]
    first = stats.norm.cdf(0.5 / (0.5 * 2**0.5))
    second = stats.norm.cdf(-0.01 / (0.02 * 2**0.5))
    assert pair["a_better"] == pytest.approx([first, second], abs=0.035)
    expected = first * (1 - second) + second * (1 - first)
    assert pair["inversion"] == pytest.approx(expected, abs=0.035)
    assert pair["verdict"] == "open"


def test_numbers_of_pictures_are_columns_of_their_own() -> None:
    rows = [row(m, "FID", v, 0.1) for m, v in (("a", 1.0), ("b", 2.0), ("c", 3.0))]
    rows += [row(m, "FID", v, 0.1, n_generated=50) for m, v in (("a", 9.0), ("b", 7.0))]
    found = answer("ranking", results(*rows))
    assert found.data["columns"] == ["FID, 50 pictures", "FID, 1,000 pictures"]
    assert found.data["models"] == ["a", "b"] and found.data["pairs"][0]["verdict"] == "reversed"
    assert "Left out: c, which has no FID, 50 pictures." in found.sentences


def test_a_ranking_without_intervals_decides_nothing() -> None:
    found = answer("ranking", results(*ladder(None)))
    assert {p["verdict"] for p in found.data["pairs"]} == {"open"}
    assert {p["inversion"] for p in found.data["pairs"]} == {None}
    assert "2 of 3 pairs of models have the same order in all 3 columns" in said(found)
    assert all(t["low"] is None for t in found.data["kendall"])


def test_ties_name_no_winner() -> None:
    rows = [
        row(m, metric, 1.0 if metric == "recall" else 2.0 + (m == "c"), 0.1)
        for m in "abc"
        for metric in ("FID", "precision", "recall")
    ]
    found = answer("ranking", results(*rows))
    assert "First in FID: a and b; precision: c; recall: all 3 equal." in found.plots["heat"].alt
    # FID and precision order c and the others in opposite ways; recall orders nothing.
    assert "FID and precision have a Kendall tau of -1.00" in said(found)
    alone = [one for one in rows if one.metric != "precision"]
    found = answer("ranking", results(*(replace(r, low=None, high=None) for r in alone)))
    assert "3 of 3 pairs of models have the same order in both columns" in said(found)
    rows = [
        row(m, metric, (-1 if metric == "FID" else 1) * float(k), 0.1)
        for k, m in enumerate("abc")
        for metric in ("FID", "precision", "recall")
    ]
    found = answer("ranking", results(*rows))
    assert "Every two columns have the same Kendall's tau, 1.00." in found.sentences
    assert "agree least" not in said(found)
    rows += [row(m, "CLIPScore", -float(k), 0.1) for k, m in enumerate("abc")]
    found = answer("ranking", results(*rows))
    assert "FID and precision (and 2 more pairs of columns) agree most" in said(found)


@pytest.mark.parametrize("name", ["trade-offs", "groups", "ranking", "prompt-types"])
def test_that_entries_are_single_runs_is_said_once(name: str) -> None:
    rows = [
        row(m, metric, 1.0 + k, 0.1, data_set=d, group=g)
        for k, m in enumerate("ab")
        for metric in ("FID", "recall")
        for d in ("sets/a", "sets/b")
        for g in ("", "x", "y")
    ]
    found = answer(name, results(*rows))
    note = "Each entry is one training run; how runs differ is not included."
    assert found.sentences.count(note) == 1


# Prompt types.


def test_prompt_types_tell_whether_the_order_changes() -> None:
    rows = []
    for data_set, values in (("captions", (20.0, 22.0, 25.0)), ("classes", (30.0, 28.0, 35.0))):
        for model, value in zip("abc", values, strict=True):
            rows.append(row(model, "FID", value, 0.1, data_set=data_set))
            rows.append(row(model, "precision", 0.5, 0.1, data_set=data_set))
    found = answer("prompt-types", results(*rows))
    fid, precision = (found.data["figures"][name] for name in ("FID", "precision"))
    assert {(p["a"], p["b"]): p["verdict"] for p in fid["pairs"]} == {
        ("a", "b"): "reversed",
        ("a", "c"): "a",
        ("b", "c"): "a",
    }
    assert all(p["inversion"] == pytest.approx(0.5, abs=0.05) for p in precision["pairs"])
    assert fid["kendall"][0]["tau"] == pytest.approx(
        stats.kendalltau([20, 22, 25], [30, 28, 35]).statistic
    )
    assert "the order changes with the prompts: a is better on captions and b on classes" in (
        said(found)
    )
    assert said(found).count("; open: 3 of 3 pairs.") + said(found).count(": open: 3 of 3") == 1
    assert "probability of a change" not in said(found)
    assert "share of draws that change" in found.tables["orders"].columns


def test_data_sets_of_unequal_numbers_are_refused_unless_told() -> None:
    rows = [row(m, "FID", v, 0.1) for m, v in (("a", 1.0), ("b", 2.0))]
    with pytest.raises(UserError, match="two data sets at least and has sets/a alone"):
        answer("prompt-types", results(*rows))
    rows += [
        row(m, "FID", v, 0.1, data_set="sets/b", n_real=70) for m, v in (("a", 1.0), ("b", 2.0))
    ]
    with pytest.raises(UserError, match=r"1,000 real .* 70 real .*unequal_n=true"):
        answer("prompt-types", results(*rows))
    found = answer("prompt-types", results(*rows), {"unequal_n": True})
    assert found.data["figures"]["FID"]["pairs"][0]["verdict"] == "a"
    assert "do not compare between data sets" in said(found)
