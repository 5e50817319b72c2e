"""The module that a stage trains: a network and every trainable projection, in ONE nn.Module.

DeepSpeed prepares exactly one module and DDP must see every parameter, so whatever a loss trains lives here.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kd_dist.batch import StudentOutput
from kd_dist.models import Network


class Student(nn.Module):
    """Images (B, 3, H, W), uint8 or in [0, 1] -> StudentOutput.

    A BatchNorm that gets a single value a channel, as the last share of an epoch may bring about, has no statistics to
    take from it: it goes into evaluation mode, until the next `train()`, where PyTorch would raise.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                module.register_forward_pre_hook(_rest_when_alone)

    def forward(self, images: Tensor) -> StudentOutput:
        return StudentOutput(logits=self.network(images))


def _rest_when_alone(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    values = inputs[0]
    if values.numel() == values.shape[1]:
        module.eval()
