"""What both kinds of training share: data, the looks taken on the way, loss curves."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from etude.core import distributed
from etude.core.errors import UserError
from etude.core.log import Log, read_metrics
from etude.core.recipe import fingerprint
from etude.core.run import Run
from etude.core.signals import Stopper
from etude.core.strategy import Strategy
from etude.data.loader import Batch, Loader
from etude.data.shards import ShardSet
from etude.data.still import still_loader
from etude.page import Page

from .recipe import TrainRecipe

HELD_OUT_PICTURES = 256
# What a run is fed with, by its name in a checkpoint: the recipe's field that says where it lies.
INPUTS = {
    "autoencoder": "autoencoder",
    "data": "data.shards",
    "perceptual": "perceptual.weights",
    "text": "text.encoders",
}


@dataclass
class Look:
    """Where a job shows itself: log, page, and the job's place on a page shared by several."""

    log: Log
    page: Page
    order: int = 0
    label: str = ""

    def id(self, name: str) -> str:
        """A section's identifier, apart from those of other jobs on the page."""
        return f"{name}-{self.order}" if self.order else name

    def title(self, name: str) -> str:
        """A chapter's title, with the values that tell a job of a sweep from its siblings."""
        return f"{name} {self.label[self.label.index('[') :]}" if "[" in self.label else name


class Job:
    """One kind of training: its data, model, loss, and what is looked at on the way."""

    model: nn.Module

    def __init__(
        self,
        recipe: TrainRecipe,
        run: Run,
        look: Look,
        world: distributed.World,
        stopper: Stopper,
    ) -> None:
        self.recipe, self.run, self.look, self.world = recipe, run, look, world
        self.stopper = stopper
        self.train_set = recipe.data.open()
        self.held_out_set = ShardSet(recipe.held_out)
        self.pictures = Loader(self.train_set, recipe.data, seed=recipe.seed, device=world.device)
        self.loader = self.pictures
        self.loader_reason = self.pictures.decoder_reason

    def wrap(self, strategy: Strategy) -> Strategy:
        """The strategy that the loop gets, made of the model's."""
        return strategy

    def begin(self) -> None:
        """Prepare the model of a run that resumes nothing."""

    def losses(self, forward: Callable, batch: Batch) -> Tensor:
        raise NotImplementedError

    def evaluate(self, strategy: Strategy, images_seen: int) -> float | None:
        """Look at held-out pictures; rank 0 returns the loss of the default weights."""
        raise NotImplementedError

    def finish(self, model: nn.Module) -> dict:
        raise NotImplementedError

    def close(self) -> None:
        """End the decoder's threads."""
        self.pictures.close()

    def inputs(self) -> dict[str, str]:
        """Hashes of the content that the recipe names by its place alone; see `INPUTS`."""
        return {"data": self.train_set.fingerprint}

    def extra(self) -> dict:
        """What a checkpoint carries beside the tensors, so that nobody repeats it by hand."""
        return {
            "fingerprint": fingerprint(self.recipe),
            "classes": self.train_set.classes,
            "recipe": self.recipe.model_dump(mode="json"),
        } | self.inputs()

    def check_inputs(self, extra: dict) -> None:
        """Refuse a checkpoint of the same recipe that was made of other pictures or weights.

        Raises:
            UserError: what lies at one of the recipe's places is another by now.
        """
        if extra["fingerprint"] != fingerprint(self.recipe):
            return  # somebody resumes with changes, and was told which
        for name, found in self.inputs().items():
            if extra.get(name, found) != found:
                what = "pictures" if name == "data" else "weights"
                raise UserError(
                    f"{INPUTS[name]} names other {what} than {self.run.folder} was trained with:"
                    " put those back, or start another run with run=NAME"
                )

    def still(self, data: ShardSet, limit: int) -> Batch:
        """The first pictures of a set in stored order, not augmented, (n, C, H, W) in [-1, 1]."""
        loader = still_loader(data, self.recipe.data, device=self.world.device)
        try:
            return loader.fetch(np.arange(min(limit, len(data))))
        finally:
            loader.close()

    @property
    def profiles(self) -> list[str]:
        """The weights that are looked at: the raw ones and the longest average."""
        return list(dict.fromkeys(["raw", self.recipe.default_weights()]))

    def show_progress(self, images_seen: int) -> None:
        """Publish the page with the job's progress at its head."""
        total = self.recipe.loop.images
        self.look.page.state("running", images_seen, total, detail=self.recipe.name)
        self.look.page.write()

    def show_losses(self, id: str, title: str) -> None:
        """Loss curves from metrics.jsonl, so that a resumed page shows the whole run."""
        path = self.run.folder / "metrics.jsonl"
        rows = read_metrics(path, "train")
        series = {"training": ([r["images_seen"] for r in rows], _numbers(rows, "loss"))}
        rows = read_metrics(path, "held_out")
        for profile in self.profiles:
            where = [row["images_seen"] for row in rows]
            series[f"held out, {profile}"] = (where, _numbers(rows, profile))
        self.look.page.curve(
            self.look.id(id),
            title,
            series,
            "images seen",
            "loss",
            log=True,
            order=self.look.order + 3,
        )


def _numbers(rows: list[dict], name: str) -> list[float]:
    """Values of metrics; what was not finite is stored as null."""
    return [math.nan if row[name] is None else row[name] for row in rows]
