"""What exercises say of ties, ranges, unequal numbers and missing figures, and of their choice."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from etude.core.errors import UserError
from etude.evaluation.exercises import answer
from etude.evaluation.results import Results, Row
from etude.metrics.estimates import Estimate

BETTER = {"FID": "lower", "precision": "higher", "recall": "higher", "CLIPScore": "higher"}
Z = stats.norm.ppf(0.975)
ONE, TWO = "7dc1" + "a" * 12, "7dc1" + "b" * 12
OTHER = "0123" + "4" * 12  # reads as a number


def row(model: str, metric: str, value: float, error: float | None = None, **more: object) -> Row:
    about = {"data_set": "sets/a", "n_real": 1000, "n_generated": 1000, "protocol": ONE}
    if error is not None:
        about |= {"low": value - Z * error, "high": value + Z * error}
    return Row(model=model, metric=metric, value=value, better=BETTER[metric], **(about | more))


def results(*rows: Row) -> Results:
    return Results(tuple(rows))


def said(finding: object) -> str:
    return "\n".join(finding.sentences)


# Ties and ranges of groups.

TIED = {"dark": 0.0, "light": 1.0, "medium": 0.0, "medium-dark": 0.0, "medium-light": 0.0}


def by_group(values: dict[str, float], error: float | None, metric: str, **more) -> list[Row]:
    return [row("m", metric, v, error, group=g, **more) for g, v in values.items()]


def test_every_group_at_an_extreme_is_named() -> None:
    found = answer("groups", results(*by_group(TIED, None, "precision")))
    one = found.data["groups"]["sets/a"]["precision"]["models"]["m"]
    assert one["worst"] == ["dark", "medium", "medium-dark", "medium-light"]
    assert one["best"] == ["light"] and one["gap"] == 1.0
    assert found.sentences[0] == (
        "m on sets/a, precision (higher is better): worst in dark, medium and 2 more (0), best in "
        "light (1), a gap of 1; without intervals this is about the values alone."
    )
    lower = answer("groups", results(*by_group(TIED, None, "FID")))
    one = lower.data["groups"]["sets/a"]["FID"]["models"]["m"]
    assert one["worst"] == ["light"] and len(one["best"]) == 4
    assert "worst in light (1), best in dark, medium and 2 more (0), a gap of 1;" in said(lower)


def test_equal_groups_have_no_worst_one() -> None:
    equal = dict.fromkeys(("north", "south", "east"), 0.5)
    found = answer("groups", results(*by_group(equal, 0.01, "precision")))
    (sentence,) = found.sentences
    assert "equal in all 3 groups (0.5), a gap of 0 [0, 0.0" in sentence
    assert "worst" not in sentence and sentence.endswith("].")


def test_gaps_and_differences_stay_where_the_figure_can_be() -> None:
    def found(metric: str, scale: float = 1.0) -> dict:
        values = {group: scale * value for group, value in TIED.items()}
        table = results(*by_group(values, 0.3 * scale, metric))
        return answer("groups", table).data["groups"]["sets/a"][metric]["models"]["m"]

    share, free = found("precision"), found("FID")
    assert free["gap_high"] > 1.5
    assert share["gap_high"] == 1.0 and share["chance_gap"] <= 1.0
    assert share["p_equal"] == pytest.approx(free["p_equal"], abs=0.02)
    for one, other in zip(share["differences"], free["differences"], strict=True):
        # One of five is 4/5 from the mean of all at most.
        assert one["low"] == pytest.approx(max(other["low"], -0.8), abs=0.03)
        assert one["high"] == pytest.approx(min(other["high"], 0.8), abs=0.03)
        assert -0.8 <= one["low"] <= one["high"] <= 0.8
    assert max(d["high"] for d in free["differences"]) > 0.9
    percent = found("precision", 100.0)  # on another scale, of which nothing is known
    assert percent["gap_high"] == pytest.approx(100 * free["gap_high"], rel=0.03)


def test_ends_at_another_level_stay_where_the_figure_can_be() -> None:
    """The estimate knows the range of a figure that is no proportion."""
    rng, rows, estimates = np.random.default_rng(0), [], {}
    for group, value in (("north", 0.95), ("south", 0.1)):
        error = 0.2 * rng.standard_normal(200)
        drawn = {0.5: value + np.concatenate([error, -error])}
        one = Estimate("CLIPScore", value, drawn, at_least=0.0, at_most=1.0)
        estimates[group] = one
        rows.append(row("m", "CLIPScore", value, group=group, estimate=group))
    found = answer("groups", Results(tuple(rows), estimates), {"level": 0.99})
    lines = {line[3]: line for line in found.tables["groups"].rows}
    assert lines["north"][7] == 1.0 and lines["south"][6] == 0.0
    one = found.data["groups"]["sets/a"]["CLIPScore"]["models"]["m"]
    assert one["gap_high"] == 1.0
    assert all(abs(d[end]) <= 0.5 for d in one["differences"] for end in ("low", "high"))


# Groups of unequal numbers.


def folders() -> list[Row]:
    """Two models whose class folders hold other numbers of pictures; so their protocols differ."""
    rows = []
    for model, counts in (("a", (52, 52, 46)), ("b", (56, 57, 37))):
        for place, (group, n) in enumerate(zip(("cat", "dog", "hen"), counts, strict=True)):
            about = {"group": group, "n_generated": n, "protocol": f"{group}{n}{'0' * 10}"}
            rows.append(row(model, "FID", 10.0 + place, 0.2, **about))
            rows.append(row(model, "recall", 0.5 + place / 10, 0.01, **about))
    return rows


def test_models_of_other_numbers_in_a_group_are_compared_when_told() -> None:
    table = results(*folders())
    with pytest.raises(UserError) as refusal:
        answer("groups", table)
    assert str(refusal.value) == (
        "FID on sets/a, cat, cannot be compared: a (group cat) has 52 generated pictures and b "
        "(group cat) 56 generated pictures; evaluate both the same way, or allow it with "
        "unequal_n=true"
    )
    found = answer("groups", table, {"unequal_n": True})
    both = found.data["groups"]["sets/a"]["FID"]["models"]
    assert list(both) == ["a", "b"] and both["b"]["values"] == [10.0, 11.0, 12.0]
    (note,) = [s for s in found.sentences if "unequal" in s]
    assert note.startswith("FID and recall on sets/a are of unequal numbers of generated pictures")
    assert "a: cat 52, dog 52, hen 46; b: cat 56, dog 57, hen 37" in note


def test_what_a_number_of_pictures_leaves_out_is_named() -> None:
    options = {"n_generated": 52, "unequal_n": True}
    found = answer("groups", results(*folders()), options)
    assert found.data["groups"]["sets/a"]["FID"]["groups"] == ["cat", "dog"]
    assert "Left out by n_generated=52: a on sets/a, hen and b on sets/a." in found.sentences
    rows = [row(m, "FID", v, 0.1) for m, v in (("a", 1.0), ("b", 2.0), ("c", 3.0))]
    rows += [row(m, "recall", v, 0.1) for m, v in (("a", 0.1), ("b", 0.2))]
    rows += [row("c", "recall", 0.3, 0.1, n_generated=50), row("a", "FID", 9.0, n_generated=50)]
    found = answer("ranking", results(*rows), {"n_generated": 1000})
    # a has FID at 1,000 pictures too, so nothing of it is missing.
    assert "Left out by n_generated=1000: recall of c on sets/a." in found.sentences


def test_the_refusal_names_only_numbers_that_help() -> None:
    def refused(*counts: int) -> str:
        rows = [
            row(f"m{k}", metric, 1.0 + k, n_generated=n)
            for k, n in enumerate(counts)
            for metric in ("FID", "recall")
        ]
        with pytest.raises(UserError) as refusal:
            answer("trade-offs", results(*rows))
        return str(refusal.value)

    assert refused(10, 20, 20).endswith("evaluate both the same way or choose with n_generated=20")
    assert refused(10, 20).endswith("evaluate both the same way")


def test_one_model_with_two_numbers_in_a_group_has_to_choose() -> None:
    rows = folders() + [replace(r, n_generated=30, protocol="x" * 16) for r in folders()[:2]]
    for options in ({}, {"unequal_n": True}):
        with pytest.raises(UserError, match=r"a \(group cat\) has 52 .* 30 .*choose with n_gen"):
            answer("groups", results(*rows), options)


def test_groups_that_are_not_there_are_answered_with_those_that_are() -> None:
    rows = folders()
    with pytest.raises(UserError, match="no group 'cow' here; it has cat, dog, hen"):
        answer("groups", results(*rows), {"groups": ["cow"], "unequal_n": True})
    with pytest.raises(UserError, match="no group 'cow' here; it has cat, dog, hen"):
        answer("groups", results(*rows), {"groups": ["cat", "cow"], "unequal_n": True})
    with pytest.raises(UserError, match=r"compares two groups .*cat alone.*it has cat, dog, hen"):
        answer("groups", results(*rows), {"groups": ["cat"], "unequal_n": True})
    apart = [r for r in rows if (r.model, r.group) in {("a", "cat"), ("b", "dog")}]
    with pytest.raises(UserError, match=r"\(a, without FID of dog; b, without FID of cat; a, "):
        answer("groups", results(*apart), {"unequal_n": True})
    whole = [row("m", "FID", 1.0)]
    with pytest.raises(UserError, match="no figures of groups"):
        answer("groups", results(*whole), {"groups": ["cat"]})
    other = [row("a", "FID", v, 0.1, data_set="sets/b", group=g) for g, v in (("x", 1), ("y", 2))]
    chosen = {"groups": ["cat", "dog"], "unequal_n": True}
    found = answer("groups", results(*rows, *other), chosen)
    assert list(found.data["groups"]) == ["sets/a"]
    assert "Left out: FID on sets/b, which has none of the chosen groups." in found.sentences


# Tables.


def test_rows_of_two_training_runs_are_told_apart_in_every_table() -> None:
    rows = []
    for training_seed in (0, 1):
        for seed in (3, 4):
            for data_set in ("sets/a", "sets/b"):
                for metric in ("FID", "recall"):
                    for group in ("", "x", "y"):
                        value = training_seed + seed / 10 + len(group)
                        more = {"training_seed": training_seed, "seed": seed, "group": group}
                        more |= {"data_set": data_set}
                        rows.append(row("m", metric, value, 0.1, **more))
    beside = [replace(r, selected=True, features="dinov2") for r in rows]
    beside += [replace(r, n_generated=50) for r in beside]
    beside += [replace(r, selected=True) for r in rows]
    for name in ("trade-offs", "groups", "ranking", "prompt-types"):
        about = {"metrics": ["FID@", "recall@"]} if name == "trade-offs" else {}
        finding = answer(name, results(*rows, *beside), about)
        for part, table in finding.tables.items():
            numbers = ("value", "low", "high", "FID", "recall", "P(", "probability")
            keys = [k for k, c in enumerate(table.columns) if not c.startswith(numbers)]
            found = [tuple(line[k] for k in keys) for line in table.rows]
            assert len(found) == len(set(found)), (name, part)
    points = answer("trade-offs", results(*rows)).tables["points"]
    assert points.columns[:7] == (
        *("data set", "model", "checkpoint", "images seen", "guidance"),
        *("training seed", "seed"),
    )
    assert [line[5:7] for line in points.rows[:4]] == [(0, 3), (0, 4), (1, 3), (1, 4)]


# Ranking.


def test_what_each_model_lacks_is_named() -> None:
    rows = [row("good", f, 1.0, 0.1) for f in ("FID", "recall")]
    rows += [row("bad", "FID", float("nan")), row("bad", "recall", 0.5, 0.1)]
    rows += [row("worse", "FID", 2.0, 0.1)]
    with pytest.raises(UserError) as refusal:
        answer("ranking", results(*rows))
    assert str(refusal.value) == (
        "fewer than two models have every figure on every data set: bad has no FID (not a number); "
        "worse has no recall; name what they share with metrics=[...] and data_sets=[...]"
    )
    with pytest.raises(
        UserError, match=r"\(bad on sets/a, whose FID is not a .*; worse .*no recall"
    ):
        answer("trade-offs", results(*rows))
    rows[3] = row("bad", "recall", float("nan"))
    with pytest.raises(UserError, match="bad has no FID .not a number. and recall .not a number"):
        answer("ranking", results(*rows[:4]))
    with pytest.raises(UserError, match="an order needs two models and good is alone here; "):
        answer("ranking", results(*rows), {"models": ["good"]})


def test_a_table_without_its_estimates_says_what_that_costs() -> None:
    rows = [row(m, f, v, 0.1) for m, v in (("a", 1.0), ("b", 2.0)) for f in ("FID", "recall")]
    alone = [replace(one, estimate="gone") for one in rows]
    words = "The table came without its estimates"
    assert words not in said(answer("ranking", results(*rows)))
    assert words in said(answer("ranking", results(*alone)))
