"""losses/truncated.py: losses against top-K logits, compared with float64 formulas and with those on all logits."""

import math

import numpy as np
import pytest
import torch
from oracles import log_softmax
from test_topk import drawn, log_mass, stored

from kd_dist.batch import Batch, StudentOutput, TeacherSignal, TopLogits, each_tensor, valid_rows
from kd_dist.errors import ModelError
from kd_dist.losses import LOSSES, Objective
from kd_dist.losses.logits import hard_label, kd

TEMPERATURES = (1.0, 1.7, 4.0, 8.0)


def lesson(classes: int = 100, kept: int = 10, rows: int = 32, kind: str = "gaussian"):
    """A student's logits, the teacher's top-K ones, and all of the teacher's; float32."""
    teacher, student = drawn(kind, rows, classes), drawn("gaussian", rows, classes, seed=1)
    labels = np.random.default_rng(2).integers(0, classes, rows)
    return torch.from_numpy(student).requires_grad_(), stored(f"top{kept}", teacher, labels), torch.from_numpy(teacher)


def oracle(student, teacher, ids, temperature):
    """KL of the K classes and the rest as one, in float64; one row after the other."""
    values = []
    for s, t, chosen in zip(student, teacher, ids, strict=True):
        p, q = (np.exp(log_softmax(z.astype(np.float64) / temperature)) for z in (t, s))
        p, q = (np.append(one[chosen], np.delete(one, chosen).sum()) for one in (p, q))
        values.append(temperature**2 * (p * np.log(p / q)).sum())
    return np.array(values)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("classes, kept", [(100, 10), (100, 2), (1000, 50), (3, 2)])
def test_kd_is_the_kl_with_the_rest_as_one_class(classes, kept, temperature):
    student, top, teacher = lesson(classes, kept)
    values = kd(student, top, temperature=temperature)
    exact = oracle(student.detach().numpy(), teacher.numpy(), top.ids.numpy(), temperature)
    assert values.shape == (32,) and values.dtype == torch.float32
    # A logit of 20 in fp16 is off by 0.01.
    np.testing.assert_allclose(values.detach().numpy(), exact, rtol=5e-3, atol=1e-3 * temperature)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_its_gradient_spreads_the_rest_as_the_student_does(temperature):
    student, top, teacher = lesson()
    kd(student, top, temperature=temperature).sum().backward()
    p, q = (torch.softmax(z.detach().double() / temperature, dim=1) for z in (teacher, student))
    rest = torch.from_numpy(np.exp(log_mass(teacher.numpy(), top.ids.numpy(), temperature)))
    own = q.scatter(1, top.ids, 0.0)
    served = own * (rest / own.sum(dim=1))[:, None]
    served.scatter_(1, top.ids, p.gather(1, top.ids))
    torch.testing.assert_close(student.grad.double(), temperature * (q - served), rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_with_a_rest_of_one_class_it_is_kd(temperature):
    student, top, teacher = lesson(20, 19)
    truncated, whole = kd(student, top, temperature=temperature), kd(student, teacher, temperature=temperature)
    torch.testing.assert_close(truncated, whole, rtol=5e-3, atol=1e-3)
    gradients = [torch.autograd.grad(values.sum(), student)[0] for values in (truncated, whole)]
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=5e-3)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_it_is_at_most_kd_and_least_where_the_student_says_the_same(temperature):
    student, top, teacher = lesson()
    truncated, whole = kd(student, top, temperature=temperature), kd(student, teacher, temperature=temperature)
    assert (truncated <= whole + 1e-3 * temperature**2).all() and truncated.mean() < whole.mean()
    same = teacher.clone().requires_grad_()
    match = kd(same, top, temperature=temperature)
    match.sum().backward()
    assert match.abs().max() < 1e-4 * temperature**2 and same.grad.abs().max() < 1e-2
    nearer = [kd(torch.lerp(student, teacher, step), top, temperature=temperature).mean() for step in (0, 0.3, 0.6, 1)]
    assert nearer == sorted(nearer, reverse=True)


def test_a_constant_and_the_precision_change_nothing():
    student, top, _ = lesson()
    values = kd(student, top)
    torch.testing.assert_close(kd(student + 40, top), values, rtol=1e-4, atol=1e-4)
    for dtype in (torch.float16, torch.bfloat16):
        half = student.detach().to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = kd(half, top)
        assert found.dtype == torch.float32 and torch.equal(found, kd(half.float(), top))


@pytest.mark.parametrize("name", ["kd", "hard_label"])
def test_extreme_logits_give_finite_values_and_gradients(name):
    """The mass of the rest is 1e-12 and less on either side, and the student's may be nothing at all."""
    teacher = np.zeros((6, 50), np.float32)
    teacher[:, 0] = (0, 31, 60, 120, 1000, 1e4)
    top = stored("top2", teacher)
    mass = log_mass(teacher, top.ids.numpy(), 1.0)
    assert mass[1] < math.log(1e-11) and mass[-1] < -5000
    for scale in (0.0, 31.0, 1e4, -1e4):
        student = torch.zeros(6, 50)
        student[:, 0] = scale
        student.requires_grad_()
        values = LOSSES[name].function(student, top, **({"temperature": 1.0} if name == "kd" else {}))
        values.sum().backward()
        assert values.isfinite().all() and student.grad.isfinite().all()
        assert name == "hard_label" or values.min() > -1e-4


def test_a_tiny_mass_still_has_its_gradient():
    """Of 1e-12 the gradient is known to a percent: nothing is taken from 1."""
    teacher = np.zeros((1, 50), np.float32)
    teacher[0, 0] = math.log(48 * 1e12)
    top = stored("top2", teacher)
    mass = math.exp(log_mass(teacher, top.ids.numpy(), 1.0)[0])
    assert 0.9e-12 < mass < 1.1e-12
    student = torch.zeros(1, 50)
    student[0, 0] = 60.0  # it gives the rest e^-60
    student.requires_grad_()
    kd(student, top, temperature=1.0).sum().backward()
    assert student.grad[0, 2:].sum().item() == pytest.approx(-mass, rel=0.02)


def test_hard_label_is_exact():
    student, top, teacher = lesson()
    assert torch.equal(hard_label(student, top), hard_label(student, teacher))


@pytest.mark.parametrize("loss", [kd, hard_label])
@pytest.mark.parametrize("shape", [(31, 100), (32, 10), (32, 100, 2)])
def test_shapes_that_do_not_fit_are_refused(loss, shape):
    _, top, _ = lesson()
    with pytest.raises(ModelError, match=r"the teacher's 32 rows of the 10 largest; the student must have one logit"):
        loss(torch.zeros(shape), top)


# ------------------------------------------------------------------------------------------------------ a batch of it


def batch_of(top: TopLogits, valid: list[bool]) -> Batch:
    rows = len(valid)
    images, targets = torch.zeros(rows, 3, 2, 2, dtype=torch.uint8), torch.zeros(rows, dtype=torch.int64)
    return Batch(tuple("abcdefgh"[:rows]), images, targets, None, torch.tensor(valid), 8, TeacherSignal(top))


def test_the_losses_with_this_are_those_that_say_so():
    assert {name: row.top for name, row in LOSSES.items() if row.top} == {"kd": "near", "hard_label": "exact"}


@pytest.mark.parametrize("name", ["kd", "hard_label"])
def test_rows_that_are_not_valid_add_nothing_and_can_be_left_out(name):
    student, top, _ = lesson(rows=8)
    valid = [True, False, True, True, False, True, True, True]
    spoilt = each_tensor(top, torch.clone)
    for tensor in spoilt:
        tensor[~torch.tensor(valid)] = 0  # as a failed example is delivered: the same class ten times
    batch, objective = batch_of(spoilt, valid), Objective({name: {}}, epochs=1)
    loss, _ = objective(StudentOutput(student), batch, 0.0)
    loss.backward()
    kept = valid_rows(batch)
    assert isinstance(kept.signals.logits, TopLogits) and [len(one) for one in kept.signals.logits] == [6] * 3
    left_out, _ = objective(StudentOutput(student[batch.valid]), kept, 0.0)
    torch.testing.assert_close(left_out, loss)
    assert student.grad.isfinite().all() and not student.grad[~batch.valid].any() and student.grad[batch.valid].any()
