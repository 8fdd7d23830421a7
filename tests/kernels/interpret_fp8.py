"""Run by test_fp8_triton.py with TRITON_INTERPRET=1: the kernel without its cast to 8 bits."""

import json

import torch

from etude.kernels import adaln, fp8, fp8_triton

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


def strange() -> None:
    """A NaN in x or in one column of shift is seen; a row whose scale has no reciprocal is 0."""
    x, shift, scale = torch.zeros(3, 1, 72), torch.zeros(3, 72), torch.zeros(3, 72)
    x[0, 0, 3] = shift[1, 70] = torch.nan
    shift[2, ::2] = 1e-38
    launched = fp8_triton.launch(
        x, shift, scale, 1e-6, False, None, False, values_dtype=torch.float32
    )
    values, row_scale = launched[1].squeeze(1), launched[2].squeeze(1)
    want, want_scale = fp8.quantise_rows(shift[2])
    row = {
        "nan": [int(t.isnan().sum()) for t in values],
        "tiny": bool((values[2].abs() < 1e-30).all()) and float(row_scale[2]) == 1.0,
        "reference": not want.float().any() and float(want_scale) == 1.0,
    }
    print(json.dumps({"strange": row}))


main()
strange()
