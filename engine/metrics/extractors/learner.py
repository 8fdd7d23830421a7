"""A learner that `etude practice` trained, as an extractor of its own features and logits.

Three places hold one: a practice run (the arm's newest checkpoint), one arm's folder in it, and the
weights of a learner that guided a pool's pictures (`pools/ARM/learners/*.safetensors`, which the
pool's `origin.json` describes). Pictures take the path that they take in training's looks: to the
learner's size (bilinear, antialiased, not rounded), then its mean and deviation, or [-1, 1].
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from etude.core.checkpoint_read import MANIFEST, latest_checkpoint, read_weights
from etude.core.errors import UserError
from etude.core.files import read_json
from etude.core.recipe_tree import parse, to_plain
from etude.models.classifiers import LearnerModelConfig, build_classifier
from etude.models.probe import ProbeConfig, backbone_size

from .base import Backbone, extractor, resize_antialiased
from .weights import fill, parts, read_tensors

_AVERAGES, _NETWORK = "buffer_averages.", "network."  # in a checkpoint of a learner with buffers


@extractor("learner")
class LearnerBackbone(Backbone):
    """Penultimate features and logits of a learner; a network of the user's own may have none.

    Args:
        weights: a practice run, an arm's folder, or a pool's file of a learner.
        arm: which arm of a run; by default `practice`, or the only one.
        average: the average of the weights, as training looks at them, or the newest weights;
            a pool's file holds one of the two.
        input_size: side of the pictures, for a learner that has none and does not say it.

    Attributes:
        network: the classifier.
    """

    resize = "bilinear, antialiased"
    half = "autocast"

    def __init__(
        self, weights: Path, arm: str = "", average: bool = True, input_size: int = 0
    ) -> None:
        super().__init__()
        if input_size < 0:
            raise UserError(f"input_size={input_size} must be at least 0 pixels")
        section, state, size = _read(weights, arm, average)
        try:
            model = TypeAdapter(LearnerModelConfig).validate_python(section["model"], strict=False)
        except (KeyError, ValidationError) as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"{weights} does not say its learner's network: {reason}") from None
        own = section.get("input_size") or getattr(model, "input_size", 0)
        if not own and isinstance(model, ProbeConfig):
            own = backbone_size(model)
        if own and input_size not in (0, own):
            raise UserError(f"this learner sees {own} pixels; leave out input_size={input_size}")
        self.input_size = own or input_size or size
        if not self.input_size:
            raise UserError(f"{weights} does not say how large pictures are; set input_size=PIXELS")
        self.network = build_classifier(model)
        self.weights_sha256 = fill(self.network, state, weights)
        # What the weights do not say: activations, heads, whatever the section names.
        section_text = json.dumps(model.model_dump(mode="json"), sort_keys=True)
        self.version = f"1 {hashlib.sha256(section_text.encode()).hexdigest()[:12]}"
        self.channels = model.in_channels
        mean, std = section.get("mean"), section.get("std")
        self.levels = None if mean is None else (mean, std)
        self.resize += "" if mean is None else f", levels {mean} and {std}"
        classes = {"logits": model.num_classes}
        features = hasattr(self.network, "features") and hasattr(self.network, "num_features")
        self.taps = ({"features": self.network.num_features} if features else {}) | classes

    def prepare(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """Pictures (B, channels, input_size, input_size) at the learner's levels."""
        x = resize_antialiased(images.permute(0, 3, 1, 2).float(), self.input_size)
        if self.levels is None:
            return (x / 127.5 - 1.0).to(dtype)
        mean, std = (torch.tensor(v, device=x.device).reshape(-1, 1, 1) for v in self.levels)
        return ((x / 255.0 - mean) / std).to(dtype)

    def forward(self, x: Tensor, taps: Sequence[str]) -> dict[str, Tensor]:
        """Features (B, length) and logits (B, classes)."""
        if "features" not in self.taps:
            return {"logits": self.network(x)}
        found = {"features": self.network.features(x)}
        if "logits" in taps:
            head = getattr(self.network, "head", getattr(self.network, "fc", None))
            found["logits"] = self.network(x) if head is None else head(found["features"])
        return found


def _read(weights: Path, arm: str, average: bool) -> tuple[dict[str, Any], dict[str, Tensor], int]:
    """The recipe's learner section, the network's tensors, and the run's picture size or 0."""
    if weights.is_file():
        if arm or not average:
            raise UserError(f"{weights} holds one set of weights; leave out arm and average")
        section = read_json(weights.parent.parent / "origin.json").get("learner", {})
        return section, read_tensors(weights, "learner")[0], 0
    run, folder = _arm(weights, arm)
    recipe = to_plain(parse((run / "recipe.yaml").read_text(), str(run / "recipe.yaml")))
    checkpoint = latest_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        raise UserError(f"{folder} has no checkpoint yet: let the run go on")
    section = recipe.get("learner") or {}
    profiles = read_json(checkpoint / MANIFEST)["profiles"]
    profile = next(name for name in profiles if name.startswith("ema") == average)
    state = _network_state(read_weights(checkpoint, profile, hashes=False), average)
    return section, state, int((recipe.get("pictures") or {}).get("image_size", 0))


def _arm(weights: Path, arm: str) -> tuple[Path, Path]:
    """The run's folder and the arm's."""
    if weights.parent.name == "arms" and (weights.parent.parent / "recipe.yaml").is_file():
        if arm:
            raise UserError(f"{weights} is an arm's folder; leave out arm={arm}")
        return weights.parent.parent, weights
    if not (weights / "recipe.yaml").is_file() or not (weights / "arms").is_dir():
        raise UserError(f"{weights} is no practice run: name one, or a learner's file in its pools")
    names = sorted(folder.name for folder in (weights / "arms").iterdir() if folder.is_dir())
    name = arm or ("practice" if "practice" in names or len(names) != 1 else names[0])
    if name not in names:
        raise UserError(f"{weights} has no arm {name!r}; set arm to one of {', '.join(names)}")
    return weights, weights / "arms" / name


def _network_state(state: dict[str, Tensor], average: bool) -> dict[str, Tensor]:
    """The network's own tensors; running statistics are averaged where the weights are."""
    averages = parts(state, _AVERAGES)
    if not averages:
        return state
    own = parts(state, _NETWORK)
    if average:
        own |= {n.replace("/", "."): v for n, v in averages.items() if n != "steps"}
    return own
