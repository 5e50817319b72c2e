"""Means between two reports, in one process."""

import math
import time

import pytest
import torch
from accelerate import Accelerator

from kd_dist.meter import Meter, Share

NAMES = ["loss", "kd"]


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def share(loss: float, kd: float, logit_max: float = 1.0, waited: float = 0.0) -> Share:
    return Share({"loss": torch.tensor(loss), "kd": torch.tensor(kd)}, torch.tensor(logit_max), ("a",), waited)


def test_micro_batches_add_up_and_steps_are_averaged(accelerator):
    meter = Meter(NAMES)
    meter.add([share(0.5, 1.0), share(0.25, 1.0)], 8, taken=True)
    meter.add([share(1.0, 3.0, logit_max=9.0), share(0.25, 3.0)], 8, taken=True)
    report = meter.report(accelerator)
    assert (report["loss"], report["kd"], report["logit_max"]) == (1.0, 4.0, 9.0)


def test_a_skipped_step_counts_for_time_alone(accelerator):
    meter = Meter(NAMES)
    meter.add([share(2.0, 1.0)], 8, taken=True)
    meter.add([share(math.nan, math.inf, logit_max=math.inf, waited=0.5)], 8, taken=False)
    report = meter.report(accelerator)
    assert (report["loss"], report["kd"], report["logit_max"]) == (2.0, 1.0, 1.0)
    assert (meter.examples, meter.waited) == (16, 0.5)


def test_no_step_taken(accelerator):
    report = Meter(NAMES).report(accelerator)
    assert math.isnan(report["loss"]) and math.isnan(report["kd"])
    assert report["examples_per_second"] == report["data_wait"] == 0.0


def test_throughput_and_the_share_of_time_spent_waiting(accelerator):
    meter = Meter(NAMES)
    time.sleep(0.2)
    meter.add([share(1.0, 1.0, waited=0.05), share(1.0, 1.0, waited=0.05)], 100, taken=True)
    report = meter.report(accelerator)
    seconds = 100 / report["examples_per_second"]
    assert 0.2 <= seconds < 2
    assert report["data_wait"] == pytest.approx(0.1 / seconds)


def test_nothing_of_the_graph_is_kept_and_sums_do_not_leak_between_meters(accelerator):
    first, second = Meter(NAMES), Meter(NAMES)
    first.add([share(1.0, 1.0)], 1, taken=True)
    assert second.report(accelerator)["logit_max"] == 0.0
    assert {float(value) for value in second.sums.values()} == {0.0}


def test_half_precision_terms(accelerator):
    meter = Meter(["loss"])
    for _ in range(4096):  # in bfloat16 the sum would stop at 256
        meter.add([Share({"loss": torch.tensor(1.0)}, torch.tensor(3.0, dtype=torch.bfloat16), (), 0.0)], 1, True)
    report = meter.report(accelerator)
    assert (report["loss"], report["logit_max"]) == (1.0, 3.0)
