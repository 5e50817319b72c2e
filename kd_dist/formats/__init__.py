"""File formats that a trained student is exported to, and how each is run again. One file a runtime; its library loads
only when the format is chosen."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from torch import nn

Run = Callable[[np.ndarray], np.ndarray]  # (B, *shape) float32 -> (B, ...) float32, for any B


class Graph(NamedTuple):
    """What every format is made from."""

    module: nn.Module  # on the CPU, in evaluation mode: (B, *shape) float32 -> (B, ...) float32, one tensor to one
    shape: tuple[int, ...]  # of one input, without the batch
    input: str  # its name, such as `image`
    output: str  # likewise, such as `logits`
    metadata: Mapping[str, str]  # goes into the file where its format has a place for it


class Format(NamedTuple):
    """A format: how a graph is written to a file, and how that file is run."""

    file: str  # its name in a package
    write: str  # "module:function" of (graph, calibration (N, *shape) float32 tensor, path) -> None
    open: str  # "module:function" of (path, threads) -> Run; nothing else of kd_dist's state is needed
    needs: tuple[str, ...]  # libraries that it imports
    int8: bool  # judged by the task's metric, not by its largest difference
    note: str  # a sentence for the model card: what runs it, and what to know


FORMATS: dict[str, Format] = {}
