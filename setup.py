"""Build of Etude: where its packages live, and the C++ and CUDA operators of `csrc/`.

Called by pip (`pip install .`, `pip install -e .`), with or without build isolation: no operator
includes torch headers, so building needs only setuptools, pybind11 and a compiler.

A build that fails is skipped with a warning and the reference operators are used instead
(`etude doctor` and `etude.kernels.status()` say so). The CUDA operators take nvcc about 25 s of
processor time per GPU architecture, shared by as many cores as there are; `ETUDE_BUILD_CUDA` says
when:

    auto   (default) where nvcc and a GPU's driver are found, for the GPUs of this machine
    1      everywhere, such as in an image made without a GPU; fails if they cannot be built
    0      never

`ETUDE_CUDA_ARCHS` names the architectures; `1` without it takes A100, H100 and B200 (80;90a;100)
and adds code that younger GPUs translate for themselves.
"""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from pybind11.setup_helpers import build_ext as _build_ext
from setuptools import setup

ROOT = Path(__file__).resolve().parent
PACKAGE_DIR = {"etude": "engine", "etude.kernels": "kernels", "etude.recipes": "recipes"}
DATA_FILES = [f"**/*.{end}" for end in ("html", "css", "js", "json", "yaml", "txt", "svg", "sh")]

# The kernels are compiled once per level and the best one the processor has is taken at run time:
# at the x86-64 baseline (SSE2) several of them are slower than eager PyTorch.
X86_LEVELS = {"v3": ["-march=x86-64-v3"], "v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"]}
CUDA_ARCHS = ["80", "90a", "100"]
CUDA_FLAGS = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC"]
CPU_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden"]
CPU_FLAGS += ["-fno-math-errno", "-fno-trapping-math"]
# No fused multiply-add here: the bits are then the same at every level, and the reference's.
_NO_FMA = ("knn.cpp", "optimizer.cpp", "resizing.cpp")
SOURCE_FLAGS = {name: ["-ffp-contract=off"] for name in _NO_FMA}


def packages() -> list[str]:
    """Every folder that holds Python files, under the name it is imported by."""
    names = set(PACKAGE_DIR)
    for name, folder in PACKAGE_DIR.items():
        for file in (ROOT / folder).rglob("*.py"):
            names.add(".".join((name, *file.parent.relative_to(ROOT / folder).parts)))
    return sorted(names)


def cuda_mode() -> str:
    mode = os.environ.get("ETUDE_BUILD_CUDA", "auto").lower()
    if mode not in ("0", "auto", "1"):
        raise SystemExit(f"ETUDE_BUILD_CUDA={mode}: must be 0, auto or 1")
    return mode


def find_nvcc() -> str | None:
    """nvcc's path, or None where it is absent or not wanted."""
    if cuda_mode() == "0" or (cuda_mode() == "auto" and not has_driver()):
        return None
    homes = [os.environ[k] + "/bin/nvcc" for k in ("CUDA_HOME", "CUDA_PATH") if k in os.environ]
    candidates = [*homes, shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    nvcc = next((c for c in candidates if c and os.path.exists(c)), None)
    if nvcc is None and cuda_mode() == "1":
        raise SystemExit("ETUDE_BUILD_CUDA=1, but nvcc was not found: set CUDA_HOME to its folder")
    return nvcc


def has_driver() -> bool:
    """Whether a kernel could run here; without one nothing that nvcc makes is of use."""
    return any(os.path.exists(p) for p in ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg"))


def cuda_archs() -> list[str]:
    """Architectures to build for: those asked for, those of the GPUs here, or the usual ones."""
    if "ETUDE_CUDA_ARCHS" in os.environ:
        return [a for a in os.environ["ETUDE_CUDA_ARCHS"].split(";") if a]
    if cuda_mode() == "auto":
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
        except (OSError, subprocess.TimeoutExpired):
            said = ""
        found = sorted({line.strip().replace(".", "") for line in said.splitlines()})
        if found and all(a.isdigit() for a in found):
            return [{"90": "90a"}.get(a, a) for a in found]
    return CUDA_ARCHS


def cuda_version(nvcc: str) -> str:
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    return said.split("release ")[1].split(",")[0] if "release " in said else "unknown"


def cuda_libraries(nvcc: str) -> Path:
    """The folder of libcudart_static.a. nvcc may be a wrapper script: it is asked for its root."""
    command = [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]
    out = subprocess.run(command, capture_output=True, text=True)
    tops = [
        line.split("TOP=")[1] for line in (out.stderr + out.stdout).splitlines() if "TOP=" in line
    ]
    top = Path(tops[0].strip().strip('"')) if tops else Path(nvcc).resolve().parent.parent
    for sub in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib"):
        if (top / sub / "libcudart_static.a").exists():
            return top / sub
    raise FileNotFoundError(f"libcudart_static.a is not under {top}")


class build_ext(_build_ext):
    """Adds the objects that setuptools cannot make: one per CPU level, and CUDA ones by nvcc."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        folder = Path(self.build_temp) / ext.name
        folder.mkdir(parents=True, exist_ok=True)
        try:
            if ext.name.endswith("_cuda"):
                self.add_cuda_objects(ext, folder)
            else:
                self.add_cpu_objects(ext, folder)
            super().build_extension(ext)
        except Exception as error:
            if ext.name.endswith("_cuda") and cuda_mode() == "1":
                raise
            print(f"WARNING: {ext.name} was not built: {error!r}", file=sys.stderr)

    def add_cpu_objects(self, ext: Pybind11Extension, folder: Path) -> None:
        compiler = self.compiler.compiler_so_cxx[0] if self.compiler.compiler_so_cxx else "c++"
        compiler = os.environ.get("CXX", compiler)
        levels = {"base": []}
        if platform.machine() in ("x86_64", "AMD64"):
            levels |= X86_LEVELS
        for level, flags in levels.items():
            one = partial(self.compile_level, compiler, level, flags, folder)
            try:
                with ThreadPoolExecutor(os.cpu_count()) as pool:
                    ext.extra_objects += list(pool.map(one, CPU_KERNELS))
            except subprocess.CalledProcessError:
                if level == "base":
                    raise
                print(f"WARNING: {compiler} cannot build for {level}; left out", file=sys.stderr)
                break
            ext.define_macros.append((f"ETUDE_HAVE_{level.upper()}", "1"))

    @staticmethod
    def compile_level(compiler: str, level: str, flags: list[str], to: Path, source: str) -> str:
        made = to / f"{Path(source).stem}.{level}.o"
        needs = [Path(__file__), Path(source), *Path(source).parent.glob("*.h")]
        if not made.exists() or made.stat().st_mtime < max(p.stat().st_mtime for p in needs):
            more = [*flags, *SOURCE_FLAGS.get(Path(source).name, []), f"-DETUDE_LEVEL={level}"]
            subprocess.check_call([compiler, *CPU_FLAGS, *more, "-c", source, "-o", str(made)])
        return str(made)

    def add_cuda_objects(self, ext: Pybind11Extension, folder: Path) -> None:
        nvcc, archs = find_nvcc(), cuda_archs()
        targets = [a for x in archs for a in ("-gencode", f"arch=compute_{x},code=sm_{x}")]
        if archs == CUDA_ARCHS:
            targets += ["-gencode", f"arch=compute_{archs[0]},code=compute_{archs[0]}"]
        targets += ["--threads", str(len(archs))]
        one = partial(self.compile_cuda, nvcc, targets, folder)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            ext.extra_objects += list(pool.map(one, CUDA_KERNELS))
        ext.define_macros.append(("ETUDE_CUDA_VERSION", f'"{cuda_version(nvcc)}"'))
        libraries = cuda_libraries(nvcc)
        ext.extra_link_args += [f"-L{libraries}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]

    @staticmethod
    def compile_cuda(nvcc: str, targets: list[str], to: Path, source: str) -> str:
        folder = Path(source).parent
        made = to / f"{Path(source).stem}.cu.o"
        command = [nvcc, *CUDA_FLAGS, *targets, "-c", source, "-o", str(made)]
        recipe = made.with_suffix(".txt")  # other architectures: another object
        needs = [Path(__file__), Path(source), *folder.glob("*.h"), *folder.glob("*.cuh")]
        fresh = made.exists() and recipe.exists() and recipe.read_text() == str(command)
        if not fresh or made.stat().st_mtime < max(p.stat().st_mtime for p in needs):
            subprocess.check_call(command)
            recipe.write_text(str(command))
        return str(made)


def sources(pattern: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(pattern))


CPU_BINDINGS = sources("csrc/cpu/*bindings.cpp")
CPU_KERNELS = [s for s in sources("csrc/cpu/*.cpp") if s not in CPU_BINDINGS]
CUDA_KERNELS = sources("csrc/cuda/*.cu")
extensions = []
ParallelCompile(default=0).install()  # as many as there are cores
if CPU_KERNELS:
    extensions.append(
        Pybind11Extension(
            "etude.kernels._cpu",
            CPU_BINDINGS,
            cxx_std=17,
            depends=[*CPU_KERNELS, *sources("csrc/cpu/*.h")],
            extra_compile_args=["-O2", "-fopenmp"],
            extra_link_args=["-fopenmp"],
        )
    )
if CUDA_KERNELS and find_nvcc():
    extensions.append(
        Pybind11Extension(
            "etude.kernels._cuda",
            ["csrc/cuda/bindings.cpp"],
            cxx_std=17,
            depends=[*CUDA_KERNELS, *sources("csrc/cuda/*h")],
        )
    )
for extension in extensions:
    extension.optional = not (extension.name.endswith("_cuda") and cuda_mode() == "1")

setup(
    packages=packages(),
    package_dir=PACKAGE_DIR,
    package_data={
        "etude": DATA_FILES,
        "etude.kernels": ["budgets/*.json"],
        "etude.recipes": ["**/*"],
    },
    exclude_package_data={"etude.recipes": ["**/__pycache__/*", "**/*.pyc"]},
    ext_modules=extensions,
    cmdclass={"build_ext": build_ext},
)
