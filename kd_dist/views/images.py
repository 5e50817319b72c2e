"""A view of an image: drawn once as explicit parameters, then replayed to the same bytes on any machine.

The parameters are stored, never a seed alone: what a seed means may change with a library, a crop box cannot.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
from PIL import Image

from kd_dist.batch import Example
from kd_dist.errors import DataError, RecipeError
from kd_dist.views.chance import record, uniform
from kd_dist.views.colours import coloured
from kd_dist.views.pictures import Picture
from kd_dist.views.resizing import resized

# One view: 24 bytes. Photometric factors (1 leaves the pixels unchanged), the crop box in pixels of the decoded
# image, and whether the resized crop is mirrored left to right (0 or 1).
VIEW_DTYPE = np.dtype(
    [
        ("brightness", "<f4"),
        ("contrast", "<f4"),
        ("saturation", "<f4"),
        ("top", "<u2"),
        ("left", "<u2"),
        ("height", "<u2"),
        ("width", "<u2"),
        ("flip", "u1"),
    ],
    align=True,
)

LONGEST_SIDE = 65535  # a crop box is stored in 16-bit numbers
CROP_TRIES = 10


@dataclass(frozen=True)
class ImageViews:
    """The policy that views are drawn from. The defaults draw the canonical view every time.

    The canonical view is a centred box of the view's aspect ratio, or, with `whole`, the whole image: nothing is lost,
    and an image of another aspect ratio is stretched to the view's size.
    Raises RecipeError when a field is outside the range given here.
    """

    size: tuple[int, int]  # (H, W) of every view, in pixels, at least 1
    crop_scale: tuple[float, float] = (1.0, 1.0)  # area of the crop / area of the image, 0 < low <= high <= 1
    crop_ratio: tuple[float, float] = (0.75, 1.333)  # width / height of the crop, relative to that of the view
    flip: float = 0.0  # probability of a left-right mirror, 0 to 1
    brightness: float = 0.0  # the factor is uniform in 1 - x to 1 + x, with x from 0 to 1
    contrast: float = 0.0  # likewise
    saturation: float = 0.0  # likewise
    seed: int = 0
    whole: bool = False  # the canonical view is the whole image

    kind: ClassVar[str] = "image"
    channels: ClassVar[int] = 3
    dtype: ClassVar[np.dtype] = VIEW_DTYPE

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise RecipeError(f"views: size must be at least 1 pixel on each side, not {self.size}")
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise RecipeError(f"views: crop_scale must be 0 < low <= high <= 1, not {self.crop_scale}")
        low, high = self.crop_ratio
        if not 0 < low <= high < math.inf:
            raise RecipeError(f"views: crop_ratio must be 0 < low <= high, not {self.crop_ratio}")
        for name in ("flip", "brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"views: {name} must be from 0 to 1, not {getattr(self, name)}")

    def draw(self, key: str, number: int, image_size: tuple[int, int]) -> np.void:
        """View `number` of the example `key`, whose decoded image has `image_size` (H, W): one record of VIEW_DTYPE.

        Each parameter has its own stream of chance, so a new parameter, or another range for one, leaves the others
        as they were. Raises DataError for an image that has no pixels or a side over 65,535.
        """
        chance = partial(uniform, self.seed, key, number)
        box = _random_box(self, chance, image_size)
        factors = [
            1 + getattr(self, name) * (2 * chance(name) - 1) for name in ("brightness", "contrast", "saturation")
        ]
        return record(VIEW_DTYPE, *factors, *box, chance("flip") < self.flip)

    def draw_for(self, example: Example, number: int) -> np.void:
        """View `number` of an example; see `draw`."""
        return self.draw(example.key, number, example.image.shape[:2])

    def canonical(self, image_size: tuple[int, int]) -> np.void:
        """The one view for evaluation: the largest centred box of the view's aspect ratio, or the whole image where
        the policy says so; nothing else changed.

        `image_size` is the (H, W) of the decoded image. Raises DataError as `draw` does.
        """
        return record(VIEW_DTYPE, 1, 1, 1, *_canonical_box(self, image_size), False)

    def replay(self, image: np.ndarray | Picture, view: np.void) -> np.ndarray:
        """The pixels of `view` at the policy's size; see `replay`."""
        return replay(image, view, self.size)


def replay(image: np.ndarray | Picture, view: np.void, size: tuple[int, int]) -> np.ndarray:
    """The pixels of `view`: image (H, W, 3) uint8 -> a new C-contiguous (h, w, 3) uint8 array, with `size` = (h, w).

    The order is crop and resize (antialiased bilinear), flip, brightness, contrast, saturation. Every step rounds in
    integers, Pillow's resize included, so the bytes do not depend on the machine. See `colours.coloured`.
    Raises DataError when the image is of another kind, or when the view's box does not lie inside it.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise DataError(f"an image must be uint8 (H, W, 3), not {image.dtype} {image.shape}; mend its decoder")
    brightness, contrast, saturation, *_, flip = view.item()
    if not all(0 <= factor <= 2 for factor in (brightness, contrast, saturation)):  # NaN is not either
        raise DataError(f"the view's factors {brightness}, {contrast}, {saturation} are not from 0 to 2; cache again")
    top, left, bottom, right = _checked_box(view, image.shape, "image")
    source = image.image if isinstance(image, Picture) else image
    picture = resized(source, size[::-1], (left, top, right, bottom))
    if flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return coloured(picture, brightness, contrast, saturation)


def replay_mask(mask: np.ndarray, view: np.void, size: tuple[int, int]) -> np.ndarray:
    """What the mask (H, W) uint8 of an image says about each pixel of its view: a new (h, w) uint8 array, with `size`
    = (h, w).

    The box and the flip are those of `replay`; each pixel takes the value at its centre, so no value is made up.
    Raises DataError when the mask is of another kind, or when the view's box does not lie inside it.
    """
    view = view["view"] if "view" in view.dtype.names else view  # what is done to pixels where they are moves no mask
    if mask.dtype != np.uint8 or mask.ndim != 2:
        raise DataError(f"a mask must be uint8 (H, W), not {mask.dtype} {mask.shape}; mend its decoder")
    top, left, bottom, right = _checked_box(view, mask.shape, "mask")
    seen = sample(mask[top:bottom, left:right], size)
    return np.ascontiguousarray(seen[:, ::-1]) if view["flip"] else seen


def sample(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Nearest neighbours: values (H, W) -> (h, w), each the value under the centre of its pixel, with `size` = (h, w).

    Integers decide, so the result does not depend on the machine; a centre between two pixels takes the later one.
    """
    rows, columns = ((2 * np.arange(new) + 1) * old // (2 * new) for new, old in zip(size, values.shape, strict=True))
    return values[rows[:, None], columns]


def _random_box(policy: ImageViews, chance: Callable[[str], float], image_size: tuple[int, int]) -> tuple[int, ...]:
    """(top, left, height, width) of a random resized crop; the canonical box when no try fits into the image.

    A crop_scale of (1, 1) asks for no crop at all, so there the box is always the canonical one.
    """
    untouched = _canonical_box(policy, image_size)
    if policy.crop_scale[0] == 1:
        return untouched
    rows, columns = image_size
    for attempt in range(CROP_TRIES):
        low, high = policy.crop_scale
        area = rows * columns * (low + (high - low) * chance(f"area{attempt}"))
        low, high = map(math.log, policy.crop_ratio)
        ratio = policy.size[1] / policy.size[0] * math.exp(low + (high - low) * chance(f"ratio{attempt}"))
        height, width = int(math.sqrt(area / ratio) + 0.5), int(math.sqrt(area * ratio) + 0.5)
        if 1 <= height <= rows and 1 <= width <= columns:
            top, left = int(chance("top") * (rows - height + 1)), int(chance("left") * (columns - width + 1))
            return top, left, height, width
    return untouched


def _canonical_box(policy: ImageViews, image_size: tuple[int, int]) -> tuple[int, ...]:
    """(top, left, height, width) of the whole image, or of its largest centred box with the view's aspect ratio."""
    rows, columns = image_size
    if not (1 <= rows <= LONGEST_SIDE and 1 <= columns <= LONGEST_SIDE):
        raise DataError(
            f"an image of {rows} x {columns} pixels has no views; each side must be from 1 to {LONGEST_SIDE:,}: "
            "resize it or take it out"
        )
    if policy.whole:
        return 0, 0, rows, columns
    view_rows, view_columns = policy.size
    height = min(rows, max(1, (2 * columns * view_rows + view_columns) // (2 * view_columns)))
    width = min(columns, max(1, (2 * rows * view_columns + view_rows) // (2 * view_rows)))
    return (rows - height) // 2, (columns - width) // 2, height, width


def _checked_box(view: np.void, shape: tuple[int, ...], what: str) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of a box that must lie inside an image or mask of `shape`; DataError otherwise."""
    # Python numbers from here on: sums of 16-bit numpy numbers would wrap.
    *_, top, left, height, width, _ = view.item()
    bottom, right = top + height, left + width
    if min(height, width) < 1 or bottom > shape[0] or right > shape[1]:
        raise DataError(
            f"the view's box of {height} x {width} pixels at row {top}, column {left} is not inside the {what} of "
            f"{shape[0]} x {shape[1]}; the view was drawn for another {what}: cache the teacher again"
        )
    return top, left, bottom, right
