"""A frozen Etude classifier as an extractor: penultimate features, and labels read off them.

The weights are a folder, as evaluation/judge.py writes it: `classifier.json` (the configuration and
the picture size) beside `classifier.safetensors`. Distances of its features are never called FID.
"""

import hashlib
import json
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from etude.core.errors import UserError
from etude.core.files import write_bytes_atomic, write_json_atomic
from etude.models.classifier import Classifier, ClassifierConfig

from . import resize_antialiased, to_channels

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


class ClassifierExtractor:
    """Penultimate features of a classifier saved by `save_classifier`.

    Args:
        folder: the classifier's folder, or the run that trained it (then its `judge/`).
    """

    name = "classifier"
    version = "1"
    resize = "bilinear, antialiased"

    def __init__(self, folder: Path) -> None:
        inside = folder / "judge"
        folder = inside if not (folder / CONFIG).exists() and inside.is_dir() else folder
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
        self.model.requires_grad_(False).eval()
        self.input_size, self.channels = int(about["image_size"]), config.in_channels
        self.classes: list[str] = list(about["classes"])
        self.dim = config.channels[-1]

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features (B, dim) float32 of images (B, H, W, C) uint8."""
        x = resize_antialiased(to_channels(images, self.channels), self.input_size)
        return self.model.features(x / 127.5 - 1.0)

    @torch.no_grad()
    def predict(self, features: torch.Tensor) -> torch.Tensor:
        """Labels (B,) int64 of features (B, dim)."""
        weight = self.model.head.weight
        return self.model.head(features.to(weight)).argmax(1).to("cpu")

    def to(self, device: torch.device | str) -> "ClassifierExtractor":
        """Move the network; returns itself."""
        self.model.to(device)
        return self
