"""The recipes of training: what `etude train` is told about an autoencoder or a diffusion model."""

from typing import Literal

from pydantic import model_validator

from etude.conditions import check_guidance
from etude.core.config import Config, option
from etude.core.loop import LoopConfig
from etude.core.optim import OptimConfig, profile_name
from etude.core.recipe import Recipe
from etude.core.strategy import StrategyConfig
from etude.data.loader import DataConfig
from etude.diffusion.objectives import ObjectiveConfig
from etude.diffusion.samplers import SamplerConfig
from etude.external.diffusers import AutoencoderConfig
from etude.models.discriminator import DiscriminatorConfig, Game
from etude.models.families import ModelConfig
from etude.texts import TextConfig
from etude.transfer import StartConfig

_TEXT_RESULTS = ("encoders", "max_tokens", "layer", "dtype")  # fields that change results


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


class PerceptualConfig(Config):
    """A distance of learned features, added to the reconstruction error."""

    weights: str = option(..., "LPIPS weights: data/lpips/vgg16.safetensors or alexnet.safetensors")
    weight: float = option(1.0, "weight beside the reconstruction error", gt=0)


class AdversarialConfig(Config):
    """A discriminator that learns to tell reconstructions from pictures, and judges them."""

    weight: float = option(0.5, "weight of the generator's loss", gt=0)
    start_images: int = option(
        0, "the discriminator takes part in steps that start here or later", unit="images", ge=0
    )
    game: Game = option("hinge", "losses of the two sides")
    lr: float | None = option(
        None,
        "the discriminator's peak learning rate, scheduled as optim's; null: optim.lr. It shares"
        " optim's betas and eps, not its clip and weight_decay",
        gt=0,
    )
    adaptive: bool = option(
        True,
        "multiply weight by the ratio of gradient norms of reconstruction and generator loss at "
        "the decoder's last layer",
    )
    adaptive_images: int = option(
        4,
        "consecutive pictures whose mean gradients give one ratio, which is theirs; divides"
        " loop.micro_batch (the code of Esser et al. 2021 takes the pictures of one GPU)",
        unit="images",
        gt=0,
    )
    adaptive_limit: float = option(1e4, "largest such ratio", gt=0)
    discriminator: DiscriminatorConfig = option(DiscriminatorConfig(), "the discriminator")

    @model_validator(mode="after")
    def _no_option_without_effect(self) -> "AdversarialConfig":
        for name in ("adaptive_images", "adaptive_limit"):
            if not self.adaptive and self.differs(name):
                raise ValueError(f"{name} has no effect with adaptive: false; leave it out")
        return self


class AutoencoderRecipe(TrainRecipe):
    """Pictures to latents and back: diffusers' AutoencoderKL."""

    kind: Literal["autoencoder"]
    model: AutoencoderConfig = option(..., "the autoencoder")
    perceptual: PerceptualConfig | None = option(None, "perceptual loss; null for none")
    adversarial: AdversarialConfig | None = option(None, "adversarial loss; null for none")

    @model_validator(mode="after")
    def _discriminator_plays(self) -> "AutoencoderRecipe":
        start = self.adversarial.start_images if self.adversarial else 0
        if start and start >= self.loop.images:
            raise ValueError(
                f"adversarial.start_images={start} is not before loop.images={self.loop.images}, so"
                " the discriminator takes no part: lower it, or set adversarial=null"
            )
        return self


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
    prompts: list[str] = option(
        [], "texts to draw; [] takes the first held-out captions", affects_result=False
    )


class LatentDiffusionRecipe(TrainRecipe):
    """A diffusion transformer asked by class or text, in an autoencoder's latents or in pixels."""

    kind: Literal["ldm"]
    autoencoder: str = option("", "an autoencoder's run or folder; empty trains in pixels")
    latents: LatentConfig = option(LatentConfig(), "the cache of latents")
    model: ModelConfig = option(..., "the denoiser; `family` says which kind, dit if left out")
    text: TextConfig = option(TextConfig(), "what turns captions into features")
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

    @model_validator(mode="after")
    def _check(self) -> "LatentDiffusionRecipe":
        check_guidance(self.sampler, self.model.conditioning)
        if self.model.conditioning.semantic == "text":
            if not self.text.encoders:
                raise ValueError("a model asked by text needs a text encoder: set text.encoders")
            if self.judge:
                raise ValueError("a judge tells classes, not texts: leave judge empty")
            return self
        idle = [f"text.{name}" for name in _TEXT_RESULTS if self.text.differs(name)]
        idle += ["grid.prompts"] if self.grid.differs("prompts") else []
        if idle:
            raise ValueError(
                f"{idle[0]} is for a model asked by text: set model.conditioning.semantic=text, or"
                " leave it out"
            )
        return self
