"""Break the code once for each promised feature and see the test that names it turn red.

    python tests/mutations/run.py [FEATURE ...]

`features.yaml` lists what evaluation promises: the feature, the test that holds it, and one change
of the code that must make that test fail. Each change is made in a copy of the tree; the test must
pass without it and fail with it. test_mutations.py checks, with the suite, that the list still
fits the code.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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


def promises() -> list[Promise]:
    """The list in its order."""
    listed = yaml.safe_load((HERE / "features.yaml").read_text())
    return [Promise(**(one | {"peers": tuple(one["peers"])})) for one in listed]


def outcome(root: Path, test: str) -> int:
    """pytest's status of one test in a copy of the tree."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:xdist", test]
    path = f"{root / 'site'}{os.pathsep}{root}"
    environment = os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    return done.returncode


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
    missed = 0
    with tempfile.TemporaryDirectory(prefix="etude-mutations-") as folder:
        root = Path(folder)
        copy(root)
        for promise in promises():
            if wanted and promise.feature not in wanted:
                continue
            path = root / promise.file
            text = path.read_text()
            before = outcome(root, promise.test)
            path.write_text(text.replace(promise.old, promise.new))
            after = outcome(root, promise.test)
            path.write_text(text)
            seen = before == 0 and after == 1
            missed += not seen
            said = "seen" if seen else f"NOT SEEN (before {before}, after {after})"
            print(f"{said:10} {promise.feature}: {promise.test}", flush=True)
    return missed


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
