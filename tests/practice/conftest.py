"""A Gaussian mixture whose exact denoiser is known, for the whole loop in seconds.

Class c is N(mean_c, spread^2) in every pixel (stripes, or a chequerboard), so the exact flow
prediction is in closed form and the real `Generator` draws true samples in milliseconds.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from etude.conditions import Conditions
from etude.core.distributed import World
from etude.core.log import Log
from etude.core.run import Run
from etude.core.signals import Stopper
from etude.data.shards import write_shards
from etude.diffusion.objectives import Objective, ObjectiveConfig
from etude.diffusion.samplers import SamplerConfig
from etude.models.conditioning import ConditioningConfig
from etude.practice.recipe import PracticeRecipe
from etude.practice.rounds import practise
from etude.sampling import Generator

CLASSES, SIZE, SPREAD, AMPLITUDE = ["a", "b", "c"], 8, 0.3, 0.2


class Mixture(nn.Module):
    """The exact flow prediction E[eps - x0 | x_t, class] of a Gaussian class."""

    def __init__(self) -> None:
        super().__init__()
        wave = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(SIZE // 4)
        rows, columns = wave[:, None].expand(SIZE, SIZE), wave[None, :].expand(SIZE, SIZE)
        means = AMPLITUDE * torch.stack([rows, columns, rows * columns])
        self.register_buffer("means", means[:, None])

    def forward(self, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        labels = condition["labels"]
        sigma = (t / 1000.0).view(-1, 1, 1, 1)
        alpha = 1.0 - sigma
        mean = self.means[labels.clamp(max=len(CLASSES) - 1)]
        gain = SPREAD**2 * alpha / (alpha**2 * SPREAD**2 + sigma**2)
        x0 = mean + gain * (x - alpha * mean)
        return (x - alpha * x0) / sigma - x0

    def real(self, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Pictures (n, S, S) uint8 of the true distribution, and their classes."""
        chance = np.random.default_rng(seed)
        labels = np.arange(count) % len(CLASSES)
        x = self.means.numpy()[labels, 0] + SPREAD * chance.normal(size=(count, SIZE, SIZE))
        return np.rint((x + 1) * 127.5).clip(0, 255).astype(np.uint8), labels


def sampler(steps: int = 10) -> SamplerConfig:
    return SamplerConfig(steps=steps, guidance_convention="lambda")


def toy_generator(training_shards: str = "") -> Generator:
    return Generator(
        Mixture(),
        Objective(ObjectiveConfig()),
        sampler(),
        None,
        CLASSES,
        (1, SIZE, SIZE),
        Conditions(ConditioningConfig(), len(CLASSES), SIZE, torch.device("cpu")),
        name="the toy",
        fingerprint="toy",
        training_shards=training_shards,
    )


def write_split(folder: Path, count: int, seed: int, classes: list[str] = CLASSES) -> str:
    def samples():
        for row, (pixels, label) in enumerate(zip(*Mixture().real(count, seed), strict=True)):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            yield {
                "key": f"{seed}-{row}",
                "image": buffer.getvalue(),
                "extension": "png",
                "label": int(label),
            }

    write_shards(folder, samples(), classes=classes)
    return str(folder)


class Around:
    """The toy's generator with something done around its drawing.

    Args:
        draw: (inner generator's draw, indices, labels, **more) -> what `draw` returns.
    """

    def __init__(self, draw) -> None:
        self._inner, self._draw = toy_generator(), draw

    def __getattr__(self, name: str):
        return getattr(self._inner, name)

    def draw(self, indices: np.ndarray, labels: np.ndarray, **more):
        return self._draw(self._inner.draw, indices, labels, **more)


@dataclass(frozen=True)
class Toy:
    """The mixture's splits, and everything that a practice run needs beside them.

    Attributes:
        splits: folders of real pictures: monitor, test, real_train, and the generator's own.
    """

    splits: dict[str, str]
    size: ClassVar[int] = SIZE
    alone: ClassVar[World] = World(0, 1, 0, torch.device("cpu"))
    mixture: ClassVar[type] = Mixture
    generator: ClassVar = staticmethod(toy_generator)
    around: ClassVar[type] = Around
    write_split: ClassVar = staticmethod(write_split)

    def recipe(self, **changes) -> PracticeRecipe:
        fields = {
            "kind": "practice",
            "name": "toy",
            "seed": 3,
            "generator": "toy",
            "sampler": sampler().model_dump(),
            "pictures": {"image_size": SIZE, "channels": 1, "crop": "none"},
            "monitor": self.splits["monitor"],
            "test": self.splits["test"],
            "real_train": self.splits["real_train"],
            "learner": {
                "model": {"num_classes": 3, "channels": (8, 16), "groups": 4},
                "batch": 16,
                "lr": 5e-3,
                "ema": 0.9,
            },
            "schedule": {"steps": 60},
            "trigger": {"evaluate_every": 4, "patience": 1, "patience_growth": 0.5},
            "guidance": {"omega": 0.1, "every": 2},
            "start_samples": 60,
            "round_samples": 30,
            "chunk": 64,
            "probe_samples": 30,
            "save_every": 7,
            "arms": ["real", "practice", "static", "omega0"],
        }
        return PracticeRecipe.model_validate({**fields, **changes})

    def run(
        self,
        config: PracticeRecipe,
        root: Path,
        stopper: Stopper | None = None,
        training: str = "",
    ) -> dict:
        torch.set_num_threads(1)
        with Run.open(config, root=root, name="toy") as run:
            log = Log(run.folder, quiet=True)
            return practise(config, run, toy_generator(training), log, stopper or Stopper())

    @staticmethod
    def real_batch(count: int):
        """The same real pictures at every step."""
        pictures, labels = Mixture().real(count, 9)
        return lambda positions: (pictures[..., None], labels)

    @staticmethod
    def timeless(result: dict) -> dict:
        """A result without the seconds that it took."""
        return {
            name: {key: value for key, value in arm.items() if not key.endswith("seconds")}
            for name, arm in result["arms"].items()
        } | {"differences": result["differences"]}


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    root = tmp_path_factory.mktemp("splits")
    counts = {"monitor": 120, "test": 300, "real_train": 90, "generators": 90}
    return Toy(
        {
            name: write_split(root / name, count, seed)
            for seed, (name, count) in enumerate(counts.items())
        }
    )
