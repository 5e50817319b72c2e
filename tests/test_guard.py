"""A step that is not finite: seen, explained, and not taken for ever."""

import pytest
import torch

from kd_dist.errors import TrainingError
from kd_dist.guard import LIMIT, check_streak, check_world, diagnose, is_finite
from kd_dist.meter import Share

NAN, INF = float("nan"), float("inf")


def share(keys: tuple[str, ...] = ("a", "b"), **terms: float) -> Share:
    return Share({name: torch.tensor(value) for name, value in terms.items()}, torch.tensor(1.0), keys, 0.0)


@pytest.mark.parametrize("started", [None, "1", "4"])
def test_processes_that_know_of_each_other_pass(monkeypatch, started):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if started is not None:
        monkeypatch.setenv("WORLD_SIZE", started)
    check_world(int(started or 1))


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match="^the launcher started 2 processes, of which this one knows 1; .*USE_CPU"):
        check_world(1)


@pytest.mark.parametrize(("norm", "finite"), [(0.0, True), (1e30, True), (INF, False), (-INF, False), (NAN, False)])
def test_a_norm_decides(norm, finite):
    assert is_finite(torch.tensor(norm)) is finite


@pytest.mark.parametrize("bad", [NAN, INF])
def test_the_term_the_rank_and_the_keys_are_named(bad):
    shares = [share(loss=1.0, kd=2.0), share(("c", "d"), loss=bad, cross_entropy=1.0, kd=bad)]
    assert diagnose(7, 3, shares) == ["step 7 is skipped: loss, kd not finite on rank 3; keys: c, d"]


def test_every_micro_batch_is_named():
    assert len(diagnose(7, 1, [share(loss=NAN), share(loss=NAN), share(loss=0.0)])) == 2


def test_many_keys_are_cut():
    [eight] = diagnose(0, 0, [share(tuple("abcdefgh"), loss=NAN)])
    [nine] = diagnose(0, 0, [share(tuple("abcdefghi"), loss=NAN)])
    assert eight.endswith("; keys: a, b, c, d, e, f, g, h")
    assert nine.endswith("; keys: a, b, c, d, e, f, g, h ...")


def test_when_the_cause_is_elsewhere_rank_0_alone_speaks():
    assert diagnose(7, 1, [share(loss=1.0)]) == []
    assert diagnose(7, 0, [share(loss=1.0)]) == [
        "step 7 is skipped: the gradient is not finite, though every loss term of rank 0 is"
    ]


def test_a_streak_ends_the_run():
    check_streak(41, LIMIT - 1)
    with pytest.raises(TrainingError, match=rf"^step 42: {LIMIT} steps in a row had a non-finite gradient; lower"):
        check_streak(42, LIMIT)
