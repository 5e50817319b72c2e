"""Running means of a training run between two reports: loss terms, throughput, data wait."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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
    """Sums on the device; nothing is copied to the host before `report`. Goes on from `before`, a `state`."""

    def __init__(self, names: Sequence[str], before: Mapping[str, Any] | None = None) -> None:
        self.names, self.before = names, dict(before or {})
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

    def state(self, accelerator: Accelerator) -> dict[str, Any]:
        """All that was added, over all ranks, as plain numbers. A collective call: every rank makes it."""
        device, before = accelerator.device, self.before
        sums = torch.stack([self.sums[name].to(device, torch.float32) for name in self.names])
        totals = accelerator.reduce(sums, "sum").tolist()
        highest = accelerator.gather(self.logit_max.to(device, torch.float32).view(1)).max()
        own = {
            "steps": self.steps,
            "examples": self.examples,
            "waited": self.waited,
            "seconds": time.perf_counter() - self.started,
            **dict(zip(self.names, totals, strict=True)),
        }
        added = {name: value + before.get(name, 0) for name, value in own.items()}
        return {**added, "logit_max": max(float(highest), before.get("logit_max", 0.0))}

    def report(self, accelerator: Accelerator) -> dict[str, float]:
        """Means per taken step over all ranks (NaN when none was taken). A collective call: every rank makes it."""
        total = self.state(accelerator)
        steps, seconds = total["steps"], total["seconds"]
        return {
            **{name: total[name] / steps if steps else float("nan") for name in self.names},
            "logit_max": total["logit_max"],
            "examples_per_second": total["examples"] / seconds,
            "data_wait": total["waited"] / seconds,
        }
