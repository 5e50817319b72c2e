"""A deep head: hidden layers where a model has its last one."""

from collections.abc import Sequence
from typing import Protocol

from torch import nn

from kd_dist.errors import ModelError


class Head(Protocol):
    """What a deep head is made of."""

    hidden: Sequence[int]  # sizes of its hidden layers, at least one
    dropout: float  # probability, after each of them


def deep(features: int, outputs: int, head: Head) -> nn.Sequential:
    """(B, features) -> (B, outputs): a linear layer, GELU and dropout for each hidden size, then a linear layer."""
    layers: list[nn.Module] = []
    for size in head.hidden:
        layers += [nn.Linear(features, size), nn.GELU(), nn.Dropout(head.dropout)]
        features = size
    return nn.Sequential(*layers, nn.Linear(features, outputs))


def with_head(backbone: nn.Module, outputs: int, head: Head, label: str) -> None:
    """Put a deep head in the place of the backbone's classifier, which keeps its name in the weights.

    The classifier is the last nn.Linear with so many `outputs`, of timm's models within what `get_classifier()` gives.
    ModelError, which begins with `label`: there is none, or there are two that answer together.
    """
    name = _classifier(backbone, outputs, label)
    backbone.set_submodule(name, deep(backbone.get_submodule(name).in_features, outputs, head))


def _classifier(backbone: nn.Module, outputs: int, label: str) -> str:
    getter = getattr(backbone, "get_classifier", None)
    given = getter() if callable(getter) else backbone
    parts = given if isinstance(given, (tuple, list)) else [given]
    within = {module for part in parts if isinstance(part, nn.Module) for module in part.modules()}
    found = [
        name
        for name, module in backbone.named_modules()
        if name and module in within and isinstance(module, nn.Linear) and module.out_features == outputs
    ]
    if not found:
        raise ModelError(
            f"{label}: has no linear layer with {outputs} outputs at its end, so `head` has nothing to replace; leave "
            f"`head` out, or use a model that ends in a linear layer"
        )
    if callable(getter) and len(found) > 1:
        raise ModelError(
            f"{label}: answers with {len(found)} layers together ({', '.join(found)}), so `head` cannot replace one; "
            f"leave `head` out, or use another model"
        )
    return found[-1]
