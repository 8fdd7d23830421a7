"""A linear probe: a frozen classifier's features and one linear map that is trained on them.

Built by `classifiers.py` as a learner of practice. The backbone is one of our own classifiers, read
from a file of weights or from a judge's folder (`evaluation/judge.py` writes one). It takes no
update, stays in evaluation mode, and lets gradients through to the picture, which guidance needs.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Discriminator, Tag, TypeAdapter, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from etude.core.config import Config, option
from etude.core.errors import UserError
from etude.core.files import file_sha256

from .blocks import seeded
from .classifier import Classifier, ClassifierConfig
from .resnet import ResNet, ResNetConfig
from .vit import ViT, ViTConfig

BACKBONES: dict[str, tuple[type, type[nn.Module]]] = {
    "small": (ClassifierConfig, Classifier),
    "vit": (ViTConfig, ViT),
    "resnet": (ResNetConfig, ResNet),
}
# What a judge's folder holds.
_CONFIG, _WEIGHTS = "classifier.json", "classifier.safetensors"


def family_of(value: Any) -> str:
    """The family that a section names; `small` where it names none."""
    name = value.get("family", "small") if isinstance(value, dict) else value.family
    return name if isinstance(name, str) else "small"


BackboneConfig = Annotated[
    Annotated[ClassifierConfig, Tag("small")]
    | Annotated[ViTConfig, Tag("vit")]
    | Annotated[ResNetConfig, Tag("resnet")],
    Discriminator(family_of),
]


class ProbeConfig(Config):
    """What a probe stands on, and how many classes it tells apart."""

    family: Literal["probe"] = option("probe", "the kind of network")
    weights: str = option(..., "file of the backbone (.safetensors or .pt), or a judge's folder")
    backbone: BackboneConfig | None = option(
        None, "the backbone in a file of weights; a judge's folder says it itself"
    )
    sha256: str = option("", "hash that the file of weights must have; empty: not checked")
    in_channels: int = option(3, "channels of the pictures", gt=0)
    num_classes: int = option(10, "classes of the new head", gt=1)

    @model_validator(mode="after")
    def _check(self) -> "ProbeConfig":
        if self.backbone is not None and self.backbone.in_channels != self.in_channels:
            raise ValueError(
                f"in_channels={self.in_channels} but backbone.in_channels="
                f"{self.backbone.in_channels}: make them equal"
            )
        return self


class Probe(nn.Module):
    """Pictures (B, C, S, S) to logits (B, num_classes); the head follows from `seed`."""

    def __init__(self, config: ProbeConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.backbone = read_backbone(config).requires_grad_(False)
        self.num_features = self.backbone.num_features
        with seeded(seed):
            self.head = nn.Linear(self.num_features, config.num_classes)
            nn.init.normal_(self.head.weight, std=0.01)
            nn.init.zeros_(self.head.bias)
        self.train()

    def train(self, mode: bool = True) -> "Probe":
        """As for any module, but for the backbone, which stays in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def features(self, x: Tensor) -> Tensor:
        """Pictures (B, C, S, S) to the backbone's features (B, num_features)."""
        return self.backbone.features(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def read_backbone(config: ProbeConfig) -> nn.Module:
    """The backbone with its weights.

    Raises:
        UserError: nothing is there, the hash is another one, or the weights do not fit.
    """
    place, folder = Path(config.weights), _folder(config)
    section, file = config.backbone, place
    if folder.is_dir():
        if section is not None:
            raise UserError(f"backbone has no effect: {folder} says it itself; remove backbone")
        section, file = _section_of(folder), folder / _WEIGHTS
    elif section is None:
        raise UserError(
            f"{place} does not say which network it belongs to: name it in model.backbone, or "
            f"name a judge's folder"
        )
    if section.in_channels != config.in_channels:
        raise UserError(
            f"the backbone in {file} sees {section.in_channels} channels: set "
            f"in_channels={section.in_channels}"
        )
    network = BACKBONES[section.family][1](section)
    if next(network.parameters()).is_meta:  # only shapes are asked for
        return network
    state = _read(file, config.sha256)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file} does not hold the backbone: {reason}") from None
    return network


def backbone_size(config: ProbeConfig) -> int:
    """Pixels along a side of what the backbone was made for; 0 where nothing says it.

    A section of a network with `input_size` says it, and a judge's folder.
    """
    if config.backbone is not None:
        return getattr(config.backbone, "input_size", 0)
    try:
        return int(json.loads((_folder(config) / _CONFIG).read_text())["image_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0  # `read_backbone` says what is wrong


def _folder(config: ProbeConfig) -> Path:
    """The judge's folder: the place itself, or the one inside the run that trained it."""
    place = Path(config.weights)
    return place / "judge" if (place / "judge" / _CONFIG).exists() else place


def _section_of(folder: Path) -> BackboneConfig:
    try:
        about = json.loads((folder / _CONFIG).read_text())["model"]
        return TypeAdapter(BackboneConfig).validate_python(about, strict=False)
    except FileNotFoundError:
        raise UserError(f"{folder} holds no {_CONFIG}: name a judge's folder or a file") from None
    except (ValueError, KeyError, ValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder / _CONFIG} cannot be read: {reason}") from None


def _read(file: Path, sha256: str) -> dict[str, Tensor]:
    """A state dict; one that a training loop wrote may lie under `state_dict` or `model`."""
    if not file.is_file():
        raise UserError(f"there are no weights at {file}: name a file that is there")
    found = file_sha256(file) if sha256 else sha256
    if found != sha256:
        raise UserError(f"{file} has sha256 {found}, not {sha256}: name the right file")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{file} cannot be read: {reason}") from None
    except Exception as error:  # pickle's own, of a file that holds more than tensors
        raise UserError(f"{file} is not a plain file of weights ({type(error).__name__})") from None
    for name in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    return state
