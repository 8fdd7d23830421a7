"""The judge: a frozen classifier of real pictures, used as extractor and to label drawn ones.

`train_judge` trains it in seconds on small pictures; `open_judge` reads it back. Called by the
demo, by training's sample grids and by plan.py through metrics/extractors/classifier.py. The judge
must see training pictures only: what it is asked about later must be new to it.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from etude.core.config import Config, option
from etude.core.errors import UserError
from etude.core.log import Log
from etude.core.recipe import Recipe
from etude.core.rng import Stream, permute, uniform
from etude.core.run import Run
from etude.metrics.extractors import Extractor, resize_antialiased
from etude.metrics.extractors.classifier import save_classifier
from etude.models.classifier import Classifier, ClassifierConfig

from .sets import ShardPictures, Stages


class JudgeConfig(Config):
    """A classifier and its training; the defaults suit the digits."""

    image_size: int = option(16, "side that pictures are brought to", unit="pixels", ge=4)
    model: ClassifierConfig = option(
        ClassifierConfig(channels=(16, 32, 64)), "the network; the number of classes is the data's"
    )
    images: int = option(24_000, "training pictures seen", unit="images", gt=0)
    batch_size: int = option(64, "pictures per step", unit="images", gt=0)
    lr: float = option(3e-3, "largest learning rate of AdamW, falling to 0 as a cosine", gt=0)
    weight_decay: float = option(0.01, "weight decay of AdamW", ge=0)
    shift: int = option(1, "pictures are shifted by up to so much", unit="pixels", ge=0)


class JudgeRecipe(Recipe):
    """Train a judge on real pictures."""

    kind: Literal["judge"] = option("judge", "which job this is")
    shards: str = option(..., "folder of labelled training pictures (shards)")
    held_out: str = option("", "folder of labelled pictures whose accuracy is reported")
    judge: JudgeConfig = option(JudgeConfig(), "the classifier and its training")


class Judge:
    """A frozen classifier that labels pictures; calling it is calling `labels`.

    Args:
        source: its folder, or the run that trained it.
    """

    def __init__(self, source: str | Path, device: torch.device | str = "cpu") -> None:
        self.extractor = Extractor("classifier", source, device=device)
        self.classes = self.extractor.backbone.classes

    def labels(self, images: np.ndarray, batch_size: int = 256) -> np.ndarray:
        """Labels (N,) int64 of pictures (N, H, W, C) uint8."""
        found = [
            self.extractor.backbone.predict(self.extractor(block))
            for block in torch.from_numpy(np.ascontiguousarray(images)).split(batch_size)
        ]
        return torch.cat(found).numpy()

    __call__ = labels

    def logits(self, pictures: Tensor) -> Tensor:
        """Logits (B, classes) of pictures (B, C, S, S) float32 in [-1, 1], as a learner gives."""
        network = self.extractor.backbone
        levels = resize_antialiased((pictures + 1.0) * 127.5, network.input_size)
        return network.model(levels / 127.5 - 1.0)


def open_judge(source: str | Path, device: torch.device | str = "cpu") -> Judge:
    """The judge in a folder or of a run; `UserError` when there is none."""
    return Judge(source, device)


def run_judge(recipe: JudgeRecipe, run: Run, log: Log | None = None) -> dict[str, Any]:
    """Train a recipe's judge into `judge/` of a run; returns its folder and held-out accuracy."""
    log = log or Log(run.folder, quiet=True)
    folder = train_judge(recipe.shards, recipe.judge, recipe.seed, run.folder / "judge", log)
    result: dict[str, Any] = {"judge": str(folder)}
    if recipe.held_out:
        result["held_out_accuracy"] = accuracy(folder, recipe.held_out)
        log.info(f"the judge is right about {result['held_out_accuracy']:.2%} of held-out pictures")
    return result


def train_judge(
    shards: str | Path, config: JudgeConfig, seed: int, folder: Path, log: Log | None = None
) -> Path:
    """Train a judge on a folder of labelled shards and save it; equal inputs give equal weights.

    Returns:
        `folder`, which `open_judge` and the classifier extractor read. Under a second per
        thousand pictures seen on one core for the digits.

    Raises:
        UserError: the shards have no labels.
    """
    log = log or Log(None, quiet=True)
    images, labels, classes = _read(shards, config)
    model = Classifier(_shape(config, len(classes)), seed=seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, weight_decay=config.weight_decay
    )
    steps = -(-config.images // config.batch_size)
    model.train()
    with log.progress("training the judge", steps * config.batch_size) as progress:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = config.lr * (1 + math.cos(math.pi * step / steps)) / 2
            first = step * config.batch_size
            positions = first + np.arange(config.batch_size, dtype=np.int64)
            rows = _rows(positions, len(images), seed)
            batch = _shifted(images[rows], config.shift, seed, positions)
            loss = F.cross_entropy(model(batch), labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            progress.advance(config.batch_size)
    save_classifier(Path(folder), model.eval(), config.image_size, classes)
    return Path(folder)


def accuracy(judge: str | Path, shards: str | Path) -> float:
    """Share of labelled shards' pictures that a judge labels rightly.

    Raises:
        UserError: there is no judge, or the shards have other classes.
    """
    judge = open_judge(judge)
    pictures = ShardPictures(
        shards, size=judge.extractor.input_size, channels=judge.extractor.channels
    )
    all_of_them = pictures.read(0, len(pictures), Stages())
    asked = as_judged(
        torch.from_numpy(all_of_them.labels), pictures.classes, judge.classes, pictures.name
    )
    return float((judge.labels(all_of_them.images) == asked.numpy()).mean())


def as_judged(labels: Tensor, classes: Sequence[str], judged: Sequence[str], name: str) -> Tensor:
    """Labels (N,) int64 of pictures in a judge's numbers, found by name; -1 stays.

    Where the pictures or the judge have no names, or numbers for names, labels are taken to be the
    judge's already.

    Args:
        classes: names of the pictures' classes.
        judged: names of the judge's.
        name: the pictures, as a message says it.

    Raises:
        UserError: both have names, and the judge lacks one of the pictures'.
    """
    if list(classes) == list(judged) or not classes or not judged:
        return labels
    place = {one: number for number, one in enumerate(judged)}
    if set(classes) <= set(place) and len(place) == len(judged):
        numbers = torch.tensor([place[one] for one in classes])
        return torch.where(labels < 0, labels, numbers[labels.clamp_min(0)])
    if any(list(names) == [str(n) for n in range(len(names))] for names in (classes, judged)):
        return labels
    raise UserError(
        f"{name} has the classes {_few(classes)} and the judge {_few(judged)}; give the pictures "
        "the judge's names, or train a judge on theirs"
    )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _read(shards: str | Path, config: JudgeConfig) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Pictures (N, C, S, S) in [-1, 1], labels (N,) and class names."""
    pictures = ShardPictures(shards, size=config.image_size, channels=config.model.in_channels)
    found = pictures.read(0, len(pictures), Stages())
    if (found.labels < 0).any():
        raise UserError(f"{shards} holds pictures without a label; a judge needs labels for all")
    classes = pictures.classes or [str(n) for n in range(int(found.labels.max()) + 1)]
    images = torch.from_numpy(found.images).permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1.0
    return images.contiguous(), torch.from_numpy(found.labels), classes


def _shape(config: JudgeConfig, num_classes: int) -> ClassifierConfig:
    try:
        return ClassifierConfig(**(config.model.model_dump() | {"num_classes": num_classes}))
    except ValidationError:
        raise UserError(
            f"a judge needs two classes or more, the shards have {num_classes}"
        ) from None


def _rows(positions: np.ndarray, size: int, seed: int) -> torch.Tensor:
    """Row of each position: pass after pass over the pictures, each in its own order."""
    passes = positions // size
    rows = np.empty_like(positions)
    for turn in np.unique(passes):
        here = passes == turn
        rows[here] = permute(positions[here] % size, size, seed, Stream.ORDER, int(turn))
    return torch.from_numpy(rows)


def _shifted(images: torch.Tensor, most: int, seed: int, positions: np.ndarray) -> torch.Tensor:
    """Each picture moved by whole pixels, up to `most` each way; the edge pixels are repeated."""
    if most == 0:
        return images
    moves = uniform(seed, Stream.CROP, positions, 2) * (2 * most + 1)
    top, left = torch.from_numpy(moves.astype(np.int64)).unbind(1)
    padded = F.pad(images, (most,) * 4, mode="replicate")
    size = torch.arange(images.shape[-1])
    batch = torch.arange(len(images))[:, None, None]
    rows = (top[:, None] + size)[:, :, None]
    columns = (left[:, None] + size)[:, None, :]
    return padded.permute(0, 2, 3, 1)[batch, rows, columns].permute(0, 3, 1, 2)
