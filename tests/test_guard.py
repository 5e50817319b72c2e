"""A step that must not be taken: agreed upon, explained, undone, and not tried for ever."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from kd_dist import guard
from kd_dist.batch import Batch, TeacherSignal, TopLogits
from kd_dist.checkpoint import Progress
from kd_dist.engine import Engine
from kd_dist.errors import TrainingError
from kd_dist.guard import LIMIT, Cause, Keep, Verdict, check_world, judge, sentence, watched
from kd_dist.meter import Share

NAN, INF = float("nan"), float("inf")
FINE = Verdict(1.0, 1.0, True, 0, False)


def share(keys: tuple[str, ...] = ("a", "b"), peaks: tuple[float, ...] = (1.0, 1.0), **terms: float) -> Share:
    return Share({name: torch.tensor(value) for name, value in terms.items()}, torch.tensor(peaks), keys, 0.0)


def engine(*gradient: float) -> Engine:
    module = nn.Linear(len(gradient), 1, bias=False)
    made = Engine(Accelerator(cpu=True), module, torch.optim.SGD(module.parameters(), lr=1.0), None)
    module.weight.grad = torch.tensor([gradient])
    return made


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


# ---------------------------------------------------------------------------------------------- the verdict


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["loss", "term", "gradient"])
def test_whatever_is_not_finite_decides(bad, where):
    shares = [share(loss=1.0, kd=2.0), share(loss=bad if where == "loss" else 1.0, kd=bad if where == "term" else 2.0)]
    verdict = judge(engine(bad if where == "gradient" else 1.0), shares, 4, None, 1.0, False)
    assert not verdict.finite


def test_a_healthy_step_is_finite_and_its_losses_add_up():
    verdict = judge(engine(3.0, 4.0), [share(loss=1.0), share(loss=0.5)], 4, None, 1.0, False)
    assert verdict == Verdict(1.5, 5.0, True, 0, False)


@pytest.mark.parametrize(("clip", "left"), [(None, 5.0), (10.0, 5.0), (1.0, 1.0)])
def test_the_gradient_is_clipped_and_its_norm_before_that_is_told(clip, left):
    made = engine(3.0, 4.0)
    assert judge(made, [share(loss=1.0)], 2, clip, 1.0, False).norm == 5.0
    assert float(made.module.weight.grad.norm()) == pytest.approx(left, rel=1e-5)


def test_the_loss_scale_is_taken_off_the_gradient():
    made = engine(3.0 * 1024, 4.0 * 1024)
    assert judge(made, [share(loss=1.0)], 2, None, 1024.0, False).norm == 5.0
    assert made.module.weight.grad.tolist() == [[3.0, 4.0]]


def test_examples_that_could_not_be_read_leave_the_mean_of_the_others():
    made = engine(3.0, 4.0)
    one = share(loss=1.0)._replace(failed=("a: damaged",))
    verdict = judge(made, [one, share(loss=1.0)], 4, None, 1.0, False)
    assert verdict.failed == 1 and verdict.norm == pytest.approx(5 * 4 / 3)
    assert made.module.weight.grad.tolist() == [[pytest.approx(4.0), pytest.approx(16 / 3)]]


def test_a_wish_to_stop_is_part_of_it():
    assert judge(engine(1.0), [share(loss=1.0)], 2, None, 1.0, True).stop


# ---------------------------------------------------------------------------------------------- the cause


@pytest.mark.parametrize("bad", [NAN, INF])
def test_the_term_the_rank_and_the_keys_are_named(bad):
    shares = [share(loss=1.0, kd=2.0), share(("c", "d"), loss=bad, cross_entropy=1.0, kd=bad)]
    [cause] = guard.wrong_terms(shares, 3)
    assert sentence(7, cause) == "step 7 is skipped: loss, kd not finite on rank 3; keys: c, d"
    assert guard.record(7, cause) == {"step": 7, "rank": 3, "what": "loss, kd", "keys": ["c", "d"]}


def test_examples_whose_logits_are_not_finite_are_the_suspects():
    [cause] = guard.wrong_terms([share(("a", "b", "c"), (1.0, NAN, INF), loss=NAN)], 0)
    assert cause.keys == ("b", "c")


def test_every_micro_batch_is_named():
    assert len(guard.wrong_terms([share(loss=NAN), share(loss=NAN), share(loss=0.0)], 1)) == 2


def test_many_keys_are_cut_on_the_console_alone():
    eight, nine = (Cause(0, "loss", tuple("abcdefghi"[:count])) for count in (8, 9))
    assert sentence(0, eight).endswith("; keys: a, b, c, d, e, f, g, h")
    assert sentence(0, nine).endswith("; keys: a, b, c, d, e, f, g, h ...")
    assert len(guard.record(0, nine)["keys"]) == 9


@pytest.mark.parametrize("what", ["images", "targets", "teacher's logits", "teacher's feature 'high'"])
def test_what_was_read_is_named_with_its_example(what):
    parts = {"images": torch.zeros(3, 3, 4, 4), "targets": torch.zeros(3), "teacher's logits": torch.zeros(3, 5)}
    parts["teacher's feature 'high'"] = torch.zeros(3, 8, 2, 2)
    signals = TeacherSignal(parts["teacher's logits"], {"high": parts["teacher's feature 'high'"]})
    valid = torch.ones(3, dtype=torch.bool)
    batch = Batch(("a", "b", "c"), parts["images"], parts["targets"], None, valid, 3, signals)
    assert guard.wrong_data(batch, 1) == []
    parts[what][1].fill_(NAN)
    assert guard.wrong_data(batch, 1) == [Cause(1, what, ("b",))]
    assert guard.wrong_data(batch._replace(images=torch.zeros(3, 3, 4, 4, dtype=torch.uint8), signals=None), 1) == (
        [Cause(1, what, ("b",))] if what == "targets" else []
    )


@pytest.mark.parametrize("part", ["logits", "tail"])
def test_top_logits_that_are_not_finite_are_the_teacher_s(part):
    top = TopLogits(torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2), torch.zeros(3, 16))
    images, targets, valid = torch.zeros(3, 3, 4, 4), torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool)
    batch = Batch(("a", "b", "c"), images, targets, None, valid, 3, TeacherSignal(top))
    assert guard.wrong_data(batch, 0) == []
    getattr(top, part)[2, 1] = NAN
    assert guard.wrong_data(batch, 0) == [Cause(0, "teacher's logits", ("c",))]


def test_the_parameters_whose_gradient_is_not_finite_are_named():
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    with watched(module) as wrong:
        module(torch.ones(1, 2)).sum().backward()
    assert wrong == [] and guard.wrong_gradients(wrong, ("a",), 0) == []
    with watched(module) as wrong:
        hidden = module[0](torch.ones(1, 2))
        hidden.register_hook(lambda gradient: gradient * NAN)
        module[1](hidden).sum().backward()
    assert sorted(wrong) == ["0.bias", "0.weight"]
    [cause] = guard.wrong_gradients(wrong, ("a",), 2)
    assert cause.what in ("the gradient of 0.bias and 1 more", "the gradient of 0.weight and 1 more")
    module(torch.full((1, 2), NAN)).sum().backward()  # nobody looks any more
    assert len(wrong) == 2


def test_buffers_go_back():
    module = nn.BatchNorm1d(3)
    kept = Keep(module)
    module(torch.randn(5, 3))
    kept.store()
    before = {name: value.clone() for name, value in module.named_buffers()}
    module(torch.full((5, 3), NAN))
    assert not module.running_mean.isfinite().any() and int(module.num_batches_tracked) == 2
    kept.restore()
    for name, value in module.named_buffers():
        assert torch.equal(value, before[name]), name


# ---------------------------------------------------------------------------------------------- what follows


def test_a_streak_slows_down_goes_back_and_ends():
    progress, done = Progress(), []
    for _ in range(3 * LIMIT - 1):
        guard.skipped(progress, False, False, True)
        done.append(guard.react(progress))
    assert [turn for turn, one in enumerate(done, start=1) if one] == [LIMIT, 2 * LIMIT]
    assert (done[LIMIT - 1], done[2 * LIMIT - 1]) == ("slow down", "go back")
    guard.skipped(progress, False, False, True)
    with pytest.raises(TrainingError, match=f"^step 0: {3 * LIMIT} steps in a row were skipped, .*suspects.jsonl"):
        guard.react(progress)


def test_a_step_that_is_taken_ends_a_streak():
    progress = Progress(streak=LIMIT - 1)
    guard.taken(progress, FINE, False, None)
    guard.skipped(progress, False, False, True)
    assert (progress.streak, progress.skipped, guard.react(progress)) == (1, 1, None)


def test_the_loss_scale_falls_and_grows():
    progress = Progress(scale=guard.first_scale(True))
    assert guard.first_scale(False) == 1 and progress.scale == 2**16
    assert guard.skipped(progress, False, True, False)
    assert progress.scale == 2**15 and progress.streak == 0  # how a scale is found is no trouble
    assert not guard.skipped(progress, False, True, True)
    assert progress.scale == 2**14 and progress.streak == 1  # a loss that is not finite is
    for _ in range(guard.SCALE_GROWS_AFTER):
        guard.taken(progress, FINE, True, None)
    assert progress.scale == 2**15
    progress.scale = 1.0
    assert not guard.skipped(progress, False, True, False) and progress.streak == 1  # nothing is left to find


def test_a_spike_is_measured_by_the_median_of_steps_taken():
    progress = Progress()
    for value in range(guard.FIRST_JUDGED):
        assert not guard.is_spike(1e9, progress.recent, 3.0)
        guard.taken(progress, FINE._replace(loss=1.0 + value % 2), False, 3.0)
    assert not guard.is_spike(4.5, progress.recent, 3.0) and guard.is_spike(4.6, progress.recent, 3.0)
    assert not guard.is_spike(1e9, progress.recent, None)
    for _ in range(2 * guard.WINDOW):
        guard.taken(progress, FINE, False, 3.0)
    assert progress.recent == [1.0] * guard.WINDOW
