"""What exercises say of ties, ranges and missing figures; the rows they take, what they refuse."""

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
    sentence = found.sentences[0]
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
    assert share["p_equal"] == pytest.approx(free["p_equal"], rel=0.25)
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
            numbers = ("value", "low", "high", "FID", "recall", "share", "decided")
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


# What every exercise refuses.


def test_figures_that_do_not_compare_are_refused_in_one_sentence() -> None:
    rows = [row(m, f, v) for m, v in (("a", 1.0), ("b", 2.0)) for f in ("FID", "recall")]
    other = [row("c", "FID", 3.0, n_generated=5000), row("c", "recall", 3.0)]
    with pytest.raises(UserError, match=r"FID on sets/a .* a has 1,000 .* c 5,000 .*n_generated="):
        answer("trade-offs", results(*rows, *other))
    kept = answer("trade-offs", results(*rows, *other), {"n_generated": 1000})
    assert kept.data["fronts"]["sets/a"][0]["subjects"] == ["a", "b"]
    other = [row("c", "FID", 3.0, protocol="q"), row("c", "recall", 3.0)]
    for name in ("trade-offs", "ranking"):
        with pytest.raises(
            UserError, match="a has protocol 7dc1aaaaaaaa and c protocol q; evaluate both"
        ):
            answer(name, results(*rows, *other))
    twice = row("a", "FID", 1.5)
    with pytest.raises(UserError, match="two values of FID of a .*1.0 and 1.5"):
        answer("trade-offs", results(*rows, twice))


def test_one_name_for_two_sources_is_refused() -> None:
    rows = [row(m, f, v) for m, v in (("a", 1.0), ("b", 2.0)) for f in ("FID", "recall")]
    rows = [replace(one, source=f"runs/{one.model}") for one in rows]
    assert answer("trade-offs", results(*rows)).data
    rows[1] = replace(rows[1], source="runs/other")  # the recall of another run
    with pytest.raises(UserError, match="the table has a from runs/a and from runs/other; give"):
        answer("trade-offs", results(*rows))


def test_what_the_table_lacks_is_named_with_what_it_has() -> None:
    rows = [row(m, f, v) for m, v in (("a", 1.0), ("b", 2.0)) for f in ("FID", "recall")]
    table = results(*rows)
    for options, words in (
        ({"metrics": ["KID"]}, "no figure 'KID' here; it has FID, recall"),
        ({"models": ["z"]}, "no model 'z' here; it has a, b"),
        ({"metrics": ["FID"]}, "takes two or three figures and has 1"),
        ({"metric": ["FID"]}, "`metric` is not a field; did you mean `metrics`"),
        ({"level": 2}, "`level` is 2"),
    ):
        with pytest.raises(UserError, match=words):
            answer("trade-offs", table, options)
    with pytest.raises(UserError, match="no exercise 'trade'; choose one of groups"):
        answer("trade", table)
    both = [row(m, "recall", v, features="dinov2") for m, v in (("a", 1.0), ("b", 2.0))]
    with pytest.raises(UserError, match="write recall@ or recall@dinov2"):
        answer("trade-offs", results(*rows, *both), {"metrics": ["FID", "recall"]})
    found = answer("trade-offs", results(*rows, *both), {"metrics": ["FID", "recall@dinov2"]})
    assert found.data["fronts"]["sets/a"][0]["figures"] == ["FID", "recall@dinov2"]


def test_two_values_of_one_thing_say_what_to_delete() -> None:
    rows = [row(m, f, v) for m, v in (("a", 1.0), ("b", 2.0)) for f in ("FID", "recall")]
    with pytest.raises(UserError) as refusal:
        answer("trade-offs", results(*rows, row("a", "FID", 1.5)))
    words = (
        '(1.0 and 1.5) under one protocol; delete the file in the table\'s rows/ that says "value"'
        ": 1.0 or 1.5, which results.csv is written from, or, in a CSV that stands alone, its line"
    )
    assert str(refusal.value).endswith(words)


# Which rows.


def test_names_that_are_numbers_may_be_typed_as_numbers() -> None:
    rows = [
        row("m", metric, value + at / 1000, checkpoint=str(at))
        for at in (1280, 2560, 5120)
        for metric, value in (("FID", 3.0), ("recall", 0.5))
    ]
    found = answer("trade-offs", results(*rows), {"checkpoints": [1280, "2560"]})
    (front,) = found.data["fronts"]["sets/a"]
    assert front["subjects"] == ["m (checkpoint 1280)", "m (checkpoint 2560)"]
    with pytest.raises(UserError, match="`checkpoints.0` is true: should be a valid string"):
        answer("trade-offs", results(*rows), {"checkpoints": [True]})
    rows = [row("m", "FID", float(g), 0.1, group=str(g)) for g in range(4)]
    found = answer("groups", results(*rows), {"groups": [1, 3]})
    assert found.data["groups"]["sets/a"]["FID"]["groups"] == ["1", "3"]


def shared() -> list[Row]:
    """Two plans in one table: a, b and c under one protocol a figure, a and d under another."""
    rows = []
    for metric, first, second in (("FID", ONE, TWO), ("recall", "abcd" * 4, OTHER)):
        rows += [
            row(m, metric, v, 0.01, protocol=first) for m, v in zip("abc", (1, 2, 3), strict=True)
        ]
        rows += [
            row(m, metric, v, 0.01, protocol=second) for m, v in zip("ad", (5, 4), strict=True)
        ]
    return rows


def test_a_table_of_two_protocols_is_asked_about_one() -> None:
    table = results(*shared())
    for name in ("trade-offs", "ranking"):
        with pytest.raises(UserError) as refusal:
            answer(name, table)
        words = "or choose with protocols=[7dc1aaaaaaaa, abcdabcdabcd]"
        assert str(refusal.value).endswith(words)
    found = answer("trade-offs", table, {"protocols": ["7dc1aaaaaaaa", "abcdabcdabcd"]})
    (front,) = found.data["fronts"]["sets/a"]
    assert front["subjects"] == ["a", "b", "c"]
    assert "Left out by protocols: d on sets/a." in found.sentences
    found = answer("trade-offs", table, {"protocols": [TWO, OTHER]})
    assert found.data["fronts"]["sets/a"][0]["subjects"] == ["a", "d"]
    lines = {line[1]: line for line in found.tables["points"].rows}
    assert lines["a"][7:10] == (5.0, 5.0 - Z * 0.01, 5.0 + Z * 0.01)


def test_protocols_are_named_by_enough_of_their_beginning() -> None:
    table = results(*shared())
    there = "it has 7dc1aaaaaaaa, 7dc1bbbbbbbb, abcdabcdabcd, '012344444444'"
    for protocols, words in (
        (["7dc1"], "'7dc1' begins several protocols here: 7dc1aaaaaaaa and 7dc1bbbbbbbb"),
        (["beef"], f"no protocol 'beef' here; {there}"),
        (["7dc"], "'7dc' is too short; write 4 characters"),
    ):
        with pytest.raises(UserError, match=words):
            answer("trade-offs", table, {"protocols": protocols})
    # 0123 as YAML's number is 123, so the refusal quotes it.
    rows = [r for r in shared() if r.protocol in (ONE, TWO, OTHER) and r.model in "ad"]
    rows += [replace(r, model="e") for r in rows if r.model == "d"]
    with pytest.raises(UserError, match=r"protocols=\[7dc1bbbbbbbb, '012344444444'\]"):
        answer("trade-offs", results(*rows))


def test_no_protocol_is_offered_that_would_leave_one_model_alone() -> None:
    rows = [row("a", f, 1.0) for f in ("FID", "recall")]
    rows += [row("b", f, 2.0, protocol=TWO) for f in ("FID", "recall")]
    with pytest.raises(UserError, match=r"b protocol 7dc1bbbbbbbb; .* say what differs\)$"):
        answer("trade-offs", results(*rows))


def test_groups_of_two_protocols_name_those_of_the_newest_plan() -> None:
    """Two plans of the same models, whose rows do not stand in one order in every group."""
    rows = []
    for metric, letter in (("FID", "c"), ("recall", "d")):
        for group, plans in (("1", "0f"), ("2", "f0")):
            for plan in plans:
                own = f"{letter}{group}{plan}" * 5 + "0"
                for model in "abc" if plan == "f" and group == "2" else "ab":
                    about = {"group": group, "protocol": own, "date": f"{plan}:{model}"}
                    rows.append(row(model, metric, 2.0, 0.1, **about))
    with pytest.raises(UserError) as refusal:
        answer("groups", results(*rows))
    listed = str(refusal.value).partition("protocols=[")[2].rstrip("]").split(", ")
    assert listed == [beginning * 4 for beginning in ("c1f", "c2f", "d1f", "d2f")]
    found = answer("groups", results(*rows), {"protocols": listed})
    assert list(found.data["groups"]["sets/a"]["recall"]["models"]) == ["a", "b"]
    assert "Left out: c, without FID of 1." in found.sentences
    # With other numbers of pictures each model has protocols of its own.
    rows = []
    for group, plans in (("1", "0f"), ("2", "f0")):
        for model, turn in (("a", "0f"), ("b", "f0")):
            for plan in plans if model == "a" else turn:
                about = {"group": group, "n_generated": 10 + ord(model), "date": f"{plan}:{model}"}
                own = f"e{model}{plan}{group}" * 4
                rows.append(row(model, "FID", 2.0, 0.1, protocol=own, **about))
    with pytest.raises(UserError, match=r"protocols=\[eaf1eaf1eaf1, ebf1.*, eaf2.*, ebf2.{8}\]"):
        answer("groups", results(*rows), {"unequal_n": True})
