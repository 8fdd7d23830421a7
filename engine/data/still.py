"""Pictures as they are stored, by index, not augmented; for held-out losses, grids and metrics."""

import torch

from .loader import DataConfig, Loader
from .order import StoredOrder
from .shards import ShardSet


def still_loader(data: ShardSet, config: DataConfig, device: torch.device | str = "cpu") -> Loader:
    """A loader of stored pictures at the training size: central square, never mirrored."""
    config = config.model_copy(update={"augment": config.augment.still()})
    return Loader(data, config, seed=0, order=StoredOrder(len(data)), device=device)
