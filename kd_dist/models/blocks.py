"""The blocks of a backbone in their order, the head behind them: what of a network learns, and how fast.

A model with timm's `group_matcher` says itself what its blocks are: its stem, then each block of a stage; a norm behind
the last block belongs to that one. Of any other model the blocks are its top-level children that have parameters (and
first the parameters that it holds itself), in the order in which it made them; the last of them is the head.
"""

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from kd_dist.errors import ModelError
from kd_dist.models import Network


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


def head_parameters(network: Network) -> list[nn.Parameter]:
    """The parameters behind the last block."""
    return [network.backbone.get_parameter(name) for name in groups(network.backbone)[-1]]


def freeze(network: Network, train_last: int) -> None:
    """Let the last so many blocks and the head learn, and nothing else; 0: the head alone.

    What does not learn has `requires_grad` False. A normalisation layer with running statistics that does not learn, or
    has nothing to learn and stands behind such a layer, stays in evaluation mode from now on: its statistics rest too.
    ModelError: there are fewer blocks.
    """
    *blocks, _ = groups(network.backbone)
    if train_last > len(blocks):
        raise ModelError(
            f"{network.label}: has {len(blocks)} blocks before its head, of which the last {train_last} cannot learn; "
            f"give {len(blocks)} at most, or null"
        )
    for name in (name for block in blocks[: len(blocks) - train_last] for name in block):
        network.backbone.get_parameter(name).requires_grad_(False)
    network.resting = tuple(_resting(network.backbone, train_last < len(blocks)))
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
