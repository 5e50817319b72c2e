"""A recipe tried out on black images before anything is spent: models, taps, codecs, losses."""

import torch

from kd_dist import assemble
from kd_dist.batch import Batch, TeacherSignal
from kd_dist.calibrate import planned_codecs
from kd_dist.errors import ModelError, RecipeError
from kd_dist.losses import LOSSES, Objective, filled
from kd_dist.recipe import Recipe
from kd_dist.teacher import Teacher


def check_models(recipe: Recipe) -> None:
    """Build all models with random weights, try their taps, codecs and losses: a mistake is told before anything is
    spent."""
    size, shapes = recipe.views.shape, {}
    all_taps = {"teacher": assemble.feature_taps(recipe, recipe.cache.features), "student": recipe.student.taps}
    for which, taps in all_taps.items():
        try:
            # Only looked at, in evaluation mode, like a teacher.
            shapes[which] = Teacher(assemble.network(recipe, which, None, recipe.seed), taps).shapes(size)
        except (ModelError, RecipeError) as error:
            raise type(error)(f"{which}.model: {error}") from error
    logits, features = shapes["teacher"]
    _check_means(recipe, logits)
    codecs = planned_codecs(recipe.cache.features, features)
    stored = {name: (shape[0], *codecs[name].stored_shape[1:]) for name, shape in features.items()}
    said = TeacherSignal(torch.randn(2, *logits), {name: torch.randn(2, *shape) for name, shape in stored.items()})
    for name, stage in recipe.stages.items():
        if assemble.stage_features(recipe, name) or stage.train_last is not None:
            _try_losses(recipe, name, said)


def _check_means(recipe: Recipe, logits: tuple[int, ...]) -> None:
    """Build the further teachers; a stage that listens to several needs logits of one shape, the first's are `logits`.
    """
    shapes = {recipe.teacher.name: logits}
    for name in recipe.teachers:
        try:
            network = assemble.network(recipe.with_teacher(name), "teacher", None, recipe.seed)
            shapes[name], _ = Teacher(network, {}).shapes(recipe.views.shape)
        except (ModelError, RecipeError) as error:
            raise type(error)(f"teachers.{name}.model: {error}") from error
    for stage, one in recipe.stages.items():
        said = {name: shapes[name] for name in recipe.teachers_of(one)}
        if len(set(said.values())) > 1:
            listed = ", ".join(f"'{name}' {shape}" for name, shape in said.items())
            raise ModelError(
                f"stages.{stage}.teachers: give logits of other shapes, {listed}, which have no mean; take teachers "
                f"that answer on one grid, or name one of them"
            )


def _try_losses(recipe: Recipe, name: str, said: TeacherSignal) -> None:
    """A stage's losses on two black images: what does not fit says so."""
    stage = recipe.stages[name]
    read = {feature: said.features[feature] for feature in assemble.stage_features(recipe, name)}
    shapes = {feature: tuple(value.shape[1:]) for feature, value in read.items()}
    built = assemble.network(recipe, stage.model, None, recipe.seed)
    assemble.freeze_blocks(recipe, name, built)
    student = assemble.with_projections(recipe, stage, built, shapes).eval()
    task, policy = assemble.task(recipe), assemble.view_policy(recipe)
    images = torch.zeros(2, policy.channels, *policy.size, dtype=torch.uint8)
    targets = torch.from_numpy(task.collate([task.no_target(policy.size)] * 2)[0])
    batch = Batch(("", ""), images, targets, None, torch.ones(2, dtype=torch.bool), 2, said._replace(features=read))
    try:
        with torch.set_grad_enabled(stage.train_last is not None):
            loss, _ = Objective(filled(stage.losses, 1.0), stage.epochs)(student(images), batch, 0.0)
    except ModelError as error:
        raise ModelError(f"stages.{name}.losses: {error}") from error
    if stage.train_last is not None and not loss.requires_grad:
        raise ModelError(
            f"stages.{name}.losses: none depends on what the stage trains; raise train_last, now "
            f"{stage.train_last}, or add a loss on labels or logits"
        )


def check_relations(recipe: Recipe, name: str, world: int) -> None:
    """Raise a RecipeError when a relational loss has a single row to relate: it would be 0 for good."""
    stage = recipe.stages[name]
    for loss, written in stage.losses.items():
        parts = stage.accumulate * (1 if written.get("gather", LOSSES[loss].gather) else world)
        if LOSSES[loss].relational and stage.batch_size < 2 * parts:
            raise RecipeError(
                f"stages.{name}.losses.{loss}: relates the rows of a micro-batch, of which batch_size "
                f"{stage.batch_size} in {parts} parts leaves fewer than two; take larger batches, or accumulate less"
            )
