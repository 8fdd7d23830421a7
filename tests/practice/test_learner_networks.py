"""Learners of a user's own networks, of probes, and in bf16: what is trained, kept and refused."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from etude.core.checkpoint import load_checkpoint, save_checkpoint
from etude.core.distributed import World
from etude.core.errors import UserError
from etude.core.rng import Stream, bits
from etude.core.strategy import StrategyConfig
from etude.metrics.extractors.classifier import save_classifier
from etude.models.batchnorm import BatchNorm
from etude.models.classifier import Classifier, ClassifierConfig
from etude.models.classifiers import build_classifier
from etude.models.vit import ViT, ViTConfig
from etude.practice.learner import (
    Learner,
    LearnerConfig,
    frozen_bytes,
    load_frozen,
    weights_hash,
)

WORKER = Path(__file__).parent / "workers" / "learners.py"
HERE = World(0, 1, 0, torch.device("cpu"))
NETWORKS = """
import torch
from torch import nn
from etude.models.batchnorm import BatchNorm

class Headed(nn.Sequential):
    def forward(self, x):
        return self[-1](super().forward(x)[:, : self[-1].in_features])

def stack(norm, in_channels, num_classes, **_):
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3, bias=False), norm(4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))

def plain(**sizes):
    return stack(nn.BatchNorm2d, **sizes)

def wide(**sizes):
    return stack(BatchNorm, **sizes)

def headed(**sizes):
    return Headed(*stack(nn.BatchNorm2d, **sizes)[:-1], nn.Linear(4, 4))

def dropping(**sizes):
    return nn.Sequential(nn.Dropout(0.3), *stack(nn.BatchNorm2d, **sizes))
"""


def load_worker():
    spec = importlib.util.spec_from_file_location("learners_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker = load_worker()


@pytest.fixture(autouse=True)
def networks(tmp_path, monkeypatch) -> None:
    """The module `own_networks` that recipes import from."""
    (tmp_path / "own_networks.py").write_text(NETWORKS)
    monkeypatch.syspath_prepend(str(tmp_path))


def fields(name: str, **others) -> dict:
    model = {"family": "imported", "target": f"own_networks:{name}", "num_classes": 4}
    return {"model": model, "batch": 8, "lr": 2e-3, "ema": 0.6, "shift": 0, "clip": 0.0} | others


def new(section: dict, precision: str = "fp32") -> Learner:
    config = StrategyConfig(kind="local", precision=precision)
    return Learner(LearnerConfig(**section), 3, HERE, config)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize("name", ["plain", "headed"])
def test_a_sequential_of_the_users_own_is_trained_as_it_is(name: str) -> None:
    """Weights and running statistics of torch's own loop; averages by their rule in float64."""
    learner = new(fields(name, weight_decay=0.0))
    plain = build_classifier(learner.config.model, seed=3)
    optimizer = torch.optim.AdamW(plain.parameters(), 2e-3, weight_decay=0.0)
    average = {n: t.double() for n, t in plain.state_dict().items()}
    for step in range(5):
        images, labels = worker.fetch(np.arange(8) + 8 * step)
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        loss = F.cross_entropy(plain(x), torch.from_numpy(labels), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(learner.step(worker.fetch, step, 1.0), loss.detach())
        decay = min(0.6, (1 + step) / (10 + step))
        for n, value in plain.state_dict().items():
            average[n] = decay * average[n] + (1 - decay) * value.double()
    for weights, expected in (("raw", plain.state_dict()), ("ema", average)):
        found = state(learner.frozen(weights).network)
        assert found.keys() == expected.keys()
        for n, value in found.items():
            if value.is_floating_point():
                torch.testing.assert_close(
                    value.double(), expected[n].double(), rtol=1e-4, atol=1e-5
                )


@pytest.mark.parametrize("name", ["resnet", "small", "wide", "probe"])
def test_a_bf16_learner_is_frozen_in_float32(name: str, tmp_path) -> None:
    """What is frozen is the float32 state itself, finer than bf16, and a file brings it back."""
    probe = {"family": "probe", "weights": str(tmp_path), "num_classes": 4}
    save_classifier(tmp_path, Classifier(ClassifierConfig(**worker.SMALL)), 16, [])
    own = {"resnet": worker.RESNET, "small": worker.SMALL, "probe": probe}.get(name)
    learner = new(fields("wide") | ({"model": own} if own else {}), "bf16")
    for step in range(4):
        learner.step(worker.fetch, step, 1.0)
    for weights, kept in (("raw", "weight"), ("ema", "ema0")):
        frozen, finer = learner.frozen(weights), 0
        exact = {n.removeprefix("network."): t for n, t in learner.strategy.full(kept)}
        for n, value in frozen.network.state_dict().items():
            assert value.dtype == (torch.float32 if value.is_floating_point() else torch.int64), n
            if n in exact:
                assert torch.equal(value, exact.pop(n)), n
                finer += not torch.equal(value, value.bfloat16().float())
        assert not exact and finer > 1
        (tmp_path / weights).write_bytes(frozen_bytes(frozen))
        again, x = load_frozen(learner.config, tmp_path / weights), torch.rand(2, 3, 16, 16)
        assert torch.equal(again(x), frozen(x)) and weights_hash(again) == weights_hash(frozen)


def test_statistics_that_bf16_would_round_are_refused() -> None:
    with pytest.raises(UserError, match="1 is a BatchNorm2d .* bf16: .*etude.models.batchnorm"):
        new(fields("plain"), "bf16")
    network = new(fields("wide"), "bf16").frozen("raw").network
    assert isinstance(network[1], BatchNorm)


def test_dropout_is_drawn_by_step_and_from_no_hidden_state(tmp_path) -> None:
    """Resumed beside other numbers, a learner goes on alike; one step has the mask it should."""
    straight, stopped, resumed = (new(fields("dropping")) for _ in range(3))
    losses: list[list[float]] = [[], []]
    for step in range(6):
        torch.manual_seed(step)
        before = torch.get_rng_state()
        losses[0].append(float(straight.step(worker.fetch, step, 1.0)))
        assert torch.equal(before, torch.get_rng_state())
    for step in range(3):
        losses[1].append(float(stopped.step(worker.fetch, step, 1.0)))
    load_checkpoint(save_checkpoint(tmp_path, 3, stopped.strategy, {}, HERE), resumed.strategy)
    for step in range(3, 6):
        torch.manual_seed(100)
        losses[1].append(float(resumed.step(worker.fetch, step, 1.0)))
    assert losses[0] == losses[1]
    assert same(state(straight.frozen("ema")), state(resumed.frozen("ema")))
    learner, kept = new(fields("dropping")), []
    learner.strategy.module.network[0].register_forward_hook(lambda _, x, y: kept.append((x[0], y)))
    for step in (4, 4, 5):
        learner.step(worker.fetch, step, 1.0)
    high, low = (int(word) for word in bits(3, Stream.DROPOUT, np.array([32]), 2)[0])
    drawn = torch.Generator().manual_seed((high << 32) | low)
    mask = torch.empty_like(kept[0][0]).bernoulli_(0.7, generator=drawn)
    torch.testing.assert_close(kept[0][1], kept[0][0] * mask / 0.7)
    assert torch.equal(kept[0][1], kept[1][1])
    assert not torch.equal(kept[0][1] == 0, kept[2][1] == 0)


def test_a_probe_sees_pictures_of_its_backbones_size(tmp_path) -> None:
    """A file's section says it, and a judge's folder; neither is read where input_size is set."""
    about = {k: v for k, v in worker.VIT.items() if k != "family"}
    vit = ViT(ViTConfig(**about), seed=2)
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    save_classifier(tmp_path / "judge", Classifier(ClassifierConfig(**worker.SMALL)), 12, [])
    save_classifier(tmp_path / "large", vit, 16, [])
    probe = {"family": "probe", "num_classes": 4}
    by_file = probe | {"weights": str(tmp_path / "vit.safetensors"), "backbone": worker.VIT}
    small = probe | {"weights": str(tmp_path)}
    large = probe | {"weights": str(tmp_path / "large")}
    images = np.random.default_rng(0).integers(0, 256, (8, 40, 40, 3), np.uint8)
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1.0
    for model, side in ((by_file, 16), (small, 12), (large, 16)):
        learner, kept = new(fields("plain", model=model)), []
        learner.strategy.module.register_forward_pre_hook(lambda _, x, kept=kept: kept.append(x[0]))
        learner.step(lambda positions: (images, positions % 4), 0, 1.0)
        expected = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
        torch.testing.assert_close(kept[0], expected, rtol=0, atol=2e-6)
    assert LearnerConfig(model=small, input_size=24).side == 24
    (tmp_path / "judge" / "classifier.json").write_text(json.dumps([]))
    assert LearnerConfig(model=small).side == 0
    absent = probe | {"weights": str(tmp_path / "nothing")}
    assert LearnerConfig(model=absent).side == 0
    with pytest.raises(ValidationError, match="input_size=32 but model.backbone.input_size=16"):
        LearnerConfig(model=by_file, input_size=32)
