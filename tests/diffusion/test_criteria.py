"""What guidance raises, where it stops, what it needs, and that it reads nothing back."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from etude.core.distributed import World
from etude.core.errors import UserError
from etude.diffusion.criteria import criterion, entropy
from etude.diffusion.guidance import EntropyGuidance, GuidanceConfig
from etude.diffusion.objectives import Objective, ObjectiveConfig
from etude.diffusion.samplers import SamplerConfig, sample
from etude.practice.learner import Learner, LearnerConfig

FLOW = Objective(ObjectiveConfig())
STEPS = SamplerConfig(steps=3, guidance_scale=1.5, guidance_convention="lambda")


def denoiser(x: torch.Tensor, t: torch.Tensor, condition: dict) -> torch.Tensor:
    return (0.3 * x).tanh()


@pytest.mark.parametrize(("eta", "best"), [(0.2, 0.5852), (0.5, 0.6773), (1.0, 0.7822)])
def test_entropy_label_keeps_the_label_between_two_classes(eta: float, best: float) -> None:
    """The largest value over p_y, on a fine grid, against log(p / (1 - p)) = eta / p."""
    p = torch.linspace(0.001, 0.999, 99_801, dtype=torch.float64)
    labels = torch.zeros(len(p), dtype=torch.int64)
    logits = torch.stack((p, 1 - p), dim=1).log()
    found = float(p[criterion("entropy_label", logits, labels, eta).argmax()])
    assert abs(math.log(found / (1 - found)) - eta / found) < 1e-3
    assert abs(found - best) < 1e-3


def test_margin_and_entropy_disagree_about_which_sample_is_harder() -> None:
    """Two classes tied far above the rest are the harder by margin, five even ones by entropy."""
    logits = torch.tensor([[0.48, 0.48, 0.02, 0.01, 0.01], [0.3, 0.2, 0.2, 0.2, 0.1]]).log()
    torch.testing.assert_close(criterion("margin", logits, None, 0.0), torch.tensor([1.0, 0.9]))
    assert entropy(logits)[0] < entropy(logits)[1]


def logits_as_latents(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1)


def pull(rows: list[list[float]], labels: list[int], **fields) -> tuple[torch.Tensor, list[bool]]:
    """The gradient by the log probabilities of samples, and which of them are left alone."""
    x = torch.tensor(rows, dtype=torch.float64).log().view(len(rows), -1, 1, 1)
    condition = {"labels": torch.tensor(labels)}
    config = GuidanceConfig(path="stop_denoiser", **fields)
    guide = EntropyGuidance(config, logits_as_latents, lambda x: x)
    guide.start(len(rows), x.device, condition)
    t = torch.zeros(len(rows), dtype=torch.float64)  # the clean estimate is x itself
    found = guide.gradient(FLOW, x, torch.zeros_like(x), t, condition).flatten(1)
    left = ~found.any(1)
    assert guide.telemetry()["held"].tolist() == left.double().tolist()
    return found, left.tolist()


def held(rows: list[list[float]], labels: list[int], **fields) -> list[bool]:
    return pull(rows, labels, **fields)[1]


def test_ceiling_is_a_share_of_an_even_guess() -> None:
    sure, torn, wrong = [0.98, 0.01, 0.01], [0.5, 0.47, 0.03], [0.1, 0.88, 0.02]
    rows, labels = [sure, torn, wrong], [0, 0, 0]
    shares = {
        "entropy": [-(p * np.log(p)).sum() / math.log(3) for p in map(np.array, rows)],
        "loss": [-math.log(p[0]) / math.log(3) for p in rows],
        "margin": [1 - np.diff(np.sort(p))[-1] for p in rows],
    }
    shares["entropy_label"] = shares["entropy"]
    for name, values in shares.items():
        assert not any(held(rows, labels, criterion=name))
        for share in sorted(values):
            for ceiling in (share - 1e-6, share + 1e-6):
                if ceiling <= 1.0:
                    expected = [value > ceiling for value in values]
                    assert held(rows, labels, criterion=name, ceiling=ceiling) == expected
    assert max(shares["loss"]) > 1.0 > max(shares["margin"]) > 0.9
    assert held([[0.25] * 4], [0], criterion="entropy", ceiling=0.99) == [True]


@pytest.mark.parametrize("criterion", ["entropy", "loss", "margin", "entropy_label"])
def test_keep_label_pulls_back_what_was_flipped(criterion: str) -> None:
    """A flipped sample moves along onehot - p, down its loss; the others as without the option."""
    rows = [[0.5, 0.47, 0.03], [0.47, 0.5, 0.03], [0.2, 0.2, 0.6]]
    found, left = pull(rows, [0, 0, 2], criterion=criterion, keep_label=True)
    plain, _ = pull(rows, [0, 0, 2], criterion=criterion)
    assert left == [False] * 3 and torch.equal(found[[0, 2]], plain[[0, 2]])
    back = torch.tensor([1 - 0.47, -0.5, -0.03], dtype=torch.float64)
    torch.testing.assert_close(found[1], back)
    # A row without a class, as padding has: its label is the number of classes.
    assert held(rows, [3, 1, 3], criterion=criterion, keep_label=True) == [True, False, True]


@pytest.mark.parametrize("criterion", ["entropy", "loss", "margin", "entropy_label"])
def test_keep_label_pulls_back_from_above_the_ceiling_too(criterion: str) -> None:
    """All three are above the ceiling; the last row has no class, and so no loss to lower."""
    rows, labels = [[0.45, 0.5, 0.05], [0.46, 0.44, 0.1], [0.45, 0.5, 0.05]], [0, 0, 3]
    fields = {"criterion": criterion, "ceiling": 0.6}
    assert held(rows[:2], labels[:2], **fields) == [True, True]
    found, left = pull(rows, labels, keep_label=True, **fields)
    assert left == [False, True, True]
    back = torch.tensor([1 - 0.45, -0.5, -0.05], dtype=torch.float64)
    torch.testing.assert_close(found[0], back)


@pytest.mark.parametrize("criterion", ["loss", "entropy_label"])
def test_a_row_without_a_class_has_no_loss_to_raise(criterion: str) -> None:
    assert held([[0.5, 0.3, 0.2]] * 2, [1, 3], criterion=criterion) == [False, True]


@pytest.mark.parametrize("fields", [{"criterion": "loss"}, {"keep_label": True}])
def test_labels_are_needed_where_the_push_depends_on_them(fields: dict) -> None:
    guide = EntropyGuidance(GuidanceConfig(**fields), logits_as_latents, lambda x: x)
    with pytest.raises(UserError, match="needs a label.*criterion to entropy or margin"):
        sample(denoiser, FLOW, STEPS, torch.zeros(2, 4, 1, 1), {}, nulls=[{}], guide=guide)


@pytest.mark.parametrize(
    "fields",
    [
        {"label_weight": 0.2},
        {"label_weight": 0.2, "criterion": "loss"},
        {"interval": (0.5, 0.5)},
    ],
)
def test_a_field_without_effect_is_refused(fields: dict) -> None:
    with pytest.raises(ValueError, match="no effect|low < high"):
        GuidanceConfig(**fields)


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal")
        if function._schema.name.removeprefix("aten::") in waits:
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("criterion", ["entropy", "loss", "margin", "entropy_label"])
def test_a_push_reads_nothing_back(criterion: str) -> None:
    """Until the telemetry is asked for, no value leaves the device."""
    z, condition = torch.linspace(-1.0, 1.0, 16).view(4, 4, 1, 1), {"labels": torch.arange(4)}
    for fields in ({}, {"mode": "score", "path": "stop_denoiser", "blend": True}):
        config = GuidanceConfig(
            criterion=criterion, ceiling=0.9, keep_label=True, every=1, decode_rows=3, **fields
        )
        guide = EntropyGuidance(config, logits_as_latents, lambda x: x)
        with Reads() as reads:
            sample(denoiser, FLOW, STEPS, z, condition, nulls=[condition], guide=guide)
        assert reads.found == []
        with reads:
            float(z.sum())
        assert len(reads.found) == 1


class FromHost(TorchDispatchMode):
    """Counts operators that take or make a tensor of the CPU: constants, and copies of them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, made))
        if any(isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu" for leaf in leaves):
            self.found.append(str(function))
        return made


@pytest.mark.parametrize("criterion", ["entropy", "loss", "margin", "entropy_label"])
@pytest.mark.parametrize("path", ["full", "stop_denoiser"])
def test_a_push_takes_nothing_from_the_host(criterion: str, path: str, monkeypatch) -> None:
    """On a device of its own without values, which also refuses every read: `meta`."""
    config = LearnerConfig(
        model={"in_channels": 3, "channels": [8, 16], "groups": 4, "num_classes": 4},
        input_size=16,
        mean=[0.5, 0.4, 0.3],
        std=[0.2, 0.3, 0.2],
    )
    learner = Learner(config, 5, World(0, 1, 0, torch.device("cpu"))).frozen("ema").to("meta")
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # knows no `meta`
    x, t = torch.zeros(4, 3, 8, 8, device="meta"), torch.zeros(4, device="meta")
    condition = {"labels": torch.zeros(4, dtype=torch.int64, device="meta")}
    table = Objective(ObjectiveConfig(prediction="eps", schedule="linear"))
    table.schedule.coefficients(t)  # stays there from the first use on
    for objective, fields in ((FLOW, {}), (table, {"mode": "score", "blend": True})):
        fields |= {"decode_rows": 3}
        fields |= {"criterion": criterion, "ceiling": 0.9, "keep_label": True, "path": path}
        guide = EntropyGuidance(GuidanceConfig(**fields), learner, torch.tanh)
        guide.start(len(x), x.device, condition)
        leaf = x.detach().requires_grad_(guide.traces)
        output = denoiser(leaf, t, condition)
        with FromHost() as host:
            pushed = guide.push(objective, leaf, output, t, condition)
        assert host.found == [] and pushed.x.device.type == "meta"
        with host:
            pushed.x + torch.tensor([1.0, 2.0, 3.0])[:, None, None].to("meta")
        assert host.found[0] == "aten.lift_fresh.default" and "aten._to_copy.default" in host.found
        with pytest.raises(RuntimeError, match="meta"):
            float(pushed.x.sum())
