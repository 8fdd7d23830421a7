"""The recipes of training: what `etude train` is told about an autoencoder or a diffusion model."""

from typing import Literal

from etude.core.config import Config, option
from etude.core.loop import LoopConfig
from etude.core.optim import OptimConfig, profile_name
from etude.core.recipe import Recipe
from etude.core.strategy import StrategyConfig
from etude.data.loader import DataConfig
from etude.diffusion.objectives import ObjectiveConfig
from etude.diffusion.samplers import SamplerConfig
from etude.external.diffusers import AutoencoderConfig
from etude.models.families import ModelConfig
from etude.transfer import StartConfig


class TrainRecipe(Recipe):
    """What the two kinds of training have in common."""

    data: DataConfig = option(..., "training pictures")
    held_out: str = option(..., "shards never trained on, for the held-out loss")
    optim: OptimConfig = option(OptimConfig(), "optimizer, learning rate and weight averages")
    strategy: StrategyConfig = option(
        StrategyConfig(), "DeepSpeed ZeRO or plain torch, and the precision"
    )
    loop: LoopConfig = option(..., "length, batches and intervals")

    def default_weights(self) -> str:
        """The profile that pictures are drawn with: the longest average, or the raw weights."""
        return profile_name(max(self.optim.ema)) if self.optim.ema else "raw"


class AutoencoderRecipe(TrainRecipe):
    """Pictures to latents and back: diffusers' AutoencoderKL."""

    kind: Literal["autoencoder"]
    model: AutoencoderConfig = option(..., "the autoencoder")


class LatentConfig(Config):
    """The cache of latents that training reads in place of pictures."""

    variants: int = option(
        1, "augmentations kept of each picture; 0 keeps none and encodes while training", ge=0
    )
    dtype: Literal["float32", "float16"] = option("float32", "type of the stored latents")
    folder: str = option(
        "data/latents", "where caches live, each under its key", affects_result=False
    )


class GridConfig(Config):
    """The sample grid of each evaluation."""

    per_class: int = option(4, "pictures per class", unit="pictures", gt=0, affects_result=False)
    max_classes: int = option(10, "classes shown", unit="classes", gt=0, affects_result=False)
    seed: int = option(0, "names the grid's initial noises", affects_result=False)


class LatentDiffusionRecipe(TrainRecipe):
    """A class-conditional diffusion transformer in an autoencoder's latents (or in pixels)."""

    kind: Literal["ldm"]
    autoencoder: str = option("", "an autoencoder's run or folder; empty trains in pixels")
    latents: LatentConfig = option(LatentConfig(), "the cache of latents")
    model: ModelConfig = option(..., "the denoiser; `family` says which kind, dit if left out")
    start: StartConfig = option(StartConfig(), "weights to start from, of another model")
    objective: ObjectiveConfig = option(ObjectiveConfig(), "what is predicted, and when")
    drop_semantic: float = option(
        0.1, "share of samples trained without their class or text", ge=0, lt=1
    )
    drop_control: float = option(
        0.1, "share of samples trained without their control values", ge=0, lt=1
    )
    sampler: SamplerConfig = option(..., "how pictures are drawn")
    grid: GridConfig = option(GridConfig(), "the sample grid", affects_result=False)
    judge: str = option(
        "",
        "a frozen classifier's run; says which share of the grid it labels as asked",
        affects_result=False,
    )
