"""Save and resume. A checkpoint is a folder that is complete or not there: safetensors for tensors, JSON for the rest.

`checkpoint-00000120/{model,optimizer}.safetensors, state.json`. The folder is written under another name, flushed,
and renamed; older ones go only after that. Nothing is pickled.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialized
from torch import nn

from kd_dist.errors import TrainingError
from kd_dist.manifest import first_difference
from kd_dist.shards import published

VERSION = 1
PREFIX = "checkpoint-"


@dataclass
class Progress:
    """Everything that changes while a stage trains, beside weights and optimiser."""

    step: int = 0  # optimiser steps taken or skipped: the cursor into the plan
    skipped: int = 0  # of them, steps skipped for a non-finite gradient
    streak: int = 0  # non-finite steps in a row, up to now
    best: float | None = None  # best validation metric
    best_epoch: int = -1
    history: list[dict[str, Any]] = field(default_factory=list)  # one record an epoch


def write_atomic(path: Path, text: str) -> None:
    """Replace a small text file so that a reader sees the old or the new one, whole."""
    with published(path) as file:
        file.write(text.encode())


def save_weights(module: nn.Module, path: Path) -> None:
    """The module's state as one safetensors file, replaced atomically."""
    # Each a copy of its own: safetensors refuses tensors that share memory, as tied weights do.
    copies = {name: value.detach().cpu().clone().contiguous() for name, value in module.state_dict().items()}
    with published(path) as file:
        file.write(serialized(copies))  # not save_file: on a full disk it raises no OSError


def save(
    folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any, progress: Progress, identity: dict
) -> None:
    """Write a checkpoint for `progress.step`, make it durable, then delete the older ones."""
    final = folder / f"{PREFIX}{progress.step:08d}"
    temporary = folder / f"{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_weights(module, temporary / "model.safetensors")
    state = optimizer.state_dict()
    tensors = {f"{number}.{name}": value for number, one in state["state"].items() for name, value in one.items()}
    copies = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    (temporary / "optimizer.safetensors").write_bytes(serialized(copies))
    record = {
        "version": VERSION,
        "identity": identity,
        "progress": asdict(progress),
        "optimizer": {"groups": state["param_groups"]},
        "scaler": None if scaler is None else scaler.state_dict(),
    }
    (temporary / "state.json").write_text(json.dumps(record, sort_keys=True, indent=1))
    for path in (*temporary.iterdir(), temporary):
        _flush(path)
    if final.exists():  # the same step again, after a resume that took no step
        shutil.rmtree(final)
    os.rename(temporary, final)
    _flush(folder)
    for old in sorted(folder.glob(f"{PREFIX}*")):
        if old != final:
            shutil.rmtree(old)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint of a stage, if there is one."""
    complete = [path for path in folder.glob(f"{PREFIX}*") if not path.name.endswith(".tmp")]
    return max(complete, default=None)


def load(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any, identity: dict) -> Progress:
    """Restore all that `save` wrote. Raises TrainingError for a torn, foreign or future checkpoint and for weights of
    another model."""
    try:
        record = json.loads((path / "state.json").read_text())
        weights = load_file(path / "model.safetensors")
        tensors = load_file(path / "optimizer.safetensors")
    except (OSError, ValueError, KeyError, RecursionError, SafetensorError) as error:
        raise TrainingError(f"{path}: cannot be read ({error}); delete it to start the stage again") from error
    if record.get("version") != VERSION:
        raise TrainingError(
            f"{path}: has version {record.get('version')}, this kd_dist reads {VERSION}; upgrade kd_dist"
        )
    refuse_other_run(path, record["identity"], identity)
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise TrainingError(
            f"{path}: its weights are of another model than the recipe builds now ({' '.join(str(error).split())}); "
            f"restore the model's code, or delete the folder"
        ) from error
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        number, key = name.split(".", 1)
        state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": record["optimizer"]["groups"]})
    if scaler is not None and record["scaler"] is not None:
        scaler.load_state_dict(record["scaler"])
    return Progress(**record["progress"])


def refuse_other_run(path: Path, there: dict, here: dict) -> None:
    """Raise a TrainingError that names the first value in which a finished or begun run and the recipe differ."""
    difference = first_difference(here, there)
    if difference is not None:
        place, ours, theirs = difference
        raise TrainingError(
            f"{path}: was made with {place} = {theirs!r}, the recipe says {ours!r}; restore the recipe, "
            f"train it as a stage of another name, or delete the folder"
        )


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
