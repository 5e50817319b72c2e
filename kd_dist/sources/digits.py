"""scikit-learn's bundled digits: 1,797 grey 8x8 images of 10 classes, no download."""

import functools
import io

import numpy as np
from PIL import Image

from kd_dist.sources import Item, Listing


def digits() -> Listing:
    """List the digits. Values 0..16 become grey levels 0..255, PNG-encoded; splits are the recipe's fractions."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = np.rint(data.images * (255 / 16)).astype(np.uint8)
    items = [
        Item(f"digit-{number:04d}", None, "png", int(label), functools.partial(_png, pixels[number]))
        for number, label in enumerate(data.target)
    ]
    return Listing(tuple(str(name) for name in data.target_names), items)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()
