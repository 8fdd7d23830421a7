"""The classifier that practises: its configuration, its step, its weights; called by rounds.py.

Every arm has the same learner: weights from `seed`, AdamW with an average of the weights, label
smoothing, and shifts (and mirroring, if asked) drawn by position from Philox, so that a step is a
function of (state, pictures, positions) alone. The learning rate comes from the schedule.
"""

import copy
import hashlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude.core.config import Config, option
from etude.core.distributed import World
from etude.core.errors import UserError
from etude.core.optim import OptimConfig
from etude.core.rng import Stream, bits
from etude.core.strategy import StrategyConfig, build_strategy
from etude.models.classifier import Classifier, ClassifierConfig

from .pictures import to_model


class LearnerConfig(Config):
    """The classifier and how it is trained, the same for every arm."""

    model: ClassifierConfig = option(ClassifierConfig(), "the classifier, trained from scratch")
    batch: int = option(64, "pictures per step", unit="pictures", gt=0)
    lr: float = option(1e-3, "peak learning rate of AdamW", gt=0)
    betas: tuple[float, float] = option((0.9, 0.999), "decay of the two moments")
    weight_decay: float = option(0.05, "decoupled decay of matrices (not of vectors)", ge=0)
    clip: float = option(1.0, "largest global gradient norm; 0 turns clipping off", ge=0)
    label_smoothing: float = option(0.1, "share of the target spread over all classes", ge=0, lt=1)
    ema: float = option(0.99, "decay of the average of the weights", gt=0, lt=1)
    shift: int = option(1, "largest random shift in each direction", unit="pixels", ge=0)
    flip: bool = option(False, "mirror half of the pictures left to right")

    def optim(self) -> OptimConfig:
        """The optimizer's section; the rate of each step comes from the schedule instead."""
        return OptimConfig(
            lr=self.lr,
            betas=self.betas,
            weight_decay=self.weight_decay,
            clip=self.clip,
            ema=[self.ema],
        )


class Learner:
    """A classifier in training.

    Attributes:
        strategy: holds weights, moments and average; what a checkpoint saves.
    """

    def __init__(self, config: LearnerConfig, seed: int, device: torch.device | str) -> None:
        self.config, self.seed = config, seed
        self.world = World(0, 1, 0, torch.device(device))
        self.strategy = build_strategy(
            StrategyConfig(kind="local"),
            Classifier(config.model, seed=seed),
            config.optim(),
            self.world,
        )
        self._unsound = torch.zeros((), dtype=torch.bool, device=self.world.device)

    def step(
        self, images: np.ndarray, labels: np.ndarray, positions: np.ndarray, rate: float
    ) -> Tensor:
        """One update; returns the mean loss as a 0-d tensor on the device, not synchronised.

        Args:
            images: (B, S, S, C) uint8.
            labels: (B,) int64.
            positions: (B,) int64; a position fixes the shift and the mirroring.
            rate: multiplier of the peak learning rate, in (0, 1].
        """
        device = self.world.device
        batch = augment(to_model(images, device), positions, self.config, self.seed)
        target = torch.from_numpy(labels).to(device)
        loss = F.cross_entropy(
            self.strategy(batch), target, label_smoothing=self.config.label_smoothing
        )
        self.strategy.backward(loss)
        self.strategy.step(self.config.lr * rate)
        self._unsound = self._unsound | self.strategy.nonfinite
        return loss.detach()

    def refuse_nonfinite(self, steps_done: int) -> None:
        """Raise when some step since the start was not finite (such a step changed nothing)."""
        if bool(self._unsound):
            raise UserError(
                f"the learner's loss was not finite by step {steps_done}: lower learner.lr "
                f"(now {self.config.lr}) or set learner.clip"
            )

    def frozen(self, weights: str) -> nn.Module:
        """A copy in evaluation mode, without gradients of weights; `weights` is "raw" or "ema"."""
        profile = "raw" if weights == "raw" else self.strategy.profiles[1]
        with self.strategy.weights(profile) as module:
            return copy.deepcopy(module).eval().requires_grad_(False)


def augment(images: Tensor, positions: np.ndarray, config: LearnerConfig, seed: int) -> Tensor:
    """Shifted and, if asked, mirrored pictures (B, C, H, W); what a shift uncovers is black (-1).

    A position draws its shift, uniform over all offsets up to `config.shift` in both directions,
    and its mirroring from streams of its own.
    """
    shift = config.shift
    if shift:
        count, _, height, width = images.shape
        words = bits(seed, Stream.CROP, positions, 2).astype(np.int64) * (2 * shift + 1) >> 32
        top, left = (torch.from_numpy(column).to(images.device) for column in words.T)
        padded = F.pad(images, (shift, shift, shift, shift), value=-1.0)
        rows = top[:, None] + torch.arange(height, device=images.device)
        columns = left[:, None] + torch.arange(width, device=images.device)
        lane = torch.arange(count, device=images.device)[:, None, None]
        # Advanced indices around a slice put their axes first: (B, H, W, C).
        picked = padded[lane, :, rows[:, :, None], columns[:, None, :]]
        images = picked.permute(0, 3, 1, 2).contiguous()
    if config.flip:
        flip = torch.from_numpy((bits(seed, Stream.FLIP, positions, 1)[:, 0] & 1).astype(bool))
        images = torch.where(flip.to(images.device)[:, None, None, None], images.flip(-1), images)
    return images


def weights_hash(module: nn.Module) -> str:
    """sha256 hex of a module's weights: names a learner in a pool's manifest."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
