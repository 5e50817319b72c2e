"""Running means of a training run between two reports: loss terms, throughput, data wait."""

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor


class Share(NamedTuple):
    """What one micro-batch of this rank left behind."""

    terms: dict[str, Tensor]  # () each; they add up, over ranks and micro-batches, to the step's means
    peaks: Tensor  # (B,), the largest absolute logit of each row
    keys: tuple[str, ...]
    waited: float  # seconds that the loop waited for the batch
    failed: tuple[str, ...] = ()  # examples that could not be read, a sentence each


class Meter:
    """Sums on the device; nothing is copied to the host before `report`."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.started = time.perf_counter()
        self.steps, self.examples, self.waited = 0, 0, 0.0
        self.sums = dict.fromkeys(names, torch.zeros(()))
        self.logit_max = torch.zeros(())

    def add(self, shares: Sequence[Share], examples: int, taken: bool) -> None:
        """One optimiser step over `examples` examples of all ranks. A skipped step counts for time alone."""
        self.examples += examples
        self.waited += sum(share.waited for share in shares)
        if taken:
            self.steps += 1
            for share in shares:
                for name in self.names:
                    self.sums[name] = share.terms[name] + self.sums[name].to(share.terms[name].device)
                self.logit_max = torch.maximum(self.logit_max.to(share.peaks), share.peaks.max())

    def report(self, accelerator: Accelerator) -> dict[str, float]:
        """Means per taken step over all ranks (NaN when none was taken). A collective call: every rank makes it."""
        seconds = time.perf_counter() - self.started
        device = accelerator.device
        sums = torch.stack([self.sums[name].to(device, torch.float32) for name in self.names])
        means = accelerator.reduce(sums, "sum").tolist()
        highest = accelerator.gather(self.logit_max.to(device, torch.float32).view(1)).max()
        return {
            **{
                name: total / self.steps if self.steps else float("nan")
                for name, total in zip(self.names, means, strict=True)
            },
            "logit_max": float(highest),
            "examples_per_second": self.examples / seconds,
            "data_wait": self.waited / seconds,
        }
