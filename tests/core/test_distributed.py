"""Ranks find each other, agree, and name whoever is missing, odd or gone; real processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from etude.core.distributed import all_agree, clear_stale_locks, exchange, local_facts, start
from etude.core.errors import UserError

WORKER = Path(__file__).parent / "workers" / "ranks.py"


def launcher(folder: Path, ranks: list[int], wait_s: float) -> subprocess.Popen:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WAIT": str(wait_s)}
    command = [sys.executable, str(WORKER), "launch", str(folder), str(port), *map(str, ranks)]
    return subprocess.Popen(command, env=environment)


def wait_for(paths: list[Path], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"missing: {[p for p in paths if not p.exists()]}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> list[dict]:
    """What three ranks saw; their launcher is killed once all are ready."""
    folder = tmp_path_factory.mktemp("ranks")
    process = launcher(folder, [0, 1, 2], 60)
    wait_for([folder / f"{rank}.ready" for rank in range(3)])
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for([folder / f"{rank}.json" for rank in range(3)])
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(3)]


def test_flags_and_values_reach_every_rank(reports):
    for report in reports:
        assert report["any none"] is False
        assert report["any one"] is True
        assert report["exchange"] == [0, 1, 4]


def test_the_odd_rank_and_field_are_named_everywhere(reports):
    for report in reports:
        assert report["agree"] == "fine"
        assert "rank 1 (" in report["odd"] and "code is 'other', others 'abc'" in report["odd"]
        assert "recipe" not in report["odd"] and "rank 2" not in report["odd"]


def test_a_rank_that_sees_another_run_folder_is_named(reports):
    for report in reports:
        assert "rank 2 (" in report["blind"] and "run folder" in report["blind"]
        assert "rank 1" not in report["blind"]


def test_a_barrier_names_who_did_not_come(reports):
    host = socket.gethostname()
    for report in reports[:2]:
        assert f"rank 2 ({host}:" in report["barrier"] and "barrier/saved" in report["barrier"]
        assert "present: 0 (" in report["barrier"]


def test_ranks_notice_that_their_launcher_died(reports):
    for report in reports:
        assert report["launcher gone before"] is False
        assert report["launcher gone after"] is True


def test_start_names_the_ranks_that_never_came(tmp_path):
    process = launcher(tmp_path, [0, 2], 6)
    assert process.wait(90) == 0
    for rank in (0, 2):
        message = json.loads((tmp_path / f"{rank}.json").read_text())["start"]
        assert message.startswith("rank 1 of 3 did not reach 'start' within 6 s")
        assert f"0 ({socket.gethostname()}:" in message


def test_start_without_rank_zero_names_the_address(tmp_path):
    process = launcher(tmp_path, [1], 2)
    assert process.wait(90) == 0
    message = json.loads((tmp_path / "1.json").read_text())["start"]
    assert "rank 1 on" in message and "cannot reach rank 0 at 127.0.0.1:" in message


def test_alone_nothing_is_awaited(monkeypatch):
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    world = start()
    assert (world.rank, world.size, world.launcher_gone) == (0, 1, False)
    assert exchange(world, "x", {"a": 1}) == [{"a": 1}]
    all_agree(world, local_facts(recipe="r"))


def test_half_an_environment_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="torchrun"):
        start()


def test_an_impossible_wait_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ETUDE_START_SECONDS", "soon")
    with pytest.raises(UserError, match="^ETUDE_START_SECONDS=soon: give the seconds"):
        start()


def test_only_dead_build_locks_are_removed(tmp_path):
    old = time.time() - 60
    for name in ("dead", "alive", "young"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
        if name != "young":
            os.utime(tmp_path / name / "lock", (old, old))
    sleeper = subprocess.Popen(["sleep", "60"], cwd=tmp_path / "alive")
    try:
        assert clear_stale_locks(tmp_path) == [tmp_path / "dead" / "lock"]
    finally:
        sleeper.kill()
        sleeper.wait()
