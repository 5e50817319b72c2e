"""The module that a stage trains: a network and every trainable projection, in ONE nn.Module.

DeepSpeed prepares exactly one module and DDP must see every parameter, so whatever a loss trains lives here.
"""

from torch import Tensor, nn

from kd_dist.batch import StudentOutput
from kd_dist.models import Network


class Student(nn.Module):
    """Images (B, 3, H, W), uint8 or in [0, 1] -> StudentOutput."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> StudentOutput:
        return StudentOutput(logits=self.network(images))
