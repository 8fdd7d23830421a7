"""UniPC of order 2 (Zhao et al. 2023), B(h) = exp(h) - 1, as rows of `solver_step`.

Called by `samplers.py`. The predictor of order 2 is that of DPM-Solver++(2M). The corrector uses
the estimate at a predicted point once more: it moves the point itself before the next prediction,
at no evaluation of its own. With m_i the clean estimate at point i, lambda = log(alpha / sigma),
h = lambda_i - lambda_(i-1), r = (lambda_(i-2) - lambda_(i-1)) / h and
gain = alpha_i - alpha_(i-1) sigma_i / sigma_(i-1),

    x_i <- x_i + gain (rho_1 (m_i - m_(i-1)) + (rho_0 - 1/2) (m_(i-2) - m_(i-1)) / r)

where rho_0 + rho_1 = b_1 and r rho_0 + rho_1 = b_2, with phi = (exp(-h) - 1) / -h - 1,
b_1 = phi / (exp(-h) - 1) and b_2 = 2 (phi / -h - 1/2) / (exp(-h) - 1). The first correction, of a
point that was predicted by the first order, is gain (m_1 - m_0) / 2. The step to the clean point is
of first order and its corrector has nothing to do. All of it is linear in x and the three last
estimates: x' = c_4 x + c_5 m_i + 1 (u m_(i-1) + v m_(i-2)).
"""

import math

import torch
from torch import Tensor

from etude.kernels.solver import solver_coefficients


def unipc_rows(prediction: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, list[list[float]]]:
    """Rows (steps, 8) float64 of `solver_step`, and (u, v) of every step, for its extra tensor.

    Args:
        prediction: what the network returns.
        alpha, sigma: (steps + 1,) float64 points of the grid; the last is (1, 0).
    """
    steps = len(alpha) - 1
    rows, mix = [], []
    for i in range(steps):
        ways = alpha[i], sigma[i], alpha[i + 1], sigma[i + 1]
        before = {"alpha_previous": alpha[i - 1], "sigma_previous": sigma[i - 1]} if i else {}
        row = solver_coefficients("dpmpp_2m", prediction, *ways, **before)
        u = v = 0.0
        if i:
            now, last, older = _corrector(alpha[: i + 1].tolist(), sigma[: i + 1].tolist())
            from_x = float(row[4])
            row[5] += from_x * now
            u, v = float(row[7]) + from_x * last, from_x * older
        row[7] = 1.0
        rows.append(row)
        mix.append([u, v])
    return torch.stack(rows), mix


def _corrector(alpha: list[float], sigma: list[float]) -> tuple[float, float, float]:
    """What m_i, m_(i-1) and m_(i-2) add to the last of these points."""
    gain = alpha[-1] - alpha[-2] * sigma[-1] / sigma[-2]
    if len(alpha) == 2:
        return 0.5 * gain, -0.5 * gain, 0.0
    older, last, now = (_log_ratio(a, s) for a, s in zip(alpha[-3:], sigma[-3:], strict=True))
    h = now - last
    base = math.expm1(-h)
    phi = base / -h - 1.0
    first, second = phi / base, 2.0 * (phi / -h - 0.5) / base
    if older == -math.inf:
        return gain * first, -gain * first, 0.0
    r = (older - last) / h
    rho = (second - first) / (r - 1.0)
    weight, slope = first - rho, (rho - 0.5) / r
    return gain * weight, -gain * (weight + slope), gain * slope


def _log_ratio(alpha: float, sigma: float) -> float:
    return math.log(alpha / sigma) if alpha > 0 else -math.inf
