"""An average of the weights over the steps of a run, which is evaluated and kept in their place."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kd_dist.engine import Engine

PREFIX = "average."  # of its names in a checkpoint, beside those of the weights themselves


class Average:
    """The exponential moving average of what an engine trains.

    After the n-th step that is taken, average = d average + (1 - d) weights with d = min(decay, (1 + n) / (10 + n)),
    the warm-up of TensorFlow's ExponentialMovingAverage; before the first it is the weights. Buffers with a fraction
    (BatchNorm statistics) are averaged likewise, as timm's ModelEmaV3 does it; others (counters) are those of the run.

    A rank averages what it holds: under ZeRO 3 its own part of each weight.
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        self.engine, self.decay = engine, decay
        self._begin()

    @torch.no_grad()
    def _begin(self) -> None:
        self.values = [one.clone() for one in self.engine.parts()]

    @torch.no_grad()
    def follow(self, taken: int) -> None:
        """Go with the weights after step number `taken`, from 1 on."""
        decay = min(self.decay, (1 + taken) / (10 + taken))
        torch._foreach_lerp_(self.values, [one.detach() for one in self.engine.parts()], 1 - decay)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Within it the module has the average, afterwards what it had, to the last bit. A collective call."""
        self.engine.exchange(self.values)
        try:
            yield
        finally:
            self.engine.exchange(self.values)

    def weights(self) -> dict[str, Tensor]:
        """The average by name, whole on every rank. A collective call."""
        with self.shown():
            return {f"{PREFIX}{name}": value.clone() for name, value in self.engine.weights().items()}

    def load(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take over what `weights` returned out of a checkpoint's weights; returns the others, which the engine has yet
        to load. A collective call.

        RuntimeError: they are of another module.
        """
        mine = {name: value for name, value in weights.items() if name.startswith(PREFIX)}
        self.engine.load_weights({name.removeprefix(PREFIX): value for name, value in mine.items()})
        self._begin()
        return {name: value for name, value in weights.items() if name not in mine}
