"""Save and resume. A checkpoint is a folder that is complete or not there: safetensors for tensors, JSON for the rest.

`checkpoint-00000120/{model,optimizer}.safetensors, state.json`. The folder is written under another name, flushed,
and renamed; older ones go only after that. Nothing is pickled.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialized
from safetensors.torch import save as serialized
from torch import Tensor

from kd_dist.choose import fits
from kd_dist.disk import file_digest, published, sync
from kd_dist.errors import TrainingError
from kd_dist.manifest import digest, first_difference

VERSION = 2  # 1 had no digests
DIGESTS = ("examples", "signals", "start")  # parts of a stage's identity that are digests of files
FOLDER, UNFINISHED = re.compile(r"checkpoint-\d{8}"), re.compile(r"checkpoint-\d{8}\.tmp")  # other names are not ours
BEST, RESULT = "best.safetensors", "result.json"  # of a stage: its best weights, and what it ended with, once it has
WEIGHTS, MOMENTS, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
_AGAIN = "delete the folder to start the stage again"
# What the options of an optimiser's group are; those that are not listed are plain values too.
_OPTIONS = {"params": list[int], "betas": tuple[float, float]}


@dataclass
class Progress:
    """Everything that changes while a stage trains, beside weights and optimiser."""

    step: int = 0  # optimiser steps taken or skipped: the cursor into the plan
    skipped: int = 0  # of them, steps that were skipped
    streak: int = 0  # skipped steps in a row, up to now
    failed: int = 0  # examples that could not be read, each as often as it was tried
    failed_now: int = 0  # of them, those of the present epoch
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    scale: float = 1.0  # of the loss; fp16 alone has another
    calm: int = 0  # steps taken since the scale fell
    lr_factor: float = 1.0  # by which the guard has lowered the learning rate
    recent: list[float] = field(default_factory=list)  # losses of the steps taken last, where spikes are looked for
    best: float | None = None  # best validation metric
    best_epoch: int = -1
    best_sha256: str | None = None  # of the file of best weights; None before there is one, and where it was not noted
    so_far: dict | None = None  # what the meter of an epoch holds that is not over
    history: list[dict] = field(default_factory=list)  # one record an epoch


def write_atomic(path: Path, text: str) -> None:
    """Replace a small text file so that a reader sees the old or the new one, whole."""
    with published(path) as file:
        file.write(text.encode())


def read_record(path: Path, *names: str) -> dict[str, Any]:
    """The JSON object that `write_atomic` has written, with these names in it. Raises TrainingError when it is none."""
    try:
        record = json.loads(path.read_bytes())
        missing = [name for name in names if name not in record]
    except (ValueError, RecursionError, TypeError) as error:
        raise TrainingError(f"{path}: is damaged ({error}); delete it and run the same command again") from error
    if missing or not isinstance(record, dict):
        raise TrainingError(f"{path}: is damaged (no {missing or 'object'}); delete it and run the same command again")
    return record


def save_weights(weights: Mapping[str, Tensor], path: Path) -> str:
    """Weights by name as one safetensors file, replaced atomically; returns its sha256."""
    payload = _serialized(weights)
    with published(path) as file:
        file.write(payload)  # not save_file: on a full disk it raises no OSError
    return hashlib.sha256(payload).hexdigest()


def save_best(weights: Mapping[str, Tensor], best: Path) -> str:
    """Write better weights beside those at `best`, whose place they take by `settle_best`; returns their sha256.

    A run that is killed before its next checkpoint goes on from one that tells of the older weights, and need not find
    the better ones again: on other processes the metric may differ in its last bits.
    """
    return save_weights(weights, _waiting(best))


def settle_best(best: Path, sha256: str | None) -> None:
    """Put the weights of `save_best` at `best` when they are those that a durable checkpoint tells of, else delete
    them."""
    waiting = _waiting(best)
    if waiting.is_file():
        if file_digest(waiting) == sha256:
            os.replace(waiting, best)
        else:
            waiting.unlink()
        sync(best.parent)


def best_digest(best: Path, sha256: str | None) -> str:
    """The sha256 of a stage's best weights. Raises TrainingError when they are lost, or not those of `sha256`; None is
    what runs have that did not note it."""
    if not best.is_file():
        raise TrainingError(f"{best}: is lost; delete its folder and train the stage again")
    found = file_digest(best)
    if sha256 not in (None, found):
        raise TrainingError(f"{best}: is damaged, its sha256 has changed; delete its folder and train the stage again")
    return found


def _waiting(best: Path) -> Path:
    return best.with_stem(f"{best.stem}-next")


def _serialized(tensors: Mapping[str, Tensor]) -> bytes:
    # Each a copy of its own: safetensors refuses tensors that share memory, as tied weights do.
    return serialized({name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()})


def save(
    folder: Path, weights: Mapping[str, Tensor], moments: Mapping[str, Any], progress: Progress, identity: dict
) -> None:
    """Write a checkpoint for `progress.step`, make it durable, then delete the older ones.

    `weights` by name, and `moments` as an optimiser's `state_dict()`. A checkpoint of the same step is kept: it is what
    the run went on from, and no step has been made since.
    """
    final = folder / f"checkpoint-{progress.step:08d}"
    if final.is_dir():
        return
    temporary = folder / f"{final.name}.tmp"
    for path in (final, temporary):
        if path.is_file():
            raise TrainingError(f"{path}: is in the way of a checkpoint; move it away and run the same command again")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _write(temporary, weights, moments, progress, identity)
        os.rename(temporary, final)
        sync(folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)  # it may be what fills the disk
        if isinstance(error, OSError):  # of a full disk, write() does not say which
            error.filename = error.filename or str(final)
        raise
    keep_only(final)


def _write(
    folder: Path, weights: Mapping[str, Tensor], moments: Mapping[str, Any], progress: Progress, identity: dict
) -> None:
    """The files of a checkpoint in a new folder, durable."""
    folder.mkdir(parents=True)
    states = {
        f"{number}.{name}": value
        for number, one in moments["state"].items()
        for name, value in one.items()
        if torch.is_tensor(value)
    }
    payloads = {WEIGHTS: _serialized(weights), MOMENTS: _serialized(states)}
    for name, payload in payloads.items():
        (folder / name).write_bytes(payload)
    record = {
        "version": VERSION,
        "identity": identity,
        "progress": asdict(progress),
        "optimizer": {"groups": moments["param_groups"]},
        "sha256": {name: hashlib.sha256(payload).hexdigest() for name, payload in payloads.items()},
    }
    signed = {**record, "digest": digest(record)}
    (folder / STATE).write_text(json.dumps(signed, sort_keys=True, indent=1, allow_nan=False))
    for path in (*folder.iterdir(), folder):
        sync(path)


def keep_only(path: Path) -> None:
    """Delete the checkpoints, and the unfinished ones, beside the one at `path`; what else lies there is the user's."""
    for other in [*_folders(path.parent, FOLDER), *_folders(path.parent, UNFINISHED)]:
        if other != path:
            shutil.rmtree(other)


def _folders(folder: Path, name: re.Pattern[str]) -> list[Path]:
    return sorted(path for path in folder.glob("checkpoint-*") if name.fullmatch(path.name) and path.is_dir())


def unsound(weights: Mapping[str, Tensor]) -> str | None:
    """The name of a weight that is not finite, which nobody should go on from; None when all are."""
    return next((name for name, value in weights.items() if not torch.isfinite(value).all()), None)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint of a stage, if there is one."""
    return max(_folders(folder, FOLDER), default=None)


def load(path: Path, identity: dict) -> tuple[dict[str, Tensor], dict[str, Any], Progress]:
    """What `save` wrote: weights, moments, progress. Raises TrainingError for a torn, damaged, foreign or future
    checkpoint."""
    try:
        record = json.loads((path / STATE).read_bytes())
        version, signature = record["version"], record.pop("digest", None)
        actual = digest(record)
    except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise TrainingError(f"{path}: {STATE} cannot be read ({type(error).__name__}: {error}); {_AGAIN}") from error
    if version != VERSION:
        raise TrainingError(
            f"{path}: has version {version}, this kd_dist reads {VERSION}; use the kd_dist that wrote it"
        )
    if actual != signature:
        raise TrainingError(f"{path}: {STATE} is damaged, its own digest differs; {_AGAIN}")
    try:
        refuse_other_run(path, record["identity"], identity)
        weights, states = (_checked(path / name, record["sha256"][name]) for name in (WEIGHTS, MOMENTS))
        progress, groups = _progress(record["progress"], path), _groups(record["optimizer"]["groups"])
        state: dict[int, dict[str, Any]] = {}
        for name, value in states.items():
            number, key = name.split(".", 1)
            state.setdefault(int(number), {})[key] = value
        if not state.keys() <= {number for group in groups for number in group["params"]}:
            raise ValueError("moments of parameters that no group has")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise TrainingError(f"{path}: cannot be read ({type(error).__name__}: {error}); {_AGAIN}") from error
    return weights, {"state": state, "param_groups": groups}, progress


def _progress(written: dict[str, Any], path: Path) -> Progress:
    """The progress that a record holds. TypeError, ValueError: it is none, or not of the step that `path` names."""
    progress, hints = Progress(**written), get_type_hints(Progress)
    for name, value in vars(progress).items():
        if not fits(value, hints[name]) or (isinstance(value, int) and value < -1):
            raise ValueError(f"{name} = {value!r}")
    for name in ("scale", "lr_factor"):
        if not getattr(progress, name) > 0:
            raise ValueError(f"{name} = {getattr(progress, name)!r}")
    if path.name != f"checkpoint-{progress.step:08d}":
        raise ValueError(f"step = {progress.step!r}")
    return progress


def _groups(written: Any) -> list[dict[str, Any]]:
    """An optimiser's groups of numbered parameters, as a record holds them. TypeError, ValueError: they are none."""
    for group in written:
        for name, value in group.items():
            if not fits(value, _OPTIONS.get(name, float | bool | None)):
                raise ValueError(f"optimizer.groups: {name} = {value!r}")
    numbers = [number for group in written for number in group["params"]]
    if numbers != list(range(len(numbers))):
        raise ValueError("optimizer.groups: params are not numbered in order")
    return written


def _checked(path: Path, sha256: str) -> dict[str, Tensor]:
    """The tensors of a file that is still what was written."""
    payload = path.read_bytes()
    if hashlib.sha256(payload).hexdigest() != sha256:
        raise ValueError(f"{path.name} is damaged: its sha256 is not {sha256[:12]}")
    return deserialized(payload)


def refuse_other_run(path: Path, there: dict, here: dict) -> None:
    """Raise a TrainingError that names the first value in which a finished or begun run and the recipe differ."""
    # A digest tells nobody anything: what else is different comes first.
    plain = [{name: one for name, one in said.items() if name not in DIGESTS} for said in (here, there)]
    difference = first_difference(*plain) or first_difference(here, there)
    if difference is not None:
        place, ours, theirs = difference
        raise TrainingError(
            f"{path}: was made with {place} = {theirs!r}, the recipe says {ours!r}; restore the recipe, "
            f"train it as a stage of another name, or delete the folder"
        )
