"""Images as a source gave them, kept as they are: decoding, checks, the member of a shard."""

import contextlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from kd_dist.errors import DataError
from kd_dist.views.pictures import Picture

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "bmp", "webp", "ppm", "pgm")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow starts a program to decode another


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
    return np.asarray(decoded(payload))


def decoded(payload: bytes | memoryview) -> Picture:
    """The same as Pillow holds it: an array when it is used as one, which views do not."""
    with opened(payload, "image") as image:
        if image.mode[0] in "IF":  # Pillow would clip it to 255
            raise DataError(f"the image has pixels of mode {image.mode}, not of 8 bits; convert it to 8 bits")
        image.load()
        return Picture(image if image.mode == "RGB" else image.convert("RGB"))


def image_member(payload: bytes, extension: str) -> dict[str, bytes]:
    """An image as it came, as the member of a shard. Raises DataError unless `extension` is an image's."""
    if extension not in IMAGE_EXTENSIONS:
        raise DataError(f"the extension '{extension}' is none of {', '.join(IMAGE_EXTENSIONS)}")
    return {extension: payload}


@dataclass(frozen=True)
class Images:
    """Each example is one encoded image."""

    kind: ClassVar[str] = "image"
    channels: ClassVar[int] = 3
    libraries: ClassVar[tuple[str, ...]] = ()  # that decide what is packed, beside those of every folder

    def encode(self, payload: bytes, extension: str, span: None = None) -> dict[str, bytes]:
        """An image as it came, as the member of a shard. Raises DataError when it cannot be decoded, or `extension` is
        none of an image."""
        member = image_member(payload, extension)
        decoded(payload)
        return member

    def decode(self, members: Mapping[str, bytes | memoryview]) -> Picture:
        """(H, W, 3) uint8 RGB. Raises DataError unless the members hold one image, which can be decoded."""
        found = [name for name in IMAGE_EXTENSIONS if name in members]
        if len(found) != 1:
            raise DataError(f"expected one image, found {', '.join(sorted(members)) or 'nothing'}")
        return decoded(members[found[0]])

    def described(self) -> dict[str, Any]:
        """What a manifest says of how examples were made: nothing, they are as they came."""
        return {}
