"""The teacher: a frozen network that says what the cache keeps."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kd_dist.batch import TeacherSignal
from kd_dist.models import Network
from kd_dist.models.taps import Taps


def repeatable() -> None:
    """Have a GPU compute as exactly as it can, and the same each time: what is cached is compared with it later."""
    for backend in (torch.backends.cuda.matmul, torch.backends.cudnn):
        backend.allow_tf32 = False
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True


class Teacher(nn.Module):
    """Images (B, channels, H, W), uint8 or in [0, 1] -> TeacherSignal in float32. Frozen, in evaluation mode."""

    def __init__(self, network: Network, taps: Mapping[str, str]) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.taps = Taps(network, taps) if taps else None
        self.probed = False
        self.eval()

    def train(self, mode: bool = True) -> "Teacher":
        """Stays in evaluation mode, whatever its owner says to all its parts."""
        return super().train(False)

    def shapes(self, size: tuple[int, int]) -> tuple[tuple[int, ...], dict[str, tuple[int, ...]]]:
        """What it says about an image of `size` (H, W): the shape of its logits and those of its features."""
        features = {} if self.taps is None else self.taps.probe(size)
        self.probed = True
        with torch.no_grad():
            images = torch.zeros(1, self.network.channels, *size, dtype=torch.uint8, device=self.network.mean.device)
            return tuple(self(images).logits.shape[1:]), features

    @torch.no_grad()
    def forward(self, images: Tensor) -> TeacherSignal:
        if self.taps is not None and not self.probed:  # finds out which features a later module changes in place
            self.taps.probe(tuple(images.shape[2:]))
            self.probed = True
        logits = self.network(images).float()
        features = {} if self.taps is None else self.taps.collect(len(images))
        return TeacherSignal(logits, {name: value.float() for name, value in features.items()})
