"""All modulation vectors in one product: the values and gradients of the layers by themselves."""

import copy

import pytest
import torch
from torch import Tensor, nn

from etude import kernels
from etude.kernels import modulation

WIDTHS = (18, 18, 6)  # two blocks and a final layer


def layers(D: int = 12, widths: tuple[int, ...] = WIDTHS, dtype=torch.float32) -> nn.ModuleList:
    torch.manual_seed(0)
    made = nn.ModuleList(nn.Linear(D, k, dtype=dtype) for k in widths)
    return made


def gradients(function, s: Tensor, maps: nn.ModuleList) -> dict[str, Tensor]:
    """The output and all gradients, for a loss that weighs every output differently."""
    s = s.detach().clone().requires_grad_()
    maps.zero_grad(set_to_none=True)
    out = function(s, list(maps))
    g = torch.Generator().manual_seed(1)
    (out.double() * torch.randn(out.shape, generator=g, dtype=torch.float64)).sum().backward()
    made = {n: p.grad.clone() for n, p in maps.named_parameters()}
    return {"out": out.detach(), "ds": s.grad} | made


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], ratio: float) -> None:
    assert got.keys() == want.keys()
    for name in want:
        error = (got[name].double() - want[name].double()).norm()
        assert error <= ratio * want[name].double().norm() + 1e-12, name


# float32: another order of summation. bfloat16: one rounding of each output and gradient, and of
# the input's gradient once more per layer where the layers are apart.
@pytest.mark.parametrize(
    ("dtype", "ratio"), [(torch.float64, 1e-14), (torch.float32, 2e-6), (torch.bfloat16, 1.2e-2)]
)
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("batch", [0, 1, 7])
def test_values_and_gradients(dtype: torch.dtype, ratio: float, flat: bool, batch: int) -> None:
    maps = layers(dtype=dtype)
    s = torch.randn(batch, 12, generator=torch.Generator().manual_seed(2)).to(dtype)
    wide = copy.deepcopy(maps).double()
    if flat:
        assert kernels.flatten_modulation(maps)
        assert modulation.flat_view([m.weight for m in maps]) is not None
    got = gradients(kernels.modulation_gemm, s, maps)
    want = gradients(kernels.modulation_gemm_reference, s.double(), wide)
    assert got["out"].shape == (batch, sum(WIDTHS)) and got["out"].dtype == dtype
    assert_close(got, want, ratio)


def test_gradient_of_the_reference() -> None:
    maps = layers(5, (3, 4), torch.float64)
    s = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: kernels.modulation_gemm(s, maps), (s,))


def test_flattening_changes_no_name_no_value_and_no_object() -> None:
    maps = layers()
    before = {n: (p, p.detach().clone()) for n, p in maps.named_parameters()}
    assert kernels.flatten_modulation(maps)
    for name, p in maps.named_parameters():
        assert p is before[name][0] and torch.equal(p, before[name][1]) and p.is_contiguous()
    weights = [m.weight for m in maps]
    assert len({w.untyped_storage().data_ptr() for w in weights}) == 1


def test_flat_weights_take_a_step_and_a_state_dict() -> None:
    maps, other = layers(), layers()
    kernels.flatten_modulation(maps)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    maps.load_state_dict(other.state_dict())
    optimizer = torch.optim.AdamW(maps.parameters(), lr=0.1)
    gradients(kernels.modulation_gemm, torch.ones(3, 12), maps)
    optimizer.step()
    assert modulation.flat_view([m.weight for m in maps]) is not None
    s = torch.randn(3, 12)
    got = gradients(kernels.modulation_gemm, s, maps)
    assert_close(got, gradients(kernels.modulation_gemm_reference, s, maps), 2e-6)


@pytest.mark.parametrize("change", ["deepcopy", "to", "replaced"])
def test_after_a_change_of_memory_the_values_are_right(change: str) -> None:
    maps = layers()
    kernels.flatten_modulation(maps)
    if change == "deepcopy":
        maps = copy.deepcopy(maps)
    elif change == "to":
        maps = maps.double().float()
    else:  # as flat buffers do: same shape, other memory, the old one still there
        maps[1].weight.data = maps[1].weight.data * 3
    assert modulation.flat_view([m.weight for m in maps]) is None
    s = torch.randn(3, 12)
    got = gradients(kernels.modulation_gemm, s, maps)
    assert_close(got, gradients(kernels.modulation_gemm_reference, s, maps), 2e-6)


class Doubled(nn.Linear):
    def forward(self, s: Tensor) -> Tensor:
        return 2 * super().forward(s)


def test_layers_with_hooks_or_of_another_class_are_called() -> None:
    maps, s = layers(), torch.randn(3, 12)
    maps[0].register_forward_hook(lambda module, inputs, output: output + 1)
    maps[2] = Doubled(12, 6)
    assert not kernels.flatten_modulation(maps)
    want = torch.cat([m(s) for m in maps], 1)
    assert torch.equal(kernels.modulation_gemm(s, maps), want)


def test_layers_with_backward_hooks_or_a_forward_of_their_own_are_called() -> None:
    s = torch.randn(3, 12)
    maps, seen = layers(), []
    maps[1].register_full_backward_hook(lambda module, dx, dy: seen.append(dy[0].shape))
    gradients(kernels.modulation_gemm, s, maps)
    assert seen == [(3, 18)]
    maps = layers()
    maps[0].forward = lambda s: s.repeat(1, 2)[:, :18]  # as offloading and adapters do
    assert torch.equal(kernels.modulation_gemm(s, maps)[:, :12], s)


@pytest.mark.parametrize("flat", [False, True])
def test_autocast(flat: bool) -> None:
    maps, s = layers(), torch.randn(5, 12)
    wide = copy.deepcopy(maps).double()
    if flat:
        kernels.flatten_modulation(maps)
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(kernels.modulation_gemm, s, maps)
    assert got["out"].dtype == torch.bfloat16 and got["0.weight"].dtype == torch.float32
    want = gradients(kernels.modulation_gemm_reference, s.double(), wide)
    assert_close(got, want, 1.2e-2)


@pytest.mark.parametrize("flat", [False, True])
def test_compiles_without_a_break(flat: bool) -> None:
    maps, s = layers(), torch.randn(5, 12)
    if flat:
        kernels.flatten_modulation(maps)
    torch._dynamo.reset()
    compiled = torch.compile(lambda s, m: kernels.modulation_gemm(s, m), fullgraph=True)
    got = gradients(compiled, s, maps)
    assert_close(got, gradients(kernels.modulation_gemm, s, maps), 1e-6)


@pytest.mark.parametrize("transposed", [False, True])
def test_operator_keeps_the_rules_of_torch_library(transposed: bool) -> None:
    maps = layers()
    s = (torch.randn(12, 3).t() if transposed else torch.randn(3, 12)).requires_grad_()
    arguments = (s, [m.weight for m in maps], [m.bias for m in maps], torch.float32)
    torch.library.opcheck(torch.ops.etude.modulation_gemm.default, arguments)
    dout, weights = torch.randn(3, sum(WIDTHS)), [w.detach() for w in arguments[1]]
    backward = torch.ops.etude.modulation_gemm_backward.default
    torch.library.opcheck(backward, (dout, s.detach(), weights))


def test_a_second_derivative_raises() -> None:
    maps, s = layers(), torch.randn(3, 12, requires_grad=True)
    (first,) = torch.autograd.grad(
        kernels.modulation_gemm(s, maps).square().sum(), s, create_graph=True
    )
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


def test_triples_of_a_network_feed_the_fused_operator() -> None:
    """gate of one block, shift and scale of the next: neighbours, and one gradient for all."""
    D, s = 4, torch.randn(2, 12)
    maps = layers(12, (6 * D, 2 * D))
    x, h = torch.randn(2, 5, D), torch.randn(2, 5, D)

    def through(packed: bool):
        def run(s: Tensor, maps: list[nn.Linear]) -> Tensor:
            if not packed:
                one, two = maps[0](s).chunk(6, 1), maps[1](s).chunk(2, 1)
                out, y = kernels.gate_residual_adaln(x, h, one[5], *two)
                return torch.cat((one[0], out.flatten(1), y.flatten(1)), 1)
            first, middle, last = kernels.modulation_gemm(s, maps).split((2 * D, 3 * D, 3 * D), 1)
            out, y = kernels.gate_residual_adaln(x, h, modulation=last)
            return torch.cat((first[:, :D], out.flatten(1), y.flatten(1)), 1)

        return run

    assert_close(gradients(through(True), s, maps), gradients(through(False), s, maps), 3e-6)


def test_a_table_has_the_rows_of_every_timestep_and_label() -> None:
    maps, embed = layers(), nn.Embedding(4, 12)
    timesteps, labels = torch.tensor([900.0, 500.0, 1.5]), torch.tensor([3, 0])

    def condition(t: Tensor, y: Tensor) -> Tensor:
        return nn.functional.silu(t[:, None] / 1000 + embed(y))

    table = kernels.modulation_table(condition, maps, timesteps, labels)
    assert table.shape == (3, 2, sum(WIDTHS)) and not table.requires_grad
    for i, t in enumerate(timesteps):
        for j, y in enumerate(labels):
            want = kernels.modulation_gemm_reference(condition(t[None], y[None]), maps)
            torch.testing.assert_close(table[i, j], want[0])


def test_adaln_single_adds_a_table_and_gives_it_the_sum_over_samples() -> None:
    vector = torch.randn(3, 12, dtype=torch.bfloat16, requires_grad=True)
    table = torch.randn(2, 6, requires_grad=True)
    out = kernels.adaln_single(vector, table)
    assert out.dtype == torch.bfloat16
    want = (vector.float().view(3, 2, 6) + table).flatten(1).bfloat16()
    assert torch.equal(out, want)
    g = torch.randn(3, 12).bfloat16()
    dvector, dtable = torch.autograd.grad(out, (vector, table), g)
    assert torch.equal(dvector, g)
    torch.testing.assert_close(dtable, g.float().sum(0).view(2, 6))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: kernels.modulation_gemm(torch.zeros(3, 4, 12), m), "s must be (B, D)"),
        (lambda m: kernels.modulation_gemm(torch.zeros(3, 12), []), "layers at least one"),
        (lambda m: kernels.modulation_gemm(torch.zeros(3, 7), m), "layers[0] is (18, 12)"),
        (lambda m: kernels.modulation_gemm(torch.zeros(3, 12).double(), m), "s is torch.float64"),
        (lambda m: kernels.adaln_single(torch.zeros(3, 7), torch.zeros(2, 3)), "(3, 7) and (2, 3)"),
    ],
)
def test_bad_input_gets_one_sentence(call, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        call(layers())
    assert words in str(caught.value) and "\n" not in str(caught.value)
