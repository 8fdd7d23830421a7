"""The denoisers by name: what a recipe's `model` section may be, and the network it builds.

Called by training, sampling, conversion and estimates; a family is one file beside this one.
"""

from typing import Annotated, Any

from pydantic import Discriminator, Tag
from torch import nn

from .dit import DiT, DiTConfig
from .mdt import MDT, MDTConfig
from .mmdit import MMDiT, MMDiTConfig
from .pixart import PixArt, PixArtConfig
from .unet import UNet, UNetConfig

FAMILIES: dict[str, tuple[type, type[nn.Module]]] = {
    "dit": (DiTConfig, DiT),
    "mdt": (MDTConfig, MDT),
    "mmdit": (MMDiTConfig, MMDiT),
    "pixart": (PixArtConfig, PixArt),
    "unet": (UNetConfig, UNet),
}


def _family(value: Any) -> str:
    name = value.get("family", "dit") if isinstance(value, dict) else value.family
    return name if isinstance(name, str) else "dit"


# A section without `family` is a DiT.
ModelConfig = Annotated[
    Annotated[DiTConfig, Tag("dit")]
    | Annotated[MDTConfig, Tag("mdt")]
    | Annotated[MMDiTConfig, Tag("mmdit")]
    | Annotated[PixArtConfig, Tag("pixart")]
    | Annotated[UNetConfig, Tag("unet")],
    Discriminator(_family),
]


def build_denoiser(config: Any, *, seed: int = 0) -> nn.Module:
    """The network of a family's configuration; its weights are a function of `seed`."""
    return FAMILIES[config.family][1](config, seed=seed)
