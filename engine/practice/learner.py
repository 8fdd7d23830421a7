"""The classifier that practises: its step and its weights; called by course.py.

Every arm has the same learner: weights from `seed`, AdamW with an average of the weights, label
smoothing, and augmentation drawn by position from Philox, so that a step is a function of (state,
pictures, positions) alone. Several ranks share a step's positions evenly; what a position becomes,
and up to rounding the step itself, do not depend on how many there are. The learning rate comes
from the schedule.

A network of the user's own may draw numbers itself, as dropout does. Torch's generators then stand
at a number of (seed, step) for each rank, so a step can be repeated, but on another number of ranks
it draws others.
"""

import copy
import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from etude.core.distributed import World
from etude.core.errors import UserError
from etude.core.rng import Stream, bits
from etude.core.strategy import StrategyConfig, build_strategy
from etude.data.mixing import draw_mix, mixed, mixed_targets
from etude.data.upload import to_device
from etude.models.classifiers import build_classifier

from .augmenting import Prepared, augment, seen_in_training
from .learner_config import LearnerConfig
from .running import (
    RunningBuffers,
    normalise_over_ranks,
    refuse_rounded_statistics,
    without_averages,
)

# Positions (n,) int64 -> pictures (n, S, S, C) uint8 and labels (n,) int64.
Fetch = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


class Learner:
    """A classifier in training.

    Args:
        config: `batch` is the global batch, which the ranks share evenly.
        world: this process's place; all ranks make the same calls.
        strategy: who runs the step, and in which precision.

    Attributes:
        strategy: holds weights, moments and average; what a checkpoint saves.

    Raises:
        UserError: the batch cannot be shared evenly, or the network does not suit several ranks or
            bf16.
    """

    def __init__(
        self,
        config: LearnerConfig,
        seed: int,
        world: World,
        strategy: StrategyConfig = StrategyConfig(kind="local"),  # noqa: B008
    ) -> None:
        if config.batch % world.size:
            raise UserError(
                f"learner.batch={config.batch} cannot be shared by {world.size} processes: make it "
                f"a multiple of {world.size}"
            )
        self.config, self.seed, self.world = config, seed, world
        self._share = config.batch // world.size
        network = build_classifier(config.model, seed=seed)
        bf16 = strategy.precision == "bf16"
        self._dtype = torch.bfloat16 if bf16 else torch.float32
        if bf16:
            refuse_rounded_statistics(network)
        self._running = RunningBuffers(network, config.ema)
        self._prepared = Prepared(nn.Identity(), config).to(world.device)
        self.strategy = build_strategy(
            strategy, self._running.module, config.optim(), world, micro_batch=self._share
        )
        normalise_over_ranks(network, world)
        self._unsound = torch.zeros((), dtype=torch.bool, device=world.device)

    def step(self, fetch: Fetch, step: int, rate: float) -> Tensor:
        """One update; returns this rank's mean loss, a 0-d tensor on the device, not synchronised.

        Args:
            fetch: gives the pictures that positions of the stream show, and their labels.
            step: its number; it covers positions [step * batch, (step + 1) * batch).
            rate: multiplier of the peak learning rate, in (0, 1].
        """
        batch, target = self._batch(fetch, step)
        self._running.keep()
        with self._drawing(step):
            logits = self.strategy(batch.to(self._dtype)).float()
        loss = F.cross_entropy(logits, target, label_smoothing=self.config.label_smoothing)
        self.strategy.backward(loss)
        self.strategy.step(self.config.lr * rate)
        self._running.settle(self.strategy.nonfinite)
        self._unsound = self._unsound | self.strategy.nonfinite
        return loss.detach()

    def _drawing(self, step: int) -> AbstractContextManager[None]:
        """Within it a network of the user's own draws what this rank's share of a step says."""
        if self.config.model.family != "imported":
            return nullcontext()
        first = step * self.config.batch + self.world.rank * self._share
        return torch_drawing(self.seed, first, self.world.device)

    def _batch(self, fetch: Fetch, step: int) -> tuple[Tensor, Tensor]:
        """What the network sees of this rank's share, and its targets: labels, or probabilities."""
        config, share = self.config, self._share
        mixes = config.mixup > 0 or config.cutmix > 0
        inside = np.arange(share) + self.world.rank * share
        if mixes and self.world.size > 1:  # the last picture's partner is the next rank's
            inside = np.append(inside, (inside[-1] + 1) % config.batch)
        positions = step * config.batch + inside
        images, labels = fetch(positions)
        pictures = seen_in_training(
            images, positions, self._prepared, config, self.seed, self.world.device
        )
        target = to_device(labels, self.world.device)
        if not mixes:
            return pictures, target
        mix = draw_mix(self.seed, step, config.mixup, config.cutmix, tuple(pictures.shape[2:]))
        partners, others = (values.roll(-1, 0)[:share] for values in (pictures, target))
        batch = mixed(pictures[:share], partners, mix)
        classes = config.model.num_classes
        return batch, mixed_targets(target[:share], others, classes, mix.share)

    def refuse_nonfinite(self, steps_done: int) -> None:
        """Raise when some step since the start was not finite (such a step changed nothing)."""
        if bool(self._unsound):
            raise UserError(
                f"the learner's loss was not finite by step {steps_done}: lower learner.lr "
                f"(now {self.config.lr}) or set learner.clip"
            )

    def frozen(self, weights: str) -> nn.Module:
        """A float32 copy in evaluation mode behind its preprocessing, without gradients of weights.

        In bf16 training too it has the weights and averages that the strategy keeps in float32. It
        takes pictures of any size in [-1, 1], which it brings to the learner's input size; where
        neither the recipe nor the network has one, the network sees them as they are. All ranks
        call this together.

        Args:
            weights: "raw", or "ema" for the average; running statistics are averaged alike.
        """
        profile = "raw" if weights == "raw" else self.strategy.profiles[1]
        with self.strategy.weights(profile, torch.float32) as module:
            whole = copy.deepcopy(module).float()
        network = without_averages(whole, averaged=weights != "raw")
        return Prepared(network, self.config).eval().requires_grad_(False)


@contextmanager
def torch_drawing(seed: int, position: int, device: torch.device) -> Iterator[None]:
    """Torch's generators stand at a number of (seed, position) inside, and as before afterwards."""
    high, low = (int(word) for word in bits(seed, Stream.DROPOUT, np.array([position]), 2)[0])
    number, on_gpu = (high << 32) | low, device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(number)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(number)
        yield


def weights_hash(module: nn.Module) -> str:
    """sha256 hex of a classifier's weights: names a learner in a pool's manifest.

    Preprocessing is left out: the same network has the same hash behind it and alone.
    """
    network = module.network if isinstance(module, Prepared) else module
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def frozen_bytes(learner: nn.Module) -> bytes:
    """The weights of what `Learner.frozen` gave, as a safetensors file; `load_frozen` reads it."""
    state = learner.network.state_dict()
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})


def load_frozen(config: LearnerConfig, path: str | Path) -> nn.Module:
    """A frozen learner of this configuration with the weights in a file, as `Learner.frozen`."""
    network = build_classifier(config.model)
    try:
        network.load_state_dict(load_file(path), assign=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} does not hold this learner ({reason}): restore it") from None
    return Prepared(network, config).eval().requires_grad_(False)


__all__ = [
    "Fetch",
    "Learner",
    "LearnerConfig",
    "Prepared",
    "augment",
    "frozen_bytes",
    "load_frozen",
    "weights_hash",
]
