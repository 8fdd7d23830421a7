"""AdamWEMA against torch's AdamW and float64 recursions; schedules; use in other loops."""

import copy
import math
import pickle

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from etude.core.errors import UserError
from etude.core.optim import AdamWEMA, OptimConfig, learning_rate, param_groups, profile_state


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(4, 5), nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 1))


def backward(model: nn.Module, step: int) -> None:
    labels = torch.randint(0, 4, (16,), generator=torch.Generator().manual_seed(step))
    (model(labels) - labels[:, None]).square().mean().backward()


def test_groups_decay_matrices_only():
    model = net()
    decay, rest = param_groups(model)
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(p)] for p in decay["params"]] == ["1.weight", "3.weight"]
    expected = ["0.weight", "1.bias", "2.weight", "2.bias", "3.bias"]
    assert [names[id(p)] for p in rest["params"]] == expected
    assert rest["weight_decay"] == 0.0
    assert "weight_decay" not in decay


def test_it_is_torch_adamw_with_averages_of_the_formula():
    ours, theirs = net(), net()
    first = AdamWEMA(param_groups(ours), lr=1e-2, weight_decay=0.1, ema_decays=[0.3, 0.9999])
    second = torch.optim.AdamW(param_groups(theirs), lr=1e-2, weight_decay=0.1)
    averages = [[p.detach().double() for p in ours.parameters()] for _ in range(2)]
    for step in range(12):
        for model, optimizer in ((ours, first), (theirs, second)):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
        for i, decay in enumerate((0.3, 0.9999)):
            d = min(decay, (1 + step) / (10 + step))
            now = [p.detach().double() for p in ours.parameters()]
            averages[i] = [d * a + (1 - d) * p for a, p in zip(averages[i], now, strict=True)]
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    for i in range(2):
        for p, expected in zip(ours.parameters(), averages[i], strict=True):
            assert torch.allclose(first.ema_state(i)[p].double(), expected, rtol=0, atol=1e-6)


def test_a_parameter_that_joins_late_has_its_own_step_count():
    together, alone = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    early = nn.Parameter(torch.ones(3))
    both = AdamWEMA([early, together], lr=0.1, ema_decays=[0.9])
    single = AdamWEMA([alone], lr=0.1, ema_decays=[0.9])
    for step in range(6):
        early.grad = torch.full((3,), 0.5)
        if step >= 3:
            together.grad = torch.tensor([1.0, -2.0, 0.1 * step])
            alone.grad = together.grad.clone()
            single.step()
        both.step()
    assert torch.equal(together, alone)
    assert torch.equal(both.ema_state()[together], single.ema_state()[alone])
    assert both.state[early]["step"] == 6 and both.state[together]["step"] == 3


def test_found_inf_leaves_every_bit():
    model = net()
    optimizer = AdamWEMA(param_groups(model), lr=1e-2, weight_decay=0.1, ema_decays=[0.9])
    backward(model, 0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()["state"])
    weights = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad.fill_(float("nan"))
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(after[i][key], before[i][key]) for i in before for key in before[i])
    optimizer.found_inf = torch.tensor(0.0)
    backward_again = [torch.zeros_like(p) for p in model.parameters()]
    for p, grad in zip(model.parameters(), backward_again, strict=True):
        p.grad = grad
    optimizer.step()
    assert not torch.equal(weights[0], next(model.parameters()))


def test_grad_scale_multiplies():
    a, b = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    first, second = AdamWEMA([a], lr=0.1), AdamWEMA([b], lr=0.1)
    a.grad, b.grad = torch.arange(5.0), torch.arange(5.0) * 0.25
    first.grad_scale = torch.tensor(0.25)
    first.step()
    second.step()
    assert torch.equal(a, b)
    assert torch.equal(first.state[a]["exp_avg_sq"], second.state[b]["exp_avg_sq"])


def test_state_dict_resumes_bitwise():
    straight, model = net(), net()
    one = AdamWEMA(param_groups(straight), lr=1e-2, ema_decays=[0.99])
    two = AdamWEMA(param_groups(model), lr=1e-2, ema_decays=[0.99])
    for step in range(8):
        if step == 4:
            fresh = net()
            fresh.load_state_dict(model.state_dict())
            model, saved = fresh, two.state_dict()
            two = AdamWEMA(param_groups(model), lr=1e-2, ema_decays=[0.99])
            two.load_state_dict(copy.deepcopy(saved))
        for m, optimizer in ((straight, one), (model, two)):
            backward(m, step)
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(straight.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(one.ema_state()[a], two.ema_state()[b])


def test_half_precision_parameters_are_refused():
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(UserError, match="float32"):
        AdamWEMA([parameter]).step()


@pytest.mark.parametrize(
    ("schedule", "images", "share"),
    [
        ("constant", 999, 1.0),
        ("cosine", 100, 1.0),
        ("cosine", 550, 0.1 + 0.9 * 0.5),
        ("cosine", 1000, 0.1),
        ("wsd", 799, 1.0),
        ("wsd", 900, 0.1 + 0.9 * 0.5),
        ("wsd", 1000, 0.1),
    ],
)
def test_schedules_in_closed_form(schedule, images, share):
    config = OptimConfig(lr=2.0, warmup_images=100, schedule=schedule, final_fraction=0.1)
    assert learning_rate(config, images, 1000) == pytest.approx(2.0 * share)


def test_warm_up_is_linear_and_never_zero():
    config = OptimConfig(lr=1.0, warmup_images=99)
    rates = [learning_rate(config, i, 1000) for i in range(100)]
    assert rates == pytest.approx([(i + 1) / 100 for i in range(100)])
    assert math.isclose(rates[99], 1.0)


@pytest.mark.parametrize("bad", [{"ema": [0.9, 0.9]}, {"ema": [1.0]}, {"betas": (1.0, 0.9)}])
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ValidationError):
        OptimConfig(**bad)


def test_profiles_are_named_by_their_decay():
    assert OptimConfig(ema=[0.999, 0.9999]).profiles == ["raw", "ema:0.999", "ema:0.9999"]
    assert profile_state("ema:0.9999", [0.999, 0.9999]) == "ema1"
    with pytest.raises(UserError, match=r"choose raw, ema:0\.999"):
        profile_state("ema", [0.999])


def test_copies_receive_the_new_weights_of_the_parameters_that_have_one():
    torch.manual_seed(0)
    first, second, plain = (nn.Parameter(torch.randn(5)) for _ in range(3))
    twin = nn.Parameter(first.detach().clone())
    optimizer = AdamWEMA([first, second], lr=torch.tensor(0.1), ema_decays=[0.9])
    other = AdamWEMA([twin, plain], lr=0.1, ema_decays=[0.9])
    optimizer.copies = {first: torch.zeros(5, dtype=torch.bfloat16)}
    for _ in range(3):
        for parameter in (first, second, twin, plain):
            parameter.grad = torch.linspace(-1, 1, 5)
        optimizer.step()
        other.step()
    assert torch.equal(optimizer.copies[first], first.detach().bfloat16())
    assert torch.allclose(first, twin, rtol=1e-6)  # the rate as a float32 tensor
    assert float(optimizer.state[second]["step"]) == 3


def test_bf16_weights_of_the_local_strategy_are_written_by_the_optimizer(monkeypatch):
    from etude.core.distributed import World
    from etude.core.strategy import StrategyConfig, build_strategy
    from etude.core.strategy_local import LocalStrategy

    monkeypatch.setattr(LocalStrategy, "refresh", None)  # no second pass over the weights
    config = StrategyConfig(kind="local", precision="bf16")
    world = World(0, 1, 0, torch.device("cpu"))
    strategy = build_strategy(config, net(), OptimConfig(lr=1e-2, clip=0.1, ema=[0.9]), world)
    for step in range(2):
        x = torch.arange(4).roll(step)
        strategy.backward(strategy(x).float().square().mean())
        strategy.step(1e-2)
    for name, weight in strategy.module.named_parameters():
        master = strategy._masters[name].detach()
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, master.bfloat16())
        assert not torch.equal(strategy.optimizer.ema_state()[strategy._masters[name]], master)


def test_a_pickled_optimizer_goes_on_with_its_averages():
    """With its model, as whole jobs are stored by some trainers."""
    model = net()
    optimizer = AdamWEMA(model.parameters(), lr=0.01, ema_decays=[0.9])
    backward(model, 0)
    optimizer.step()
    twin_model, twin = pickle.loads(pickle.dumps((model, optimizer)))
    for one, by in ((model, optimizer), (twin_model, twin)):
        by.zero_grad()
        backward(one, 1)
        by.step()
    assert all(map(torch.equal, optimizer.ema_state(0).values(), twin.ema_state(0).values()))
    assert all(map(torch.equal, model.parameters(), twin_model.parameters()))
