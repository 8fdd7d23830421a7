"""Etude: a training engine for latent diffusion that trains, practises and evaluates.

`etude.run("autoencoder/digits", seed=1)` runs any recipe; the other names are the parts, for use in
a loop of your own. Names are loaded when they are first used: importing this package imports
nothing else, seeds nothing and installs nothing.
"""

from typing import Any

__version__ = "0.1.0"

_OWNERS = {
    "AdamWEMA": "core.optim",
    "AugmentConfig": "data.augment",
    "Autoencoder": "external.diffusers",
    "AutoencoderConfig": "external.diffusers",
    "Batch": "data.loader",
    "Classifier": "models.classifier",
    "ClassifierConfig": "models.classifier",
    "DataConfig": "data.loader",
    "DiT": "models.dit",
    "DiTConfig": "models.dit",
    "EntropyGuidance": "diffusion.guidance",
    "Extractor": "metrics.extractors",
    "FeatureStore": "metrics.store",
    "GuidanceConfig": "diffusion.guidance",
    "Loader": "data.loader",
    "MDT": "models.mdt",
    "MDTConfig": "models.mdt",
    "MMDiT": "models.mmdit",
    "MMDiTConfig": "models.mmdit",
    "Objective": "diffusion.objectives",
    "ObjectiveConfig": "diffusion.objectives",
    "PixArt": "models.pixart",
    "PixArtConfig": "models.pixart",
    "Pool": "data.pool",
    "Recipe": "core.recipe",
    "ResNet": "models.resnet",
    "ResNetConfig": "models.resnet",
    "Run": "core.run",
    "SamplerConfig": "diffusion.samplers",
    "Schedule": "diffusion.schedules",
    "ShardSet": "data.shards",
    "UNet": "models.unet",
    "UNetConfig": "models.unet",
    "UserError": "core.errors",
    "ViT": "models.vit",
    "ViTConfig": "models.vit",
    "authentic": "metrics.authenticity",
    "build_classifier": "models.classifiers",
    "build_denoiser": "models.families",
    "cmmd": "metrics.cmmd",
    "fd_infinity": "metrics.fd_infinity",
    "frechet_distance": "metrics.frechet",
    "fuse": "models.fuse",
    "inception_score": "metrics.inception_score",
    "kid": "metrics.kid",
    "load_extractor": "metrics.extractors",
    "load_recipe": "core.recipe",
    "load_run": "core.run",
    "mind": "metrics.mind",
    "nearest_pictures": "metrics.memorisation",
    "open_generator": "sampling",
    "param_groups": "core.optim",
    "prdc": "metrics.prdc",
    "read_denoiser": "convert.checkpoint",
    "read_weights": "core.checkpoint_read",
    "run": "jobs",
    "sample": "diffusion.samplers",
    "vendi_score": "metrics.vendi",
    "write_denoiser": "convert.checkpoint",
    "write_shards": "data.shards",
}
__all__ = sorted(_OWNERS)


def __getattr__(name: str) -> Any:
    """Load a public name's module when the name is first used."""
    if name not in _OWNERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_OWNERS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
