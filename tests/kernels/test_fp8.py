"""8-bit rows: rounding within half a step of the type, gradients of the unrounded layer."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude import kernels
from etude.kernels import fp8

# Largest relative error of float8_e4m3fn: half a step of a 3-bit mantissa. Below 2^-6 of the 448
# that a row's largest value becomes there are only 2^-9 steps: an absolute half step.
STEP, FLOOR = 2.0**-4, 2.0**-10
SHAPES = [(2, 5, 64), (3, 1, 199), (1, 3, 1152), (2, 0, 8), (0, 2, 8)]


def inputs(B: int, N: int, D: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(B, N, D, generator=g) * 2 + 3
    return {"x": x.to(dtype), "modulation": torch.randn(B, 2 * D, generator=g).to(dtype)}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_times_scale_are_the_modulated_rows(shape, norm: str, dtype: torch.dtype) -> None:
    data = inputs(*shape, dtype)
    values, scale, high = kernels.adaln_modulate_fp8(**data, norm=norm)
    assert high is None and values.dtype == torch.float8_e4m3fn and scale.shape == shape[:2]
    with kernels.use_backend("reference"):
        wide = {k: v.double() for k, v in data.items()}
        want = kernels.adaln_modulate(**wide, norm=norm)
    error = (values.double() * scale.double().unsqueeze(-1) - want).abs()
    # 1e-4 for a value that float32 puts on the other side of the middle of a step.
    bound = (want.abs() * STEP).maximum(scale.double().unsqueeze(-1) * FLOOR) * (1 + 1e-4)
    assert bool((error <= bound).all())
    if want.numel():
        assert float(values.float().abs().amax(-1).min()) == 448.0


def test_a_row_of_zeros_has_scale_one_and_large_rows_stay_finite() -> None:
    t = torch.zeros(3, 16)
    t[1], t[2, 3] = 3e38, -1e-30
    values, scale = fp8.quantise_rows(t)
    assert scale[0] == 1 and not values[0].float().any()
    assert bool(values.float().isfinite().all())
    torch.testing.assert_close(fp8.dequantise_rows(values, scale), t, rtol=STEP, atol=0)


def test_gradients_are_those_of_adaln_modulate() -> None:
    data = {k: v.requires_grad_() for k, v in inputs(2, 5, 72).items()}
    rows = kernels.adaln_modulate_fp8(**data)
    plain = kernels.adaln_modulate(**data)
    torch.testing.assert_close(rows.high, plain)
    g = torch.randn(2, 5, 72)
    got = torch.autograd.grad(rows.high, list(data.values()), g)
    torch.testing.assert_close(got, torch.autograd.grad(plain, list(data.values()), g))
    assert not rows.values.requires_grad and not rows.scale.requires_grad


def test_linear_is_the_product_of_the_dequantised_factors_with_ordinary_gradients() -> None:
    torch.manual_seed(0)
    y = torch.randn(2, 5, 48, requires_grad=True)
    weight = torch.randn(32, 48, requires_grad=True)
    bias = torch.randn(32, requires_grad=True)
    rows = fp8.Rows8(*fp8.quantise_rows(y), y)
    out = kernels.linear_fp8(rows, weight, bias)
    left = fp8.dequantise_rows(rows.values, rows.scale).double()
    right = fp8.dequantise_rows(*fp8.quantise_rows(weight)).double()
    torch.testing.assert_close(out.double(), left @ right.t() + bias.double(), rtol=1e-5, atol=1e-5)
    # Two independent roundings, each uniform within half a step: 2^-4 / sqrt(3) of the product at
    # most, and a third of that where the mantissas are spread evenly.
    exact = F.linear(y, weight, bias)
    assert 0.005 < float((out - exact).norm() / exact.norm()) < 0.05
    g = torch.randn_like(out)
    got = torch.autograd.grad(out, (y, weight, bias), g)
    want = torch.autograd.grad(exact, (y, weight, bias), g)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_second_derivative_raises() -> None:
    layer, y = fp8.Fp8Linear(16, 16), torch.randn(3, 16, requires_grad=True)
    (first,) = torch.autograd.grad(layer(y).square().sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_compiles_without_a_break() -> None:
    layer = fp8.Fp8Linear(64, 16)
    data = {k: v.requires_grad_() for k, v in inputs(2, 5, 64).items()}

    def function(x: Tensor, modulation: Tensor) -> Tensor:
        return layer(kernels.adaln_modulate_fp8(x, modulation=modulation))

    torch._dynamo.reset()
    got = torch.compile(function, fullgraph=True)(**data)
    want = function(**data)
    torch.testing.assert_close(got, want, rtol=0.01, atol=0.05)  # a rounding may turn over
    leaves = list(data.values())
    grads = [torch.autograd.grad(out.sum(), leaves) for out in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda r, w: kernels.linear_fp8(r, w[:, :7]), "weight must be (K, 16), got (8, 7)"),
        (lambda r, w: kernels.linear_fp8(r, w, w[0]), "bias must be (8,), got (16,)"),
        (lambda r, w: kernels.linear_fp8(r._replace(scale=r.scale[0]), w), "make them with"),
        (lambda r, w: kernels.linear_fp8(r, nn.Parameter(w)), "needs rows.high, which is absent"),
        (lambda r, w: kernels.adaln_modulate_fp8(w, w, w), "x must be (B, N, D)"),
    ],
)
def test_bad_input_gets_one_sentence(call, words: str) -> None:
    rows = fp8.Rows8(*fp8.quantise_rows(torch.randn(2, 16)), None)
    with pytest.raises(ValueError) as caught:
        call(rows, torch.randn(8, 16))
    assert words in str(caught.value) and "\n" not in str(caught.value)


class Block(nn.Module):
    """Two adaLN-modulated MLPs on a residual stream; both first layers take 8-bit rows or not."""

    def __init__(self, D: int, rounded: bool) -> None:
        super().__init__()
        self.rounded = rounded
        self.modulation = nn.ModuleList(nn.Linear(D, 2 * D) for _ in range(2))
        self.up = nn.ModuleList(fp8.Fp8Linear(D, 2 * D) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(2 * D, D) for _ in range(2))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        for modulation, up, down in zip(self.modulation, self.up, self.down, strict=True):
            m = modulation(c)
            if self.rounded:
                h = up(kernels.adaln_modulate_fp8(x, modulation=m))
            else:
                h = F.linear(kernels.adaln_modulate(x, modulation=m), up.weight, up.bias)
            x = x + down(F.gelu(h))
        return x


def losses(rounded: bool, seed: int, steps: int = 60) -> list[float]:
    torch.manual_seed(seed)
    model = Block(32, rounded).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    g = torch.Generator().manual_seed(7)
    x = torch.randn(16, 8, 32, generator=g).bfloat16()
    c = torch.randn(16, 32, generator=g).bfloat16()
    target = (x.roll(1, 1) * c.unsqueeze(1).tanh()).float()
    made = []
    for _ in range(steps):
        loss = (model(x, c).float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        made.append(loss.item())
    return made


def test_training_in_8_bits_follows_the_loss_of_bfloat16() -> None:
    """The stated bound: 8% at every step and 2% on average, over a fall to a twentieth.

    Measured over three seeds: 4% to 5% at the worst step and 1.1% on average, where other initial
    weights change the loss by 2% to 12% and 1.2% to 5%.
    """
    plain, rounded = losses(False, 0), losses(True, 0)
    assert plain[-1] < 0.05 * plain[0], "the task is learnt"
    apart = [abs(a - b) / a for a, b in zip(plain, rounded, strict=True)]
    assert 0 < max(apart) < 0.08 and sum(apart) / len(apart) < 0.02, apart
