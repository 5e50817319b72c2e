"""What a compressed feature does to training: the direction of the gradient that a small student would get from it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_dist.compress import noise
from kd_dist.losses.features import cosine, hint

WIDTHS = (16, 32, 64)  # of the probe's convolutions, each of stride 2


def gradient_cosine(images: Tensor, exact: Tensor, decoded: Tensor) -> float:
    """The cosine, in [-1, 1], between two gradients of one student: with the exact and with the decoded features of an
    example, averaged over the examples. By itself, because a batch's gradient mostly says what all its examples share:
    features of another image would pass for the right ones.

    images (B, channels, H, W) uint8; exact (B, C, *grid) and decoded (B, C, *pooled grid) float, all on one device. The
    student is three convolutions and a projection to C channels, its weights always the same; the gradient, with
    respect to all of them, is of the mean of the loss `cosine` (of one channel `hint`), each against its teacher's own
    grid. 1: training cannot tell the difference.
    """
    # Out of inference mode is also out of no_grad.
    with torch.inference_mode(False), torch.autocast(images.device.type, enabled=False):
        student = _student(images.shape[1], exact.shape[1], images.device)
        inputs = images.clone().float() / 255 - 0.5  # a clone, as tensors of inference mode take part in no gradient
        pairs = [
            [_gradient(student, inputs[row], features[row].clone().float()) for features in (exact, decoded)]
            for row in torch.arange(len(images)).split(1)
        ]
    cosines = [F.cosine_similarity(*(gradient.double() for gradient in pair), dim=0) for pair in pairs]
    return float(torch.stack(cosines).mean())


def _student(inputs: int, channels: int, device: torch.device) -> nn.Sequential:
    """A network of stride 8 whose weights are the same for every call, machine and version."""
    layers: list[nn.Module] = []
    before = inputs
    for width in WIDTHS:
        layers += [nn.utils.skip_init(nn.Conv2d, before, width, 3, stride=2, padding=1, device=device), nn.ReLU()]
        before = width
    layers.append(nn.utils.skip_init(nn.Conv2d, before, channels, 1, device=device))
    with torch.no_grad():
        for seed, layer in enumerate(layers[::2]):
            weight = layer.weight
            uniform = noise(seed, weight.numel(), device).view(weight.shape) * 2 - 1
            weight.copy_(uniform * math.sqrt(6 / weight[0].numel()))  # He: keeps the variance through the ReLUs
            layer.bias.zero_()
    return nn.Sequential(*layers)


def _gradient(student: nn.Module, inputs: Tensor, teacher: Tensor) -> Tensor:
    """All parameters' gradients as one vector."""
    found = student(inputs)
    if teacher.ndim == 3:
        found = F.adaptive_avg_pool1d(found.flatten(2), teacher.shape[2])
    if teacher.ndim == 2:
        found = found.mean(dim=(2, 3))
    loss = cosine if teacher.shape[1] > 1 else hint  # one channel has no direction
    gradients = torch.autograd.grad(loss(found, teacher).mean(), list(student.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])
