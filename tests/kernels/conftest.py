"""Shared by the operators' tests: Triton's interpreter in a process, CUDA kernels on the CPU."""

import ctypes
import fcntl
import importlib.util
import json
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from etude.kernels import backends

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MACHINE = HERE / "cuda_on_cpu"  # stands in for the CUDA runtime


@pytest.fixture(scope="session")
def interpret(serve) -> Callable[[str], list[dict]]:
    """Run `interpret_<family>.py` with TRITON_INTERPRET=1; it prints one JSON row per case.

    The interpreter must be chosen before Triton is imported, so it has processes of its own.
    """
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    chosen = {"TRITON_INTERPRET": "1", "ETUDE_KERNELS": "triton"}
    forks = serve(
        "torch", "triton", "triton.language", "pytest", "etude.kernels.backends", **chosen
    )

    def run(family: str) -> list[dict]:
        made = forks.start(HERE / f"interpret_{family}.py")
        out, err = made.communicate(timeout=600)
        assert made.returncode == 0, err[-3000:]
        return [json.loads(line) for line in out.splitlines() if line.startswith("{")]

    return run


@pytest.fixture(scope="session")
def python(serve) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`python(code, VARIABLE="x")`: what code says where nothing of Etude has been imported."""
    forks = serve("torch", "torch._dynamo")

    def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
        made = forks.start("-c", code, **environment)
        said = made.communicate(timeout=120)
        return subprocess.CompletedProcess(made.args, made.returncode, *said)

    return run


def compile_for_cpu(folder: Path, files: list[Path], options: list[str]) -> list[Path]:
    """The object files of C++ and .cu files; -O1 because building takes longer than running."""
    base = ["g++", "-std=c++17", "-O1", "-fPIC", "-w", "-ffp-contract=off", "-U_FORTIFY_SOURCE"]

    def one(file: Path) -> Path:
        made = folder / f"{file.stem}.o"
        command = [*base, *options, f"-I{MACHINE}", "-x", "c++", "-c", str(file), "-o", str(made)]
        said = subprocess.run(command, capture_output=True, text=True)
        assert said.returncode == 0, said.stderr[-3000:]
        return made

    with ThreadPoolExecutor() as pool:
        return list(pool.map(one, files))


def link(folder: Path, name: str, objects: list[Path]) -> Path:
    made = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(["g++", "-shared", *map(str, objects), "-o", str(made)], check=True)
    return made


def once(
    tmp_path_factory: pytest.TempPathFactory, name: str, build: Callable[[Path], Path]
) -> Path:
    """What `build(folder)` makes: one of the workers of a run makes it, the others wait."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = folder / "made"
        if not made.exists():
            made.write_text(str(build(folder)))
        return Path(made.read_text())


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModuleType, ctypes.CDLL]:
    """The module `_cuda`, compiled for the CPU, and the same file as a plain library."""
    pybind11 = pytest.importorskip("pybind11")
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")

    def build(folder: Path) -> Path:
        files = [MACHINE / "machine.cpp", *sorted((ROOT / "csrc/cuda").glob("*.cu"))]
        bindings = ROOT / "csrc/cuda/bindings.cpp"
        python = [f"-I{sysconfig.get_paths()['include']}", f"-I{pybind11.get_include()}"]
        python += ["-O0", "-fvisibility=hidden", '-DETUDE_CUDA_VERSION="none"']
        with ThreadPoolExecutor() as pool:
            glue = pool.submit(compile_for_cpu, folder, [bindings], python)
            objects = compile_for_cpu(folder, files, [])
        return link(folder, "_cuda", objects + glue.result())

    path = once(tmp_path_factory, "cuda_on_cpu", build)
    spec = importlib.util.spec_from_file_location("_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, ctypes.CDLL(str(path))


@pytest.fixture(scope="session")
def on_cpu(built) -> ModuleType:
    """The CUDA operators take CPU tensors in this process."""
    from etude.kernels import adaln, adaln_cuda, knn_cuda, resizing_cuda, statistics_cuda

    made = adaln.implementations(adaln_cuda._forward, adaln_cuda._backward)
    for name, kernel in made.items():
        adaln._library.impl(f"cuda_{name}", kernel, "CPU")
    resizing_cuda._library.impl("cuda_resize", resizing_cuda._resize, "CPU")
    knn_cuda._library.impl("cuda_nearest_neighbours", knn_cuda._nearest, "CPU")
    knn_cuda._library.impl("cuda_membership_counts", knn_cuda._counts, "CPU")
    statistics_cuda._library.impl("cuda_moments", statistics_cuda._moments, "CPU")
    return built[0]


@pytest.fixture
def cuda(on_cpu, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The public functions take the CUDA twin wherever there is one for the dtypes."""

    def pick(op: str, device: str, *dtypes: torch.dtype, twins: tuple[str, ...]) -> str:
        known = all(d in backends.DTYPES["cuda"] for d in dtypes)
        return "cuda" if "cuda" in twins and known else "reference"

    monkeypatch.setattr(backends, "cuda", lambda: on_cpu)
    monkeypatch.setattr(backends, "pick", pick)
    return on_cpu


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that operators allocate is NaN (bytes: 165), with margins that nobody may write."""
    margins: list[Tensor] = []
    new_empty = Tensor.new_empty

    def made(self: Tensor, size, **options) -> Tensor:
        dtype = options.get("dtype") or self.dtype
        shape = torch.Size(size)
        whole = new_empty(self, (shape.numel() + 128,), dtype=dtype)
        whole.fill_(float("nan") if dtype.is_floating_point else 165)
        margins.extend((whole[:64], whole[64 + shape.numel() :]))
        return whole[64 : 64 + shape.numel()].view(shape)

    monkeypatch.setattr(Tensor, "new_empty", made)
    yield
    assert all((m.isnan() if m.is_floating_point() else m == 165).all() for m in margins)


@pytest.fixture(scope="session")
def launch_fault(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels of faults.cu."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    folder = tmp_path_factory.mktemp("faults")
    objects = compile_for_cpu(folder, [MACHINE / "machine.cpp", MACHINE / "faults.cu"], [])
    library = ctypes.CDLL(str(link(folder, "faults", objects)))
    library.launch_fault.restype = ctypes.c_char_p
    return library
