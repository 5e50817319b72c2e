"""Where a recipe's files lie, and what its weights are called."""

import os
from dataclasses import replace
from pathlib import Path

from kd_dist.checkpoint import BEST, RESULT
from kd_dist.errors import RecipeError
from kd_dist.losses import signals_needed
from kd_dist.manifest import GENERATED, GENERATOR
from kd_dist.recipe import Recipe, parse_bytes
from kd_dist.remote import LocalCache, Remote, location

TRAINING_SPLIT, VALIDATION_SPLIT = "train", "val"
STAGE_REFERENCE = "stage:"


def shards_folder(recipe: Recipe) -> Path | Remote:
    """Where the recipe's splits lie, with the local cache for what is under a URL."""
    d, cache = recipe.data, None
    if d.local_cache is not None:
        user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        cache = LocalCache(Path(d.cache_dir or Path(user) / "kd_dist"), parse_bytes(d.local_cache))
    return location(d.shards, cache) / recipe.name


def signals_folder(recipe: Recipe, split: str, number: int = 0) -> Path | Remote:
    """Where the teacher's signals of a split lie: those that were cached first, and what was added as the `number`th.
    No teacher has a dot in its name."""
    added = f".{number}" if number else ""
    return shards_folder(recipe) / split / f"{recipe.teacher.name}{added}"


def stage_folder(recipe: Recipe, name: str) -> Path:
    """Where a stage of this recipe and seed leaves its checkpoints, its best weights and its result."""
    return Path(recipe.runs) / recipe.name / name / f"seed-{stage_seed(recipe, name)}"


def exported_stage(recipe: Recipe) -> str:
    """The stage whose student is exported: `export.stage`, else the last that trains one. Raises RecipeError when none
    does."""
    students = [name for name, stage in recipe.stages.items() if stage.model == "student"]
    if not students:
        raise RecipeError("stages: none trains a student, which could be exported; add one")
    return recipe.export.stage or students[-1]


def package_folder(recipe: Recipe, name: str) -> Path:
    """Where the student of a stage is exported to."""
    return stage_folder(recipe, name) / "package"


def stage_seed(recipe: Recipe, name: str) -> int:
    """A teacher has one seed for all the students that learn from it."""
    return recipe.teacher.seed if recipe.stages[name].model == "teacher" else recipe.seed


def splits(recipe: Recipe) -> list[str]:
    """The splits that a recipe needs of its source, each once."""
    return list(dict.fromkeys([TRAINING_SPLIT, VALIDATION_SPLIT, recipe.evaluate.split]))


def cached_splits(recipe: Recipe) -> list[str]:
    """The splits that a recipe's teacher is asked about: with the generated examples, if a stage learns from them."""
    generated = any(stage.generated for stage in recipe.stages.values())
    return [*splits(recipe), *([GENERATED] if generated else [])]


def cached_teachers(recipe: Recipe) -> list[Recipe]:
    """The recipe of each teacher that is cached: of the first, and of every other that a stage listens to."""
    heard = {name for stage in recipe.stages.values() for name in stage.teachers}
    first = recipe.teacher.name
    return [recipe.with_teacher(name) for name in (first, *recipe.teachers) if name == first or name in heard]


def beside(recipe: Recipe, teacher: str, split: str) -> str:
    """What a teacher's signals of a split are called where those of several stand in one report: those of the first as
    the split."""
    return split if teacher == recipe.teacher.name else f"{split}/{teacher}"


def is_trained_on(split: str) -> bool:
    """Whether students learn from a split: it has V views of each example, and features. Others are judged by."""
    return split in (TRAINING_SPLIT, GENERATED)


def stored_views(recipe: Recipe, split: str) -> int:
    """Views of an example that the cache holds: V for training, 0 (the canonical one) elsewhere."""
    return recipe.views.count if is_trained_on(split) else 0


def generator_folder(recipe: Recipe) -> Path:
    """Where `kd-dist train-gan` leaves its checkpoints and pictures."""
    return Path(recipe.runs) / recipe.name / GENERATOR / f"seed-{recipe.gan.seed}"


def without_generated(recipe: Recipe, name: str) -> str | None:
    """The stage that differs from this one in having no generated examples, and at most in its length; None where there
    is none."""
    stage = recipe.stages[name]
    without = replace(stage, generated=False)
    alike = [
        other
        for other, one in recipe.stages.items()
        if replace(one, epochs=stage.epochs, max_steps=stage.max_steps) == without
    ]
    return alike[0] if stage.generated and alike else None


def weights_file(recipe: Recipe, reference: str | None) -> Path | None:
    """The file that `stage:NAME` or a path means; None for `pretrained` and for random weights."""
    if reference is None or reference == "pretrained":
        return None
    if reference.startswith(STAGE_REFERENCE):
        return stage_folder(recipe, reference.removeprefix(STAGE_REFERENCE)) / BEST
    return Path(reference)


def weights_ready(recipe: Recipe, reference: str | None) -> bool:
    """Whether what `reference` names can be loaded now: the weights of a stage only once it has ended."""
    if reference is None or not reference.startswith(STAGE_REFERENCE):
        return True
    return (stage_folder(recipe, reference.removeprefix(STAGE_REFERENCE)) / RESULT).is_file()


def first_weights(recipe: Recipe, name: str) -> str | None:
    """What a stage starts from. `teacher.weights` are what teacher stages lead to, so these start from `init` alone."""
    stage = recipe.stages[name]
    return stage.init or (recipe.student.weights if stage.model == "student" else None)


def role(recipe: Recipe, name: str) -> str:
    """What a stage's model is in a report: teacher, student_alone or student_kd."""
    stage = recipe.stages[name]
    if stage.model == "teacher":
        return "teacher"
    return "student_kd" if signals_needed(stage.losses) else "student_alone"
