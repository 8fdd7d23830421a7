"""FID and neighbours of several checkpoints against one real set, beside torch-fidelity.

By hand: `python -m benchmarks.checkpoints --weights data/inception --peers OTHER/bin/python`, with
the peers' environment of extraction.py. Each checkpoint is a folder of JPEGs; the network, its
weights and the pictures are equal for all. A provider's time is from the folders to the figures of
all checkpoints:

    etude                   a plan (`etude evaluate`), from an empty store
    etude, real known       the same where the store has the real features
    torch-fidelity, cached  one call of `calculate_metrics` a checkpoint with fid and prc, the real
                            features and statistics in its cache
    a network a metric      as evaluation libraries without a store work: per checkpoint and per
                            metric, real and generated pictures through torch-fidelity's network

Providers take turns in every round, the last one in the first round alone; a row is the one of the
median seconds. Etude gives density and coverage too; its rows come with intervals of all figures,
and with none (`without intervals`), which is what the others do. The predictions: of
torch-fidelity's time for a checkpoint a forward of its pictures is most, and that is 1.8 times as
fast here; the distance takes a fifth of its time; so 2.5 times in all. A network a metric reads 16
sets where a store reads 5: 5 times.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.case import ROOT, hash_of
from benchmarks.extraction import PRELUDE, sources, used, write_for_peers, write_jpegs
from etude.core.log import Log
from etude.core.run import Run
from etude.evaluation.planned.recipe import PlanRecipe
from etude.evaluation.planned.running import Plan

WARM = "warm"  # drawn like the others; its evaluation makes the real side known
WALL = "wall_s"
PEERS = ("torch-fidelity, cached", "a network a metric")

# Run by the peers' Python: provider, root of the folders, checkpoints, weights, batch.
PEER = (
    PRELUDE
    + """
from torch_fidelity import calculate_metrics
provider, root, checkpoints, weights, batch = sys.argv[1:]
cached = provider == "torch-fidelity, cached"

def measure(folder, **metrics):
    return calculate_metrics(
        input1=f"{root}/{folder}", input2=f"{root}/real", cuda=False, verbose=False,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=weights,
        feature_layer_fid="2048", feature_layer_prc="2048", batch_size=int(batch),
        cache=cached, cache_root=f"{root}/cache",
        **({"input2_cache_name": "real"} if cached else {}), **metrics,
    )

def both(folder):
    if cached:
        return measure(folder, fid=True, prc=True)
    return measure(folder, fid=True) | measure(folder, prc=True)

if cached:
    both("warm")
begun, before = time.perf_counter(), used()
found = {name: both(name) for name in checkpoints.split(",")}
wall, cpu = time.perf_counter() - begun, used() - before
print(json.dumps({"wall_s": wall, "cpu_s": cpu, "threads": torch.get_num_threads(),
                  "batch": int(batch), "version": version("torch-fidelity"),
                  "fid": {n: f["frechet_inception_distance"] for n, f in found.items()},
                  "precision": {n: f["precision"] for n, f in found.items()},
                  "recall": {n: f["recall"] for n, f in found.items()}}))
"""
)


def recipe(root: Path, store: Path, names: list[str], given: argparse.Namespace, **changes):
    """The plan of these checkpoints; neighbours as torch-fidelity counts them."""
    options = {"k": 3, "convention": "torch-fidelity"}
    fields: dict[str, Any] = {
        "name": "evaluate/checkpoints",
        "models": {name: {"kind": "pictures", "source": str(root / name)} for name in names},
        "data_sets": {"real": {"kind": "folder", "folder": str(root / "real")}},
        "metrics": ["frechet@inception", {"metric": "prdc@inception", "options": options}],
        "extractors": {"inception": {"weights": str(given.weights)} | changes},
        "samples": given.pictures,
        "by_group": False,
        "shown": 0,
        "interval": {"replicates": given.halvings},
        "store": str(store),
        "batch_size": given.batch,
    }
    return PlanRecipe(**fields)


def run_ours(
    root: Path, names: list[str], given: argparse.Namespace, known: bool, **changes
) -> dict[str, Any]:
    """Seconds and figures of one plan, in an empty store but for what is `known`."""
    with tempfile.TemporaryDirectory() as place:
        store = Path(place) / "store"
        if known:
            _carry_out(recipe(root, store, [WARM], given, **changes), Path(place) / "warm")
        begun, before = time.perf_counter(), used()
        rows = _carry_out(recipe(root, store, names, given, **changes), Path(place) / "runs")
        wall, cpu = time.perf_counter() - begun, used() - before
    figures = {
        word: {row.model: row.value for row in rows if row.metric == name}
        for word, name in (("fid", "FID"), ("precision", "precision"), ("recall", "recall"))
    }
    threads = torch.get_num_threads()
    return {"wall_s": wall, "cpu_s": cpu, "threads": threads, "batch": given.batch} | figures


def _carry_out(made: PlanRecipe, root: Path) -> list:
    with Run.open(made, root=root) as run:
        plan = Plan(made, run, Log(run.folder, quiet=True))
        plan.run()
        return plan.table.read().rows


def run_peer(provider: str, root: Path, names: list[str], weights: Path, given) -> dict[str, Any]:
    words = [provider, str(root), ",".join(names), str(weights), str(given.batch)]
    made = subprocess.run([given.peers, "-c", PEER, *words], capture_output=True, text=True)
    if made.returncode:
        raise SystemExit(f"{provider} did not run: {made.stderr.strip().splitlines()[-1]}")
    return json.loads(made.stdout.splitlines()[-1])


def agree(rows: dict[str, dict[str, Any]], pictures: int) -> None:
    """Float32 figures are the same: distances within 1e-3, shares within two pictures."""
    exact = {name: row for name, row in rows.items() if "bfloat16" not in name}
    for (one, a), (other, b) in itertools.combinations(exact.items(), 2):
        for name, value in a["fid"].items():
            if abs(value - b["fid"][name]) > 1e-3 * value:
                raise SystemExit(f"{name}: {one} has FID {value}, {other} {b['fid'][name]}: no row")
            for share in ("precision", "recall"):
                if abs(a[share][name] - b[share][name]) > 2.5 / pictures:
                    raise SystemExit(f"{name}: {one} and {other} differ in {share}: no row")


def median(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of the median seconds, with the smallest and the largest."""
    ordered = sorted(found, key=lambda row: row[WALL])
    ends = {"min_s": ordered[0][WALL], "max_s": ordered[-1][WALL], "rounds": len(found)}
    return ordered[len(ordered) // 2] | ends


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="data/inception", help="folder that was fetched")
    parser.add_argument("--peers", required=True, help="Python of the peers' environment")
    parser.add_argument("--checkpoints", type=int, default=4)
    parser.add_argument("--pictures", type=int, default=256, help="JPEGs of each set")
    parser.add_argument("--batch", type=int, default=16, help="pictures per forward")
    parser.add_argument("--rounds", type=int, default=3, help="times that each is measured")
    given = parser.parse_args(arguments)
    if min(given.checkpoints, given.batch, given.rounds) < 1 or given.pictures < 10:
        parser.error("--checkpoints, --batch, --rounds: at least 1; --pictures: at least 10")
    names = [f"checkpoint-{number}" for number in range(given.checkpoints)]
    files = [*sources(), *(ROOT / "engine" / "evaluation" / "planned").glob("*.py")]
    metrics = ("frechet", "gaussians", "influences", "intervals", "figures", "prdc")
    files += [ROOT / "engine" / "metrics" / f"{name}.py" for name in metrics]
    common = results.machine("cpu") | {
        "op": "checkpoints",
        "source_hash": hash_of(*sorted(files)),
        "checkpoints": given.checkpoints,
        "pictures": given.pictures,
    }
    ours = {
        "etude, real known, without intervals": (0, True, {}),
        "etude, real known": (200, True, {}),
        "etude": (200, False, {}),
        "etude bfloat16": (200, False, {"dtype": "bfloat16"}),
    }
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as place:
        root, theirs = Path(place), Path(place) / "weights.pth"
        for number, name in enumerate(["real", WARM, *names]):
            # Each further from the real set than the one before.
            write_jpegs(root / name, given.pictures, first=number * given.pictures, tint=number)
        write_for_peers(Path(given.weights), theirs)
        for number in range(given.rounds):
            for name, (halvings, known, changes) in ours.items():
                given.halvings = halvings
                found.setdefault(name, []).append(run_ours(root, names, given, known, **changes))
            for name in PEERS if number == 0 else PEERS[:1]:
                found.setdefault(name, []).append(run_peer(name, root, names, theirs, given))
            for name, of in found.items():
                print(f"{name}: {', '.join(f'{one[WALL]:.1f}' for one in of)} s", flush=True)
    rows = {name: median(of) for name, of in found.items()}
    agree(rows, given.pictures)
    for name, row in rows.items():
        row["provider"] = name
        for peer in PEERS:
            row[f"times_faster_than_{peer}"] = rows[peer]["wall_s"] / row["wall_s"]
        results.append("checkpoints", [common | row])
        print(name, row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
