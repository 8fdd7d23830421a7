"""Autoencoders of the diffusers library: the only file of the engine that imports it.

Called by training (to train one), the latent cache and sampling. Raw latents are what the network
returns; the denoiser sees `scale(latents)`, of about unit variance:

    scale(z) = (z - shift_factor) * scaling_factor        (SD: 0.18215; SD3: 1.5305, shift 0.0609)

Nothing here reaches the network: a folder is read from disk or refused.
"""

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from etude.core.config import Config, option
from etude.core.errors import UserError

LAST_LAYER = {"kernel": 3, "padding": 1}  # the convolution that ends a decoder
HALF = ".fp16."  # in the name of a file with a half-precision variant of the weights
WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.fp16.bin",
)


class AutoencoderConfig(Config):
    """Shape and loss of an `AutoencoderKL`; each entry of block_out_channels after the first
    halves the picture."""

    in_channels: int = option(3, "channels of the pictures", gt=0)
    latent_channels: int = option(4, "channels of the latents", gt=0)
    block_out_channels: tuple[int, ...] = option((128, 256, 512, 512), "widths", min_length=1)
    layers_per_block: int = option(2, "residual layers at each size", gt=0)
    norm_num_groups: int = option(32, "groups of a normalisation; divides every width", gt=0)
    mid_block_attention: bool = option(True, "attention at the smallest size")
    scaling_factor: float = option(1.0, "multiplies latents for the denoiser", gt=0)
    shift_factor: float = option(0.0, "subtracted from latents before scaling")
    loss: Literal["l1", "l2"] = option("l1", "reconstruction error of a pixel")
    reduction: Literal["mean", "sum"] = option(
        "mean", "of a picture's loss over pixels and latent elements; published losses are sums"
    )
    kl_weight: float = option(1e-6, "weight of the divergence from a standard normal", ge=0)


class Autoencoder(nn.Module):
    """Pictures to Gaussian latents and back; `forward` is the training loss."""

    def __init__(self, network: nn.Module, config: AutoencoderConfig) -> None:
        super().__init__()
        self.network = network
        self.config = config

    @classmethod
    def build(cls, config: AutoencoderConfig, *, seed: int = 0) -> "Autoencoder":
        """A new autoencoder whose weights are a function of `seed`."""
        levels = len(config.block_out_channels)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            network = _library().AutoencoderKL(
                in_channels=config.in_channels,
                out_channels=config.in_channels,
                latent_channels=config.latent_channels,
                block_out_channels=config.block_out_channels,
                layers_per_block=config.layers_per_block,
                down_block_types=("DownEncoderBlock2D",) * levels,
                up_block_types=("UpDecoderBlock2D",) * levels,
                norm_num_groups=config.norm_num_groups,
                mid_block_add_attention=config.mid_block_attention,
                scaling_factor=config.scaling_factor,
                shift_factor=config.shift_factor,
            )
        return cls(network, config)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Autoencoder":
        """A trained autoencoder from a local folder in diffusers' layout, in float32.

        Raises:
            UserError: the folder, its config.json or its weights are missing or of another model.
        """
        folder = Path(folder)
        stated = _read_config(folder)
        network = _read_network(_library().AutoencoderKL, folder)
        return cls(network, _config_of(network.config, stated))

    def save(self, folder: str | Path) -> Path:
        """Write diffusers' layout (config.json and safetensors), replacing `folder` when done."""
        folder = Path(folder)
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        self.network.register_to_config(
            scaling_factor=self.config.scaling_factor, shift_factor=self.config.shift_factor
        )
        self.network.save_pretrained(partial, safe_serialization=True)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        return folder

    @property
    def downscale(self) -> int:
        """Pixels of a picture per pixel of its latents, along each side."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (B, C, H, W) in [-1, 1] to the mean and standard deviation of raw latents,
        each (B, c, H / downscale, W / downscale) in the parameters' dtype."""
        posterior = self.network.encode(images.to(self.network.dtype)).latent_dist
        return posterior.mean, posterior.std

    def decode(self, latents: Tensor) -> Tensor:
        """Raw latents (B, c, h, w) to pictures (B, C, H, W), nominally in [-1, 1], not clamped."""
        return self.network.decode(latents.to(self.network.dtype)).sample

    def scale(self, latents: Tensor) -> Tensor:
        """Raw latents to the denoiser's."""
        return (latents - self.config.shift_factor) * self.config.scaling_factor

    def unscale(self, latents: Tensor) -> Tensor:
        """The denoiser's latents to raw ones."""
        return latents / self.config.scaling_factor + self.config.shift_factor

    def set_scaling(self, scaling_factor: float, shift_factor: float = 0.0) -> None:
        """Fix the scale of the latents, once training has ended."""
        update = {"scaling_factor": scaling_factor, "shift_factor": shift_factor}
        self.config = self.config.model_copy(update=update)

    def pixel_loss(self, rebuilt: Tensor, images: Tensor) -> Tensor:
        """Reconstruction error of each picture, (B,) float32: |error| ("l1") or error^2 ("l2")."""
        error = rebuilt.float() - images.float()
        return self._reduce(error.abs() if self.config.loss == "l1" else error.square())

    def _reduce(self, values: Tensor) -> Tensor:
        values = values.flatten(1)
        return values.mean(1) if self.config.reduction == "mean" else values.sum(1)

    def forward(
        self, images: Tensor, eps: Tensor, *, parts: bool = False
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Reconstruction error plus weighted divergence of each picture, (B,) float32.

        Args:
            images: (B, C, H, W) in [-1, 1].
            eps: standard normal, of the latents' shape (B, c, H / downscale, W / downscale).
            parts: return more, for losses that are added outside.

        Returns:
            `pixel_loss` plus kl_weight times KL(N(mean, std^2) || N(0, 1)) in nats, both averaged
            or summed over elements; with `parts` also the reconstruction (B, C, H, W) and,
            detached, the input (B, w, H, W) of the decoder's last layer (`LAST_LAYER`).
        """
        mean, std = self.encode(images)
        kept: list[Tensor] = []
        last = self.network.decoder.conv_out
        hook = last.register_forward_pre_hook(lambda _, given: kept.append(given[0].detach()))
        try:
            rebuilt = self.decode(mean + std * eps.to(mean.dtype))
        finally:
            hook.remove()
        pixels = self.pixel_loss(rebuilt, images)
        mean, std = mean.float(), std.float()
        divergence = 0.5 * (mean.square() + std.square() - 1.0) - std.log()
        loss = pixels + self.config.kl_weight * self._reduce(divergence)
        return (loss, rebuilt, kept[0]) if parts else loss


class Decoder(nn.Module):
    """A decoder alone, for guidance: the denoiser's latents (B, c, h, w) to pictures (B, C, H, W)
    in about [-1, 1], differentiable, in the parameters' dtype.

    A distilled `AutoencoderTiny` was trained on the denoiser's latents, so the scale that its
    configuration states is 1; an `AutoencoderKL` states that of its raw ones.

    Attributes:
        latent_channels, channels: c and C.
    """

    def __init__(self, network: nn.Module, config: AutoencoderConfig) -> None:
        super().__init__()
        self.network = network
        self.scaling_factor, self.shift_factor = config.scaling_factor, config.shift_factor
        self.latent_channels, self.channels = config.latent_channels, config.in_channels

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Decoder":
        """The decoder of a local folder in diffusers' layout, of either kind.

        Raises:
            UserError: the folder, its config.json or its weights are missing or of another model.
        """
        folder = Path(folder)
        stated = _read_config(folder, ("AutoencoderTiny", "AutoencoderKL"))
        if stated["_class_name"] == "AutoencoderKL":
            autoencoder = Autoencoder.from_folder(folder)
            return cls(autoencoder.network, autoencoder.config)
        network = _read_network(_library().AutoencoderTiny, folder)
        config = AutoencoderConfig(
            in_channels=network.config["out_channels"],
            latent_channels=network.config["latent_channels"],
            scaling_factor=network.config["scaling_factor"],
            shift_factor=network.config["shift_factor"],
        )
        return cls(network, config)

    def forward(self, latents: Tensor) -> Tensor:
        raw = latents / self.scaling_factor + self.shift_factor
        return self.network.decode(raw.to(self.network.dtype)).sample


def estimate_scaling(mean: Tensor, std: Tensor) -> tuple[float, float]:
    """(scaling_factor, shift_factor) that give latents drawn from N(mean, std^2), both
    (n, c, h, w), zero mean and unit variance over all elements."""
    mean, std = mean.double(), std.double()
    shift = mean.mean()
    variance = (mean - shift).square().mean() + std.square().mean()
    return float(variance.rsqrt()), float(shift)


def _library() -> Any:
    logging.getLogger("xformers").setLevel(logging.ERROR)  # it warns of CUDA parts we do not use
    try:
        import diffusers
    except ImportError as error:
        raise UserError(
            "autoencoders need the diffusers library: pip install 'diffusers>=0.42'"
        ) from error
    return diffusers


def _read_network(kind: Any, folder: Path) -> nn.Module:
    """A network of a class of the library from a folder, which must hold its weights."""
    weights = next((name for name in WEIGHTS if (folder / name).exists()), None)
    if weights is None:
        raise UserError(f"{folder} holds no weights: put {WEIGHTS[0]} beside its config.json")
    try:
        return kind.from_pretrained(
            str(folder),
            local_files_only=True,
            low_cpu_mem_usage=False,
            use_safetensors=weights.endswith(".safetensors"),
            variant="fp16" if HALF in weights else None,
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"the weights in {folder} could not be read ({reason}): copy the folder again"
        ) from error


def _read_config(folder: Path, kinds: Sequence[str] = ("AutoencoderKL",)) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{path} does not exist: name a folder with an autoencoder's config.json")
    try:
        stated = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): copy the folder again") from error
    name = stated.get("_class_name") if isinstance(stated, dict) else None
    if name not in kinds:
        wanted = " or ".join(kinds)
        raise UserError(f"{path} describes {name}, not {wanted}: name an autoencoder's folder")
    return stated


def _config_of(config: Any, stated: dict[str, Any]) -> AutoencoderConfig:
    """Our fields of a diffusers configuration; an unstated scale is Stable Diffusion's."""
    return AutoencoderConfig(
        in_channels=config["in_channels"],
        latent_channels=config["latent_channels"],
        block_out_channels=tuple(config["block_out_channels"]),
        layers_per_block=config["layers_per_block"],
        norm_num_groups=config["norm_num_groups"],
        mid_block_attention=config["mid_block_add_attention"],
        scaling_factor=stated.get("scaling_factor") or config["scaling_factor"],
        shift_factor=stated.get("shift_factor") or 0.0,
    )
