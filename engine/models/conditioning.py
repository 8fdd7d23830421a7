"""Conditions of a denoiser: semantic ones (class, text) and control ones (crop, flip, sizes).

Called by every denoiser of this room. Berrada et al. 2024 ("On Improved Conditioning Mechanisms and
Pre-training Strategies for Diffusion Models") separate the two: semantics enter through attention,
control enters through adaLN beside the timestep and is phased in over denoising by a cosine
schedule, so that it should not move a picture's content. Their formula is not known to us; ours is
a power cosine, the form of MDTv2's guidance (Gao et al. 2023):

    c(t) = time(t) + sum_k gamma(t; p_k) MLP_k(sines(value_k))
    gamma(t; p) = (1 - cos(pi (1 - t)^p)) / 2         t = 1 noise, t = 0 data

A larger exponent p comes in later; p = 0 is gamma = 1 throughout, which with `separate` embeddings
is the entangled baseline. `concatenated` is SDXL's (Podell et al. 2023), `micro` PixArt-alpha's
(Chen et al. 2023). The exponents and the padding noise are not known to us either: they are fields,
to be swept.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from etude.core.config import Config, option

from .blocks import sinusoids, vector_mlp

FREQUENCIES = 256  # channels of a scalar's sines and cosines


class ControlConfig(Config):
    """One control value of a picture."""

    name: str = option(
        ..., "crop_top, height, aspect, flip, ..., or a number that every sample's .json holds"
    )
    exponent: float = option(
        1.0, "power of the cosine that phases it in; larger is later, 0 is always", ge=0
    )
    scale: float = option(1.0, "multiplies the value before its sines and cosines", gt=0)


class ConditioningConfig(Config):
    """What a denoiser is asked by, and the way each part enters."""

    semantic: Literal["class", "text"] = option("class", "what a picture's content is asked by")
    semantic_path: Literal["published", "adaln", "attention"] = option(
        "published", "where the content enters; published: as in the family's publication"
    )
    class_tokens: int = option(1, "tokens that a class becomes for attention", gt=0)
    text_tokens: int = option(0, "length of the padded text", unit="tokens", ge=0)
    text_width: int = option(0, "channels of a text token", ge=0)
    pooled_width: int = option(0, "channels of the text's one vector; 0: none", ge=0)
    text_padding: Literal["mask", "zeros", "learned", "replicate", "noisy_replicate"] = option(
        "mask", "what stands behind a text's last token; mask: nothing, attention ends there"
    )
    padding_noise: float = option(
        0.02, "noisy_replicate: noise over the standard deviation of the text's channels", ge=0
    )
    control: list[ControlConfig] = option([], "values that pictures are told apart by")
    control_embedding: Literal["separate", "concatenated", "micro"] = option(
        "separate",
        "separate: an MLP each, summed; concatenated: one MLP (SDXL); micro: an MLP each, side by"
        " side (PixArt's form for any family; its own layers are model.micro_conditions)",
    )
    control_zero: bool = option(True, "control starts without effect: its last layer is zero")

    @model_validator(mode="after")
    def _check(self) -> "ConditioningConfig":
        if self.semantic == "text" and not (self.text_tokens and self.text_width):
            raise ValueError("semantic: text needs text_tokens and text_width: set both")
        self._refuse_idle()
        names = [control.name for control in self.control]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"control {twice!r} is named twice: leave one of them out")
        if self.control_embedding != "separate" and len({c.exponent for c in self.control}) > 1:
            raise ValueError(
                f"control_embedding: {self.control_embedding} has one exponent for all: give every"
                " control the same, or set control_embedding: separate"
            )
        return self

    def _refuse_idle(self) -> None:
        """A field that is not as it was, and without effect beside the others, is an error."""
        text = ("text_tokens", "text_width", "pooled_width", "text_padding")
        idle = [(name, "semantic: class", "semantic: text") for name in text]
        if self.semantic == "text":
            idle = [("class_tokens", "semantic: text", "semantic: class")]
        if self.semantic_path == "adaln":
            idle.append(("class_tokens", "semantic_path: adaln", "semantic_path: attention"))
        if self.text_padding != "noisy_replicate":
            given = f"text_padding: {self.text_padding}"
            idle.append(("padding_noise", given, "text_padding: noisy_replicate"))
        if not self.control:
            names = ("control_embedding", "control_zero")
            idle += [(name, "control: []", "control to some values") for name in names]
        for name, given, wanted in idle:
            if self.differs(name):
                raise ValueError(
                    f"{name} has no effect with {given}: leave it out, or set {wanted}"
                )


def power_cosine(t: Tensor, exponent: float) -> Tensor:
    """gamma(t; p) = (1 - cos(pi (1 - t)^p)) / 2 for times t in [0, 1], 1 noise; same shape."""
    return 0.5 * (1.0 - torch.cos(math.pi * (1.0 - t.clamp(0.0, 1.0)) ** exponent))


def scaled(values: Tensor, control: Sequence[ControlConfig]) -> Tensor:
    """Control values (B, K), each times its `scale`.

    The scales are no buffer: a model in bf16 would round them, and the angles with them.
    """
    return torch.stack([values[:, k] * entry.scale for k, entry in enumerate(control)], dim=1)


def zero_where(dropped: Tensor | None, vectors: Tensor) -> Tensor:
    """Vectors (B, D), zero in the rows where `dropped` (B,) bool is true; None: in none."""
    return vectors if dropped is None else vectors.masked_fill(dropped[:, None], 0.0)


class ControlEmbedder(nn.Module):
    """Control values (B, K) and times (B,) to a vector (B, D) that adaLN adds to the timestep's."""

    def __init__(self, hidden_size: int, config: ConditioningConfig) -> None:
        super().__init__()
        self.exponents = [control.exponent for control in config.control]
        self.kind, count = config.control_embedding, len(config.control)
        self.control = config.control
        if self.kind == "concatenated":
            widths = [(count * FREQUENCIES, hidden_size)]
        elif self.kind == "micro":
            # Slices as equal as K allows; PixArt's three are D / 3 each.
            edges = [k * hidden_size // count for k in range(count + 1)]
            widths = [(FREQUENCIES, b - a) for a, b in zip(edges, edges[1:], strict=False)]
        else:
            widths = [(FREQUENCIES, hidden_size)] * count
        self.mlps = nn.ModuleList(vector_mlp(wide, out) for wide, out in widths)

    def initialise(self, zero: bool) -> None:
        """Weights N(0, 0.02) as the timestep's, biases zero; the last layers zero with `zero`."""
        for mlp in self.mlps:
            for layer in (mlp[0], mlp[2]):
                nn.init.normal_(layer.weight, std=0.0 if zero and layer is mlp[2] else 0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, t: Tensor, values: Tensor, dropped: Tensor | None = None) -> Tensor:
        """
        Args:
            t: (B,) time times 1000.
            values: (B, K) in the order of the configuration.
            dropped: (B,) bool; rows that get zero.
        """
        dtype = self.mlps[0][0].weight.dtype
        time = t.to(torch.promote_types(t.dtype, torch.float32)) / 1000.0
        waves = sinusoids(scaled(values.to(time.dtype), self.control), FREQUENCIES)
        if self.kind == "separate":
            parts = [mlp(waves[:, k].to(dtype)) for k, mlp in enumerate(self.mlps)]
            gates = [power_cosine(time, p).to(dtype)[:, None] for p in self.exponents]
            out = sum(gate * part for gate, part in zip(gates, parts, strict=True))
        else:
            if self.kind == "concatenated":
                out = self.mlps[0](waves.flatten(1).to(dtype))
            else:
                rows = [mlp(waves[:, k].to(dtype)) for k, mlp in enumerate(self.mlps)]
                out = torch.cat(rows, dim=1)
            out = power_cosine(time, self.exponents[0]).to(dtype)[:, None] * out
        return zero_where(dropped, out)


class TextTokens(nn.Module):
    """A batch's text as padded token features, what was dropped replaced by the null text.

    Padding beyond a text's length is done here and not in the data, so that the null text and
    every prompt are padded alike: guidance must not learn from a length (`text_padding`).
    """

    def __init__(self, config: ConditioningConfig, *, null: str = "null") -> None:
        """`null` names the buffer of the null text, for families that publish it."""
        super().__init__()
        self.kind, self.noise, self.null_name = config.text_padding, config.padding_noise, null
        self.register_buffer(null, torch.zeros(config.text_tokens, config.text_width))
        if self.kind == "learned":
            self.padding = nn.Parameter(torch.zeros(config.text_width))

    def forward(self, condition: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Features (B, L, text_width), and the number of tokens to attend to (B,), None for all."""
        text, lengths = condition["text"], condition.get("text_lengths")
        if lengths is not None:
            noise = condition.get("text_noise") if self.kind == "noisy_replicate" else None
            text = pad_text(
                text,
                lengths,
                self.kind,
                padding=getattr(self, "padding", None),
                noise=noise,
                strength=self.noise,
            )
        dropped = condition.get("drop_semantic")
        if dropped is not None:
            null = getattr(self, self.null_name).to(text.dtype)
            text = torch.where(dropped[:, None, None], null, text)
            if lengths is not None:
                lengths = torch.where(dropped, text.shape[1], lengths)
        return text, lengths if self.kind == "mask" else None


def pad_text(
    text: Tensor,
    lengths: Tensor,
    kind: str,
    *,
    padding: Tensor | None = None,
    noise: Tensor | None = None,
    strength: float = 0.0,
) -> Tensor:
    """Replace what stands behind each text's last token.

    Args:
        text: (B, L, d); values at and beyond `lengths` are ignored.
        lengths: (B,) int64 in [0, L]; a text of length 0 becomes zeros (or `padding`).
        kind: "mask" and "zeros" put zeros there, "learned" puts `padding` (d,), "replicate" and
            "noisy_replicate" put the text's own tokens again, in turn.
        noise: (B, L, d) standard normal or None, for "noisy_replicate": added to the copies times
            `strength` times the standard deviation of each channel over the text's own tokens.
    """
    at = torch.arange(text.shape[1], device=text.device)
    real = (at < lengths[:, None])[:, :, None]
    if kind in ("mask", "zeros"):
        return text.masked_fill(~real, 0.0)
    if kind == "learned":
        assert padding is not None
        return torch.where(real, text, padding.to(text.dtype))
    source = at % lengths.clamp(min=1)[:, None]
    copies = text.gather(1, source[:, :, None].expand_as(text))
    copies = copies.masked_fill((lengths == 0)[:, None, None], 0.0)
    if noise is None:
        return copies
    count = lengths.clamp(min=1)[:, None, None].to(text.dtype)
    own = text.masked_fill(~real, 0.0)
    centre = own.sum(1, keepdim=True) / count
    spread = ((own - centre).masked_fill(~real, 0.0).square().sum(1, keepdim=True) / count).sqrt()
    return torch.where(real, copies, copies + strength * spread * noise.to(text.dtype))


class ClassTokens(nn.Module):
    """Labels (B,) int64 in [0, num_classes] to tokens (B, count, width) for attention."""

    def __init__(self, num_classes: int, count: int, width: int) -> None:
        super().__init__()
        self.count = count
        self.embedding_table = nn.Embedding(num_classes + 1, count * width)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels).unflatten(1, (self.count, -1))


def content_tokens(
    model: nn.Module, condition: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Tokens (B, L, D) of a class or a text, and how many to attend to (B,), None for all.

    Args:
        model: has `class_embedder`, or `text_tokens` and the linear map `context_embedder`, as its
            configuration asks for.
    """
    if model.config.conditioning.semantic == "class":
        return model.class_embedder(labels_of(condition, model.config.num_classes)), None
    text, lengths = model.text_tokens(condition)
    return model.context_embedder(text.to(model.context_embedder.weight.dtype)), lengths


def labels_of(condition: Mapping[str, Tensor], null: int) -> Tensor:
    """The batch's labels (B,) int64, `null` where the semantic condition is dropped."""
    dropped = condition.get("drop_semantic")
    labels = condition["labels"]
    return labels if dropped is None else labels.masked_fill(dropped, null)
