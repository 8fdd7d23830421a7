"""What judges a reconstruction beside its pixels: a perceptual distance and a discriminator.

Called by `AutoencoderJob`. With x a picture and y its reconstruction, the loss (Esser et al. 2021,
Rombach et al. 2022) is

    pixels(x, y) + p LPIPS(x, y) + divergence + a w g(y)

where g is the generator's loss, w its weight, p the perceptual one, and a is 1 or, when `adaptive`,
the ratio of the gradients of the first two terms and of g with respect to the decoder's last layer,
each averaged over as many consecutive pictures as the recipe says, so that it depends on no rank
and no micro batch (a discriminator of `norm: batch` does).
All of it is differentiated as far as y and handed to the autoencoder as one gradient, so the
judges stay outside whatever shards the autoencoder, and the last layer's gradients follow from its
input without asking for its weights.
"""

import torch
from torch import Tensor

from etude.core.distributed import World
from etude.core.errors import UserError
from etude.core.optim import OptimConfig
from etude.core.strategy import Strategy, StrategyConfig
from etude.core.strategy_local import LocalStrategy
from etude.core.strategy_pair import PairStrategy
from etude.external.diffusers import LAST_LAYER, Autoencoder
from etude.models.discriminator import PatchDiscriminator, discriminator_loss, generator_loss
from etude.models.lpips import LPIPS, SMALLEST

from .recipe import AutoencoderRecipe

NAME = "discriminator"


class Critics:
    """The perceptual distance and the discriminator of a recipe that asks for either."""

    def __init__(self, recipe: AutoencoderRecipe, autoencoder: Autoencoder, world: World) -> None:
        self.recipe, self.autoencoder, self.world = recipe, autoencoder, world
        self.perceptual, self.discriminator = None, None
        self._strategy: LocalStrategy | None = None
        self._seen: tuple[Tensor, Tensor] | None = None
        channels, side = recipe.model.in_channels, recipe.data.augment.image_size
        if recipe.perceptual:
            self.perceptual = LPIPS.from_file(recipe.perceptual.weights).to(world.device)
            least = SMALLEST[self.perceptual.network]
            if channels not in (1, 3) or side < least:
                raise UserError(
                    f"perceptual on {self.perceptual.network} needs pictures of 1 or 3 channels "
                    f"and at least {least} pixels, not {channels} channels and {side} pixels: "
                    "remove it, or change data.augment.image_size"
                )
        if recipe.adversarial:
            count = recipe.adversarial.adaptive_images
            if recipe.adversarial.adaptive and recipe.loop.micro_batch % count:
                raise UserError(
                    f"loop.micro_batch={recipe.loop.micro_batch} is not a multiple of"
                    f" adversarial.adaptive_images={count}: change one of them"
                )
            config = recipe.adversarial.discriminator
            if side < config.smallest:
                raise UserError(
                    f"adversarial.discriminator.layers={config.layers} needs pictures of at least "
                    f"{config.smallest} pixels, not {side}: lower it"
                )
            self.discriminator = PatchDiscriminator(config, channels, seed=recipe.seed)

    def notes(self) -> list[str]:
        """Sentences for the person at the start."""
        notes = []
        if self.perceptual is not None:
            whose = "LPIPS v0.1" if self.perceptual.known else "weights of your own"
            notes.append(f"perceptual loss: {self.perceptual.network}, {whose}")
        if self.discriminator is not None:
            count = sum(p.numel() for p in self.discriminator.parameters())
            start = self.recipe.adversarial.start_images
            notes.append(f"discriminator: {count:,} parameters, from {start:,} images on")
        return notes

    def wrap(self, strategy: Strategy, accumulation: int) -> Strategy:
        """The strategy that also trains the discriminator, if there is one."""
        if self.discriminator is None:
            return strategy
        precision = self.recipe.strategy.precision
        optim = self.recipe.optim
        lr = self.recipe.adversarial.lr or optim.lr
        own = OptimConfig(lr=lr, betas=optim.betas, eps=optim.eps, ema=[])
        self._strategy = LocalStrategy(
            StrategyConfig(kind="local", precision=precision),
            self.discriminator,
            own,
            self.world,
            accumulation,
        )
        return PairStrategy(strategy, self._strategy, NAME, self._discriminator_loss, lr / optim.lr)

    def playing(self, step_start: int) -> bool:
        """Whether the discriminator takes part in the step that starts at this position."""
        adversarial = self.recipe.adversarial
        return adversarial is not None and step_start >= adversarial.start_images

    def added(self, images: Tensor, rebuilt: Tensor, last_input: Tensor, playing: bool) -> Tensor:
        """What is added to the loss of each picture, (B,) float32.

        Args:
            images: (B, C, H, W) in [-1, 1].
            rebuilt: (B, C, H, W), the autoencoder's; its gradient is the loss's.
            last_input: (B, w, H, W), what the decoder's last layer made `rebuilt` of.
            playing: whether the discriminator takes part.
        """
        learning = torch.is_grad_enabled() and rebuilt.requires_grad
        own = rebuilt.detach().float().requires_grad_(learning)
        judged = self._perceptual_loss(own, images)
        fooled = self._generator_loss(own) if playing else torch.zeros_like(judged)
        weight = torch.full_like(judged, self.recipe.adversarial.weight if playing else 0.0)
        if not learning:
            return judged + weight * fooled
        gradient = _gradient(judged, own)
        if playing:
            self._seen = images, own.detach()
            toward = _gradient(fooled, own)
            if self.recipe.adversarial.adaptive:
                pixels = _gradient(self.autoencoder.pixel_loss(own, images), own)
                weight = weight * self._ratio(pixels + gradient, toward, last_input)
            gradient = gradient + weight.view(-1, 1, 1, 1) * toward
        value = (judged + weight * fooled).detach()
        # rebuilt - own is zero: the second term has no value, only the gradient
        return value + ((rebuilt.float() - own.detach()) * gradient).flatten(1).sum(1)

    def _perceptual_loss(self, rebuilt: Tensor, images: Tensor) -> Tensor:
        if self.perceptual is None:
            return rebuilt.flatten(1).sum(1) * 0.0
        distance = self.recipe.perceptual.weight * self.perceptual(rebuilt, images)
        # as published, the distance counts once for every element of the picture
        summed = self.recipe.model.reduction == "sum"
        return distance * rebuilt[0].numel() if summed else distance

    def _generator_loss(self, rebuilt: Tensor) -> Tensor:
        return generator_loss(self.discriminator(rebuilt), self.recipe.adversarial.game)

    def _ratio(self, rest: Tensor, toward: Tensor, last_input: Tensor) -> Tensor:
        """|d rest / d W| / |d generator / d W| of the decoder's last layer W, clamped, (B,).

        Args:
            rest, toward: (B, C, H, W), the sides' gradients with respect to the pictures.
        """
        kernel, padding = LAST_LAYER["kernel"], LAST_LAYER["padding"]
        shape = (rest.shape[1], last_input.shape[1], kernel, kernel)
        last_input, count = last_input.float(), self.recipe.adversarial.adaptive_images

        def norm(given: Tensor, made_of: Tensor) -> Tensor:
            gradient = torch.nn.grad.conv2d_weight(made_of, shape, given, padding=padding)
            return torch.linalg.vector_norm(gradient / count)

        groups = list(last_input.split(count))
        norms = [
            torch.stack([norm(*pair) for pair in zip(side.split(count), groups, strict=True)])
            for side in (rest, toward)
        ]
        ratio = norms[0] / (norms[1] + 1e-4)
        limit = self.recipe.adversarial.adaptive_limit
        return ratio.clamp(max=limit).repeat_interleave(count)

    def _discriminator_loss(self) -> Tensor | None:
        """Of the pictures that `added` saw last; None where it takes no part."""
        if self._seen is None:
            return None
        (images, rebuilt), self._seen = self._seen, None
        real, fake = self._strategy(images), self._strategy(rebuilt)
        return discriminator_loss(real, fake, self.recipe.adversarial.game).mean()

    @torch.no_grad()
    def opinion(self, images: Tensor, rebuilt: Tensor) -> dict[str, float]:
        """Mean logits of pictures and of reconstructions, and the share of patches told apart."""
        real, fake = (self.discriminator(x).float() for x in (images, rebuilt))
        right = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
        return {"real": float(real.mean()), "fake": float(fake.mean()), "told_apart": float(right)}


def _gradient(losses: Tensor, images: Tensor) -> Tensor:
    """d sum(losses) / d images."""
    return torch.autograd.grad(losses.sum(), images)[0]
