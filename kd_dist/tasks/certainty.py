"""How sure a teacher is of its classes."""

from typing import Any

import numpy as np

SATURATED = 0.99  # a row, or a pixel, is saturated when its top probability exceeds this
SATURATED_ENTROPY = 0.02  # nat; a teacher below it says little more than its top class


def certainty(logits: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """Logits (n, C) -> log softmax, (n, C) float64, and over the n rows the summed entropy in nat and the number that
    are saturated."""
    z = logits.astype(np.float64)
    log_p = z - z.max(axis=1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    return log_p, {"entropy": -float((p * log_p).sum()), "saturated": int((p.max(axis=1) > SATURATED).sum())}


def certainty_warnings(entropy: float) -> list[str]:
    """A sentence about a teacher that is sure of everything, where `entropy`, the mean in nat, says so."""
    if entropy >= SATURATED_ENTROPY:
        return []
    return [
        f"warning: the teacher's mean entropy is {max(entropy, 0.0):.4f} nat: it says little beyond its top class; "
        f"raise the temperature of the losses, train the teacher with label smoothing or divide its logits by a "
        f"temperature that calibrates it, or learn from its features"
    ]
