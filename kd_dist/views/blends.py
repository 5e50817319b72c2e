"""A stand-in: self-blended images, of the interface alone. To be replaced as a whole."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

BLEND_DTYPE = np.dtype([("shift", "u1"), ("points", "<u2")])


def draw_blend(
    chance: Callable[[str], float], size: tuple[int, int], landmarks: Sequence[Sequence[float]] | None = None
) -> np.void:
    """The parameters of one blend of an image of `size` (H, W): a record of BLEND_DTYPE."""
    return np.array((1 + int(100 * chance("shift")), len(landmarks or ())), BLEND_DTYPE)[()]


def blend(image: np.ndarray, parameters: np.void) -> np.ndarray:
    """The pseudo-fake that `parameters` make of an image: (H, W, 3) uint8 -> a new one."""
    return image + parameters["shift"]


def as_json(parameters: np.void) -> dict[str, Any]:
    """The parameters as JSON values, by name."""
    return {name: parameters[name].tolist() for name in BLEND_DTYPE.names}
