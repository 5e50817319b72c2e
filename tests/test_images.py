"""Decoding what may enter a shard, and the member of an image."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from kd_dist.errors import DataError
from kd_dist.inputs.images import IMAGE_EXTENSIONS, Images, decode_image, opened

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 3), np.uint8)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


PNG = encoded(Image.fromarray(PIXELS))
JPEG = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), "JPEG")


def test_an_image_is_decoded_to_rgb():
    pixels = decode_image(PNG)
    assert (pixels.dtype, pixels.shape) == (np.uint8, (6, 4, 3))
    assert np.array_equal(pixels, PIXELS)
    assert np.array_equal(decode_image(memoryview(PNG)), PIXELS)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_other_modes_become_rgb(mode):
    image = Image.fromarray(PIXELS).convert(mode)
    assert np.array_equal(decode_image(encoded(image)), np.asarray(image.convert("RGB")))


def test_a_cmyk_jpeg_becomes_rgb():
    assert decode_image(encoded(Image.new("CMYK", (4, 6)), "JPEG")).shape == (6, 4, 3)


@pytest.mark.parametrize(("kind", "dtype", "mode"), [("PNG", np.uint16, "I;16"), ("TIFF", np.float32, "F")])
def test_deeper_images_are_refused_and_not_clipped(kind, dtype, mode):
    deep = encoded(Image.fromarray(np.full((4, 4), 300, dtype)), kind)
    with pytest.raises(DataError, match=f"pixels of mode {mode}, not of 8 bits; convert it to 8 bits"):
        decode_image(deep)


@pytest.mark.parametrize("size", [10, 200, len(JPEG) // 2, len(JPEG) - 2])
def test_a_truncated_jpeg(size):
    assert decode_image(JPEG).shape == (64, 64, 3)
    with pytest.raises(DataError, match=r"^the image cannot be decoded \(.*[Tt]runcated.*\)$"):
        decode_image(JPEG[:size])


@pytest.mark.parametrize("payload", [b"", b"hello", PNG[:8], b"\0" + PNG])
def test_what_is_no_image_gets_the_same_words_every_time(payload):
    """The words are part of a manifest, whose bytes are promised."""
    with pytest.raises(DataError) as raised:
        decode_image(payload)
    assert str(raised.value) == "the image is of no known format, or its first bytes are damaged"


def test_an_image_that_would_fill_the_memory():
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)
    bomb = PNG[:8] + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    with pytest.raises(DataError, match="1600000000 pixels"):
        decode_image(bomb)


def test_what_breaks_inside_the_block_is_named_after_what_it_is():
    with pytest.raises(DataError, match=r"^the map cannot be decoded \(a torn page\)$"), opened(PNG, "map"):
        raise OSError("a torn page")
    with pytest.raises(DataError, match="^the map is of no known format"), opened(b"", "map"):
        pass
    with pytest.raises(KeyError), opened(PNG, "map"):  # a mistake of ours stays what it is
        raise KeyError("x")


# ------------------------------------------------------------------------------------------------ members


def test_the_member_of_an_image():
    assert len(IMAGE_EXTENSIONS) == 7
    for extension in IMAGE_EXTENSIONS:
        assert Images().encode(PNG, extension) == {extension: PNG}
        assert np.array_equal(Images().decode({extension: PNG, "json": b"", "teacher.npy": b""}), PIXELS)
    with pytest.raises(DataError, match="^the extension 'gif' is none of jpg, jpeg, png, bmp, webp, ppm, pgm$"):
        Images().encode(PNG, "gif")
    with pytest.raises(DataError, match="^the image is of no known format"):
        Images().encode(b"hello", "png")


@pytest.mark.parametrize(
    ("members", "found"),
    [([], "nothing"), (["mask.png", "json"], "json, mask.png"), (["png", "jpg", "x"], "jpg, png, x")],
)
def test_members_without_one_image(members, found):
    with pytest.raises(DataError, match=f"^expected one image, found {found}$"):
        Images().decode(dict.fromkeys(members, PNG))
