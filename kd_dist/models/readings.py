"""Readings of what a tap has taken: tokens as a map, where a feature is strong, where attention goes.

Each takes a tensor of the network, and `Patches`: on what grid the network's tokens lie. A ModelError is the second
half of a sentence that says where.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from kd_dist.errors import ModelError

_LEAST = 1e-6  # of the mean is added at every place: the root of 0 has no gradient
Size = tuple[int, int]


class Patches(NamedTuple):
    """The grid (h, w) of the last images in patches, and how many tokens (class, registers) may stand before them."""

    grid: Size | None  # None: the network does not say
    prefix: int


def patches(backbone: nn.Module, size: Size) -> Patches:
    """What a backbone says of images of `size` (H, W): by its `patch_embed` and `num_prefix_tokens`, as timm's do."""
    embed = getattr(backbone, "patch_embed", None)
    if callable(getattr(embed, "dynamic_feat_size", None)):
        grid = tuple(embed.dynamic_feat_size(size))
    else:
        grid = getattr(embed, "grid_size", None)
    return Patches(grid, getattr(backbone, "num_prefix_tokens", None) or 0)


def grid(tokens: Tensor, of: Patches, size: None = None) -> Tensor:
    """Tokens (B, N, C) -> (B, C, h, w), without those that stand before the patches."""
    if tokens.ndim != 3:
        raise ModelError(f"gives {tuple(tokens.shape)}, and grid() is for tokens (B, N, C); leave it out")
    if of.grid is None:
        raise ModelError("gives tokens, and the network does not say on what grid (`patch_embed.grid_size`); tap a map")
    (height, width), count = of.grid, tokens.shape[1]
    before = count - height * width
    if before not in (0, of.prefix):
        raise ModelError(
            f"gives {count} tokens, which are no {height}x{width} patches, with or without {of.prefix} tokens before "
            f"them; tap a module that keeps a token for each patch"
        )
    return tokens[:, before:].transpose(1, 2).reshape(len(tokens), -1, height, width)


def saliency(value: Tensor, of: Patches, size: Size | None) -> Tensor:
    """Maps (B, C, h, w) or tokens (B, N, C) -> (B, 1, h, w) float32: the root of a distribution p over the places.

    p is proportional to the mean of squares over the channels, brought to the grid `size` if one is given. The root is
    delivered because the losses `saliency` and `at` square a feature: what they compare is p itself.
    """
    if value.ndim == 2:
        raise ModelError(f"gives vectors {tuple(value.shape)}, which have no places; tap maps or tokens")
    maps = grid(value, of) if value.ndim == 3 else value
    return _root_of_shares(maps.float().square().mean(dim=1, keepdim=True), size)


def attention(received: Tensor, of: Patches, size: Size | None) -> Tensor:
    """What each token receives (B, N) -> (B, 1, h, w) float32: the root of a distribution p over the patches.

    p is the mean attention over heads and queries, without the tokens before the patches, brought to the grid `size` if
    one is given. The root as in `saliency`.
    """
    return _root_of_shares(grid(received.unsqueeze(-1), of), size)


def received(weights: Tensor) -> Tensor:
    """Attention (B, heads, queries, keys), each row a distribution -> (B, keys) float32: the mean a key receives."""
    if weights.ndim != 4:
        raise ModelError(f"has attention of shape {tuple(weights.shape)}, not (B, heads, queries, keys); tap another")
    return weights.float().mean(dim=(1, 2))


def _root_of_shares(energies: Tensor, size: Size | None) -> Tensor:
    """(B, 1, *own) not negative -> (B, 1, *size); a map of zeros is uniform."""
    energies = energies if size is None else _resized(energies, size)
    lifted = energies + _LEAST * energies.mean(dim=(2, 3), keepdim=True) + _LEAST**3
    return (lifted / lifted.sum(dim=(2, 3), keepdim=True)).sqrt()


def _resized(maps: Tensor, size: Size) -> Tensor:
    """Means of what a place covers where a side shrinks, bilinear where it grows: as losses bring maps to one grid."""
    own = tuple(maps.shape[2:])
    meeting = (min(own[0], size[0]), min(own[1], size[1]))
    if meeting != own:
        maps = F.adaptive_avg_pool2d(maps, meeting)
    return maps if meeting == size else F.interpolate(maps, size, mode="bilinear", align_corners=False)


READINGS = {"grid": grid, "saliency": saliency, "attention": attention}
