"""The names that other people's code may rely on, however and in whatever order they are loaded."""

import inspect
import json
import subprocess
import sys

import pytest

import etude

# Changing an entry breaks somebody's program: say so in the commit.
PINNED = {
    "AdamWEMA": "(params, lr, betas, eps, weight_decay, ema_decays)",
    "AugmentConfig": "(image_size, crop, scale, flip, channels)",
    "Autoencoder": "(network, config)",
    "AutoencoderConfig": "config",
    "Batch": "(positions, keys, images, latents, labels, control, captions, text, wait_seconds)",
    "Classifier": "(config, seed)",
    "ClassifierConfig": "config",
    "DataConfig": "config",
    "DiT": "(config, seed)",
    "DiTConfig": "config",
    "EntropyGuidance": "class",
    "Extractor": "(kind, weights, taps, dtype, device, compile, options)",
    "FeatureStore": "class",
    "GuidanceConfig": "config",
    "Loader": "(data, config, seed, order, device)",
    "MDT": "(config, seed)",
    "MDTConfig": "config",
    "MMDiT": "(config, seed)",
    "MMDiTConfig": "config",
    "Objective": "(config)",
    "ObjectiveConfig": "config",
    "PixArt": "(config, seed)",
    "PixArtConfig": "config",
    "Pool": "class",
    "Recipe": "config",
    "ResNet": "(config, seed)",
    "ResNetConfig": "config",
    "Run": "class",
    "SamplerConfig": "config",
    "Schedule": "class",
    "ShardSet": "class",
    "UNet": "(config, seed)",
    "UNetConfig": "config",
    "UserError": "class",
    "ViT": "(config, seed)",
    "ViTConfig": "config",
    "authentic": "(generated, train)",
    "build_classifier": "(config, seed)",
    "build_denoiser": "(config, seed)",
    "cmmd": "(first, second, estimator, sigma)",
    "fd_infinity": "(real, generated, points, warn)",
    "frechet_distance": "function",
    "fuse": "(model)",
    "inception_score": "(logits, splits, mixed)",
    "kid": "(first, second, block)",
    "load_extractor": "(spec, weights, options)",
    "load_recipe": "(name_or_path, overrides)",
    "load_run": "(path, root)",
    "mind": "(first, second, directions)",
    "nearest_pictures": "(generated, train)",
    "open_generator": "(run, weights, sampler, device, classes, prompt, at)",
    "param_groups": "(model)",
    "prdc": "(real, generated, k, convention)",
    "read_denoiser": "(path, config)",
    "read_weights": "(path, profile, hashes)",
    "run": "(recipe, overrides, name, fields)",
    "sample": "function",
    "vendi_score": "(features, q)",
    "write_denoiser": "(state, config, path, layout)",
    "write_shards": "(folder, samples, per_shard, classes)",
}

EVERY_NAME_TWICE = """
import importlib, json, pkgutil, types
import etude
first = {name: getattr(etude, name) for name in etude.__all__}
for info in pkgutil.walk_packages(etude.__path__, "etude."):
    if info.name in ("etude.__main__",) or ".kernels._" in info.name:
        continue
    importlib.import_module(info.name)
modules = [n for n in etude.__all__ if isinstance(getattr(etude, n), types.ModuleType)]
changed = [n for n in etude.__all__ if getattr(etude, n) is not first[n]]
print(json.dumps({"modules": modules, "changed": changed, "loaded": sorted(etude.__all__)}))
"""

LIGHT = """
import sys, signal, logging
before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
import etude, etude.kernels
heavy = ["torch", "numpy", "deepspeed", "nvidia", "triton", "diffusers", "transformers", "rich"]
print([name for name in heavy if name in sys.modules])
print(all(signal.getsignal(s) is h for s, h in before.items()), logging.getLogger().handlers)
import torch
state = torch.get_rng_state()
for name in etude.__all__: getattr(etude, name)
unwanted = ["deepspeed", "nvidia.dali", "transformers", "rich", "matplotlib", "sklearn"]
print([name for name in unwanted if name in sys.modules])
print(bool(torch.equal(state, torch.get_rng_state())), torch.distributed.is_initialized())
print(all(signal.getsignal(s) is h for s, h in before.items()))
"""


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_list_is_pinned() -> None:
    assert sorted(PINNED) == etude.__all__
    assert set(etude.__all__) <= set(dir(etude))


@pytest.mark.parametrize("name", sorted(PINNED))
def test_signatures_are_pinned(name: str) -> None:
    found, pinned = getattr(etude, name), PINNED[name]
    if pinned == "config":
        from etude.core.config import Config

        assert issubclass(found, Config)
    elif pinned == "class":
        assert inspect.isclass(found)
    elif pinned == "function":
        assert inspect.isfunction(found)
    else:
        assert f"({', '.join(inspect.signature(found).parameters)})" == pinned
    assert found.__doc__


def test_names_are_the_same_before_and_after_every_submodule_is_imported() -> None:
    found = json.loads(python(EVERY_NAME_TWICE).splitlines()[-1])
    assert found == {"modules": [], "changed": [], "loaded": sorted(PINNED)}


def test_importing_is_light_and_leaves_the_process_alone() -> None:
    assert python(LIGHT).splitlines() == ["[]", "True []", "[]", "True False", "True"]


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        etude.nothing  # noqa: B018
    assert not hasattr(etude, "__wrapped__")
