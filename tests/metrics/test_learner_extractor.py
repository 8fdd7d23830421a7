"""A practising learner as an extractor, against the network that practice itself looks with."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from etude.core.checkpoint import save_checkpoint
from etude.core.distributed import World
from etude.core.errors import UserError
from etude.core.files import write_json_atomic
from etude.metrics.extractors import Extractor
from etude.practice.learner import Learner, LearnerConfig, frozen_bytes

HERE = World(0, 1, 0, torch.device("cpu"))
COMMON = {"batch": 8, "lr": 2e-2, "ema": 0.6, "shift": 0}
LEVELS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.3]}
VIT = {"family": "vit", "input_size": 16, "patch_size": 4, "hidden_size": 24, "depth": 2}
LEARNERS = {
    "small": {"model": {"in_channels": 1, "num_classes": 4, "channels": [8, 16], "groups": 4}},
    "vit": LEVELS | {"model": VIT | {"num_heads": 3, "num_classes": 4}},
    "resnet": LEVELS
    | {"input_size": 16}
    | {"model": {"family": "resnet", "num_classes": 4, "width": 8, "stem": "small"}},
}
SIZE = 16


def trained(fields: dict, steps: int = 4) -> Learner:
    """A learner after some steps, far enough that weights and averages differ."""
    learner = Learner(LearnerConfig(**COMMON, **fields), 3, HERE)
    channels = learner.config.model.in_channels

    def fetch(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images = np.random.default_rng(int(positions[0])).integers(
            0, 256, (len(positions), SIZE, SIZE, channels), dtype=np.uint8
        )
        return images, positions % 4

    for step in range(steps):
        learner.step(fetch, step, 1.0)
    return learner


def run_of(folder: Path, fields: dict, learner: Learner, arms: tuple[str, ...]) -> Path:
    """A practice run as it lies on the disk."""
    pictures = {"image_size": SIZE, "channels": learner.config.model.in_channels}
    recipe = {"kind": "practice", "learner": COMMON | fields, "pictures": pictures}
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for arm in arms:
        place = folder / "arms" / arm / "checkpoints"
        save_checkpoint(place, 32, learner.strategy, {"state": {}}, HERE)
    return folder


def pictures(channels: int, size: int = SIZE) -> torch.Tensor:
    levels = np.random.default_rng(7).integers(0, 256, (5, size, size, channels), dtype=np.uint8)
    return torch.from_numpy(levels)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", list(LEARNERS))
@pytest.mark.parametrize("average", [True, False])
def test_a_runs_learner_gives_the_logits_that_practice_sees(tmp_path, name, average) -> None:
    learner = trained(LEARNERS[name])
    run = run_of(tmp_path / "run", LEARNERS[name], learner, ("practice", "static"))
    extractor = Extractor("learner", run, taps=("logits", "features"), average=average)
    other = Extractor("learner", run, average=not average)
    assert extractor.weights_sha256 != other.weights_sha256
    for size in (SIZE, 23):
        if name == "small" and size != SIZE:
            continue  # practice shows this one pictures as they come
        x = pictures(extractor.channels, size)
        frozen = learner.frozen("ema" if average else "raw")
        seen = x.permute(0, 3, 1, 2).float() / 127.5 - 1.0
        with torch.no_grad():
            logits, features = frozen(seen), frozen.network.features(frozen.prepare(seen))
        found = extractor.features(x)
        close(found["learner/logits"], logits)
        close(found["learner"], features)


def test_an_arms_folder_and_a_guides_file_are_read_too(tmp_path) -> None:
    fields = LEARNERS["small"]
    learner = trained(fields)
    run = run_of(tmp_path / "run", fields, learner, ("static",))
    whole, arm = Extractor("learner", run), Extractor("learner", run / "arms" / "static")
    pool = run / "pools" / "practice"
    (pool / "learners").mkdir(parents=True)
    file = pool / "learners" / "0123.safetensors"
    file.write_bytes(frozen_bytes(learner.frozen("ema")))
    write_json_atomic(pool / "origin.json", {"learner": learner.config.model_dump(mode="json")})
    with pytest.raises(UserError, match="input_size=PIXELS"):
        Extractor("learner", file)
    guide = Extractor("learner", file, input_size=SIZE)
    x = pictures(1)
    assert torch.equal(whole(x), arm(x)) and torch.equal(whole(x), guide(x))
    assert whole.weights_sha256 == arm.weights_sha256 == guide.weights_sha256


def test_what_is_no_learner_is_refused_in_one_sentence(tmp_path) -> None:
    run = run_of(tmp_path / "run", LEARNERS["small"], trained(LEARNERS["small"], 1), ("a", "b"))
    for weights, options, said in (
        (tmp_path, {}, "no practice run"),
        (run, {}, "no arm 'practice'; set arm to one of a, b"),
        (run / "arms" / "a", {"arm": "b"}, "leave out arm=b"),
        (run, {"arm": "b", "input_size": -1}, "at least 0"),
    ):
        with pytest.raises(UserError, match=said):
            Extractor("learner", weights, **options)
    (run / "arms" / "c").mkdir()
    with pytest.raises(UserError, match="no checkpoint yet"):
        Extractor("learner", run, arm="c")


def test_a_network_of_ones_own_without_features_gives_logits(tmp_path, monkeypatch) -> None:
    (tmp_path / "own_network.py").write_text(
        "from torch import nn\n"
        "def make(in_channels, num_classes, seed):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * 256, num_classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = {"family": "imported", "target": "own_network:make", "num_classes": 4}
    learner = trained({"model": model}, 2)
    run = run_of(tmp_path / "run", {"model": model}, learner, ("real",))
    extractor = Extractor("learner", run)
    assert extractor.name == "learner" and list(extractor.backbone.taps) == ["logits"]
    frozen: nn.Module = learner.frozen("ema")
    x = pictures(3)
    with torch.no_grad():
        close(extractor(x), frozen(x.permute(0, 3, 1, 2).float() / 127.5 - 1.0))
