"""Both strategies against plain torch, in real processes of one, two and three ranks."""

import importlib.util
import itertools
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from etude.core.checkpoint import latest_checkpoint, read_weights
from etude.core.optim import AdamWEMA, param_groups

WORKER = Path(__file__).parent / "workers" / "strategies.py"
FP32 = ["local None", "zero 0", "zero 1", "zero 2", "zero 3"]


def load_worker():
    spec = importlib.util.spec_from_file_location("strategies_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker = load_worker()


@pytest.fixture(scope="module")
def launch(run_ranks, tmp_path_factory) -> Callable[[str, int], list[dict]]:
    """Results of every rank; one retry, because DeepSpeed at times aborts at exit."""
    folder = tmp_path_factory.mktemp("strategies")

    def start(phase: str, ranks: int) -> list[dict]:
        wanted = [folder / f"{phase}-{rank}.pt" for rank in range(ranks)]
        for _ in range(2):
            ended = run_ranks(ranks, WORKER, phase, folder)
            if all(path.exists() for path in wanted):
                return [torch.load(path, weights_only=True) for path in wanted]
        raise AssertionError("".join(one.stdout[-1000:] + one.stderr[-4000:] for one in ended))

    start.folder = folder
    return start


@pytest.fixture(scope="module")
def one(launch):
    return launch("one", 1)[0]


@pytest.fixture(scope="module")
def two(launch, one):
    return launch("two", 2)


@pytest.fixture(scope="module")
def back(launch, two):
    return launch("back", 1)[0]


@pytest.fixture(scope="module")
def three(launch, two):
    return launch("three", 3)


def plain_torch(order: list[int]) -> Tensor:
    """20 losses of a textbook loop with torch's own AdamW and clipping, four micro batches."""
    net, count = worker.new_net(), 4
    optimizer = torch.optim.AdamW(
        param_groups(net), lr=worker.OPTIM.lr, weight_decay=worker.OPTIM.weight_decay
    )
    losses = []
    for step in range(worker.STEPS):
        parts = []
        for i in order:
            loss = worker.loss_of(net, worker.micro_batch(step, i, count))
            (loss / count).backward()
            parts.append(loss.item())
        torch.nn.utils.clip_grad_norm_(net.parameters(), worker.OPTIM.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(parts) / count)
    return torch.tensor(losses, dtype=torch.float64)


@pytest.fixture(scope="module")
def expected() -> tuple[Tensor, float]:
    """Plain torch's losses and their relative spread over orders of the micro batches."""
    reference = plain_torch([0, 1, 2, 3])
    orders = [list(order) for order in itertools.permutations(range(4))]
    chosen = random.Random(0).sample(orders, 8)
    spread = max(relative(plain_torch(order), reference) for order in chosen)
    return reference, spread


def relative(found: list[float] | Tensor, reference: list[float] | Tensor) -> float:
    found = torch.as_tensor(found, dtype=torch.float64)
    reference = torch.as_tensor(reference, dtype=torch.float64)
    return ((found - reference) / reference).abs().max().item()


@pytest.mark.parametrize("name", FP32)
def test_fp32_losses_are_those_of_plain_torch(name, one, two, expected):
    reference, spread = expected
    assert reference[0] > 1.3 * reference[-4:].min(), (
        "the task must be learnt for this to mean much"
    )
    for run in (one, two[0]):
        error = relative(run["losses"][f"{name} fp32"], reference)
        assert error < 1e-5
        assert error < 3 * max(spread, 1e-7)


@pytest.mark.parametrize("name", FP32[1:])
def test_bf16_losses_follow_the_same_curve(name, one, two):
    for run in (one, two[0]):
        found = torch.tensor(run["losses"][f"{name} bf16"])
        reference = torch.tensor(run["losses"]["local None bf16"])
        assert (found - reference).abs().max() < 3e-3
        assert not torch.equal(found, torch.tensor(run["losses"][f"{name} fp32"]))


def test_offload_gives_the_same_losses(two, expected):
    assert relative(two[0]["offload"], expected[0]) < 1e-5


def test_a_nonfinite_step_changes_no_bit_on_any_rank(one, two):
    good = {
        "gradient flagged": True,
        "gradient untouched": True,
        "loss flagged": True,
        "loss untouched": True,
        "none flagged": False,
        "none untouched": False,
        "finite": True,
    }
    for run in (one, *two):
        assert len(run["guard"]) == 9
        assert {name: report for name, report in run["guard"].items() if report != good} == {}


def ulps(a: Tensor, b: Tensor) -> int:
    as_integers = [t.contiguous().view(torch.int32).long() for t in (a, b)]
    return int((as_integers[0] - as_integers[1]).abs().max())


def test_sharded_averages_are_the_unsharded_ones(two, three):
    whole = two[0]["averages local"]
    assert len(whole) == 3 * 7
    assert not torch.equal(whole["raw parts.0"], whole["ema:0.99 parts.0"])
    for run in (*two, *three):
        for stage in ("1", "2", "3"):
            found = run["averages"][stage]
            assert found.keys() == whole.keys()
            assert max(ulps(found[name], whole[name]) for name in whole) <= 1, stage


def test_averages_follow_the_formula_in_float64(two):
    """One parameter of the run above, recomputed without torch.optim or kernels."""
    weight = worker.Dot().parts[2].detach().double()
    m = v = torch.zeros_like(weight)
    ema = weight.clone()
    for step in range(10):
        generator = torch.Generator().manual_seed(step)
        shapes = [p.shape for p in worker.Dot().parts]
        grad = [torch.randint(-64, 65, s, generator=generator) / 64.0 for s in shapes][2].double()
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        moved = (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        weight = weight * (1 - 1e-2 * 0.1) - 1e-2 * moved
        decay = min(0.99, (1 + step) / (10 + step))
        ema = decay * ema + (1 - decay) * weight
    whole = two[0]["averages local"]
    assert torch.allclose(whole["raw parts.2"].double(), weight, rtol=0, atol=2e-6)
    assert torch.allclose(whole["ema:0.99 parts.2"].double(), ema, rtol=0, atol=2e-6)


def test_fsdp2_with_our_optimizer_alone_equals_one_process(two):
    net = worker.new_net()
    net.frozen.requires_grad_(True)
    optimizer = AdamWEMA(param_groups(net), lr=1e-2, weight_decay=0.1, ema_decays=[0.9])
    for step in range(5):
        worker.loss_of(net, worker.micro_batch(step, 0, 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    averages = optimizer.ema_state(0)
    found = two[1]["fsdp2"]
    names = dict(net.named_parameters())
    assert set(found) == set(names)
    for name, value in found.items():
        assert torch.allclose(value, averages[names[name]], rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("name", FP32)
def test_one_rank_at_stage_3_resumes_on_two_ranks(name, one, two):
    for run in two:
        first, *losses = run["loaded"][name]
        assert relative(losses, one["after"]) < 1e-5
        assert abs(first / one["after"][0] - 1) < 1e-5  # the FIRST forward, before any step


@pytest.mark.parametrize("name", ["local None", "zero 0", "zero 1", "zero 3"])
def test_two_ranks_at_stage_1_resume_on_one_rank(name, two, back):
    first, *losses = back["loaded"][name]
    assert abs(first / two[0]["first"] - 1) < 1e-5
    assert relative(losses, two[0]["after"]) < 1e-5
    assert back["extra"] == {"from": "two", "images_seen": 10}


def test_two_ranks_resume_on_three(two, three):
    for name in ("zero 3", "zero 2"):
        assert relative(three[0]["loaded"][name], two[0]["after"]) < 1e-5


def test_twenty_and_twenty_steps_are_forty_bitwise(one):
    assert one["resumed"] == {"zero 1": True, "zero 3": True}


def test_weights_are_read_without_a_strategy(launch, two):
    path = latest_checkpoint(launch.folder / "two")
    assert path.name == "step-000000000015"
    found = read_weights(path, "ema:0.999")
    for name, value in two[0]["ema"].items():
        assert torch.equal(found[name], value), name
    net = worker.new_net()
    net.load_state_dict(found)  # every name is there: frozen, buffer and tied ones too
    assert not torch.equal(found["inner.weight"], read_weights(path, "raw")["inner.weight"])
