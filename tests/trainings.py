"""A laboratory in which a stage of the tiny recipe is trained in real processes, and what such a run leaves behind."""

import json
from pathlib import Path

import torch
from processes import contents, done, ranks, run
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kd_dist import journey, train
from kd_dist.config import load

TRAIN, VAL = 21, 9  # examples
PLAIN = ["train.epochs=2", "train.batch_size=8", "train.log_every=1"]  # 3 steps of 8, 8 and 5 examples an epoch
SGD = [*PLAIN, "train.optimizer=sgd", "train.momentum=0", "train.clip=null", "train.weight_decay=0", "train.lr=0.5"]
TIMES = {"examples_per_second", "data_wait"}  # what two equal runs may differ in


def pack(*overrides: str) -> None:
    journey.pack_recipe(load("tiny.yaml", overrides))


def arguments(runs: Path, *overrides: str, stage: str = "distill") -> list[list[str]]:
    return [["tiny.yaml", "--stage", stage, f"runs={runs}", *overrides]]


def trained(lab: Path, runs: Path, *overrides: str, stage: str = "distill", world: int = 1, zero: int = 0) -> Path:
    """Train a stage to its end with so many processes, under DeepSpeed with `zero`; returns its folder."""
    each = arguments(runs, *overrides, stage=stage) * world
    ended = ranks(train.main, each, lab, **launched(zero)) if world > 1 else [run(train.main, *each, folder=lab)]
    for one in ended:
        done(one)
    return runs / "tiny" / stage / "seed-0"


def checkpoint_of(lab: Path, runs: Path, words: list[str], step: int, world: int, zero: int = 0) -> dict[str, bytes]:
    """The tensors of the checkpoint after so many steps."""
    if not step:
        step, words = 1, [*words, "train.lr=1e-30"]
    folder = trained(lab, runs, *words, f"train.max_steps={step}", world=world, zero=zero)
    [last] = folder.glob("checkpoint-*")
    return {path.name: path.read_bytes() for path in last.glob("*.safetensors")}


def launched(zero: int) -> dict[str, str]:
    """What a launcher sets for ZeRO stage `zero`; nothing for 0."""
    stage = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(zero)}
    return {**stage, "ACCELERATE_USE_CPU": "false"} if zero else {}


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of the newest checkpoint."""
    return load_file(max(folder.glob("checkpoint-*")) / "model.safetensors")


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """TensorBoard's scalars: tag -> step -> value."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: {one.step: one.value for one in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def state(folder: Path) -> dict:
    """All that a run leaves behind but for clock times."""
    [last] = folder.glob("checkpoint-*")
    record = json.loads((last / "state.json").read_text())
    del record["digest"]
    for one in record["progress"]["history"]:
        for name in TIMES:
            del one[name]
    return {"name": last.name, "state": record, "best": (folder / "best.safetensors").read_bytes()} | contents(
        last, "*.safetensors"
    )


def assert_same_weights(one: Path, other: Path, tolerance: float, tensors: int = 4) -> None:
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys() and len(mine) == tensors
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


def assert_scale_was_found(folder: Path, output: str) -> None:
    """A run in fp16 of 11 steps has skipped steps for its loss scale alone, and said so."""
    skipped = result(folder)["skipped"]
    assert skipped >= 1 and output.count("the loss scale falls to") == skipped
    assert scalars(folder)["train/loss_scale"][11] == 2.0 ** (16 - skipped)
    assert not (folder / "suspects.jsonl").exists() and result(folder)["streak"] == 0
    assert all(value.isfinite().all() for value in weights(folder).values())
