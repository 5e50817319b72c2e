"""How sure a teacher is of its classes."""

import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from scipy.stats import entropy

from kd_dist.tasks.certainty import SATURATED_ENTROPY, certainty, certainty_warnings


def test_certainty_agrees_with_scipy():
    logits = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32) * 3
    logits[:9] *= 20
    z = logits.astype(np.float64)
    log_p, sums = certainty(logits)
    assert log_p == pytest.approx(log_softmax(z, axis=1), rel=1e-12)
    assert sums["entropy"] == pytest.approx(entropy(softmax(z, axis=1), axis=1).sum(), rel=1e-9)
    assert sums["saturated"] == (softmax(z, axis=1).max(1) > 0.99).sum() > 0


def test_a_warning_for_a_teacher_without_doubt():
    [warning] = certainty_warnings(SATURATED_ENTROPY * 0.9)
    assert warning.startswith(
        "warning: the teacher's mean entropy is 0.0180 nat: it says little beyond its top class; raise the temperature"
    )
    for remedy in ("label smoothing", "a temperature that calibrates it", "learn from its features"):
        assert remedy in warning
    assert "\n" not in warning and ". " not in warning
    assert certainty_warnings(SATURATED_ENTROPY) == []
