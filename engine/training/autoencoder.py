"""Training an autoencoder: its loss, its reconstructions on the way, its folder at the end."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from etude.core import distributed, rng
from etude.core.run import Run
from etude.core.signals import Stopper
from etude.core.strategy import Strategy
from etude.data.loader import Batch
from etude.external.diffusers import Autoencoder, estimate_scaling
from etude.pictures import picture_grid
from etude.sampling import to_uint8

from .critics import Critics
from .job import HELD_OUT_PICTURES, Job, Look
from .recipe import AutoencoderRecipe


class AutoencoderJob(Job):
    def __init__(
        self,
        recipe: AutoencoderRecipe,
        run: Run,
        look: Look,
        world: distributed.World,
        stopper: Stopper,
    ) -> None:
        super().__init__(recipe, run, look, world, stopper)
        self.model = Autoencoder.build(recipe.model, seed=recipe.seed)
        judged = recipe.perceptual or recipe.adversarial
        self.critics = Critics(recipe, self.model, world) if judged else None
        side = recipe.data.augment.image_size // self.model.downscale
        self.latent_shape = (recipe.model.latent_channels, side, side)
        if world.rank == 0:
            look.page.chapter(
                look.id("autoencoder"),
                look.title("Autoencoder"),
                "Pictures to latents and back.",
                order=look.order,
            )

    def wrap(self, strategy: Strategy) -> Strategy:
        if self.critics is None:
            return strategy
        for note in self.critics.notes():
            self.look.log.info(note)
        return self.critics.wrap(strategy, self.recipe.loop.accumulation(self.world.size))

    def inputs(self) -> dict[str, str]:
        distance = self.critics.perceptual if self.critics is not None else None
        found = {"perceptual": distance.weights_sha256} if distance is not None else {}
        return super().inputs() | found

    def losses(self, forward: Callable, batch: Batch) -> Tensor:
        step = self.recipe.loop.global_batch
        step_start = int(batch.positions[0]) // step * step
        playing = self.critics is not None and self.critics.playing(step_start)
        return self._losses(forward, batch, playing)

    def _losses(self, forward: Callable, batch: Batch, playing: bool) -> Tensor:
        noise = rng.normal(
            self.recipe.seed,
            rng.Stream.POSTERIOR,
            batch.positions,
            self.latent_shape,
            self.world.device,
        )
        if self.critics is None:
            return forward(batch.images, noise)
        loss, rebuilt, last_input = forward(batch.images, noise, parts=True)
        return loss + self.critics.added(batch.images, rebuilt, last_input, playing)

    def evaluate(self, strategy: Strategy, images_seen: int) -> float | None:
        batch = self.still(self.held_out_set, HELD_OUT_PICTURES)
        found = {}
        for profile in self.profiles:
            with strategy.weights(profile) as model, torch.no_grad():
                if self.world.rank == 0:
                    # without the discriminator, whose measure moves as it learns
                    found[profile] = float(self._losses(model, batch, playing=False).mean())
                    rebuilt = model.decode(model.encode(batch.images[:20])[0])
        if self.world.rank != 0:
            return None
        self.look.log.metrics("held_out", images_seen, **found)
        if self.critics is not None and self.critics.playing(images_seen):
            opinion = self.critics.opinion(batch.images[:20], rebuilt)
            self.look.log.metrics("discriminator", images_seen, **opinion)
        pairs = np.concatenate([to_uint8(batch.images[:20]), to_uint8(rebuilt)])
        self.look.page.grid(
            self.look.id("reconstructions"),
            "Held-out pictures and their reconstructions",
            picture_grid(pairs, columns=20),
            "Above: pictures never trained on. Below: the same after the autoencoder.",
            f"{images_seen:,} images",
            order=self.look.order + 1,
        )
        self.show_losses("autoencoder-loss", "Reconstruction loss")
        self.show_progress(images_seen)
        return found[self.recipe.default_weights()]

    def finish(self, model: Autoencoder) -> dict:
        """Measure the latents' scale on training pictures and write diffusers' folder."""
        pictures = self.still(self.train_set, 1024).images
        held_out = self.still(self.held_out_set, HELD_OUT_PICTURES).images
        with torch.no_grad():
            scaling, shift = estimate_scaling(*model.encode(pictures))
            rebuilt = model.decode(model.encode(held_out)[0])
        model.set_scaling(scaling, shift)
        model.save(self.run.folder / "autoencoder")
        error = float((rebuilt - held_out).square().mean().sqrt()) * 127.5
        return {
            "held_out_rms_error_levels": round(error, 3),
            "scaling_factor": scaling,
            "shift_factor": shift,
        }
