"""The blocks of a backbone in their order, the head behind them: what of a network learns, how fast, and what
of it is computed twice.

A model with timm's `group_matcher` says itself what its blocks are: its stem, then each block of a stage; a norm behind
the last block belongs to that one. Of any other model the blocks are its top-level children that have parameters (and
first the parameters that it holds itself), in the order in which it made them; the last of them is the head.
"""

from collections.abc import Iterator
from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from kd_dist.errors import ModelError
from kd_dist.models import Network

_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def groups(backbone: nn.Module) -> list[list[str]]:
    """The names of the backbone's parameters: those of each block from the input on, the head's last."""
    if callable(getattr(backbone, "group_matcher", None)):
        from timm.models import group_parameters

        found = group_parameters(backbone, backbone.group_matcher(coarse=False))
        return [found[number] for number in sorted(found)]
    children: dict[str, list[str]] = {}
    for name, _ in backbone.named_parameters():
        children.setdefault(name.partition(".")[0] if "." in name else "", []).append(name)
    return list(children.values())


def depths(network: Network) -> dict[nn.Parameter, int]:
    """How far each parameter of the backbone is from the head: 0 within it, 1 in the last block, and so on."""
    backwards = enumerate(reversed(groups(network.backbone)))
    return {network.backbone.get_parameter(name): depth for depth, names in backwards for name in names}


def freeze(network: Network, train_last: int | None) -> None:
    """Let the last so many blocks and the head learn, and nothing else; 0: the head alone, None: all. What was frozen
    before and is no more learns again.

    What does not learn has `requires_grad` False. A normalisation layer with running statistics that does not learn, or
    has nothing to learn and stands behind such a layer, stays in evaluation mode from now on: its statistics rest too.
    ModelError: there are fewer blocks.
    """
    *blocks, _ = groups(network.backbone)
    if train_last is not None and train_last > len(blocks):
        raise ModelError(
            f"{network.label}: has {len(blocks)} blocks before its head, of which the last {train_last} cannot learn; "
            f"give {len(blocks)} at most, or null"
        )
    for name in network.frozen:
        network.backbone.get_parameter(name).requires_grad_(True)
    first = 0 if train_last is None else len(blocks) - train_last  # of the blocks that learn
    held = {name: network.backbone.get_parameter(name) for block in blocks[:first] for name in block}
    network.frozen = tuple(name for name, value in held.items() if value.requires_grad)
    for value in held.values():
        value.requires_grad_(False)
    network.resting = () if train_last is None else tuple(_resting(network.backbone, first > 0))
    network.train(network.training)


def _resting(backbone: nn.Module, frozen: bool) -> list[str]:
    """The names of normalisation layers whose statistics rest; `frozen`: what stands before every parameter."""
    found = []
    for name, module in backbone.named_modules():
        own = list(module.parameters(recurse=False))
        if own:
            frozen = not any(value.requires_grad for value in own)
        if frozen and isinstance(module, _NormBase) and module.running_mean is not None:
            found.append(name)
    return found


def recompute(network: Network) -> None:
    """Gradient checkpointing (Chen et al., 2016, 1604.06174): a block keeps what it was given and, for the backward
    pass, computes the rest again, with the same randomness. PyTorch refuses a block whose input is changed in place.

    A block here is an item, made of parts, of a list or sequence in the model; beside such items, any child that has
    parts. It is wrapped where it is: timm's own way passes over the modules around blocks, where features are tapped.
    ModelError: nothing in the model has parts.
    """
    found = list(_compound(network.backbone))
    if not found:
        raise ModelError(f"{network.label}: has no blocks that could be computed again; set it to false")
    for module in found:
        module.forward = partial(checkpoint, module.forward, use_reentrant=False)


def _compound(module: nn.Module) -> Iterator[nn.Module]:
    """The blocks below a module."""
    for child in module.children():
        lists = [one for one in child.modules() if isinstance(one, _LISTS)]
        if any(any(one.children()) and not isinstance(one, _LISTS) for items in lists for one in items.children()):
            yield from _compound(child)
        elif any(child.children()) and not isinstance(child, (nn.ModuleList, nn.ModuleDict)):  # which do not run
            yield child
