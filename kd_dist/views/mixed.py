"""A view that shows two images: mixup and CutMix with another example of the same shard, as explicit parameters.

Zhang et al., "mixup", ICLR 2018 (1710.09412), section 2; Yun et al., "CutMix", ICCV 2019 (1905.04899), section 3.1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count

import numpy as np

from kd_dist.batch import Example
from kd_dist.errors import DataError, RecipeError
from kd_dist.views.augmented import AUGMENTED_DTYPE, AugmentedViews
from kd_dist.views.chance import record, uniform
from kd_dist.views.colours import away
from kd_dist.views.images import LONGEST_SIDE, VIEW_DTYPE, ImageViews
from kd_dist.views.pictures import Picture

ALONE, MIXUP, CUTMIX = 0, 1, 2
WHOLE = 1 << 15  # all of the own image, in a mixup
ALPHA = (0.01, 100.0)  # of the Beta distribution that shares are drawn from


def mixed_dtype(view: np.dtype) -> np.dtype:
    """One view that may be mixed, of records of `view` for both images: twice its bytes and 16, or 15, more."""
    return np.dtype(
        [
            ("view", view),  # of the example itself
            ("other", view),  # of its partner; zeros: none
            ("partner", "<u4"),  # its place in the shard, from 0
            ("share", "<u2"),  # of mixup: how much of the example itself is seen, of WHOLE
            ("box", "<u2", (4,)),  # of CutMix: top, left, height and width of where the partner is seen, in pixels
            ("mixing", "u1"),  # ALONE, MIXUP or CUTMIX
        ],
        align=True,
    )


PLAIN_MIXED, AUGMENTED_MIXED = mixed_dtype(VIEW_DTYPE), mixed_dtype(AUGMENTED_DTYPE)  # 64 and 112 bytes


@dataclass(frozen=True)
class MixedViews:
    """The policy of `views`, by which a share of the views of an example are mixed with another one of its shard.

    What is drawn of the example itself is what `views` draws; its partner is seen in the view of the same number that
    `views` draws of it. Canonical views are not mixed, nor is the only example of a shard. Of the two ways each is
    taken as often where both have an alpha. Raises RecipeError when a field is outside the range given here.
    """

    views: ImageViews | AugmentedViews
    mixup: float = 0.0  # alpha: the share of the own image is of Beta(alpha, alpha); 0: no mixup; else within ALPHA
    cutmix: float = 0.0  # likewise the share of the own image's area
    mixed: float = 1.0  # probability that a view is mixed, 0 to 1

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix"):
            alpha = getattr(self, name)
            if alpha and not ALPHA[0] <= alpha <= ALPHA[1]:
                raise RecipeError(f"views: {name} must be 0, or from {ALPHA[0]:g} to {ALPHA[1]:g}, not {alpha}")
        if not self.mixup and not self.cutmix:
            raise RecipeError("views: to mix, mixup or cutmix must be above 0")
        if not 0 <= self.mixed <= 1:
            raise RecipeError(f"views: mixed must be from 0 to 1, not {self.mixed}")
        if max(self.size) > LONGEST_SIDE:
            raise RecipeError(f"views: size must be at most {LONGEST_SIDE} pixels on each side, not {self.size}")

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of every view, in pixels."""
        return self.views.size

    @property
    def channels(self) -> int:
        """Of the input."""
        return self.views.channels

    @property
    def seed(self) -> int:
        """Of all that is drawn."""
        return self.views.seed

    @property
    def kind(self) -> str:
        """The name of the record's layout, as a manifest states it."""
        return "augmented-mixed" if self.views.kind == AugmentedViews.kind else "mixed"

    @property
    def dtype(self) -> np.dtype:
        """Of a view's record."""
        return mixed_dtype(self.views.dtype)

    def partner(self, key: str, number: int, place: int, examples: int) -> int:
        """The place in the shard of what view `number` of the example `key` is mixed with, itself at `place` among so
        many `examples`; -1: with none."""
        chance = partial(uniform, self.seed, key, number)
        if examples < 2 or chance("mixed") >= self.mixed:
            return -1
        return (place + 1 + int(chance("partner") * (examples - 1))) % examples

    def draw_for(self, example: Example, number: int) -> np.void:
        """View `number` of an example, mixed with its partner where it has one: a record of `dtype`."""
        own = self.views.draw_for(example, number)
        if example.partner is None:
            return self._alone(own)
        place, partner = example.partner
        other = self.views.draw_for(partner, number)
        chance = partial(uniform, self.seed, example.key, number)
        if self.cutmix and (not self.mixup or chance("mixing") < 0.5):
            box = _box(chance, self.size, _beta(chance, self.cutmix))
            return record(self.dtype, own, other, place, 0, box, CUTMIX)
        return record(self.dtype, own, other, place, round(WHOLE * _beta(chance, self.mixup)), (0, 0, 0, 0), MIXUP)

    def canonical(self, image_size: tuple[int, int]) -> np.void:
        """The one view for evaluation; see `ImageViews.canonical`."""
        return self._alone(self.views.canonical(image_size))

    def replay(
        self, image: np.ndarray | Picture, view: np.void, partner: np.ndarray | Picture | None = None
    ) -> np.ndarray:
        """The pixels of `view` at the policy's size, of the decoded image and, if it is mixed, that of its partner.

        Mixup rounds (own * share + other * (WHOLE - share)) / WHOLE, halves up. Raises DataError when the view is
        damaged or was drawn for other images.
        """
        pixels, mixing = self.views.replay(image, view["view"]), int(view["mixing"])
        second_share(view, self.size)  # refuses what is none
        if mixing == ALONE:
            return pixels
        other = self.views.replay(partner, view["other"])
        if mixing == CUTMIX:
            top, left, height, width = view["box"].tolist()
            pixels[top : top + height, left : left + width] = other[top : top + height, left : left + width]
            return pixels
        return away(pixels, other, int(view["share"]) / WHOLE)

    def _alone(self, own: np.void) -> np.void:
        return record(self.dtype, own, np.zeros((), own.dtype), 0, 0, (0, 0, 0, 0), ALONE)


def partners_of(views: np.ndarray) -> np.ndarray:
    """Records (B,) of views of any kind -> the places (B,) int64 in the shard of what they are mixed with; -1: none."""
    if "mixing" not in views.dtype.names:
        return np.full(len(views), -1)
    return np.where(views["mixing"] == ALONE, -1, views["partner"].astype(np.int64))


def second_share(view: np.void, size: tuple[int, int]) -> float:
    """How much of the partner is seen in a view of any kind of (h, w) `size`, 0 to 1; 0: it is not mixed.

    Raises DataError for parameters that no policy draws.
    """
    if "mixing" not in view.dtype.names or view["mixing"] == ALONE:
        return 0.0
    mixing, share, (top, left, height, width) = int(view["mixing"]), int(view["share"]), view["box"].tolist()
    if mixing > CUTMIX or share > WHOLE or top + height > size[0] or left + width > size[1]:
        raise DataError(
            f"the view is mixed in way {mixing} with a share of {share} or a box of {height} x {width} pixels at row "
            f"{top}, column {left} of {size[0]} x {size[1]}; it was drawn for another size, or is damaged: cache again"
        )
    return (WHOLE - share) / WHOLE if mixing == MIXUP else height * width / (size[0] * size[1])


def _beta(chance: Callable[[str], float], alpha: float) -> float:
    """A number of Beta(alpha, alpha): below 1 by Johnk's method, from 1 on by rejection from the uniform one."""
    for attempt in count():
        one, other = chance(f"share{attempt}"), chance(f"share{attempt} again")
        if alpha >= 1:
            if other < (4 * one * (1 - one)) ** (alpha - 1):
                return one
            continue
        one, other = one ** (1 / alpha), other ** (1 / alpha)
        if 0 < one + other <= 1:
            return one / (one + other)


def _box(chance: Callable[[str], float], size: tuple[int, int], share: float) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a box of 1 - `share` of the area, about a point anywhere, cut at the edges."""
    ends = []
    for name, side in zip(("box y", "box x"), size, strict=True):
        centre, length = int(chance(name) * side), int(side * (1 - share) ** 0.5)
        first = max(0, centre - length // 2)
        ends.append((first, min(side, centre - length // 2 + length) - first))
    (top, height), (left, width) = ends
    return top, left, height, width
