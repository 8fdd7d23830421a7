"""Run folders: identity, resume, the lock between real processes, requests to stop."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Literal

import pytest

from etude.core import lock as locks
from etude.core import recipe as recipes
from etude.core.config import option
from etude.core.environment import environment, revision
from etude.core.errors import UserError
from etude.core.files import read_json, write_json_atomic
from etude.core.log import Log
from etude.core.recipe import Recipe, fingerprint
from etude.core.run import Run, describe, folder_name, list_runs, load_run, summaries
from etude.core.signals import Stopper


class ToyRecipe(Recipe):
    kind: Literal["toy"] = option("toy", "kind")
    images: int = option(10, "how long", unit="images")
    log_every: int = option(1, "how often", affects_result=False)


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(recipes.KINDS, "toy", ToyRecipe)
    monkeypatch.chdir(tmp_path)


HOLDER = """
import sys, time, pathlib
from etude.core.lock import Lock
lock = Lock(pathlib.Path(sys.argv[1]), heartbeat_seconds=0.05)
print("held", flush=True)
time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen:
    """Another process that holds the folder's lock."""
    folder.mkdir(parents=True, exist_ok=True)
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "held\n"
    return child


def end(child: subprocess.Popen) -> None:
    child.kill()
    child.wait()


def test_a_run_has_a_name_made_of_recipe_and_hash() -> None:
    recipe = ToyRecipe(name="ldm/my digits")
    assert folder_name(recipe) == f"ldm-my-digits-{fingerprint(recipe)[:10]}"
    with Run.open(recipe) as run:
        assert run.folder == Path("runs") / folder_name(recipe)
        assert run.checkpoints.is_dir() and run.grids.is_dir() and not run.resumed
        assert load_run(run.folder) == (recipe, run.folder)
        assert load_run(run.folder.name) == (recipe, run.folder)
    with Run.open(ToyRecipe(name="ldm/my digits", log_every=5)) as again:
        assert again.folder == run.folder and again.resumed
        assert load_run(run.folder)[0].log_every == 5
    with Run.open(ToyRecipe(name="ldm/my digits", images=11)) as other:
        assert other.folder != run.folder
    assert not (run.folder / "lock.json").exists()
    with pytest.raises(UserError, match=f"did you mean `{run.folder.name}`"):
        load_run(run.folder.name[:-1])


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "-x", "a\n"])
def test_names_that_leave_the_folder_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="run="):
        Run.open(ToyRecipe(), name=name)


def test_another_job_under_the_same_name_is_refused_with_the_difference() -> None:
    Run.open(ToyRecipe(name="a"), name="mine").close()
    with pytest.raises(UserError, match=r"(?s)different job.*images: 10 -> 20"):
        Run.open(ToyRecipe(name="a", images=20), name="mine")
    assert load_run("mine")[0].images == 10
    assert describe("runs/mine").state == "interrupted"  # the refusal released the lock
    with Run.open(ToyRecipe(name="a", images=20), name="mine", resume_with_changes=True) as run:
        assert load_run("mine")[0].images == 20
        record = json.loads((run.folder / "changes.jsonl").read_text())
        assert record["changed"] == [["images", 10, 20]]


def test_a_finished_run_stays_as_it_was() -> None:
    with Run.open(ToyRecipe(name="a")) as run:
        assert run.finished() is None
        run.request_requeue("SIGTERM", 5)
        run.finish({"accuracy": 0.5})
        assert run.requeue_requested() is None
    with Run.open(ToyRecipe(name="a", log_every=9)) as run:
        assert run.finished() == {"accuracy": 0.5}
        assert load_run(run.folder)[0].log_every == 1
    assert describe(run.folder).state == "finished"


def test_only_rank_0_writes() -> None:
    recipe = ToyRecipe(name="a")
    other = Run.open(recipe, rank=1)
    assert not other.folder.exists()
    with Run.open(recipe) as run:
        other.finish({})
        other.request_requeue("x")
        other.close()
        assert run.held and run.finished() is None and run.requeue_requested() is None


def test_requests_to_be_started_again() -> None:
    with Run.open(ToyRecipe(name="a")) as run:
        Log(run.folder, quiet=True).metrics("train", 640, loss=0.5)
        run.request_requeue("SIGUSR1", 700)
        assert run.requeue_requested()["reason"] == "SIGUSR1"
    found = describe(run.folder)
    assert (found.state, found.requeue, found.images_seen) == ("interrupted", True, 700)
    assert found.metrics["train"]["loss"] == 0.5
    with Run.open(ToyRecipe(name="a")) as run:
        assert run.requeue_requested() is None
        found = describe(run.folder)
        assert (found.state, found.requeue) == ("running", False)
        assert found.holder.endswith(f":{os.getpid()}")


def test_a_second_writer_is_refused_by_host_and_process() -> None:
    folder = Path("runs/mine")
    child = holder(folder)
    try:
        with pytest.raises(UserError) as caught:
            Run.open(ToyRecipe(), name="mine")
        host = read_json(folder / "lock.json")["host"]
        assert f"process {child.pid} on {host}" in str(caught.value)
        assert not (folder / "recipe.yaml").exists()
    finally:
        end(child)
    with Run.open(ToyRecipe(), name="mine") as run:  # its process is gone: taken over at once
        assert run.held


def test_the_heartbeat_decides_about_other_hosts() -> None:
    folder = Path("runs/mine")
    folder.mkdir(parents=True)
    path = folder / "lock.json"
    write_json_atomic(path, {"host": "elsewhere", "namespace": "", "pid": 1, "token": "t"})
    now = time.time()
    os.utime(path, (now, now - locks.STALE_SECONDS + 15))
    with pytest.raises(UserError, match="process 1 on elsewhere"):
        Run.open(ToyRecipe(), name="mine")
    os.utime(path, (now, now - locks.STALE_SECONDS - 15))
    with Run.open(ToyRecipe(), name="mine") as run:
        assert run.held


def test_the_lock_of_a_number_used_again_is_stale() -> None:
    folder = Path("runs/mine")
    folder.mkdir(parents=True)
    mine = locks._identity()
    write_json_atomic(folder / "lock.json", {**mine, "birth": "1", "token": "t"})
    assert locks.is_stale(folder / "lock.json", read_json(folder / "lock.json"))
    write_json_atomic(folder / "lock.json", {**mine, "token": "t"})
    assert not locks.is_stale(folder / "lock.json", read_json(folder / "lock.json"))


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"', "{}"])
def test_a_damaged_lock_does_not_block_for_ever(content: str) -> None:
    folder = Path("runs/mine")
    folder.mkdir(parents=True)
    (folder / "lock.json").write_text(content)
    with pytest.raises(UserError):
        Run.open(ToyRecipe(), name="mine")
    old = time.time() - 120
    os.utime(folder / "lock.json", (old, old))
    Run.open(ToyRecipe(), name="mine").close()


def test_the_heartbeat_beats_and_a_lost_lock_is_noticed(tmp_path: Path) -> None:
    lock = locks.Lock(tmp_path, heartbeat_seconds=0.02)
    old = time.time() - 50
    os.utime(lock.path, (old, old))
    deadline = time.monotonic() + 20
    while locks.heartbeat_age(lock.path) > 10 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert locks.heartbeat_age(lock.path) < 10
    write_json_atomic(lock.path, {"host": "elsewhere", "pid": 1, "token": "theirs"})
    assert not lock.held
    lock.release()
    assert read_json(lock.path)["token"] == "theirs"  # another's lock is left alone
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock.guard", "lock.json"]


def test_of_many_that_start_at_once_one_wins() -> None:
    folder = Path("runs/mine")
    end(holder(folder))  # leaves a stale lock for all to see
    won, refused = [], []

    def attempt() -> None:
        try:
            won.append(locks.Lock(folder))
        except UserError:
            refused.append(1)

    threads = [threading.Thread(target=attempt) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(refused)) == (1, 11)
    won[0].release()


def test_a_forked_child_does_not_release() -> None:
    with Run.open(ToyRecipe(), name="mine") as run:
        child = os.fork()
        if child == 0:
            run.close()
            os._exit(0)
        os.waitpid(child, 0)
        assert run.held


def test_environment_of_every_start() -> None:
    for _ in range(2):
        with Run.open(ToyRecipe(), name="mine") as run:
            pass
    found = read_json(run.folder / "environment.json")
    import torch

    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["command"] == sys.argv and found["kernels"]["reference"].startswith("yes")
    assert [start["command"] for start in found["earlier_starts"]] == [sys.argv]
    root = Path(recipes.__file__).resolve().parents[2]
    head = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True
    )
    if head.returncode == 0:
        assert revision().removesuffix("+changes") == head.stdout.strip()
    assert json.loads(json.dumps(environment())) == environment() | {"date": environment()["date"]}


def test_runs_are_listed_even_when_damaged() -> None:
    for name in ("one", "two"):
        Run.open(ToyRecipe(name=name), name=name).close()
    Path("runs/two/environment.json").write_text("{")
    Path("runs/two/metrics.jsonl").write_text('{"name": "train"}\nxx\n[1]\n')
    Path("runs/three").mkdir()
    Path("runs/three/recipe.yaml").write_text("kind: [")
    Path("runs/other").mkdir()
    columns, rows = list_runs()
    assert {row[0]: row[1] for row in rows} == {"one": "toy", "two": "toy", "three": ""}
    assert all(len(row) == len(columns) for row in rows)
    assert summaries(Path("nowhere")) == []


def test_a_folder_that_cannot_be_made() -> None:
    Path("runs").write_text("a file")
    with pytest.raises(UserError, match="cannot be written"):
        Run.open(ToyRecipe())


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (signal.SIGTERM, "SIGTERM"), (signal.SIGUSR1, "SIGUSR1"), (signal.SIGUSR2, "SIGUSR2"),
        (signal.SIGINT, "Ctrl-C"),
    ],
)  # fmt: skip
def test_signals_become_a_request_inside_the_context_only(number: int, reason: str) -> None:
    before = signal.getsignal(number)
    with Stopper() as stopper:
        assert stopper.requested is None
        os.kill(os.getpid(), number)
        assert stopper.requested == reason
        stopper.request("later")
        assert stopper.requested == reason
    assert signal.getsignal(number) is before


def test_a_second_interrupt_stops_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)  # a job started in the background ignores it
    with pytest.raises(KeyboardInterrupt), Stopper():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_time_limit_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("etude.core.signals.time.monotonic", lambda: now[0])
    with Stopper(max_minutes=1.5) as stopper:
        now[0] = 89.0
        assert stopper.requested is None
        now[0] = 90.0
        assert stopper.requested == "max_minutes=1.5"
    with pytest.raises(UserError, match="max_minutes"):
        Stopper(max_minutes=0)
    before, seen = signal.getsignal(signal.SIGTERM), []

    def inside() -> None:
        with Stopper() as other:
            seen.append(signal.getsignal(signal.SIGTERM) is before)
            other.request("rank 1 was told to")
            seen.append(other.requested)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [True, "rank 1 was told to"]


def test_a_dead_parent_is_noticed(tmp_path: Path) -> None:
    child = (
        "import time, sys; from etude.core.signals import Stopper\n"
        "with Stopper(watch_parent=True) as s:\n"
        "    open(sys.argv[1] + '/ready', 'w').close()\n"
        "    end = time.monotonic() + 30\n"
        "    while s.requested is None and time.monotonic() < end: time.sleep(0.02)\n"
        "    open(sys.argv[1] + '/said.tmp', 'w').write(str(s.requested))\n"
        "import os; os.rename(sys.argv[1] + '/said.tmp', sys.argv[1] + '/said')\n"
    )
    launch = "import subprocess, sys, time; subprocess.Popen(sys.argv[1:]); time.sleep(60)"
    command = [sys.executable, "-c", launch, sys.executable, "-c", child, str(tmp_path)]
    launcher = subprocess.Popen(command)
    deadline = time.monotonic() + 30
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    end(launcher)
    while not (tmp_path / "said").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (tmp_path / "said").read_text() == "the launcher is gone"
