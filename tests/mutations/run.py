"""Break the code once for each promised feature and see the test that names it turn red.

    python tests/mutations/run.py [FEATURE ...]

`features.yaml` lists what evaluation promises: the feature, the test that holds it, and one change
of the code that must make that test fail. Each change is made in a copy of the tree; the test must
pass without it and fail with it. test_mutations.py checks, with the suite, that the list still
fits the code.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy  # noqa: F401  (what every test imports is imported once; each test runs in a fork)
import pytest
import scipy.stats  # noqa: F401
import torch  # noqa: F401
import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
COPIED = ("engine", "kernels", "recipes", "tests", "docs", "benchmarks", "README.md")


@dataclass(frozen=True)
class Promise:
    """One feature, the test that holds it, and the change that must break it.

    Attributes:
        peers: how others have it: EvalGIM, torch-fidelity, clean-fid, torchmetrics, dgm-eval.
        test: as pytest takes it.
        file, old, new: the change: `old` stands once in the file.
    """

    feature: str
    peers: tuple[str, ...]
    test: str
    file: str
    old: str
    new: str

    @property
    def row(self) -> str:
        """Its line in the table of docs/how-does-evaluation-work.md."""
        cells = [self.feature, *self.peers, f"`{self.test.removeprefix('tests/')}`"]
        return f"| {' | '.join(cells)} |"


def promises() -> list[Promise]:
    """The list in its order."""
    listed = yaml.safe_load((HERE / "features.yaml").read_text())
    return [Promise(**(one | {"peers": tuple(one["peers"])})) for one in listed]


def outcome(root: Path, test: str) -> int:
    """pytest's status of one test in a copy of the tree."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    os.chdir(root)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    sys.dont_write_bytecode, sys.path[:1] = True, [str(root / "site"), str(root)]
    path = f"{root / 'site'}{os.pathsep}{root}"
    os.environ |= {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    os._exit(pytest.main(["-q", "-x", "--no-header", "-p", "no:xdist", test]))


def copy(root: Path) -> None:
    """The tree in a folder of its own, importable as `etude` by way of `site`."""
    for name in COPIED:
        source, target = ROOT / name, root / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
            shutil.copytree(source, target, ignore=ignored, symlinks=True)
        else:
            shutil.copy(source, target)
    shutil.copy(ROOT / "pyproject.toml", root)
    (root / "engine" / "kernels").symlink_to(root / "kernels")
    (root / "engine" / "recipes").symlink_to(root / "recipes")
    (root / "site").mkdir()
    (root / "site" / "etude").symlink_to(root / "engine")
    if (ROOT / "data").exists():
        (root / "data").symlink_to(ROOT / "data")


def main(wanted: Sequence[str]) -> int:
    """Try the named features, or all; the number of those whose test does not see the change."""
    tried = [promise for promise in promises() if not wanted or promise.feature in wanted]
    if unknown := set(wanted) - {promise.feature for promise in tried}:
        print(f"features.yaml has no feature {', '.join(map(repr, sorted(unknown)))}")
        return len(unknown)
    missed, before = 0, {}
    with tempfile.TemporaryDirectory(prefix="etude-mutations-") as folder:
        root = Path(folder)
        copy(root)
        for promise in tried:
            if promise.test not in before:
                before[promise.test] = outcome(root, promise.test)
            path = root / promise.file
            text = path.read_text()
            path.write_text(text.replace(promise.old, promise.new))
            after = outcome(root, promise.test)
            path.write_text(text)
            seen = before[promise.test] == 0 and after == 1
            missed += not seen
            said = "seen" if seen else f"NOT SEEN (before {before[promise.test]}, after {after})"
            print(f"{said:10} {promise.feature}: {promise.test}", flush=True)
    return missed


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
