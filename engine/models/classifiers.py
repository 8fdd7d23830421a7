"""The classifiers by name: what a learner's `model` section may be, and the network it builds.

Called by practice and estimates; a family is one file beside this one, or, with `imported`, a
function of the user's own. Every configuration has `in_channels` and `num_classes`, and every
network maps pictures (B, in_channels, S, S) to logits (B, num_classes).
"""

import importlib
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag, field_validator
from torch import nn

from etude.core.config import Config, option
from etude.core.errors import UserError

from .blocks import seeded
from .classifier import ClassifierConfig
from .probe import BACKBONES, Probe, ProbeConfig, family_of
from .resnet import ResNetConfig
from .vit import ViTConfig


class ImportedConfig(Config):
    """A network of the user's own."""

    family: Literal["imported"] = option("imported", "the kind of network")
    target: str = option(
        ..., "package.module:function; called with in_channels, num_classes and seed by name"
    )
    in_channels: int = option(3, "channels of the pictures", gt=0)
    num_classes: int = option(10, "classes", gt=1)

    @field_validator("target")
    @classmethod
    def _two_parts(cls, value: str) -> str:
        module, _, name = value.partition(":")
        if not module or not name:
            raise ValueError(f"target={value!r} must be package.module:function")
        return value


def import_classifier(config: ImportedConfig, *, seed: int = 0) -> nn.Module:
    """The module that the user's function returns; torch's generator stands at `seed` meanwhile.

    Raises:
        UserError: it cannot be imported or called, or returns no module.
    """
    module, _, name = config.target.partition(":")
    try:
        make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"target={config.target} cannot be imported ({error}): name a function that Python "
            "finds, for example by PYTHONPATH"
        ) from None
    with seeded(seed):
        made = make(in_channels=config.in_channels, num_classes=config.num_classes, seed=seed)
    if not isinstance(made, nn.Module):
        raise UserError(
            f"target={config.target} returned a {type(made).__name__}: it must return a "
            "torch.nn.Module"
        )
    return made


FAMILIES: dict[str, tuple[type, Any]] = {
    **BACKBONES,
    "probe": (ProbeConfig, Probe),
    "imported": (ImportedConfig, import_classifier),
}

# A section without `family` is the small classifier.
LearnerModelConfig = Annotated[
    Annotated[ClassifierConfig, Tag("small")]
    | Annotated[ViTConfig, Tag("vit")]
    | Annotated[ResNetConfig, Tag("resnet")]
    | Annotated[ProbeConfig, Tag("probe")]
    | Annotated[ImportedConfig, Tag("imported")],
    Discriminator(family_of),
]


def build_classifier(config: Any, *, seed: int = 0) -> nn.Module:
    """The network of a family's configuration; its weights are a function of `seed`."""
    return FAMILIES[config.family][1](config, seed=seed)
