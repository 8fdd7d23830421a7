"""How fast each decoder makes training pictures from JPEG shards: `python benchmarks/dataload.py`.

Writes generated JPEGs (500 x 400, quality 90, about 50 KB) as shards, then measures the whole
loader (order, crop, decode, resize, flip, tensor) for DALI and for torch, alternating, and appends
one row per decoder to benchmarks/results/dataload.jsonl. Images per CPU-second hardly depend on
what else the machine does; images per second do.
"""

import argparse
import io
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from etude.data import decode_dali
from etude.data.augment import AugmentConfig
from etude.data.loader import DataConfig, Loader
from etude.data.shards import write_shards

RESULTS = Path(__file__).parent / "results" / "dataload.jsonl"


def write_jpegs(folder: Path, count: int) -> int:
    """Shards of pictures with detail at all sizes; returns their mean size in bytes."""
    total = 0

    def samples():
        nonlocal total
        for number in range(count):
            rng = np.random.default_rng(number)
            picture = np.zeros((400, 500, 3))
            for cells in (4, 16, 64, 200):
                noise = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
                large = Image.fromarray(noise).resize((500, 400), Image.Resampling.BICUBIC)
                picture += np.asarray(large) / 4
            buffer = io.BytesIO()
            Image.fromarray(picture.astype(np.uint8)).save(buffer, "JPEG", quality=90)
            total += buffer.tell()
            yield {"key": f"{number:06d}", "image": buffer.getvalue(), "extension": "jpg"}

    write_shards(folder, samples())
    return total // count


def measure(folder: Path, decoder: str, workers: int, images: int, batch: int) -> dict[str, float]:
    """Images per second and per CPU-second of one run, after one batch of warming up."""
    augment = AugmentConfig(image_size=224, crop="random", flip=True)
    config = DataConfig(shards=str(folder), augment=augment, decoder=decoder, workers=workers)
    loader = Loader(config.open(), config, seed=0)
    loader.fetch(np.arange(batch))
    wall, cpu = time.perf_counter(), time.process_time()
    for start in range(0, images, batch):
        loader.fetch(np.arange(start, start + batch))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    loader.close()
    done = -(-images // batch) * batch
    return {"images_per_second": done / wall, "images_per_cpu_second": done / cpu}


def append_row(row: dict[str, Any], path: Path = RESULTS) -> None:
    """Adds one line to a results file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps(row, sort_keys=True) + "\n")


def main() -> None:
    """Measures, prints and records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=640, help="pictures per run")
    parser.add_argument("--rounds", type=int, default=3, help="runs per decoder")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="decoding threads")
    parser.add_argument("--batch", type=int, default=32, help="pictures per batch")
    options = parser.parse_args()
    decoders = ["torch"] if decode_dali.why_missing() else ["dali", "torch"]
    with tempfile.TemporaryDirectory() as folder:
        size = write_jpegs(Path(folder) / "shards", min(options.images, 400))
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in decoders}
        for _ in range(options.rounds):
            for name in decoders:
                run = measure(
                    Path(folder) / "shards", name, options.workers, options.images, options.batch
                )
                runs[name].append(run)
    for name, found in runs.items():
        row: dict[str, Any] = {
            "case": "dataload",
            "decoder": name,
            "bytes_per_picture": size,
            "date": time.strftime("%Y-%m-%d"),
            "machine": platform.processor() or platform.machine(),
            "load": os.getloadavg()[0],
            "cores": os.cpu_count(),
        } | vars(options)
        for unit in found[0]:
            row[unit] = round(statistics.median(run[unit] for run in found), 1)
        append_row(row)
        print(
            f"{name}: {row['images_per_second']} images/s,"
            f" {row['images_per_cpu_second']} images per CPU-second"
        )


if __name__ == "__main__":
    main()
