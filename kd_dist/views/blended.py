"""A view of a face, of which some are self-blended: pseudo-fakes, whose parameters are stored like any view's."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from kd_dist.batch import Example
from kd_dist.errors import RecipeError
from kd_dist.views.blends import BLEND_DTYPE, blended, draw_blend
from kd_dist.views.chance import record, uniform
from kd_dist.views.images import VIEW_DTYPE, ImageViews
from kd_dist.views.pictures import Picture

REAL, FAKE = 0, 1  # the two classes
# One view: 200 bytes. That of the image, which is blended first where `blended` is 1; else `blend` is zeros.
BLENDED_DTYPE = np.dtype([("view", VIEW_DTYPE), ("blended", "u1"), ("blend", BLEND_DTYPE)], align=True)
UNTOUCHED = np.zeros((), BLEND_DTYPE)


@dataclass(frozen=True)
class BlendedViews(ImageViews):
    """The policy of `ImageViews`, by which a share of the views of a real image are blended with itself first: those
    are fakes. Canonical views, and those of fakes, are not.

    Landmarks are taken from `Example.about`, where there are any.
    """

    self_blend: float = 0.5  # probability that a view of a real image is a fake, 0 to 1

    kind: ClassVar[str] = "self-blended"
    dtype: ClassVar[np.dtype] = BLENDED_DTYPE

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.self_blend <= 1:
            raise RecipeError(f"views: self_blend must be from 0 to 1, not {self.self_blend}")

    def draw_for(self, example: Example, number: int) -> np.void:
        """View `number` of an example: one record of BLENDED_DTYPE. What both policies draw is the same."""
        size, chance = example.image.shape[:2], partial(uniform, self.seed, example.key, number)
        blended = example.target == REAL and chance("blended") < self.self_blend
        drawn = draw_blend(chance, size, example.about.get("landmarks")) if blended else UNTOUCHED
        return record(BLENDED_DTYPE, self.draw(example.key, number, size), blended, drawn)

    def canonical(self, image_size: tuple[int, int]) -> np.void:
        """The one view for evaluation; see `ImageViews.canonical`."""
        return record(BLENDED_DTYPE, super().canonical(image_size), False, UNTOUCHED)

    def replay(self, image: np.ndarray | Picture, view: np.void) -> np.ndarray:
        """The pixels of `view` at the policy's size: blended, then as `images.replay` says."""
        return super().replay(blended(image, view["blend"]) if view["blended"] else image, view["view"])


def is_fake(view: np.void) -> bool:
    """Whether a view of any kind shows a fake made of a real image."""
    return "blended" in view.dtype.names and bool(view["blended"])
