"""Pictures from a checkpoint that somebody published, without a recipe; called by `open_generator`.

A folder holds a class-conditional DiT in its own repository's layout (one `.pt` or `.safetensors`)
or in diffusers' (`transformer/` with config.json), and the autoencoder in diffusers' layout under
`vae/`. Everything else is read off the tensors' shapes or is the publication's: Peebles and Xie
2023, 250 steps of DDPM on a linear table of 1000, learned variances, guidance 1.5 on three of the
four channels, with which their table 4 has FID 2.27 at 256 x 256.

A folder with `etude.json`, as `exporting.py` writes it, states all of this itself, and may hold any
family, asked by class or text, with or without an autoencoder.
"""

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from etude.convert.checkpoint import read_denoiser, read_file, weights_file, weights_files
from etude.core.errors import UserError
from etude.core.files import file_sha256, read_json
from etude.diffusion.objectives import Objective, ObjectiveConfig
from etude.diffusion.samplers import SamplerConfig
from etude.models.dit import SIZES, DiTConfig
from etude.models.families import FAMILIES, build_denoiser

from .conditions import Conditions
from .texts import TextConfig, TextFeatures, open_features

OBJECTIVE = ObjectiveConfig(prediction="eps", schedule="linear", variance="learned_range")
SAMPLER = SamplerConfig(
    method="ddpm",
    steps=250,
    guidance_scale=1.5,
    guidance_convention="one_plus_lambda",
    guidance_channels=3,
)
STATED = "etude.json"


@dataclass(frozen=True)
class Described:
    """What a published folder holds.

    Attributes:
        weights: a file, or diffusers' folder with one.
        model: the denoiser's configuration.
        image_size: side of the pictures it was trained on; 0: what the autoencoder makes of its
            latents.
        classes: their names in index order; empty for a model asked by text.
        profile: which weights these are.
        autoencoder: whether there is one, under vae/.
        text, text_key: the text encoders, and the hash of their features.
        scalars: as `Conditions` has them.
    """

    weights: Path
    model: Any
    classes: list[str]
    objective: ObjectiveConfig = OBJECTIVE
    sampler: SamplerConfig = SAMPLER
    image_size: int = 0
    profile: str = "as published"
    autoencoder: bool = True
    text: TextConfig | None = None
    text_key: str = ""
    scalars: dict[str, float] = field(default_factory=dict)


def is_published(folder: str | Path) -> bool:
    """Whether a folder looks like a published checkpoint, and not like a run."""
    folder = Path(folder)
    if not folder.is_dir() or (folder / "recipe.yaml").exists():
        return False
    stated = (folder / STATED).exists() or (folder / "transformer").is_dir()
    return stated or bool(weights_files(folder))


def published_parts(folder: str | Path, device: torch.device) -> dict[str, Any]:
    """What a `sampling.Generator` is made of, from a published folder.

    Raises:
        UserError: no autoencoder, several weights files, or a network that is not known.
    """
    folder = Path(folder)
    found = described(folder)
    config = found.model
    state, layout = read_denoiser(found.weights, config)
    model = build_denoiser(config)
    model.load_state_dict(state)
    model.to(device).eval().requires_grad_(False)
    autoencoder, key = (
        pipeline_autoencoder(folder, config, device) if found.autoencoder else (None, "")
    )
    identity = [file_sha256(weights_file(found.weights)), key, config.model_dump(mode="json")]
    identity += [found.objective.model_dump(mode="json")] if found.objective != OBJECTIVE else []
    features: TextFeatures | None = None
    if found.text is not None:
        features = open_features(found.text, found.text_key, device)
        identity.append(features.key)
    side = found.image_size or config.input_size * (autoencoder.downscale if autoencoder else 1)
    return {
        "model": model,
        "objective": Objective(found.objective),
        "sampler": found.sampler,
        "autoencoder": autoencoder,
        "classes": found.classes,
        "latent_shape": (config.in_channels, config.input_size, config.input_size),
        "conditions": Conditions(
            config.conditioning, config.num_classes, side, device, features, found.scalars
        ),
        "name": f"{folder.name} ({layout} layout)",
        "fingerprint": hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16],
        "profile": found.profile,
        "device": device,
    }


def described(folder: Path) -> Described:
    """What a folder states of itself, or what is known of the published DiT that it looks like."""
    if not (folder / STATED).exists():
        weights, config = network(folder)
        return Described(weights, config, _classes(folder, config.num_classes))
    stated, kinds = read_json(folder / STATED), dict(_KINDS)
    try:
        kinds["model"] = FAMILIES[stated["model"]["family"]][0]
        kinds |= {"text": TextConfig} if stated["text"] else {}
        parts = {name: k.model_validate_json(json.dumps(stated[name])) for name, k in kinds.items()}
        return Described(**stated | parts | {"weights": folder / stated["weights"]})
    except (KeyError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{folder / STATED} does not describe a model ({reason}): export the run again"
        ) from None


_KINDS = {"objective": ObjectiveConfig, "sampler": SamplerConfig}


def dit_config(state: dict[str, Tensor], where: Path) -> DiTConfig:
    """The configuration of a DiT in its own repository's layout, from the tensors' shapes."""
    try:
        width, channels, patch, _ = state["x_embedder.proj.weight"].shape
        tokens = state["pos_embed"].shape[1]
        out = len(state["final_layer.linear.bias"]) // patch**2
        classes = len(state["y_embedder.embedding_table.weight"]) - 1
        inner = len(state["blocks.0.mlp.fc1.bias"])
    except (KeyError, ValueError):
        raise UserError(
            f"{where} is not a DiT in its repository's layout: name a folder with one, or train it"
            " from a recipe"
        ) from None
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    heads = next((h for d, w, h in SIZES.values() if (d, w) == (depth, width)), None)
    if heads is None:
        raise UserError(
            f"{where} is a DiT of depth {depth} and width {width}, which is none of S, B, L and XL,"
            " so its number of heads is not known: train it from a recipe, or save it as a run"
        )
    return DiTConfig(
        input_size=math.isqrt(tokens) * patch,
        in_channels=channels,
        patch_size=patch,
        hidden_size=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=inner / width,
        num_classes=classes,
        learn_sigma=out == 2 * channels,
    )


def network(folder: Path) -> tuple[Path, DiTConfig]:
    """The weights (a file, or diffusers' folder) and the configuration of the network."""
    if (folder / "transformer").is_dir():
        return folder / "transformer", _diffusers_config(folder / "transformer" / "config.json")
    file = weights_file(folder)
    return file, dit_config(read_file(file), file)


def _diffusers_config(path: Path) -> DiTConfig:
    try:
        stated = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} could not be read ({error}): copy the folder again") from None
    name = stated.get("_class_name")
    if name not in ("DiTTransformer2DModel", "Transformer2DModel"):
        raise UserError(f"{path} describes {name}, not a DiT: name a DiT's folder")
    named = ("num_attention_heads", "attention_head_dim", "sample_size", "in_channels")
    named += ("patch_size", "num_layers", "num_embeds_ada_norm", "out_channels")
    missing = [name for name in named if name not in stated]
    if missing:
        raise UserError(f"{path} states no {', '.join(missing)}: copy the folder again")
    heads, width = stated["num_attention_heads"], stated["attention_head_dim"]
    return DiTConfig(
        input_size=stated["sample_size"],
        in_channels=stated["in_channels"],
        patch_size=stated["patch_size"],
        hidden_size=heads * width,
        depth=stated["num_layers"],
        num_heads=heads,
        num_classes=stated["num_embeds_ada_norm"],
        learn_sigma=stated["out_channels"] == 2 * stated["in_channels"],
    )


def pipeline_autoencoder(folder: Path, config: Any, device: torch.device) -> tuple[Any, str]:
    """What `open_autoencoder` gives of vae/ in a pipeline's folder, for a denoiser's latents."""
    from .sampling import open_autoencoder

    if not (folder / "vae" / "config.json").exists():
        raise UserError(
            f"{folder} has no autoencoder: put one in diffusers' layout (config.json and weights)"
            f" at {folder / 'vae'}"
        )
    autoencoder, key = open_autoencoder(folder / "vae", device)
    if autoencoder.config.latent_channels != config.in_channels:
        raise UserError(
            f"{folder / 'vae'} has {autoencoder.config.latent_channels} latent channels, the"
            f" network takes {config.in_channels}: put the network's own autoencoder there"
        )
    return autoencoder, key


def _classes(folder: Path, count: int) -> list[str]:
    """Names of the classes where diffusers' pipeline states them, else their numbers."""
    path = folder / "model_index.json"
    stated = json.loads(path.read_text()).get("id2label") if path.exists() else None
    names = stated or {}
    return [str(names.get(str(label), label)) for label in range(count)]
