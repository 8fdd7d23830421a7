"""Which rows of a table exercises take, by name and by protocol, and what they refuse."""

from dataclasses import replace

import pytest
from scipy import stats

from etude.core.errors import UserError
from etude.evaluation.exercises import answer
from etude.evaluation.results import Results, Row

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
