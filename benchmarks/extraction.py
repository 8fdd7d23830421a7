"""Inception features of a folder of JPEGs beside torch-fidelity and clean-fid, in one run.

By hand: `python -m benchmarks.extraction --weights data/inception --peers OTHER/bin/python`, where
OTHER is an environment with torch-fidelity 0.4.0 and clean-fid 0.1.35, each --no-deps, beside
torch, torchvision --no-deps, numpy, scipy, pillow, requests and tqdm; without --peers only Etude is
measured. The peers run in that Python with equal weights: torch-fidelity's own network, filled;
clean-fid with the TorchScript archive, as it runs NVIDIA's. Everybody's time is from the folder to
the features of all pictures, after one batch of warming up, with the network in memory; Etude's
includes hashing the files and writing its store. Workers, threads and batches are each one's own
defaults, but for torch-fidelity's batch. Providers take turns in every round; a row has the medians
over the rounds. Images per CPU-second hardly depend on what else the machine does.

The prediction, for two cores: of torch-fidelity's time 92% is its forward in channels-first memory
and 8% its resizing. Channels-last memory makes the forward 1.4 times as fast, folding with the ReLU
inside 1.1 times more, and packed weights 1.1 times more; the resizing falls to 1%; decoding is 1%.
So 1.8 times in float32. bfloat16 halves what a convolution reads and, where the processor has
matrix units, multiplies several times as fast: 3.5 times or more.

`--fid SHARDS` adds what each precision and the folding do to a Fréchet distance: between the first
and the second half of the pictures of a folder of shards, against the plain network in float32 and
channels-first memory. On a CPU float16 and tf32 are emulated: a product of two numbers of 11 bits
is exact in float32, where matrix units add too, so rounding what they are given is all that
differs. bfloat16 is measured and emulated, which shows how near an emulation comes.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import results
from benchmarks.case import ROOT, hash_of
from etude.evaluation.extract import extract_set
from etude.evaluation.sets import FolderPictures, ShardPictures, Stages
from etude.metrics.extractors import DTYPES, Extractor
from etude.metrics.extractors.inception_weights import load_inception, torchvision_names
from etude.metrics.frechet import frechet_distance
from etude.metrics.store import FeatureStore

OURS: dict[str, dict[str, Any]] = {
    "etude float32": {},
    "etude bfloat16": {"dtype": "bfloat16"},
    "etude float32, clean": {"resize": "clean"},
}
ON_CUDA: dict[str, dict[str, Any]] = OURS | {
    "etude tf32": {"dtype": "tf32"},
    "etude float16": {"dtype": "float16"},
    "etude bfloat16, compiled": {"dtype": "bfloat16", "compile": True},
}
PEERS = ("torch-fidelity", "clean-fid")
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32, plain": {"fold": False},
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
}
PRECISIONS_ON_CUDA = PRECISIONS | {"float16": {"dtype": "float16"}, "tf32": {"dtype": "tf32"}}
EMULATED = ("bfloat16", "float16", "tf32")

# How a script for the peers' Python begins: torchvision without its operators, CPU-seconds.
PRELUDE = """
import json, resource, sys, time, warnings
from importlib.metadata import version
import torch
warnings.simplefilter("ignore")
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

def used():
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in both)
"""
# Name, folder, weights, TorchScript archive, batch. One line of JSON.
PEER = (
    PRELUDE
    + """
name, folder, weights, archive, batch = sys.argv[1:]
if name == "torch-fidelity":
    from torch_fidelity import utils
    network = utils.create_feature_extractor(
        "inception-v3-compat", ["2048"], cuda=False, verbose=False,
        feature_extractor_weights_path=weights,
    )
    def warm():
        network(torch.zeros(int(batch), 3, 256, 256, dtype=torch.uint8))
    def run():
        found = utils.extract_featuresdict_from_input_id(
            1, network, input1=folder, cuda=False, batch_size=int(batch), verbose=False
        )
        return found["2048"]
else:
    from cleanfid import fid
    network = torch.jit.load(archive).eval()
    def model(x):
        return network((x - 128) / 128)
    def warm():
        model(torch.zeros(32, 3, 299, 299))
    def run():
        return torch.from_numpy(fid.get_folder_features(
            folder, model=model, device=torch.device("cpu"), verbose=False
        ))
with torch.no_grad():
    warm()
    begun, before = time.perf_counter(), used()
    found = run()
    wall, cpu = time.perf_counter() - begun, used() - before
# The files' orders differ: sums are compared.
print(json.dumps({"count": len(found), "wall_s": wall, "cpu_s": cpu, "batch": int(batch),
                  "threads": torch.get_num_threads(), "version": version(name),
                  "mean": found.double().mean(0)[:64].tolist()}))
"""
)


def write_jpegs(
    folder: Path, count: int, side: int = 256, *, first: int = 0, tint: float = 0.0
) -> int:
    """JPEGs of quality 90 with detail at all sizes; returns their mean size in bytes.

    Args:
        first: names the pictures: other ones from another number.
        tint: grey levels times 4 that the green channel is darker.
    """
    folder.mkdir()
    for number in range(first, first + count):
        rng = np.random.default_rng(number)
        picture = np.zeros((side, side, 3))
        for cells in (4, 16, 64, 128):
            noise = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
            large = Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)
            picture += np.asarray(large) / 4
        picture[..., 1] = np.maximum(picture[..., 1] - 4 * tint, 0)
        made = Image.fromarray(picture.astype(np.uint8))
        made.save(folder / f"{number:06d}.jpg", quality=90)
    return sum(file.stat().st_size for file in folder.iterdir()) // count


def write_for_peers(weights: Path, path: Path) -> None:
    """Our weights as torch-fidelity's file; a classifier that the weights lack is of zeros."""
    state = load_inception(weights)[0].state_dict()
    made = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    for theirs, ours in torchvision_names().items():
        made[f"{theirs}.conv.weight"] = state[f"{ours}.weight"]
        made[f"{theirs}.bn.weight"] = torch.ones_like(state[f"{ours}.beta"])
        made[f"{theirs}.bn.bias"] = state[f"{ours}.beta"]
        made[f"{theirs}.bn.running_mean"] = state[f"{ours}.mean"]
        made[f"{theirs}.bn.running_var"] = state[f"{ours}.var"]
        made[f"{theirs}.bn.num_batches_tracked"] = torch.tensor(0)
    torch.save(made, path)


def run_ours(extractor: Extractor, folder: Path, batch: int) -> dict[str, Any]:
    """Seconds from the folder to a complete entry of a new store."""
    extractor(torch.zeros(batch, 256, 256, 3, dtype=torch.uint8))
    with tempfile.TemporaryDirectory() as place:
        begun, before = time.perf_counter(), used()
        pictures, store = FolderPictures(folder), FeatureStore(place)
        rates = extract_set(pictures, [extractor], store, batch_size=batch)
        wall, cpu = time.perf_counter() - begun, used() - before
        entry = next(Path(place).rglob("manifest.json")).parent
        found = store.load(entry.name).features
    return {
        "count": len(found),
        "wall_s": wall,
        "cpu_s": cpu,
        "batch": batch,
        "threads": torch.get_num_threads(),
        "stages": rates,
        "mean": found.double().mean(0)[:64].tolist(),
    }


def run_peer(name: str, python: str, folder: Path, weights: Path, archive: Path, batch: int):
    """The same of a peer, in a process of its own; None where it cannot run."""
    words = [python, "-c", PEER, name, str(folder), str(weights), str(archive), str(batch)]
    made = subprocess.run(words, capture_output=True, text=True)
    if made.returncode:
        print(f"{name} did not run: {made.stderr.strip().splitlines()[-1]}")
        return None
    return json.loads(made.stdout.splitlines()[-1])


def used() -> float:
    found = resource.getrusage(resource.RUSAGE_SELF)
    return found.ru_utime + found.ru_stime


def measure(
    runs: dict[str, Callable[[], dict[str, Any] | None]], rounds: int
) -> dict[str, dict[str, Any]]:
    """Each provider's row: medians over the rounds, in turns."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name, run in runs.items():
            row = run()
            if row is None:
                continue
            found[name].append(row)
            print(f"round {turn}: {name} {row['count'] / row['wall_s']:.2f} images/s", flush=True)
    made = {}
    for name, rows in found.items():
        if not rows:
            continue
        walls, cpus = ([row[unit] for row in rows] for unit in ("wall_s", "cpu_s"))
        made[name] = {k: v for k, v in rows[-1].items() if k not in ("wall_s", "cpu_s")} | {
            "images_per_second": rows[0]["count"] / statistics.median(walls),
            "images_per_cpu_second": rows[0]["count"] / statistics.median(cpus),
            "min_s": min(walls),
            "max_s": max(walls),
            "rounds": len(rows),
        }
    return made


def compare_speed(given: argparse.Namespace, common: dict[str, Any]) -> int:
    """Rows of speed; 1 where the features of two providers of one convention differ."""
    settings = ON_CUDA if given.device == "cuda" else OURS
    with tempfile.TemporaryDirectory() as place:
        folder, theirs = Path(place) / "jpeg", Path(place) / "weights.pth"
        bytes_each = write_jpegs(folder, given.pictures)
        runs: dict[str, Callable] = {}
        for name, options in settings.items():
            made = Extractor("inception", given.weights, device=given.device, **options)
            runs[name] = lambda made=made: run_ours(made, folder, given.batch)
        if given.peers and given.device == "cpu":
            write_for_peers(Path(given.weights), theirs)
            archive = Path(given.weights) / "default_1.pt"
            for name in PEERS:
                runs[name] = lambda name=name: run_peer(
                    name, given.peers, folder, theirs, archive, given.batch
                )
        rows = measure(runs, given.rounds)
    for one, other in (("etude float32", PEERS[0]), ("etude float32, clean", PEERS[1])):
        if other in rows and not _close(rows[one]["mean"], rows[other]["mean"]):
            print(f"the features of {one} and {other} differ: no row is written")
            return 1
    for name, row in rows.items():
        del row["mean"]
        for peer in PEERS:
            for unit in ("images_per_second", "images_per_cpu_second"):
                if peer in rows:
                    row[f"times_{peer}_{unit}"] = row[unit] / rows[peer][unit]
        row |= {"op": "extraction", "provider": name, "bytes_per_picture": bytes_each}
        results.append("extraction", [common | row])
        print(name, row, flush=True)
    return 0


def _close(one: list[float], other: list[float]) -> bool:
    first, second = np.array(one), np.array(other)
    return bool(np.abs(first - second).max() < 1e-4 * np.abs(first).max())


def emulated(weights: str, dtype: str) -> Extractor:
    """Inception in float32 whose convolutions are given numbers of `dtype`; one of 16 bits is also
    what they give.
    """
    extractor = Extractor("inception", weights)

    def to_dtype(x: torch.Tensor) -> torch.Tensor:
        if dtype != "tf32":
            return x.to(DTYPES[dtype]).to(torch.float32)
        bits = x.view(torch.int32)  # to ten bits of fraction, halves to even
        return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)

    def rounding(run: Callable) -> Callable:
        def rounded(x: torch.Tensor, activation: str) -> torch.Tensor:
            made = run(to_dtype(x), activation)
            return made if dtype == "tf32" else to_dtype(made)

        return rounded

    for convolution in extractor.backbone.network.convolutions():
        convolution.weight.data = to_dtype(convolution.weight.data)
        convolution._folded = rounding(convolution._folded)
    return extractor


def compare_distances(given: argparse.Namespace, common: dict[str, Any]) -> None:
    """Rows of the Fréchet distance by precision, and how far each is from the plain network's."""
    pictures = ShardPictures(given.fid, size=given.fid_size, limit=2 * given.fid_pictures)
    half, plain = len(pictures) // 2, 0.0
    settings = PRECISIONS_ON_CUDA if given.device == "cuda" else PRECISIONS
    made = {
        name: partial(Extractor, "inception", given.weights, device=given.device, **options)
        for name, options in settings.items()
    }
    if given.device == "cpu":
        made |= {f"{name}, emulated": partial(emulated, given.weights, name) for name in EMULATED}
    for name, make in made.items():
        extractor = make()
        found, stages = [], Stages()
        for start in range(0, 2 * half, given.batch):
            block = pictures.read(start, min(start + given.batch, 2 * half), stages)
            found.append(extractor(block.images).cpu())
        features = torch.cat(found)
        distance = frechet_distance(features[:half], features[half:], warn=False)
        plain = distance if name == "float32, plain" else plain
        row = {
            "op": "fid_of_precision",
            "provider": name,
            "pictures": Path(given.fid).resolve().parent.name,
            "count": half,
            "fid": distance,
            "difference": abs(distance - plain),
        }
        results.append("extraction", [common | row])
        print(f"{name}: FID {distance:.5f}, {row['difference']:.5f} from plain", flush=True)


def sources() -> list[Path]:
    """What the rows depend on."""
    engine = ROOT / "engine"
    extractors = [*(engine / "metrics" / "extractors").glob("inception*.py")]
    extractors.append(engine / "metrics" / "extractors" / "base.py")
    sets = [engine / "evaluation" / f"{name}.py" for name in ("extract", "sets")]
    return sorted([*extractors, *sets, ROOT / "kernels" / "resizing.py"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="data/inception", help="folder that was fetched")
    parser.add_argument("--peers", default="", help="Python of an environment with the peers")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--pictures", type=int, default=128, help="JPEGs; 0 leaves speed out")
    parser.add_argument("--batch", type=int, default=16, help="pictures per forward")
    parser.add_argument("--rounds", type=int, default=3, help="times that each is measured")
    parser.add_argument("--fid", default="", help="folder of shards for distances by precision")
    parser.add_argument("--fid-pictures", type=int, default=1024, help="on each side")
    parser.add_argument("--fid-size", type=int, default=0, help="side they are brought to")
    given = parser.parse_args(arguments)
    if given.pictures < 0 or min(given.batch, given.rounds) < 1 or given.fid_pictures < 2:
        parser.error("--batch and --rounds must be at least 1, --fid-pictures at least 2")
    common = results.machine(given.device) | {"device": given.device}
    common["source_hash"] = hash_of(*sources())
    code = 0
    if given.pictures:
        code = compare_speed(given, common)
    if given.fid:
        compare_distances(given, common)
    return code


if __name__ == "__main__":
    sys.exit(main())
