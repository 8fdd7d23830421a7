"""Run by test_noising_triton.py with TRITON_INTERPRET=1: noise, noising and losses."""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_noising import exact, exact_noise, make, not_a_number, ours, run

from etude import kernels
from etude.kernels import noising

LAST = torch.channels_last
CASES = [(op, "flow", False) for op in ("noise_like", "diffuse")]
CASES += [("diffusion_loss", t, False) for t in noising.TARGETS] + [("diffusion_loss", "eps", True)]


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    size = float(want.double().square().mean().sqrt())
    return float((got.double() - want.double()).square().mean().sqrt()) / max(size, 1e-9)


def main() -> None:
    for op, target, learned in CASES:
        for shape, layout in (((2, 3, 5, 7), "nchw"), ((2, 4, 16, 20), "nhwc"), ((3, 1), "nchw")):
            for dtype in (torch.float32, torch.float16):
                data = make(shape, dtype, double=learned)
                if layout == "nhwc":
                    data["x0"] = data["x0"].contiguous(memory_format=LAST)
                    data["prediction"] = data["prediction"].contiguous(memory_format=LAST)
                got = run(ours, op, data, target, learned)
                again = run(ours, op, data, target, learned)
                wide = data | {"prediction": data["prediction"].double()}
                want = run(exact, op, wide, target, learned)
                if learned:  # the two halves of the gradient have different sizes
                    for made in (got, want):
                        both = made["gradient"].chunk(2, 1)
                        made["gradient"], made["dvariance"] = both
                row = {
                    "case": [op, target, learned, list(shape)],
                    "dtype": str(dtype).removeprefix("torch."),
                    "errors": {name: error(got[name], want[name]) for name in want},
                    "repeats": all(torch.equal(got[n], again[n]) for n in again if n != "gradient"),
                }
                print(json.dumps(row))
    data = not_a_number()
    loss = ours("diffusion_loss", data, "eps", True)
    print(json.dumps({"not a number": loss.isnan().tolist()}))
    key = {"seed": 1, "stream": 2}
    positions = torch.tensor([0, 0xFFFFFFFF, (7 << 32) + 5, 2**62])
    eps = kernels.noise_like(torch.empty(4, 3001), positions, **key)
    worst = float((eps - exact_noise(positions, (3001,), **key)).abs().max())
    print(json.dumps({"worst": worst}))


main()
