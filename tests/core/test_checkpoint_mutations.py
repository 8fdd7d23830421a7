"""Random damage to a good checkpoint: refused with one sentence, or without effect on any value."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from etude.core.checkpoint import read_weights, save_checkpoint
from etude.core.distributed import World
from etude.core.errors import UserError
from etude.core.optim import OptimConfig
from etude.core.strategy import StrategyConfig, build_strategy

MUTATIONS = 400


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small model after one step."""
    world = World(0, 1, 0, torch.device("cpu"))
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    config = StrategyConfig(kind="local")
    strategy = build_strategy(config, model, OptimConfig(ema=[0.9]), world)
    strategy.backward(strategy(torch.ones(2, 5)).square().mean())
    strategy.step(1e-2)
    folder = tmp_path_factory.mktemp("checkpoints")
    return save_checkpoint(folder, 64, strategy, {"classes": ["a"]}, world)


def damage(path: Path, random: np.random.Generator) -> None:
    """One change of one file: a bit, a cut, a block moved, zeros, a byte more, or a JSON value."""
    file = sorted(path.iterdir())[random.integers(len(list(path.iterdir())))]
    data = bytearray(file.read_bytes())
    at, kind = int(random.integers(len(data))), int(random.integers(6))
    if kind == 0:
        data[at] ^= 1 << int(random.integers(8))
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        data[at : at + 16] = data[:16]
    elif kind == 3:
        data[at : at + 32] = bytes(min(32, len(data) - at))
    elif kind == 4:
        data.insert(at, int(random.integers(256)))
    elif file.name == "manifest.json":
        body = json.loads(data)
        name = sorted(body)[random.integers(len(body))]
        body[name] = [None, -1, "x", [], {}, [{}]][random.integers(6)]
        data = bytearray(json.dumps(body).encode())
    else:
        file.rename(file.with_name("other.safetensors"))
        return
    file.write_bytes(data)


def test_damage_is_refused_or_changes_nothing(good: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    wanted = {profile: read_weights(good, profile) for profile in ("raw", "ema:0.9")}
    refused = 0
    for _ in range(MUTATIONS):
        copy = tmp_path / good.name
        shutil.copytree(good, copy)
        damage(copy, random)
        try:
            for profile, weights in wanted.items():
                read = read_weights(copy, profile)
                assert read.keys() == weights.keys()
                assert all(torch.equal(read[name], weights[name]) for name in weights)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
        shutil.rmtree(copy)
    assert refused > 0.9 * MUTATIONS
