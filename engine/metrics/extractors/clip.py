"""CLIP's features of pictures and of texts (Radford et al. 2021).

Two layouts are read. A transformers folder (config.json, model.safetensors and a tokenizer) has
both towers; a state dict in the publisher's layout, as OpenAI and open_clip name tensors, has the
pictures' tower alone here, since it holds no tokenizer. Features are not normalised: who compares
angles divides by the length. Two ways for a picture to come in:

    clip    shorter side to the network's size by Pillow's bicubic filter, a square from the centre
    cmmd    the largest square of the centre brought to that size, bicubic, as the measure CMMD
            does it (Jayasumana et al. 2024), there with ViT-L/14 at 336 pixels
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from etude.core.errors import UserError
from etude.external.transformers import TextEncoder

from .base import Backbone, extractor
from .preparing import CLIP as LEVELS
from .preparing import cut_from_shorter, largest_square, normalised
from .vision_transformer import VisionTransformer, join_qkv
from .weights import fill, parts, read_tensors, renamed

_ACTIVATIONS = ("quick_gelu", "gelu")
_HEAD = {1280: 80, 1408: 88, 1664: 104}  # channels of a head at a width; 64 elsewhere
_RESIZE = {
    "clip": "bicubic of Pillow, shorter side, cut from the centre",
    "cmmd": "bicubic of Pillow, the largest square of the centre",
}
# Beginnings of names, and what stands in a block, in the two layouts -> the tower's names.
_OUTSIDE = {
    "transformers": (
        ("embeddings.class_embedding", "cls_token"),
        ("embeddings.position_embedding.weight", "pos_embed"),
        ("embeddings.patch_embedding.", "patch_embed.proj."),
        ("pre_layrnorm.", "norm_before."),
        ("encoder.layers.", "blocks."),
        ("post_layernorm.", "norm."),
    ),
    "openai": (
        ("class_embedding", "cls_token"),
        ("positional_embedding", "pos_embed"),
        ("conv1.", "patch_embed.proj."),
        ("ln_pre.", "norm_before."),
        ("transformer.resblocks.", "blocks."),
        ("ln_post.", "norm."),
    ),
}
_INSIDE = {
    ".layer_norm1.": ".norm1.",
    ".layer_norm2.": ".norm2.",
    ".self_attn.out_proj.": ".attn.proj.",
    ".ln_1.": ".norm1.",
    ".ln_2.": ".norm2.",
    ".attn.in_proj_": ".attn.qkv.",
    ".attn.out_proj.": ".attn.proj.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}


@extractor("clip")
class CLIP(Backbone):
    """The projected features (512 to 1280), and the pooled ones before the projection.

    Args:
        weights: a transformers folder, or a file in OpenAI's and open_clip's layout.
        preset: how a picture comes in, "clip" or "cmmd".
        activation: "quick_gelu" (OpenAI's weights) or "gelu" (most of open_clip's) for a file,
            which does not say it; a folder says it itself.

    Attributes:
        text_dim: length of a text's features, that of a picture's.
    """

    def __init__(
        self,
        weights: Path,
        preset: Literal["clip", "cmmd"] = "clip",
        activation: Literal["", "quick_gelu", "gelu"] = "",
    ) -> None:
        super().__init__()
        if preset not in _RESIZE:
            raise UserError(f"there is no preset {preset!r}; choose clip or cmmd")
        state, _ = read_tensors(weights, "CLIP")
        stated = _stated(weights)
        activation = _activation(weights, stated, activation)
        tower = _own_names(state, weights)
        try:
            width, _, patch, _ = tower["tower.patch_embed.proj.weight"].shape
            places, projected = tower["tower.pos_embed"].shape[1], len(tower["projection.weight"])
            inner = tower["tower.blocks.0.mlp.fc1.bias"].shape[0]
        except (KeyError, ValueError):
            raise UserError(f"{weights} holds no vision transformer of CLIP's") from None
        heads = stated.get("num_attention_heads", 12) if stated else width // _HEAD.get(width, 64)
        depth = len({name.split(".")[0] for name in parts(tower, "tower.blocks.")})
        with torch.device("meta"):
            self.tower = VisionTransformer(
                width,
                depth,
                heads,
                inner,
                patch,
                places,
                activation=activation,
                eps=stated.get("layer_norm_eps", 1e-5),
                normed_before=True,
            )
            self.projection = nn.Linear(width, projected, bias=False)
        self.weights_sha256 = fill(self, tower, weights)
        # These are no tensors, and change every number.
        self.version = f"1 {activation}, {heads} heads, {stated.get('layer_norm_eps', 1e-5):g}"
        self.input_size = patch * round((places - 1) ** 0.5)
        self.preset, self.resize = preset, _RESIZE[preset]
        self.taps = {"projection": projected, "pooled": width}
        self.text_dim, self._folder = projected, weights
        self._texts: TextEncoder | None = None

    def prepare(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """Pictures (B, 3, input_size, input_size), normalised, channels last."""
        size = self.input_size
        if self.preset == "cmmd":
            return normalised(largest_square(images), size, "bicubic", LEVELS, dtype)
        return cut_from_shorter(images, size, size, "bicubic", LEVELS, dtype)

    def forward(self, x: Tensor, taps: Sequence[str]) -> dict[str, Tensor]:
        """The projection (B, D) and the pooled features (B, width)."""
        pooled = self.tower.norm(self.tower(x)[0])
        return {"projection": self.projection(pooled), "pooled": pooled}

    @torch.no_grad()
    def text(self, texts: Sequence[str]) -> Tensor:
        """Projected features (B, D) float32 of texts, cut to the tokens that the tower reads.

        Raises:
            UserError: the weights are not a transformers folder with a text tower and a tokenizer.
        """
        tower, place = self._text_tower(), self.projection.weight.device
        if tower.device != place:
            tower.release()
            tower.device = place
        return tower.encode(texts, tower.limit).pooled.float()

    @property
    def text_identity(self) -> str:
        """What fixes the features of texts: tower and tokenizer. Raises as `text`."""
        return self._text_tower().identity

    def _text_tower(self) -> TextEncoder:
        if self._texts is None:
            if not self._folder.is_dir():
                raise UserError(
                    f"{self._folder} is a file without a tokenizer: for texts name a transformers"
                    " folder of CLIP"
                )
            found = TextEncoder.from_folder(self._folder, kind="clip")
            if found.pooled_width != self.text_dim or not found.projected:
                raise UserError(f"{self._folder} holds no text tower with a projection")
            self._texts = found
        return self._texts


def _stated(weights: Path) -> dict[str, Any]:
    """The pictures' section of a folder's config.json, {} for a file."""
    file = weights / "config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text())
        return {"hidden_act": "quick_gelu"} | config.get("vision_config", config)
    except (ValueError, AttributeError, TypeError):
        raise UserError(f"{file} is not a configuration: copy the folder again") from None


def _activation(weights: Path, stated: dict[str, Any], asked: str) -> str:
    found = stated.get("hidden_act", "")
    if found and asked not in ("", found):
        raise UserError(f"{weights} says activation={found} itself; leave out activation")
    found = found or asked
    if not found:
        raise UserError(
            f"{weights} does not say its activation; set activation=quick_gelu for weights that"
            " OpenAI trained, activation=gelu for most others"
        )
    if found not in _ACTIVATIONS:
        raise UserError(f"activation={found!r} is not known; choose {' or '.join(_ACTIVATIONS)}")
    return found


def _own_names(state: dict[str, Tensor], weights: Path) -> dict[str, Tensor]:
    """The pictures' tower and its projection under this file's names."""
    vision, visual = parts(state, "vision_model."), parts(state, "visual.")
    if not vision and not visual:
        raise UserError(f"{weights} holds no vision transformer of CLIP's")
    layout, found = ("transformers", vision) if vision else ("openai", visual)
    projection = state.get("visual_projection.weight")
    if layout == "openai":
        projection = found.pop("proj", None)
        projection = None if projection is None else projection.T
    made = {}
    for name, value in renamed(found, _OUTSIDE[layout]).items():
        for old, new in _INSIDE.items():
            name = name.replace(old, new)
        made[f"tower.{name}"] = value
    join_qkv(made, *(f"self_attn.{part}_proj" for part in "qkv"))
    made.pop("tower.embeddings.position_ids", None)
    for name, axes in (("tower.cls_token", 2), ("tower.pos_embed", 1)):
        if name in made:
            made[name] = made[name].reshape((1,) * axes + made[name].shape)
    kernel = made.get("tower.patch_embed.proj.weight")
    if kernel is not None:
        made["tower.patch_embed.proj.bias"] = torch.zeros(len(kernel))
    return made | ({} if projection is None else {"projection.weight": projection})
