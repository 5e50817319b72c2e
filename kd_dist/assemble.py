"""From a recipe to the values that parts are made of. Below the commands, the only file that sees a whole recipe."""

import math
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kd_dist import manifest, places
from kd_dist.checkpoint import best_digest, read_record, refuse_other_run
from kd_dist.config import to_dict
from kd_dist.data import Corridor, Shards, SignalShards
from kd_dist.disk import file_digest
from kd_dist.errors import DataError, MismatchError, ModelError
from kd_dist.inputs import Images, Input, Spectrograms
from kd_dist.inputs.spectrograms import STEPS, LogMel
from kd_dist.joined import JoinedShards, JoinedSignals
from kd_dist.losses import LOSSES, features_read, filled, projections, signals_needed
from kd_dist.models import Network, build_network, load_weights, weights_digest
from kd_dist.models.blocks import freeze
from kd_dist.pack import refuse_other
from kd_dist.plan import Order, Plan, Sequential
from kd_dist.recipe import Recipe, Stage
from kd_dist.student import Student
from kd_dist.tasks import TASKS, Regression, Task, packed_for
from kd_dist.teacher import Teacher
from kd_dist.views import BlendedViews, ImageViews, SpectrogramViews, ViewPolicy

EVALUATION_BATCH, EVALUATION_PIXELS = 256, 2**21  # the most images, and the most pixels of them, in one batch


def view_policy(recipe: Recipe) -> ViewPolicy:
    """The policy by which the recipe draws its views."""
    v = recipe.views
    if recipe.audio is not None:
        low, high = recipe.audio.db
        gain = round(v.gain * STEPS / (high - low))
        return SpectrogramViews(v.shape, gain=gain, time_mask=v.time_mask, band_mask=v.band_mask, seed=v.seed)
    make = partial(BlendedViews, self_blend=v.self_blend) if v.self_blend else ImageViews
    return make(
        size=v.shape,
        crop_scale=v.crop_scale,
        crop_ratio=v.crop_ratio,
        flip=v.flip,
        brightness=v.brightness,
        contrast=v.contrast,
        saturation=v.saturation,
        seed=v.seed,
        whole=TASKS[recipe.task.name].canonical_whole,
    )


def task(recipe: Recipe) -> Task:
    """The recipe's task, for its kind of input."""
    t = recipe.task
    if t.name == "regression":
        return Regression(t.outputs, t.range, input_kind(recipe))
    return TASKS[t.name](t.classes, input_kind(recipe))


def input_kind(recipe: Recipe) -> Input:
    """How the recipe's examples are packed and decoded."""
    a = recipe.audio
    if a is None:
        return Images()
    front_end = LogMel(
        sample_rate=a.sample_rate, n_fft=a.n_fft, hop=a.hop, mels=a.mels, fmin=a.fmin, fmax=a.fmax, db=a.db
    )
    return Spectrograms(front_end, a.shortest)


def examples(recipe: Recipe, split: str) -> Shards:
    """The packed examples of a split. Raises DataError when they are not there or of another task."""
    folder = places.shards_folder(recipe) / split
    command = "train-gan" if split == manifest.GENERATED else "pack"
    if isinstance(folder, Path) and not folder.is_dir():
        raise DataError(f"{folder}: no example shards; run `kd-dist {command}` first")
    shards = Shards(folder, recipe.data.on_error)
    for name, wanted in packed_for(task(recipe)).items():
        if shards.manifest.get(name) != wanted:
            raise MismatchError(
                f"{folder}: was packed for {name} {shards.manifest.get(name)}, the recipe says {wanted}; correct the "
                f"recipe, or give it another name and pack again"
            )
    if split == manifest.GENERATED:
        refuse_other(folder, shards.manifest, generated_content(recipe))
    first, *others = shards.manifest["class_names"]
    if recipe.views.self_blend and ("fake" in first.lower() or any("real" in name.lower() for name in others)):
        raise MismatchError(
            f"{folder}: class 0 is '{first}', and views.self_blend makes fakes, class 1, of class 0; pack with the "
            f"source face_frames, or name the class folders so that the real faces come first"
        )
    return shards


def generated_count(recipe: Recipe) -> int:
    """How many generated examples are their share of an epoch beside all the packed ones."""
    share = recipe.gan.share
    return max(1, round(share / (1 - share) * len(examples(recipe, places.TRAINING_SPLIT))))


def generated_content(recipe: Recipe) -> dict[str, Any]:
    """What the manifest of the generated examples must say: how they were made, of what."""
    packed = examples(recipe, places.TRAINING_SPLIT)
    return manifest.plain(
        {
            "kind": "examples",
            "split": manifest.GENERATED,
            "source": {"name": "gan", "root": None, "options": to_dict(recipe.gan)},
            "made_from": packed.fingerprint,
            "size": recipe.views.shape,
            **packed_for(task(recipe)),
            "class_names": packed.manifest["class_names"],
            "shard_size": recipe.data.shard_size,
        }
    )


def network(recipe: Recipe, which: str, reference: str | None, seed: int) -> Network:
    """The `teacher` or `student` of the recipe with the weights that `reference` means; random ones follow `seed`."""
    section = getattr(recipe, which)
    if not places.weights_ready(recipe, reference):
        raise ModelError(
            f"{reference}: the stage has not been trained to its end; run `kd-dist train RECIPE "
            f"--stage {reference.removeprefix(places.STAGE_REFERENCE)}` first"
        )
    if reference is not None and reference.startswith(places.STAGE_REFERENCE):
        best_sha256(recipe, reference.removeprefix(places.STAGE_REFERENCE))  # refuses what is lost or damaged
    torch.manual_seed(seed)
    built = build_network(
        section.model,
        recipe.task.width,
        channels=view_policy(recipe).channels,
        maps=TASKS[recipe.task.name].maps,
        bounds=recipe.task.range if recipe.task.name == "regression" else None,
        options=section.options,
        pretrained=reference == "pretrained",
        image_size=section.image_size,
        mean=section.mean,
        std=section.std,
        head=section.head,
    )
    file = places.weights_file(recipe, reference)
    if file is not None:
        load_weights(built, file)
    return built


def best_sha256(recipe: Recipe, name: str) -> str:
    """The digest of the best weights of a stage that has ended. Raises TrainingError when they are lost, or not those
    that its result tells of."""
    folder = places.stage_folder(recipe, name)
    return best_digest(folder / places.BEST, read_record(folder / places.RESULT).get("best_sha256"))


def weights_sha256(recipe: Recipe, reference: str | None) -> str | None:
    """The digest of the file that `reference` means; None when there is none. Raises TrainingError for weights that are
    not those that their stage ended with."""
    file = places.weights_file(recipe, reference)
    if file is None or not file.is_file():
        return None
    if reference.startswith(places.STAGE_REFERENCE) and places.weights_ready(recipe, reference):
        return best_sha256(recipe, reference.removeprefix(places.STAGE_REFERENCE))
    return file_digest(file)


def with_projections(recipe: Recipe, stage: Stage, built: Network, channels: Mapping[str, int]) -> Student:
    """The network with taps for these features, the teacher's `channels` of each, and the projections to them."""
    wanted = {
        loss: {feature: channels[feature] for feature in names}
        for loss, names in projections(stage.losses, list(channels)).items()
    }
    return Student(built, {feature: recipe.student.taps[feature] for feature in channels}, wanted, recipe.views.shape)


def freeze_blocks(recipe: Recipe, name: str, built: Network) -> None:
    """Leave what a stage's `train_last` says of a network to be trained."""
    last = recipe.stages[name].train_last
    try:
        if last is not None:
            freeze(built, last)
    except ModelError as error:
        raise ModelError(f"stages.{name}.train_last: {error}") from error


def feature_taps(recipe: Recipe, names: Iterable[str]) -> dict[str, str]:
    """Where the teacher has these features."""
    return {name: recipe.cache.features[name].tap for name in names}


def teacher(recipe: Recipe, features: Iterable[str] = ()) -> Teacher:
    """The teacher with its weights, which gives the named features beside its logits."""
    built = network(recipe, "teacher", recipe.teacher.weights, recipe.teacher.seed)
    return Teacher(built, feature_taps(recipe, features))


def stage_features(recipe: Recipe, name: str) -> tuple[str, ...]:
    """The teacher's features that a stage's losses read."""
    return tuple(features_read(recipe.stages[name].losses, recipe.shared_features))


def stage_losses(recipe: Recipe, name: str, corridor: Corridor) -> Mapping[str, Mapping[str, Any]]:
    """A stage's losses, with what only the cache knows filled in: how far its teacher is off at most."""
    said = {} if corridor.signals is None else corridor.signals.manifest.get("teacher_report") or {}
    losses = recipe.stages[name].losses
    return filled(losses, said["largest_error"]) if "largest_error" in said else losses


def module(recipe: Recipe, name: str, corridor: Corridor, taught_by: Teacher | None) -> Student:
    """What a stage trains, with the projections that its losses need; their sizes come from the cache, or from an
    online teacher."""
    stage, features = recipe.stages[name], stage_features(recipe, name)
    built = network(recipe, stage.model, places.first_weights(recipe, name), places.stage_seed(recipe, name))
    freeze_blocks(recipe, name, built)
    if taught_by is not None:
        _, shapes = taught_by.shapes(recipe.views.shape)
    else:
        shapes = {feature: corridor.signals.features[feature].shape for feature in features}
    return with_projections(recipe, stage, built, {feature: shapes[feature][0] for feature in features})


def teacher_identity(recipe: Recipe, built: Network | None = None) -> dict[str, Any]:
    """Who the teacher is, for a manifest. The digest is of the weights file, or of `built` where there is no file;
    None when neither is at hand (a machine that only trains)."""
    t = recipe.teacher
    file = places.weights_file(recipe, t.weights)
    digest = weights_sha256(recipe, t.weights)
    if file is None and built is not None:
        digest = weights_digest(built)
    kind = "file" if file is not None else t.weights or f"random, seed {t.seed}"
    described = {name: getattr(t, name) for name in ("name", "model", "options", "image_size", "mean", "std")}
    if t.head is not None:  # one without a head is described as it always was
        described["head"] = to_dict(t.head)
    return {**described, "weights": kind, "weights_sha256": digest}


def signals(recipe: Recipe, split: str, of: Shards) -> SignalShards:
    """The cached signals of a split. Raises MismatchError, naming both values, when they are not this recipe's."""
    folder = places.signals_folder(recipe, split)
    if isinstance(folder, Path) and not folder.is_dir():
        raise DataError(f"{folder}: no cached signals; run `kd-dist cache-teacher` first")
    cache = SignalShards(folder, of, recipe.data.on_error)
    ours, theirs = manifest.plain(teacher_identity(recipe)), dict(cache.manifest["teacher"])
    if ours["weights_sha256"] is None:
        ours["weights_sha256"] = theirs["weights_sha256"]
    expected = {"teacher": ours, "views": views_identity(recipe, split), **codec_identity(recipe, split)}
    codec = cache.manifest["codec"]
    kept = {
        name: {option: value for option, value in one.items() if option != "shape"}
        for name, one in codec["features"].items()
        if name in expected["features"]  # more than the recipe names do no harm
    }
    there = {"teacher": theirs, "views": cache.manifest["views"], "logits": codec["logits"], "features": kept}
    difference = manifest.first_difference(expected, there)
    if difference is not None:
        place, mine, its = difference
        raise MismatchError(
            f"{folder}: was made with {place} = {its!r}, the recipe has {mine!r}; restore the recipe, or delete the "
            f"folder and run `kd-dist cache-teacher`"
        )
    return cache


def codec_identity(recipe: Recipe, split: str) -> dict[str, Any]:
    """How the signals of a split are stored, as the recipe says it. Features are for training."""
    features = recipe.cache.features if places.is_trained_on(split) else {}
    return {"logits": recipe.cache.logits, "features": {name: to_dict(one) for name, one in features.items()}}


def views_identity(recipe: Recipe, split: str) -> dict[str, Any]:
    """The view policy of a split as a manifest states it. Canonical views depend on nothing but their size."""
    views = places.stored_views(recipe, split)
    policy = view_policy(recipe)
    kind = {} if policy.kind == ImageViews.kind else {"kind": policy.kind}
    if not views:
        return {**kind, "canonical": True, "count": 1, "size": list(policy.size)}
    return manifest.plain({**kind, "canonical": False, "count": views, **vars(policy)})


def reads_cache(stage: Stage) -> bool:
    """Whether a stage learns from cached signals."""
    return stage.teacher == "cached" and bool(signals_needed(stage.losses))


def is_online(stage: Stage) -> bool:
    """Whether a live teacher speaks in the training loop."""
    return stage.teacher == "online" and bool(signals_needed(stage.losses))


def training_corridor(recipe: Recipe, name: str, rank: int, world: int) -> Corridor:
    """The batches of a training stage, from stored signals, for an online teacher, or for no teacher at all.

    Without a teacher an example gets a fresh view each epoch: nothing limits a student that trains alone. With one,
    cached or online, it gets the V views of the recipe.
    """
    stage = recipe.stages[name]
    splits = [places.TRAINING_SPLIT, *([manifest.GENERATED] if stage.generated else [])]
    parts = [examples(recipe, split) for split in splits]
    packed = JoinedShards(parts) if stage.generated else parts[0]
    taught, cached = bool(signals_needed(stage.losses)), reads_cache(stage)
    d = recipe.data
    seed = places.stage_seed(recipe, name)
    order = Order.default(len(packed), packed.example_bytes(), seed, d.block, d.lanes, d.window)
    known = [signals(recipe, split, part) for split, part in zip(splits, parts, strict=True)] if cached else [None]
    return Corridor(
        examples=packed,
        signals=JoinedSignals(known) if cached and stage.generated else known[0],
        task=task(recipe),
        policy=view_policy(recipe),
        plan=Plan(order, stage.batch_size, world, stage.accumulate),
        rank=rank,
        views=recipe.views.count if taught else None,
        epochs=stage.epochs,
        features=stage_features(recipe, name) if cached else (),
        on_error=d.on_error,
    )


def evaluation_corridor(recipe: Recipe, split: str, rank: int, world: int, cached: bool) -> Corridor:
    """Every example of a split once, in its canonical view, with the teacher's signals if `cached`."""
    packed = examples(recipe, split)
    batch = max(1, min(EVALUATION_BATCH, EVALUATION_PIXELS // math.prod(recipe.views.shape)))
    return Corridor(
        examples=packed,
        signals=signals(recipe, split, packed) if cached else None,
        task=task(recipe),
        policy=view_policy(recipe),
        plan=Plan(Sequential(len(packed)), batch * world, world, 1),
        rank=rank,
        views=0,
        on_error=recipe.data.on_error,
    )


def stage_identity(recipe: Recipe, name: str, corridor: Corridor) -> dict[str, Any]:
    """All that decides the result of a stage, for its checkpoints: another value is another run."""
    stage: Stage = recipe.stages[name]
    # What may change between a stop and its resume; the plan gives a step the same examples for every `accumulate`.
    free = {"max_steps", "log_every", "checkpoint_every", "find_batch_size"}
    if stage.sam is None:  # a stage without it is described as it always was
        free.add("sam")
    if not any(LOSSES[loss].relational for loss in stage.losses):  # those compare the rows of a micro-batch
        free.add("accumulate")
    section = {key: one for key, one in to_dict(getattr(recipe, stage.model)).items() if key not in ("weights", "run")}
    taps = section.pop("taps", {})  # those that the losses read stand under `features`
    used = feature_taps(recipe, stage_features(recipe, name))
    start = places.first_weights(recipe, name)
    file = places.weights_file(recipe, start)
    return manifest.plain(
        {
            "stage": {key: value for key, value in to_dict(stage).items() if key not in free},
            "start": start if file is None else weights_sha256(recipe, start) or str(file),
            stage.model: section,
            "task": to_dict(recipe.task),
            "metric": recipe.evaluate.metric,
            "seed": places.stage_seed(recipe, name),
            # Fresh views, as a stage without a teacher takes them, do not depend on how many are stored.
            "views": {**views_identity(recipe, places.TRAINING_SPLIT), "count": corridor.views},
            "order": manifest.plain(vars(corridor.plan.order)),
            "examples": corridor.examples.fingerprint,
            "signals": None if corridor.signals is None else corridor.signals.fingerprint,
            "features": {feature: {"teacher": tap, "student": taps[feature]} for feature, tap in used.items()},
            "online_teacher": teacher_identity(recipe) if is_online(stage) else None,
        }
    )


def planned_steps(stage: Stage, corridor: Corridor) -> int:
    """Where a stage ends, in optimiser steps, unless its patience runs out before."""
    planned = stage.epochs * corridor.plan.steps_per_epoch
    return min(planned, stage.max_steps or planned)


def stage_result(recipe: Recipe, name: str) -> dict[str, Any] | None:
    """The result of a stage that this recipe has trained to its end; None when it has yet to.

    Raises TrainingError when the folder holds the result of another recipe, or what is damaged.
    """
    path = places.stage_folder(recipe, name) / places.RESULT
    if not path.is_file():
        return None
    result = read_record(path, "identity", "steps")
    corridor = training_corridor(recipe, name, rank=0, world=1)
    refuse_other_run(path.parent, result["identity"], stage_identity(recipe, name, corridor))
    if result["steps"] != planned_steps(recipe.stages[name], corridor):
        return None
    best_sha256(recipe, name)
    return result
