"""The module that a stage trains: a network and every trainable projection, in ONE nn.Module.

DeepSpeed prepares exactly one module and DDP must see every parameter, so whatever a loss trains lives here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kd_dist.batch import StudentOutput
from kd_dist.losses.grid import shrunk
from kd_dist.models import Network
from kd_dist.models.taps import Taps

POINTWISE = {1: nn.Linear, 2: nn.Conv1d, 3: nn.Conv2d}  # by the dimensions of a feature without its batch


class Student(nn.Module):
    """Images (B, channels, H, W), uint8 or in [0, 1] -> StudentOutput.

    `taps` names the features it gives and where they are in the network. `projections` says, by loss and feature, to
    how many channels (the teacher's) a trainable 1x1 convolution brings them; `size` is the (H, W) of its images.
    `grids` names the (h, w) at which losses will compare a feature: a longer side is shrunk before the convolution.

    A BatchNorm that gets a single value a channel, as the last share of an epoch may bring about, has no statistics to
    take from it: it goes into evaluation mode, until the next `train()`, where PyTorch would raise.
    """

    def __init__(
        self,
        network: Network,
        taps: Mapping[str, str] | None = None,
        projections: Mapping[str, Mapping[str, int]] | None = None,
        size: tuple[int, int] = (0, 0),
        grids: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.taps = Taps(network, taps) if taps else None
        shapes = self.taps.probe(size) if self.taps is not None else {}
        self.pairs = [(loss, name) for loss, names in (projections or {}).items() for name in names]
        self.grids = {name: grid for name, grid in (grids or {}).items() if len(grid) == len(shapes[name]) - 1 == 2}
        self.projections = nn.ModuleDict(
            {f"{loss}-{name}": projection(shapes[name], projections[loss][name]) for loss, name in self.pairs}
        )
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                module.register_forward_pre_hook(_rest_when_alone)

    def forward(self, images: Tensor) -> StudentOutput:
        if self.taps is None:
            logits, features = self.network(images), {}
        else:
            self.taps.listening = True
            logits = self.network(images)
            features = self.taps.collect(len(images))
            self.taps.listening = False  # with gradient checkpointing blocks run again in the backward pass
        projected: dict[str, dict[str, Tensor]] = {}
        for loss, name in self.pairs:
            feature = shrunk(features[name], self.grids[name]) if name in self.grids else features[name]
            projected.setdefault(loss, {})[name] = self.projections[f"{loss}-{name}"](feature)
        return StudentOutput(logits, features, projected)


def projection(shape: tuple[int, ...], channels: int) -> nn.Module:
    """A trainable linear map of the channels of features of `shape` (C, *grid), at every position alike."""
    kernel = () if len(shape) == 1 else (1,)
    return POINTWISE[len(shape)](shape[0], channels, *kernel)


def _rest_when_alone(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    values = inputs[0]
    if values.numel() == values.shape[1]:
        module.eval()
