"""A small vision transformer for phones: patches from convolutions, then narrow blocks. `kd_dist/mobile_vit`."""

import torch.nn.functional as F
from torch import Tensor, nn

from kd_dist.errors import ModelError

LABEL = "kd_dist/mobile_vit"
LEAST_CHANNELS = 16  # of the patch embedding's first convolution
PATCHES = (2, 4, 8, 16, 32, 64)


class MobileViT(nn.Module):
    """Normalised images (B, channels, H, W), spectrograms or pictures -> (B, classes).

    The patch embedding halves the grid with separable convolutions until a token stands for `patch` x `patch` pixels
    (convolutions before a transformer: 2106.14881). Each block adds a depthwise convolution of its tokens, which tells
    them where they are (conditional positions, 2102.10882), then attention, then an MLP, both behind their norm. Norm,
    mean over the tokens, linear head. No part is bound to a size of the images; where `patch` does not divide it, the
    last patches reach beyond the edge.

    Taps: `stem` is a map (B, width, H / patch, W / patch), `blocks.N` are tokens (B, N, width) that grid() and
    saliency() read, `blocks.N.attn` is for attention(). `width` is that of all tokens, `mlp_ratio` the MLP's hidden
    size in units of it, `dropout` acts on attention and MLP. About 2 M parameters as it is.
    ModelError: sizes that do not go together.
    """

    num_prefix_tokens = 0

    def __init__(
        self,
        classes: int,
        channels: int = 3,
        width: int = 192,
        heads: int = 4,
        blocks: int = 4,
        mlp_ratio: float = 4.0,
        patch: int = 16,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _check_sizes(width, heads, blocks, mlp_ratio, patch, dropout)
        self.stem = Stem(channels, width, patch)
        self.blocks = nn.ModuleList(Block(width, heads, round(width * mlp_ratio), dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        self.apply(_first_weights)

    @property
    def patch_embed(self) -> nn.Module:
        """Who knows the grid of the tokens."""
        return self.stem

    def group_matcher(self, coarse: bool = False) -> dict:
        """Its blocks, as timm's models say theirs."""
        return {"stem": r"^stem", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stem(images)
        height, width = maps.shape[2:]
        tokens = maps.flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens, height, width)
        return self.head(self.norm(tokens).mean(dim=1))


class Stem(nn.Module):
    """(B, channels, H, W) -> (B, width, H / patch, W / patch), rounded up.

    The first convolution is whole: a depthwise one of a single channel has a single filter.
    """

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        steps = patch.bit_length() - 1
        widths = [max(LEAST_CHANNELS, width >> step) for step in reversed(range(steps))]
        layers = [_conv(channels, widths[0], 3, stride=2), nn.ReLU(inplace=True)]
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [_conv(before, before, 3, stride=2, groups=before), nn.ReLU(inplace=True)]
            layers += [_conv(before, after), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers, _conv(widths[-1], width))
        self.steps = steps

    def dynamic_feat_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The grid of the tokens of images of `size` (H, W)."""
        return -(-size[0] >> self.steps), -(-size[1] >> self.steps)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class Block(nn.Module):
    """Tokens (B, N, C) of a grid height x width -> tokens of the same shape."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.position = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads, dropout)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width), nn.Dropout(dropout)
        )

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        maps = tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], height, width)
        tokens = tokens + self.position(maps).flatten(2).transpose(1, 2)
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class Attention(nn.Module):
    """Tokens (B, N, C) -> (B, N, C), each a mean of all; `fused_attn` False computes the weights where taps see them,
    before `attn_drop`."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.fused_attn = heads, True
        self.qkv = nn.Linear(width, 3 * width)
        self.attn_drop = nn.Dropout(dropout)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, count, width = tokens.shape
        parts = self.qkv(tokens).reshape(batch, count, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        if self.fused_attn:
            dropped = self.attn_drop.p if self.training else 0.0
            mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropped)
        else:
            weights = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(dim=-1)
            mixed = self.attn_drop(weights) @ value
        return self.proj(mixed.transpose(1, 2).reshape(batch, count, width))


def _check_sizes(width: int, heads: int, blocks: int, mlp_ratio: float, patch: int, dropout: float) -> None:
    for name, value in {"width": width, "heads": heads, "blocks": blocks, "mlp_ratio": mlp_ratio}.items():
        if not value > 0:
            raise ModelError(f"{LABEL}: option '{name}' must be above 0, not {value}")
    if width % heads:
        raise ModelError(f"{LABEL}: width {width} cannot be divided by {heads} heads")
    if patch not in PATCHES:
        raise ModelError(f"{LABEL}: option 'patch' must be one of {', '.join(map(str, PATCHES))}, not {patch}")
    if not 0 <= dropout < 1:
        raise ModelError(f"{LABEL}: option 'dropout' must be from 0 to below 1, not {dropout}")


def _conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution and BatchNorm."""
    weights = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(weights, nn.BatchNorm2d(outputs))


def _first_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
