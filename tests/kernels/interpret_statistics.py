"""Run by test_statistics_triton.py with TRITON_INTERPRET=1: against extended precision."""

import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_statistics import exact, rows

from etude import kernels
from etude.kernels import statistics_triton


def main() -> None:
    for shape in ((70, 40), (5, 3), (33, 65), (0, 4), (1, 1)):
        for dtype in (torch.float32, torch.float16):
            for run in (0, 32):
                if run:  # several runs of rows, the last one short
                    config = statistics_triton.LaunchConfig(32, 16, 4, run)
                    statistics_triton.LaunchConfig.for_shape = lambda *_, c=config: c
                x = rows(*shape).to(dtype)
                x = torch.cat([x, x], 1)[:, : shape[1]]  # rows with a gap
                (mean, scatter), again = kernels.moments(x), kernels.moments(x)
                row = {"shape": shape, "repeats": torch.equal(scatter, again[1]), "error": 0.0}
                row["symmetric"] = torch.equal(scatter, scatter.T)
                if shape[0]:
                    want_mean, want = exact(x)
                    size = np.sqrt(np.diag(want)) + 1e-300
                    errors = np.abs(scatter.numpy() - want) / np.outer(size, size)
                    shift = np.abs(mean.numpy() - want_mean).max() / float(x.double().abs().max())
                    row["error"] = max(float(errors.max()) if want.any() else 0.0, float(shift))
                print(json.dumps(row))


main()
