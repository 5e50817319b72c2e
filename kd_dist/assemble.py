"""From a recipe to the values that parts are made of. Below the commands, the only file that sees a whole recipe."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kd_dist import caches, manifest, places
from kd_dist.checkpoint import read_record, refuse_other_run
from kd_dist.compress import FeatureCodec
from kd_dist.config import to_dict
from kd_dist.data import Corridor
from kd_dist.ensemble import MeanSignals
from kd_dist.errors import DataError, MismatchError, ModelError
from kd_dist.folders import Shards
from kd_dist.joined import JoinedShards, JoinedSignals
from kd_dist.losses import LOSSES, features_read, filled, isometric, projections, signals_needed
from kd_dist.losses.served import refuse_unserved
from kd_dist.models import Network, build_network, load_weights
from kd_dist.models.blocks import freeze
from kd_dist.models.ensemble import together
from kd_dist.pack import refuse_other
from kd_dist.plan import Order, Plan, Sequential
from kd_dist.policies import split_policy, task, view_policy
from kd_dist.recipe import Recipe, Stage
from kd_dist.rows import Signals
from kd_dist.student import Student
from kd_dist.tasks import TASKS, packed_for
from kd_dist.teacher import Teacher

# Keys of a stage that came later, and what they are when not used: a stage without them is described as it always was.
LATER = {"sam": None, "shards": None, "ema": None, "layer_decay": 1.0, "unfreeze": {}}
LATER |= {"cycle_epochs": None, "cycle_factor": 1.0, "views_per_decode": 1}
EVALUATION_BATCH, EVALUATION_PIXELS = 256, 2**21  # the most images, and the most pixels of them, in one batch


def examples(recipe: Recipe, split: str, limit: int | None = None) -> Shards:
    """The packed examples of a split, or of its first `limit` shards. Raises DataError when they are not there or of
    another task."""
    folder = places.shards_folder(recipe) / split
    command = "train-gan" if split == manifest.GENERATED else "pack"
    if isinstance(folder, Path) and not folder.is_dir():
        raise DataError(f"{folder}: no example shards; run `kd-dist {command}` first")
    shards = Shards(folder, recipe.data.on_error, limit)
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
        caches.best_sha256(recipe, reference.removeprefix(places.STAGE_REFERENCE))  # refuses what is lost or damaged
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


def with_projections(recipe: Recipe, stage: Stage, built: Network, shapes: Mapping[str, tuple[int, ...]]) -> Student:
    """The network with taps for these features, of which `shapes` are what the losses get of the teacher, (C, *grid),
    and the projections to them."""
    wanted = {
        loss: {feature: shapes[feature][0] for feature in names}
        for loss, names in projections(stage.losses, list(shapes)).items()
    }
    taps, grids = recipe.student.taps, {feature: shape[1:] for feature, shape in shapes.items()}
    return Student(built, {feature: taps[feature] for feature in shapes}, wanted, recipe.views.shape, grids)


def freeze_blocks(recipe: Recipe, name: str, built: Network) -> None:
    """Leave what a stage's `train_last` says of a network to be trained; what `unfreeze` says later is tried, too."""
    stage = recipe.stages[name]
    phases = {f"unfreeze.{epoch}": last for epoch, last in stage.unfreeze.items()} | {"train_last": stage.train_last}
    for key, last in phases.items():
        try:
            if last is not None:
                freeze(built, last)
        except ModelError as error:
            raise ModelError(f"stages.{name}.{key}: {error}") from error


def feature_taps(recipe: Recipe, names: Iterable[str]) -> dict[str, str]:
    """Where the teacher has these features."""
    return {name: recipe.cache.features[name].tap for name in names}


def teacher(recipe: Recipe, features: Iterable[str] = ()) -> Teacher:
    """The teacher with its weights, which gives the named features beside its logits."""
    return Teacher(teacher_network(recipe), feature_taps(recipe, features))


def teacher_network(recipe: Recipe) -> Network:
    """The first teacher's network with its weights."""
    return network(recipe, "teacher", recipe.teacher.weights, recipe.teacher.seed)


def online_teacher(recipe: Recipe, name: str) -> Teacher:
    """The live teacher of a stage, or the mean of several, with the features that its losses read."""
    names = recipe.teachers_of(recipe.stages[name])
    networks = [teacher_network(recipe.with_teacher(one)) for one in names]
    return Teacher(together(networks), feature_taps(recipe, stage_features(recipe, name)))


def stage_signals(
    recipe: Recipe, name: str, splits: Sequence[str], parts: Sequence[Shards], packed: Shards
) -> Signals:
    """What a stage learns from: the cached signals of its teacher, or the mean of several, for the examples of all
    splits, `parts`, which are `packed` as one sequence."""
    stage, features, found = recipe.stages[name], stage_features(recipe, name), []
    for teacher in recipe.teachers_of(stage):
        each = recipe.with_teacher(teacher)
        own = features if teacher == recipe.teacher.name else ()  # the first alone has some
        known = [caches.signals(each, split, part, own) for split, part in zip(splits, parts, strict=True)]
        refuse_unserved(stage.losses, known[0].manifest, f"{known[0].folder}: stages.{name}.losses")
        found.append(JoinedSignals(known, parts) if stage.generated else known[0])
    return found[0] if len(found) == 1 else MeanSignals(found, packed, features)


def stage_features(recipe: Recipe, name: str) -> tuple[str, ...]:
    """The teacher's features that a stage's losses read."""
    return tuple(features_read(recipe.stages[name].losses, recipe.shared_features))


def stage_codecs(recipe: Recipe, name: str, corridor: Corridor) -> dict[str, FeatureCodec]:
    """How the stored features that a stage reads are decoded: in coordinates, where its losses allow it."""
    turned = isometric(recipe.stages[name].losses, list(corridor.codecs))
    return {
        feature: codec.in_coordinates() if feature in turned else codec for feature, codec in corridor.codecs.items()
    }


def stage_losses(recipe: Recipe, name: str, corridor: Corridor) -> Mapping[str, Mapping[str, Any]]:
    """A stage's losses, with what only the cache knows filled in: how far its teacher is off at most."""
    said = {} if corridor.signals is None else corridor.signals.manifest.get("teacher_report") or {}
    losses = recipe.stages[name].losses
    return filled(losses, said["largest_error"]) if "largest_error" in said else losses


def module(recipe: Recipe, name: str, corridor: Corridor, taught_by: Teacher | None) -> Student:
    """What a stage trains, with the projections that its losses need; their sizes come from `stage_codecs`, or from an
    online teacher."""
    stage, features = recipe.stages[name], stage_features(recipe, name)
    built = network(recipe, stage.model, places.first_weights(recipe, name), places.stage_seed(recipe, name))
    freeze_blocks(recipe, name, built)
    if taught_by is not None:
        _, shapes = taught_by.shapes(recipe.views.shape)
    else:
        shapes = {feature: codec.decoded_shape for feature, codec in stage_codecs(recipe, name, corridor).items()}
    return with_projections(recipe, stage, built, {feature: shapes[feature] for feature in features})


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
    parts = [examples(recipe, split, stage.shards) for split in splits]
    packed = JoinedShards(parts) if stage.generated else parts[0]
    taught, cached = bool(signals_needed(stage.losses)), reads_cache(stage)
    d = recipe.data
    seed = places.stage_seed(recipe, name)
    order = Order.default(len(packed), packed.example_bytes(), seed, d.block, d.lanes, d.window)
    return Corridor(
        examples=packed,
        signals=stage_signals(recipe, name, splits, parts, packed) if cached else None,
        task=task(recipe),
        policy=view_policy(recipe),
        plan=Plan(order, stage.batch_size, world, stage.accumulate, stage.views_per_decode),
        rank=rank,
        views=recipe.views.count if taught else None,
        epochs=stage.epochs,
        features=stage_features(recipe, name) if cached else (),
        on_error=d.on_error,
    )


def evaluation_corridor(
    recipe: Recipe, split: str, rank: int, world: int, cached: bool, teachers: Sequence[str] = ()
) -> Corridor:
    """Every example of a split once, in its canonical view, with the teacher's signals if `cached`: the first's, or of
    the named `teachers` the mean."""
    packed, signals = examples(recipe, split), None
    if cached:
        each = [recipe.with_teacher(name) for name in teachers or [recipe.teacher.name]]
        known = [caches.signals(one, split, packed, ()) for one in each]
        signals = known[0] if len(known) == 1 else MeanSignals(known, packed)
    batch = max(1, min(EVALUATION_BATCH, EVALUATION_PIXELS // math.prod(recipe.views.shape)))
    return Corridor(
        examples=packed,
        signals=signals,
        task=task(recipe),
        policy=split_policy(recipe, split),
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
    free |= {"gradient_checkpointing", "compile", "channels_last"}  # how a step is computed
    free |= {key for key, off in LATER.items() if getattr(stage, key) == off}
    taught_by = recipe.teachers_of(stage)
    if taught_by == [recipe.teacher.name]:  # likewise one that listens to the first alone
        free.add("teachers")
    if not any(LOSSES[loss].relational for loss in stage.losses):  # those compare the rows of a micro-batch
        free.add("accumulate")
    section = {key: one for key, one in to_dict(getattr(recipe, stage.model)).items() if key not in ("weights", "run")}
    taps = section.pop("taps", {})  # those that the losses read stand under `features`
    used = feature_taps(recipe, stage_features(recipe, name))
    start = places.first_weights(recipe, name)
    file = places.weights_file(recipe, start)
    return manifest.plain(
        {
            "stage": {key: one for key, one in to_dict(replace(stage, teachers=taught_by)).items() if key not in free},
            "start": start if file is None else caches.weights_sha256(recipe, start) or str(file),
            stage.model: section,
            "task": to_dict(recipe.task),
            "metric": recipe.evaluate.metric,
            "seed": places.stage_seed(recipe, name),
            # Fresh views, as a stage without a teacher takes them, do not depend on how many are stored.
            "views": {**caches.views_identity(recipe, places.TRAINING_SPLIT), "count": corridor.views},
            "order": manifest.plain(vars(corridor.plan.order)),
            "examples": corridor.examples.fingerprint,
            "signals": None if corridor.signals is None else corridor.signals.fingerprint,
            "features": {feature: {"teacher": tap, "student": taps[feature]} for feature, tap in used.items()},
            "online_teacher": online_identity(recipe, stage),
        }
    )


def online_identity(recipe: Recipe, stage: Stage) -> dict[str, Any] | list[dict[str, Any]] | None:
    """Who speaks in the training loop: nobody, one teacher, or several."""
    if not is_online(stage):
        return None
    first, *others = [caches.teacher_identity(recipe.with_teacher(name)) for name in recipe.teachers_of(stage)]
    return [first, *others] if others else first


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
    caches.best_sha256(recipe, name)
    return result
