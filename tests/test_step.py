"""One step: with SAM the gradient of the second pass, and nothing else of it; a bad one leaves everything as it was."""

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from processes import done, ranks, run, sentence
from trainings import (
    PLAIN,
    SGD,
    arguments,
    assert_same_weights,
    assert_scale_was_found,
    checkpoint_of,
    launched,
    result,
    scalars,
    trained,
    weights,
)

from kd_dist import train
from kd_dist.batch import Batch, TeacherSignal
from kd_dist.config import load
from kd_dist.step import with_teacher

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("home")]

# ---------------------------------------------------------------------------------------------- what SAM computes

RHO, LR, DECAY, CLIP, MOMENTUM = 0.5, 0.05, 0.1, 0.2, 0.9
COMMON = [f"train.lr={LR}", f"train.weight_decay={DECAY}", f"train.clip={CLIP}", f"train.momentum={MOMENTUM}"]


def plain_loop(to: Path, optimizer: str, overrides: list[str]) -> None:
    """Three steps of SAM in float64, from the paper and the optimisers' formulas; saves weights, losses and norms."""
    made = train.prepare(load("tiny.yaml", overrides, "distill"), "distill")
    stream, student = train.read_ahead(made, 0), copy.deepcopy(made.student).double()
    values, state, losses, norms = dict(student.named_parameters()), {}, [], []

    def gradient(batch: Batch) -> tuple[float, list[torch.Tensor]]:
        logits = student(batch.images.double() / 255).logits
        p = torch.softmax(batch.signals.logits.double() / 4, dim=1)
        soft = 16 * (p * (p.log() - torch.log_softmax(logits / 4, dim=1))).sum(dim=1)
        loss = (0.5 * F.cross_entropy(logits, batch.targets, reduction="none") + 0.5 * soft).mean()
        return loss.item(), torch.autograd.grad(loss, list(values.values()))

    def norm(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([part.flatten() for part in parts]).norm()

    for step in range(3):
        batch, _ = next(stream)
        loss, first = gradient(batch)
        at = {name: value.detach().clone() for name, value in values.items()}
        with torch.no_grad():
            for value, part in zip(values.values(), first, strict=True):
                value += RHO * part / norm(first)
        _, second = gradient(batch)
        losses.append(loss)
        norms.append(norm(second).item())
        lr = LR * 0.5 * (1 + math.cos(math.pi * step / 6))
        with torch.no_grad():
            for (name, value), part in zip(values.items(), second, strict=True):
                value.copy_(at[name])
                part, decay = part * min(1, CLIP / norms[-1]), DECAY if value.ndim > 1 else 0
                if optimizer == "sgd":
                    state[name] = MOMENTUM * state.get(name, 0) + part + decay * value
                    value -= lr * state[name]
                    continue
                m, v = state.get(name, (0, 0))
                state[name] = m, v = 0.9 * m + 0.1 * part, 0.999 * v + 0.001 * part**2
                value *= 1 - lr * decay
                value -= lr * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
    torch.save(({name: value.detach() for name, value in values.items()}, losses, norms), to)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_three_steps_of_sam_equal_a_plain_loop(lab, tmp_path, optimizer):
    words = [*PLAIN, *COMMON, f"train.optimizer={optimizer}", "train.max_steps=3", "train.spike=9"]
    done(run(plain_loop, tmp_path / "plain", optimizer, [*words, f"runs={tmp_path / 'plain-runs'}"], folder=lab))
    wanted, losses, norms = torch.load(tmp_path / "plain", weights_only=True)
    assert min(norms) > CLIP  # each step was clipped, by the norm of its second gradient
    folder, without = (trained(lab, tmp_path / str(rho), *words, f"train.sam={rho}") for rho in (RHO, "null"))
    found, seen = weights(folder), scalars(folder)
    assert found.keys() == wanted.keys() and len(found) == 4
    for name, value in found.items():
        torch.testing.assert_close(value.double(), wanted[name], rtol=1e-5, atol=2e-6)
        assert (weights(without)[name] - value).abs().max() > 1e-4, name  # SAM does change something
    assert list(seen["train/loss"].values()) == pytest.approx(losses, rel=1e-5)  # of the first pass
    assert result(folder)["recent"] == pytest.approx(losses, rel=1e-5)  # what spikes are measured by
    assert list(seen["train/grad_norm"].values()) == pytest.approx(norms, rel=1e-4)  # of the second


def test_sam_is_the_same_for_every_topology(lab, tmp_path):
    """Micro-batches, processes, both: the way up is that of the whole step's gradient."""
    words, tags = [*SGD, f"train.sam={RHO}"], ("train/loss", "train/grad_norm", "epoch/val_nll")
    alone = trained(lab, tmp_path / "alone", *words)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        assert_same_weights(alone, trained(lab, tmp_path / "without", *SGD), 1e-3)
    for world, accumulate in ((1, 4), (2, 1), (2, 2)):
        other = trained(lab, tmp_path / f"{world}-{accumulate}", *words, f"train.accumulate={accumulate}", world=world)
        assert_same_weights(alone, other, 2e-6)
        for tag in tags:
            assert scalars(other)[tag] == pytest.approx(scalars(alone)[tag], rel=2e-5, abs=3e-6), (tag, other)


@pytest.mark.parametrize("student", ["dropping", "narrow"])
def test_the_second_pass_is_the_first_once_more(lab, tmp_path, student):
    """Where the way up is next to nothing, so is what SAM changes: unless dropout leaves out something else, or a share
    of a single example, the last of 21 in steps of 6, is normalised by other statistics."""
    words = [*SGD, f"student.model=tiny_model:{student}", "train.accumulate=2", "train.batch_size=6", "train.lr=0.1"]
    plain, second = (trained(lab, tmp_path / rho, *words, f"train.sam={rho}") for rho in ("null", "1e-9"))
    assert_same_weights(plain, second, 1e-5, tensors=len(weights(plain)))


def test_batch_norm_statistics_move_in_the_first_pass_only(lab, tmp_path):
    words = [*SGD, "student.model=tiny_model:narrow", "train.accumulate=2", "train.max_steps=1"]
    plain, sam = (weights(trained(lab, tmp_path / rho, *words, f"train.sam={rho}")) for rho in ("null", "0.5"))
    buffers = [name for name in plain if "running" in name or "tracked" in name]
    assert len(buffers) == 3 and sam["network.backbone.4.num_batches_tracked"] == 2
    for name, value in plain.items():
        assert torch.equal(sam[name], value) == (name in buffers), name


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_sam_in_lower_precision_trains_close_to_fp32(lab, tmp_path, precision):
    words = [*SGD, "train.epochs=6", "train.sam=0.1"]
    exact, found = (
        scalars(trained(lab, tmp_path / one, *words, f"train.precision={one}"))["train/loss"]
        for one in ("fp32", precision)
    )
    assert found != exact and found[18] == pytest.approx(exact[18], rel=0.05)


# ---------------------------------------------------------------------------------------------- an online teacher


def test_sam_with_an_online_teacher_trains_as_with_the_cache(lab, tmp_path):
    best = lab / "runs" / "tiny" / "teacher" / "seed-0" / "best.safetensors"
    words = [*SGD, "train.sam=0.1", f"teacher.weights={best}"]
    cached, online = (trained(lab, tmp_path / one, *words, f"train.teacher={one}") for one in ("cached", "online"))
    assert scalars(online)["train/loss"] == pytest.approx(scalars(cached)["train/loss"], rel=1e-3)


def test_a_teacher_speaks_once_of_a_batch():
    said = []

    def teacher(images: torch.Tensor) -> TeacherSignal:
        said.append(len(images))
        return TeacherSignal(torch.zeros(len(images), 3), {})

    valid = torch.ones(2, dtype=torch.bool)
    batch = Batch(("a", "b"), torch.zeros(2, 3, 4, 4), torch.zeros(2), None, valid, 2, None)
    made = SimpleNamespace(teacher=teacher)
    first = with_teacher(made, batch)
    assert with_teacher(made, first) is first and said == [2]
    assert with_teacher(SimpleNamespace(teacher=None), batch) is batch


# ---------------------------------------------------------------------------------------------- a bad step

BREAKING = [*PLAIN, "train.batch_size=2", "train.epochs=1", "views.brightness=0.2", "train.lr=1e-3", "train.sam=2"]
CASES = [("brittle", "forward"), ("brittle", "backward"), ("cliff", "forward"), ("cliff", "backward")]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("student", "where"), CASES)
def test_a_bad_first_or_second_pass_leaves_everything_as_it_was(lab, tmp_path, student, where, world):
    """`cliff` breaks up the slope alone, in the second pass."""
    words = [*BREAKING, f"student.model=tiny_model:{student}", f"student.options={{where: {where}}}"]
    output = "".join(done(one) for one in ranks(train.main, arguments(tmp_path, *words) * world, lab))
    folder = tmp_path / "tiny" / "distill" / "seed-0"
    about, found = result(folder), weights(folder)
    assert (about["step"], about["skipped"]) == (11, 1) and all(value.isfinite().all() for value in found.values())
    [suspect] = [json.loads(line) for line in (folder / "suspects.jsonl").read_text().splitlines()]
    what = "loss, cross_entropy, kd" if where == "forward" else "the gradient of"
    assert suspect["what"].startswith(what) and "red/00" in suspect["keys"]
    assert f"step {suspect['step']} is skipped: {what}" in output
    before, after = (
        checkpoint_of(lab, tmp_path / str(turn), words, suspect["step"] + turn, world) for turn in range(2)
    )
    assert before.keys() == after.keys() == {"model.safetensors", "optimizer.safetensors"}
    for file, content in before.items():
        assert after[file] == content, file


@pytest.mark.parametrize("world", [1, 2])
def test_a_second_gradient_beyond_fp16_lowers_the_loss_scale(lab, tmp_path, world):
    words = [*BREAKING, "student.model=tiny_model:cliff", "student.options={where: backward}", "train.precision=fp16"]
    output = "".join(done(one) for one in ranks(train.main, arguments(tmp_path, *words) * world, lab))
    assert_scale_was_found(tmp_path / "tiny" / "distill" / "seed-0", output)


@pytest.mark.parametrize("zero", [1, 3])
def test_sam_is_refused_under_deepspeed(lab, tmp_path, zero):
    for one in ranks(train.main, arguments(tmp_path, "train.sam=0.05") * 2, lab, **launched(zero)):
        said = sentence(one)
        assert said.startswith("DeepSpeed: divides weights and gradients among the ranks and keeps float32 copies of")
        assert said.endswith("take `sam` out of the stage, or launch without DeepSpeed")
    assert not list(tmp_path.rglob("checkpoint-*"))
