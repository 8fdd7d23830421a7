"""The whole loop on a Gaussian mixture whose exact denoiser is known: real sampler, real guidance.

Class c is N(mean_c, spread^2) in every pixel (stripes, or a chequerboard), so the exact flow
prediction is in closed form and the real `Generator` draws true samples in milliseconds.
"""

import json
import os
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from etude.core.errors import UserError
from etude.core.signals import Stopper
from etude.data.order import PoolOrder
from etude.data.pool import Pool
from etude.diffusion.guidance import GuidanceConfig
from etude.practice.arms import Arm, Pending, State
from etude.practice.learner import Learner, weights_hash
from etude.practice.scores import entropy
from etude.practice.trigger import Plateau


@pytest.fixture(scope="module")
def straight(toy, tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("straight")
    result = toy.run(toy.recipe(), root, training=toy.splits["generators"])
    return result, root / "toy"


def test_practice_follows_the_algorithm_from_its_own_looks(straight, toy) -> None:
    """The rounds are those that the hand-written rule finds in the monitor accuracies."""
    result, _ = straight
    arm, config = result["arms"]["practice"], toy.recipe()
    best, waited, added = -1.0, 0, []
    for step, accuracy, _ in arm["looks"]:
        if accuracy > best:
            best, waited = accuracy, 0
        else:
            waited += 1
        if waited >= 1 + 0.5 * len(added) and step < 48:  # the cool-down begins at 80% of 60
            added.append(step)
            waited = 0
    assert added == arm["added_at"] and len(added) >= 2
    assert arm["samples"] == 60 + 30 * len(added) == config.size(len(added))
    assert [look[0] for look in arm["looks"]] == list(range(4, 61, 4))


def test_arms_share_samples_and_steps(straight) -> None:
    arms = straight[0]["arms"]
    assert {arm["steps"] for arm in arms.values()} == {60}
    assert arms["static"]["samples"] == arms["omega0"]["samples"] == arms["practice"]["samples"]
    assert arms["real"]["samples"] == 90 and arms["real"]["generator_evaluations"] == 0
    assert arms["omega0"]["added_at"] == arms["practice"]["added_at"]
    assert min(arm["test_accuracy"] for arm in arms.values()) > 0.6  # chance is 1/3


def test_pools_hold_what_they_say(straight, toy) -> None:
    result, folder = straight
    names = ("practice", "static", "omega0")
    practice, static, omega0 = (Pool(folder / "pools" / name) for name in names)
    every = np.arange(len(practice))
    for pool in (practice, static, omega0):
        assert pool.labels(every).tolist() == [i % 3 for i in every]
    start, rest = every[:60], every[60:]
    assert np.array_equal(static.images(every), omega0.images(every))
    assert np.array_equal(practice.images(start), static.images(start))
    assert not np.array_equal(practice.images(rest), static.images(rest))
    alone, _ = toy.generator().draw(every, every % 3, seed=3)  # copied or drawn: the same pictures
    assert np.array_equal(static.images(every), alone)
    visible = [entry.visible_from for entry in practice.parts if entry.round]
    assert sorted(set(visible)) == [16 * step for step in result["arms"]["practice"]["added_at"]]


def test_guidance_raises_entropy_and_evaluations_are_counted(straight) -> None:
    result, folder = straight
    rounds = [json.loads(p.read_text()) for p in sorted(folder.glob("arms/practice/rounds/*.json"))]
    assert len(rounds) == result["arms"]["practice"]["rounds"]
    for report in rounds:
        assert report["probe_entropy_guided"] > report["probe_entropy_unguided"]
        assert len(report["error_by_round"]) == report["round"] + 1
    last = rounds[-1]  # the first learners are near uniform whatever they see; this one is not
    assert last["probe_entropy_guided"] > last["probe_entropy_unguided"] + 0.05
    # 10 steps a picture, in whole blocks of 64 indices; a guided step differentiates it once more.
    for name, pushes in (("static", 0), ("practice", 5)):
        parts = Pool(folder / "pools" / name).parts
        blocks = [(e.first + e.count - 1) // 64 - e.first // 64 + 1 for e in parts]
        guided = sum(n for n, part in zip(blocks, parts, strict=True) if part.learner)
        arm = result["arms"][name]
        assert arm["generator_gradients"] == guided * 64 * pushes
        assert arm["generator_evaluations"] == sum(blocks) * 64 * 10
        assert arm["passes"] == arm["generator_evaluations"] + 2 * arm["generator_gradients"]
    gallery = Image.open(folder / "arms/practice/rounds/001.png")
    assert gallery.size == (8 * 9 + 1, 4 * 9 + 1)
    hardest = [entry["entropy"] for entry in rounds[0]["hardest"]]
    assert hardest == sorted(hardest, reverse=True)


def test_differences_are_those_of_the_saved_vectors(straight) -> None:
    result, folder = straight
    correct = {n: np.load(folder / "arms" / n / "correct.npz")["test"] for n in result["arms"]}
    assert correct["static"].shape == (300,)
    for name, gap in result["differences"].items():
        first, other = name.split(" - ")
        assert gap["value"] == pytest.approx(correct[first].mean() - correct[other].mean())
        assert gap["low"] <= gap["value"] <= gap["high"]


class StopAtPoll(Stopper):
    """Asks to stop at the n-th time it is asked."""

    def __init__(self, polls: int) -> None:
        super().__init__()
        self.left = polls

    @property
    def requested(self) -> str | None:
        self.left -= 1
        return "poll" if self.left < 0 else None


def test_stopped_anywhere_equals_straight(straight, toy, tmp_path) -> None:
    stops = 0
    while "stopped" in (
        result := toy.run(toy.recipe(), tmp_path, StopAtPoll(13), toy.splits["generators"])
    ):
        stops += 1
    assert stops > 10
    assert toy.timeless(result) == toy.timeless(straight[0])
    for arm in ("practice", "static", "omega0"):
        one, other = (Pool(root / "pools" / arm) for root in (straight[1], tmp_path / "toy"))
        assert one.parts == other.parts


def test_killed_anywhere_equals_straight(straight, toy, tmp_path) -> None:
    chance = np.random.default_rng(1)
    for kill in range(40):
        child = os.fork()
        if child == 0:
            try:
                result = toy.run(toy.recipe(), tmp_path, training=toy.splits["generators"])
                (tmp_path / "result.json").write_text(json.dumps(toy.timeless(result)))
                os._exit(0)
            finally:
                os._exit(1)
        deadline = time.monotonic() + (chance.uniform(0.15, 0.6) if kill < 12 else 60)
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                ended = os.waitpid(child, 0)
                break
            time.sleep(0.01)
        status = os.waitstatus_to_exitcode(ended[1])
        assert status in (0, -signal.SIGKILL)  # no start of it was refused
        if status == 0:
            break
    assert kill >= 3  # it was really killed a few times
    assert json.loads((tmp_path / "result.json").read_text()) == toy.timeless(straight[0])


def test_guidance_of_zero_is_unguided_bit_for_bit_and_more_omega_is_more_entropy(toy) -> None:
    learner = Learner(toy.recipe().learner.model_copy(update={"batch": 256}), 3, toy.alone)
    for step in range(30):
        learner.step(toy.real_batch(256), step, 1.0)
    frozen, generator, indices = learner.frozen("raw"), toy.generator(), np.arange(96)

    def draw(omega: float | None) -> np.ndarray:
        guidance = None if omega is None else GuidanceConfig(omega=omega, every=2)
        return generator.draw(indices, indices % 3, seed=5, learner=frozen, guidance=guidance)[0]

    def mean_entropy(images: np.ndarray) -> float:
        x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).float() / 127.5 - 1
        return float(entropy(frozen(x)).mean())

    assert np.array_equal(draw(None), draw(0.0))
    by_omega = [mean_entropy(draw(omega)) for omega in (0.0, 0.05, 0.1, 0.2)]
    assert all(a + 0.01 < b for a, b in zip(by_omega, by_omega[1:], strict=False)), by_omega


def test_a_pool_ahead_of_its_checkpoint_is_taken_back(straight, toy, tmp_path) -> None:
    """As after a fall back to an older checkpoint, whose learner may ask for other pictures."""
    config = toy.recipe()
    config = config.model_copy(update={"arms": config.arms[1:], "real_train": ""})
    assert "stopped" in toy.run(config, tmp_path, StopAtPoll(3), toy.splits["generators"])
    pool = Pool(tmp_path / "toy" / "pools" / "practice")
    assert len(pool) == 60
    pool.append(
        np.zeros((30, toy.size, toy.size, 1), np.uint8),
        np.arange(30) % 3,
        seed_indices=np.arange(30),
        entropies=np.zeros(30),
        visible_from=16 * 8,
        generator="?",
        learner="?",
    )
    result = toy.run(config, tmp_path, training=toy.splits["generators"])
    expected = toy.timeless(straight[0])
    assert {name: toy.timeless(result)[name] for name in result["arms"]} == {
        name: expected[name] for name in result["arms"]
    }


def test_steps_drew_what_the_manifest_replays(straight, toy) -> None:
    """`Pool.order` after the end gives, for any earlier step, rows of the pool as it was then."""
    result, folder = straight
    order = Pool(folder / "pools" / "practice").order(3)
    sizes = order.size_at(16 * np.arange(60)).tolist()
    added = result["arms"]["practice"]["added_at"]
    assert sizes == [60 + 30 * sum(step >= a for a in added) for step in range(60)]


def test_an_arm_resumes_every_part_of_its_state(toy, tmp_path) -> None:
    config = toy.recipe().learner.model_copy(update={"batch": 64})
    arms = [Arm("practice", tmp_path, Learner(config, 3, toy.alone), 7) for _ in range(2)]
    for step in range(5):
        arms[0].learner.step(toy.real_batch(64), step, 1.0)
    looks = [[4, 0.5, 60], [5, 0.25, 60]]
    arms[0].state = State(5, Plateau(0.5, 2, 1), Pending(1, 7, "l"), [4], 9, looks, 1.5)
    arms[0].save(trigger=True)
    assert arms[1].resume()
    arms[0].state.seconds = arms[1].state.seconds
    assert arms[0].state == arms[1].state
    for arm in arms:
        arm.learner.step(toy.real_batch(64), 5, 0.5)
    for weights in ("raw", "ema"):
        hashes = [weights_hash(arm.learner.frozen(weights)) for arm in arms]
        assert hashes[0] == hashes[1]


def test_ema_is_the_average_of_the_raw_weights(toy) -> None:
    learner = Learner(toy.recipe().learner.model_copy(update={"batch": 64}), 3, toy.alone)

    def head(weights: str) -> Tensor:
        return learner.frozen(weights).network.head.weight

    average = head("raw").clone()
    for step in range(6):
        learner.step(toy.real_batch(64), step, 1.0)
        decay = min(0.9, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * head("raw")
    assert torch.allclose(head("ema"), average, rtol=0, atol=1e-6)
    assert not torch.allclose(head("raw"), average, rtol=0, atol=1e-4)


def test_equal_seeds_give_equal_learners_and_other_seeds_others(toy) -> None:
    config = toy.recipe().learner
    learners = [Learner(config, seed, toy.alone).frozen("ema") for seed in (3, 3, 4)]
    one, two, other = (learner.network for learner in learners)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.head.weight, other.head.weight)


def test_cool_down_limits_and_pool_order_are_kept(toy) -> None:
    config = toy.recipe(max_rounds=2, max_samples=100)
    assert config.may_add(0, 47) and not config.may_add(0, 48)
    assert not config.may_add(1, 10)  # 60 + 2 * 30 is above max_samples
    assert not toy.recipe(max_rounds=2).may_add(2, 10)
    order = PoolOrder(3, [(0, 60), (16 * 8, 90)])
    rows = order.index(np.arange(16 * 40))
    assert rows[: 16 * 8].max() < 60 <= rows.max() < 90


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start_samples": 61}, "start_samples=61 is not a multiple"),
        ({"arms": ["static", "practice"], "real_train": ""}, "list practice before it"),
        ({"arms": ["practice", "real"], "real_train": ""}, "give both or neither"),
        ({"arms": ["practice"]}, "give both or neither"),
        ({"pictures": {"image_size": 8, "channels": 3}}, "pictures.channels=3"),
    ],
)
def test_recipes_without_sense_are_refused(toy, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        toy.recipe(**changes)


def test_wrong_classes_and_seen_test_pictures_are_refused(toy, tmp_path) -> None:
    swapped = toy.write_split(tmp_path / "swapped", 30, 1, ["a", "c", "b"])
    with pytest.raises(UserError, match="class 1 is 'b' to the toy but 'c' in"):
        toy.run(toy.recipe(test=swapped), tmp_path / "one")
    with pytest.raises(UserError, match="300 of 300 pictures .* among the generator's training"):
        toy.run(toy.recipe(), tmp_path / "two", training=toy.splits["test"])
    small = {"image_size": 4, "channels": 1, "crop": "none"}
    with pytest.raises(UserError, match="draws pictures of 8 pixels and pictures.image_size is 4"):
        toy.run(toy.recipe(pictures=small), tmp_path / "four")
    with pytest.raises(UserError, match="among the monitor split"):
        toy.run(toy.recipe(monitor=toy.splits["test"]), tmp_path / "three")
