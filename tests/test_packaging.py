"""What pip installs: the wheel's contents, use from another folder, and what `import` needs."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, without the operators (their build is measured elsewhere)."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for name in ("engine", "kernels", "recipes"):
        for file in (ROOT / name).rglob("*"):
            if file.is_file() and file.suffix not in (".so", ".pyc"):
                target = source / file.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
    command = [sys.executable, "-c", "from setuptools import build_meta as b; b.build_wheel('.')"]
    made = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr[-2000:]
    return next(source.glob("*.whl"))


def test_the_wheel_holds_every_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    folders = {"engine": "etude", "kernels": "etude/kernels", "recipes": "etude/recipes"}
    for folder, package in folders.items():
        for pattern in ("*.py", "*.yaml"):
            for file in (ROOT / folder).rglob(pattern):
                assert f"{package}/{file.relative_to(ROOT / folder)}" in names, file
    assert not any(n.split("/")[0] in ("kernels", "engine", "recipes", "tests") for n in names)


def test_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    text = archive.read("etude-0.1.0.dist-info/METADATA").decode()
    assert "Version: 0.1.0\n" in text and "License-Expression: Apache-2.0\n" in text
    assert "Requires-Python: >=3.11\n" in text
    entry = archive.read("etude-0.1.0.dist-info/entry_points.txt").decode()
    assert "etude = etude.cli:main" in entry


def test_the_wheel_works_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import etude, etude.kernels, etude.recipes, torch\n"
        "y = etude.kernels.adaln_modulate(torch.ones(1, 2, 8), *torch.ones(2, 1, 8))\n"
        "assert torch.equal(y, torch.ones(1, 2, 8)), y\n"
        "print(etude.kernels.__file__)"
    )
    made = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert made.returncode == 0, made.stderr[-2000:]
    assert made.stdout.split() == [str(tmp_path / "site/etude/kernels/__init__.py")]


def test_import_etude_needs_no_optional_library() -> None:
    code = (
        "import sys\n"
        "banned = ('deepspeed', 'nvidia', 'webdataset', 'diffusers', 'transformers',\n"
        "          'matplotlib', 'sklearn', 'scipy', 'typer', 'xformers')\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in banned: raise ImportError('refused: ' + name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "import etude, etude.kernels\n"
        "from etude.kernels import adaln_modulate, adamw_ema\n"
        "print('ok')"
    )
    made = subprocess.run(
        [sys.executable, "-c", code], cwd="/", capture_output=True, text=True, timeout=120
    )
    assert made.stdout.strip() == "ok", made.stderr[-2000:]
