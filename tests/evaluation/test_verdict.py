"""Verdicts in words: what is told apart, what is not, and what is never compared."""

import re
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from etude.core.errors import UserError
from etude.evaluation.results import Results, Row
from etude.evaluation.verdict import OWN_BEST, refuse_unlike, verdicts
from etude.metrics.estimates import Estimate
from etude.metrics.figures import mean_of_scores
from etude.metrics.intervals import IntervalConfig
from etude.planning import judged

CONFIG = IntervalConfig(replicates=50)
NOT_INCLUDED = "Training-run noise not included: one run each."


def results(*made: tuple[Row, np.ndarray]) -> Results:
    """Rows with the estimates of means of scores."""
    rows, estimates = [], {}
    for number, (row, scores) in enumerate(made):
        estimate = mean_of_scores(row.metric, scores, CONFIG)
        estimates[str(number)] = estimate
        rows.append(replace(row, value=estimate.value, estimate=str(number)))
    return Results(tuple(rows), estimates)


def row(model: str, **fields) -> Row:
    begun = Row(model, "coco", "CLIPScore", 0.0, "higher", n_generated=400, protocol="p")
    return replace(begun, **fields)


def scores(seed: int, shift: float = 0.0, count: int = 400) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=count) + shift


def test_the_best_is_named_and_what_cannot_be_told_apart_with_the_number_that_would() -> None:
    sets = {"a": scores(0, 1.0), "b": scores(1, 0.93), "c": scores(2)}
    found = results(*((row(name), x) for name, x in sets.items()))
    (verdict,) = verdicts(found, "CLIPScore", data_set="coco", config=CONFIG)
    ranked = sorted(sets, key=lambda name: -sets[name].mean())
    assert list(verdict.ranking) == ranked
    assert verdict.alike == (tuple(ranked[:2]),)
    text = str(verdict)
    assert f"{ranked[0]} has the best value" in text
    assert f"cannot be told apart from {ranked[1]}." in text
    assert f"{ranked[0]} is better than c" in text and NOT_INCLUDED in text
    # Pairs of equal pictures are paired t tests; three of them, by Bonferroni and a power of 0.8.
    gap = sets[ranked[0]] - sets[ranked[1]]
    z = stats.norm.ppf(1 - 0.05 / 6) + stats.norm.ppf(0.8)
    expected = 400 * (z * stats.sem(gap) / gap.mean()) ** 2
    count = verdict.wanted[verdict.alike[0]]
    assert count == pytest.approx(expected, abs=1)
    said = int(re.search(r"about ([\d,]+) more pictures", text).group(1).replace(",", ""))
    assert count - 400 <= said <= 1.1 * (count - 400)
    p_values = [stats.ttest_rel(sets[b], sets[a]).pvalue for b, a in verdict.differences]
    assert [d.p_value for d in verdict.differences.values()] == pytest.approx(p_values, rel=1e-6)


def test_one_clearly_best_model_is_said_to_be_so() -> None:
    found = results((row("a"), scores(0)), (row("b"), scores(1, 3.0)))
    (verdict,) = verdicts(found, "CLIPScore", data_set="coco", config=CONFIG)
    assert str(verdict).startswith("CLIPScore on coco: b is best (")
    assert verdict.alike == () and verdict.wanted == {}
    worse = Results(tuple(replace(r, better="lower") for r in found.rows), found.estimates)
    (verdict,) = verdicts(worse, "CLIPScore", data_set="coco", config=CONFIG)
    assert verdict.ranking == ("a", "b")


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("protocol", "protocols"),
        ("n_generated", "numbers of generated pictures"),
        ("n_real", "numbers of real pictures"),
        ("features", "features"),
    ],
)
def test_unlike_rows_are_refused_by_name(field: str, words: str) -> None:
    other = row("b", **{field: 999 if field.startswith("n_") else "other"})
    found = results((row("a"), scores(0)), (other, scores(1)))
    kept = rf"results\.where\({field}=('p'|''|0|400)\)$"
    with pytest.raises(UserError, match=f"different {words}.*(999|other) \\(b\\).*{kept}"):
        verdicts(found, "CLIPScore", data_set="coco", config=CONFIG)


def test_one_model_has_no_verdict() -> None:
    found = results((row("a"), scores(0)))
    with pytest.raises(UserError, match="there for 1 model: a verdict needs two"):
        verdicts(found, "CLIPScore", data_set="coco", config=CONFIG)


def sweep(**fields) -> list[tuple[Row, np.ndarray]]:
    # At guidance 2 a leads, but b's own best is 4.
    shifts = {("a", 2.0): 1.0, ("a", 4.0): 0.5, ("b", 2.0): 0.0, ("b", 4.0): 2.0}
    return [
        (row(model, guidance=scale, **fields), scores(number, shift))
        for number, ((model, scale), shift) in enumerate(shifts.items())
    ]


def test_models_meet_at_every_common_guidance_and_at_their_own_best() -> None:
    found = verdicts(results(*sweep()), "CLIPScore", data_set="coco", config=CONFIG)
    assert [v.at for v in found] == ["guidance 2", "guidance 4", OWN_BEST]
    assert [v.ranking[0] for v in found] == ["a", "b", "b"]
    assert "Guidance: a 2, b 4." in str(found[2])
    assert "was chosen by these same figures" in str(found[2])


def test_pictures_that_chose_never_count_but_choose_the_guidance() -> None:
    lies = [
        (row("a", guidance=scale, selected=True, seed=9), scores(20 + int(scale), shift))
        for scale, shift in ((2.0, 0.0), (4.0, 50.0))
    ]
    lies += [
        (row("b", guidance=scale, selected=True, seed=9), scores(30 + int(scale), shift))
        for scale, shift in ((2.0, 60.0), (4.0, 0.0))
    ]
    found = verdicts(results(*sweep(), *lies), "CLIPScore", data_set="coco", config=CONFIG)
    best = found[-1]
    assert "Guidance: a 4, b 2." in str(best)
    assert "chosen by these same figures" not in str(best)
    plain = results(*sweep())
    values = {(r.model, r.guidance): r.value for r in plain.rows}
    assert best.differences["a", "b"].value == pytest.approx(values["a", 4.0] - values["b", 2.0])


def test_training_runs_enter_as_random_effects() -> None:
    # Runs scatter 20 times as much as pictures do: the test is Student's on the values of the runs.
    rng = np.random.default_rng(3)
    made, values = [], {"a": [], "b": []}
    for model, centre in (("a", 0.0), ("b", 0.6)):
        for run in range(4):
            x = scores(run + 10 * (model == "b"), centre + rng.normal())
            made.append((row(model, training_seed=run), x))
            values[model].append(x.mean())
    (verdict,) = verdicts(results(*made), "CLIPScore", data_set="coco", config=CONFIG)
    assert "Training-run noise is included: 4 runs each or more; runs are assumed" in str(verdict)
    (found,) = verdict.differences.values()
    pooled = stats.ttest_ind(values["b"], values["a"])
    assert found.p_value == pytest.approx(pooled.pvalue, rel=0.15)
    one_each = results(*(made[i] for i in (0, 4)))
    (single,) = verdicts(one_each, "CLIPScore", data_set="coco", config=CONFIG)
    assert NOT_INCLUDED in single.sentences
    (alone,) = single.differences.values()
    assert alone.standard_error < found.standard_error / 3


def exact(model: str, value: float, error: float, of: object, **fields) -> tuple[Row, Estimate]:
    """A figure with exact errors of 60 units, whose sum of squares is that of the error."""
    signs = np.tile([1.0, -1.0], 30)
    by = f"{model} {of}"
    estimate = Estimate("CLIPScore", value, {}, errors=error * signs / 60**0.5, drawn_by=by)
    return row(model, value=value, estimate=by, **fields), estimate


def of_exact(made: list[tuple[Row, Estimate]]) -> Results:
    return Results(tuple(one for one, _ in made), {one.estimate: e for one, e in made})


@pytest.mark.parametrize(("models", "scatter"), [(6, 0.5), (6, 4.0), (3, 2.0)])
def test_two_runs_a_model_name_few_false_winners(models: int, scatter: float) -> None:
    """Equal models of two runs each, whose runs scatter by so many errors of the pictures.

    With a variance for each model some of six come out small, and 15 in 100 verdicts name a winner.
    """
    rng, wrong, repeats = np.random.default_rng(12), 0, 120
    for _ in range(repeats):
        made = [
            exact(f"m{m}", scatter * rng.normal() + rng.normal(), 1.0, k, training_seed=k)
            for m in range(models)
            for k in range(2)
        ]
        (verdict,) = verdicts(of_exact(made), "CLIPScore", data_set="coco", config=CONFIG)
        wrong += len(verdict.alike) < len(verdict.differences)
    assert wrong <= stats.binom.ppf(0.99, repeats, 0.05)


def test_a_model_of_one_run_is_named_and_the_scatter_of_the_others_is_their_own() -> None:
    values = {"a": (0.0, 2.0), "b": (1.0, 4.0), "c": (1.5,)}
    made = [
        exact(model, value, 1e-3, k, training_seed=k)
        for model, of in values.items()
        for k, value in enumerate(of)
    ]
    (verdict,) = verdicts(of_exact(made), "CLIPScore", data_set="coco", config=CONFIG)
    assert verdict.sentences[-1].startswith(
        "c has one training run, so how runs differ is not included in its comparisons; in the"
    )
    welch = stats.ttest_ind(values["b"], values["a"])
    assert verdict.differences["b", "a"].p_value == pytest.approx(welch.pvalue, rel=1e-3)
    assert verdict.ranking == ("b", "c", "a") and verdict.alike == (("b", "a"),)


def test_the_best_of_many_scales_is_seldom_better_than_an_equal_model() -> None:
    rng, wrong, repeats = np.random.default_rng(13), 0, 150
    for _ in range(repeats):
        made = [exact("a", rng.normal(), 1.0, k, guidance=float(k)) for k in range(10)]
        made.append(exact("b", rng.normal(), 1.0, 0, guidance=0.0))
        best = verdicts(of_exact(made), "CLIPScore", data_set="coco", config=CONFIG)[-1]
        assert best.at == OWN_BEST
        wrong += not best.alike
    assert wrong <= stats.binom.ppf(0.99, repeats, 0.05)
    assert "are corrected for the scales tried" in str(best)
    ((pair, one),) = best.differences.items()
    alone = 2 * stats.t.sf(abs(one.value) / 2**0.5, 118)
    assert one.p_value == pytest.approx(min(10 * alone, 1.0), rel=0.02)
    half = stats.t.ppf(1 - 0.025 / 10, 118) * 2**0.5
    assert one.high - one.low == pytest.approx(2 * half, rel=0.02)


def test_pictures_are_asked_for_only_where_they_would_help() -> None:
    """Two models of two runs each, whose runs scatter, beside one of a single run."""
    made = [
        (row(model, training_seed=run), scores(10 * run + place, shift))
        for place, model in enumerate("ab")
        for run, shift in ((0, -0.5), (1, 0.5))
    ]
    made.append((row("c", training_seed=0), scores(77, 0.01)))
    (verdict,) = verdicts(results(*made), "CLIPScore", data_set="coco", config=CONFIG)
    runs = next(pair for pair in verdict.alike if set(pair) == {"a", "b"})
    assert runs not in verdict.wanted
    assert "more training runs would narrow this" in str(verdict)
    assert verdict.wanted and all("c" in pair for pair in verdict.wanted)


def test_equal_runs_leave_the_noise_of_pictures() -> None:
    # Without an effect of the run, S^2 / K alone would forget what all runs share: the pictures.
    shared = scores(40)
    made = []
    for model, base in (("a", shared), ("b", scores(41))):
        made += [(row(model, training_seed=run), base + 1e-3 * scores(run)) for run in range(3)]
    (verdict,) = verdicts(results(*made), "CLIPScore", data_set="coco", config=CONFIG)
    (found,) = verdict.differences.values()
    assert found.standard_error == pytest.approx(stats.sem(shared - scores(41)), rel=0.02)


def test_rows_without_intervals_say_nothing() -> None:
    rows = tuple(replace(row(m), value=v) for m, v in (("a", 1.0), ("b", 2.0)))
    (verdict,) = verdicts(Results(rows), "CLIPScore", data_set="coco", config=CONFIG)
    assert "have no interval, so nothing is said of their order" in str(verdict)
    assert verdict.alike == (("b", "a"),)


def many(count: int, **fields) -> list[tuple[Row, np.ndarray]]:
    """Checkpoints of a model at two scales, in groups of four that are close to each other."""
    return [
        (
            row("a model of some length", checkpoint=str(10**9 + k), guidance=scale, **fields),
            scores(k, 0.5 * (k // 4) + 0.01 * scale),
        )
        for k in range(count)
        for scale in (2.0, 4.0)
    ]


def test_of_many_models_the_words_tell_the_best_against_its_rivals() -> None:
    found = verdicts(results(*many(24)), "CLIPScore", data_set="coco", config=CONFIG)
    assert [v.at for v in found] == ["guidance 2", "guidance 4", OWN_BEST]
    for verdict in found:
        best, text = verdict.ranking[0], str(verdict)
        assert len(verdict.differences) == 24 * 23 / 2 and len(text) < 1500
        rivals = [pair[1] for pair in verdict.alike if pair[0] == best]
        worse = [name for name in verdict.ranking[1:] if name not in rivals]
        assert 2 <= len(rivals) <= 3 and verdict.ranking[20] in worse
        apart = re.search(r"cannot be told apart from (.*?)\. ", text)[1]
        assert re.split(", | and ", apart) == rivals
        better = re.search(r"better than (\d+) of (\d+) others, .*?: (.*?)\. ", text)
        assert better[1] == str(len(worse)) and better[2] == "23"
        assert re.split(", | and ", better[3]) == [*worse[:3], f"{len(worse) - 3} more"]
        difference = verdict.differences[best, worse[0]]
        assert f"Its value minus that of the first of them is {difference}, p = " in text
        said = re.search(r"in place of 400, would tell .*? apart: (.*?)\. ", text)[1]
        for part, rival in zip(re.split(", | and ", said), rivals, strict=True):
            number = int(part.removeprefix(f"from {rival} ").replace(",", ""))
            assert verdict.wanted[best, rival] <= number <= 1.1 * verdict.wanted[best, rival]
    # The guidance of the best is named, with the checkpoint.
    said = re.search(r"Guidance: (.*?)\. ", str(found[-1]))[1].split(", ")
    values = {(r.checkpoint, r.guidance): r.value for r in results(*many(24)).rows}
    scales = []
    for name in found[-1].ranking[:3]:
        of_name = {g: value for (c, g), value in values.items() if name.endswith(f" at {c}")}
        scales.append(f"{name} {max(of_name, key=of_name.get):g}")
    assert said == [*scales, "21 more"]


def test_words_do_not_grow_with_the_models() -> None:
    second = [(replace(r, training_seed=1), x + 0.01) for r, x in many(40)]
    half = [(r, x) for r, x in second if int(r.checkpoint) % 2]  # the others have one run
    for made in (many(4), many(12), many(40), [*many(40), *second], [*many(40), *half]):
        for one in verdicts(results(*made), "CLIPScore", data_set="coco", config=CONFIG):
            assert len(str(one)) < 1500
    plain = [replace(r, protocol=str(k)) for k, (r, _) in enumerate(many(40))]
    with pytest.raises(UserError, match="; 77 more; evaluate"):
        refuse_unlike(plain)


def test_the_guidance_of_checkpoints_of_one_model_is_told_apart() -> None:
    shifts = {("48", 1.0): 0.0, ("48", 2.0): 1.0, ("96", 1.0): 3.0, ("96", 2.0): 2.0}
    made = [
        (row("small", checkpoint=checkpoint, guidance=scale), scores(k, shift))
        for k, ((checkpoint, scale), shift) in enumerate(shifts.items())
    ]
    best = verdicts(results(*made), "CLIPScore", data_set="coco", config=CONFIG)[-1]
    assert "Guidance: small at 48 2, small at 96 1." in str(best)
    assert "Each was chosen by these same figures" in str(best)
    judges = [(replace(r, selected=True), x) for r, x in made if r.checkpoint == "48"]
    best = verdicts(results(*made, *judges), "CLIPScore", data_set="coco", config=CONFIG)[-1]
    assert "The guidance of small at 96 was chosen by these same figures" in str(best)


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_a_model_whose_figure_is_no_number_is_named(odd: float) -> None:
    made = [(row(name), scores(k)) for k, name in enumerate("abc")]
    found = results(*made)
    rows = (*found.rows[:2], replace(found.rows[2], value=odd))
    (verdict,) = verdicts(Results(rows, found.estimates), "CLIPScore", data_set="coco")
    assert set(verdict.ranking) == {"a", "b"}
    assert "Left out: c, whose CLIPScore is not a number." in str(verdict)
    alone = tuple(replace(r, value=odd) for r in rows[1:])
    with pytest.raises(UserError, match=r"for 1 model: .* figure \(Left out: b and c, whose CLIPS"):
        verdicts(Results((rows[0], *alone), found.estimates), "CLIPScore", data_set="coco")


def test_features_are_named_where_a_figure_is_there_of_several() -> None:
    made = [
        (row(name, metric="recall", features=features), scores(k, shift))
        for k, (name, features, shift) in enumerate(
            [("a", "x", 0), ("b", "x", 3), ("a", "y", 3), ("b", "y", 0)]
        )
    ]
    for features, best in (("x", "b"), ("y", "a")):
        found = verdicts(results(*made), "recall", data_set="coco", features=features)
        assert str(found[0]).startswith(f"recall@{features} on coco: {best} is best (")
    (alone,) = verdicts(results(*made[:2]), "recall", data_set="coco")
    assert str(alone).startswith("recall on coco: b is best (")


def test_runs_of_one_model_at_different_checkpoints_count_as_one() -> None:
    places = [("a", 0, "1000"), ("a", 1, "1064"), ("b", 0, "1000"), ("b", 1, "1000")]
    made = [
        (row(name, training_seed=seed, checkpoint=at), scores(k, 1.0 * (name == "a")))
        for k, (name, seed, at) in enumerate(places)
    ]
    (verdict,) = verdicts(results(*made), "CLIPScore", data_set="coco", config=CONFIG)
    assert verdict.ranking == ("a", "b")
    assert "Training-run noise is included: 2 runs each or more;" in str(verdict)
    assert "The training runs of a are at different checkpoints: 1000 and 1064." in str(verdict)
    screened = row("a", training_seed=0, checkpoint="900", selected=True), scores(8)
    (again,) = verdicts(results(*made, screened), "CLIPScore", data_set="coco", config=CONFIG)
    assert again.ranking == verdict.ranking  # a screen of more checkpoints promoted these
    assert judged(results(*made[:2]), CONFIG) == []  # one model, whatever its runs
    more = [*made, (row("a", training_seed=0, checkpoint="1064"), scores(9, 1.0))]
    (verdict,) = verdicts(results(*more), "CLIPScore", data_set="coco", config=CONFIG)
    assert set(verdict.ranking) == {"a at 1000", "a at 1064", "b"}  # a curve of checkpoints


def test_equal_values_have_no_best() -> None:
    same = scores(0)
    found = results((row("a"), same), (row("b"), same), (row("c"), scores(1, -5.0)))
    (verdict,) = verdicts(found, "CLIPScore", data_set="coco", config=CONFIG)
    assert re.search(r"coco: a and b share the best value \(\S+\)\. a and b have the", str(verdict))
    assert "a and b have the same value on every half of the pictures." in str(verdict)
    (verdict,) = verdicts(
        Results(found.rows[:2], found.estimates), "CLIPScore", data_set="coco", config=CONFIG
    )
    assert re.search(r"coco: a and b have the same value \(\S+\)\.", str(verdict))
    assert "is best" not in str(verdict)
