"""What Fréchet distances and precision, recall, density and coverage cost, beside other libraries.

Run by hand: `python -m benchmarks.distances --peers PYTHON`, a Python that has torch, prdc 0.2 and
scikit-learn, for the neighbours' rival.

Features of random numbers with a decaying spectrum, float32, N x 2048 on each side; nothing depends
on what they show. Fréchet, from features and, for a further checkpoint, with the real side known:

    ours               `FrechetReference(real).distance(generated)`, and `distance` again
    numpy eigvals      covariances by numpy, eigenvalues of S_1 S_2: torch-fidelity 0.4
    torch eigvals      the same by torch: torchmetrics 1.9
    scipy sqrtm        the matrix square root of S_1 S_2: pytorch-fid, clean-fid

A rival's further checkpoint has the real side's mean and covariance ready. `full` has 10,000 rows,
`deficient` 1,500, fewer than dimensions; `from covariances` leaves the covariances of both sides
out of everyone's time. Neighbours: k = 5, all four values; a further set for ours has the real
side's own neighbours ready. Providers take turns in every round. A row has medians of the wall's
time and of the processor's, and the memory above what was held before: the largest resident set
while a process of its own runs the provider, less that with the inputs made (on Linux, where the
mark of the largest can be set back).
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks import results
from benchmarks.case import ROOT, hash_of
from etude import kernels
from etude.metrics.frechet import FrechetReference
from etude.metrics.moments import Moments
from etude.metrics.prdc import prdc

WIDTH, K = 2048, 5
ROWS = {"full": 10_000, "deficient": 1_500}
RIVALS = ("numpy eigvals", "torch eigvals", "scipy sqrtm")
Run = Callable[[], object]


def features(rows: int, seed: int) -> torch.Tensor:
    """Features (rows, WIDTH) float32 whose variances fall as 1 / k."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(rows, WIDTH, generator=generator)  # changed in place: memory is measured
    made *= torch.arange(1, WIDTH + 1) ** -0.5 * (1 + 0.02 * seed)
    return made.add_(0.01 * seed)


def root_trace(provider: str, one: np.ndarray, two: np.ndarray) -> float:
    """tr (S_1 S_2)^(1/2) the rival's way."""
    if provider == "scipy sqrtm":
        from scipy.linalg import sqrtm

        return float(np.trace(sqrtm(one @ two)).real)
    if provider == "torch eigvals":
        product = torch.from_numpy(one) @ torch.from_numpy(two)
        return float(torch.linalg.eigvals(product).sqrt().real.sum())
    return float(np.sqrt(np.linalg.eigvals(one @ two).astype(complex)).real.sum())


def moments_of(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    wide = x.numpy().astype(np.float64)
    return wide.mean(0), np.cov(wide, rowvar=False)


def distance(provider: str, one: tuple, two: tuple) -> float:
    """The rival's distance from means and covariances."""
    offset = one[0] - two[0]
    traces = np.trace(one[1]) + np.trace(two[1])
    return float(offset @ offset + traces - 2 * root_trace(provider, one[1], two[1]))


def first(provider: str, real: torch.Tensor, generated: torch.Tensor) -> float:
    """A provider's distance from features, with nothing known of either side."""
    if provider == "ours":
        return FrechetReference(real).distance(generated, warn=False)
    return distance(provider, moments_of(real), moments_of(generated))


def frechet_cases(setting: str) -> dict[str, dict[str, Run]]:
    """Variant -> provider -> what is timed, for one number of rows."""
    real, generated = (features(ROWS[setting], seed) for seed in (1, 2))
    known = FrechetReference(real)
    stated = [moments_of(side) for side in (real, generated)]
    cases: dict[str, dict[str, Run]] = {
        "first": {name: partial(first, name, real, generated) for name in ("ours", *RIVALS)},
        "further": {"ours": partial(known.distance, generated, warn=False)},
    }
    for name in RIVALS:
        cases["further"][name] = lambda name=name: distance(name, stated[0], moments_of(generated))
    if setting == "full":
        parts = [Moments.of(side) for side in (real, generated)]
        rivals = {name: partial(distance, name, *stated) for name in RIVALS}
        cases["first, from covariances"] = {
            "ours": lambda: FrechetReference(parts[0]).distance(parts[1])
        } | rivals
        cases["further, from covariances"] = {"ours": partial(known.distance, parts[1])} | rivals
    return cases


def further_neighbours() -> dict[str, Run]:
    """Ours with what the real side has alone at hand; the generated side is another each time."""
    real, generated = (features(ROWS["full"], seed) for seed in (1, 2))
    prdc(real, generated, K)

    def run() -> dict[str, float]:
        generated[0, 0] += 1e-3
        return prdc(real, generated, K)

    return {"ours": run}


def timed(run: Run) -> tuple[float, float, object]:
    begun, used = time.perf_counter(), time.process_time()
    value = run()
    return time.perf_counter() - begun, time.process_time() - used, value


def measure(cases: dict[str, Run], rounds: int) -> dict[str, dict]:
    """Medians of each provider, in turns; its value for comparison."""
    times: dict[str, list] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, run in cases.items():
            times[name].append(timed(run))
    return {
        name: {
            "median_s": statistics.median(t[0] for t in found),
            "min_s": min(t[0] for t in found),
            "cpu_s": statistics.median(t[1] for t in found),
            "rounds": rounds,
            "value": found[-1][2],
        }
        for name, found in times.items()
    }


# The largest resident set so far, in bytes; `reset` makes the present one the largest.
RESIDENT = """
def resident(reset=False):
    if reset:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    with open("/proc/self/status") as file:
        (line,) = [line for line in file if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])
"""
# A process of its own for each provider, so that nobody's allocator holds another's memory.
ALONE = """
import json, sys, time
import torch
{resident}
torch.set_num_threads(int(sys.argv[2]))
real, generated = torch.load(sys.argv[1])
x, y = real.numpy(), generated.numpy()
{start}
held, rounds = resident(reset=True), []
for _ in range(int(sys.argv[3])):
    for side in (real, generated):
        side[0, 0] += 1e-3  # nothing of an earlier round is known
    begun, used = time.perf_counter(), time.process_time()
    {run}
    rounds.append((time.perf_counter() - begun, time.process_time() - used))
print(json.dumps({{"bytes_above": resident() - held, "rounds": rounds,
                   "value": {{k: float(v) for k, v in value.items()}}}}))
"""
STARTS = {
    "ours": ("from etude.metrics.prdc import prdc", f"value = prdc(real, generated, {K})"),
    "prdc 0.2": ("from prdc import compute_prdc", f"value = compute_prdc(x, y, {K})"),
}


def neighbours_alone(provider: str, python: str, folder: Path, rounds: int) -> dict:
    """Time and memory of all four values in a process that does nothing else."""
    path = folder / "features.pt"
    if not path.exists():
        torch.save([features(ROWS["full"], seed) for seed in (1, 2)], path)
    start, run = STARTS[provider]
    code = ALONE.format(resident=RESIDENT, start=start, run=run)
    command = [python, "-c", code, str(path), str(torch.get_num_threads()), str(rounds)]
    made = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    found = json.loads(made.stdout.strip().splitlines()[-1])
    wall, own = zip(*found["rounds"], strict=True)
    return {
        "median_s": statistics.median(wall),
        "min_s": min(wall),
        "cpu_s": statistics.median(own),
        "rounds": rounds,
        "bytes_above": found["bytes_above"],
        "value": found["value"],
    }


def peak_of(setting: str, provider: str) -> int:
    """Bytes above the inputs that one provider's first Fréchet distance takes, in a process."""
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        f"{RESIDENT}\n"
        "from benchmarks import distances as d\n"
        f"sides = [d.features({ROWS[setting]}, seed) for seed in (1, 2)]\n"
        "held = resident(reset=True)\n"
        f"d.first({provider!r}, *sides)\n"
        "print(resident() - held)\n"
    )
    command = [sys.executable, "-c", code]
    made = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return int(made.stdout.strip().splitlines()[-1])


def sources() -> list[Path]:
    """What the rows depend on."""
    names = ("frechet", "gaussians", "moments", "prdc", "remembered")
    files = [ROOT / "engine" / "metrics" / f"{name}.py" for name in names]
    files += [ROOT / "kernels" / f"{name}.py" for name in ("knn", "statistics")]
    return files + [ROOT / "csrc" / "cpu" / f"{name}.cpp" for name in ("knn", "statistics")]


def agree(rows: dict[str, dict], tolerance: float) -> None:
    """Nobody is faster at something else."""
    ours = rows["ours"]["value"]
    for name, row in rows.items():
        values = row["value"] if isinstance(row["value"], dict) else {"": row["value"]}
        mine = ours if isinstance(ours, dict) else {"": ours}
        for key, value in values.items():
            if not abs(value - mine[key]) <= tolerance * max(abs(value), 1e-12):
                raise SystemExit(f"{name} gives {value} where ours gives {mine[key]}: no row")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="times that each is measured")
    parser.add_argument("--peers", default=sys.executable, help="a Python that has prdc 0.2")
    parser.add_argument("--only", default="", choices=("", "frechet", "neighbours"))
    parser.add_argument("--folder", default="/tmp", help="where features lie for other processes")
    given = parser.parse_args(arguments)
    if given.rounds < 1:
        parser.error("--rounds must be at least 1")
    warnings.simplefilter("ignore")
    common = results.machine("cpu") | {"device": "cpu", "width": WIDTH}
    common |= {"kernels": kernels.announce("cpu"), "source_hash": hash_of(*sources())}

    def write(op: str, setting: str, variant: str, rows: dict[str, dict]) -> None:
        for name, row in rows.items():
            row["times_ours"] = row["median_s"] / rows["ours"]["median_s"]
            row["cpu_times_ours"] = row["cpu_s"] / rows["ours"]["cpu_s"]
            where = {"op": op, "setting": setting, "rows": ROWS[setting], "variant": variant}
            results.append("distances", [common | where | {"provider": name} | row])
            print(op, setting, variant, name, row, flush=True)

    for setting in ROWS if given.only != "neighbours" else ():
        for variant, cases in frechet_cases(setting).items():
            rows = measure(cases, given.rounds)
            agree(rows, 1e-6 if setting == "full" else 1e-4)
            for name in rows if variant == "first" else ():
                rows[name]["bytes_above"] = peak_of(setting, name)
            write("frechet", setting, variant, rows)
    if given.only != "frechet":
        folder = Path(given.folder)
        rows = {
            name: neighbours_alone(name, sys.executable if name == "ours" else given.peers,
                                   folder, given.rounds)
            for name in STARTS
        }  # fmt: skip
        agree(rows, 2 / ROWS["full"])
        write("prdc", "full", "first", rows)
        further = measure(further_neighbours(), given.rounds)
        write("prdc", "full", "further", further)
    return 0


if __name__ == "__main__":
    sys.exit(main())
