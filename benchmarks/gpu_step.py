"""A DiT's training step on a GPU with reference and Triton operators, end to end (`make gpu`).

Both runs start from the same weights and see the same data; losses must agree before times count.
"""

import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import results

from etude import kernels
from etude.models.dit import DiT, DiTConfig

BATCH, STEPS = 64, 20
MODEL = {"input_size": 32, "patch_size": 2, "in_channels": 4, "hidden_size": 768, "depth": 12}
MODEL |= {"num_heads": 12, "num_classes": 1000}


def train(backend: str) -> tuple[list[float], float]:
    """(losses, median seconds of a step) under bfloat16 autocast."""
    with torch.random.fork_rng(devices=[0]), kernels.use_backend(backend):
        torch.manual_seed(0)
        model = DiT(DiTConfig(**MODEL)).cuda()
        for parameter in model.parameters():  # the zero gates of a new DiT would hide the blocks
            torch.nn.init.normal_(parameter, std=0.02)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        x = torch.randn(BATCH, 4, 32, 32, device="cuda")
        t = torch.rand(BATCH, device="cuda") * 999
        labels = torch.randint(0, 1000, (BATCH,), device="cuda")
        losses, times = [], []
        for _ in range(STEPS):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            with torch.autocast("cuda", torch.bfloat16):
                loss = (model(x, t, labels)[:, :4].float() - x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
            losses.append(loss.item())
    return losses, statistics.median(times[5:])


def main() -> int:
    wanted, _ = train("reference")
    for backend in ("reference", "triton", "reference", "triton"):
        losses, seconds = train(backend)
        drift = max(abs(a - b) / abs(b) for a, b in zip(losses, wanted, strict=True))
        row = {"op": "dit_b_step", "provider": backend, "batch": BATCH, "dtype": "bfloat16"}
        row |= {"median_s": seconds, "images_s": BATCH / seconds, "loss_drift": drift}
        results.append("step_gpu", [results.machine() | row])
        print(row, flush=True)
        if drift > 0.02:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
