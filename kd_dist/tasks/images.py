"""What tasks on images share: decoding, the members of a shard, and how sure a teacher is."""

import contextlib
import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from kd_dist.errors import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "bmp", "webp", "ppm", "pgm")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow starts a program to decode another
SATURATED = 0.99  # a row, or a pixel, is saturated when its top probability exceeds this
SATURATED_ENTROPY = 0.02  # nat; a teacher below it says little more than its top class


@contextlib.contextmanager
def opened(payload: bytes | memoryview, what: str) -> Iterator[Image.Image]:
    """An encoded image, opened; decoding errors within the block count too.

    Raises DataError, which begins with `the {what}`, when it is damaged or too large.
    """
    try:
        with Image.open(io.BytesIO(payload), formats=FORMATS) as image:
            yield image
    except UnidentifiedImageError as error:  # its own words hold an address, other bytes in every run's manifest
        raise DataError(f"the {what} is of no known format, or its first bytes are damaged") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"the {what} cannot be decoded ({error})") from error


def decode_image(payload: bytes | memoryview) -> np.ndarray:
    """Encoded image -> (H, W, 3) uint8 RGB. Raises DataError when it is damaged, too large or not 8 bits deep."""
    with opened(payload, "image") as image:
        if image.mode[0] in "IF":  # Pillow would clip it to 255
            raise DataError(f"the image has pixels of mode {image.mode}, not of 8 bits; convert it to 8 bits")
        return np.asarray(image.convert("RGB"))


def image_members(image: bytes, extension: str, record: Mapping[str, Any]) -> dict[str, bytes]:
    """An image as it came, and what else is known of it as JSON. Raises DataError unless `extension` is an image's."""
    if extension not in IMAGE_EXTENSIONS:
        raise DataError(f"the extension '{extension}' is none of {', '.join(IMAGE_EXTENSIONS)}")
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return {extension: image, "json": text.encode()}


def image_and(other: str, members: Mapping[str, bytes | memoryview]) -> tuple[Any, Any]:
    """The one image of an example and its member `other`. Raises DataError unless both are there."""
    found = [name for name in IMAGE_EXTENSIONS if name in members]
    if len(found) != 1 or other not in members:
        raise DataError(f"expected one image and one {other} member, found {', '.join(sorted(members))}")
    return members[found[0]], members[other]


@contextlib.contextmanager
def naming(key: str) -> Iterator[None]:
    """What an example of a shard cannot be used for becomes a DataError that names its key."""
    try:
        yield
    except (DataError, ValueError, RecursionError) as error:
        raise DataError(f"example '{key}': {error}; correct the source and pack again") from error


def certainty(logits: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """Logits (n, C) -> log softmax, (n, C) float64, and over the n rows the summed entropy in nat and the number that
    are saturated."""
    z = logits.astype(np.float64)
    log_p = z - z.max(axis=1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    return log_p, {"entropy": -float((p * log_p).sum()), "saturated": int((p.max(axis=1) > SATURATED).sum())}


def certainty_warnings(entropy: float) -> list[str]:
    """A sentence about a teacher that is sure of everything, where `entropy`, the mean in nat, says so."""
    if entropy >= SATURATED_ENTROPY:
        return []
    return [
        f"warning: the teacher's mean entropy is {entropy:.4f} nat: it says little beyond its top class; a higher "
        f"temperature, stronger views or a less certain teacher would teach more"
    ]
