"""Mixup and CutMix: pictures and targets of neighbouring positions, mixed; called by practice.

Mixup (Zhang et al. 2017, "mixup: beyond empirical risk minimization") adds a picture and its
partner with weights share and 1 - share; CutMix (Yun et al. 2019, "CutMix: regularization strategy
to train strong classifiers with localizable features") puts a rectangle of the partner into the
picture. The partner of a position is the next position of the same step, the last one's the first,
and one mix is drawn for a whole step from its number, so nothing depends on how many ranks or micro
batches share the step.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import betaincinv
from torch import Tensor

from etude.core.rng import Stream, uniform


@dataclass(frozen=True)
class Mix:
    """How the pictures of one step are mixed.

    Attributes:
        share: what stays of a picture in its target, in [0, 1].
        box: (top, left, bottom, right) of the partner's rectangle in pixels; None for mixup.
    """

    share: float
    box: tuple[int, int, int, int] | None


def draw_mix(seed: int, step: int, mixup: float, cutmix: float, size: tuple[int, int]) -> Mix:
    """The mix of a step for pictures of `size` = (height, width).

    The share is drawn from Beta(alpha, alpha) by inverting its distribution, and the centre of
    CutMix's rectangle uniformly over the pixels. A fair coin chooses between the two where both
    alphas are positive.

    Args:
        mixup, cutmix: alpha of each; 0 turns it off. One of them is positive.
    """
    coin, chance, across, down = uniform(seed, Stream.MIX, np.array([step]), 4)[0]
    cuts = cutmix > 0 and (mixup == 0 or coin >= 0.5)
    alpha = cutmix if cuts else mixup
    share = float(betaincinv(alpha, alpha, chance))
    if not cuts:
        return Mix(share, None)
    return cut(share, (int(down * size[0]), int(across * size[1])), size)


def cut(share: float, centre: tuple[int, int], size: tuple[int, int]) -> Mix:
    """CutMix's rectangle about `centre` = (row, column) in pictures of `size`.

    Its sides are sqrt(1 - share) times the picture's, and the border cuts it; what is left of it
    sets the share.
    """
    (y, x), (height, width) = centre, size
    half = 0.5 * math.sqrt(1.0 - share)
    half_width, half_height = int(half * width), int(half * height)
    top, bottom = max(y - half_height, 0), min(y + half_height, height)
    left, right = max(x - half_width, 0), min(x + half_width, width)
    area = (bottom - top) * (right - left)
    return Mix(1.0 - area / (height * width), (top, left, bottom, right))


def mixed(pictures: Tensor, partners: Tensor, mix: Mix) -> Tensor:
    """Pictures (B, C, H, W) of any floating dtype, mixed with their partners of the same shape."""
    if mix.box is None:
        return partners * (1.0 - mix.share) + pictures * mix.share
    top, left, bottom, right = mix.box
    made = pictures.clone()
    made[..., top:bottom, left:right] = partners[..., top:bottom, left:right]
    return made


def mixed_targets(labels: Tensor, partners: Tensor, num_classes: int, share: float) -> Tensor:
    """Probabilities (B, num_classes) float32 of labels and their partners', both (B,) int64."""
    own, other = (F.one_hot(found, num_classes).to(torch.float32) for found in (labels, partners))
    return other * (1.0 - share) + own * share
