"""Videos in which each frame says its number, and folders of them in the layouts that data sets of faces have."""

from collections.abc import Iterable
from pathlib import Path

import av
import numpy as np
from PIL import Image

WIDTH, HEIGHT, STRIPE = 64, 48, 8
CODECS = {  # file: (encoder, its options), long groups of pictures and frames that need later ones
    "closed.mp4": ("libx264", {"g": "250", "bf": "3", "x264-params": "scenecut=0"}),
    "open.mp4": ("libx264", {"g": "12", "bf": "3", "x264-params": "b-adapt=0:open-gop=1:scenecut=0"}),
    "long.mkv": ("libx264", {"g": "250", "bf": "3", "x264-params": "scenecut=0"}),
    "short.mkv": ("libx264", {"g": "7", "bf": "2", "x264-params": "b-adapt=0:scenecut=0"}),
    "short.mp4": ("libx264", {"g": "7", "bf": "2", "x264-params": "b-adapt=0:scenecut=0"}),
    "hevc.mov": ("libx265", {"x265-params": "keyint=15:bframes=3:log-level=0"}),
    "vp9.webm": ("libvpx-vp9", {"g": "20", "lag-in-frames": "8", "auto-alt-ref": "1"}),
    "wrong_times.avi": ("libx264", {"g": "20", "bf": "2"}),
    "plain.avi": ("mpeg4", {"g": "20", "bf": "2"}),
}


def numbered(number: int) -> np.ndarray:
    """(H, W, 3) uint8: eight stripes, white where a bit of the number is 1."""
    stripes = [255 * (number >> bit & 1) for bit in range(WIDTH // STRIPE)]
    return np.broadcast_to(np.repeat(stripes, STRIPE)[None, :, None], (HEIGHT, WIDTH, 3)).astype(np.uint8)


def number_in(image: np.ndarray) -> int:
    """The number that the stripes of a decoded frame say."""
    middles = image[HEIGHT // 4 : -HEIGHT // 4, STRIPE // 2 :: STRIPE].mean(axis=(0, 2))
    return sum(int(level > 128) << bit for bit, level in enumerate(middles))


def write_video(path: Path, images: Iterable[np.ndarray], encoder: str = "libx264", **options: str) -> Path:
    """A video file of images (H, W, 3) uint8, 25 a second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = None
        for image in images:
            if stream is None:
                stream = container.add_stream(encoder, rate=25, options=options)
                stream.height, stream.width = image.shape[:2]
                stream.pix_fmt = "yuv420p"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


def noise(*seed: int, size: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    """(H, W, 3) uint8, another for every seed."""
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def write_frames(folder: Path, count: int, *seed: int, extension: str = "png") -> list[np.ndarray]:
    """A folder of frames 000, 001, ...; what they show."""
    folder.mkdir(parents=True, exist_ok=True)
    images = [noise(*seed, number) for number in range(count)]
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:03d}.{extension}")
    return images
