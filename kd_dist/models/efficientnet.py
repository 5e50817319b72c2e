"""Weights in the naming of the package efficientnet_pytorch, for timm's tf_efficientnet models.

Detectors of Self-Blended Images (Shiohara and Yamasaki, CVPR 2022) are published so. Both packages build the same
architecture. timm numbers its blocks by stage and counts a block's layers from its own first one, and its models
without `tf_` pad and normalise in another way, although every shape is the same.
"""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

BLOCKS = "_blocks."  # what the names of all blocks begin with there
EPSILON = 1e-3  # of BatchNorm, as in TensorFlow
BLOCK = re.compile(r"blocks\.(\d+)\.(\d+)\.(.+)")  # stage, block in the stage, what of it

# The modules of timm's models and of blocks, as they are called there.
AROUND = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
SQUEEZE = {"se.conv_reduce": "_se_reduce", "se.conv_expand": "_se_expand"}
EXPANDED = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"}
EXPANDED |= {"conv_pwl": "_project_conv", "bn3": "_bn2", **SQUEEZE}
FIRST = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2", **SQUEEZE}


def is_published(names: Iterable[str]) -> bool:
    """Whether the names of a state dict are those of efficientnet_pytorch."""
    return any(name.startswith(BLOCKS) for name in names)


def renamed(weights: Mapping[str, Tensor], wanted: Iterable[str]) -> dict[str, Tensor]:
    """A state dict of efficientnet_pytorch under the names `wanted` of timm's model of the same size.

    What none of them stands for keeps its name, so that a strict comparison finds it.
    """
    here = {there: name for name, there in _published_names(list(wanted)).items()}
    return {here.get(name, name): value for name, value in weights.items()}


def pads_and_normalises_alike(backbone: nn.Module) -> bool:
    """Whether a model computes what efficientnet_pytorch does: it pads and normalises as TensorFlow."""
    from timm.layers import Conv2dSame

    strided = [one for one in backbone.modules() if isinstance(one, nn.Conv2d) and max(one.stride) > 1]
    norms = [one for one in backbone.modules() if isinstance(one, nn.BatchNorm2d)]
    return all(isinstance(one, Conv2dSame) for one in strided) and all(one.eps == EPSILON for one in norms)


def _published_names(names: list[str]) -> dict[str, str]:
    """timm's names -> those of efficientnet_pytorch, which numbers the blocks of all stages in one row."""
    inside = {name: found for name in names if (found := BLOCK.fullmatch(name))}
    places = sorted({(int(found[1]), int(found[2])) for found in inside.values()})
    expanded = {(int(found[1]), int(found[2])) for found in inside.values() if found[3].startswith("conv_pwl.")}
    there = {}
    for name in names:
        prefix, table, rest = "", AROUND, name
        if name in inside:
            place, rest = (int(inside[name][1]), int(inside[name][2])), inside[name][3]
            prefix, table = f"{BLOCKS}{places.index(place)}.", EXPANDED if place in expanded else FIRST
        module, _, tensor = rest.rpartition(".")
        if module in table:
            there[name] = f"{prefix}{table[module]}.{tensor}"
    return there
