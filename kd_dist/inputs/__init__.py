"""What a model is shown: one file a kind of input. How its raw bytes become the members of a shard, and those an array.

An input is a value: `encode` makes the members of an example and checks them, `decode` gives (H, W, channels) uint8.
"""

from kd_dist.inputs.images import Images
from kd_dist.inputs.spectrograms import Spectrograms

Input = Images | Spectrograms
Span = tuple[float, float] | None  # the part of a recording that an example is, from and to, in seconds
