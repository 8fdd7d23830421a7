"""A generator as a folder of the kind that others publish; called by `etude runs export`.

    original     NAME.safetensors in the family's own layout
    diffusers    transformer/ (a U-Net: unet/) with config.json and weights, for diffusers' classes

and in both an autoencoder under vae/, in diffusers' layout, and `etude.json`, which says what the
weights do not: objective, sampler, classes. With it `etude sample FOLDER` draws the same bytes as
from the run; of a model asked by text with the same --prompt or --prompts, which the folder does
not hold.
"""

from pathlib import Path

from etude.convert.checkpoint import write_denoiser
from etude.convert.diffusers_config import diffusers_config
from etude.core.files import write_json_atomic
from etude.data.files import new_folder

from .published import STATED
from .sampling import Generator


def export(generator: Generator, folder: str | Path, *, layout: str = "original") -> Path:
    """Write what `open_generator` and, with layout "diffusers", diffusers' class read.

    Raises:
        UserError: the folder holds something, or the layout cannot hold the model.
    """
    folder, config = Path(folder), generator.model.config
    state = {name: tensor.cpu() for name, tensor in generator.model.state_dict().items()}
    with new_folder(folder) as draft:
        weights = Path(f"{folder.name}.safetensors")
        if layout == "diffusers":
            inside = Path("unet" if config.family == "unet" else "transformer")
            weights = inside / "diffusion_pytorch_model.safetensors"
            (draft / inside).mkdir()
        write_denoiser(state, config, draft / weights, layout=layout)
        if layout == "diffusers":
            write_json_atomic((draft / weights).with_name("config.json"), diffusers_config(config))
        if generator.autoencoder is not None:
            generator.autoencoder.save(draft / "vae")
        write_json_atomic(draft / STATED, _stated(generator, weights))
    return folder


def _stated(generator: Generator, weights: Path) -> dict:
    """What `published.py` reads beside the tensors."""
    features = generator.conditions.features
    return {
        "weights": weights.as_posix(),
        "profile": generator.profile,
        "model": generator.model.config.model_dump(mode="json"),
        "objective": generator.objective.config.model_dump(mode="json"),
        "sampler": generator.sampler.model_dump(mode="json"),
        "autoencoder": generator.autoencoder is not None,
        "image_size": generator.conditions.image_size,
        "classes": generator.classes,
        "text": features and features.encoder.config.model_dump(mode="json"),
        "text_key": features and features.key,
        "scalars": dict(generator.conditions.scalars),
    }
