"""Self-blended images: a pseudo-fake made of one real face, by explicit parameters that are drawn once and replayed.

Two copies of a face, one of them changed in colour and detail, one moved a little, are blended within a soft mask: what
is left of a forgery when all that is particular to a method is taken away. After Shiohara and Yamasaki, "Detecting
Deepfakes with Self-Blended Images", CVPR 2022 (2204.08376), section 3. Every step rounds in integers, so the bytes do
not depend on the machine.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from kd_dist.errors import DataError
from kd_dist.views.chance import record
from kd_dist.views.colours import away, coloured, mapped
from kd_dist.views.images import LONGEST_SIDE
from kd_dist.views.pictures import Picture, as_pillow
from kd_dist.views.resizing import resized

Chance = Callable[[str], float]  # a number in [0, 1) for each name
Points = list[tuple[int, int]]  # (x, y), in units of which a side has SIDE

CORNERS = 16  # of the mask's polygon; one with fewer repeats its last
NODES = 6  # of the displacement grid, along each side
SIDE = 1 << 16  # units of a polygon's coordinates along a side
MASK = 128  # pixels of the mask along each side, before it is brought to the image's size
STEP = 64  # units of one step of a displacement
SEEN = 0.01  # share of the mask's pixels
FARTHEST = 1e6  # pixels from an image's corner that a landmark may be

# One blend: 172 bytes.
BLEND_DTYPE = np.dtype(
    [
        ("brightness", "<f4"),  # factors of the changed copy, as of a view
        ("contrast", "<f4"),
        ("saturation", "<f4"),
        ("corners", "<u2", (CORNERS, 2)),  # (x, y) of the mask's convex polygon, counter-clockwise on a y axis upwards
        ("place", "<i2", (2,)),  # top and left of the moved source, in pixels; it may begin outside
        ("resized", "<u2", (2,)),  # its height and width
        ("shrunk", "<u2", (2,)),  # height and width that the changed copy goes through
        ("grid", "i1", (NODES, NODES, 2)),  # by how many STEPs the mask is displaced there, (x, y)
        ("rgb", "i1", (3,)),  # added to the channels of the changed copy
        ("sharpened", "u1"),  # sixteenths of what a 3 x 3 mean takes away that are added to it
        ("changes_source", "u1"),  # 1: the source is the changed copy; 0: the target
        ("blur", "u1", (2,)),  # radii in the mask's pixels, before and after the threshold
        ("threshold", "u1"),  # level from which the blurred mask counts: below 128 it grows
        ("ratio", "u1"),  # of 255: how much of the source is seen within the mask
    ],
    align=True,
)

RGB_SHIFT = 20  # levels
FACTORS = {"brightness": 0.1, "contrast": 0.1, "saturation": 0.3}  # x: from 1 - x to 1 + x
SHRUNK = (0.25, 0.5)  # of the side
SHARPENED = (4, 16)  # sixteenths
MOVED = 0.03  # of a side
RESIZED = 0.05  # 1 - x to 1 + x of a side
DISPLACED = 32  # steps: 3 % of a side
BLUR = ((1, 5), (1, 8))
THRESHOLD = (64, 192)
RATIOS = (64, 128, 191, 255, 255, 255)  # a quarter, a half, three quarters; as often as these together, all of it


def draw_blend(chance: Chance, size: tuple[int, int], landmarks: Sequence[Sequence[float]] | None = None) -> np.void:
    """The parameters of one blend of an image of `size` (H, W): a record of BLEND_DTYPE.

    `landmarks` are (x, y) in pixels of the face that it shows. The mask covers the convex hull of all of them or of
    some; without any, or where hardly anything of it would be left, an ellipse about the centre, or a part of it.
    Raises DataError for landmarks that are no pairs of numbers.
    """
    hull = _hull(_region(chance, size, landmarks)) if landmarks else []
    if _area(hull):
        made = _drawn(chance, size, _reduced(hull))
        if _is_seen(made):
            return made
    return _drawn(chance, size, _hull(_ellipse(chance)))


def _drawn(chance: Chance, size: tuple[int, int], polygon: Points) -> np.void:
    """The parameters with this polygon."""
    factors = [1 + most * (2 * chance(f"blend {name}") - 1) for name, most in FACTORS.items()]
    resized = [_near(chance(f"blend {axis} size"), RESIZED, side) for axis, side in zip("yx", size, strict=True)]
    place = [
        (side - own) // 2 + round(MOVED * side * (2 * chance(f"blend {axis}") - 1))
        for axis, side, own in zip("yx", size, resized, strict=True)
    ]
    shrinks = chance("blend detail") < 0.5  # the other half is sharpened
    share = _between(chance("blend shrunk"), *SHRUNK) if shrinks else 1.0
    grid = np.array([chance(f"blend grid {place}") for place in range(2 * NODES**2)]).reshape(NODES, NODES, 2)
    return record(
        BLEND_DTYPE,
        *factors,
        polygon + polygon[-1:] * (CORNERS - len(polygon)),
        place,
        resized,
        [max(1, round(side * share)) for side in size],
        np.floor((2 * DISPLACED + 1) * grid) - DISPLACED,
        [_whole(chance(f"blend {colour}"), -RGB_SHIFT, RGB_SHIFT) for colour in "rgb"],
        0 if shrinks else _whole(chance("blend sharpened"), *SHARPENED),
        chance("blend changed") < 0.5,
        [_whole(chance(f"blend blur {turn}"), *least_most) for turn, least_most in enumerate(BLUR)],
        _whole(chance("blend threshold"), *THRESHOLD),
        RATIOS[int(chance("blend ratio") * len(RATIOS))],
    )


def blend(image: np.ndarray | Picture, parameters: np.void) -> np.ndarray:
    """The pseudo-fake that `parameters`, a record of BLEND_DTYPE, make of an image: (H, W, 3) uint8 -> a new one.

    Raises DataError as `blended` does.
    """
    return np.array(blended(image, parameters))


def blended(image: np.ndarray | Picture, parameters: np.void) -> Picture:
    """The same, as a view is made of it.

    Raises DataError when they were drawn for an image of another size, or are damaged.
    """
    height, width = image.shape[:2]
    factors = [float(parameters[name]) for name in FACTORS]
    sizes = [
        (side, *(int(parameters[name][axis]) for name in ("resized", "shrunk")))
        for axis, side in enumerate((height, width))
    ]
    if not all(0 <= factor <= 2 for factor in factors) or any(
        not (side <= 2 * resized <= 4 * side and 1 <= shrunk <= side) for side, resized, shrunk in sizes
    ):
        raise DataError(
            f"the blend's parameters do not fit an image of {height} x {width} pixels; it was drawn for another one: "
            f"cache the teacher again"
        )
    original = as_pillow(image)
    changed = _changed(original, parameters, factors)
    source, target = (changed, original) if parameters["changes_source"] else (original, changed)
    (top, left), (rows, columns) = parameters["place"].tolist(), parameters["resized"].tolist()
    moved = source.copy()
    moved.paste(resized(source, (columns, rows)), (left, top))
    seen = resized(mask(parameters), (width, height))
    return Picture(Image.composite(moved, target, seen))


def mask(parameters: np.void) -> Image.Image:
    """How much of the source is seen, 0 to 255, as a grey picture of MASK x MASK pixels."""
    inside = _inside(parameters["corners"].astype(np.int64), parameters["grid"].astype(np.int64))
    first, second = parameters["blur"].tolist()
    wide = _blurred(Image.fromarray(inside.astype(np.uint8) * 255), first)
    kept = (np.asarray(wide) >= parameters["threshold"]) * np.uint8(parameters["ratio"])
    return _blurred(Image.fromarray(kept), second)


def as_json(parameters: np.void) -> dict[str, Any]:
    """The parameters as JSON values, by name."""
    return {name: parameters[name].tolist() for name in BLEND_DTYPE.names}


def _changed(picture: Image.Image, parameters: np.void, factors: Sequence[float]) -> Image.Image:
    """The copy of other colours and less, or exaggerated, detail."""
    pixels, shift = coloured(picture, *factors), parameters["rgb"].astype(np.int64)
    # Of a grey picture colour would give the blend away.
    shifts = np.full(3, shift.sum() // 3) if _is_grey(pixels) else shift
    changed = mapped(Image.fromarray(pixels), np.clip(np.arange(256) + shifts[:, None], 0, 255).ravel().tolist())
    rows, columns = parameters["shrunk"].tolist()
    if (columns, rows) != picture.size:
        return resized(resized(changed, (columns, rows)), picture.size)
    sharpened = int(parameters["sharpened"])
    if sharpened:
        mean = changed.filter(ImageFilter.BoxBlur(1))
        return Image.fromarray(away(np.asarray(changed), np.asarray(mean), 1 + sharpened / 16))
    return changed


def _is_grey(pixels: np.ndarray) -> bool:
    """Whether all three channels are one."""
    red, green, blue = np.moveaxis(pixels, 2, 0)
    return bool((red == green).all() and (green == blue).all())


def _inside(corners: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """(MASK, MASK) bool: the centres of the mask's pixels that, displaced, lie within the convex polygon."""
    centres = (2 * np.arange(MASK) + 1) * (SIDE // (2 * MASK))
    # Whole weights that sum to MASK - 1, of the two nodes about each pixel.
    node, rest = np.divmod(np.arange(MASK) * (NODES - 1), MASK - 1)
    weights = np.zeros((MASK, NODES), np.int64)
    weights[np.arange(MASK), node] = MASK - 1 - rest
    weights[np.arange(MASK), np.minimum(node + 1, NODES - 1)] += rest
    x, y = (weights @ grid[..., axis] @ weights.T * STEP // (MASK - 1) ** 2 for axis in (0, 1))
    x, y = (x + centres).astype(np.float64), (y + centres[:, None]).astype(np.float64)  # which hold products exactly
    within = np.ones((MASK, MASK), bool)
    for (from_x, from_y), (to_x, to_y) in zip(corners.tolist(), np.roll(corners, -1, 0).tolist(), strict=True):
        across, down = to_x - from_x, to_y - from_y
        within &= across * y - down * x <= across * from_y - down * from_x
    return within


def _blurred(picture: Image.Image, radius: int) -> Image.Image:
    """Two means over squares, one after the other: a cone, without a corner. What lies outside is 0."""
    wide = Image.new("L", [side + 4 * radius for side in picture.size])
    wide.paste(picture, (2 * radius, 2 * radius))
    wide = wide.filter(ImageFilter.BoxBlur(radius)).filter(ImageFilter.BoxBlur(radius))
    return wide.crop((2 * radius, 2 * radius, 2 * radius + picture.width, 2 * radius + picture.height))


# Parts of a face among the landmarks of the 68 of iBUG, which other sets begin with: all, all but the jaw's line,
# nose and mouth, eyes and brows.
PARTS = (slice(None), slice(17, 68), slice(27, 68), slice(17, 48))
NUMBERED = 68


def _region(chance: Chance, size: tuple[int, int], landmarks: Sequence[Sequence[float]]) -> Points:
    """The landmarks of the part of a face that the mask covers. Few of them, such as eyes, nose and corners of the
    mouth, are taken apart from each other, up to where a face ends."""
    try:
        points = np.asarray(landmarks, np.float64)
    except (TypeError, ValueError):
        points = np.empty(0)
    if points.ndim != 2 or points.shape[1] != 2 or not (np.abs(points) <= FARTHEST).all():  # NaN is not either
        raise DataError("its landmarks are no list of pairs of numbers, [[x, y], ...]; correct them and pack again")
    if len(points) >= NUMBERED:
        points = points[PARTS[int(chance("blend part") * len(PARTS))]]
    else:
        centre = points.mean(axis=0)
        points = centre + (points - centre) * _between(chance("blend reach"), 1.2, 2.0)
    scaled = np.clip(points / size[::-1], 0, 1) * (SIDE - 1)
    return [(round(x), round(y)) for x, y in scaled.tolist()]


def _ellipse(chance: Chance) -> Points:
    """A polygon about the centre, where a cropped face is: its whole ellipse, or the upper, lower or middle part."""
    angles = np.arange(CORNERS) * (2 * np.pi / CORNERS)
    half_x, half_y = _between(chance("blend wide"), 0.22, 0.36), _between(chance("blend tall"), 0.28, 0.42)
    top, bottom = ((-1.0, 1.0), (-1.0, 0.1), (-0.1, 1.0), (-0.5, 0.5))[int(chance("blend part") * 4)]
    x = 0.5 + half_x * np.cos(angles)
    y = 0.5 + half_y * np.clip(np.sin(angles), top, bottom)
    return [(round(one), round(other)) for one, other in zip(x * SIDE, y * SIDE, strict=True)]


def _hull(points: Points) -> Points:
    """The convex hull, by Andrew's monotone chain: counter-clockwise on an y axis that points up."""
    ordered = sorted(set(points))

    def chain(along: Sequence[tuple[int, int]]) -> Points:
        kept: Points = []
        for point in along:
            while len(kept) > 1 and _turn(kept[-2], kept[-1], point) >= 0:
                kept.pop()
            kept.append(point)
        return kept[:-1]

    return chain(ordered) + chain(ordered[::-1]) if len(ordered) > 2 else ordered


def _turn(first: tuple[int, int], second: tuple[int, int], third: tuple[int, int]) -> int:
    """Twice the signed area of a triangle."""
    return (second[0] - first[0]) * (third[1] - first[1]) - (second[1] - first[1]) * (third[0] - first[0])


def _area(polygon: Points) -> int:
    """Twice the area of a convex polygon."""
    return sum(abs(_turn(polygon[0], one, other)) for one, other in zip(polygon[1:], polygon[2:], strict=False))


def _is_seen(parameters: np.void) -> bool:
    """Whether enough of the mask is left, blurred and cut at its threshold, to be seen."""
    return bool((np.asarray(mask(parameters)) > parameters["ratio"] / 2).mean() >= SEEN)


def _reduced(polygon: Points) -> Points:
    """A convex polygon with no more than CORNERS corners: those go first that the least area goes with."""
    while len(polygon) > CORNERS:
        areas = [
            abs(_turn(polygon[place - 1], one, polygon[(place + 1) % len(polygon)]))
            for place, one in enumerate(polygon)
        ]
        polygon.pop(areas.index(min(areas)))
    return polygon


def _between(share: float, low: float, high: float) -> float:
    return low + (high - low) * share


def _whole(share: float, low: int, high: int) -> int:
    """A whole number from low to high, both included."""
    return low + int(share * (high - low + 1))


def _near(share: float, most: float, side: int) -> int:
    """A side multiplied by a factor from 1 - most to 1 + most, in 16 bits."""
    return min(max(1, round(side * (1 + most * (2 * share - 1)))), LONGEST_SIDE)
