"""Sampling a DiT: steps as CUDA graphs beside the same steps launched kernel by kernel.

Run by `make gpu`; by hand: `python -m benchmarks.sampling --device cpu --model tiny --steps 3`.

Both providers draw the same batch, DDIM with classifier-free guidance in bfloat16, and must give
the same bytes before a time counts. One row a provider: pictures per second over whole batches that
each end in a synchronisation, without the autoencoder; the first batches, which capture, apart.
"""

import argparse
import statistics
import sys
import time

import torch
from torch import Tensor

from benchmarks import results
from benchmarks.case import ROOT, hash_of
from benchmarks.end_to_end import MODELS, Job, synchronise
from etude import kernels
from etude.diffusion.captured import CapturedSteps
from etude.diffusion.objectives import Objective, ObjectiveConfig
from etude.diffusion.samplers import SamplerConfig, sample

PROVIDERS = ("captured", "eager")
WARM_UP, ROUNDS = 2, 3


def measure(job: Job, provider: str) -> tuple[Tensor, dict]:
    """The last batch (B, C, H, W), and the row's own fields."""
    model = job.model().to(torch.bfloat16).eval().requires_grad_(False)
    config = SamplerConfig(
        steps=job.steps, guidance_scale=4.0, guidance_convention="one_plus_lambda"
    )
    objective, captured = Objective(ObjectiveConfig()), CapturedSteps(model)
    noise, _, _, labels = next(job.data())
    condition, null = {"labels": labels}, {"labels": torch.full_like(labels, 1000)}

    def batch() -> tuple[Tensor, float]:
        begun = time.perf_counter()
        drawn = sample(
            lambda x, t, c: model(x, t * 1000.0, c),
            objective, config, noise, condition, nulls=[null],
            captured=captured if provider == "captured" else None,
        )  # fmt: skip
        synchronise(job.device)
        return drawn, time.perf_counter() - begun

    first = sum(batch()[1] for _ in range(WARM_UP))
    drawn, seconds = batch()
    seconds = [seconds, *(batch()[1] for _ in range(ROUNDS - 1))]
    row = {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}
    row |= {"images_s": job.batch / row["median_s"], "first_batches_s": first}
    row |= {"kernels": kernels.announce(job.device.type), "replayed": captured.replayed}
    return drawn, row


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--model", default="DiT-B/2", choices=sorted(MODELS))
    parser.add_argument("--steps", type=int, default=50, help="sampler steps")
    parser.add_argument("--batch", type=int, default=64, help="pictures drawn together")
    given = parser.parse_args(arguments)
    if given.steps < 1 or given.batch < 1:
        parser.error("--steps and --batch must be at least 1")
    job = Job(given.model, torch.device(given.device), given.steps, given.batch)
    common = results.machine() | {"op": "sample", "model": job.name, "batch": job.batch}
    common |= {"dtype": "bfloat16", "device": given.device, "steps": job.steps}
    rooms = ("kernels", "engine/models", "engine/diffusion")
    common["source_hash"] = hash_of(*(p for f in rooms for p in sorted((ROOT / f).rglob("*.py"))))
    found = {provider: measure(job, provider) for provider in PROVIDERS}
    if not torch.equal(found["captured"][0], found["eager"][0]):
        print("captured steps drew other samples than eager ones: no row is written")
        return 1
    if given.device == "cuda" and not found["captured"][1]["replayed"]:
        print("no step was replayed as a CUDA graph: no row is written")
        return 1
    for provider, (_, row) in found.items():
        results.append(f"sampling_{given.device}", [common | {"provider": provider} | row])
        print(provider, row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
