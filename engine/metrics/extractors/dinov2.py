"""DINOv2 features (Oquab et al. 2023; with registers Darcet et al. 2024).

Stein et al. 2023 ("Exposing flaws of generative model evaluation metrics") take the class token of
ViT-L/14 for Frechet distances. Pictures are brought to 224 x 224 as a whole by Pillow's bicubic
filter and normalised as for ImageNet, as they do; positions, learned for 518 pixels, are resampled
as the weights' publisher does it, whichever layout the weights are in (transformers resamples them
a little differently):

    facebook        dinov2_vit{s,b,l,g}14[_reg4]_pretrain.pth
    transformers    a folder with config.json and model.safetensors
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from etude.core.errors import UserError

from .base import Backbone, extractor
from .preparing import IMAGENET, normalised
from .vision_transformer import VisionTransformer, join_qkv, resampled_positions
from .weights import fill, parts, read_tensors

_HEAD = 64  # channels of an attention head, in every size that was published
# transformers' names -> the publisher's; what stands in a block after "blocks.N.".
_OUTSIDE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.patch_embeddings.projection.": "patch_embed.proj.",
    "encoder.layer.": "blocks.",
    "layernorm.": "norm.",
}
_INSIDE = {
    ".attention.output.dense.": ".attn.proj.",
    ".layer_scale1.lambda1": ".ls1.gamma",
    ".layer_scale2.lambda1": ".ls2.gamma",
    ".mlp.weights_in.": ".mlp.w12.",
    ".mlp.weights_out.": ".mlp.w3.",
}


@extractor("dinov2")
class DINOv2(Backbone):
    """The normalised class token (384 to 1536), and the mean of the normalised patch tokens.

    Args:
        weights: the publisher's file, or a transformers folder.
        input_size: side that pictures are brought to, a multiple of the patch; pixels.
    """

    resize = "bicubic of Pillow, the whole picture"

    def __init__(self, weights: Path, input_size: int = 224) -> None:
        super().__init__()
        state, _ = read_tensors(weights, "DINOv2")
        heads = _stated_heads(weights)
        if any("embeddings." in name for name in state):
            state = _from_transformers(state)
        state.pop("mask_token", None)
        try:
            width, _, patch, _ = state["patch_embed.proj.weight"].shape
            places, depth = state["pos_embed"].shape[1], _depth(state)
            swiglu = "blocks.0.mlp.w12.weight" in state
            inner = state["blocks.0.mlp.w3.weight" if swiglu else "blocks.0.mlp.fc2.weight"]
        except (KeyError, ValueError):
            raise UserError(f"{weights} is not DINOv2: name its file of weights") from None
        if input_size < patch or input_size % patch:
            raise UserError(f"input_size={input_size} is not a multiple of the patch, {patch}")
        registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
        with torch.device("meta"):
            self.network = VisionTransformer(
                width,
                depth,
                heads or width // _HEAD,
                inner.shape[1],
                patch,
                places,
                activation="swiglu" if swiglu else "gelu",
                eps=1e-6,
                scaled=True,
                registers=registers,
            )
        self.weights_sha256 = fill(self.network, state, weights)
        self.version = f"1 {heads or width // _HEAD} heads"  # no tensor, and changes every number
        self.network.pos_embed = nn.Parameter(
            resampled_positions(
                self.network.pos_embed,
                input_size // patch,
                antialias=bool(registers),
                offset=0.0 if registers else 0.1,
            ),
            requires_grad=False,
        )
        self.input_size, self.taps = input_size, {"cls": width, "patches": width}

    def prepare(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """Pictures (B, 3, input_size, input_size), normalised, channels last."""
        return normalised(images, self.input_size, "bicubic", IMAGENET, dtype)

    def forward(self, x: Tensor, taps: Sequence[str]) -> dict[str, Tensor]:
        """The class token and the mean patch token, each (B, width)."""
        first, patches = self.network(x)
        found = {"cls": self.network.norm(first)}
        if "patches" in taps:
            found["patches"] = self.network.norm(patches).mean(1)
        return found


def _from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under the publisher's names."""
    made = {}
    for name, value in (parts(state, "dinov2.") or state).items():
        for old, new in _OUTSIDE.items():
            name = new + name.removeprefix(old) if name.startswith(old) else name
        for old, new in _INSIDE.items():
            name = name.replace(old, new)
        made[name] = value
    join_qkv(made, *(f"attention.attention.{part}" for part in ("query", "key", "value")))
    return made


def _depth(state: dict[str, Tensor]) -> int:
    return len({name.split(".")[0] for name in parts(state, "blocks.")})


def _stated_heads(weights: Path) -> int:
    """Attention heads that a transformers folder states, else 0."""
    file = weights / "config.json"
    if not file.is_file():
        return 0
    try:
        return int(json.loads(file.read_text()).get("num_attention_heads", 0))
    except (ValueError, AttributeError):
        raise UserError(f"{file} is not a configuration: copy the folder again") from None
