"""Several networks that answer together."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kd_dist.errors import ModelError
from kd_dist.models import Network


class MeanNetwork(nn.Module):
    """Images as for a Network -> the mean of the networks' logits, (B, C, ...) float32. Taps see the first of them.

    ModelError: their logits have different shapes, as maps of another grid.
    """

    def __init__(self, networks: Sequence[Network]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.channels = networks[0].channels
        self.label = " + ".join(network.label for network in networks)

    @property
    def backbone(self) -> nn.Module:
        """Whose features there are."""
        return self.networks[0].backbone

    @property
    def mean(self) -> Tensor:
        """The first network's normalisation, which says where all of them are."""
        return self.networks[0].mean

    def forward(self, images: Tensor) -> Tensor:
        said = [network(images).float() for network in self.networks]
        shapes = [tuple(logits.shape) for logits in said]
        if len(set(shapes)) > 1:
            raise ModelError(
                f"{self.label}: give logits of the shapes {', '.join(map(str, shapes))}, which have no mean; take "
                f"teachers that answer on one grid, or name one of them"
            )
        return torch.stack(said).mean(dim=0, dtype=torch.float64).float()


def together(networks: Sequence[Network]) -> Network | MeanNetwork:
    """One network that speaks for all of these."""
    return networks[0] if len(networks) == 1 else MeanNetwork(networks)
