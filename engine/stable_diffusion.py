"""Pictures from a Stable Diffusion folder, asked by class; called by `open_generator`.

A folder is a pipeline of diffusers: model_index.json, unet/, vae/, scheduler/, and text_encoder/
with tokenizer/ (XL: two of each). Nothing in it knows of classes: the caller names them, and label
c asks for the prompt that `template` makes of classes[c], no class for the empty prompt (XL with
`force_zeros_for_empty_prompt`: for zeros). Every prompt is encoded once, padding attended to as in
diffusers, and kept beside the U-Net on its device, so that to everybody else the model is asked by
class: labels, guidance on labels, and captured steps work as with any other.

The U-Net is ours with the folder's weights. Of the scheduler its table of betas, its prediction and
the spacing of the default sampler are taken, and not its rule, `steps_offset`, `clip_sample` or
`set_alpha_to_one`: `leading` visits 0, 20, ... where diffusers with an offset of 1 visits 1, 21,
..., and every sampler ends at the clean point. `safety_checker` and `feature_extractor` are not
read.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from etude.convert.checkpoint import read_denoiser
from etude.convert.diffusers_config import unet_config
from etude.core.errors import UserError
from etude.core.files import file_sha256, read_json
from etude.data.class_list import ClassList
from etude.diffusion.objectives import Objective, ObjectiveConfig
from etude.diffusion.samplers import SamplerConfig
from etude.external.diffusers import WEIGHTS, Autoencoder
from etude.external.transformers import TextEncoder
from etude.models.conditioning import ConditioningConfig
from etude.models.families import build_denoiser
from etude.models.unet_config import UNetConfig

from .conditions import Conditions
from .published import pipeline_autoencoder

TEXT_ENCODERS = {
    "StableDiffusionPipeline": ("text_encoder",),
    "StableDiffusionXLPipeline": ("text_encoder", "text_encoder_2"),
}
PROMPT = "{name}"  # the class's name alone
PRECISIONS = ("float32", "bfloat16", "float16")
SCALES = {"StableDiffusionPipeline": 7.5, "StableDiffusionXLPipeline": 5.0}  # diffusers' defaults
BATCH = 32  # prompts encoded together
# Pixels of pictures decoded together, without a gradient and with one: for that a decoder keeps
# 6 GB of a 512 x 512 picture in float32, so 24 GB at most.
PIXELS, PIXELS_KEPT = 1 << 22, 1 << 20

_INDEX = "model_index.json"
_BETAS = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "squaredcos_cap_v2": "cosine_table",
}
_PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}
_SCHEDULER = {  # diffusers' defaults
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "timestep_spacing": "leading",
}
_TAKEN = {
    "num_train_timesteps": (1000,),  # a U-Net is told the entry of the table itself
    "beta_schedule": tuple(_BETAS),
    "trained_betas": (None,),
    "prediction_type": tuple(_PREDICTIONS),
    "timestep_spacing": ("leading", "linspace", "trailing"),
}


class PromptedUNet(nn.Module):
    """A U-Net asked by text that takes labels: the texts of all classes are part of it."""

    def __init__(self, unet: nn.Module, text: Tensor, pooled: Tensor | None) -> None:
        """
        Args:
            text: (classes + 1, L, d) tokens of each label; the last is for no class.
            pooled: (classes + 1, p), for a U-Net that takes one vector of the text too.
        """
        super().__init__()
        self.unet = unet
        self.register_buffer("text", text, persistent=False)
        self.register_buffer("pooled", pooled, persistent=False)

    def forward(self, x: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """As in `models/denoiser.py`; reads `labels`, and with control `control`."""
        labels = condition["labels"]
        asked = dict(condition) | {"text": self.text[labels]}
        if self.pooled is not None:
            asked["pooled"] = self.pooled[labels]
        return self.unet(x, t, asked)


class PiecewiseAutoencoder(Autoencoder):
    """Decodes large pictures a few at a time: a whole block of 512 x 512 would not fit a GPU.

    Pieces that a gradient is taken of together are computed again, one by one, in the backward
    pass; who hands over `rows(..., kept=True)` latents and takes their gradient first spares that.
    """

    def rows(self, height: int, width: int, *, kept: bool) -> int:
        """Latents of a size that are decoded together; `kept`: with what a gradient needs."""
        pixels = height * width * self.downscale**2
        return max((PIXELS_KEPT if kept else PIXELS) // pixels, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """As `Autoencoder.decode`, in pieces of `rows`."""
        kept = torch.is_grad_enabled() and latents.requires_grad
        decode, pieces = super().decode, latents.split(self.rows(*latents.shape[2:], kept=kept))
        if len(pieces) == 1:
            return decode(latents)
        if not kept:
            return torch.cat([decode(piece) for piece in pieces])
        return torch.cat([checkpoint(decode, piece, use_reentrant=False) for piece in pieces])


def is_stable_diffusion(folder: str | Path) -> bool:
    """Whether a folder is a pipeline of diffusers with a U-Net, and no run or export of ours."""
    folder = Path(folder)
    if any((folder / name).exists() for name in ("recipe.yaml", "etude.json")):
        return False
    return (folder / _INDEX).is_file() and not (folder / "transformer").is_dir()


def class_names(
    generator: str | Path, stated: str, held: Sequence[str], split: str | Path
) -> list[str]:
    """What `open_generator` takes as `classes`: the names in a file, or those of a real split.

    Args:
        stated: a file as `ClassList` has it; "" takes the split's for a Stable Diffusion folder
            and gives none for other generators, which have their own.
        held: names of the split's classes in index order; empty where they are not known.
        split: what the message calls it.

    Raises:
        UserError: the file names more or fewer classes than the split has.
    """
    if not stated:
        return list(held) if is_stable_diffusion(generator) else []
    names = ClassList.read(stated).names
    if held and len(names) != len(held):
        raise UserError(
            f"{stated} names {len(names)} classes and {split} holds {len(held)}: give one name for"
            " each, in the order of the labels"
        )
    return names


def stable_diffusion_parts(
    folder: str | Path,
    device: torch.device,
    *,
    classes: Sequence[str],
    template: str = PROMPT,
    precision: str = "",
) -> dict[str, Any]:
    """What a `sampling.Generator` is made of, from a Stable Diffusion folder.

    Args:
        classes: names in index order.
        template: makes a prompt of a name, which stands where it says {name}.
        precision: what the U-Net computes in, one of `PRECISIONS`; float32 when empty. Text and
            autoencoder are float32 always.

    Raises:
        UserError: what is missing, or not a Stable Diffusion that draws from a text alone.
    """
    folder, precision = Path(folder), precision or PRECISIONS[0]
    if precision not in PRECISIONS:
        raise UserError(
            f"{folder} holds one set of weights, not {precision!r}: leave weights out, or name what"
            f" they compute in, one of {', '.join(PRECISIONS)}"
        )
    kind, prompts = _kind(folder), _prompts(folder, classes, template)
    encoders, zeros = text_encoders(folder, device)
    config, weights = _network(folder, encoders)
    objective, spacing = _scheduler(folder)
    text, pooled = encoded(encoders, prompts, zeros=zeros)
    model = PromptedUNet(
        _unet(config, weights), text, pooled if config.conditioning.pooled_width else None
    )
    model.to(device, getattr(torch, precision)).eval().requires_grad_(False)
    opened, key = pipeline_autoencoder(folder, config, device)
    autoencoder = PiecewiseAutoencoder(opened.network, opened.config).eval()
    identity = [file_sha256(weights), key, *(encoder.identity for encoder in encoders)]
    identity += [config.model_dump(mode="json"), objective.model_dump(mode="json"), prompts]
    return {
        "model": model,
        "objective": Objective(objective),
        "sampler": SamplerConfig(
            method="ddim",
            steps=50,
            spacing=spacing,
            guidance_scale=SCALES[kind],
            guidance_convention="one_plus_lambda",
        ),
        "autoencoder": autoencoder,
        "decode_rows": autoencoder.rows(config.input_size, config.input_size, kept=True),
        "classes": list(classes),
        "latent_shape": (config.in_channels, config.input_size, config.input_size),
        "conditions": Conditions(
            _asked_by_class(config),
            len(classes),
            config.input_size * autoencoder.downscale,
            device,
        ),
        "name": f"{folder.name} ({kind})",
        "fingerprint": hashlib.sha256(json.dumps([*identity, precision]).encode()).hexdigest()[:16],
        "profile": precision,
        "device": device,
    }


def text_encoders(folder: str | Path, device: torch.device) -> tuple[list[TextEncoder], bool]:
    """A folder's text encoders for `encoded`, and whether no prompt is zeros for it."""
    folder, kind = Path(folder), _kind(Path(folder))
    encoders = [
        TextEncoder.from_folder(folder / name, kind="clip", device=device)
        for name in TEXT_ENCODERS[kind]
    ]
    return encoders, kind.endswith("XLPipeline") and _zeros(folder)


@torch.no_grad()
def encoded(
    encoders: Sequence[TextEncoder], prompts: Sequence[str], *, zeros: bool = False
) -> tuple[Tensor, Tensor]:
    """Features of the prompts and, in the last row, of no prompt: (n + 1, L, d) and (n + 1, p).

    Args:
        encoders: one gives its last hidden states; two give those before the last, side by side,
            and the second one's pooled vector, as in Stable Diffusion XL.
        zeros: no prompt is zeros, not the empty prompt.
    """
    layer = "last" if len(encoders) == 1 else "penultimate"
    tokens = min(encoder.limit for encoder in encoders)
    unique = list(dict.fromkeys([*prompts, ""]))
    text, pooled = [], []
    for start in range(0, len(unique), BATCH):
        asked = unique[start : start + BATCH]
        found = [e.encode(asked, tokens, layer=layer, masked=False) for e in encoders]
        text.append(torch.cat([each.tokens for each in found], dim=2))
        pooled.append(found[-1].pooled)
    for encoder in encoders:
        encoder.release()
    rows = [unique.index(prompt) for prompt in (*prompts, "")]
    text_rows, pooled_rows = torch.cat(text)[rows], torch.cat(pooled)[rows]
    if zeros:
        text_rows[-1], pooled_rows[-1] = 0.0, 0.0
    return text_rows, pooled_rows


def _kind(folder: Path) -> str:
    stated = read_json(folder / _INDEX)
    kind = stated.get("_class_name") if isinstance(stated, dict) else None
    if kind not in TEXT_ENCODERS:
        raise UserError(
            f"{folder / _INDEX} describes a {kind}: name a folder with one of"
            f" {', '.join(TEXT_ENCODERS)}"
        )
    return kind


def _zeros(folder: Path) -> bool:
    return bool(read_json(folder / _INDEX).get("force_zeros_for_empty_prompt", True))


def _prompts(folder: Path, classes: Sequence[str], template: str) -> list[str]:
    if not classes:
        raise UserError(
            f"{folder} is asked by text and has no classes: set classes to a file with one name on"
            " each line, in the order of the labels"
        )
    if "{name}" not in template:
        raise UserError(
            f"prompt {template!r} does not say where the class goes: write {{name}} there, as in"
            " prompt='a photo of {name}'"
        )
    return [template.replace("{name}", name) for name in classes]


def _network(folder: Path, encoders: Sequence[TextEncoder]) -> tuple[UNetConfig, Path]:
    """The configuration of the U-Net, which must take the encoders' text, and its weights file."""
    path = folder / "unet" / "config.json"
    stated = read_json(path)
    config = unet_config(stated, path, text_tokens=min(encoder.limit for encoder in encoders))
    # With a gradient each block is computed again: a block of 64 would not fit a GPU otherwise.
    config = config.model_copy(update={"activation_checkpointing": True})
    width, asked = sum(encoder.width for encoder in encoders), config.conditioning
    pooled = encoders[-1].pooled_width if len(encoders) > 1 else 0
    if (asked.text_width, asked.pooled_width) != (width, pooled):
        raise UserError(
            f"{path} takes texts of {asked.text_width} channels and vectors of"
            f" {asked.pooled_width}, its text encoders give {width} and {pooled}: copy the folder"
            " again"
        )
    weights = next((path.with_name(n) for n in WEIGHTS if path.with_name(n).exists()), None)
    if weights is None:
        raise UserError(f"{path.parent} holds no weights: put {WEIGHTS[0]} beside its config.json")
    return config, weights


def _unet(config: UNetConfig, weights: Path) -> nn.Module:
    state, _ = read_denoiser(weights, config)
    with torch.device("meta"):
        model = build_denoiser(config)
    model.load_state_dict(state, assign=True)
    return model


def _asked_by_class(config: UNetConfig) -> ConditioningConfig:
    """What the U-Net is asked by once its texts are those of classes."""
    control = config.conditioning.control
    if not control:
        return ConditioningConfig()
    return ConditioningConfig(control=control, control_embedding="concatenated")


def _scheduler(folder: Path) -> tuple[ObjectiveConfig, Any]:
    """The objective that the folder's scheduler states, and its spacing of the steps."""
    path = folder / "scheduler" / "scheduler_config.json"
    stated = _SCHEDULER | read_json(path)
    for name, taken in _TAKEN.items():
        if stated[name] not in taken:
            raise UserError(
                f"{path} sets {name} to {stated[name]}, which no sampler here takes: name a folder"
                f" with {', '.join(map(str, taken))}"
            )
    schedule = _BETAS[stated["beta_schedule"]]
    betas = {name: stated[name] for name in ("beta_start", "beta_end")}
    try:
        objective = ObjectiveConfig(
            prediction=_PREDICTIONS[stated["prediction_type"]],
            schedule=schedule,
            zero_terminal_snr=bool(stated["rescale_betas_zero_snr"]),
            **({} if schedule == "cosine_table" else betas),
        )
    except ValueError as error:
        reason = " ".join(str(error).splitlines()[:3])
        raise UserError(f"{path} states no schedule ({reason}): copy the folder again") from None
    return objective, stated["timestep_spacing"]
