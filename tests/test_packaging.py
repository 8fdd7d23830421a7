"""What pip installs: the wheel's contents, use from another folder, and what `import` needs."""

import subprocess
import sys
import sysconfig
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


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel installed into an empty folder outside the repository."""
    site = tmp_path_factory.mktemp("installed") / "site"
    options = ("--no-deps", "--no-index", "--no-compile", "--target", str(site))
    command = [sys.executable, "-m", "pip", "install", "-q", *options, str(wheel)]
    made = subprocess.run(command, cwd=site.parent, capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr[-2000:]
    assert (site / "etude-0.1.0.dist-info" / "RECORD").exists()
    return site


def run_installed(site: Path, code: str) -> list[str]:
    """Lines that `code` prints where this checkout is on no path; the environment has torch."""
    libraries = sysconfig.get_paths()["purelib"]
    start = f"import sys; sys.path += [{libraries!r}]\n"  # as data: its .pth files are not read
    made = subprocess.run(
        [sys.executable, "-S", "-P", "-c", start + code],
        cwd=site.parent,
        env={"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "HOME": str(site.parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert made.returncode == 0, made.stderr[-3000:]
    return made.stdout.splitlines()


def test_the_wheel_works_from_another_folder(installed: Path) -> None:
    """Imports, shipped recipes and an operator's value, with the installed folder and torch."""
    code = (
        "import etude, etude.kernels, etude.recipes, torch\n"
        "from etude.core.recipe import load_recipe, shipped\n"
        "assert load_recipe('ldm/digits').kind == 'ldm'\n"
        "x, shift, scale = torch.arange(16.).view(1, 2, 8), *torch.ones(2, 1, 8)\n"
        "y = etude.kernels.adaln_modulate(x, shift, scale)\n"
        "norm = torch.nn.functional.layer_norm(x.double(), (8,), eps=1e-6)\n"
        "assert torch.allclose(y.double(), 2 * norm + 1, atol=1e-5), y\n"
        "print(*shipped())\n"
        "for module in (etude, etude.kernels, etude.recipes): print(module.__file__)\n"
    )
    names, *files = run_installed(installed, code)
    expected = {
        str(file.relative_to(ROOT / "recipes").with_suffix(""))
        for file in (ROOT / "recipes").rglob("*.yaml")
    }
    assert set(names.split()) == expected and "ldm/digits" in expected
    package = installed / "etude"
    wanted = [package, package / "kernels", package / "recipes"]
    assert files == [str(folder / "__init__.py") for folder in wanted]


def test_the_command_of_the_wheel(installed: Path) -> None:
    code = "sys.argv = ['etude', 'recipes', 'list']\nfrom etude.cli import main\nmain()"
    assert any("ldm/digits" in line for line in run_installed(installed, code))


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
