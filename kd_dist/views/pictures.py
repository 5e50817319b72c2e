"""A decoded image on its way from the decoder to its views."""

from typing import Any

import numpy as np
from PIL import Image


class Picture:
    """An RGB image as its decoder holds it; to everyone else an array (H, W, 3) uint8, which is made when it is used.

    A view is made of it without one: Pillow keeps four bytes a pixel, so the way to an array and back is two copies.
    """

    dtype, ndim = np.dtype(np.uint8), 3

    def __init__(self, image: Image.Image) -> None:
        self.image = image

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, 3), without making an array."""
        return self.image.height, self.image.width, 3

    @property
    def __array_interface__(self) -> dict[str, Any]:
        strides = (3 * self.image.width, 3, 1)  # with which `Image.fromarray`, too, takes it for an array
        return {**self.image.__array_interface__, "strides": strides}

    def __getitem__(self, place: Any) -> Any:
        return np.asarray(self)[place]

    def __getattr__(self, name: str) -> Any:
        if name == "image" or name.startswith("__"):  # not made yet, or a protocol that an array may have and this not
            raise AttributeError(name)
        return getattr(np.asarray(self), name)


def as_pillow(image: np.ndarray | Picture) -> Image.Image:
    """A decoded image as Pillow holds it, without a copy where it does so already."""
    return image.image if isinstance(image, Picture) else Image.fromarray(image)
