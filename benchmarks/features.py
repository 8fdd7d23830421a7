"""The metric networks and figures on a device: pictures per second, and seconds for 50,000 rows.

Run by `make gpu`; by hand: `python -m benchmarks.features --device cpu --tiny`.

A network takes uint8 pictures of 256 pixels in pinned memory, moves them, brings them to its size
and gives features; its weights are random, so nothing is compared but time, and each precision's
distance from its own float32. Providers of one network take turns in every round:

    inception   the FID network in float32, tf32, bfloat16 and float16, the last two also compiled;
                rival: timm's inception_v3, compiled, bfloat16, channels-last, with torch's
                antialiased resizing before it, where timm is installed
    vit-l/14    CLIP's picture tower in bfloat16, compiled too

Figures: the Fréchet distance and precision, recall, density and coverage of 50,000 against 50,000
rows of 2048 features that lie on the device, from features, once each; the first call of a process
compiles kernels and is not counted. One row a provider.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from benchmarks import results
from benchmarks.case import ROOT, hash_of
from benchmarks.distances import features
from etude import kernels
from etude.metrics.extractors import Extractor
from etude.metrics.extractors.inception_network import Inception
from etude.metrics.extractors.vision_transformer import VisionTransformer
from etude.metrics.frechet import FrechetReference
from etude.metrics.prdc import prdc

SIDE = 256
# Width, depth, heads, inner width, patch, places of ViT-L/14 at 224 pixels; of the rehearsal.
VIT, TINY_VIT = (1024, 24, 16, 4096, 14, 257), (64, 2, 1, 128, 14, 257)
SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {},
    "tf32": {"dtype": "tf32"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "bfloat16, compiled": {"dtype": "bfloat16", "compile": True},
    "float16, compiled": {"dtype": "float16", "compile": True},
}


def write_inception(path: Path) -> None:
    """Random weights under the graph's names, scaled so that activations stay."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, old in Inception(classes=1008).state_dict().items():
        value = torch.randn(old.shape, generator=generator)
        if old.dim() > 1:
            value *= (2.0 / old[0].numel()) ** 0.5
        made[name] = 1.0 + 0.1 * value.abs() if name.endswith("var") else value
        if name.endswith(("beta", "mean")):
            made[name] *= 0.1
    save_file(made, path)


def write_clip(path: Path, size: tuple[int, ...]) -> None:
    """A random picture tower in OpenAI's layout."""
    names = (
        ("blocks.", "transformer.resblocks."), ("cls_token", "class_embedding"),
        ("pos_embed", "positional_embedding"), ("patch_embed.proj.", "conv1."),
        ("norm_before.", "ln_pre."), (".norm1.", ".ln_1."), (".norm2.", ".ln_2."),
        (".attn.qkv.", ".attn.in_proj_"), (".attn.proj.", ".attn.out_proj."),
        (".mlp.fc1.", ".mlp.c_fc."), (".mlp.fc2.", ".mlp.c_proj."),
    )  # fmt: skip
    generator, made = torch.Generator().manual_seed(1), {}
    with torch.device("meta"):
        tower = VisionTransformer(*size, activation="quick_gelu", eps=1e-5, normed_before=True)
    for name, old in tower.state_dict().items():
        value = torch.randn(old.shape, generator=generator)
        value *= (1.0 / old[0].numel()) ** 0.5 if old.dim() > 1 else 0.1
        if name == "patch_embed.proj.bias":
            continue  # the published network has none
        for ours, theirs in names:
            name = name.replace(ours, theirs)
        name = f"ln_post.{name[5:]}" if name.startswith("norm.") else name
        made[f"visual.{name}"] = value.squeeze() if name.endswith("embedding") else value
    made["visual.proj"] = torch.randn(size[0], 768, generator=generator) * size[0] ** -0.5
    save_file({n: v.contiguous() for n, v in made.items()}, path)


def timm_inception(device: torch.device) -> Callable[[Tensor], Tensor] | None:
    """timm's network as a careful user runs it; None where timm is not installed."""
    try:
        import timm
    except ImportError:
        return None
    network = timm.create_model("inception_v3", pretrained=False, num_classes=0)
    network = network.eval().to(device, torch.bfloat16, memory_format=torch.channels_last)
    network = torch.compile(network, mode="reduce-overhead" if device.type == "cuda" else None)

    def run(images: Tensor) -> Tensor:
        x = images.to(device, non_blocking=True).permute(0, 3, 1, 2).to(torch.bfloat16)
        x = F.interpolate(x, (299, 299), mode="bilinear", antialias=True) / 127.5 - 1.0
        with torch.no_grad():
            return network(x.contiguous(memory_format=torch.channels_last)).float()

    return run


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_networks(
    runs: dict[str, Callable[[Tensor], Tensor]], images: Tensor, given: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Each provider's row: the median of rounds of several batches, in turns."""
    device = torch.device(given.device)
    rows: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        begun = time.perf_counter()
        found = [run(images) for _ in range(3)][-1].cpu()
        wait(device)
        rows[name] = {"first_batches_s": time.perf_counter() - begun, "seconds": []}
        exact = rows[next(iter(rows))].setdefault("found", found)
        if found.shape == exact.shape and not name.startswith("timm"):
            error = (found - exact).abs().max() / exact.abs().max()
            rows[name]["relative_error_to_first"] = float(error)
    for _ in range(given.rounds):
        for name, run in runs.items():
            begun = time.perf_counter()
            for _ in range(given.batches):
                run(images)
            wait(device)
            rows[name]["seconds"].append(time.perf_counter() - begun)
    for row in rows.values():
        row.pop("found", None)
        seconds, count = row.pop("seconds"), given.batches * len(images)
        row |= {"images_per_second": count / statistics.median(seconds), "min_s": min(seconds)}
        row |= {"max_s": max(seconds), "rounds": given.rounds, "batch": len(images)}
    return rows


def compare_networks(given: argparse.Namespace, common: dict[str, Any], folder: Path) -> None:
    device, small = torch.device(given.device), given.tiny
    rng = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (given.batch, SIDE, SIDE, 3), dtype=torch.uint8, generator=rng)
    images = images.pin_memory() if device.type == "cuda" else images
    write_inception(folder / "inception.safetensors")
    write_clip(folder / "clip.safetensors", TINY_VIT if small else VIT)
    chosen = {
        name: options
        for name, options in SETTINGS.items()
        if device.type == "cuda" or not ({"compile"} & options.keys() or name == "tf32")
    }
    for network, kind, options in (
        ("inception", "inception", {"check": False}),
        ("vit-l/14", "clip", {}),
    ):
        weights = folder / f"{kind}.safetensors"
        runs: dict[str, Callable[[Tensor], Tensor]] = {
            name: Extractor(kind, weights, device=device, **(options | setting))
            for name, setting in chosen.items()
            if kind == "inception" or name.startswith(("float32", "bfloat16"))
        }
        rival = timm_inception(device) if kind == "inception" and device.type == "cuda" else None
        if rival is not None:
            runs["timm, bfloat16, compiled"] = rival
        for name, row in time_networks(runs, images, given).items():
            written = common | {"op": network, "provider": name} | row
            results.append("features", [written])
            print(network, name, row, flush=True)


def time_figures(given: argparse.Namespace, common: dict[str, Any]) -> None:
    """Seconds of both figures together and apart, all from features."""
    device, rows = torch.device(given.device), 500 if given.tiny else 50_000
    warm = [features(2 * 1024, seed).to(device) for seed in (3, 4)]
    FrechetReference(warm[0]).distance(warm[1], warn=False)
    prdc(*warm)
    real, generated = (features(rows, seed).to(device) for seed in (1, 2))
    wait(device)
    begun = time.perf_counter()
    distance = FrechetReference(real).distance(generated, warn=False)
    wait(device)
    middle = time.perf_counter()
    shares = prdc(real, generated)
    wait(device)
    row = {
        "frechet_s": middle - begun,
        "prdc_s": time.perf_counter() - middle,
        "median_s": time.perf_counter() - begun,
        "value": {"frechet": distance} | shares,
    }
    about = {"op": "frechet and prdc", "provider": "ours", "rows": rows, "width": 2048}
    results.append("features", [common | about | row])
    print("frechet and prdc", rows, row, flush=True)


def sources() -> list[Path]:
    """What the rows depend on."""
    metrics = ROOT / "engine" / "metrics"
    files = [*(metrics / "extractors").glob("*.py")]
    files += [metrics / f"{name}.py" for name in ("frechet", "gaussians", "moments", "prdc")]
    files += [ROOT / "kernels" / f"{name}.py" for name in ("knn", "statistics", "resizing")]
    return sorted(files)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=int, default=256, help="pictures per forward")
    parser.add_argument("--batches", type=int, default=20, help="forwards in a round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of every provider")
    parser.add_argument("--tiny", action="store_true", help="small networks and sets: a rehearsal")
    given = parser.parse_args(arguments)
    if min(given.batch, given.batches, given.rounds) < 1:
        parser.error("--batch, --batches and --rounds must be at least 1")
    common = results.machine(given.device) | {"device": given.device}
    common |= {"kernels": kernels.announce(given.device), "source_hash": hash_of(*sources())}
    time_figures(given, common)
    with tempfile.TemporaryDirectory() as place:
        compare_networks(given, common, Path(place))
    return 0


if __name__ == "__main__":
    sys.exit(main())
