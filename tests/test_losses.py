"""Every loss of the table against an oracle and the properties that its kind must have; then the objective."""

import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_dist.batch import Batch, StudentOutput, TeacherSignal
from kd_dist.errors import ModelError, RecipeError
from kd_dist.losses import LOSSES, Objective, check_losses, signals_needed
from kd_dist.losses.logits import cross_entropy, kd, kd_binary
from kd_dist.losses.table import Loss

INF = math.inf


# ------------------------------------------------------------------------------------------------- the table's cases


def log_softmax(z):
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def oracle_cross_entropy(logits, targets, label_smoothing=0.0):
    classes = logits.shape[-1]
    wanted = (1 - label_smoothing) * np.eye(classes)[targets] + label_smoothing / classes
    return -(wanted * log_softmax(logits)).sum(axis=-1)


def oracle_kd(student, teacher, temperature=4.0):
    log_p, log_q = log_softmax(teacher / temperature), log_softmax(student / temperature)
    return temperature**2 * (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)


def oracle_kd_binary(student, teacher, temperature=2.0):
    s, t = (student[:, 1] - student[:, 0]) / temperature, (teacher[:, 1] - teacher[:, 0]) / temperature
    p = np.exp(-np.logaddexp(0, -t))
    return temperature**2 * ((np.logaddexp(0, s) - p * s) - (np.logaddexp(0, t) - p * t))


ORACLES = {"cross_entropy": oracle_cross_entropy, "kd": oracle_kd, "kd_binary": oracle_kd_binary}


def options_of(row):
    """The defaults, then each numeric option at the ends of its range and at a value between."""
    between = {name: low + 0.05 * (high - low) for name, (low, high) in row.ranges.items()}
    ends = [{name: end} for name, limits in row.ranges.items() for end in limits]
    return [{}, between, *ends]


CASES = [
    pytest.param(name, classes, options, id=f"{name}-{classes}-{options}")
    for name, row in LOSSES.items()
    for classes in (2, 3, 10, 1000)
    if row.classes[0] <= classes <= (row.classes[1] or classes)
    for options in options_of(row)
]
TEACHER_CASES = [case for case in CASES if LOSSES[case.values[0]].against != "targets"]


def inputs(name, classes, batch=64, seed=0, scale=3.0):
    """What the loss reads: the student's tensor, and the targets or the teacher's tensor."""
    generator = torch.Generator().manual_seed(seed)
    made = {
        "logits": lambda: scale * torch.randn(batch, classes, generator=generator),
        "targets": lambda: torch.randint(classes, (batch,), generator=generator),
    }
    return made[LOSSES[name].student](), made[LOSSES[name].against]()


def wide(against):
    """As numpy: logits in float64, targets as they are."""
    return against.double().numpy() if against.is_floating_point() else against.numpy()


def rounding(options):
    """How far a value may be from the exact one: logits are about 10, and a KL is multiplied by T^2."""
    return 1e-5 + 2e-6 * options.get("temperature", 4.0) ** 2


def test_the_cases_cover_the_whole_table():
    assert sorted(LOSSES) == sorted(ORACLES) == ["cross_entropy", "kd", "kd_binary"]
    assert len(CASES) == 4 * 4 + 4 * 4 + 4
    assert len(TEACHER_CASES) == 4 * 4 + 4


@pytest.mark.parametrize("name", LOSSES)
def test_every_numeric_option_has_a_range_that_holds_its_default(name):
    row = LOSSES[name]
    _, _, *options = inspect.signature(row.function).parameters.values()
    assert all(option.kind is option.KEYWORD_ONLY for option in options)
    numeric = {option.name: option.default for option in options if option.annotation in (int, float)}
    assert row.ranges.keys() == numeric.keys()
    assert all(row.ranges[option][0] <= default <= row.ranges[option][1] for option, default in numeric.items())


@pytest.mark.parametrize("name", LOSSES)
def test_every_row_names_fields_that_exist(name):
    row = LOSSES[name]
    assert row.student in StudentOutput._fields
    assert row.against == "targets" or row.against in TeacherSignal._fields
    assert row.function.__name__ == name


# ------------------------------------------------------------------------------------------ properties of each loss


@pytest.mark.parametrize("name, classes, options", CASES)
def test_equals_the_float64_oracle(name, classes, options):
    student, against = inputs(name, classes)
    exact = ORACLES[name](student.double().numpy(), wide(against), **options)
    values = LOSSES[name].function(student, against, **options)
    assert values.shape == (64,)
    np.testing.assert_allclose(values.numpy(), exact, rtol=1e-5, atol=rounding(options))


@pytest.mark.parametrize("name, classes, options", CASES)
def test_gradient_equals_that_of_the_oracle(name, classes, options):
    student, against = inputs(name, classes, batch=4)
    student.requires_grad_()
    LOSSES[name].function(student, against, **options).sum().backward()
    exact = student.detach().double().numpy()
    for column in range(min(classes, 5)):
        nudge = np.zeros_like(exact)
        nudge[:, column] = h = 1e-4 * options.get("temperature", 1.0)
        above, below = (ORACLES[name](logits, wide(against), **options) for logits in (exact + nudge, exact - nudge))
        slope = (above - below) / (2 * h)
        np.testing.assert_allclose(student.grad[:, column].numpy(), slope, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name, classes, options", CASES)
def test_any_precision_in_is_float32_out_and_computed_in_it(name, classes, options, dtype):
    student, against = inputs(name, classes)
    student = student.to(dtype)
    against = against.to(dtype) if against.is_floating_point() else against
    against_in_float32 = against.float() if against.is_floating_point() else against
    values = LOSSES[name].function(student, against, **options)
    assert values.dtype == torch.float32
    assert torch.equal(values, LOSSES[name].function(student.float(), against_in_float32, **options))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(values, LOSSES[name].function(student, against, **options))


@pytest.mark.parametrize("name, classes, options", CASES)
def test_adding_a_constant_to_a_row_changes_nothing(name, classes, options):
    student, against = inputs(name, classes)
    shift = torch.linspace(-50, 50, 64)[:, None]
    function = LOSSES[name].function
    values = function(student, against, **options)
    # A shift of 50 rounds the logits themselves to 2^-19, which T < 1 magnifies.
    tolerance = {"rtol": 1e-4, "atol": 10 * rounding(options)}
    torch.testing.assert_close(function(student + shift, against, **options), values, **tolerance)
    if against.is_floating_point():
        torch.testing.assert_close(function(student, against + shift, **options), values, **tolerance)


@pytest.mark.parametrize("name, classes, options", CASES)
def test_is_never_negative(name, classes, options):
    for scale in (0.01, 1.0, 30.0):
        student, against = inputs(name, classes, batch=512, scale=scale)
        assert LOSSES[name].function(student, against, **options).min() >= -rounding(options)


@pytest.mark.parametrize("name, classes, options", CASES)
def test_each_row_is_computed_by_itself(name, classes, options):
    student, against = inputs(name, classes, batch=8)
    function = LOSSES[name].function
    values = function(student, against, **options)
    order = torch.tensor([3, 3, 0, 7])
    torch.testing.assert_close(function(student[order], against[order], **options), values[order], rtol=1e-6, atol=1e-6)
    assert function(student[:0], against[:0], **options).shape == (0,)


@pytest.mark.parametrize("name, classes, options", TEACHER_CASES)
def test_saying_the_same_as_the_teacher_is_the_minimum(name, classes, options):
    other, teacher = inputs(name, classes)
    function = LOSSES[name].function
    student = teacher.clone().requires_grad_()
    match = function(student, teacher, **options)
    assert torch.equal(match, torch.zeros(64))
    match.sum().backward()
    assert student.grad.abs().max() <= 2e-7 * options.get("temperature", 4.0)
    assert (function(other, teacher, **options) > rounding(options)).float().mean() > 0.4  # at T = 0.1 argmax is all
    nearer = [function(torch.lerp(other, teacher, step), teacher, **options).mean() for step in (0, 0.25, 0.5, 0.75, 1)]
    assert nearer == sorted(nearer, reverse=True)


@pytest.mark.parametrize("name, classes, options", CASES)
def test_extreme_logits_give_finite_values_and_gradients(name, classes, options):
    big = 1e4
    rows = [[big] + [-big] * (classes - 1), [-big] + [big] * (classes - 1), [big] * classes, [0.0] * classes]
    pairs = [(s, t) for s in rows for t in rows]
    student = torch.tensor([s for s, _ in pairs], requires_grad=True)
    against = torch.tensor([t for _, t in pairs])
    if LOSSES[name].against == "targets":
        against = torch.arange(len(pairs)) % classes
    values = LOSSES[name].function(student, against, **options)
    values.sum().backward()
    assert values.isfinite().all() and student.grad.isfinite().all()
    assert values.max() > 1000  # confidently wrong is expensive


@pytest.mark.parametrize("name, classes, options", CASES)
def test_an_infinite_logit_of_the_student_is_never_nan(name, classes, options):
    student, against = inputs(name, classes, batch=8)
    student[:, 0] = -INF
    agrees, wants_it = slice(0, 4), slice(4, 8)
    if against.is_floating_point():
        against[agrees, 0], against[wants_it, 0] = -1e5, 10
    else:
        against[agrees], against[wants_it] = 1, 0
    student.requires_grad_()
    values = LOSSES[name].function(student, against, **options)
    values.sum().backward()
    assert torch.equal(values[wants_it], torch.full((4,), INF))
    # Smoothing wants every class a little.
    assert values[agrees].isinf().all() if options.get("label_smoothing") else values[agrees].isfinite().all()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", ["kd", "kd_binary"])
@pytest.mark.parametrize("shape", [(8, 1), (1, 2), (8, 3)])
def test_shapes_that_would_broadcast_are_refused(name, shape):
    match = r"the student's logits have shape \(.*\) and the teacher's \(8, 2\); both models must have one logit for"
    with pytest.raises(ModelError, match=match):
        LOSSES[name].function(torch.zeros(shape), torch.zeros(8, 2))


def test_kd_binary_refuses_another_number_of_classes():
    with pytest.raises(ModelError, match="loss 'kd_binary': needs logits of 2 classes, not 3; use 'kd'"):
        kd_binary(torch.zeros(8, 3), torch.zeros(8, 3))


# ---------------------------------------------------------------------------------------- against other formulations


def test_cross_entropy_equals_the_mean_of_torch():
    logits, targets = inputs("cross_entropy", 10)
    for smoothing in (0.0, 0.1):
        ours = cross_entropy(logits, targets, label_smoothing=smoothing).mean()
        torch.testing.assert_close(ours, F.cross_entropy(logits, targets, label_smoothing=smoothing))
    assert cross_entropy(torch.zeros(1, 8), torch.tensor([3])).item() == pytest.approx(math.log(8))


def test_kd_equals_the_batchmean_of_torch():
    student, teacher = inputs("kd", 10)
    q, p = torch.log_softmax(student / 3, dim=1), torch.softmax(teacher / 3, dim=1)
    reference = 9 * F.kl_div(q, p, reduction="batchmean")
    torch.testing.assert_close(kd(student, teacher, temperature=3.0).mean(), reference)


def test_kd_binary_equals_the_stated_formula_with_torch():
    student, teacher = inputs("kd_binary", 2)
    s, t = (student[:, 1] - student[:, 0]) / 2, (teacher[:, 1] - teacher[:, 0]) / 2
    p = torch.sigmoid(t)
    reference = 4 * (
        F.binary_cross_entropy_with_logits(s, p, reduction="none")
        - F.binary_cross_entropy_with_logits(t, p, reduction="none")
    )
    torch.testing.assert_close(kd_binary(student, teacher), reference, rtol=1e-5, atol=1e-5)


logit = st.floats(-30, 30, width=32)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(logit, logit, logit, logit), min_size=1, max_size=8), st.sampled_from([0.5, 1.0, 4.0, 20.0]))
def test_kd_binary_is_kd_of_two_classes(rows, temperature):
    both = torch.tensor(rows, dtype=torch.float32)
    student, teacher = both[:, :2], both[:, 2:]
    slack = 2e-6 * temperature**2 + 1e-6
    one, other = (loss(student, teacher, temperature=temperature) for loss in (kd_binary, kd))
    torch.testing.assert_close(one, other, rtol=2e-5, atol=slack)


def test_kd_binary_sees_only_the_margin():
    teacher = torch.tensor([[0.0, 1.5], [0.0, -2.0]])
    same_margins = torch.tensor([[7.0, 8.5], [3.0, 1.0]])
    student = torch.tensor([[0.0, 0.3], [1.0, 2.0]])
    torch.testing.assert_close(kd_binary(student, same_margins), kd_binary(student, teacher))


def test_kd_binary_tends_to_an_eighth_of_the_squared_margin_difference():
    margins = torch.linspace(-1, 1, 9)
    s, t = torch.meshgrid(margins, margins, indexing="ij")
    student, teacher = (torch.stack([torch.zeros(81), m.flatten()], dim=1) for m in (s, t))
    expected = (s - t).flatten() ** 2 / 8
    torch.testing.assert_close(kd_binary(student, teacher, temperature=20.0), expected, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("name, classes", [("kd", 2), ("kd", 10), ("kd", 100), ("kd_binary", 2)])
def test_the_size_of_the_gradient_does_not_fall_with_the_temperature(name, classes):
    """For T -> infinity the gradient of kd tends to (s - t) / C, both centred; without T^2 it would fall 100 times."""
    student, teacher = inputs(name, classes, scale=1.0)
    student.requires_grad_()
    difference = student.detach() - teacher
    limit = (difference - difference.mean(dim=1, keepdim=True)) / classes
    for temperature in (10.0, 100.0):
        loss = LOSSES[name].function(student, teacher, temperature=temperature).sum()
        (gradient,) = torch.autograd.grad(loss, student)
        assert (gradient - limit).norm() / limit.norm() < 2 / temperature


def test_the_gradient_of_kd_is_the_stated_one():
    student, teacher = inputs("kd", 10)
    student.requires_grad_()
    kd(student, teacher, temperature=4.0).sum().backward()
    expected = 4 * (torch.softmax(student.detach() / 4, dim=1) - torch.softmax(teacher / 4, dim=1))
    torch.testing.assert_close(student.grad, expected, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ the objective

BOTH = {"cross_entropy": {"weight": 0.1, "label_smoothing": 0.1}, "kd": {"weight": 0.9, "temperature": 3.0}}


def batch_of(rows, classes=10, total=None, seed=0, valid=None):
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        keys=tuple(f"k{i}" for i in range(rows)),
        images=torch.zeros(rows, 3, 2, 2, dtype=torch.uint8),
        targets=torch.randint(classes, (rows,), generator=generator),
        valid=torch.ones(rows, dtype=torch.bool) if valid is None else torch.tensor(valid),
        total=total or rows,
        signals=TeacherSignal(3 * torch.randn(rows, classes, generator=generator)),
    )


def logits_for(batch, seed=1):
    shape = batch.signals.logits.shape
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).requires_grad_()


def rows_of(batch, rows):
    """A part of a batch, of the same step: `total` stays."""
    return batch._replace(
        keys=tuple(f"k{i}" for i in torch.arange(len(batch.keys))[rows]),
        images=batch.images[rows],
        targets=batch.targets[rows],
        valid=batch.valid[rows],
        signals=TeacherSignal(batch.signals.logits[rows]),
    )


def test_the_objective_is_the_weighted_mean_of_its_terms():
    batch = batch_of(16)
    logits = logits_for(batch)
    loss, terms = Objective(BOTH, epochs=10)(StudentOutput(logits), batch, epoch=0.0)
    assert list(terms) == ["cross_entropy", "kd"]
    torch.testing.assert_close(terms["cross_entropy"], F.cross_entropy(logits, batch.targets, label_smoothing=0.1))
    torch.testing.assert_close(terms["kd"], kd(logits, batch.signals.logits, temperature=3.0).mean())
    torch.testing.assert_close(loss, 0.1 * terms["cross_entropy"] + 0.9 * terms["kd"])
    assert loss.shape == () and loss.dtype == torch.float32 and loss.requires_grad
    assert not any(term.requires_grad for term in terms.values())


def test_a_left_out_weight_is_one_and_a_step_without_teacher_needs_no_signals():
    batch = batch_of(4)._replace(signals=None)
    logits = torch.randn(4, 10)
    loss, terms = Objective({"cross_entropy": {}}, epochs=1)(StudentOutput(logits), batch, epoch=0.5)
    torch.testing.assert_close(loss, F.cross_entropy(logits, batch.targets))
    torch.testing.assert_close(loss, terms["cross_entropy"])


def test_weights_follow_their_schedules():
    rising, falling = {"linear": {"start": 0, "end": 1}}, {"step": {"values": [0.95, 0.85, 0.75], "every": 5}}
    objective = Objective({"cross_entropy": {"weight": rising}, "kd": {"weight": falling}}, epochs=20)
    assert objective.weights(0.0) == {"cross_entropy": 0.0, "kd": 0.95}
    assert objective.weights(5.0) == {"cross_entropy": 0.25, "kd": 0.85}
    assert objective.weights(15.0) == {"cross_entropy": 0.75, "kd": 0.75}
    batch = batch_of(8)
    loss, terms = objective(StudentOutput(logits_for(batch)), batch, epoch=5.0)
    torch.testing.assert_close(loss, 0.25 * terms["cross_entropy"] + 0.85 * terms["kd"])


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_delivered_twice_gives_the_same_loss(name):
    classes = LOSSES[name].classes[1] or 10
    batch = batch_of(8, classes)
    logits = logits_for(batch)
    every_row_twice = torch.arange(8).repeat(2)
    objective = Objective({name: {}}, epochs=1)
    once, _ = objective(StudentOutput(logits), batch, 0.0)
    twice = rows_of(batch, every_row_twice)._replace(total=16)
    doubled, _ = objective(StudentOutput(logits[every_row_twice]), twice, 0.0)
    torch.testing.assert_close(doubled, once)


@pytest.mark.parametrize("cut", [0, 1, 4, 7])
def test_the_shares_of_a_step_add_up_to_the_whole(cut):
    batch = batch_of(7, total=7)
    logits = logits_for(batch)
    objective = Objective(BOTH, epochs=10)
    whole, whole_terms = objective(StudentOutput(logits), batch, 3.0)
    (whole_gradient,) = torch.autograd.grad(whole, logits)
    cuts = slice(0, cut), slice(cut, 7)
    shares = [objective(StudentOutput(logits[rows]), rows_of(batch, rows), 3.0) for rows in cuts]
    (gradient,) = torch.autograd.grad(sum(loss for loss, _ in shares), logits)
    torch.testing.assert_close(sum(loss for loss, _ in shares), whole)
    torch.testing.assert_close(gradient, whole_gradient)
    for name, term in whole_terms.items():
        torch.testing.assert_close(shares[0][1][name] + shares[1][1][name], term)


@pytest.mark.parametrize("name", LOSSES)
def test_rows_that_are_not_valid_add_exactly_nothing(name):
    classes = LOSSES[name].classes[1] or 10
    full = batch_of(6, classes, total=100)
    logits = logits_for(full)
    objective = Objective({name: {}}, epochs=1)
    alone, _ = objective(StudentOutput(logits[:4]), rows_of(full, slice(0, 4)), 0.0)
    (alone_gradient,) = torch.autograd.grad(alone, logits)

    garbage = logits.detach().clone()
    garbage[4], garbage[5] = 1e30, -1e30
    garbage[5, 0] = 1e30
    garbage.requires_grad_()
    masked = full._replace(valid=torch.tensor([True] * 4 + [False] * 2))
    loss, terms = objective(StudentOutput(garbage), masked, 0.0)
    loss.backward()
    assert torch.equal(loss, alone) and torch.equal(terms[name], alone.detach())
    assert torch.equal(garbage.grad, alone_gradient)
    assert torch.equal(garbage.grad[4:], torch.zeros(2, classes))


def test_an_empty_share_has_a_zero_loss_with_a_zero_gradient():
    batch = batch_of(1, total=31, valid=[False])
    logits = logits_for(batch)
    loss, terms = Objective(BOTH, epochs=1)(StudentOutput(logits), batch, 0.0)
    loss.backward()
    assert loss.item() == 0 and [term.item() for term in terms.values()] == [0, 0]
    assert torch.equal(logits.grad, torch.zeros(1, 10))


def test_a_new_loss_is_a_function_and_a_row_and_is_computed_in_float32_under_autocast(monkeypatch):
    def product(student, teacher, *, power: int = 1):
        return (student.float() @ teacher.float().T).diagonal() ** power

    row = Loss(product, "logits", "logits", tasks=("classification",), classes=(3, 20), ranges={"power": (1, 2)})
    monkeypatch.setitem(LOSSES, "product", row)
    losses = {"product": {"power": 2, "weight": 0.5}}
    check_losses(losses, "classification", 10)
    batch = batch_of(8)
    output = StudentOutput(logits_for(batch).detach())
    plain, _ = Objective(losses, epochs=1)(output, batch, 0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast, terms = Objective(losses, epochs=1)(output, batch, 0.0)
    assert torch.equal(plain, under_autocast) and terms["product"].dtype == torch.float32
    torch.testing.assert_close(plain, 0.5 * ((output.logits * batch.signals.logits).sum(1) ** 2).mean())
    with pytest.raises(RecipeError, match="is for classification with 3 to 20 classes, not for classification with 21"):
        check_losses(losses, "classification", 21)


def test_gradient_descent_on_kd_finds_the_teacher():
    batch = batch_of(16)
    logits = logits_for(batch)
    objective = Objective({"kd": {"temperature": 2.0}}, epochs=1)
    optimizer = torch.optim.SGD([logits], lr=5.0)
    for _ in range(300):
        optimizer.zero_grad()
        loss, _ = objective(StudentOutput(logits), batch, 0.0)
        loss.backward()
        optimizer.step()
    found, wanted = torch.softmax(logits.detach(), 1), torch.softmax(batch.signals.logits, 1)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.01)


# ------------------------------------------------------------------------------------------- what a recipe may write


def test_signals_needed():
    assert signals_needed({"cross_entropy": {}}) == set()
    assert signals_needed(BOTH) == {"logits"}
    assert signals_needed({}) == set()


@pytest.mark.parametrize(
    "losses, classes",
    [
        (BOTH, 10),
        ({"kd_binary": {"temperature": 2}, "cross_entropy": {}}, 2),
        ({"kd": {}}, 2),
        ({"kd": {"weight": {"cosine": {"start": 0, "end": 0.9}}}}, 1000),
    ],
)
def test_sound_losses_pass(losses, classes):
    check_losses(losses, "classification", classes)


WRONG = [
    ({}, "no loss is named; known: cross_entropy, kd, kd_binary"),
    ({"cross_entopy": {}}, "unknown loss 'cross_entopy'; did you mean 'cross_entropy'?"),
    ({"mse": {}}, "unknown loss 'mse'; known: cross_entropy, kd, kd_binary"),
    ({"kd": {"temprature": 2}}, "loss 'kd': unknown option 'temprature'; did you mean 'temperature'?"),
    ({"kd": {"weigth": 2}}, "loss 'kd': unknown option 'weigth'; did you mean 'weight'?"),
    ({"kd": {"teacher": 2}}, "loss 'kd': unknown option 'teacher'; known: temperature, weight"),
    ({"kd": {"temperature": "hot"}}, "loss 'kd': option 'temperature' must be a number, not 'hot'"),
    ({"kd": {"temperature": True}}, "loss 'kd': option 'temperature' must be a number, not True"),
    ({"kd": {"temperature": 0}}, "loss 'kd': option 'temperature' must be from 0.1 to 100, not 0"),
    ({"kd": {"temperature": math.nan}}, "loss 'kd': option 'temperature' must be from 0.1 to 100, not nan"),
    (
        {"cross_entropy": {"label_smoothing": 1.5}},
        "loss 'cross_entropy': option 'label_smoothing' must be from 0 to 0.9, not 1.5",
    ),
    (
        {"kd_binary": {}},
        "loss 'kd_binary': is for classification with exactly 2 classes, not for classification with 10; "
        "losses that fit: cross_entropy, kd",
    ),
    ({"kd": {"weight": -1}}, "loss 'kd': weight: 'value' must be finite and not negative, not -1"),
    ({"cross_entropy": {}, "kd": {"weight": "high"}}, "loss 'kd': weight: must be a number or one schedule"),
    ({"kd": {"weight": {"linaer": {}}}}, "loss 'kd': weight: unknown schedule 'linaer'; did you mean 'linear'?"),
]


@pytest.mark.parametrize("losses, message", WRONG, ids=[message[:60] for _, message in WRONG])
def test_what_cannot_be_meant_is_refused_in_one_sentence(losses, message):
    with pytest.raises(RecipeError) as caught:
        check_losses(losses, "classification", 10)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("task, classes", [("regression", 10), ("classification", 1)])
def test_another_task_and_too_few_classes_are_refused(task, classes):
    message = f"is for classification with at least 2 classes, not for {task} with {classes}; losses that fit: none"
    with pytest.raises(RecipeError, match=f"^loss 'kd': {message}$"):
        check_losses({"kd": {}}, task, classes)
