"""What each kind of arm learns from, against its definition: the toy's loop, whole."""

import dataclasses
import json
import os

import numpy as np
import pytest
import torch

from etude.core.errors import UserError
from etude.core.log import Log
from etude.core.run import Run
from etude.core.signals import Stopper
from etude.data.pool import Pool
from etude.practice.arms import Arm
from etude.practice.feed import Ahead, mixed_feed, pool_feed, real_feed
from etude.practice.learner import load_frozen
from etude.practice.pictures import load_split
from etude.practice.rounds import practise
from etude.practice.scores import entropy
from etude.practice.sources import Static

ARMS = [
    "practice",
    "real",
    {"kind": "static", "equal": "compute"},
    "frozen",
    {"kind": "mixed", "real_share": 0.3},
    {"kind": "prune", "prune": {"score": "entropy", "oversampling": 3}},
    {"kind": "prune", "prune": {"score": "el2n", "keep": "easy", "proxies": 2, "proxy_steps": 5}},
    {"kind": "branch", "rounds": [0, 1, 9]},
]


@pytest.fixture(scope="module")
def ended(toy, tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("arms")
    config = toy.recipe(arms=ARMS, max_rounds=3, chunk=32)
    return toy.run(config, root), root / "toy", config


def test_tables_lead_with_real_pictures_and_compare_with_practice(ended) -> None:
    result, _, _ = ended
    names = ["real", "mixed", "practice", "static-compute", "frozen", "prune-entropy"]
    assert list(result["arms"]) == [*names, "prune-el2n-easy", "branch-000", "branch-001"]
    assert all(name.startswith("practice - ") for name in result["differences"])
    assert len(result["differences"]) == 8


def test_frozen_is_guided_by_the_first_rounds_learner_alone(ended) -> None:
    result, folder, config = ended
    practice, frozen = (Pool(folder / "pools" / name) for name in ("practice", "frozen"))
    first = next(part.learner for part in practice.parts if part.learner)
    assert {part.learner for part in frozen.parts if part.round} == {first}
    assert len({part.learner for part in practice.parts if part.round}) == 3
    assert result["arms"]["frozen"]["added_at"] == result["arms"]["practice"]["added_at"]
    same = np.arange(config.size(1))
    assert np.array_equal(frozen.images(same), practice.images(same))
    later = np.arange(config.size(1), config.size(3))
    assert not np.array_equal(frozen.images(later), practice.images(later))


def test_static_of_equal_compute_has_what_the_drawing_would_buy(ended) -> None:
    result, folder, config = ended
    arms, pool = result["arms"], Pool(folder / "pools" / "practice")
    start = [part for part in pool.parts if part.round == 0]
    # 10 evaluations a picture in blocks of 64 indices; 60 pictures in two parts of one block.
    each = sum(64 * 10 for _ in start) / config.start_samples
    assert arms["static-compute"]["samples"] == int(arms["practice"]["passes"] / each) // 3 * 3
    assert arms["static-compute"]["samples"] > arms["practice"]["samples"]


def test_pruning_keeps_what_its_learner_of_the_moment_finds_hardest(ended, toy) -> None:
    _, folder, config = ended
    kept, every = (Pool(folder / "pools" / f"prune-entropy{end}") for end in ("", ".candidates"))
    alone, _ = toy.generator().draw(np.arange(len(every)), np.arange(len(every)) % 3, seed=3)
    assert np.array_equal(every.images(np.arange(len(every))), alone)
    assert len(every) == 60 + 3 * 90 and len(kept) == 60 + 3 * 30
    for number in (1, 2, 3):
        part = next(part for part in kept.parts if part.round == number)
        path = kept.folder / "learners" / f"{part.learner}.safetensors"
        learner = load_frozen(config.learner, path)
        rows = np.arange(60 + 90 * (number - 1), 60 + 90 * number)
        x = torch.from_numpy(every.images(rows)).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            hardness = entropy(learner(x)).numpy()
        expected = []
        for label in range(3):
            own = np.flatnonzero(rows % 3 == label)
            expected += rows[own[np.argsort(hardness[own])[-10:]]].tolist()
        chosen = kept.seed_indices(np.arange(part.first, part.first + part.count))
        assert chosen.tolist() == sorted(expected)
        indices = np.arange(part.first, part.first + part.count)
        assert np.array_equal(kept.images(indices), every.images(chosen))


def test_pruning_books_what_was_drawn_to_choose_from(ended) -> None:
    result, folder, _ = ended
    every = Pool(folder / "pools" / "prune-entropy.candidates")
    blocks = sum((p.first + p.count - 1) // 64 - p.first // 64 + 1 for p in every.parts)
    assert result["arms"]["prune-entropy"]["generator_evaluations"] == blocks * 64 * 10


def test_a_branch_is_practice_without_the_round_it_forks_at(ended, toy) -> None:
    """Its first steps are practice's own; what follows equals a run that may add no more."""
    result, folder, config = ended
    practice = result["arms"]["practice"]
    for number in (0, 1):
        branch = result["arms"][f"branch-{number:03d}"]
        assert branch["samples"] == config.size(number) and branch["steps"] == 60
        assert branch["added_at"] == practice["added_at"][:number]
        before = [look for look in practice["looks"] if look[0] <= practice["added_at"][number]]
        assert branch["looks"][: len(before)] == before
        assert {look[2] for look in branch["looks"][len(before) :]} == {config.size(number)}
    limited = toy.recipe(arms=["practice"], real_train="", max_rounds=1, chunk=32)
    alone = toy.run(limited, folder.parent / "limited")["arms"]["practice"]
    assert alone["learner"] == branch["learner"] and alone["looks"] == branch["looks"]


def test_a_branch_of_another_run_goes_on_as_it_began(ended, toy, tmp_path) -> None:
    _, folder, config = ended
    changes = {"arms": ["branch"], "real_train": "", "branch_from": str(folder), "chunk": 32}
    for other, message in (
        ({"seed": 4}, "has seed=3 and this recipe 4: a branch goes on as it began"),
        ({"start_samples": 30}, "has start_samples=60 and this recipe 30"),
    ):
        with pytest.raises(UserError, match=message):
            toy.run(toy.recipe(**changes | other), tmp_path / message[:9])


def test_branches_of_another_run(ended, toy, tmp_path) -> None:
    result, folder, config = ended
    config = toy.recipe(arms=["branch"], real_train="", branch_from=str(folder), chunk=32)
    found = toy.run(config, tmp_path)["arms"]
    assert list(found) == ["branch-000", "branch-001", "branch-002"]
    for name in ("branch-000", "branch-001"):
        assert found[name]["learner"] == result["arms"][name]["learner"]
    assert not (tmp_path / "toy" / "pools" / "practice").exists()


def test_mixed_batches_hold_the_share_of_real_pictures(ended, toy) -> None:
    _, folder, config = ended
    pool = Pool(folder / "pools" / "mixed")
    real = load_split(toy.splits["real_train"], config.pictures)
    feeds = real_feed(real, 3), pool_feed(pool, 3)
    fetch, positions = mixed_feed(*feeds, 0.3, 3), np.arange(4000)
    images, labels = fetch(positions)
    by = [feed(positions) for feed in feeds]
    is_real = (images == by[0][0]).all(axis=(1, 2, 3))
    assert (is_real | (images == by[1][0]).all(axis=(1, 2, 3))).all()
    assert abs(is_real.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 4000)
    assert np.array_equal(labels, np.where(is_real, by[0][1], by[1][1]))
    arm = Static("mixed", config, None, real, pool, count=len(pool), real_share=0.3)
    assert np.array_equal(arm.fetch(positions)[0], images)
    assert (arm.samples, arm.drawn) == (len(pool) + 90, len(pool))
    parts = [fetch(positions[rows])[0] for rows in (slice(0, 1500), slice(1500, 4000))]
    assert np.array_equal(np.concatenate(parts), images)


def test_reading_ahead_changes_nothing_and_forgets_when_told() -> None:
    asked = []

    def fetch(positions: np.ndarray):
        asked.append(positions.tolist())
        return positions * len(asked), positions

    ahead = Ahead(fetch, 4)
    assert ahead(np.arange(4))[0].tolist() == [0, 1, 2, 3]
    ahead.forget()
    assert ahead(np.arange(4, 8))[0].tolist() == [12, 15, 18, 21]  # the third call's
    assert ahead(np.arange(8, 12))[1].tolist() == [8, 9, 10, 11]
    ahead.close()
    assert asked[:2] == [[0, 1, 2, 3], [4, 5, 6, 7]] and asked[2] == [4, 5, 6, 7]


def test_a_limit_may_begin_the_cool_down_and_end_the_arm_early(toy, tmp_path) -> None:
    config = toy.recipe(arms=["practice", "static"], real_train="", max_rounds=1)
    config = config.model_copy(update={"at_limit": "cool_down"})
    arms = toy.run(config, tmp_path)["arms"]
    practice = arms["practice"]
    at = practice["cooldown_at"]
    assert practice["rounds"] == 1 and practice["added_at"][0] < at < 48
    assert practice["steps"] == at + 12 == arms["static"]["steps"]  # a fifth of 60 steps
    best, waited, seen = -1.0, 0, []
    for step, accuracy, _ in practice["looks"]:
        best, waited = (accuracy, 0) if accuracy > best else (best, waited + 1)
        if step == practice["added_at"][0]:
            waited = 0
        elif waited >= (1.5 if step > practice["added_at"][0] else 1):
            seen.append(step)
    assert seen[0] == at


def test_drawing_stops_at_the_limit_of_evaluations(toy, tmp_path) -> None:
    plain = 64 * 10  # the start set: one block, ten steps
    config = toy.recipe(arms=["practice"], real_train="", max_evaluations=plain + 1)
    arm = toy.run(config, tmp_path)["arms"]["practice"]
    assert arm["rounds"] == 1  # what was spent before it lay below the limit
    none = config.model_copy(update={"max_evaluations": plain})
    assert toy.run(none, tmp_path / "none")["arms"]["practice"]["rounds"] == 0


def test_looks_do_not_count_while_a_round_is_awaited(toy, tmp_path, monkeypatch) -> None:
    """Of accuracies that never rise: two looks in vain, five steps until the pictures are there."""

    def look(arm: Arm, *_: object) -> float:
        arm.state.looks.append([arm.state.step, 0.5, 0])
        return 0.5

    monkeypatch.setattr(Arm, "look", look)
    trigger = {"evaluate_every": 2, "patience": 2, "patience_growth": 0, "delay_steps": 5}
    config = toy.recipe(arms=["practice"], real_train="", trigger=trigger)
    added = toy.run(config, tmp_path)["arms"]["practice"]["added_at"]
    # The best is set at 2; asked at 6, there at 11; the looks at 12 and 14 are in vain; and so on.
    assert added == [6, 14, 22, 30, 38]


def test_a_delayed_round_is_visible_when_it_was_said_to_be(toy, tmp_path) -> None:
    trigger = {"evaluate_every": 2, "patience": 2, "patience_growth": 0, "delay_steps": 5}
    config = toy.recipe(arms=["practice", "omega0"], real_train="", trigger=trigger)
    result = toy.run(config, tmp_path)
    for name in ("practice", "omega0"):
        arm, pool = result["arms"][name], Pool(tmp_path / "toy" / "pools" / name)
        visible = [part.visible_from for part in pool.parts if part.round]
        assert sorted(set(visible)) == [16 * (step + 5) for step in arm["added_at"]]
        assert arm["added_at"] and arm["added_at"][-1] + 5 < 48
    best, waited, added, due = -1.0, 0, [], 0
    for step, accuracy, _ in result["arms"]["practice"]["looks"]:
        best, waited = (accuracy, 0) if accuracy > best else (best, waited + 1)
        if step < due:  # the pictures that were asked for are not there yet
            waited = 0
        elif waited >= 2 and step + 5 < 48:
            added, waited, due = [*added, step], 0, step + 5
    assert added == result["arms"]["practice"]["added_at"]


def test_every_pool_says_how_it_is_drawn_again(ended) -> None:
    _, folder, _ = ended
    for pool in (folder / "pools").glob("*/manifest.jsonl"):
        about = json.loads((pool.parent / "origin.json").read_text())
        assert about["fingerprint"] == "toy" and about["classes"] == ["a", "b", "c"]
        assert about["protocol"]["sampler"]["steps"] == 10


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        (["static"], "arm static copies the practice arm: list practice before it"),
        (["practice", "practice"], "each a name of its own"),
        (["practice", {"kind": "omega0", "real_share": 0.5}], "real_share has no effect on an arm"),
        (["practice", {"kind": "prune"}], "an arm of kind prune needs prune"),
        (["practice", {"kind": "frozen", "equal": "compute"}], "equal has no effect on an arm"),
        ([{"kind": "practice", "name": "mine"}], "remove its name"),
        (["practice", {"kind": "static", "name": "../out"}], "should match pattern"),
        (["practice", {"kind": "static", "name": "branch-000"}], "and they alone, are called"),
        (["practice", {"kind": "branch", "name": "fork"}], "and they alone, are called branch"),
        (["practice", {"kind": "branch", "rounds": [-1]}], "greater than or equal to 0"),
    ],
)
def test_arms_without_sense_are_refused(toy, arms, message) -> None:
    with pytest.raises(ValueError, match=message):
        toy.recipe(arms=arms, real_train="")


def test_limits_that_end_early_need_practice_first(toy) -> None:
    with pytest.raises(ValueError, match="list practice first"):
        toy.recipe(arms=["real", "practice"], at_limit="cool_down")
    with pytest.raises(ValueError, match="tests holds a set called test"):
        toy.recipe(tests={"test": toy.splits["monitor"]})


def test_a_changed_generator_is_refused_on_resume(toy, tmp_path) -> None:
    config = toy.recipe(arms=["practice"], real_train="", max_rounds=1)

    class Once(Stopper):
        polls = 0

        @property
        def requested(self) -> str | None:
            self.polls += 1
            return "poll" if self.polls > 20 else None

    assert "stopped" in toy.run(config, tmp_path, Once())
    other = dataclasses.replace(toy.generator(), fingerprint="another")
    with Run.open(config, root=tmp_path, name="toy") as run:
        with pytest.raises(UserError, match="was drawn by toy and the generator the toy is anoth"):
            practise(config, run, other, Log(run.folder, quiet=True), Stopper())


def test_every_split_has_the_generators_classes(toy, tmp_path) -> None:
    swapped = toy.write_split(tmp_path / "swapped", 30, 1, ["a", "c", "b"])
    for changes in ({"real_train": swapped}, {"tests": {"more": swapped}}):
        with pytest.raises(UserError, match="class 1 is 'b' to the toy but 'c' in .*swapped"):
            toy.run(toy.recipe(**changes), tmp_path / next(iter(changes)))


def test_rounds_are_reported_without_a_probe_and_where_they_were_chosen(toy, tmp_path) -> None:
    arms = ["practice", {"kind": "prune", "prune": {"score": "entropy"}}]
    config = toy.recipe(arms=arms, real_train="", max_rounds=1, probe_samples=0)
    toy.run(config, tmp_path)
    for name in ("practice", "prune-entropy"):
        report = json.loads((tmp_path / f"toy/arms/{name}/rounds/001.json").read_text())
        assert report["samples"] == 90 and "probe" not in report
        assert len(report["error_by_round"]) == 2


def test_placement_needs_processes_that_learn_and_its_fields_an_effect(toy) -> None:
    with pytest.raises(ValueError, match="generators has no effect with placement interleaved"):
        toy.recipe(generators=2)
    with pytest.raises(ValueError, match="DeepSpeed takes all processes"):
        toy.recipe(placement="separate", strategy={"kind": "zero"})


def test_guidance_that_is_not_finite_is_counted_and_told(toy, tmp_path) -> None:
    """A generator whose guided blocks report two bad steps a picture, beside real pictures."""

    def draw(inner, indices, labels, **more):
        images, telemetry = inner(indices, labels, **more)
        if more["learner"] is not None:
            telemetry = telemetry | {"nonfinite": np.full(len(indices), 2.0, np.float32)}
        return images, telemetry

    config = toy.recipe(arms=["practice"], real_train="", max_rounds=1)
    with Run.open(config, root=tmp_path, name="toy") as run:
        practise(config, run, toy.around(draw), Log(run.folder, quiet=True), Stopper())
    words = (tmp_path / "toy" / "log.txt").read_text()
    assert "practice, round 1: 60 guided steps of a picture had a gradient" in words


def test_a_death_at_any_write_changes_nothing(toy, tmp_path) -> None:
    """Processes that die at their third, fourth, fifth, ... rename, one after another."""
    arms = ["practice", {"kind": "prune", "prune": {"score": "entropy"}}, "branch"]
    trigger = {"evaluate_every": 4, "patience": 1, "delay_steps": 3}
    changes = {"arms": arms, "real_train": "", "max_rounds": 2, "trigger": trigger}
    config = toy.recipe(**changes, schedule={"steps": 30}, save_every=5, chunk=32)
    straight = toy.run(config, tmp_path / "straight")
    result, deaths = tmp_path / "result.json", 0
    for left in range(2, 200):
        child = os.fork()
        if child == 0:
            calls, real = iter(range(left)), {n: getattr(os, n) for n in ("rename", "replace")}

            def dying(name, calls=calls, real=real):
                def call(*arguments):
                    if next(calls, None) is None:
                        os._exit(9)
                    return real[name](*arguments)

                return call

            for name in real:
                setattr(os, name, dying(name))
            result.write_text(json.dumps(toy.timeless(toy.run(config, tmp_path / "dying"))))
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 9)
        deaths += status == 9
        if status == 0:
            break
    assert deaths > 8
    assert json.loads(result.read_text()) == toy.timeless(straight)
    for name in ("practice", "prune-entropy", "prune-entropy.candidates"):
        one, two = (Pool(tmp_path / root / "toy/pools" / name) for root in ("straight", "dying"))
        assert one.parts == two.parts
        rows = np.arange(len(one))
        assert np.array_equal(one.images(rows), two.images(rows))
    places = [tmp_path / root / "toy/arms/practice/rounds" for root in ("straight", "dying")]
    one, two = ([r.read_text() for r in sorted(place.glob("*.json"))] for place in places)
    assert one and one == two
