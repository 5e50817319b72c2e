"""A view of an image with more done to it than to a plain one: hue, operations of RandAugment, blur, an erased box."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
from PIL import Image, ImageFilter

from kd_dist.errors import DataError, RecipeError
from kd_dist.views.chance import record, uniform
from kd_dist.views.colours import HUES, hued
from kd_dist.views.images import CROP_TRIES, LONGEST_SIDE, VIEW_DTYPE, ImageViews
from kd_dist.views.operations import OPERATIONS
from kd_dist.views.pictures import Picture

MOST_OPERATIONS = 3  # of a view; the largest number that the paper tries
STEP = 256  # of a blur's radius, to a pixel
PASSES = 3  # means over squares, one after the other: nearly a Gaussian
WIDEST = 16.0  # largest sigma of a blur, in pixels
ERASED_RATIO = (0.3, 3.3)  # width / height of what is erased; Zhong et al., "Random Erasing", 1708.04896, section 4.1

# One view: 48 bytes. A plain one; then what is done to its pixels, in this order: hue, operations, blur, erasing.
AUGMENTED_DTYPE = np.dtype(
    [
        ("view", VIEW_DTYPE),
        ("amounts", "<i2", (MOST_OPERATIONS,)),  # of the operations, each in a unit of its own
        ("hue", "<i2"),  # of HUES to a turn
        ("blur", "<u2"),  # radius of a box, of STEP to a pixel; 0: none
        ("erased", "<u2", (4,)),  # top, left, height and width in pixels of the view; a height of 0: nothing
        ("operations", "u1", (MOST_OPERATIONS,)),  # numbers in OPERATIONS, 0: none
        ("colour", "u1", (3,)),  # of what is erased
    ],
    align=True,
)


@dataclass(frozen=True)
class AugmentedViews(ImageViews):
    """The policy of `ImageViews`, with more done to the pixels of a view. Canonical views are those of `ImageViews`.

    What both policies draw is the same.
    """

    operations: int = 0  # of RandAugment in each view, 0 to MOST_OPERATIONS
    magnitude: tuple[float, float] = (0.3, 0.3)  # range of their strength, 0 to 1; RandAugment has one, 9 of 30
    hue: float = 0.0  # x: hue is turned by -x to x of a turn, 0 to 0.5
    blur: float = 0.0  # probability, 0 to 1
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels of the view, above 0, up to WIDEST
    erase: float = 0.0  # probability, 0 to 1
    erase_scale: tuple[float, float] = (0.02, 0.33)  # area of what is erased / area of the view, above 0, up to 1

    kind: ClassVar[str] = "augmented"
    dtype: ClassVar[np.dtype] = AUGMENTED_DTYPE

    def __post_init__(self) -> None:
        super().__post_init__()
        if max(self.size) > LONGEST_SIDE:
            raise RecipeError(f"views: size must be at most {LONGEST_SIDE} pixels on each side, not {self.size}")
        if not 0 <= self.operations <= MOST_OPERATIONS:
            raise RecipeError(f"views: operations must be from 0 to {MOST_OPERATIONS}, not {self.operations}")
        for name, most in (("hue", 0.5), ("blur", 1), ("erase", 1)):
            if not 0 <= getattr(self, name) <= most:
                raise RecipeError(f"views: {name} must be from 0 to {most}, not {getattr(self, name)}")
        for name, most in (("magnitude", 1), ("blur_sigma", WIDEST), ("erase_scale", 1)):
            low, high = getattr(self, name)
            if not 0 <= low <= high <= most or (low == 0 and name != "magnitude"):
                least = "0 <=" if name == "magnitude" else "0 <"
                raise RecipeError(f"views: {name} must be {least} low <= high <= {most:g}, not {(low, high)}")

    def draw(self, key: str, number: int, image_size: tuple[int, int]) -> np.void:
        """View `number` of the example `key`: one record of AUGMENTED_DTYPE; see `ImageViews.draw`."""
        chance = partial(uniform, self.seed, key, number)
        chosen = [_operation(self, chance, place) for place in range(self.operations)]
        chosen += [(0, 0)] * (MOST_OPERATIONS - len(chosen))
        operations, amounts = zip(*chosen, strict=True)
        return record(
            AUGMENTED_DTYPE,
            super().draw(key, number, image_size),
            amounts,
            round(HUES * self.hue * (2 * chance("hue") - 1)),
            _radius(_between(chance("blur sigma"), self.blur_sigma)) if chance("blur") < self.blur else 0,
            _erased(self, chance) if chance("erase") < self.erase else (0, 0, 0, 0),
            operations,
            [int(256 * chance(f"erase {colour}")) if self.erase else 0 for colour in ("red", "green", "blue")],
        )

    def canonical(self, image_size: tuple[int, int]) -> np.void:
        """The one view for evaluation; see `ImageViews.canonical`."""
        view = np.zeros((), AUGMENTED_DTYPE)
        view["view"] = super().canonical(image_size)
        return view[()]

    def replay(self, image: np.ndarray | Picture, view: np.void) -> np.ndarray:
        """The pixels of `view` at the policy's size: those of the plain view, then all else as `augmented` does it."""
        return augmented(super().replay(image, view["view"]), view)


def augmented(pixels: np.ndarray, view: np.void) -> np.ndarray:
    """What a record of AUGMENTED_DTYPE makes of the pixels (h, w, 3) uint8 of its plain view, in whole numbers: a
    C-contiguous array. Raises DataError for parameters that no policy draws."""
    _, amounts, hue, radius, erased, operations, colour = (view[name].tolist() for name in AUGMENTED_DTYPE.names)
    if hue:
        pixels = hued(pixels, hue)
    for number, amount in zip(operations, amounts, strict=True):
        if number >= len(OPERATIONS) or not OPERATIONS[number].least <= amount <= OPERATIONS[number].most:
            raise DataError(f"the view's operation {number} with {amount} is none; it is damaged: cache again")
        if number:
            pixels = OPERATIONS[number].apply(pixels, amount)
    if radius:
        pixels = blurred(pixels, radius)
    top, left, height, width = erased
    if top + height > pixels.shape[0] or left + width > pixels.shape[1]:
        raise DataError(
            f"the view erases {height} x {width} pixels at row {top}, column {left} of {pixels.shape[0]} x "
            f"{pixels.shape[1]}; it was drawn for another size: cache the teacher again"
        )
    pixels[top : top + height, left : left + width] = colour
    return pixels


def blurred(pixels: np.ndarray, radius: int) -> np.ndarray:
    """PASSES means over squares of `radius` / STEP pixels about each pixel, which may end within one; beyond the edge
    its own pixels go on.

    Pillow's box works in whole numbers, with weights of 24 bits; the one quotient that it takes for these, of numbers
    that 32-bit floats hold exactly, IEEE 754 rounds in one way."""
    picture, box = Image.fromarray(pixels), ImageFilter.BoxBlur(radius / STEP)
    for _ in range(PASSES):
        picture = picture.filter(box)
    return np.array(picture)


def _operation(policy: AugmentedViews, chance: Callable[[str], float], place: int) -> tuple[int, int]:
    """(number, amount) of the operation at a place; an operation may come twice."""
    number = int(chance(f"operation{place}") * len(OPERATIONS))
    strength = _between(chance(f"strength{place}"), policy.magnitude)
    signed = strength if chance(f"sign{place}") < 0.5 else -strength
    return number, OPERATIONS[number].draw(signed, policy.size)


def _radius(sigma: float) -> int:
    """The radius of a box, in steps, with which PASSES means are as wide as a Gaussian."""
    return round(STEP * (math.sqrt(12 * sigma**2 / PASSES + 1) - 1) / 2)


def _erased(policy: AugmentedViews, chance: Callable[[str], float]) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random box of the view; nothing when no try fits into it."""
    rows, columns = policy.size
    for attempt in range(CROP_TRIES):
        area = rows * columns * _between(chance(f"erase area{attempt}"), policy.erase_scale)
        low, high = map(math.log, ERASED_RATIO)
        ratio = math.exp(low + (high - low) * chance(f"erase ratio{attempt}"))
        height, width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 1 <= height <= rows and 1 <= width <= columns:
            top, left = (int(chance(f"erase {axis}") * (room + 1)) for axis, room in _rooms(policy.size, height, width))
            return top, left, height, width
    return 0, 0, 0, 0


def _rooms(size: tuple[int, int], height: int, width: int) -> tuple[tuple[str, int], tuple[str, int]]:
    """How far a box of height x width can begin from the top and from the left."""
    return ("top", size[0] - height), ("left", size[1] - width)


def _between(share: float, ends: tuple[float, float]) -> float:
    low, high = ends
    return low + (high - low) * share
