"""A view of a log-mel spectrogram: a stretch of time, a gain and masked bands, as explicit parameters.

Levels of a spectrogram are steps of decibels, so a gain is a number that is added to each: everything is exact in
integers, on any machine.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from kd_dist.batch import Example
from kd_dist.errors import DataError, RecipeError
from kd_dist.views.chance import record, uniform

MASKS = 2  # of time, and as many of frequency; SpecAugment's usual number
LONGEST_MASK = 65535  # a mask is stored in 16-bit numbers
# One view: 24 bytes. The first frame, what is added to every level, and the masks as (first, width), 0 wide: none.
VIEW_DTYPE = np.dtype(
    [("start", "<u4"), ("gain", "<i2"), ("time", "<u2", (MASKS, 2)), ("band", "<u2", (MASKS, 2))], align=True
)


@dataclass(frozen=True)
class SpectrogramViews:
    """The policy that views are drawn from. The defaults draw a stretch of time and change nothing in it.

    The canonical view is the middle of the recording. One that is shorter than a view is followed by silence.
    Raises RecipeError when a field is outside the range given here.
    """

    size: tuple[int, int]  # (mels, frames) of every view, at least 1
    gain: int = 0  # the levels added are uniform in -gain to gain; 0 to 255
    time_mask: int = 0  # frames of the widest mask in time, 0 to `frames`
    band_mask: int = 0  # mels of the widest mask in frequency, 0 to `mels`
    seed: int = 0

    kind: ClassVar[str] = "spectrogram"
    channels: ClassVar[int] = 1
    dtype: ClassVar[np.dtype] = VIEW_DTYPE

    def __post_init__(self) -> None:
        if not 1 <= min(self.size) <= max(self.size) <= LONGEST_MASK:
            raise RecipeError(f"views: size must be from 1 to {LONGEST_MASK} mels and frames, not {self.size}")
        for name, most in (("gain", 255), ("band_mask", self.size[0]), ("time_mask", self.size[1])):
            if not 0 <= getattr(self, name) <= most:
                raise RecipeError(f"views: {name} must be from 0 to {most}, not {getattr(self, name)}")

    def draw(self, key: str, number: int, size: tuple[int, int]) -> np.void:
        """View `number` of the example `key`, whose spectrogram has `size` (mels, frames): one record of VIEW_DTYPE.

        Each parameter has its own stream of chance. A mask is at most as wide as the policy says, and may be 0 wide
        (Park et al., SpecAugment, 1904.08779, section 2).
        """
        chance = partial(uniform, self.seed, key, number)
        room = self._room(size)
        start = int(chance("start") * (room + 1))
        gain = int(chance("gain") * (2 * self.gain + 1)) - self.gain
        masks = [
            [_mask(chance(f"{name}_width{one}"), chance(f"{name}{one}"), widest, whole) for one in range(MASKS)]
            for name, widest, whole in (("time", self.time_mask, self.size[1]), ("band", self.band_mask, self.size[0]))
        ]
        return record(VIEW_DTYPE, start, gain, *masks)

    def draw_for(self, example: Example, number: int) -> np.void:
        """View `number` of an example; see `draw`."""
        return self.draw(example.key, number, example.image.shape[:2])

    def canonical(self, size: tuple[int, int]) -> np.void:
        """The one view for evaluation: the middle of a spectrogram of `size` (mels, frames), unchanged."""
        none = np.zeros((MASKS, 2), np.uint16)
        return record(VIEW_DTYPE, self._room(size) // 2, 0, none, none)

    def replay(self, image: np.ndarray, view: np.void) -> np.ndarray:
        """The levels of `view`: a spectrogram (mels, T, 1) uint8 -> a new (mels, frames, 1) uint8 array.

        The order is crop, gain, masks. A gain stops at 0 and 255, and leaves level 0, which is silence or less, at 0;
        masked places and what lies beyond the end are 0.
        Raises DataError when the spectrogram is of another kind, or the view was drawn for another one.
        """
        room, start = self._room(image.shape[:2]), int(view["start"])
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 1:
            raise DataError(f"a spectrogram must be uint8 (mels, T, 1), not {image.dtype} {image.shape}; pack it again")
        if start > room or abs(int(view["gain"])) > 255:
            raise DataError(
                f"the view begins at frame {start} with a gain of {view['gain']} levels, the spectrogram has "
                f"{image.shape[1]} frames; the view was drawn for another one: cache the teacher again"
            )
        levels = np.zeros((*self.size, 1), np.uint8)
        seen = image[:, start : start + self.size[1]]
        levels[:, : seen.shape[1]] = _louder(int(view["gain"]))[seen] if view["gain"] else seen
        for first, width in view["time"].tolist():
            levels[:, first : first + width] = 0
        for first, width in view["band"].tolist():
            levels[first : first + width] = 0
        return levels

    def _room(self, size: tuple[int, int]) -> int:
        """How many frames a view can begin after the first."""
        mels, frames = size
        if mels != self.size[0]:
            raise DataError(f"a spectrogram of {mels} mels has no views of {self.size[0]}; set views.size to its mels")
        return max(0, frames - self.size[1])


def _mask(wide: float, far: float, widest: int, whole: int) -> tuple[int, int]:
    """(first, width) of a mask within `whole`, from two numbers in [0, 1)."""
    width = int(wide * (widest + 1))
    return int(far * (whole - width + 1)), width


def _louder(gain: int) -> np.ndarray:
    """The table of 256 levels after `gain` is added; silence stays silent."""
    table = np.clip(np.arange(256) + gain, 0, 255)
    table[0] = 0
    return table.astype(np.uint8)
