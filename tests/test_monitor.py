"""Each warning fires when it should and stays silent when it should."""

import pytest

from kd_dist.monitor import LASTING, WINDOW, gan_warnings, waiting, warnings

LIMITS = {"stagnation_epochs": 3, "retention_target": 0.9, "oscillation": 0.5, "logit_limit": 100.0}


def history(losses=None, retention=None, logit_max=5.0) -> list[dict]:
    count = len(losses or retention)
    losses, retention = losses or [1.0] * count, retention or [None] * count
    return [
        {"loss": loss, "retention": kept, "logit_max": logit_max} for loss, kept in zip(losses, retention, strict=True)
    ]


def said(*arguments, **options) -> list[str]:
    return warnings(history(*arguments, **options), **LIMITS)


def test_nothing_to_say():
    assert warnings([], **LIMITS) == []
    assert said([2.3, 1.7, 1.2, 0.9, 0.7, 0.6, 0.5, 0.45]) == []


def test_stagnation_is_said():
    assert said(retention=[0.5, 0.7, 0.7, 0.6, 0.65]) == [
        "retention has not passed 70.0% for 3 epochs, the target is 90.0%; try a larger student, more views or another "
        "temperature"
    ]


@pytest.mark.parametrize(
    "retention",
    [
        [0.7, 0.7, 0.6],  # not 3 epochs after a first one
        [0.5, 0.7, 0.7, 0.6, 0.71],  # it moves
        [0.5, 0.91, 0.7, 0.6, 0.65],  # the target was reached
        [0.5, 0.9, 0.7, 0.6, 0.65],  # exactly
        [0.7, 0.6, 0.6, 0.6, 0.6],  # said an epoch ago
        [None, None, 0.7, None, 0.6],  # too few are known
    ],
)
def test_stagnation_is_not_said(retention):
    assert said(retention=retention) == []


def test_stagnation_is_said_once_until_it_moves():
    kept = [0.7, 0.6, 0.6, 0.6, 0.6, 0.6, 0.8, 0.7, 0.7, 0.7, 0.7]
    assert [count for count in range(1, len(kept) + 1) if said(retention=kept[:count])] == [4, 10]


def test_epochs_without_retention_do_not_count():
    assert len(said(retention=[0.7, None, 0.7, None, 0.6, None, 0.6])) == 1


def test_oscillation_is_said_of_the_last_epochs_alone():
    swing = [3.0, 0.5] * (WINDOW // 2)
    [sentence] = said([1.0, 1.0, *swing])
    assert sentence.startswith("the loss oscillates: its spread over 6 epochs is 71% of its mean; lower the learning")
    assert said([*swing, *[1.0] * WINDOW]) == []


@pytest.mark.parametrize(
    "losses",
    [
        [3.0, 0.5] * 2,  # too few epochs
        [1.0, 0.9] * 3,  # small
        [9.0, 5.0, 3.0, 1.0, 0.5, 0.2],  # a large spread, but it falls
        [0.2, 0.5, 1.0, 3.0, 5.0, 9.0],
        [9.0, 5.0, 6.0, 1.0, 0.5, 0.2],  # with one bump
    ],
)
def test_oscillation_is_not_said(losses):
    assert said(losses) == []


def test_a_loss_around_zero_is_no_division_by_zero():
    assert len(said([1.0, -1.0] * 3)) == 1
    assert said([0.0] * 6) == []


@pytest.mark.parametrize(("logit_max", "shown"), [(100.5, "100"), (4e7, "4e+07"), (float("inf"), "inf")])
def test_large_logits_are_said(logit_max, shown):
    assert said([1.0], logit_max=logit_max) == [
        f"logits reach {shown}, beyond the limit of 100; lower the learning rate or raise the weight decay"
    ]


def test_logits_that_are_not_finite_are_said():
    assert said([1.0], logit_max=None)[0].startswith("logits reach inf, beyond")


def test_an_epoch_without_a_loss_is_left_out():
    assert said([1.0, None, 1.0, None, 1.0, 1.0, 1.0, 1.0]) == []


def test_logits_at_the_limit_and_of_earlier_epochs_are_not_said():
    assert said([1.0], logit_max=100.0) == []
    assert warnings(history([1.0], logit_max=1e6) + history([1.0]), **LIMITS) == []


def test_all_at_once():
    assert len(said([3.0, 0.5] * 3, [0.5, 0.6, 0.7, 0.6, 0.6, 0.6], 1e6)) == 3


BOTH = (0.9, 0.1)
LEARNS = {"d_real": 0.6, "d_fake": 0.4, "spread": 0.9}


@pytest.mark.parametrize(
    ("wrong", "labels", "said"),
    [
        ({"d_real": 0.89, "d_fake": 0.11}, BOTH, "the discriminator tells all samples from recordings, so"),
        ({"d_real": 0.89, "d_fake": 0.11}, (1.0, 0.0), None),
        ({"d_real": 0.5, "d_fake": 0.5}, BOTH, "the discriminator tells nothing apart; "),
        ({"d_real": 0.2, "d_fake": 0.6}, BOTH, "the discriminator tells nothing apart; "),
        ({"spread": 0.1}, BOTH, "samples are nearly all alike, the generator has collapsed; "),
        ({}, BOTH, None),
    ],
)
def test_a_network_of_two_that_has_given_up_is_said_once_when_it_lasts(wrong, labels, said):
    bad = {**LEARNS, **wrong}
    for before in ([], [LEARNS]):
        history = [*before, *[bad] * (LASTING + 3)]
        found = [gan_warnings(history[:count], labels) for count in range(1, len(history) + 1)]
        told = [number for number, sentences in enumerate(found) if sentences]
        assert told == ([] if said is None else [len(before) + LASTING - 1])
        assert all(sentence.startswith(said) for sentences in found for sentence in sentences)
    assert not any(gan_warnings([bad] * (LASTING - 1) + [LEARNS] * count, labels) for count in range(5))


def test_epochs_without_a_step_of_the_discriminator_do_not_count():
    collapsed, silent = {**LEARNS, "spread": 0.1}, {"loss_g": 0.7}
    history = [silent, collapsed] * (LASTING + 1)
    found = [gan_warnings(history[:count], BOTH) for count in range(1, len(history) + 1)]
    assert [number for number, sentences in enumerate(found) if sentences] == [2 * LASTING - 1]


def waits(*shares: float | None) -> list[bool]:
    """After which epochs something is said."""
    records = [{"data_wait": one} for one in shares]
    return [waiting(records[:count], 0) is not None for count in range(1, len(records) + 1)]


def test_a_loop_that_waits_for_batches_is_told_once_what_to_do():
    assert waits(0.9, 0.1, 0.1, 0.9) == [False] * 4  # the first begins, and one may have been disturbed
    assert waits(0.3, 0.3, 0.3, 0.3) == [False, True, False, False]
    assert waits(0.3, None, 0.21, 0.3) == [False, False, False, True]
    records = [{"data_wait": 0.47}] * 2
    assert waiting(records, 0) == (
        "47% of the time goes into waiting for batches, which the training process reads itself; data.workers=1 has a "
        "process beside it do that"
    )
    assert waiting(records, 1).startswith("47% of the time goes into waiting for batches, from 1 loader process; raise")
    assert "from 4 loader processes; raise data.workers" in waiting(records, 4)
