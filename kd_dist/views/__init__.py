"""Views: drawn once as explicit parameters, then replayed to the same bytes on any machine. One file a kind of input.

A policy is a value with `size`, (H, W) of every view, `channels`, and the `dtype` of a view's record. It draws a view
(`draw`, `canonical`) and replays it on a decoded example (`replay`): (H, W, channels) uint8.
"""

import zlib

import numpy as np

from kd_dist.views.blended import BlendedViews
from kd_dist.views.images import ImageViews
from kd_dist.views.spectrograms import SpectrogramViews

ViewPolicy = ImageViews | BlendedViews | SpectrogramViews
VIEW_DTYPES = {policy.kind: policy.dtype for policy in (ImageViews, BlendedViews, SpectrogramViews)}  # by kind


def input_crc(pixels: np.ndarray) -> int:
    """CRC32 of the uint8 (h, w, channels) input of a view: what ties a cached signal to what the teacher saw."""
    return zlib.crc32(np.ascontiguousarray(pixels))
