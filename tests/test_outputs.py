"""Losses on the outputs of a regression: what only they must hold, and what a recipe may say about them."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import NEEDED, ORACLES, function_of, inputs

from kd_dist.batch import Batch, StudentOutput, TeacherSignal
from kd_dist.errors import ModelError, RecipeError
from kd_dist.losses import LOSSES, Objective, check_losses, filled, signals_needed
from kd_dist.losses.outputs import ail, ccc, huber, kd_ccc, kd_huber, kd_mse, labelled, mse, teacher_bounded

NAMES = [name for name, row in LOSSES.items() if row.tasks == ("regression",)]
LABEL_LOSSES = [name for name in NAMES if LOSSES[name].against == "targets"]
TEACHER_LOSSES = [name for name in NAMES if LOSSES[name].against == "logits"]
FIT = (
    "huber, mse, ccc, kd_huber, kd_mse, kd_ccc, teacher_bounded, ail, cwd_features, cosine, hint, at, saliency, sp, rkd"
)


def triple(rows=8, outputs=2, seed=0):
    """A student's outputs, targets and a teacher's outputs, all in [-1, 1]."""
    return torch.rand(3, rows, outputs, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def said(name, student, targets, teacher):
    """The value of a loss by name, whatever it reads."""
    both = torch.stack([targets, teacher], dim=1)
    against = both if LOSSES[name].with_teacher else targets if name in LABEL_LOSSES else teacher
    return function_of(name)(student, against, **NEEDED.get(name, {}))


def batch_of(targets, teacher):
    valid = torch.ones(len(targets), dtype=torch.bool)
    images = torch.zeros(len(targets), 1, 2, 2, dtype=torch.uint8)
    return Batch(("k",) * len(targets), images, targets, None, valid, len(targets), TeacherSignal(teacher))


def test_these_are_all():
    assert NAMES == ["huber", "mse", "ccc", "kd_huber", "kd_mse", "kd_ccc", "teacher_bounded", "ail"]
    assert LABEL_LOSSES == ["huber", "mse", "ccc", "teacher_bounded", "ail"]
    assert TEACHER_LOSSES == ["kd_huber", "kd_mse", "kd_ccc"]


# ------------------------------------------------------------------------------------------- what all of them must be


@pytest.mark.parametrize("name", NAMES)
def test_a_constant_offset_costs(name):
    """Which a softmax would not see."""
    student, _, _ = triple()
    truth = torch.zeros_like(student) + student
    values = said(name, student + 0.3, truth, truth)
    assert (values > 0.01).all() and (said(name, student, truth, truth) == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_match_is_exactly_zero_with_a_gradient_of_exactly_zero(name):
    student, _, _ = triple()
    truth = student.clone()
    student.requires_grad_()
    value = said(name, student, truth, truth)
    assert not value.any()
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert not gradient.any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e4])
def test_extreme_outputs_give_finite_values_and_gradients(name, size):
    rows = [torch.tensor([0.0, 0.0]), torch.tensor([size, size]), torch.tensor([-size, size])]
    student, targets, teacher = (
        torch.stack(column) for column in zip(*[(s, y, t) for s in rows for y in rows for t in rows], strict=True)
    )
    for part in [slice(0, 27), *(slice(start, start + 3) for start in range(0, 27, 3))]:  # constant ones among them
        own = student[part].clone().requires_grad_()
        value = said(name, own, targets[part], teacher[part])
        (gradient,) = torch.autograd.grad(value.sum(), own)
        assert value.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(8, 1), (1, 2), (8, 3), (8,), (8, 2, 1)])
def test_shapes_that_would_broadcast_are_refused(name, shape):
    whose = "teacher's" if signals_needed({name: {}}) else "targets"
    match = rf"the student's outputs have shape \(.*\) and the {whose} \(8, 2\); both must be \(B, D\), one number for"
    row, options = LOSSES[name], NEEDED.get(name, {})
    against = [torch.zeros(8, 2)] * (2 if row.with_teacher else 1)
    with pytest.raises(ModelError, match=match):
        row.function(torch.zeros(shape), *against, **options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(8,), (8, 2, 1)])
def test_outputs_that_are_no_rows_of_numbers_are_refused(name, shape):
    against = [torch.zeros(shape)] * (2 if LOSSES[name].with_teacher else 1)
    with pytest.raises(ModelError, match=r"both must be \(B, D\), one number for each output of the task$"):
        LOSSES[name].function(torch.zeros(shape), *against, **NEEDED.get(name, {}))


@pytest.mark.parametrize("name", ["teacher_bounded", "ail"])
def test_a_teacher_of_other_outputs_is_refused(name):
    with pytest.raises(
        ModelError, match=r"student's outputs have shape \(8, 2\) and the teacher's \(8, 1\); both must"
    ):
        LOSSES[name].function(torch.zeros(8, 2), torch.zeros(8, 2), torch.zeros(8, 1), **NEEDED.get(name, {}))


# ------------------------------------------------------------------------------------------------------ the formulas


def test_huber_and_mse_equal_those_of_torch():
    student, targets, _ = triple(64)
    for delta in (0.1, 1.0, 3.0):
        wanted = F.huber_loss(student, targets, delta=delta)
        torch.testing.assert_close(huber(student, targets, delta=delta).mean(), wanted)
        torch.testing.assert_close(kd_huber(student, targets, delta=delta).mean(), wanted)
    torch.testing.assert_close(mse(student, targets).mean(), F.mse_loss(student, targets))
    assert torch.equal(kd_mse(student, targets), mse(student, targets))
    assert torch.equal(kd_ccc(student, targets), ccc(student, targets))


def test_huber_of_an_outlier_is_a_line():
    targets = torch.zeros(3, 1)
    student = torch.tensor([[0.5], [2.0], [100.0]], requires_grad=True)
    value = huber(student, targets)
    torch.testing.assert_close(value.detach(), torch.tensor([0.125, 1.5, 99.5]))
    (gradient,) = torch.autograd.grad(value.sum(), student)
    torch.testing.assert_close(gradient[:, 0], torch.tensor([0.5, 1.0, 1.0]))


def test_ccc_is_that_of_lin():
    """Perfect, shifted by one deviation, mirrored, unrelated: 1, 2/3, -1 and 0."""
    truth = torch.tensor([-1.0, -1.0, 1.0, 1.0])[:, None]
    unrelated = torch.tensor([-1.0, 1.0, -1.0, 1.0])[:, None]
    for student, concordance in [(truth, 1), (truth + 1, 2 / 3), (-truth, -1), (unrelated, 0), (0 * truth, 0)]:
        assert ccc(student, truth).item() == pytest.approx(1 - concordance, abs=1e-6)
    both = torch.cat([truth, -truth], dim=1)  # the mean over the outputs
    assert ccc(both, torch.cat([truth, truth], dim=1)).item() == pytest.approx((0 + 2) / 2, abs=1e-6)


def test_ccc_is_blind_to_the_order_of_rows_and_to_one_unit_for_both():
    student, targets, _ = triple(40)
    value = ccc(student, targets)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ccc(student[order], targets[order]), value)
    torch.testing.assert_close(ccc(4 * student + 5, 4 * targets + 5), value, rtol=1e-4, atol=1e-5)
    assert abs(ccc(student + 0.1, targets) - value) > 1e-3 and abs(ccc(1.1 * student, targets) - value) > 1e-4


@pytest.mark.parametrize("name", ["ccc", "kd_ccc"])
@pytest.mark.parametrize("gap", [0.0, 1e-12, 1e-6, 1e-3, 1.0])
def test_two_constants_have_a_finite_concordance_and_a_bounded_gradient(name, gap):
    truth = torch.full((6, 2), 0.25)
    student = (truth + gap).requires_grad_()
    value = LOSSES[name].function(student, truth)
    (gradient,) = torch.autograd.grad(value, student)
    assert 0 <= value <= 1 and gradient.isfinite().all() and gradient.abs().max() <= 3420 / math.sqrt(6)
    if gap == 0.0:
        assert value == 0 and not gradient.any()
    if gap == 1.0:
        assert value.item() == pytest.approx(1, abs=1e-5)


def test_the_gradient_of_ccc_keeps_its_bound_where_both_are_nearly_constant():
    generator, largest = torch.Generator().manual_seed(0), 0.0
    for scale in (1e-5, 1e-4, 5e-4, 1e-3, 5e-3, 1e-2):
        for rows in (2, 3, 16):
            student, targets = scale * torch.randn(2, rows, 1, generator=generator)
            student.requires_grad_()
            (gradient,) = torch.autograd.grad(ccc(student, targets), student)
            largest = max(largest, gradient.abs().max().item() * math.sqrt(rows))
    assert 300 < largest <= 3420


@pytest.mark.parametrize("name", ["ccc", "kd_ccc"])
@pytest.mark.parametrize("rows", [0, 1])
def test_fewer_than_two_rows_have_no_concordance(name, rows):
    student = torch.rand(rows, 2, requires_grad=True)
    value = LOSSES[name].function(student, torch.zeros(rows, 2))
    assert value.shape == () and value == 0
    (gradient,) = torch.autograd.grad(value, student)
    assert not gradient.any()


def test_a_teacher_bounds_what_is_asked_of_the_student():
    targets, teacher = torch.zeros(4, 2), torch.tensor([[0.5, 0.5]] * 4)  # whose error is 0.25
    student = torch.tensor([[0.4, 0.4], [-0.5, 0.5], [0.6, 0.6], [0.0, 0.8]], requires_grad=True)
    errors = [0.16, 0.25, 0.36, 0.32]
    for margin, charged in [(0.0, [0, 0, 1, 1]), (0.1, [0, 0, 1, 0]), (-0.1, [1, 1, 1, 1]), (0.2, [0, 0, 0, 0])]:
        value = teacher_bounded(student, targets, teacher, margin=margin)
        wanted = [error * on for error, on in zip(errors, charged, strict=True)]
        torch.testing.assert_close(value.tolist(), wanted, rtol=1e-5, atol=1e-7)
        (gradient,) = torch.autograd.grad(value.sum(), student)
        torch.testing.assert_close(gradient, student.detach() * torch.tensor(charged)[:, None])  # 2 s / D
    assert torch.equal(teacher_bounded(student, targets, teacher), teacher_bounded(student, targets, teacher, margin=0))


def test_imitation_is_weighted_by_how_right_the_teacher_is():
    targets = torch.zeros(4, 2)
    teacher = torch.tensor([[0.0, 0.0], [0.5, 0.5], [1.0, 1.0], [2.0, 0.0]])  # errors 0, 0.25, 1, 2
    student = (teacher + 0.1).requires_grad_()
    value = ail(student, targets, teacher, eta=1.0)
    trust = torch.tensor([1.0, 0.75, 0.0, 0.0])  # the last is worse than any that eta was taken from
    torch.testing.assert_close(value.detach(), 0.01 * trust)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    torch.testing.assert_close(gradient, 0.1 * trust[:, None].expand(4, 2))  # towards the teacher, not the label


def test_of_a_teacher_without_error_every_row_is_imitated():
    student, targets, _ = triple()
    torch.testing.assert_close(ail(student, targets, targets, eta=0.0), mse(student, targets))


# ----------------------------------------------------------------------------------------------------- unlabelled rows


@pytest.mark.parametrize("name", LABEL_LOSSES)
def test_the_property_tests_see_an_unlabelled_row(name):
    both = (2, 2) if LOSSES[name].with_teacher else (2,)
    _, against = inputs(name, ((2,), both))
    assert against.isnan().sum() == 1 and against[-1].isnan().any()


@pytest.mark.parametrize("holes", [[[0]], [[0, 1]], [[1], [2]]], ids=["all rows", "one output", "two rows"])
@pytest.mark.parametrize("name", ["huber", "mse", "teacher_bounded", "ail"])
def test_a_row_without_a_label_is_exactly_zero_and_so_is_its_gradient(name, holes):
    student, targets, teacher = triple(4)
    if holes == [[0]]:
        targets[:] = torch.nan
    else:
        for row, *column in holes:
            targets[row, column or [0, 1]] = torch.nan
    unlabelled = targets.isnan().any(dim=1)
    student.requires_grad_()
    value = said(name, student, targets, teacher)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert torch.equal(labelled(targets), ~unlabelled) and unlabelled.any()
    assert not value[unlabelled].any() and not gradient[unlabelled].any()  # a NaN is True
    alone = said(name, student[~unlabelled].detach(), targets[~unlabelled], teacher[~unlabelled])
    assert torch.equal(value[~unlabelled], alone)


def test_ccc_leaves_unlabelled_rows_out():
    student, targets, _ = triple(6)
    targets[1, 0], targets[4] = torch.nan, torch.nan
    kept = [0, 2, 3, 5]
    student.requires_grad_()
    value = ccc(student, targets)
    torch.testing.assert_close(value, ccc(student[kept], targets[kept]))
    (gradient,) = torch.autograd.grad(value, student)
    assert gradient.isfinite().all() and not gradient[[1, 4]].any() and gradient[kept].any()
    targets[kept[1:]] = torch.nan  # one row is left
    value = ccc(student, targets)
    assert value == 0 and not torch.autograd.grad(value, student)[0].any()


@pytest.mark.parametrize("name", NAMES)
def test_a_nan_of_a_model_is_not_taken_for_a_missing_label(name):
    student, targets, teacher = triple(4)
    student[1, 0] = torch.nan
    assert said(name, student, targets, teacher).isnan().any()
    if name not in ("huber", "mse", "ccc", "teacher_bounded"):
        student, targets, teacher = triple(4)
        teacher[1, 0] = torch.nan
        assert said(name, student, targets, teacher).isnan().any()


@pytest.mark.parametrize("name", NAMES)
def test_unlabelled_rows_in_a_step(name):
    """A loss on the label is the mean over all rows with zeros, one on the teacher does not care."""
    student, targets, teacher = triple(6)
    objective = Objective({name: NEEDED.get(name, {})}, epochs=1)
    full, _ = objective(StudentOutput(student), batch_of(targets, teacher), 0.0)
    targets[2:4] = torch.nan
    student.requires_grad_()
    loss, _ = objective(StudentOutput(student), batch_of(targets, teacher), 0.0)
    (gradient,) = torch.autograd.grad(loss, student)
    if name in TEACHER_LOSSES:
        assert torch.equal(loss, full) and gradient[2:4].any()
        return
    kept = [0, 1, 4, 5]
    of_kept, _ = objective(StudentOutput(student[kept]), batch_of(targets[kept], teacher[kept]), 0.0)
    torch.testing.assert_close(loss, of_kept * 4 / 6)
    assert loss > 0 and not gradient[2:4].any() and gradient.isfinite().all()


def test_gradient_descent_on_ccc_and_huber_finds_the_label():
    student, targets, teacher = triple(16)
    student.requires_grad_()
    objective = Objective({"ccc": {"weight": 0.5}, "huber": {"weight": 0.5}}, epochs=1)
    optimizer = torch.optim.Adam([student], lr=0.02)
    for _ in range(400):
        optimizer.zero_grad()
        objective(StudentOutput(student), batch_of(targets, teacher), 0.0)[0].backward()
        optimizer.step()
    torch.testing.assert_close(student.detach(), targets, rtol=0, atol=0.01)


# ------------------------------------------------------------------------------------------- what a recipe may write


@pytest.mark.parametrize("outputs", [1, 2, 7])
def test_sound_losses_pass(outputs):
    every = {name: {"weight": 0.5} for name in NAMES}
    check_losses(every, "regression", outputs)
    options = {"huber": {"delta": 0.3}, "ccc": {"gather": False}, "ail": {"eta": 2}, "teacher_bounded": {"margin": -1}}
    check_losses(options, "regression", outputs)
    check_losses({"ail": {"eta": None}}, "regression", outputs)


def test_a_loss_with_label_and_teacher_needs_signals_and_one_with_the_label_none():
    needed = {name: signals_needed({name: {}}) for name in NAMES}
    assert [name for name in NAMES if not needed[name]] == ["huber", "mse", "ccc"]
    assert all(fields == {"logits"} for fields in needed.values() if fields)
    student, targets, _ = triple()
    bare = batch_of(targets, targets)._replace(signals=None)
    loss, _ = Objective({"huber": {}, "mse": {}, "ccc": {}}, epochs=1)(StudentOutput(student), bare, 0.0)
    assert loss > 0


SOFTMAX = (
    "its softmax compares classes, or the places of a map, with each other, and the outputs of a regression are "
    "neither: a student that is off by a constant would score as if it were right; losses that fit: "
)
WRONG = [
    *(
        ({name: {}}, f"loss '{name}': {SOFTMAX}{FIT}")
        for name in ["kd", "kd_binary", "kd_pixel", "cwd", "cross_entropy"]
    ),
    ({"huber": {"delta": 0}}, "loss 'huber': option 'delta' must be from 0.01 to 100, not 0"),
    ({"huber": {"delta": math.nan}}, "loss 'huber': option 'delta' must be from 0.01 to 100, not nan"),
    ({"kd_huber": {"delta": 1e9}}, "loss 'kd_huber': option 'delta' must be from 0.01 to 100, not 1000000000.0"),
    ({"huber": {"delta": None}}, "loss 'huber': option 'delta' must be a number, not None"),
    (
        {"teacher_bounded": {"margin": math.inf}},
        "loss 'teacher_bounded': option 'margin' must be from -100 to 100, not inf",
    ),
    ({"ail": {"eta": 0}}, "loss 'ail': option 'eta' must be from 1e-06 to 1e+06, not 0"),
    ({"ail": {"eta": "max"}}, "loss 'ail': option 'eta' must be a number or null, not 'max'"),
    ({"ail": {"teacher": 1}}, "loss 'ail': unknown option 'teacher'; known: eta, weight"),
    ({"mse": {"gather": True}}, "loss 'mse': unknown option 'gather'; known: weight"),
    ({"ccc": {"gather": "yes"}}, "loss 'ccc': option 'gather' must be true or false, not 'yes'"),
    ({"kd_mse": {"temperature": 4}}, "loss 'kd_mse': unknown option 'temperature'; known: weight"),
]


@pytest.mark.parametrize("losses, message", WRONG, ids=[message[:60] for _, message in WRONG])
def test_what_cannot_be_meant_is_refused_in_one_sentence(losses, message):
    with pytest.raises(RecipeError) as caught:
        check_losses(losses, "regression", 2)
    assert str(caught.value) == message


def test_the_reason_is_true_a_softmax_does_not_see_a_constant():
    student, _, teacher = triple()
    for name in ("kd", "kd_binary"):
        assert (LOSSES[name].function(teacher + 0.5, teacher).abs() < 1e-6).all()
        assert (LOSSES[name].function(student, teacher) > 1e-4).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_another_task_is_refused(name, task):
    with pytest.raises(RecipeError, match=f"^loss '{name}': is for regression, not for {task}; losses that fit: cr"):
        check_losses({name: {}}, task, 2)


def test_eta_is_filled_where_it_is_missing():
    losses = {"ail": {"weight": 0.5}, "huber": {"delta": 2.0}}
    assert filled(losses, 0.75) == {"ail": {"weight": 0.5, "eta": 0.75}, "huber": {"delta": 2.0}}
    assert losses == {"ail": {"weight": 0.5}, "huber": {"delta": 2.0}}
    assert filled({"ail": {"eta": None}}, 0.75) == {"ail": {"eta": 0.75}}
    assert filled({"ail": {"eta": 0.1}}, 0.75) == {"ail": {"eta": 0.1}}
    assert filled({"kd_mse": {}}, 0.75) == {"kd_mse": {}}


def test_with_the_largest_error_of_the_training_set_the_worst_example_counts_nothing():
    student, targets, teacher = triple(32)
    errors = mse(teacher, targets)
    losses = filled({"ail": {}}, errors.max().item())
    student.requires_grad_()
    loss, _ = Objective(losses, epochs=1)(StudentOutput(student), batch_of(targets, teacher), 0.0)
    (gradient,) = torch.autograd.grad(loss, student)
    assert not gradient[errors.argmax()].any() and gradient[errors.argmin()].any()
    both = torch.stack([targets, teacher], dim=1).double().numpy()
    exact = ORACLES["ail"](student.detach().double().numpy(), both, eta=errors.max().item())
    np.testing.assert_allclose(loss.item(), exact.mean(), rtol=1e-5)


def test_ail_without_eta_says_what_to_do():
    student, targets, teacher = triple()
    message = "loss 'ail': eta, the teacher's largest squared error on the training set, is not known; write it in the"
    with pytest.raises(ModelError, match=f"^{message} recipe, or train from a cache$"):
        Objective({"ail": {}}, epochs=1)(StudentOutput(student), batch_of(targets, teacher), 0.0)


def test_distilling_by_mse_is_blending_the_label():
    """w mse(y) + (1 - w) mse(t) is mse(w y + (1 - w) t) plus what no student can change."""
    student, targets, teacher = triple()
    blend = 0.3 * targets + 0.7 * teacher
    constant = 0.3 * mse(targets, blend) + 0.7 * mse(teacher, blend)
    torch.testing.assert_close(
        0.3 * mse(student, targets) + 0.7 * kd_mse(student, teacher), mse(student, blend) + constant
    )
