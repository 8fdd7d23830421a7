"""A frozen Etude classifier as an extractor: penultimate features, and labels read off them.

The weights are a folder, as evaluation/judge.py writes it: `classifier.json` (the configuration and
the picture size) beside `classifier.safetensors`. Distances of its features are never called FID.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from etude.core.errors import UserError
from etude.core.files import write_bytes_atomic, write_json_atomic
from etude.models.classifier import Classifier, ClassifierConfig

from .base import Backbone, extractor, resize_antialiased

CONFIG, WEIGHTS = "classifier.json", "classifier.safetensors"


def save_classifier(folder: Path, model: Classifier, image_size: int, classes: list[str]) -> None:
    """Write a classifier of pictures of `image_size` pixels to a folder; the weights first."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    data = save(state)
    write_bytes_atomic(folder / WEIGHTS, data)
    about = {
        "model": model.config.model_dump(mode="json"),
        "image_size": image_size,
        "classes": classes,
        "weights_sha256": hashlib.sha256(data).hexdigest(),
    }
    write_json_atomic(folder / CONFIG, about)


@extractor("classifier")
class ClassifierBackbone(Backbone):
    """Penultimate features of a classifier saved by `save_classifier`.

    Args:
        weights: the classifier's folder, or the run that trained it (then its `judge/`).

    Attributes:
        model: the classifier.
        classes: names of its classes.
    """

    version = "2"  # 1 did not round the luma of colour pictures
    resize = "bilinear, antialiased"

    def __init__(self, weights: Path) -> None:
        super().__init__()
        inside = weights / "judge"
        folder = inside if not (weights / CONFIG).exists() and inside.is_dir() else weights
        try:
            about = json.loads((folder / CONFIG).read_text())
            data = (folder / WEIGHTS).read_bytes()
            config = ClassifierConfig(**about["model"])
            self.model = Classifier(config)
            self.model.load_state_dict(load(data))
        except FileNotFoundError:
            raise UserError(
                f"no classifier in {folder} ({CONFIG} and {WEIGHTS}); train one with "
                f"`etude train evaluate/judge_digits` and name its folder"
            ) from None
        except (ValueError, KeyError, RuntimeError, SafetensorError, ValidationError) as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"the classifier in {folder} cannot be read: {reason}") from None
        self.weights_sha256 = hashlib.sha256(data).hexdigest()
        if self.weights_sha256 != about.get("weights_sha256"):
            raise UserError(f"{folder / WEIGHTS} is not the file that {CONFIG} was written with")
        self.input_size, self.channels = int(about["image_size"]), config.in_channels
        self.classes: list[str] = list(about["classes"])
        self.taps = {"features": config.channels[-1]}

    def prepare(self, images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Pictures (B, channels, input_size, input_size) in [-1, 1]."""
        x = resize_antialiased(images.permute(0, 3, 1, 2).float(), self.input_size)
        return (x / 127.5 - 1.0).to(dtype)

    def forward(self, x: torch.Tensor, taps: Sequence[str]) -> dict[str, torch.Tensor]:
        """Penultimate features (B, length)."""
        return {"features": self.model.features(x)}

    @torch.no_grad()
    def predict(self, features: torch.Tensor) -> torch.Tensor:
        """Labels (B,) int64 of features (B, length)."""
        weight = self.model.head.weight
        return self.model.head(features.to(weight)).argmax(1).to("cpu")
