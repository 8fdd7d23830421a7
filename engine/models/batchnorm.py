"""Batch normalisation (Ioffe and Szegedy 2015) that also holds over several ranks and in bf16.

Called by `resnet.py`. Alone it is torch's `BatchNorm2d`, with the same names and numbers. Two
things are added. Its running statistics stay in float32 in a network of bf16 weights, where a step
of a hundredth would be lost. And where a sum over ranks is given to it, it normalises by the mean
and variance of the whole global batch, so that a training step does not depend on how many ranks
share it, and the running statistics stay equal on all of them.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WideBuffers(nn.Module):
    """A module whose floating buffers stay in float32 when it is made bf16 or fp16."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.dtype in (torch.bfloat16, torch.float16):
                self._buffers[name] = before[name].to(buffer.device, torch.float32)
        return self


class BatchNorm(WideBuffers, nn.BatchNorm2d):
    """Pictures (B, C, H, W) normalised by channel.

    Attributes:
        sum_over_ranks: a differentiable sum of a tensor over all ranks, whose shares of the batch
            are equally large; None where there is one rank.
        ranks: how many it sums over.
    """

    sum_over_ranks: Callable[[Tensor], Tensor] | None = None
    ranks: int = 1

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        gain, bias = self.weight.to(wide), self.bias.to(wide)
        if self.training:
            self.num_batches_tracked.add_(1)
        if not self.training or self.sum_over_ranks is None:
            statistics = self.running_mean, self.running_var
            return F.batch_norm(x, *statistics, gain, bias, self.training, self.momentum, self.eps)
        return self._over_ranks(x.to(wide), gain, bias).to(x.dtype)

    def _over_ranks(self, x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        count = self.ranks * x.numel() // x.shape[1]
        mean = self.sum_over_ranks(x.sum((0, 2, 3))) / count
        centred = x - mean[:, None, None]
        variance = self.sum_over_ranks(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = gain * torch.rsqrt(variance + self.eps)
        return centred * scale[:, None, None] + bias[:, None, None]
