"""Our own small students: `kd_dist/<name>`, and the one for segmentation."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_dist import choose
from kd_dist.errors import ModelError
from kd_dist.models import Built
from kd_dist.models.mobile_vit import MobileViT
from kd_dist.models.torchvision import load_official

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RATES = (6, 12, 18)  # of the atrous convolutions; DeepLabV3, section 4, at stride 16
LAST_LOW, LAST_MID = 1, 3  # the encoder's last blocks at strides 4 and 8


class MobileNetV3SmallAspp(nn.Module):
    """Normalised images (B, 3, H, W) -> logits (B, classes, H/4, W/4), rounded up.

    MobileNetV3-Small (1905.02244) whose last stage is dilated, so that it ends at stride 16; atrous spatial pyramid
    pooling (DeepLabV3, 1706.05587) with separable convolutions; two steps up, each joined by the encoder's features at
    that stride (DeepLabV3+, 1802.02611).

    Taps: `low` (16 channels at stride 4), `mid` (24 at 8) and `high` (576 at 16), at width 1. `width` scales every
    number of channels. `encoder` has the state names of torchvision's `features`.
    """

    def __init__(self, classes: int, width: float = 1.0) -> None:
        super().__init__()
        from torchvision.models import mobilenet_v3_small

        # torchvision's momentum of 0.01 would need thousands of steps until the running statistics have arrived.
        norm = functools.partial(nn.BatchNorm2d, eps=1e-3)
        self.encoder = mobilenet_v3_small(weights=None, width_mult=width, dilated=True, norm_layer=norm).features
        self.low, self.mid, self.high = nn.Identity(), nn.Identity(), nn.Identity()
        low, mid, high = (self.encoder[number].out_channels for number in (LAST_LOW, LAST_MID, -1))
        context, middle, fine = (scaled(channels, width) for channels in (256, 192, 128))
        self.aspp = Aspp(high, scaled(416, width), context)
        self.reduce_mid = conv(mid, scaled(48, width))
        self.join_mid = separable(context + scaled(48, width), middle)
        self.reduce_low = conv(low, scaled(32, width))
        self.join_low = separable(middle + scaled(32, width), fine)
        self.classifier = nn.Conv2d(fine, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        low, mid, high = self.encode(images)
        joined = self.join_mid(joined_up(self.aspp(high), self.reduce_mid(mid)))
        return self.classifier(self.join_low(joined_up(joined, self.reduce_low(low))))

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The features at strides 4, 8 and 16."""
        value = images
        for number, block in enumerate(self.encoder):
            value = block(value)
            if number == LAST_LOW:
                low = self.low(value)
            elif number == LAST_MID:
                mid = self.mid(value)
        return low, mid, self.high(value)


class Aspp(nn.Module):
    """Atrous spatial pyramid pooling: (B, C, h, w) -> (B, out, h, w), each branch with `channels` channels."""

    def __init__(self, inputs: int, channels: int, outputs: int) -> None:
        super().__init__()
        branches = [conv(inputs, channels), *(separable(inputs, channels, rate) for rate in RATES)]
        self.branches = nn.ModuleList(branches)
        # No BatchNorm here: a batch of one image has a single value a channel.
        self.pooled = nn.Sequential(nn.Conv2d(inputs, channels, 1), nn.ReLU())
        self.project = conv(channels * (len(branches) + 1), outputs)

    def forward(self, value: Tensor) -> Tensor:
        pooled = self.pooled(value.mean(dim=(2, 3), keepdim=True)).expand(-1, -1, *value.shape[-2:])
        return self.project(torch.cat([*(branch(value) for branch in self.branches), pooled], dim=1))


def joined_up(coarse: Tensor, fine: Tensor) -> Tensor:
    """`coarse` (B, C, h, w) brought to the grid of `fine` (B, D, h', w'), and both: (B, C + D, h', w')."""
    up = F.interpolate(coarse, size=fine.shape[-2:], mode="bilinear", align_corners=False)
    return torch.cat([up, fine], dim=1)


def conv(inputs: int, outputs: int, kernel: int = 1, dilation: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution that keeps the grid, BatchNorm, ReLU."""
    padding = dilation * (kernel // 2)
    weights = nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=dilation, groups=groups, bias=False)
    nn.init.kaiming_normal_(weights.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(weights, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def separable(inputs: int, outputs: int, dilation: int = 1) -> nn.Sequential:
    """A 3x3 convolution of each channel alone, then a 1x1 convolution over all of them."""
    return nn.Sequential(conv(inputs, inputs, 3, dilation, groups=inputs), conv(inputs, outputs))


def scaled(channels: int, width: float) -> int:
    """`channels * width`, rounded to a multiple of 8, at least 8."""
    return max(8, int(channels * width / 8 + 0.5) * 8)


STUDENTS = {"mobilenet_v3_small_aspp": MobileNetV3SmallAspp, "mobile_vit": MobileViT}


def build(name: str, classes: int, pretrained: bool, options: dict[str, Any], maps: bool, channels: int) -> Built:
    """Create a student of ours: `mobilenet_v3_small_aspp` for segmentation, where `pretrained` means torchvision's
    ImageNet weights in its encoder, `mobile_vit` for one answer an image."""
    label = f"kd_dist/{name}"
    if name not in STUDENTS:
        raise ModelError(f"{label}: there is no such student{choose.hint(name, STUDENTS)}")
    factory = STUDENTS[name]
    choose.check_options(factory, options, given=["classes", "channels"])
    if factory is MobileViT:
        return _mobile_vit(label, classes, pretrained, options, maps, channels)
    if not maps:
        raise ModelError(f"{label}: answers at every place of an image; use timm/... or torchvision/... for one answer")
    if channels != 3:
        raise ModelError(f"{label}: takes images of 3 channels, and these have {channels}; use kd_dist/mobile_vit")
    if not options.get("width", 1.0) > 0:
        raise ModelError(f"{label}: option 'width' must be above 0, not {options['width']}")
    backbone = factory(classes=classes, **options)
    if pretrained:
        from torchvision.models import MobileNet_V3_Small_Weights

        load_official(backbone.encoder, MobileNet_V3_Small_Weights.IMAGENET1K_V1, label, part="features.")
    return Built(backbone, IMAGENET_MEAN, IMAGENET_STD)


def _mobile_vit(
    label: str, classes: int, pretrained: bool, options: dict[str, Any], maps: bool, channels: int
) -> Built:
    if maps:
        raise ModelError(f"{label}: gives one answer for an image; use kd_dist/mobilenet_v3_small_aspp for maps")
    if pretrained:
        raise ModelError(f"{label}: has no pretrained weights; leave them out, or give a file or `stage:<name>`")
    return Built(MobileViT(classes, channels, **options), (0.5,) * channels, (0.5,) * channels)
