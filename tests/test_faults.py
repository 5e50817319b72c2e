"""What befalls a training run, and what it does about it: kills, signals, bad steps, unreadable data, no room."""

import contextlib
import json
import os
import random
import secrets
import shutil
import signal
from pathlib import Path

import psutil
import pytest
import torch
from processes import done, ranks, run, sentence, start, start_ranks, wait_until
from safetensors.torch import load_file
from trainings import PLAIN, TRAIN, arguments, launched, result, scalars, state, trained, weights

from kd_dist import train
from kd_dist.disk import file_digest
from kd_dist.guard import LIMIT
from kd_dist.shards import Shard

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("home")]

SLOW = ["train.epochs=3", "train.accumulate=2", "student.model=tiny_model:slow", "train.batch_size=4"]  # 18 steps
SINGLE = [*PLAIN, "train.batch_size=1", "views.brightness=0.2"]  # 21 steps an epoch


def stage_folder(runs: Path) -> Path:
    return runs / "tiny" / "distill" / "seed-0"


# ---------------------------------------------------------------------------------------------- kills and signals


@pytest.fixture(scope="module")
def undisturbed(lab, tmp_path_factory) -> dict[int, Path]:
    """The folder of a run that nothing befalls, by its number of processes."""
    runs = tmp_path_factory.mktemp("undisturbed")
    return {world: trained(lab, runs / str(world), *SLOW, world=world) for world in (1, 2)}


def disturb(lab: Path, runs: Path, chance: random.Random, world: int) -> None:
    """Start the run and kill its last process, or ask it to stop, after a random time."""
    folder, before = stage_folder(runs), checkpoints(stage_folder(runs))
    each = arguments(runs, *SLOW, "train.checkpoint_every=1") * world
    *others, child = start_ranks(train.main, each, lab) if world > 1 else [start(train.main, *each, folder=lab)]
    number = chance.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1])
    turns = chance.randrange(1, 5)
    wait_until(lambda: len(checkpoints(folder) - before) > 0 or not child.process.is_alive(), "a checkpoint")
    child.process.join(chance.random() * turns * 0.02)
    with contextlib.suppress(ProcessLookupError):  # it is done
        os.kill(child.process.pid, number)
    ended = [one.wait() for one in (*others, child)]  # without the one that died, the others end as well
    if number != signal.SIGKILL and not (folder / "result.json").exists():
        assert all(one.status == 0 for one in ended), ended
        assert f"stopped by {number.name if world == 1 else 'a signal'}" in ended[0].stderr, ended


def checkpoints(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("checkpoint-*") if not path.name.endswith(".tmp")}


THOUSAND = pytest.param(1, 1000, marks=[pytest.mark.nightly, pytest.mark.timeout(7200)])


@pytest.mark.parametrize(("world", "rounds"), [(1, 25), (2, 5), THOUSAND])
def test_kills_at_random_moments_leave_no_trace(lab, tmp_path, undisturbed, world, rounds):
    """Each run is disturbed again and again until it is done, and ends bit for bit like one that never was."""
    chance, disturbances, runs = random.Random(4), 0, 0
    while disturbances < rounds:
        place = tmp_path / str(runs)
        while not (stage_folder(place) / "result.json").exists():
            disturb(lab, place, chance, world)
            disturbances += not (stage_folder(place) / "result.json").exists()
        one, two = state(undisturbed[world]), state(stage_folder(place))
        for name in ("name", "model.safetensors", "optimizer.safetensors", "best"):
            assert one[name] == two[name], name
        runs += 1
    assert disturbances >= rounds and runs >= 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("zero", [0, 2])
def test_a_signal_to_one_rank_saves_and_stops_all(lab, tmp_path, number, zero):
    words = [*SLOW, "student.options={seconds: 0.02}"]
    whole = trained(lab, tmp_path / "whole", *words, world=2, zero=zero)
    each = arguments(tmp_path / "parts", *words, "train.log_every=1") * 2
    started = start_ranks(train.main, each, lab, **launched(zero))
    folder = stage_folder(tmp_path / "parts")
    wait_until(lambda: bool(checkpoints(folder)), "the first checkpoint")
    os.kill(started[1].process.pid, number)
    ended = [one.wait() for one in started]
    assert [one.status for one in ended] == [0, 0]
    step = int(max(checkpoints(folder)).removeprefix("checkpoint-"))
    assert 6 <= step < 18 and not (folder / "result.json").exists()
    assert f"distill: stopped by a signal to another process after step {step}, which is saved; " in ended[0].stderr
    parts = trained(lab, tmp_path / "parts", *words, world=2, zero=zero)
    one, two = state(whole), state(parts)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert one[name] == two[name], name


@pytest.mark.parametrize(
    ("world", "number", "when"),
    [(1, signal.SIGTERM, "trains"), (1, signal.SIGTERM, "evaluates"), (2, signal.SIGTERM, "trains")],
)
def test_a_signal_to_every_process_of_a_run_with_loader_processes(lab, tmp_path, undisturbed, world, number, when):
    words = [*SLOW, "data.workers=2"]
    words += ["student.model=tiny_model:lingering"] if when == "evaluates" else ["train.checkpoint_every=1"]
    begun = lab / "evaluating" if when == "evaluates" else stage_folder(tmp_path) / "checkpoint-00000002"
    begun.unlink(missing_ok=True)
    each = arguments(tmp_path, *words) * world
    started = start_ranks(train.main, each, lab) if world > 1 else [start(train.main, *each, folder=lab)]
    wait_until(begun.exists, f"that a run {when}")
    loaders = [one for rank in started for one in psutil.Process(rank.process.pid).children(recursive=True)]
    assert len(loaders) == 2 * world
    for one in started:
        one.send(number)
    ended = [one.wait() for one in started]
    assert [one.status for one in ended] == [0] * world, ended
    assert f"distill: stopped by {number.name} after step " in ended[0].stderr
    assert "Traceback" not in "".join(one.output for one in ended)
    assert not any(one.is_running() for one in loaders)
    one, two = state(undisturbed[world]), state(trained(lab, tmp_path, *words, world=world))
    for name in ("name", "model.safetensors", "optimizer.safetensors"):
        assert one[name] == two[name], name


def test_a_rank_that_dies_ends_the_others_with_a_sentence(lab, tmp_path):
    started = start_ranks(train.main, arguments(tmp_path, *SLOW) * 2, lab)
    wait_until(lambda: bool(checkpoints(stage_folder(tmp_path))), "the first checkpoint")
    assert started[1].kill().status == -9
    said = sentence(started[0].wait())
    assert said.startswith("lost contact with the other processes")
    assert "goes on from" in done(run(train.main, *arguments(tmp_path, *SLOW), folder=lab))


def test_a_run_that_ends_before_its_checkpoint_keeps_the_best_weights_that_the_last_one_tells_of(lab, tmp_path):
    """The second epoch's weights are better and written, its checkpoint cannot be."""
    words = [*PLAIN, "evaluate.metric=nll"]
    whole = trained(lab, tmp_path / "whole", *words)
    assert result(whole)["best_epoch"] == 1
    folder = trained(lab, tmp_path, *words, "train.max_steps=3")
    first = file_digest(folder / "best.safetensors")
    (folder / "checkpoint-00000006.tmp").touch()
    assert "is in the way of a checkpoint" in sentence(run(train.main, *arguments(tmp_path, *words), folder=lab))
    state_file = folder / "checkpoint-00000003" / "state.json"
    assert json.loads(state_file.read_text())["progress"]["best_sha256"] == first
    assert file_digest(folder / "best.safetensors") == first
    assert file_digest(folder / "best-next.safetensors") == result(whole)["best_sha256"] != first
    (folder / "checkpoint-00000006.tmp").unlink()
    done(run(train.main, *arguments(tmp_path, *words), folder=lab))
    assert state(folder) == state(whole)
    assert [path.name for path in folder.glob("best*")] == ["best.safetensors"]


@pytest.mark.parametrize("fault", ["is damaged, its sha256 has changed", "is lost"])
def test_a_run_does_not_go_on_without_its_best_weights(lab, tmp_path, fault):
    best = trained(lab, tmp_path, *PLAIN, "train.max_steps=3") / "best.safetensors"
    content = best.read_bytes()
    best.unlink()
    if fault != "is lost":
        best.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for ended in ranks(train.main, arguments(tmp_path, *PLAIN) * 2, lab):
        assert sentence(ended) == f"{best}: {fault}; delete its folder and train the stage again"
    best.write_bytes(content)
    assert result(trained(lab, tmp_path, *PLAIN))["step"] == 6


# ---------------------------------------------------------------------------------------------- bad steps


def test_a_schedule_waits_for_a_skipped_step(lab, tmp_path):
    words = [*SINGLE, "train.epochs=1", "student.model=tiny_model:fragile"]
    found = scalars(trained(lab, tmp_path, *words))
    [skip] = [
        step for step in range(1, 1 + TRAIN) if found["train/skipped"][step] > found["train/skipped"].get(step - 1, 0)
    ]
    assert found["train/lr"][skip] == found["train/lr"][skip + 1] != found["train/lr"][skip + 2]


@pytest.mark.parametrize(("world", "zero"), [(1, 0), (2, 3)])
def test_steps_that_stay_bad_slow_the_run_down_take_it_back_and_end_it(lab, tmp_path, world, zero):
    words = [*PLAIN, "train.epochs=12", "student.model=tiny_model:fragile", "student.options={limit: 0.0}"]
    ended = ranks(train.main, arguments(tmp_path, *words) * world, lab, **launched(zero))[0]
    assert sentence(ended).startswith(f"step {3 * LIMIT - 1}: {3 * LIMIT} steps in a row were skipped, also at half")
    assert f"step {LIMIT - 1}: {LIMIT} steps in a row were skipped; the learning rate is halved" in ended.stderr
    assert f"step {2 * LIMIT - 1}: {2 * LIMIT} steps in a row were skipped; weights go back to " in ended.stderr
    assert len(checkpoints(stage_folder(tmp_path))) == 1
    assert not (stage_folder(tmp_path) / "result.json").exists()


@pytest.mark.parametrize(("world", "zero"), [(1, 0), (2, 0), (2, 1), (2, 2)])
def test_ruined_weights_go_back_to_the_last_checkpoint_and_training_goes_on(lab, tmp_path, world, zero):
    """In the first step of epoch 3 the weights become NaN, and with them every step from there on."""
    at = 7 + (world > 1 and not zero)  # DDP is told beforehand, by one pass, which gradients there will be
    words = [*PLAIN, "train.epochs=14", "student.model=tiny_model:doomed", f"student.options={{at: {at}}}"]
    each = arguments(tmp_path, *words) * world
    ended = ranks(train.main, each, lab, **launched(zero))
    folder = stage_folder(tmp_path)
    assert all(one.status == 0 for one in ended), ended
    assert "weights go back to" in ended[0].stderr and "checkpoint-00000006" in ended[0].stderr
    assert "no checkpoint, since" in ended[0].stderr
    about = result(folder)
    assert about["skipped"] == 2 * LIMIT and about["streak"] == 0 and about["lr_factor"] == 0.5
    assert about["history"][4]["loss"] is None and about["history"][-1]["loss"] > 0
    assert all(value.isfinite().all() for value in weights(folder).values())


def test_a_metric_that_is_not_finite_neither_ends_a_run_nor_is_its_best(lab, tmp_path):
    """Weights are ruined for some epochs; their nll is not finite."""
    words = [*PLAIN, "train.epochs=14", "student.model=tiny_model:doomed", "student.options={at: 7}"]
    folder = trained(lab, tmp_path, *words, "evaluate.metric=nll")
    history = result(folder)["history"]
    assert history[3]["val_nll"] is None
    assert result(folder)["best"] == min(one["val_nll"] for one in history if one["val_nll"] is not None)
    assert all(value.isfinite().all() for value in load_file(folder / "best.safetensors").values())


@pytest.mark.parametrize("student", [["doomed", "student.options={at: 1}"], ["steep"]])
def test_a_run_that_learned_nothing_is_no_result(lab, tmp_path, student):
    words = [*PLAIN, "train.epochs=1", f"student.model=tiny_model:{student[0]}", *student[1:]]
    said = sentence(run(train.main, *arguments(tmp_path, *words), folder=lab))
    assert said.startswith("stages.distill: ended with nothing to keep, since ")
    assert not (stage_folder(tmp_path) / "result.json").exists()


@pytest.mark.parametrize(("world", "zero"), [(1, 0), (2, 0), (2, 2)])
def test_no_step_is_skipped_in_silence(lab, tmp_path, world, zero):
    """Each gradient is finite, the norm of all is not."""
    words = [*PLAIN, "train.epochs=1", "student.model=tiny_model:steep"]
    ended = ranks(train.main, arguments(tmp_path, *words) * world, lab, **launched(zero))
    for step in range(3):
        assert f"step {step} is skipped: the gradient's norm not finite on rank 0; keys: " in ended[0].stderr
    suspects = [json.loads(line) for line in (stage_folder(tmp_path) / "suspects.jsonl").read_text().splitlines()]
    assert len(suspects) == 3 * world and sum(len(one["keys"]) for one in suspects) == TRAIN


def test_a_run_that_goes_on_in_another_precision_finds_its_scale_anew(lab, tmp_path):
    words = [*SINGLE, "student.model=tiny_model:brittle", "student.options={where: backward}", "train.epochs=1"]

    def go_on(steps: int, precision: str) -> tuple[str, dict]:
        each = arguments(tmp_path, *words, f"train.max_steps={steps}")
        said = done(start(train.main, *each, folder=lab, ACCELERATE_MIXED_PRECISION=precision).wait())
        last = max(stage_folder(tmp_path).glob("checkpoint-*"))
        return said, json.loads((last / "state.json").read_text())["progress"]

    _, begun = go_on(1, "fp16")
    assert begun["scale"] >= 2.0**15 and begun["precision"] == "fp16"
    said, exact = go_on(21, "no")
    assert "was trained in fp16 so far and goes on in fp32" in said
    assert (exact["scale"], exact["precision"]) == (1.0, "fp32")
    assert exact["skipped"] == 1 and ("the gradient of" in said or begun["skipped"])


def test_there_may_be_no_checkpoint_to_go_back_to(lab, tmp_path):
    words = [*SINGLE, "student.model=tiny_model:fragile", "student.options={limit: 0.0}"]
    said = sentence(run(train.main, *arguments(tmp_path, *words), folder=lab))
    assert f"{2 * LIMIT} steps in a row were skipped, and there is no checkpoint yet to go back to" in said


@pytest.mark.parametrize("world", [1, 2])
def test_a_spike_of_the_loss_is_skipped_where_that_is_asked_for(lab, tmp_path, world):
    words = [*SINGLE, "student.model=tiny_model:brittle", "student.options={where: huge}"]
    plain = scalars(trained(lab, tmp_path / "plain", *words, world=world))
    assert plain["train/skipped"][2 * TRAIN] == 0 and max(plain["train/loss"].values()) > 100
    each = arguments(tmp_path / "spike", *words, "train.spike=20") * world
    output = "".join(done(one) for one in ranks(train.main, each, lab))
    folder = stage_folder(tmp_path / "spike")
    said = [line for line in output.splitlines() if "is a spike, the median is" in line]
    assert 1 <= len(said) == result(folder)["skipped"] <= 2  # the picture may come before there is a median
    suspects = [json.loads(line) for line in (folder / "suspects.jsonl").read_text().splitlines()]
    assert {key for one in suspects for key in one["keys"]} == {"red/00"}


# ---------------------------------------------------------------------------------------------- data


def damaged(lab: Path, place: Path, key: str, split: str = "train") -> Path:
    """A copy of the laboratory in which one example of a split has a flipped byte."""
    shutil.copytree(lab, place, ignore=shutil.ignore_patterns("said-*"))
    for path in sorted((place / "shards/tiny" / split).glob("data-*.tar")):
        shard = Shard(path)
        if key in shard.keys:
            offset, _ = shard.member(shard.keys.index(key), "json")
            content = bytearray(path.read_bytes())
            content[offset] ^= 1
            path.write_bytes(content)
            return place
    raise AssertionError(f"no {key}")


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 3), (2, 3)])
def test_an_example_that_cannot_be_read_is_left_out_exactly(lab, tmp_path, world, accumulate):
    """The step's mean is over the examples that were read, on any number of processes."""
    place = damaged(lab, tmp_path / "lab", "red/03")
    words = [*PLAIN, "train.epochs=1", "train.optimizer=sgd", "train.momentum=0", "train.batch_size=21"]
    each = arguments(tmp_path / "runs", *words, "data.on_error=replace_masked")
    plain = run(train.main, *each, folder=place)
    assert "goes without an example" in done(plain) and "red/03" in plain.stderr
    assert result(stage_folder(tmp_path / "runs"))["failed"] == 1
    more = ["data.on_error=replace_masked", f"train.accumulate={accumulate}"]
    for one in ranks(train.main, arguments(tmp_path / "parts", *words, *more) * world, place):
        done(one)
    mine, other = (weights(stage_folder(tmp_path / name)) for name in ("runs", "parts"))
    for name, value in mine.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=2e-6)
    refused = sentence(run(train.main, *arguments(tmp_path / "raise", *words), folder=place))
    assert "red/03" in refused and "is damaged" in refused


def test_a_step_of_which_nothing_could_be_read_is_not_taken(lab, tmp_path):
    place = damaged(lab, tmp_path / "lab", "red/03")
    words = [*SINGLE, "train.epochs=1", "data.on_error=replace_masked"]
    folder = trained(place, tmp_path / "runs", *words)
    assert result(folder)["failed"] == result(folder)["skipped"] == 1 and result(folder)["streak"] == 0
    found = scalars(folder)["train/failed"]
    at = min(step for step, count in found.items() if count)
    before, after = (
        weights(trained(place, tmp_path / str(steps), *words, f"train.max_steps={steps}")) for steps in (at - 1, at)
    )
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_too_many_examples_that_cannot_be_read_end_the_run(lab, tmp_path):
    place = damaged(lab, tmp_path / "lab", "red/03")
    words = [*PLAIN, "data.on_error=replace_masked", "data.error_limit=1"]
    assert result(trained(place, tmp_path / "one", *words))["failed"] == 2  # one in each of two epochs
    twice = damaged(place, tmp_path / "twice", "blue/02")
    said = sentence(run(train.main, *arguments(tmp_path / "two", *words), folder=twice))
    assert said.startswith("2 examples of an epoch could not be read, more than data.error_limit 1; the last: ")


@pytest.mark.parametrize("world", [1, 2])
def test_too_many_examples_that_cannot_be_evaluated_end_the_run_on_every_rank(lab, tmp_path, world):
    """The first and the last example of the split: each of two ranks has one of them."""
    shards = [Shard(path) for path in sorted((lab / "shards/tiny/val").glob("data-*.tar"))]
    one, other = shards[0].key(0), shards[-1].key(len(shards[-1]) - 1)
    place = damaged(damaged(lab, tmp_path / "one", one, "val"), tmp_path / "lab", other, "val")
    words = [*PLAIN, "train.epochs=1", "data.on_error=replace_masked"]
    ended = ranks(train.main, arguments(tmp_path / "two", *words, "data.error_limit=2") * world, place)
    said = [line for line in "".join(map(done, ended)).splitlines() if line.startswith("warning: the metrics leave")]
    assert len(said) == 2  # of the cached teacher, which has no limit, and of the student
    assert all(line.startswith("warning: the metrics leave out 2 examples; the first: ") for line in said)
    for rank in ranks(train.main, arguments(tmp_path / "few", *words, "data.error_limit=1") * world, place):
        refused = sentence(rank)
        assert refused.startswith("2 examples failed, data.error_limit allows 1; the first: ")
        assert f"'{one}'" in refused or f"'{other}'" in refused


def test_a_shard_that_vanishes_or_changes_while_a_run_reads_it(lab, tmp_path):
    place = tmp_path / "lab"
    shutil.copytree(lab, place, ignore=shutil.ignore_patterns("said-*"))
    tars = sorted((place / "shards/tiny/train").glob("data-*.tar"))
    contents = {path: path.read_bytes() for path in tars}
    for fault in ("vanishes", "changes", "shrinks"):
        runs = tmp_path / fault
        child = start(train.main, *arguments(runs, *SLOW), folder=place)
        wait_until(lambda: bool(checkpoints(stage_folder(runs))), "the first checkpoint")  # noqa: B023
        for path in tars:
            if fault == "vanishes":
                path.unlink()
            elif fault == "changes":
                with open(path, "r+b") as file:
                    file.seek(600)
                    file.write(bytes(len(contents[path]) - 600))
            else:
                os.truncate(path, 1024)
        ended = child.wait()
        for path, content in contents.items():
            path.write_bytes(content)
        if fault == "vanishes":  # the open file is still there for whoever reads it
            assert ended.status == 0 and result(stage_folder(runs))["step"] == 18
        else:
            assert str(place / "shards/tiny/train").removeprefix(str(place) + "/") in sentence(ended)
        assert len(checkpoints(stage_folder(runs))) == 1


# ---------------------------------------------------------------------------------------------- no room


def test_memory_that_runs_out_says_what_to_change(lab, tmp_path):
    words = [*PLAIN, "student.model=tiny_model:hungry", "student.options={limit: 3}"]
    said = sentence(run(train.main, *arguments(tmp_path, *words), folder=lab))
    assert said.startswith("stages.distill: out of memory with 8 examples at a time (")
    assert "raise `accumulate`, now 1, or let `find_batch_size: true` do it" in said
    assert "`batch_size` 8 or views.size 8x8 smaller; the last checkpoint is untouched" in said


def test_the_largest_share_is_the_one_that_is_tried(lab, tmp_path):
    """6 examples on 2 ranks in 2 micro-batches: of 1 and 2 examples."""
    words = [*PLAIN, "train.batch_size=6", "train.accumulate=2", "train.find_batch_size=true"]
    each = arguments(tmp_path, *words, "student.model=tiny_model:hungry", "student.options={limit: 1}") * 2
    assert "accumulate: 6, micro-batches of up to 1 examples fit" in "".join(map(done, ranks(train.main, each, lab)))


@pytest.mark.parametrize(("world", "found"), [(1, 4), (2, 2)])
def test_a_micro_batch_that_fits_is_found_and_changes_no_result(lab, tmp_path, world, found):
    hungry = [*PLAIN, "student.model=tiny_model:hungry"]
    whole = trained(lab, tmp_path / "whole", *hungry, "student.options={limit: 8}", world=world)
    words = [*hungry, "student.options={limit: 3}", "train.find_batch_size=true"]
    ended = ranks(train.main, arguments(tmp_path / "found", *words) * world, lab)
    assert f"accumulate: {found}, micro-batches of up to 2 examples fit" in "".join(done(one) for one in ended)
    mine, other = weights(whole), weights(stage_folder(tmp_path / "found"))
    for name, value in mine.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=2e-4)
    none = [*hungry, "student.options={limit: 0}", "train.find_batch_size=true"]
    said = sentence(run(train.main, *arguments(tmp_path / "none", *none), folder=lab))
    assert said.startswith("stages.distill: not even 1 examples at a time fit into memory")


def without_chance(arguments: list[str]) -> None:
    """Train, with temporary names that are known before."""
    secrets.token_hex = lambda size: "0" * 2 * size
    train.main(arguments)


def test_a_full_disk_keeps_the_last_checkpoint(lab, tmp_path):
    """What the next checkpoint writes goes to a device that is always full."""
    words = [*PLAIN, "evaluate.metric=nll"]
    trained(lab, tmp_path, *words, "train.max_steps=3")
    folder = stage_folder(tmp_path)
    (folder / "best-next.safetensors.00000000.tmp").symlink_to("/dev/full")
    said = sentence(run(without_chance, *arguments(tmp_path, *words), folder=lab))
    assert said.startswith(f"{folder}/best-next.safetensors: No space left on device; make room or choose another")
    assert checkpoints(folder) == {"checkpoint-00000003"}
    done(run(train.main, *arguments(tmp_path, *words), folder=lab))
    assert result(folder)["step"] == 6
