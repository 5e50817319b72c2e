"""A generator of spectrograms and the discriminator that it learns from: convolutions from grid to grid."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST, WIDEST = 4, 8  # the least side of the coarsest grid; its channels, in units of the finest one's
SLOPE = 0.2  # of LeakyReLU
GROUPS = 8  # of the generator's norms
POOLED = (4, 4)  # what the discriminator's last layer sees: it keeps apart low bands from high ones


def grids(size: tuple[int, int]) -> list[tuple[int, int]]:
    """`size` and its halves, rounded up, as long as both sides are at least SMALLEST; the coarsest first."""
    found = [size]
    while min(half := tuple(-(-side // 2) for side in found[-1])) >= SMALLEST:
        found.append(half)
    return found[::-1]


def channels(width: int, count: int) -> list[int]:
    """Channels of `count` grids, coarsest first: halved from each to the next, `width` at the finest."""
    return [width * min(WIDEST, 2**number) for number in reversed(range(count))]


class Generator(nn.Module):
    """Vectors (B, latent) of normal noise -> levels (B, 1, mels, frames) in [-1, 1], `size` is (mels, frames).

    `width`, a multiple of GROUPS, is the number of channels at full size. From grid to grid maps are enlarged, then
    convolved: transposed convolutions left a pattern of the grid in every sample (Odena et al., Distill 2016).
    """

    def __init__(self, latent: int, width: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.grids = grids(size)
        (height, wide), counts = self.grids[0], channels(width, len(self.grids))
        self.begin = nn.Sequential(
            nn.Linear(latent, counts[0] * height * wide),
            nn.Unflatten(1, (counts[0], height, wide)),
            *_active(counts[0]),
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), *_active(b)) for a, b in pairwise(counts)
        )
        self.end = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        maps = self.begin(latent)
        for grid, block in zip(self.grids[1:], self.blocks, strict=True):
            maps = block(F.interpolate(maps, grid, mode="bilinear"))
        return self.end(maps).tanh()


def _active(count: int) -> tuple[nn.Module, nn.Module]:
    return nn.GroupNorm(GROUPS, count), nn.LeakyReLU(SLOPE)


class Discriminator(nn.Module):
    """Levels (B, 1, mels, frames) in [-1, 1] -> logits (B,), the higher the more like a recording.

    It has no norms: how loud a recording is, and how alike those of a batch are, are signs that it may go by. Its last
    maps are joined by how far the batch is spread at each place, which tells samples that are all alike (minibatch
    standard deviation, 1710.10196, section 3).
    """

    def __init__(self, width: int, size: tuple[int, int]) -> None:
        super().__init__()
        counts = channels(width, len(grids(size)))[::-1]
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 4, stride=2, padding=1), nn.LeakyReLU(SLOPE))
                for a, b in pairwise([1, *counts])
            )
        )
        self.pool = nn.AdaptiveAvgPool2d(POOLED)
        self.end = nn.Linear((counts[-1] + 1) * POOLED[0] * POOLED[1], 1)

    def forward(self, levels: Tensor) -> Tensor:
        maps = self.pool(self.blocks(levels))
        spread = (maps.var(0, unbiased=False) + 1e-8).sqrt().mean(0)
        return self.end(torch.cat([maps, spread.expand(len(maps), 1, -1, -1)], 1).flatten(1)).squeeze(1)


class Gan(nn.Module):
    """Both as one module, so that they are saved, and trained by one optimizer, together.

    The discriminator is twice as wide, as it takes fewer steps; samples begin in the middle of their range, where the
    generator's tanh has its slope.
    """

    def __init__(self, latent: int, width: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.latent = latent
        self.generator = Generator(latent, width, size)
        self.discriminator = Discriminator(2 * width, size)
        self.apply(_first_weights)
        nn.init.normal_(self.generator.end.weight, std=0.02)


def _first_weights(module: nn.Module) -> None:
    """As large as keeps a signal as strong through every layer (1502.01852); PyTorch's own fade it out."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.kaiming_normal_(module.weight, SLOPE, nonlinearity="leaky_relu")
        nn.init.zeros_(module.bias)
