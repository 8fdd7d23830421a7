"""What every denoiser shares: how it is called, and the fields of its configuration.

A denoiser is a module `model(x, t, condition)`:

    x          (B, C, H, W) noisy latents, H = W = input_size, of any floating dtype
    t          (B,) time times 1000, in [0, 1000]: 0 is data, 1000 is noise
    condition  tensors by name, each with B rows; a model reads those that it needs:
        labels         (B,) int64 in [0, num_classes]; num_classes means no class
        text           (B, L, text_width) token features; only the first text_lengths[b] are real
        text_lengths   (B,) int64 in [0, L]; absent: all L
        text_noise     (B, L, text_width) standard normal, for noisy replicate padding in training
        pooled         (B, pooled_width) one vector for the whole text
        control        (B, K) float32, a column for each entry of conditioning.control, in order
        drop_semantic  (B,) bool; rows drawn without class or text; absent: none
        drop_control   (B,) bool; rows drawn without control; absent: none
        keep           (B, K) int64 tokens that a masked pass keeps, rising; absent: all

and returns (B, C, H, W) in the parameters' dtype, or (B, 2 C, H, W) with `learn_sigma`, whose
second half is a variance. The weights are a function of the `seed` it is built with.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import model_validator
from torch import Tensor

from etude.core.config import Config, option

from .conditioning import ConditioningConfig

Condition = Mapping[str, Tensor]


class DenoiserConfig(Config):
    """What a denoiser of any family is told; `preset` fills the fields of a published model."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    input_size: int = option(32, "height and width of the latents", unit="pixels", gt=0)
    in_channels: int = option(4, "channels of the latents", gt=0)
    num_classes: int = option(1000, "classes; label num_classes means none", ge=0)
    learn_sigma: bool = option(True, "also return a variance for every channel")
    conditioning: ConditioningConfig = option(
        ConditioningConfig(), "what the pictures are asked for by, and how it enters"
    )
    activation_checkpointing: bool = option(
        False, "recompute each block in the backward pass to save memory", affects_result=False
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, data: Any) -> Any:
        """Contradictions of the preset are refused."""
        if not isinstance(data, dict):
            return data
        # A recipe's numbers come as a list, and a strict tuple field would refuse it from here on.
        given = {name: tuple(v) if _numbers(v) else v for name, v in data.items()}
        sizes = cls.presets.get(given.get("preset") or "", {})
        for name, value in sizes.items():
            if given.get(name, value) != value:
                raise ValueError(
                    f"{name}={given[name]} contradicts preset {given['preset']} ({name}={value}):"
                    f" leave out {name}, or the preset"
                )
        return given | dict(sizes)

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)


class TransformerConfig(DenoiserConfig):
    """What a denoiser of square tokens and one width is told beside."""

    patch_size: int = option(2, "height and width of a token", unit="pixels", gt=0)
    hidden_size: int = option(384, "width of the residual stream", gt=0, multiple_of=4)
    depth: int = option(12, "number of blocks", gt=0)
    num_heads: int = option(6, "attention heads", gt=0)
    mlp_ratio: float = option(4.0, "inner width of the MLP over hidden_size", gt=0)

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.num_heads

    @property
    def grid(self) -> int:
        """Tokens along a side of the picture."""
        return self.input_size // self.patch_size

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.input_size % self.patch_size:
            raise ValueError(
                f"input_size={self.input_size} is not a multiple of patch_size={self.patch_size}"
            )
        if self.num_heads and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}"
            )
        return self


def _numbers(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, int | float) for item in value)
    )
