"""CLIPScore: the cosine between a picture and its prompt in CLIP's space; called by evaluation/.

    CLIPScore = 100 max(cos(E_image, E_text), 0)

for each picture, then the mean (Hessel et al. 2021, who weigh the cosine with 2.5 where the
usual 100 stands here, and begin each text with "A photo depicts ": set `prefix` for that). The
clipping is per picture, as they define it. torchmetrics and what is built on it clip the mean of
the cosines instead; both agree where no cosine is negative, and else ours is the higher.

Picture features come from the extractor, so its one forward serves this, CMMD and Fréchet distances
of CLIP features.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from etude.core.config import Config, option

from . import scorer, texts_of
from .questions import Asked

_TEXTS = 64  # per forward pass


class CLIPScoreOptions(Config):
    """Options of CLIPScore."""

    prefix: str = option("", 'put in front of every prompt; Hessel et al. use "A photo depicts "')


@scorer("clipscore")
class CLIPScore:
    """CLIPScore of stored CLIP features.

    Args:
        extractor: the CLIP that gave the features; `extractor.text(list[str])`, or that of its
            `backbone`, gives (n, D).
    """

    name: ClassVar = "clipscore"
    version: ClassVar = "1"
    needs: ClassVar = "clip"
    figures: ClassVar = ("clipscore",)
    better: ClassVar = "higher"
    at_least: ClassVar = 0.0
    at_most: ClassVar = 100.0
    Options: ClassVar = CLIPScoreOptions

    def __init__(self, options: CLIPScoreOptions, extractor: Any) -> None:
        self.options, self._extractor = options, extractor
        self._embedded: dict[str, torch.Tensor] = {}

    @property
    def weights_sha256(self) -> str:
        """Over the extractor's and what fixes its features of texts."""
        backbone = getattr(self._extractor, "backbone", self._extractor)
        parts = [self._extractor.weights_sha256, getattr(backbone, "text_identity", "")]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def score(self, features: torch.Tensor, prompts: Sequence[Asked]) -> dict[str, torch.Tensor]:
        """CLIPScore (B,) float32 of picture features (B, D), normalised or not.

        Each text is embedded once in the life of the scorer.

        Raises:
            UserError: a prompt has no text.
        """
        if len(features) != len(prompts):
            raise ValueError(f"{len(features)} rows of features for {len(prompts)} prompts")
        texts = [self.options.prefix + text for text in texts_of(prompts, self.name)]
        self._embed(texts)
        wanted = torch.stack([self._embedded[text] for text in texts])
        picture = F.normalize(features.detach().cpu().double(), dim=1)
        cosine = (picture * F.normalize(wanted.double(), dim=1)).sum(1)
        return {"clipscore": (100.0 * cosine.clamp(min=0.0)).float()}

    @torch.no_grad()
    def _embed(self, texts: Sequence[str]) -> None:
        new = [text for text in dict.fromkeys(texts) if text not in self._embedded]
        embed = getattr(self._extractor, "text", None) or self._extractor.backbone.text
        for start in range(0, len(new), _TEXTS):
            part = new[start : start + _TEXTS]
            self._embedded.update(zip(part, embed(part).float().cpu(), strict=True))
