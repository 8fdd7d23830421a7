"""The learner's section of a recipe: the classifier, its optimizer, its preprocessing.

Read by learner.py and augmenting.py. With its defaults, pictures are shifted by a pixel and nothing
else; the fields behind `flip` make the recipe with which vision transformers are trained from
scratch (crops, RandAugment, mixup and CutMix, label smoothing, an average of the weights).
"""

from typing import Self

from pydantic import model_validator

from etude.core.config import Config, option
from etude.core.optim import OptimConfig
from etude.data.randaugment import RandAugmentConfig
from etude.models.classifier import ClassifierConfig
from etude.models.classifiers import LearnerModelConfig
from etude.models.probe import ProbeConfig, backbone_size

_RATIO = (3.0 / 4.0, 4.0 / 3.0)


class LearnerConfig(Config):
    """The classifier and how it is trained, the same for every arm."""

    model: LearnerModelConfig = option(
        ClassifierConfig(), "the classifier; `family` says which kind, small if left out"
    )
    batch: int = option(64, "pictures per step, of all ranks together", unit="pictures", gt=0)
    lr: float = option(1e-3, "peak learning rate of AdamW", gt=0)
    betas: tuple[float, float] = option((0.9, 0.999), "decay of the two moments")
    weight_decay: float = option(0.05, "decoupled decay of matrices (not of vectors)", ge=0)
    clip: float = option(1.0, "largest global gradient norm; 0 turns clipping off", ge=0)
    label_smoothing: float = option(0.1, "share of the target spread over all classes", ge=0, lt=1)
    ema: float = option(0.99, "decay of the average of the weights, at every step", gt=0, lt=1)
    shift: int = option(1, "largest random shift in each direction", unit="pixels", ge=0)
    flip: bool = option(False, "mirror half of the pictures left to right")
    input_size: int = option(
        0, "side that pictures are brought to; 0: the model's or backbone's own, or the pictures'",
        unit="pixels", ge=0,
    )  # fmt: skip
    mean: tuple[float, ...] | None = option(
        None, "subtracted from levels in [0, 1], for all channels or each; levels in [-1, 1] if not"
    )
    std: tuple[float, ...] | None = option(None, "what they are divided by then")
    crop_scale: tuple[float, float] | None = option(
        None, "smallest and largest area of a random resized crop, relative to the picture"
    )
    crop_ratio: tuple[float, float] | None = option(
        None, "smallest and largest width over height of a crop; 3/4 to 4/3 unless given"
    )
    randaugment: RandAugmentConfig = option(RandAugmentConfig(), "random operations on pictures")
    erase: float = option(0.0, "chance that a rectangle of a picture is erased", ge=0, le=1)
    mixup: float = option(0.0, "alpha of mixup; 0 turns it off", ge=0)
    cutmix: float = option(0.0, "alpha of CutMix; 0 turns it off", ge=0)

    @property
    def ratio(self) -> tuple[float, float]:
        """Smallest and largest width over height of a crop."""
        return self.crop_ratio or _RATIO

    @property
    def side(self) -> int:
        """Pixels along a side of what the network sees; 0: of the pictures as they come."""
        if not self.input_size and isinstance(self.model, ProbeConfig):
            return backbone_size(self.model)
        return self.input_size or getattr(self.model, "input_size", 0)

    def optim(self) -> OptimConfig:
        """The optimizer's section; the rate of each step comes from the schedule instead."""
        return OptimConfig(
            lr=self.lr,
            betas=self.betas,
            weight_decay=self.weight_decay,
            clip=self.clip,
            ema=[self.ema],
        )

    @model_validator(mode="after")
    def _check_preprocessing(self) -> Self:
        backbone = getattr(self.model, "backbone", None)
        for name, network in (("model", self.model), ("model.backbone", backbone)):
            own = getattr(network, "input_size", 0)
            if own and self.input_size not in (0, own):
                raise ValueError(
                    f"input_size={self.input_size} but {name}.input_size={own}: leave out "
                    "input_size"
                )
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std go together: give both or neither")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and len(values) not in (1, self.model.in_channels):
                raise ValueError(
                    f"{name} has {len(values)} values for {self.model.in_channels} channels: give "
                    "one, or one per channel"
                )
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std must be positive, not {self.std}")
        return self

    @model_validator(mode="after")
    def _check_crops(self) -> Self:
        if self.crop_scale is None:
            if self.crop_ratio is not None:
                raise ValueError("crop_ratio has no effect without crop_scale; remove it")
        elif not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale must satisfy 0 < min <= max <= 1, not {self.crop_scale}")
        elif self.shift:
            raise ValueError(
                f"shift={self.shift} moves pictures that crop_scale cuts anyway; type shift=0"
            )
        elif not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"crop_ratio must satisfy 0 < min <= max, not {self.crop_ratio}")
        if not self.randaugment.num_ops and any(
            self.randaugment.differs(name) for name in ("magnitude", "fill")
        ):
            raise ValueError("randaugment has no effect with num_ops=0; type randaugment.num_ops=2")
        if self.randaugment.num_ops and self.model.in_channels not in (1, 3):
            raise ValueError("randaugment takes pictures of 1 or 3 channels")
        return self
