"""The weight schedules: their values, their ends, and what a recipe may write."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd_dist.errors import RecipeError
from kd_dist.losses.schedules import SCHEDULES, check_weight, constant, cosine, linear, step, weight_at

EXAMPLES = {
    "constant": {"value": 0.5},
    "linear": {"start": 1.0, "end": 0.5, "over": 2.5},
    "cosine": {"start": 0.0, "end": 0.9},
    "step": {"values": [0.95, 0.85, 0.75, 0.65, 0.5], "every": 5},
}


def test_there_is_an_example_of_every_schedule():
    assert EXAMPLES.keys() == SCHEDULES.keys()
    assert len(SCHEDULES) == 4


def test_constant_is_its_value_at_every_epoch():
    assert [constant(epoch, 10, value=0.3) for epoch in (0.0, 4.5, 10.0)] == [0.3, 0.3, 0.3]


def test_linear_is_a_straight_line_between_its_ends():
    assert [linear(epoch, 10, start=1.0, end=0.5) for epoch in (0.0, 2.0, 5.0, 10.0)] == [1.0, 0.9, 0.75, 0.5]


def test_cosine_is_half_a_wave_between_its_ends():
    values = [cosine(epoch, 8, start=1.0, end=0.2) for epoch in (0.0, 2.0, 4.0, 6.0, 8.0)]
    half = 0.4 * math.sqrt(0.5)
    assert values == pytest.approx([1.0, 0.6 + half, 0.6, 0.6 - half, 0.2])
    assert values[0] == 1.0 and values[-1] == 0.2


@pytest.mark.parametrize("schedule", [linear, cosine])
def test_the_end_is_not_overshot(schedule):
    assert schedule(11.0, 10, start=0.0, end=1.0) == schedule(10.0, 10, start=0.0, end=1.0) == 1.0


@pytest.mark.parametrize("schedule", [linear, cosine])
def test_the_end_may_come_before_the_run_is_over_and_holds(schedule):
    over = [schedule(epoch, 30, start=0.95, end=0.5, over=20) for epoch in (0.0, 5.0, 10.0, 19.9, 20.0, 25.0, 30.0)]
    assert over[:4] == [schedule(epoch, 20, start=0.95, end=0.5) for epoch in (0.0, 5.0, 10.0, 19.9)]
    assert over[3] > 0.5 and over[4:] == [0.5] * 3
    assert schedule(1.0, 30, start=1.0, end=0.0, over=0.5) == 0.0  # a fraction of an epoch
    assert schedule(5.0, 10, start=1.0, end=0.0, over=40) > schedule(5.0, 10, start=1.0, end=0.0, over=None)
    assert schedule(5.0, 10, start=1.0, end=0.0, over=None) == schedule(5.0, 10, start=1.0, end=0.0)


def test_the_staircase_and_the_line_from_095_to_050_over_twenty_epochs():
    stairs = {"step": {"values": [0.95, 0.85, 0.75, 0.65, 0.5], "every": 5}}
    line = {"linear": {"start": 0.95, "end": 0.5, "over": 20}}
    for weight in (stairs, line):
        check_weight(weight)
    by_epoch = [weight_at(stairs, float(epoch), 30) for epoch in range(30)]
    assert by_epoch == [0.95] * 5 + [0.85] * 5 + [0.75] * 5 + [0.65] * 5 + [0.5] * 10
    assert [weight_at(line, float(epoch), 30) for epoch in (0, 10, 20, 29)] == pytest.approx([0.95, 0.725, 0.5, 0.5])


def test_step_takes_the_next_value_after_each_stair_and_holds_the_last():
    at = {0.0: 0.95, 4.999: 0.95, 5.0: 0.85, 10.0: 0.75, 15.0: 0.65, 19.99: 0.65, 20.0: 0.5, 25.0: 0.5, 1000.0: 0.5}
    assert {epoch: step(epoch, 1000, **EXAMPLES["step"]) for epoch in at} == at


@pytest.mark.parametrize("steps_per_epoch", [3, 7, 10, 49, 641])
def test_step_changes_at_the_exact_optimizer_step(steps_per_epoch):
    """An epoch is a quotient of steps: rounding must not move a stair by one step."""
    values = [float(stair) for stair in range(2 * steps_per_epoch)]
    found = [step(s / steps_per_epoch, 2, values=values, every=1 / steps_per_epoch) for s in range(2 * steps_per_epoch)]
    assert found == values


@pytest.mark.parametrize("name", SCHEDULES)
@given(st.floats(0, 30), st.integers(1, 30))
def test_a_weight_stays_between_the_numbers_that_were_written(name, epoch, epochs):
    written = EXAMPLES[name]
    numbers = written["values"] if name == "step" else [value for key, value in written.items() if key != "over"]
    value = weight_at({name: written}, min(epoch, epochs), epochs)
    assert min(numbers) - 1e-12 <= value <= max(numbers) + 1e-12


def test_a_number_is_a_constant_weight():
    assert weight_at(0.9, 3.0, 10) == weight_at({"constant": {"value": 0.9}}, 3.0, 10) == 0.9
    assert weight_at(2, 3.0, 10) == 2


@pytest.mark.parametrize("weight", [0, 1, 0.5, 3000, *({name: options} for name, options in EXAMPLES.items())], ids=str)
def test_sound_weights_pass(weight):
    check_weight(weight)


def test_the_whole_run_may_be_written_out():
    check_weight({"linear": {"start": 1, "end": 0, "over": None}})


MUST_BE = "must be a number or one schedule with its options, such as {linear: {start: 1.0, end: 0.5}}, not "
BOUNDS = "must be finite and not negative, not "
STEP = "step needs at least one value, and 'every' above 0, not "
WRONG = [
    ("0.5", MUST_BE + "'0.5'"),
    (True, MUST_BE + "True"),
    (None, MUST_BE + "None"),
    ([1, 2], MUST_BE + "[1, 2]"),
    ({}, MUST_BE + "{}"),
    ({"linear": 3}, MUST_BE + "{'linear': 3}"),
    ({"linear": {"start": 1, "end": 0}, "constant": {"value": 1}}, MUST_BE),
    (-0.1, "'value' " + BOUNDS + "-0.1"),
    (math.nan, "'value' " + BOUNDS + "nan"),
    (math.inf, "'value' " + BOUNDS + "inf"),
    (10**400, "'value' " + BOUNDS + "1000"),
    ({"cosine": {"start": 0, "end": -1}}, "'end' " + BOUNDS + "-1"),
    ({"step": {"values": [1, -2], "every": 1}}, "'values' " + BOUNDS + "[1, -2]"),
    ({"step": {"values": (1, math.nan), "every": 1}}, "'values' " + BOUNDS + "(1, nan)"),
    ({"step": {"values": [1, 2], "every": 0}}, STEP + "values [1, 2] and every 0"),
    ({"step": {"values": [], "every": 1}}, STEP + "values [] and every 1"),
    ({"step": {"values": 1, "every": 1}}, "option 'values' must be a list, each a number, not 1"),
    ({"step": {"values": [1]}}, "option 'every' is missing"),
    ({"linear": {"start": 1, "end": 0, "epochs": 3}}, "unknown option 'epochs'; known: end, over, start"),
    ({"linear": {"start": 1, "end": 0, "over": 0}}, "'over' must be above 0, not 0; leave it out for the whole run"),
    ({"cosine": {"start": 1, "end": 0, "over": 0}}, "'over' must be above 0, not 0; leave it out for the whole run"),
    ({"cosine": {"start": 1, "end": 0, "over": -2}}, "'over' " + BOUNDS + "-2"),
    ({"linear": {"start": 1, "end": 0, "over": math.inf}}, "'over' " + BOUNDS + "inf"),
    ({"linear": {"start": None, "end": 0}}, "option 'start' must be a number, not None"),
    ({"linear": {"start": 1, "end": 0, "over": "all"}}, "option 'over' must be a number or null, not 'all'"),
    ({"linear": {"stat": 1, "end": 0}}, "unknown option 'stat'; did you mean 'start'?"),
    ({"line": {"start": 1, "end": 0}}, "unknown schedule 'line'; did you mean 'linear'?"),
    ({7: {}}, "unknown schedule '7'; known: constant, cosine, linear, step"),
]


@pytest.mark.parametrize("weight, message", WRONG, ids=[message[-50:] for _, message in WRONG])
def test_what_cannot_be_a_weight_is_refused_in_one_sentence(weight, message):
    with pytest.raises(RecipeError) as caught:
        check_weight(weight)
    assert str(caught.value).startswith(f"weight: {message}")
