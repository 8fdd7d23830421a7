"""Run by test_fp8_triton.py with TRITON_INTERPRET=1: the kernel without its cast to 8 bits."""

import json

import torch

from etude.kernels import adaln, fp8_triton

CASES = (((2, 5, 63), False), ((1, 3, 144), False), ((2, 5, 200), True), ((1, 2, 1152), False))


def main() -> None:
    for shape, rms in CASES:
        g = torch.Generator().manual_seed(0)
        x = (torch.randn(*shape, generator=g) * 2 + 3).half()
        shift, scale = torch.randn(shape[0], 2 * shape[2], generator=g).half().chunk(2, 1)
        x[0, 0] = 0.0
        shift[0] = 0.0  # with the row above, a row of zeros
        x[-1, -1, -1] = 60.0  # the largest value of a row is in its second piece
        for keep in (True, False):
            launched = fp8_triton.launch(
                x, shift, scale, 1e-6, rms, None, keep, values_dtype=torch.float32
            )
            y, values, row_scale, mean, rstd = launched
            norm = "rmsnorm" if rms else "layernorm"
            wide = (t.double() for t in (x, shift, scale))
            want = adaln.adaln_modulate_reference(*wide, norm=norm)
            largest = want.abs().amax(-1)
            want_scale = torch.where(largest > 0, largest / 448.0, 1.0)
            scaled = want / want_scale.unsqueeze(-1)
            row = {
                "shape": shape,
                "keep": keep,
                "scale": float((row_scale / want_scale - 1).abs().max()),
                "values": float((values - scaled).abs().max() / 448),
                "largest": float(values.abs().max()),
                "zeros": bool((values[0, 0] == 0).all()) and float(row_scale[0, 0]) == 1.0,
                "y": float(((y - want) / want.abs().max()).abs().max())
                if keep
                else float(y.numel()),
                "statistics": bool(mean.isfinite().all() and rstd.isfinite().all()),
            }
            print(json.dumps(row))


main()
