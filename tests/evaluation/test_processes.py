"""Real processes of an evaluation: pairs, kills and jobs beside each other end as one alone does."""

import collections
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from etude.core.signals import EXIT_REQUEUE
from etude.evaluation.results import Row
from etude.evaluation.table import ResultsTable
from etude.metrics.estimates import Estimate
from etude.metrics.extractors.classifier import save_classifier
from etude.models.classifier import Classifier, ClassifierConfig

pytestmark = pytest.mark.timeout(240)
WORKERS = Path(__file__).parent / "workers"
WORKER = WORKERS / "evaluating.py"
KILLED = -signal.SIGKILL
COUNT, SHARD = 150, 16  # of evaluating.py


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier with random weights: its convolutions and products round."""
    folder = tmp_path_factory.mktemp("network")
    model = Classifier(ClassifierConfig(channels=(8, 16), num_classes=4), seed=3).eval()
    save_classifier(folder, model, 8, list("abcd"))
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """Every finished file below a folder, by its place; what a killed process left is not one."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(found)
        if not path.name.endswith(".tmp")
    }


def readings(folder: Path) -> dict[int, list[tuple[int, int]]]:
    """The ranges of pictures that each process read, in its order."""
    return {
        int(path.name): [tuple(map(int, line.split())) for line in path.read_text().splitlines()]
        for path in folder.iterdir()
    }


def ended(processes: list, seconds: float = 120) -> list[tuple[int, str]]:
    """Status and output of every process."""
    said = [process.communicate(seconds) for process in processes]
    return [(p.returncode, "".join(words)) for p, words in zip(processes, said, strict=True)]


@pytest.fixture(scope="module")
def alone(forks, network, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The store that one process fills, never stopped."""
    root = tmp_path_factory.mktemp("alone")
    (root / "read").mkdir()
    one = forks.start(WORKER, "extract", network, root / "store", root / "read")
    assert ended([one]) == [(0, "")]
    read = collections.Counter(i for some in readings(root / "read")[0] for i in range(*some))
    assert read == dict.fromkeys(range(COUNT), 1)
    found = files(root / "store")
    assert len([name for name in found if name.endswith("manifest.json")]) == 2
    return found


def pair_of(forks, network: Path, root: Path, **environment: str) -> list:
    (root / "read").mkdir(exist_ok=True)
    words = (WORKER, "extract", network, root / "store", root / "read")
    before = dict(forks.environment)
    forks.environment |= environment
    try:
        return forks.start_ranks(2, *words)
    finally:
        forks.environment = before


def test_two_processes_extract_what_one_does(forks, network, alone, tmp_path) -> None:
    """Ten shards for two, the last of six pictures; blocks of eight are padded, files are not."""
    assert ended(pair_of(forks, network, tmp_path)) == [(0, ""), (0, "")]
    assert files(tmp_path / "store") == alone
    read = readings(tmp_path / "read")
    assert read[0] and read[1]
    of_all = collections.Counter(i for some in [*read[0], *read[1]] for i in range(*some))
    assert of_all == dict.fromkeys(range(COUNT), 1)


def test_processes_agree_on_what_is_missing(forks, network, alone, tmp_path) -> None:
    """Another job writes between their looks: no shard is left out between them, none made again."""
    assert ended(pair_of(forks, network, tmp_path, AHEAD="1")) == [(0, ""), (0, "")]
    assert files(tmp_path / "store") == alone
    read = readings(tmp_path / "read")
    of_all = collections.Counter(i for some in [*read[0], *read[1]] for i in range(*some))
    assert of_all == dict.fromkeys(range(COUNT), 1)


@pytest.mark.parametrize("size", [1, 2])
def test_a_killed_extraction_goes_on(forks, network, alone, tmp_path, size) -> None:
    """SIGKILL before or after a rename, later and later; the last start makes what is missing."""
    (tmp_path / "read").mkdir()
    words = (WORKER, "extract", network, tmp_path / "store", tmp_path / "read")
    whole: dict[str, bytes] = {}
    for number in (1, 4, 9):
        if size == 1:
            statuses = ended([forks.start(*words, DIE_AT=str(number))])
        else:
            ranks = pair_of(forks, network, tmp_path, DIE_AT=str(number), DIES="1")
            while ranks[1].poll() is None:
                time.sleep(0.02)
            ranks[0].kill()  # as a launcher does
            statuses = ended(ranks)[::-1]
        assert statuses[0][0] == KILLED
        found = files(tmp_path / "store")
        assert found.items() >= whole.items()  # nothing that was whole is touched
        assert {k: v for k, v in found.items() if k in alone} == found
        assert {k: alone[k] for k in found} == found
        whole = found
    assert 0 < len(whole) < len(alone)
    shutil.rmtree(tmp_path / "read")
    if size == 1:
        (tmp_path / "read").mkdir()
        assert ended([forks.start(*words)]) == [(0, "")]
    else:
        assert ended(pair_of(forks, network, tmp_path)) == [(0, ""), (0, "")]
    assert files(tmp_path / "store") == alone
    read = readings(tmp_path / "read")
    of_all = collections.Counter(i for one in read.values() for some in one for i in range(*some))
    assert set(of_all.values()) == {1} and len(of_all) < COUNT


def test_told_to_stop_both_leave_and_the_same_command_goes_on(
    forks, network, alone, tmp_path
) -> None:
    """Only one of two is told; the other does not wait for it for ever."""
    ranks = pair_of(forks, network, tmp_path, PAUSE="0.1")
    while not (tmp_path / "read/1").exists() or not (tmp_path / "read/1").read_text():
        time.sleep(0.01)
    ranks[1].send_signal(signal.SIGTERM)
    (first, said), second = ended(ranks)
    assert (first, said.strip()) == (EXIT_REQUEUE, "stopped: another process was asked to stop")
    assert second == (EXIT_REQUEUE, "stopped: SIGTERM\n")
    found = files(tmp_path / "store")
    assert found.items() < alone.items()
    assert ended(pair_of(forks, network, tmp_path)) == [(0, ""), (0, "")]
    assert files(tmp_path / "store") == alone
