"""One process, DDP and ZeRO 1, 2, 3: the same training, the same checkpoints, the same refusal of a bad step."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from processes import done, ranks, run, sentence
from safetensors.torch import load_file
from torch import nn
from trainings import (
    PLAIN,
    arguments,
    assert_same_weights,
    assert_scale_was_found,
    checkpoint_of,
    launched,
    result,
    scalars,
    state,
    trained,
    weights,
)

from kd_dist import checkpoint, train
from kd_dist.checkpoint import Progress
from kd_dist.engine import Engine, _check_deepspeed, start
from kd_dist.errors import TrainingError
from kd_dist.models import Built, Network
from kd_dist.recipe import Stage
from kd_dist.stage import equipped
from kd_dist.step import go_back
from kd_dist.student import Student

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("home")]

ENGINES = {"one": (1, 0), "ddp": (2, 0), "zero1": (2, 1), "zero2": (2, 2), "zero3": (2, 3)}  # processes, ZeRO stage
LAUNCH = Path(__file__).parent.parent / "launch"
WIDE = "student.model=tiny_model:brittle"  # without BatchNorm, and with limit 2 it never breaks
SOUND = [*PLAIN, WIDE, "student.options={norm: false, limit: 2.0}", "train.accumulate=2"]


@pytest.fixture(scope="module")
def whole(lab, tmp_path_factory) -> dict[str, Path]:
    """The folder of an undisturbed run, by engine."""
    runs = tmp_path_factory.mktemp("whole")
    return {name: trained(lab, runs / name, *SOUND, world=world, zero=zero) for name, (world, zero) in ENGINES.items()}


def test_every_engine_trains_the_same_student(whole):
    assert len(weights(whole["one"])) == 8
    for name, folder in whole.items():
        assert_same_weights(whole["one"], folder, 2e-5, tensors=8)
        for mine, other in zip(result(whole["one"])["history"], result(folder)["history"], strict=True):
            for value in ("loss", "kd", "cross_entropy", "grad_norm", "val_nll", "val_accuracy", "lr"):
                assert other[value] == pytest.approx(mine[value], rel=2e-4), (name, value)


def test_the_moments_are_the_same_too_and_whole(whole):
    def moments(folder: Path) -> dict[str, torch.Tensor]:
        return load_file(next(folder.glob("checkpoint-*")) / "optimizer.safetensors")

    mine = moments(whole["one"])
    assert len(mine) == 8 * 3
    for name, folder in whole.items():
        other = moments(folder)
        assert other.keys() == mine.keys(), name
        for key, value in mine.items():
            torch.testing.assert_close(
                other[key], value, rtol=2e-3, atol=1e-6, msg=lambda text, n=(name, key): f"{n}: {text}"
            )


def test_the_best_weights_are_one_file_of_the_model_alone(whole):
    best = {name: load_file(folder / "best.safetensors") for name, folder in whole.items()}
    for name, one in best.items():
        assert one.keys() == best["one"].keys() and len(one) == 8, name
        for key, value in one.items():
            torch.testing.assert_close(value, best["one"][key], rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_launch_files_for_zero_train_it(lab, tmp_path, whole, stage):
    """Through the launcher itself, with two processes."""
    file = LAUNCH / f"zero{stage}.yaml"
    words = ["--config_file", str(file), "--num_processes", "2", "--main_process_port", "0", train.__file__]
    command = [sys.executable, "-m", "kd_dist.launch", *words, *arguments(tmp_path, *SOUND)[0]]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    ended = subprocess.run(command, cwd=lab, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    one, two = state(whole[f"zero{stage}"]), state(tmp_path / "tiny" / "distill" / "seed-0")
    for name in ("model.safetensors", "optimizer.safetensors", "best"):
        assert one[name] == two[name], name


@pytest.mark.parametrize("name", ENGINES)
def test_a_resumed_run_ends_bit_for_bit_like_a_whole_one(lab, tmp_path, whole, name):
    world, zero = ENGINES[name]
    trained(lab, tmp_path, *SOUND, "train.max_steps=4", "train.checkpoint_every=2", world=world, zero=zero)
    parts = trained(lab, tmp_path, *SOUND, world=world, zero=zero)
    one, two = state(whole[name]), state(parts)
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert one[file] == two[file], file


def test_a_run_goes_on_under_another_engine(lab, tmp_path, whole):
    """One process, ZeRO 3, DDP, ZeRO 1, each for some steps of one run."""
    for name, steps in (("one", 1), ("zero3", 2), ("ddp", 4), ("zero1", 5), ("zero2", 6)):
        world, zero = ENGINES[name]
        folder = trained(lab, tmp_path, *SOUND, f"train.max_steps={steps}", world=world, zero=zero)
    assert_same_weights(whole["one"], folder, 2e-5, tensors=8)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_run_with_an_idle_layer_goes_on_under_another_engine(lab, tmp_path, optimizer):
    """PyTorch's optimisers have no moments of a layer that gets no gradient, ZeRO's has."""
    words = [*PLAIN, "student.model=tiny_model:idle", f"train.optimizer={optimizer}"]
    alone = trained(lab, tmp_path / "alone", *words)
    for name, steps in (("one", 1), ("zero2", 2), ("ddp", 4), ("zero3", 5), ("one", 6)):
        world, zero = ENGINES[name]
        folder = trained(lab, tmp_path / "parts", *words, f"train.max_steps={steps}", world=world, zero=zero)
    mine, other = weights(alone), weights(folder)
    compared = [name for name in mine if ".idle." not in name]  # ZeRO decays it
    assert len(compared) == 4 and mine.keys() == other.keys()
    for name in compared:
        torch.testing.assert_close(other[name], mine[name], rtol=0, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")


# The first norm and the convolution rest, so no rank's statistics are another's; the head learns faster than the rest.
PART = [*PLAIN, WIDE, "student.options={limit: 2.0}", "train.accumulate=2", "train.train_last=2"]
PART += ["train.backbone_lr=0.3"]
RESTING = {f"network.backbone.0.{name}" for name in ("weight", "bias", "running_mean", "running_var")}
RESTING |= {"network.backbone.0.num_batches_tracked", "network.backbone.1.weight", "network.backbone.1.bias"}


@pytest.mark.parametrize("name", ENGINES)
def test_a_part_of_a_network_trains_alike_and_resumes_bit_for_bit(lab, tmp_path, name):
    world, zero = ENGINES[name]
    one = trained(lab, tmp_path / "one", *PART)
    first = trained(lab, tmp_path / "first", *PART, "train.max_steps=1", "train.lr=1e-30", "train.weight_decay=0")
    folder = trained(lab, tmp_path / "whole", *PART, world=world, zero=zero)
    assert_same_weights(one, folder, 2e-5, tensors=13)
    before, after = weights(first), weights(folder)
    assert {key for key, value in after.items() if value.equal(before[key])} == RESTING
    parts = tmp_path / "parts"
    trained(lab, parts, *PART, "train.max_steps=4", "train.checkpoint_every=2", world=world, zero=zero)
    resumed = state(trained(lab, parts, *PART, world=world, zero=zero))
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert state(folder)[file] == resumed[file], file


@pytest.mark.parametrize("student", ["bare", "idle"])
def test_students_of_unusual_parts_train_under_every_engine(lab, tmp_path, student):
    """No bias and no norm; a layer that gets no gradient."""
    words, losses = [*PLAIN, f"student.model=tiny_model:{student}"], {}
    folders = {
        name: trained(lab, tmp_path / name, *words, world=world, zero=zero) for name, (world, zero) in ENGINES.items()
    }
    for name, folder in folders.items():
        mine, other = weights(folders["one"]), weights(folder)
        assert len(mine) == {"bare": 2, "idle": 6}[student]
        for key, value in mine.items():
            if ".idle." not in key:  # ZeRO decays it, PyTorch's optimiser leaves it alone
                torch.testing.assert_close(other[key], value, rtol=0, atol=2e-5)
        losses[name] = result(folder)["history"][-1]["loss"]
    assert list(losses.values()) == pytest.approx([losses["one"]] * 5, rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_lower_precision_trains_as_under_ddp(lab, tmp_path, name, precision):
    words = [*SOUND, f"train.precision={precision}"]
    losses = []
    for one in ("ddp", name):
        world, zero = ENGINES[one]
        losses.append(scalars(trained(lab, tmp_path / one, *words, world=world, zero=zero))["train/loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


# ---------------------------------------------------------------------------------------------- how it is computed


def test_compiled_code_computes_the_same_and_is_made_for_any_size():
    """Taps and projections within one graph; batches of a second size are compiled for all."""
    from torch._dynamo.utils import counters

    def student() -> Student:
        torch.manual_seed(0)
        parts = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        built = Built(nn.Sequential(*parts, nn.Linear(16, 2)), (0.0,) * 3, (1.0,) * 3)
        return Student(Network(built, 2, None, "own:model"), {"f": "0"}, {"hint": {"f": 5}}, (8, 8)).train()

    accelerator = Accelerator(cpu=True)
    plain, compiled = (
        start(accelerator, one, torch.optim.SGD(one.parameters(), lr=0.1), "fp32", turn)
        for turn, one in enumerate((student(), student()))
    )
    made = []
    for rows in (6, 5, 4, 6):
        images = torch.randint(0, 256, (rows, 3, 8, 8), dtype=torch.uint8)
        for engine in (plain, compiled):
            output = engine.forward(images)
            engine.backward(output.logits.square().mean() + output.projected["hint"]["f"].square().mean(), 1.0)
        for mine, other in zip(plain.gradients(1.0), compiled.gradients(1.0), strict=True):
            torch.testing.assert_close(other, mine, rtol=1e-4, atol=1e-6)
        plain.step(), compiled.step()
        made.append(counters["stats"]["unique_graphs"])
    assert [one - made[0] for one in made] == [0, 1, 1, 1]
    assert plain.weights().keys() == compiled.weights().keys() and len(plain.weights()) == 11
    for name, value in plain.weights().items():
        torch.testing.assert_close(compiled.weights()[name], value, rtol=1e-4, atol=1e-6)


def test_channels_last_trains_the_same_and_resumes_bit_for_bit(lab, tmp_path):
    """Without dropout, whose masks follow the order in memory."""
    words = [*PLAIN, "student.model=tiny_model:normed", "train.ema=0.5"]
    plain, last = (trained(lab, tmp_path / one, *words, f"train.channels_last={one}") for one in ("false", "true"))
    assert_same_weights(plain, last, 2e-5, tensors=len(weights(plain)))
    words += ["train.channels_last=true"]
    trained(lab, tmp_path / "parts", *words, "train.max_steps=4")
    parts = trained(lab, tmp_path / "parts", *words)
    for file in ("model.safetensors", "optimizer.safetensors", "best"):
        assert state(last)[file] == state(parts)[file], file


def test_memory_lies_in_the_order_that_was_asked_for(tmp_path):
    stage = Stage(losses={}, epochs=1, batch_size=2, lr=0.1, channels_last=True)
    student = Student(Network(Built(nn.Conv2d(3, 4, 3), (0.0,) * 3, (1.0,) * 3), 4, None, "own:model", maps=True))
    equipped(student, stage, "distill")
    weight, seen = student.network.backbone.weight, []
    student.network.backbone.register_forward_hook(lambda module, inputs, output: seen.extend([inputs[0], output]))
    engine = Engine(Accelerator(cpu=True), student, torch.optim.AdamW(student.parameters()), None)
    for _ in range(2):
        engine.backward(engine.forward(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)).logits.sum(), 1.0)
        engine.step()
        checkpoint.save_weights(engine.weights(), tmp_path / "weights.safetensors")
        engine.load(load_file(tmp_path / "weights.safetensors"), copy.deepcopy(engine.moments()))
    moments = [one for one in engine.optimizer.state[weight].values() if one.ndim == 4]
    assert len(seen) == 4 and len(moments) == 2
    assert all(one.is_contiguous(memory_format=torch.channels_last) for one in (weight, *seen, *moments))


# ---------------------------------------------------------------------------------------------- a bad step

BREAKING = [*PLAIN, WIDE, "train.batch_size=2", "train.epochs=1", "views.brightness=0.2"]


CASES = [(name, where, "fp32") for name in ENGINES for where in ("forward", "backward")]
CASES += [
    ("ddp", "backward", "bf16"),
    ("zero2", "backward", "bf16"),
    ("one", "forward", "fp16"),
    ("zero3", "forward", "fp16"),
]
MORE = [
    (name, where, precision)
    for precision, places in (("bf16", ("forward", "backward")), ("fp16", ("forward",)))
    for name in ENGINES
    for where in places
]


@pytest.mark.parametrize(
    ("name", "where", "precision"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.nightly) for case in MORE if case not in CASES)],
)
def test_a_bad_step_leaves_everything_as_it_was(lab, tmp_path, name, where, precision):
    """A NaN of one picture, on one rank, in the forward or in the backward pass alone. The checkpoint after the step
    has the weights, the moments and the BatchNorm statistics of the one before."""
    world, zero = ENGINES[name]
    options = f"student.options={{where: {where}}}"
    words = [*BREAKING, options, f"train.precision={precision}"]
    each = arguments(tmp_path, *words) * world
    output = "".join(done(one) for one in (ranks(train.main, each, lab, **launched(zero))))
    folder = tmp_path / "tiny" / "distill" / "seed-0"
    about = result(folder)
    assert about["step"] == 11 and all(value.isfinite().all() for value in weights(folder).values())
    suspects = [json.loads(line) for line in (folder / "suspects.jsonl").read_text().splitlines()]
    [bad] = {one["step"] for one in suspects}
    assert {key for one in suspects for key in one["keys"]} >= {"red/00"} and len(suspects) == 1
    what = "loss, cross_entropy, kd" if where == "forward" else "the gradient of"
    assert suspects[0]["what"].startswith(what)
    assert f"step {bad} is skipped: {what}" in output and f"on rank {suspects[0]['rank']}; keys: " in output
    before, after = (checkpoint_of(lab, tmp_path / str(step), words, step, world, zero) for step in (bad, bad + 1))
    assert before.keys() == after.keys() == {"model.safetensors", "optimizer.safetensors"}
    for file, content in before.items():
        assert after[file] == content, file


@pytest.mark.parametrize("name", ["one", "ddp", "zero2"])
def test_a_gradient_beyond_fp16_lowers_the_loss_scale(lab, tmp_path, name):
    """Gradients of one picture are NaN, as they are where a scaled one overflows: no suspect, half the scale."""
    world, zero = ENGINES[name]
    words = [*BREAKING, "student.options={where: backward}", "train.precision=fp16"]
    output = "".join(done(one) for one in ranks(train.main, arguments(tmp_path, *words) * world, lab, **launched(zero)))
    assert_scale_was_found(tmp_path / "tiny" / "distill" / "seed-0", output)


# ---------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"zero_optimization": {"stage": 0}}, "zero_stage is 0; give 1, 2 or 3"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer to 'cpu' is not",
        ),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param to 'nvme' is not"),
        ({"zero_optimization": {"stage": 1}, "optimizer": {}}, "'optimizer' is the recipe's"),
        ({"zero_optimization": {"stage": 1}, "scheduler": {}}, "'scheduler' is the recipe's"),
        ({"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}, "remove 'bf16' .* `precision: bf16`"),
    ],
)
def test_settings_that_belong_elsewhere_are_refused(settings, said):
    with pytest.raises(TrainingError, match=f"^DeepSpeed: {said}"):
        _check_deepspeed(settings)


def test_synchronised_batch_norm_is_refused_where_there_is_none(lab, tmp_path):
    each = arguments(tmp_path, "train.sync_bn=true", "student.model=tiny_model:normed") * 2
    for one in ranks(train.main, each, lab):
        assert "stages.distill.sync_bn: PyTorch synchronises BatchNorm on GPUs only" in one.output and one.status == 1
    done(run(train.main, *arguments(tmp_path, "train.sync_bn=true", "train.max_steps=1"), folder=lab))


def test_batch_norm_is_synchronised_only_when_a_micro_batch_is_found(lab, tmp_path):
    """One rank that runs out of memory would leave the others waiting. Here the refusal tells when it is done."""
    words = ["train.sync_bn=true", "train.find_batch_size=true", "student.model=tiny_model:normed"]
    ended = ranks(train.main, arguments(tmp_path, *words) * 2, lab)
    assert [one.status for one in ended] == [1, 1]
    assert "accumulate: 1, micro-batches of up to 4 examples fit" in ended[0].stdout
    assert "stages.distill.sync_bn: PyTorch synchronises BatchNorm on GPUs only" in sentence(ended[0])


def test_weights_to_go_back_to_that_are_of_another_model_are_refused(tmp_path):
    """As a checkpoint may be that was exchanged while the run was on its way."""
    other, module = torch.nn.Linear(3, 2), torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(other.parameters())
    checkpoint.save(tmp_path, other.state_dict(), optimizer.state_dict(), Progress(step=3), {})
    made = Engine(Accelerator(cpu=True), module, torch.optim.AdamW(module.parameters()), None)
    with pytest.raises(TrainingError, match=f"^{tmp_path}/checkpoint-00000003: its weights are of another model"):
        go_back(SimpleNamespace(folder=tmp_path, identity={}, engine=made, average=None), Progress(step=20, streak=20))


def test_weights_of_another_model_are_refused(lab, tmp_path):
    folder = trained(lab, tmp_path, "train.max_steps=1")
    [last] = folder.glob("checkpoint-*")
    changed = tmp_path / "changed"
    shutil.copytree(lab, changed, ignore=shutil.ignore_patterns("said-*"))
    code = (changed / "tiny_model.py").read_text()
    (changed / "tiny_model.py").write_text(
        code.replace("nn.Linear(4 * width, classes),", "nn.Linear(4 * width, classes, bias=False),")
    )
    said = sentence(run(train.main, *arguments(tmp_path, "train.max_steps=2"), folder=changed))
    assert said.startswith(f"{last}: its weights are of another model than the recipe builds now")
