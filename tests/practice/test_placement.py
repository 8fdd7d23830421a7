"""Who draws and who learns changes nothing: real processes, a real generator, real kills.

One process that does both in turn is the yardstick. Beside it: one that learns and one that draws,
two that do both, and processes killed at any moment.
"""

import json
import time
from pathlib import Path

import numpy as np
import pytest

from etude.core.recipe import load_recipe
from etude.data.pool import Pool
from etude.jobs import run_recipe

pytestmark = pytest.mark.timeout(600)

RECIPE = """\
kind: practice
generator: {generator}
sampler: {{method: ddim, steps: 4, guidance_convention: lambda}}
pictures: {{image_size: 16, crop: none, channels: 1}}
monitor: {digits}/monitor
test: {digits}/test
learner:
  model: {{in_channels: 1, num_classes: 10, channels: [8, 16]}}
  batch: 32
  lr: 4.0e-3
  ema: 0.9
schedule: {{steps: 50}}
trigger: {{evaluate_every: 5, patience: 1, delay_steps: {delay}}}
guidance: {{omega: 0.1, every: 2}}
start_samples: 100
round_samples: 50
max_rounds: 2
chunk: 32
probe_samples: 20
save_every: 7
arms: {arms}
"""


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recipes `now.yaml` and `later.yaml` (rounds that come after 7 steps) and their generator."""
    root = tmp_path_factory.mktemp("placement")
    recipe = load_recipe(tiny.ldm, ["loop.images=160", "loop.evaluate_every=160"])
    generator, _ = run_recipe(recipe, root=root / "runs", name="ldm", quiet=True)
    fixed = {"generator": generator, "digits": tiny.folder / "digits"}
    for name, delay, arms in (("now", 0, "[practice, static]"), ("later", 7, "[practice]")):
        text = RECIPE.format(**fixed, delay=delay, arms=arms)
        (root / f"{name}.yaml").write_text(text)
    return root


@pytest.fixture(scope="module")
def alone(folder: Path, forks) -> dict[str, Path]:
    """Both recipes in one process, to the end."""
    for name in ("now", "later"):
        process = forks.start(*command(name, name), cwd=folder)
        out, err = process.communicate(240)
        assert process.returncode == 0, out + err
    return {name: folder / "runs" / name for name in ("now", "later")}


def command(recipe: str, run: str, *more: str) -> list[str]:
    return ["-m", "etude", "practice", f"{recipe}.yaml", f"run={run}", *more]


def figures(run: Path) -> dict:
    """A result without seconds."""
    arms = json.loads((run / "result.json").read_text())["arms"]
    return {
        name: {key: value for key, value in arm.items() if not key.endswith("seconds")}
        for name, arm in arms.items()
    }


def assert_equal(run: Path, other: Path) -> None:
    """The same pools to the last bit of picture and manifest, and the same learners."""
    for name in figures(run):
        one, two = (Pool(root / "pools" / name) for root in (run, other))
        assert one.parts == two.parts and len(one) > 100
        rows = np.arange(len(one))
        assert np.array_equal(one.images(rows), two.images(rows))
        assert np.array_equal(one.entropies(rows), two.entropies(rows), equal_nan=True)
    assert figures(run) == figures(other)
    assert not list(run.glob("pools/*/requests/*")) and not (run / "REQUEUE").exists()


def wait_for(done, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def ended(processes, seconds: float = 240) -> list[int]:
    return [process.communicate(seconds) and process.returncode for process in processes]


def test_one_draws_and_one_learns(folder, alone, forks) -> None:
    words = command("now", "apart", "placement=separate")
    processes = forks.start_ranks(2, *words, cwd=folder)
    assert ended(processes) == [0, 0]
    assert_equal(folder / "runs" / "apart", alone["now"])


@pytest.fixture(scope="module")
def both(folder, forks) -> Path:
    """Two processes that learn and draw, to the end."""
    assert ended(forks.start_ranks(2, *command("now", "both"), cwd=folder)) == [0, 0]
    return folder / "runs" / "both"


def test_two_that_do_both_share_the_work_and_learn_the_same(both, alone) -> None:
    """Gradients are summed in another order, so learners, and what they guide, agree closely."""
    one, two = (Pool(root / "pools" / "practice") for root in (both, alone["now"]))
    start = np.arange(100)
    assert np.array_equal(one.images(start), two.images(start))
    ours, theirs = (figures(root)["practice"] for root in (both, alone["now"]))
    first = theirs["added_at"][0]
    looks = [[look for look in arm["looks"] if look[0] <= first] for arm in (ours, theirs)]
    assert np.allclose(looks[0], looks[1], atol=0.02) and ours["added_at"][0] == first


def test_two_that_do_both_are_stopped_and_killed_and_started_again(folder, both, forks) -> None:
    """A stop of one while they draw is a stop of both; then kills: drawing, learning, later."""
    run, words = folder / "runs" / "both-again", command("now", "both-again")
    ranks = forks.start_ranks(2, *words, cwd=folder)
    wait_for(lambda: list(run.glob("pools/practice/claims/*/lock.json")))
    ranks[1].send_signal(15)
    assert ended(ranks) == [85, 85] and not list(run.glob("arms/practice/triggers/*"))
    drawn = len(list(run.glob("pools/practice/part-*")))
    marks = [("pools/practice/part-*", drawn + 1), ("arms/practice/triggers/step-*", 1)]
    for attempt, (mark, count) in enumerate([*marks, ("arms/static/checkpoints/step-*", 1)]):
        ranks = forks.start_ranks(2, *words, cwd=folder)
        wait_for(lambda mark=mark, count=count: len(list(run.glob(mark))) >= count)
        for rank in ranks if attempt % 2 else ranks[::-1]:
            rank.kill()
        ended(ranks)
    assert not (run / "result.json").exists()
    assert ended(forks.start_ranks(2, *words, cwd=folder)) == [0, 0]
    assert_equal(run, both)


def test_a_killed_process_that_draws_is_made_up_for_by_another(folder, alone, forks) -> None:
    run = folder / "runs" / "killed-one"
    words = command("now", "killed-one", "placement=separate", "generators=2")
    learner, first, second = forks.start_ranks(3, *words, cwd=folder)
    wait_for(lambda: list(run.glob("pools/practice/claims/*/lock.json")))
    first.kill()
    second.communicate(240)
    learner.communicate(240)
    assert (learner.returncode, second.returncode) == (0, 0)
    assert json.loads((run / "result.json").read_text())["lost"] == [1]
    assert_equal(run, alone["now"])


def test_a_learner_draws_for_itself_when_nobody_else_is_left(folder, alone, forks) -> None:
    run = folder / "runs" / "killed-all"
    words = command("later", "killed-all", "placement=separate")
    learner, drawing = forks.start_ranks(2, *words, cwd=folder)
    wait_for(lambda: len(list(run.glob("pools/practice/part-*"))) >= 5)  # in the first round
    drawing.kill()
    learner.communicate(240)
    assert learner.returncode == 0
    assert_equal(run, alone["later"])


def test_kills_at_any_moment_of_either_process(folder, alone, forks) -> None:
    """Both are killed at random moments, again and again, and started again."""
    run, chance = folder / "runs" / "killed", np.random.default_rng(5)
    kills = 0
    for attempt in range(60):
        words = command("later", "killed", "placement=separate")
        processes = forks.start_ranks(2, *words, cwd=folder)
        seconds = chance.uniform(1.5, 4.0) if attempt < 5 else 240.0
        deadline = time.monotonic() + seconds
        while processes[0].poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if processes[0].poll() is not None and (run / "result.json").exists():
            break
        for process in processes if chance.random() < 0.5 else processes[::-1]:
            process.kill()
        for process in processes:
            process.communicate(60)
        kills += 1
    assert kills >= 3
    ended(processes)
    assert_equal(run, alone["later"])


def test_a_stop_is_agreed_and_the_same_command_goes_on(folder, alone, forks) -> None:
    run = folder / "runs" / "stopped"
    words = command("later", "stopped", "placement=separate")
    processes = forks.start_ranks(2, *words, cwd=folder)
    wait_for(lambda: list(run.glob("arms/practice/triggers/step-*")))
    processes[0].send_signal(15)
    assert ended(processes) == [85, 85] and (run / "REQUEUE").exists()
    assert ended(forks.start_ranks(2, *words, cwd=folder)) == [0, 0]
    assert_equal(run, alone["later"])


def test_too_few_processes_are_refused(folder, forks) -> None:
    process = forks.start(*command("now", "few", "placement=separate"), cwd=folder)
    _, err = process.communicate(60)
    assert process.returncode == 2 and "needs at least 2 processes, and there are 1" in err
