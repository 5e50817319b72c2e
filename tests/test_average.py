"""The average of the weights: its formula, what it is used for, that it comes back, and that it is one on all ranks."""

import json

import pytest
import torch
from accelerate import Accelerator
from processes import ranks, sentence
from safetensors.torch import load_file
from torch import nn
from trainings import PLAIN, arguments, launched, result, state, trained, weights

from kd_dist import train
from kd_dist.average import PREFIX, Average
from kd_dist.engine import Engine

ENGINES = {"one": (1, 0), "ddp": (2, 0), "zero3": (2, 3)}  # processes, ZeRO stage
WIDE = ["student.model=tiny_model:brittle", "student.options={norm: false, limit: 2.0}"]  # divided under ZeRO 3
# Everything beside the average that changes how fast a weight moves is an option of the same run.
ALL = [*PLAIN, *WIDE, "train.accumulate=2", "train.ema=0.6", "train.layer_decay=0.5", "train.cycle_epochs=0.8"]
ALL += ["evaluate.metric=nll"]


def test_the_average_is_that_of_the_formula():
    """Against float64, over many steps, with BatchNorm statistics and tied weights."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    module[2].weight = module[0].weight
    engine = Engine(Accelerator(cpu=True), module, torch.optim.SGD(module.parameters(), lr=0.01), None)
    average = Average(engine, 0.8)
    exact = {name: value.double() for name, value in module.state_dict().items()}
    for taken in range(1, 60):
        loss = module(torch.randn(8, 3)).square().mean()
        engine.backward(loss, 1.0)
        engine.step()
        average.follow(taken)
        decay = min(0.8, (1 + taken) / (10 + taken))
        for name, value in module.state_dict().items():
            exact[name] = decay * exact[name] + (1 - decay) * value.double()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    found = average.weights()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert found.keys() == {f"{PREFIX}{name}" for name in before} and len(found) == 9
    moved = 0
    for name, value in before.items():
        if value.is_floating_point():
            torch.testing.assert_close(found[f"{PREFIX}{name}"].double(), exact[name], rtol=2e-6, atol=1e-7)
            moved += (value - found[f"{PREFIX}{name}"]).abs().max().item() > 1e-4
        else:
            assert torch.equal(found[f"{PREFIX}{name}"], value)
    assert moved >= 6  # a bias before a norm has no gradient
    rest = average.load({**found, "other": before["0.bias"]})
    assert list(rest) == ["other"]
    with average.shown():
        assert all(torch.equal(value, found[f"{PREFIX}{name}"]) for name, value in module.state_dict().items())


@pytest.mark.slow
@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("name", ENGINES)
def test_the_average_is_one_on_every_engine_and_comes_back_bit_for_bit(lab, tmp_path_factory, name):
    runs = tmp_path_factory.getbasetemp() / "average"
    world, zero = ENGINES[name]
    one = runs / "one" / "tiny" / "distill" / "seed-0"
    if not one.exists():
        trained(lab, runs / "one", *ALL)
    trained(lab, runs / f"{name}-parts", *ALL, "train.max_steps=4", world=world, zero=zero)
    parts = trained(lab, runs / f"{name}-parts", *ALL, world=world, zero=zero)
    whole = one if name == "one" else trained(lab, runs / name, *ALL, world=world, zero=zero)
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert state(whole)[file] == state(parts)[file], file
    mine, other = weights(one), weights(whole)
    assert mine.keys() == other.keys() and len(mine) == 16
    for key, value in mine.items():
        torch.testing.assert_close(other[key], value, rtol=0, atol=2e-5, msg=lambda text, n=key: f"{n}: {text}")
    # What is evaluated and kept is the average: of the best epoch, which is the last here.
    best = load_file(whole / "best.safetensors")
    assert result(whole)["best_epoch"] == 1 and len(best) == 8
    for key, value in best.items():
        assert torch.equal(value, other[f"{PREFIX}network.backbone.{key}"]), key
        assert not torch.equal(value, other[f"network.backbone.{key}"]), key
    for ours, theirs in zip(result(one)["history"], result(whole)["history"], strict=True):
        assert theirs["val_nll"] == pytest.approx(ours["val_nll"], rel=2e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("home")
def test_a_step_that_is_skipped_leaves_the_average_as_it_was(lab, tmp_path):
    words = [*PLAIN, "student.model=tiny_model:brittle", "train.batch_size=2", "train.epochs=1", "train.ema=0.99"]
    words += ["views.brightness=0.2", "train.lr=1e-3"]
    folder = trained(lab, tmp_path / "whole", *words)
    [bad] = {json.loads(line)["step"] for line in (folder / "suspects.jsonl").read_text().splitlines()}
    numbers = (bad - 1, bad, bad + 1)
    early, one, two = (weights(trained(lab, tmp_path / str(n), *words, f"train.max_steps={n}")) for n in numbers)
    found = [name for name in one if name.startswith(PREFIX)]
    assert len(found) == 13 and result(folder)["skipped"] == 1
    assert all(torch.equal(one[name], two[name]) for name in found)
    assert any(not torch.equal(one[name], weights(folder)[name]) for name in found)
    decay = (1 + bad) / (10 + bad)  # of the last step that was taken, counted from 1
    for name in found:
        now = one[name.removeprefix(PREFIX)]
        if now.is_floating_point():
            torch.testing.assert_close(one[name], decay * early[name] + (1 - decay) * now, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.usefixtures("home")
def test_what_deepspeed_cannot_have_is_refused_in_a_sentence(lab, tmp_path):
    asked = {"unfreeze": ["train.train_last=0", "train.unfreeze={1: null}"]}
    asked |= {key: [f"train.{key}=true"] for key in ("compile", "channels_last")}
    for key, words in asked.items():
        [one] = ranks(train.main, arguments(tmp_path, *words), lab, **launched(2))
        said = sentence(one)
        assert said.startswith("DeepSpeed: ") and said.endswith(
            f"take `{key}` out of the stage, or launch without DeepSpeed"
        )
