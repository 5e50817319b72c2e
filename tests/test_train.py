"""Training: resumed runs, topologies, non-finite steps, early stopping, what is recorded. All in real processes."""

import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import done, ranks, run, sentence, start, wait_until
from safetensors.torch import load_file
from scenes import scenes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trainings import (
    PLAIN,
    SGD,
    TRAIN,
    VAL,
    arguments,
    assert_same_weights,
    result,
    scalars,
    state,
    trained,
    weights,
)

from kd_dist import assemble, cache_teacher, journey, train
from kd_dist.config import load
from kd_dist.recipe import Stage

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("home")]

# ---------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    "stage, student, accumulate, sam, views",
    [
        ("distill", "dropping", 1, "null", 1),
        ("pretrain", "dropping", 2, "null", 1),
        ("distill", "dropping", 2, "0.1", 2),
    ],
)
def test_ten_steps_equal_five_and_a_resume_bit_for_bit(lab, tmp_path, stage, student, accumulate, sam, views):
    """The last in the midst of a round of two epochs, which have two views of each example side by side."""
    words = ["train.epochs=4", f"student.model=tiny_model:{student}", f"train.accumulate={accumulate}"]
    words += [f"train.sam={sam}", f"train.views_per_decode={views}"]
    whole = trained(lab, tmp_path / "whole", *words, "train.max_steps=10", "train.checkpoint_every=5", stage=stage)
    trained(lab, tmp_path / "parts", *words, "train.max_steps=5", stage=stage)
    parts = trained(lab, tmp_path / "parts", *words, "train.max_steps=10", stage=stage)
    one, two = state(whole), state(parts)
    assert one["name"] == "checkpoint-00000010"
    for name in ("name", "model.safetensors", "optimizer.safetensors"):
        assert one[name] == two[name], name
    # Had the masks of dropout been others, the weights would be too.
    other = trained(lab, tmp_path / "other", *words, "train.max_steps=10", "seed=1", stage=stage).parent / "seed-1"
    assert (other / one["name"] / "model.safetensors").read_bytes() != one["model.safetensors"]


def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_happened(lab, tmp_path):
    words = ["train.epochs=3", "train.accumulate=2", "student.model=tiny_model:slow", "train.batch_size=4"]
    whole = trained(lab, tmp_path / "whole", *words)
    killed = tmp_path / "killed"
    folder = killed / "tiny" / "distill" / "seed-0"
    for reached in ("checkpoint-00000006", "checkpoint-00000012"):
        child = start(train.main, *arguments(killed, *words), folder=lab)
        wait_until((folder / reached).is_dir, f"{reached} of a run")
        assert child.kill().status == -9
        assert not (folder / "result.json").exists()
    assert "goes on from" in done(run(train.main, *arguments(killed, *words), folder=lab))
    assert state(whole) == state(folder)


def test_an_epoch_that_is_interrupted_has_the_means_of_all_its_steps(lab, tmp_path):
    words = [*PLAIN, "train.batch_size=4", "train.checkpoint_every=1"]
    whole = result(trained(lab, tmp_path / "whole", *words))
    child = start(train.main, *arguments(tmp_path / "parts", *words, "student.model=tiny_model:slow"), folder=lab)
    folder = tmp_path / "parts" / "tiny" / "distill" / "seed-0"
    wait_until((folder / "checkpoint-00000003").is_dir, "the third step")
    child.kill()
    parts = result(trained(lab, tmp_path / "parts", *words, "student.model=tiny_model:slow"))
    for mine, other in zip(whole["history"], parts["history"], strict=True):
        for name in ("loss", "kd", "cross_entropy", "logit_max", "val_nll"):
            assert other[name] == pytest.approx(mine[name], rel=1e-5), name


def test_a_stage_whose_end_is_put_off_is_not_done_and_has_one_record_an_epoch(lab, tmp_path):
    """`max_steps` cuts the second epoch after one of its three steps, and is then raised."""
    words = [*PLAIN, "train.epochs=3", "student.model=tiny_model:slow"]
    whole = result(trained(lab, tmp_path / "whole", *words))
    folder = trained(lab, tmp_path / "parts", *words, "train.max_steps=4")
    assert [one["step"] for one in result(folder)["history"]] == [3, 4]
    child = start(train.main, *arguments(tmp_path / "parts", *words, "train.checkpoint_every=1"), folder=lab)
    wait_until((folder / "checkpoint-00000005").is_dir, "the fifth step")
    child.kill()
    assert not (folder / "result.json").exists()
    parts = result(trained(lab, tmp_path / "parts", *words))
    assert [(one["epoch"], one["step"]) for one in parts["history"]] == [(0, 3), (1, 6), (2, 9)]
    for mine, other in zip(whole["history"], parts["history"], strict=True):
        for name in ("loss", "kd", "cross_entropy", "logit_max", "val_nll"):
            assert other[name] == pytest.approx(mine[name], rel=1e-5), name


def test_a_torn_checkpoint_folder_is_not_taken_for_a_whole_one(lab, tmp_path):
    folder = trained(lab, tmp_path / "a", "train.max_steps=3")
    shutil.copytree(folder / "checkpoint-00000003", folder / "checkpoint-00000004.tmp")
    (folder / "checkpoint-00000004.tmp" / "state.json").write_text("{")
    assert "checkpoint-00000003" in done(run(train.main, *arguments(tmp_path / "a", "train.max_steps=6"), folder=lab))
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-00000006"]


def test_an_older_checkpoint_that_a_kill_has_left_is_removed_by_a_run_with_no_step_left(lab, tmp_path):
    folder = trained(lab, tmp_path, "train.max_steps=3")
    shutil.copytree(folder / "checkpoint-00000003", folder / "checkpoint-00000002")
    (folder / "result.json").unlink()
    trained(lab, tmp_path, "train.max_steps=3")
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-00000003"]


def test_a_checkpoint_of_another_recipe_is_refused_and_names_both_values(lab, tmp_path):
    trained(lab, tmp_path, "train.max_steps=2", "train.lr=0.01")
    said = sentence(run(train.main, *arguments(tmp_path, "train.max_steps=4", "train.lr=0.02"), folder=lab))
    assert "was made with stage.lr = 0.01, the recipe says 0.02" in said


def test_a_run_resumes_in_another_topology(lab, tmp_path):
    """One process, then two processes, then accumulation: the cursor counts steps, whoever makes them."""
    whole = trained(lab, tmp_path / "whole", *SGD, "train.max_steps=6")
    trained(lab, tmp_path / "parts", *SGD, "train.max_steps=2")
    trained(lab, tmp_path / "parts", *SGD, "train.max_steps=4", world=2)
    parts = trained(lab, tmp_path / "parts", *SGD, "train.max_steps=6", "train.accumulate=4")
    assert_same_weights(whole, parts, 2e-6)


# ---------------------------------------------------------------------------------------------- a part of a network


def test_the_backbone_moves_by_its_factor_of_the_learning_rate(lab, tmp_path):
    """One step of plain gradient descent: so many times the step of a run without a factor; the head as it was."""
    words = [*SGD, "train.epochs=2", "train.warmup_epochs=0", "train.max_steps=1"]
    first = weights(trained(lab, tmp_path / "first", *words, "train.lr=1e-30"))
    whole, half = (
        weights(trained(lab, tmp_path / f"{factor}", *words, f"train.backbone_lr={factor}")) for factor in (1, 0.5)
    )
    assert len(whole) == 4
    for name, value in first.items():
        factor = 1.0 if ".4." in name else 0.5
        assert (whole[name] - value).norm() > 1e-4
        torch.testing.assert_close(half[name] - value, factor * (whole[name] - value), rtol=1e-4, atol=1e-7)


def test_the_head_alone_learns_under_ddp(lab, tmp_path):
    """What is frozen gets no gradient, and DDP does not look for it."""
    words = [*PLAIN, "student.model=tiny_model:normed", "train.train_last=0"]
    one, two = (trained(lab, tmp_path / f"{world}", *words, world=world) for world in (1, 2))
    assert_same_weights(one, two, 2e-5, tensors=9)
    found = weights(two)
    assert found["network.backbone.0.num_batches_tracked"] == 0  # its statistics rest
    untouched = assemble.network(load("tiny.yaml", ["student.model=tiny_model:normed"]), "student", None, 0).backbone
    before = untouched.state_dict()
    learned = {name for name, value in before.items() if not value.equal(found[f"network.backbone.{name}"])}
    assert learned == {"5.weight", "5.bias"}


# ---------------------------------------------------------------------------------------------- topologies


def test_the_loss_curve_is_the_same_for_every_topology(lab, tmp_path):
    """Shares of 8, 8 and 5 examples over 1, 2, 3 or 4 parts; with 20 in a batch, the tail leaves parts empty."""
    compared = 0
    for batch_size in (8, 20):
        words = [*SGD, f"train.batch_size={batch_size}"]
        alone = trained(lab, tmp_path / f"alone-{batch_size}", *words)
        curve = scalars(alone)
        assert len(curve["train/loss"]) == 2 * math.ceil(TRAIN / batch_size)
        for world, accumulate in ((1, 2), (2, 1), (2, 2), (3, 1)):
            if batch_size % accumulate:
                continue
            runs = tmp_path / f"{batch_size}-{world}-{accumulate}"
            other = trained(lab, runs, *words, f"train.accumulate={accumulate}", world=world)
            theirs = scalars(other)
            for tag in ("train/loss", "train/kd", "train/cross_entropy", "train/grad_norm", "epoch/val_nll"):
                assert theirs[tag] == pytest.approx(curve[tag], rel=2e-5, abs=3e-6), (tag, runs.name)
            assert_same_weights(alone, other, 2e-6)
            compared += 1
    assert compared == 8


def test_a_masked_tail_has_the_gradient_of_one_process(lab, tmp_path):
    """A batch of 20 leaves a step of one example: of four parts three are empty, and each forwards a filler row."""
    words = [*SGD, "train.batch_size=20", "train.epochs=1", "train.accumulate=1"]
    before = trained(lab, tmp_path / "before", *words, "train.max_steps=1")
    alone = trained(lab, tmp_path / "alone", *words)
    spread = trained(lab, tmp_path / "spread", *words, "train.accumulate=2", world=2)
    for name, start_value in weights(before).items():
        mine, theirs = weights(alone)[name] - start_value, weights(spread)[name] - start_value
        assert mine.norm() > 1e-3, name  # one example moves the weights
        assert (mine - theirs).norm() / mine.norm() < 1e-5, name


def test_filler_rows_leave_batch_norm_alone(lab, tmp_path):
    """Two processes, of which one has an empty share: its statistics would turn towards the filler's."""
    words = [*SGD, "train.epochs=1", "train.batch_size=1", "train.max_steps=1", "student.model=tiny_model:normed"]
    one = weights(trained(lab, tmp_path / "one", *words))
    two = weights(trained(lab, tmp_path / "two", *words, "train.accumulate=1", "train.batch_size=1", world=2))
    statistics = [name for name in one if name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert len(statistics) == 3
    changed = [name for name in statistics if not torch.equal(one[name], two[name])]
    # Rank 0, whose statistics are kept, has the empty share: it saw no batch at all.
    assert one["network.backbone.0.num_batches_tracked"] == 1 and two["network.backbone.0.num_batches_tracked"] == 0
    assert len(changed) == 3


# ---------------------------------------------------------------------------------------------- precision


def test_fp16_trains_close_to_fp32_and_finds_its_loss_scale(lab, tmp_path):
    words = [*SGD, "train.epochs=6"]
    exact = scalars(trained(lab, tmp_path / "fp32", *words, "train.precision=fp32"))["train/loss"]
    found = scalars(trained(lab, tmp_path / "fp16", *words, "train.precision=fp16"))
    skipped = int(found["train/skipped"][18])
    assert found["train/loss_scale"][18] == 2.0 ** (16 - skipped)
    assert found["train/loss"] != exact
    assert found["train/loss"][18] == pytest.approx(exact[18], rel=0.05)


def test_bf16_trains_close_to_fp32(lab, tmp_path):
    exact = scalars(trained(lab, tmp_path / "fp32", *SGD, "train.precision=fp32"))["train/loss"]
    rough = scalars(trained(lab, tmp_path / "bf16", *SGD, "train.precision=bf16"))["train/loss"]
    assert rough != exact
    assert rough == pytest.approx(exact, rel=0.05)


@pytest.fixture(scope="module")
def loud_lab(lab, tmp_path_factory) -> Path:
    """The laboratory with a second cache: the same teacher, its logits ten thousand times as large."""
    folder = tmp_path_factory.mktemp("loud") / "lab"
    shutil.copytree(lab, folder, ignore=shutil.ignore_patterns("said-*"))
    done(run(cache_teacher.main, ["tiny.yaml", *LOUD], folder=folder))
    return folder


LOUD = ["teacher.name=loud", "teacher.model=tiny_model:loud", "teacher.options={width: 8, factor: 1e4}"]
LOUD += ["teacher.weights=runs/tiny/teacher/seed-0/best.safetensors", "cache.logits=fp32"]


@pytest.mark.parametrize("sam", ["null", "0.05"])
def test_a_cold_student_of_a_saturated_teacher_stays_finite_in_fp16(loud_lab, tmp_path, sam):
    """Random weights, margins of thousands, a high temperature and a loss scale that overflows at first."""
    report = json.loads((loud_lab / "shards/tiny/val/loud/manifest.json").read_text())["teacher_report"]
    assert report["entropy"] < 1e-3
    words = [*PLAIN, *LOUD, "train.epochs=6", "train.precision=fp16", f"train.sam={sam}"]
    words += ["train.losses={cross_entropy: {weight: 0.5}, kd: {weight: 0.5, temperature: 20}}"]
    folder = trained(loud_lab, tmp_path, *words)
    about, found = result(folder), scalars(folder)
    assert about["step"] == 18 and about["streak"] == 0 and not (folder / "suspects.jsonl").exists()
    assert 1 <= about["skipped"] <= 9 and found["train/loss_scale"][18] == 2.0 ** (16 - about["skipped"])
    assert all(value.isfinite().all() for value in weights(folder).values())
    numbers = [value for record in about["history"][-3:] for value in record.values()]
    assert len(numbers) > 30 and all(math.isfinite(value) for value in numbers)
    losses = [record["kd"] for record in about["history"][-3:]]
    assert losses[-1] < losses[0]  # it learns


# ---------------------------------------------------------------------------------------------- non-finite steps

FRAGILE = [*PLAIN, "student.model=tiny_model:fragile", "views.brightness=0.2"]
WHITE = "red/00"


@pytest.mark.parametrize("world", [1, 2])
def test_a_non_finite_step_is_skipped_on_every_rank_and_names_its_cause(lab, tmp_path, world):
    words = [*FRAGILE, "train.epochs=1", "train.batch_size=21"]  # one step, with the white picture in it
    ended = ranks(train.main, arguments(tmp_path, *words) * world, lab)
    assert [one.status for one in ended] == [1] * world  # it ends with nothing to keep
    causes = [line for line in "".join(one.output for one in ended).splitlines() if "not finite on rank" in line]
    assert len(causes) == 1 and causes[0].startswith("step 0 is skipped: loss, cross_entropy, kd not finite on rank")
    assert WHITE in causes[0] or causes[0].endswith("...")
    folder = tmp_path / "tiny" / "distill" / "seed-0"
    recipe = load(lab / "tiny.yaml", ["student.model=tiny_model:fragile"])
    untouched = assemble.network(recipe, "student", None, recipe.seed).backbone.state_dict()
    for name, value in weights(folder).items():
        assert torch.equal(value, untouched[name.removeprefix("network.backbone.")]), name


def test_training_goes_on_after_a_skipped_step(lab, tmp_path):
    output = done(run(train.main, *arguments(tmp_path, *FRAGILE, "train.batch_size=1"), folder=lab))
    skipped = [line for line in output.splitlines() if "is skipped" in line]
    assert len(skipped) == 2 and all(line.endswith(f"keys: {WHITE}") for line in skipped)  # once an epoch
    folder = tmp_path / "tiny" / "distill" / "seed-0"
    assert result(folder)["skipped"] == 2 and result(folder)["streak"] == 0
    assert all(math.isfinite(record["loss"]) for record in result(folder)["history"])
    assert scalars(folder)["train/skipped"][2 * TRAIN] == 2


# ---------------------------------------------------------------------------------------------- ranks that differ


@pytest.mark.parametrize(
    "different",
    ["seed=1", "train.lr=0.02", "train.log_every=2", "train.max_steps=1", "student.options={width: 3}"],
)
def test_ranks_with_different_recipes_stop_within_seconds(lab, tmp_path, different):
    mine = arguments(tmp_path, "train.log_every=1")[0]
    began = time.monotonic()
    ended = ranks(train.main, [mine, [*mine, different]], lab)
    assert time.monotonic() - began < 60
    for one in ended:
        assert "rank 1 starts from the beginning with recipe and data" in sentence(one)
        assert "give every node the same recipe, shards and runs folder" in one.output


def test_a_rank_with_an_older_checkpoint_is_refused(lab, tmp_path):
    for number, steps in enumerate((2, 4)):
        trained(lab, tmp_path / str(number), f"train.max_steps={steps}")
    each = [arguments(tmp_path / str(number), "train.max_steps=6")[0] for number in range(2)]
    for one in ranks(train.main, each, lab):
        said = sentence(one)
        assert "rank 1 starts from checkpoint-00000004" in said and "rank 0 from checkpoint-00000002" in said


# ---------------------------------------------------------------------------------------------- what is recorded


def test_early_stopping_and_the_best_epoch(lab, tmp_path):
    words = ["train.epochs=12", "train.lr=0.6", "train.clip=null", "evaluate.metric=nll", "train.patience=2"]
    stopped = trained(lab, tmp_path / "stopped", *words, stage="pretrain")
    about = result(stopped)
    history, best = about["history"], about["best_epoch"]
    values = [record["val_nll"] for record in history]
    assert len(history) < 12 and about["step"] == 3 * len(history)  # it did stop
    assert best == len(history) - 3 == int(np.argmin(values)) and about["best"] == values[best]
    # The best weights are those that the run had at the end of that epoch.
    until = trained(lab, tmp_path / "until", *words, f"train.max_steps={3 * (best + 1)}", stage="pretrain")
    kept = load_file(stopped / "best.safetensors")
    assert len(kept) == 4
    for name, value in weights(until).items():
        assert torch.equal(value, kept[name.removeprefix("network.backbone.")]), name
    assert not torch.equal(weights(stopped)["network.backbone.0.weight"], kept["0.weight"])
    # Nothing is left to do, and a second start finds that out.
    assert done(run(train.main, *arguments(tmp_path / "stopped", *words, stage="pretrain"), folder=lab))
    assert len(result(stopped)["history"]) == len(history)


def test_tensorboard_holds_every_scalar(lab, tmp_path):
    words = [*PLAIN, "train.warmup_epochs=1", "train.losses.kd.weight={linear: {start: 1.0, end: 0.0}}"]
    folder = trained(lab, tmp_path, *words)
    found, stage = scalars(folder), load("tiny.yaml", words, "distill").stages["distill"]
    terms = {"loss", "cross_entropy", "kd"}
    rates = {"lr", "grad_norm", "logit_max", "examples_per_second", "data_wait"}
    compared = {"val_accuracy", "val_nll", "val_ece", "teacher_accuracy", "retention"}
    assert {f"train/{name}" for name in terms | rates | {"skipped", "failed", "weight/cross_entropy", "weight/kd"}} | {
        f"epoch/{name}" for name in terms | rates | compared | {"epoch", "step", "skipped"}
    } == set(found)
    assert list(found["train/loss"]) == [1, 2, 3, 4, 5, 6] and list(found["epoch/retention"]) == [3, 6]
    for step in range(6):
        at = {name: values[step + 1] for name, values in found.items() if name.startswith("train/")}
        assert at["train/lr"] == pytest.approx(train.learning_rate(step, stage, 3))
        # The schedule is applied: the weight falls from 1 to 0 over two epochs, within them too.
        assert at["train/weight/kd"] == pytest.approx(1 - step / 6) and at["train/weight/cross_entropy"] == 0.5
        weighed = 0.5 * at["train/cross_entropy"] + at["train/weight/kd"] * at["train/kd"]
        assert at["train/loss"] == pytest.approx(weighed, rel=1e-5)
        assert at["train/examples_per_second"] > 0 and 0 <= at["train/data_wait"] <= 1
        assert at["train/grad_norm"] > 0


def test_the_teacher_and_the_retention_are_recorded(lab, tmp_path):
    history = result(trained(lab, tmp_path))["history"]
    reported = json.loads((lab / "shards/tiny/val/teacher/manifest.json").read_text())["teacher_report"]["accuracy"]
    for record in history:
        assert record["teacher_accuracy"] == pytest.approx(reported) and reported > 0
        assert record["retention"] == pytest.approx(record["val_accuracy"] / reported)
        assert record["val_accuracy"] * VAL == pytest.approx(round(record["val_accuracy"] * VAL))


def test_the_learning_rate_warms_up_and_falls_along_a_cosine():
    stage = Stage(losses={}, epochs=4, batch_size=1, lr=0.1, warmup_epochs=1.5, min_lr=0.01)
    values = [train.learning_rate(step, stage, 10) for step in range(41)]
    assert values[:15] == pytest.approx([0.1 * (step + 1) / 15 for step in range(15)])
    assert values[15] == pytest.approx(0.1) and values[40] == pytest.approx(0.01)
    half = 15 + 25 / 2
    assert (train.learning_rate(int(half), stage, 10) + train.learning_rate(int(half) + 1, stage, 10)) / 2 == (
        pytest.approx(0.055)
    )
    assert all(later < earlier for earlier, later in zip(values[15:], values[16:], strict=False))


@pytest.mark.parametrize("factor", [1, 2])
def test_the_learning_rate_begins_again_after_each_cycle(factor):
    """SGDR's formula, counted from the end of the warm-up."""
    more = {"cycle_epochs": 2, "cycle_factor": factor}
    stage = Stage(losses={}, epochs=15, batch_size=1, lr=0.1, warmup_epochs=1, min_lr=0.01, **more)
    expected = [0.1 * (step + 1) / 10 for step in range(10)]
    for length in ([20] * 7 if factor == 1 else [20, 40, 80]):
        expected += [0.01 + 0.5 * (0.1 - 0.01) * (1 + math.cos(math.pi * step / length)) for step in range(length)]
    values = [train.learning_rate(step, stage, 10) for step in range(150)]
    assert len(expected) == 150 and values == pytest.approx(expected)
    assert sum(value == pytest.approx(0.1) for value in values) == 1 + (7 if factor == 1 else 3)


@pytest.mark.parametrize(("warmup", "steps"), [(0.4, 3), (0.5, 5), (0.1, 15), (1, 3)])
def test_the_learning_rate_never_passes_its_maximum(warmup, steps):
    stage = Stage(losses={}, epochs=2, batch_size=1, lr=0.1, warmup_epochs=warmup)
    assert max(train.learning_rate(step, stage, steps) for step in range(2 * steps)) <= 0.1


UNFREEZE = ["train.train_last=0", "train.unfreeze={1: 1, 2: null}", "train.epochs=3", "train.batch_size=8"]
UNFREEZE += ["student.model=tiny_model:blocky", "train.weight_decay=0.1", "train.gradient_checkpointing=true"]


def test_blocks_begin_to_learn_when_they_are_to(lab, tmp_path):
    """3 steps an epoch. Until then they are not decayed, have no moments, and their statistics rest."""
    whole = trained(lab, tmp_path / "whole", *UNFREEZE, "train.checkpoint_every=1")
    first = trained(lab, tmp_path / "first", *UNFREEZE, "train.max_steps=1", "train.lr=1e-30")
    parts, seen = tmp_path / "parts", [weights(first)]
    for steps in (3, 4, 6, 8, 9):  # stopped and resumed within epochs and between them
        folder = trained(lab, parts, *UNFREEZE, f"train.max_steps={steps}")
        seen.append(weights(folder))
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert state(whole)[file] == state(folder)[file], file

    def moved(one: dict, other: dict) -> set[str]:
        return {name.split(".")[2] for name, value in one.items() if not value.equal(other[name])}

    assert moved(seen[0], seen[1]) == {"5"} and moved(seen[1], seen[2]) == moved(seen[2], seen[3]) == {"2", "5"}
    assert moved(seen[3], seen[4]) == {"0", "1", "2", "5"}
    moments = load_file(next(folder.glob("checkpoint-*")) / "optimizer.safetensors")
    steps = [int(value) for name, value in moments.items() if name.endswith(".step")]
    assert sorted(steps) == [3] * 10 + [6] * 4 + [9] * 2
    static = trained(lab, tmp_path / "static", *UNFREEZE, "train.unfreeze={}", "train.max_steps=3")
    assert_same_weights(static, trained(lab, tmp_path / "a", *UNFREEZE, "train.max_steps=3"), 0, tensors=len(seen[0]))


def test_blocks_that_learn_later_train_on_two_processes_as_on_one(lab, tmp_path):
    words = [*UNFREEZE, "student.model=tiny_model:brittle", "student.options={norm: false, limit: 2.0}"]
    words += ["train.gradient_checkpointing=false", "train.accumulate=2", "train.ema=0.5"]
    one, two = (trained(lab, tmp_path / str(world), *words, world=world) for world in (1, 2))
    assert_same_weights(one, two, 2e-5, tensors=16)
    moments = load_file(next(two.glob("checkpoint-*")) / "optimizer.safetensors")
    steps = sorted(int(value) for name, value in moments.items() if name.endswith(".step"))
    assert steps == sorted([3] * 4 + [6] * 2 + [9] * 2)


def test_a_share_of_one_example_has_no_batch_statistics(lab, tmp_path):
    """BatchNorm refuses one value a channel in training; 21 pictures in steps of 20 leave one alone."""
    words = ["student.model=tiny_model:narrow", "train.batch_size=20", "train.epochs=1"]
    history = result(trained(lab, tmp_path, *words))["history"]
    assert [record["step"] for record in history] == [2]


def test_an_evaluation_counts_every_example_once_on_any_number_of_processes(lab, tmp_path):
    one = result(trained(lab, tmp_path / "one", *SGD))["history"]
    four = result(trained(lab, tmp_path / "four", *SGD, world=4))["history"]  # 9 examples: 2, 2, 2 and 3
    assert len(one) == 2
    for name in ("val_accuracy", "val_nll", "teacher_accuracy", "retention"):
        assert [record[name] for record in four] == pytest.approx([record[name] for record in one], rel=1e-5), name


# ---------------------------------------------------------------------------------------------- features and maps

TERMS = "{cross_entropy: {}, kd_pixel: {weight: 0.5, temperature: 4}, cosine: {weight: 0.3}, sp: {gather: %s}}"
ALL_TERMS = ["cross_entropy", "kd_pixel", "cosine", "sp"]


def prepare_scenes() -> None:
    journey.pack_recipe(load("scenes.yaml"))
    cache_teacher.main(["scenes.yaml"])


@pytest.fixture(scope="module")
def scene_lab(tmp_path_factory) -> Path:
    """The tiny segmentation experiment, packed and cached. Its networks have no BatchNorm."""
    folder = scenes(tmp_path_factory.mktemp("scenes"))
    done(run(prepare_scenes, folder=folder))
    return folder


def trained_on_scenes(lab: Path, runs: Path, *overrides: str, gather: str = "true", world: int = 1) -> Path:
    words = ["scenes.yaml", "--stage", "distill", f"runs={runs}", f"train.losses={TERMS % gather}", *SGD[2:]]
    each = [[*words, "train.batch_size=5", "train.epochs=3", *overrides]] * world
    for one in ranks(train.main, each, lab) if world > 1 else [run(train.main, *each, folder=lab)]:
        done(one)
    return runs / "scenes" / "distill" / "seed-0"


def test_projections_and_gathered_relations_train_on_two_processes_as_on_one(scene_lab, tmp_path):
    """10 examples in steps of 5, so the ranks have 3 and 2: all terms and all weights, the projections' too."""
    one = trained_on_scenes(scene_lab, tmp_path / "one")
    two = trained_on_scenes(scene_lab, tmp_path / "two", world=2)
    assert {name.split(".")[0] for name in weights(one)} == {"network", "projections"}
    assert len([name for name in weights(one) if name.startswith("projections")]) == 4
    assert_same_weights(one, two, 2e-5, tensors=10)
    for mine, other in zip(result(one)["history"], result(two)["history"], strict=True):
        assert [mine[name] for name in ALL_TERMS] == pytest.approx([other[name] for name in ALL_TERMS], rel=1e-4)
        assert mine["val_miou"] == pytest.approx(other["val_miou"], abs=1e-6)
    apart = trained_on_scenes(scene_lab, tmp_path / "apart", gather="false", world=2)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):  # each rank relates its own rows only
        assert_same_weights(one, apart, 2e-5, tensors=10)


def test_a_run_with_projections_resumes_bit_for_bit(scene_lab, tmp_path):
    whole = trained_on_scenes(scene_lab, tmp_path / "whole")
    trained_on_scenes(scene_lab, tmp_path / "parts", "train.max_steps=3")
    parts = trained_on_scenes(scene_lab, tmp_path / "parts")
    assert_same_weights(whole, parts, 0, tensors=10)


def test_every_term_is_printed_and_logged_and_the_examples_are_drawn(scene_lab, tmp_path):
    words = ["scenes.yaml", "--stage", "distill", f"runs={tmp_path}", "train.log_every=1"]
    ended = run(train.main, words, folder=scene_lab)
    done(ended)
    lines = [line for line in ended.stdout.splitlines() if line.startswith("distill, seed 0: epoch ")]
    assert len(lines) == 2
    for line in lines:
        assert all(f"{name} " in line for name in ("cross_entropy", "kd_pixel", "cosine", "val miou", "retention"))
    folder = tmp_path / "scenes" / "distill" / "seed-0"
    found = scalars(folder)
    assert {f"train/{name}" for name in ("cross_entropy", "kd_pixel", "cosine")} <= found.keys()
    assert {"epoch/val_miou", "epoch/val_iou/0", "epoch/val_iou/2", "epoch/teacher_miou"} <= found.keys()
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    drawn = events.Images("epoch/examples")
    assert len(drawn) == 2
    # Four columns of pictures 24 wide, or as wide as their titles, and four rows 16 high.
    assert drawn[0].width >= 4 * 24 and drawn[0].height >= 4 * 16


def test_losses_on_early_features_alone_train_on_two_processes_as_on_one(scene_lab, tmp_path):
    """Nothing above `low` has a gradient then, which DDP would stop at."""
    only = "train.losses={cosine: {features: [low]}, at: {features: [low]}}"
    one = trained_on_scenes(scene_lab, tmp_path / "one", only)
    two = trained_on_scenes(scene_lab, tmp_path / "two", only, world=2)
    assert_same_weights(one, two, 2e-5, tensors=8)


def test_taps_that_a_stage_does_not_read_are_no_part_of_it(scene_lab, tmp_path):
    """A baseline that was trained before there were features is still that baseline."""
    words = ["scenes.yaml", "--stage", "pretrain", f"runs={tmp_path}", "train.epochs=1"]
    for more in ([], ["student.taps={low: act}"], ["views.count=5"]):
        done(run(train.main, [*words, *more], folder=scene_lab))
    words = ["scenes.yaml", "--stage", "distill", f"runs={tmp_path}", "train.epochs=1"]
    done(run(train.main, words, folder=scene_lab))
    said = sentence(run(train.main, [*words, "student.taps={low: act, high: high}"], folder=scene_lab))
    assert "was made with features.low.student = 'low', the recipe says 'act'" in said
