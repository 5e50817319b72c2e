"""What a recipe's models, taps, codecs and losses cannot be together is told before anything is spent."""

from dataclasses import replace

import pytest

from kd_dist.config import load
from kd_dist.errors import KdError
from kd_dist.trial import check_models, check_relations

ONLY = "stages.distill.losses="
TOKENS = [
    "teacher.model=timm/vit_tiny_patch16_224",
    "teacher.options={img_size: 8, patch_size: 4, embed_dim: 12, depth: 1, num_heads: 1}",
    "task.classes=3",
]
# Overrides of the tiny classification recipe, and what is wrong with them.
REFUSED = [
    (["cache.features={f: {tap: '0', pca: 9}}"], "cache.features.f.pca: 9 components cannot be had from the 8"),
    (["teachers.wide={model: tiny_model:wider}"], "teachers.wide.model: 'tiny_model:wider'"),
    (["cache.features={f: {tap: '4', pool: 2}}"], "feature 'f' of shape (3,): pool 2 is not possible"),
    ([*TOKENS, "cache.features={f: {tap: blocks.0, pool: 2}}"], "feature 'f' of shape (12, 5): pool 2 is not possible"),
    (["cache.features={f: {tap: '7'}}"], "teacher.model: tiny_model:network: feature 'f': there is no module '7'"),
    (
        ["cache.features={f: {tap: '0'}}", "student.taps={f: '9'}"],
        "student.model: tiny_model:network: feature 'f': there is no module '9'",
    ),
    (
        ["cache.features={f: {tap: '4'}}", "student.taps={f: '4'}", f"{ONLY}{{at: {{}}}}"],
        "stages.distill.losses: loss 'at': feature 'f': ",
    ),
    (
        [*TOKENS, "cache.features={f: {tap: blocks.0}}", "student.taps={f: '0'}", f"{ONLY}{{cosine: {{}}}}"],
        "stages.distill.losses: loss 'cosine': feature 'f': the student's positions are (4, 4) and the teacher's (5,)",
    ),
]


@pytest.mark.parametrize("words, sentence", REFUSED, ids=[sentence for _, sentence in REFUSED])
def test_what_does_not_fit_is_one_sentence(experiment, words, sentence):
    recipe = load("tiny.yaml", ["teacher.weights=null", *words])
    with pytest.raises(KdError) as caught:
        check_models(recipe)
    assert str(caught.value).startswith(sentence) and "\n" not in str(caught.value)


def test_what_fits_passes_and_leaves_nothing_behind(experiment):
    before = sorted(experiment.rglob("*"))
    check_models(load("tiny.yaml"))
    taps = ["cache.features={f: {tap: '0', pool: 2, pca: 4}, g: {tap: '4'}}", "student.taps={f: '0', g: '4'}"]
    losses = f"{ONLY}{{cosine: {{}}, sp: {{}}, at: {{features: [f]}}, hint: {{features: [g]}}}}"
    check_models(load("tiny.yaml", [*taps, losses]))
    assert [path for path in sorted(experiment.rglob("*")) if "__pycache__" not in path.parts] == before


@pytest.mark.parametrize(
    "batch_size, accumulate, world, gather, fine",
    [(8, 4, 1, "false", True), (8, 8, 1, "false", False), (8, 2, 4, "false", False), (8, 2, 4, "true", True)],
)
def test_a_relational_loss_needs_two_rows(experiment, batch_size, accumulate, world, gather, fine):
    words = [f"{ONLY}{{cross_entropy: {{}}, rkd: {{gather: {gather}}}}}", "cache.features={f: {tap: '0'}}"]
    words += ["student.taps={f: '0'}", f"stages.distill.batch_size={batch_size}"]
    recipe = load("tiny.yaml", [*words, f"stages.distill.accumulate={accumulate}"])
    check_relations(recipe, "pretrain", 64)
    if fine:
        check_relations(recipe, "distill", world)
        return
    with pytest.raises(KdError, match="^stages.distill.losses.rkd: relates the rows of a micro-batch, of which batch"):
        check_relations(recipe, "distill", world)


@pytest.mark.parametrize("losses, fine", [({"kd_ccc": {}}, True), ({"kd_ccc": {"gather": False}}, False)])
def test_outputs_are_related_over_all_processes_where_a_recipe_is_silent(experiment, losses, fine):
    recipe = load("tiny.yaml", ["stages.distill.batch_size=8", "stages.distill.accumulate=2"])
    stage = replace(recipe.stages["distill"], losses=losses)
    recipe = replace(recipe, stages={**recipe.stages, "distill": stage})
    if fine:
        check_relations(recipe, "distill", 4)
        return
    with pytest.raises(KdError, match="^stages.distill.losses.kd_ccc: relates the rows of a micro-batch, of which bat"):
        check_relations(recipe, "distill", 4)
