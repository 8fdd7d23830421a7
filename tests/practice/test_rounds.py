"""The whole loop on a Gaussian mixture whose exact denoiser is known: real sampler, real guidance.

Class c is N(mean_c, spread^2) in every pixel (stripes, or a chequerboard), so the exact flow
prediction is in closed form and the real `Generator` draws true samples in milliseconds.
"""

import io
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from etude.conditions import Conditions
from etude.core.errors import UserError
from etude.core.log import Log
from etude.core.run import Run
from etude.core.signals import Stopper
from etude.data.order import PoolOrder
from etude.data.pool import Pool
from etude.data.shards import write_shards
from etude.diffusion.guidance import GuidanceConfig
from etude.diffusion.objectives import Objective, ObjectiveConfig
from etude.diffusion.samplers import SamplerConfig
from etude.models.conditioning import ConditioningConfig
from etude.practice.arms import Arm, State
from etude.practice.learner import Learner, LearnerConfig, augment, weights_hash
from etude.practice.recipe import PracticeRecipe
from etude.practice.rounds import practise
from etude.practice.scores import entropy
from etude.practice.trigger import Plateau
from etude.sampling import Generator

CLASSES, SIZE, SPREAD, AMPLITUDE = ["a", "b", "c"], 8, 0.3, 0.2


class Mixture(nn.Module):
    """The exact flow prediction E[eps - x0 | x_t, class] of a Gaussian class."""

    def __init__(self) -> None:
        super().__init__()
        wave = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(SIZE // 4)
        rows, columns = wave[:, None].expand(SIZE, SIZE), wave[None, :].expand(SIZE, SIZE)
        means = AMPLITUDE * torch.stack([rows, columns, rows * columns])
        self.register_buffer("means", means[:, None])

    def forward(self, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        labels = condition["labels"]
        sigma = (t / 1000.0).view(-1, 1, 1, 1)
        alpha = 1.0 - sigma
        mean = self.means[labels.clamp(max=len(CLASSES) - 1)]
        gain = SPREAD**2 * alpha / (alpha**2 * SPREAD**2 + sigma**2)
        x0 = mean + gain * (x - alpha * mean)
        return (x - alpha * x0) / sigma - x0

    def real(self, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Pictures (n, S, S) uint8 of the true distribution, and their classes."""
        chance = np.random.default_rng(seed)
        labels = np.arange(count) % len(CLASSES)
        x = self.means.numpy()[labels, 0] + SPREAD * chance.normal(size=(count, SIZE, SIZE))
        return np.rint((x + 1) * 127.5).clip(0, 255).astype(np.uint8), labels


def sampler(steps: int = 10) -> SamplerConfig:
    return SamplerConfig(steps=steps, guidance_convention="lambda")


def toy_generator(training_shards: str = "") -> Generator:
    return Generator(
        Mixture(),
        Objective(ObjectiveConfig()),
        sampler(),
        None,
        CLASSES,
        (1, SIZE, SIZE),
        Conditions(ConditioningConfig(), len(CLASSES), SIZE, torch.device("cpu")),
        name="the toy",
        fingerprint="toy",
        training_shards=training_shards,
    )


def write_split(folder: Path, count: int, seed: int, classes: list[str] = CLASSES) -> str:
    def samples():
        for row, (pixels, label) in enumerate(zip(*Mixture().real(count, seed), strict=True)):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            yield {
                "key": f"{seed}-{row}",
                "image": buffer.getvalue(),
                "extension": "png",
                "label": int(label),
            }

    write_shards(folder, samples(), classes=classes)
    return str(folder)


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("splits")
    counts = {"monitor": 120, "test": 300, "real_train": 90, "generators": 90}
    return {
        name: write_split(root / name, count, seed)
        for seed, (name, count) in enumerate(counts.items())
    }


def recipe(splits: dict[str, str], **changes) -> PracticeRecipe:
    fields = {
        "kind": "practice",
        "name": "toy",
        "seed": 3,
        "generator": "toy",
        "sampler": sampler().model_dump(),
        "pictures": {"image_size": SIZE, "channels": 1, "crop": "none"},
        "monitor": splits["monitor"],
        "test": splits["test"],
        "real_train": splits["real_train"],
        "learner": {
            "model": {"num_classes": 3, "channels": (8, 16), "groups": 4},
            "batch": 16,
            "lr": 5e-3,
            "ema": 0.9,
        },
        "schedule": {"steps": 60},
        "trigger": {"evaluate_every": 4, "patience": 1, "patience_growth": 0.5},
        "guidance": {"omega": 0.1, "every": 2},
        "start_samples": 60,
        "round_samples": 30,
        "chunk": 64,
        "probe_samples": 30,
        "save_every": 7,
        "arms": ["practice", "static", "omega0", "real"],
    }
    return PracticeRecipe.model_validate({**fields, **changes})


def run_toy(
    config: PracticeRecipe, root: Path, stopper: Stopper | None = None, training: str = ""
) -> dict:
    torch.set_num_threads(1)
    with Run.open(config, root=root, name="toy") as run:
        log = Log(run.folder, quiet=True)
        return practise(config, run, toy_generator(training), log, stopper or Stopper())


@pytest.fixture(scope="module")
def straight(splits: dict[str, str], tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("straight")
    result = run_toy(recipe(splits), root, training=splits["generators"])
    return result, root / "toy"


def test_practice_follows_the_algorithm_from_its_own_looks(straight, splits) -> None:
    """The rounds are those that the hand-written rule finds in the monitor accuracies."""
    result, _ = straight
    arm, config = result["arms"]["practice"], recipe(splits)
    best, waited, added = -1.0, 0, []
    for step, accuracy in arm["looks"]:
        if accuracy > best:
            best, waited = accuracy, 0
        else:
            waited += 1
        if waited >= 1 + 0.5 * len(added) and step < 48:  # the cool-down begins at 80% of 60
            added.append(step)
            waited = 0
    assert added == arm["added_at"] and len(added) >= 2
    assert arm["samples"] == 60 + 30 * len(added) == config.size(len(added))
    assert [step for step, _ in arm["looks"]] == list(range(4, 61, 4))


def test_arms_share_samples_and_steps(straight) -> None:
    arms = straight[0]["arms"]
    assert {arm["steps"] for arm in arms.values()} == {60}
    assert arms["static"]["samples"] == arms["omega0"]["samples"] == arms["practice"]["samples"]
    assert arms["real"]["samples"] == 90 and arms["real"]["generator_evaluations"] == 0
    assert arms["omega0"]["added_at"] == arms["practice"]["added_at"]
    assert min(arm["test_accuracy"] for arm in arms.values()) > 0.6  # chance is 1/3


def test_pools_hold_what_they_say(straight, splits) -> None:
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
    alone, _ = toy_generator().draw(every, every % 3, seed=3)  # copied or drawn: the same pictures
    assert np.array_equal(static.images(every), alone)
    visible = [entry.visible_from for entry in practice.rounds if entry.guidance["round"]]
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
    # 10 steps a picture in blocks of 64: 60 pictures need one block, all need ceil(n / 64).
    static = result["arms"]["static"]
    blocks = -(-static["samples"] // 64)
    assert static["generator_evaluations"] == blocks * 64 * 10
    gallery = Image.open(folder / "arms/practice/rounds/001.png")
    assert gallery.size == (8 * 9 + 1, 4 * 9 + 1)
    hardest = [entry["entropy"] for entry in rounds[0]["hardest"]]
    assert hardest == sorted(hardest, reverse=True)


def test_differences_are_those_of_the_saved_vectors(straight) -> None:
    result, folder = straight
    correct = {n: np.load(folder / "arms" / n / "correct.npz")["correct"] for n in result["arms"]}
    assert correct["static"].shape == (300,)
    for name, gap in result["differences"].items():
        first, other = name.split(" - ")
        assert gap["value"] == pytest.approx(correct[first].mean() - correct[other].mean())
        assert gap["low"] <= gap["value"] <= gap["high"]


def timeless(result: dict) -> dict:
    """A result without the seconds that it took."""
    return {
        name: {key: value for key, value in arm.items() if not key.endswith("seconds")}
        for name, arm in result["arms"].items()
    } | {"differences": result["differences"]}


class StopAtPoll(Stopper):
    """Asks to stop at the n-th time it is asked."""

    def __init__(self, polls: int) -> None:
        super().__init__()
        self.left = polls

    @property
    def requested(self) -> str | None:
        self.left -= 1
        return "poll" if self.left < 0 else None


def test_stopped_anywhere_equals_straight(straight, splits, tmp_path) -> None:
    stops = 0
    while "stopped" in (
        result := run_toy(recipe(splits), tmp_path, StopAtPoll(13), splits["generators"])
    ):
        stops += 1
    assert stops > 10
    assert timeless(result) == timeless(straight[0])
    for arm in ("practice", "static", "omega0"):
        one, other = (Pool(root / "pools" / arm) for root in (straight[1], tmp_path / "toy"))
        assert [e.fingerprint for e in one.rounds] == [e.fingerprint for e in other.rounds]


def test_killed_anywhere_equals_straight(straight, splits, tmp_path) -> None:
    chance = np.random.default_rng(1)
    for kill in range(40):
        child = os.fork()
        if child == 0:
            try:
                result = run_toy(recipe(splits), tmp_path, training=splits["generators"])
                (tmp_path / "result.json").write_text(json.dumps(timeless(result)))
            finally:
                os._exit(0)
        deadline = time.monotonic() + (chance.uniform(0.15, 0.6) if kill < 12 else 60)
        while os.waitpid(child, os.WNOHANG)[0] == 0:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                break
            time.sleep(0.01)
        if (tmp_path / "result.json").exists():
            break
    assert kill >= 3  # it was really killed a few times
    assert json.loads((tmp_path / "result.json").read_text()) == timeless(straight[0])


def test_guidance_of_zero_is_unguided_bit_for_bit_and_more_omega_is_more_entropy(splits) -> None:
    learner = Learner(recipe(splits).learner, 3, "cpu")
    pictures, labels = Mixture().real(256, 9)
    for step in range(30):
        learner.step(pictures[..., None], labels, np.arange(256) + 256 * step, 1.0)
    frozen, generator, indices = learner.frozen("raw"), toy_generator(), np.arange(96)

    def draw(omega: float | None) -> np.ndarray:
        guidance = None if omega is None else GuidanceConfig(omega=omega, every=2)
        return generator.draw(indices, indices % 3, seed=5, learner=frozen, guidance=guidance)[0]

    def mean_entropy(images: np.ndarray) -> float:
        x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).float() / 127.5 - 1
        return float(entropy(frozen(x)).mean())

    assert np.array_equal(draw(None), draw(0.0))
    by_omega = [mean_entropy(draw(omega)) for omega in (0.0, 0.05, 0.1, 0.2)]
    assert all(a + 0.01 < b for a, b in zip(by_omega, by_omega[1:], strict=False)), by_omega


def test_a_pool_ahead_of_its_checkpoint_is_taken_back(straight, splits, tmp_path) -> None:
    """As after a fall back to an older checkpoint, whose learner may ask for other pictures."""
    config = recipe(splits)
    assert "stopped" in run_toy(config, tmp_path, StopAtPoll(3), splits["generators"])
    pool = Pool(tmp_path / "toy" / "pools" / "practice")
    assert len(pool) == 60
    pool.append(
        np.zeros((30, SIZE, SIZE, 1), np.uint8),
        np.arange(30) % 3,
        seed_indices=np.arange(30),
        entropies=np.zeros(30),
        visible_from=16 * 8,
        guidance={"round": 1, "evaluations": 0, "seconds": 0},
        generator="?",
        learner="?",
    )
    result = run_toy(config, tmp_path, training=splits["generators"])
    assert timeless(result) == timeless(straight[0])


def test_steps_drew_what_the_manifest_replays(straight, splits) -> None:
    """`Pool.order` after the end gives, for any earlier step, rows of the pool as it was then."""
    result, folder = straight
    order = Pool(folder / "pools" / "practice").order(3)
    sizes = order.size_at(16 * np.arange(60)).tolist()
    added = result["arms"]["practice"]["added_at"]
    assert sizes == [60 + 30 * sum(step >= a for a in added) for step in range(60)]


def test_an_arm_resumes_every_part_of_its_state(splits, tmp_path) -> None:
    config = recipe(splits).learner
    pictures, labels = Mixture().real(64, 9)
    arms = [Arm("practice", tmp_path, Learner(config, 3, "cpu"), 7) for _ in range(2)]
    for step in range(5):
        arms[0].learner.step(pictures[..., None], labels, np.arange(64) + 64 * step, 1.0)
    arms[0].state = State(5, Plateau(0.5, 2, 1), [4], [[4, 0.5], [5, 0.25]], 1.5)
    arms[0].save(trigger=True)
    assert arms[1].resume()
    arms[0].state.seconds = arms[1].state.seconds
    assert arms[0].state == arms[1].state
    for arm in arms:
        arm.learner.step(pictures[..., None], labels, np.arange(64) + 320, 0.5)
    for weights in ("raw", "ema"):
        hashes = [weights_hash(arm.learner.frozen(weights)) for arm in arms]
        assert hashes[0] == hashes[1]


def test_ema_is_the_average_of_the_raw_weights(splits) -> None:
    learner = Learner(recipe(splits).learner, 3, "cpu")
    pictures, labels = Mixture().real(64, 9)
    average = learner.frozen("raw").head.weight.clone()
    for step in range(6):
        learner.step(pictures[..., None], labels, np.arange(64) + 64 * step, 1.0)
        decay = min(0.9, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * learner.frozen("raw").head.weight
    assert torch.allclose(learner.frozen("ema").head.weight, average, rtol=0, atol=1e-6)
    assert not torch.allclose(learner.frozen("raw").head.weight, average, rtol=0, atol=1e-4)


def test_equal_seeds_give_equal_learners_and_other_seeds_others(splits) -> None:
    config = recipe(splits).learner
    one, two, other = (Learner(config, seed, "cpu").frozen("ema") for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.head.weight, other.head.weight)


def test_shifts_are_uniform_exact_and_fixed_by_position() -> None:
    config = LearnerConfig(shift=2)
    image = torch.rand(1, 1, SIZE, SIZE).expand(2000, -1, -1, -1) * 0.5
    out = augment(image, np.arange(2000), config, seed=1)
    padded = torch.nn.functional.pad(image[:1], (2, 2, 2, 2), value=-1.0)[0, 0]
    crops = {
        (top, left): padded[top : top + SIZE, left : left + SIZE]
        for top in range(5)
        for left in range(5)
    }
    counts = [sum(torch.equal(o, crop) for o in out[:, 0]) for crop in crops.values()]
    assert sum(counts) == 2000
    assert 0 < sum((c - 80) ** 2 / 80 for c in counts) < 46  # chi-square, 24 degrees, p of 0.004
    later = augment(image[:5], np.arange(100, 105), config, seed=1)
    assert torch.equal(later, out[100:105])


def test_cool_down_limits_and_pool_order_are_kept(splits) -> None:
    config = recipe(splits, max_rounds=2, max_samples=100)
    assert config.may_add(0, 47) and not config.may_add(0, 48)
    assert not config.may_add(1, 10)  # 60 + 2 * 30 is above max_samples
    assert not recipe(splits, max_rounds=2).may_add(2, 10)
    order = PoolOrder(3, [(0, 60), (16 * 8, 90)])
    rows = order.index(np.arange(16 * 40))
    assert rows[: 16 * 8].max() < 60 <= rows.max() < 90


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start_samples": 61}, "start_samples=61 is not a multiple"),
        ({"arms": ["static", "practice"], "real_train": ""}, "list practice before it"),
        ({"arms": ["practice", "real"], "real_train": ""}, "go together"),
        ({"arms": ["practice"]}, "go together"),
        ({"pictures": {"image_size": 8, "channels": 3}}, "pictures.channels=3"),
    ],
)
def test_recipes_without_sense_are_refused(splits, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(splits, **changes)


def test_wrong_classes_and_seen_test_pictures_are_refused(splits, tmp_path) -> None:
    swapped = write_split(tmp_path / "swapped", 30, 1, ["a", "c", "b"])
    with pytest.raises(UserError, match="class 1 is 'b' to the toy but 'c' in"):
        run_toy(recipe(splits, test=swapped), tmp_path / "one")
    with pytest.raises(UserError, match="300 of 300 pictures .* among the generator's training"):
        run_toy(recipe(splits), tmp_path / "two", training=splits["test"])
    with pytest.raises(UserError, match="among the monitor split"):
        run_toy(recipe(splits, monitor=splits["test"]), tmp_path / "three")
