"""Views: drawn once as explicit parameters, then replayed to the same bytes on any machine. One file a kind of input.

A policy is a value with `size`, (H, W) of every view, `channels`, and the `dtype` of a view's record. It draws a view
(`draw`, `canonical`) and replays it on a decoded example (`replay`): (H, W, channels) uint8.
"""

import numpy as np
from isal.isal_zlib import crc32

from kd_dist.batch import Example
from kd_dist.views.augmented import AugmentedViews
from kd_dist.views.blended import BlendedViews
from kd_dist.views.images import ImageViews
from kd_dist.views.mixed import AUGMENTED_MIXED, PLAIN_MIXED, MixedViews
from kd_dist.views.spectrograms import SpectrogramViews

ViewPolicy = ImageViews | AugmentedViews | BlendedViews | MixedViews | SpectrogramViews
KINDS = (ImageViews, AugmentedViews, BlendedViews, SpectrogramViews)
VIEW_DTYPES = {policy.kind: policy.dtype for policy in KINDS}  # by kind
VIEW_DTYPES |= {"mixed": PLAIN_MIXED, "augmented-mixed": AUGMENTED_MIXED}


def replayed(policy: ViewPolicy, example: Example, view: np.void) -> np.ndarray:
    """The pixels of a view of an example, and of its partner where the view is mixed."""
    if example.partner is None:
        return policy.replay(example.image, view)
    return policy.replay(example.image, view, example.partner[1].image)


def input_crc(pixels: np.ndarray) -> int:
    """CRC32 of the uint8 (h, w, channels) input of a view: what ties a cached signal to what the teacher saw."""
    return crc32(np.ascontiguousarray(pixels))
