"""When a training run should speak up: pure functions of what it has recorded."""

import math
import statistics
from typing import Any

WINDOW = 6  # epochs over which the loss is judged
WAITED = 0.2  # of an epoch's time, when it is spent on waiting for batches
WON, LOST = 0.95, 0.02  # of the distance between its labels: a discriminator that has won, or given up
ALIKE = 0.3  # as much as samples differ, relative to recordings, when a generator makes one thing only
LASTING = 5  # epochs after which one of these is said; for a while each happens


def warnings(
    history: list[dict[str, Any]],
    *,
    stagnation_epochs: int,
    retention_target: float,
    oscillation: float,
    logit_limit: float,
) -> list[str]:
    """Sentences about the newest epoch of `history`; empty when all is well.

    A record holds `loss`, `logit_max` and, where a teacher's metric is known, `retention`; None: not finite. That
    retention stagnates is said once, until it rises again.
    """
    found = []
    retained = [record["retention"] for record in history if record.get("retention") is not None]
    highest = max(retained, default=math.inf)
    if highest < retention_target and len(retained) - 1 - retained.index(highest) == stagnation_epochs:
        found.append(
            f"retention has not passed {highest:.1%} for {stagnation_epochs} epochs, the target is "
            f"{retention_target:.1%}; try a larger student, more views or another temperature"
        )
    losses = [record["loss"] for record in history[-WINDOW:] if record["loss"] is not None]
    if len(losses) == WINDOW:
        spread = statistics.pstdev(losses) / max(abs(statistics.fmean(losses)), 1e-12)
        turns = sum((b - a) * (c - b) < 0 for a, b, c in zip(losses, losses[1:], losses[2:], strict=False))
        if spread > oscillation and turns >= WINDOW // 2:
            found.append(
                f"the loss oscillates: its spread over {WINDOW} epochs is {spread:.0%} of its mean; lower the learning "
                f"rate or take larger batches"
            )
    highest = history[-1]["logit_max"] if history else 0.0
    if highest is None or highest > logit_limit:
        reached = math.inf if highest is None else highest
        found.append(
            f"logits reach {reached:.3g}, beyond the limit of {logit_limit:.3g}; lower the learning rate or raise the "
            f"weight decay"
        )
    return found


def waiting(history: list[dict[str, Any]], workers: int) -> str | None:
    """What to do about a loop that waits for its batches: a sentence about the newest epoch of `history`, the second in
    a row that was WAITED for; None when there is nothing to say, or it was said. `workers` are its loader processes."""
    high = [(record["data_wait"] or 0.0) > WAITED for record in history]
    if not all(high[-2:]) or len(high) < 2 or all(high[-3:-1]) and len(high) > 2:
        return None
    read = f"{history[-1]['data_wait']:.0%} of the time goes into waiting for batches"
    if not workers:
        return f"{read}, which the training process reads itself; data.workers=1 has a process beside it do that"
    return (
        f"{read}, from {workers} loader process{'es' if workers > 1 else ''}; raise data.workers where cores are free, "
        f"store smaller pictures, or take several views of a decode (views_per_decode)"
    )


def gan_warnings(history: list[dict[str, Any]], labels: tuple[float, float]) -> list[str]:
    """Sentences about the newest epoch of a generator and its discriminator: what has been wrong for LASTING epochs,
    said once. Empty when both still learn.

    `labels` are what the discriminator was to say of recordings and of samples; a record holds the means `d_real` and
    `d_fake` of what it said, and `spread`, how much samples differ in units of how much recordings do. An epoch in
    which the discriminator saw no two recordings at once lacks some of these, and does not count.
    """
    judged = [record for record in history if "spread" in record]
    if len(judged) < LASTING or judged[-1] is not history[-1]:
        return []
    wrong = [_gan_wrongs(record, labels) for record in judged[-LASTING - 1 :]]
    before = wrong[0] if len(judged) > LASTING else set()
    return sorted(set.intersection(*wrong[-LASTING:]) - before)


def _gan_wrongs(record: dict[str, Any], labels: tuple[float, float]) -> set[str]:
    found, told, whole = set(), record["d_real"] - record["d_fake"], labels[0] - labels[1]
    if told > WON * whole:
        found.add(
            "the discriminator tells all samples from recordings, so the generator has little to learn from; raise "
            "gan.noise, or lower gan.lr"
        )
    if told < LOST * whole:
        found.add("the discriminator tells nothing apart; unless samples are very good, raise gan.lr or gan.width")
    if record["spread"] < ALIKE:
        found.add("samples are nearly all alike, the generator has collapsed; lower gan.lr, or take fewer epochs")
    return found
