"""Every loss of the table against an oracle and the properties that its kind must have; then the objective."""

import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import CASES, NEEDED, ORACLES, cases, function_of, inputs, rounding, unlabelled_last, void_some, wide
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kd_dist.batch import Batch, StudentOutput, TeacherSignal
from kd_dist.errors import ModelError, RecipeError
from kd_dist.losses import LOSSES, Objective, check_losses, signals_needed, suits
from kd_dist.losses.logits import cross_entropy, kd, kd_binary
from kd_dist.losses.table import Loss

INF = math.inf
NAMES = ["ail", "at", "ccc", "cosine", "cross_entropy", "cwd", "cwd_features", "dist", "dkd", "hard_label", "hint"]
NAMES += ["huber", "kd", "kd_binary", "kd_ccc", "kd_huber", "kd_mse", "kd_pixel", "logit_mse", "logit_std", "mse"]
NAMES += ["rkd", "saliency", "sp", "teacher_bounded"]
# Of those that are least where both say the same; a hard label is not what its teacher says.
TEACHER_CASES = cases(
    lambda name, row, shapes: row.against != "targets" and shapes[0][1:] == shapes[1][1:] and name != "hard_label"
)
ROW_CASES = cases(lambda name, row, shapes: not row.relational)
LOGIT_CASES = cases(lambda name, row, shapes: row.student == "logits" and "regression" not in row.tasks)
VECTOR_LOGIT_CASES = [case for case in LOGIT_CASES if len(case.values[1][0]) == 1]
# Of those that are infinite where the student rules out what is so; the others have means or variances of logits.
LIKELIHOOD_CASES = [case for case in VECTOR_LOGIT_CASES if case.values[0] not in ("dist", "logit_mse", "logit_std")]
OUTPUT_CASES = cases(lambda name, row, shapes: row.tasks == ("regression",))
FEATURE_CASES = cases(lambda name, row, shapes: row.against == "features")


# ------------------------------------------------------------------------------------------------- the table's cases


def test_the_cases_cover_the_whole_table():
    assert sorted(LOSSES) == sorted(ORACLES) == NAMES
    shaped = {"logit_mse": 4, "hard_label": 4, "logit_std": 3 * 4, "dkd": 3 * 8, "dist": 3 * 8}
    assert {name: len(cases(lambda one, *_, name=name: one == name)) for name in shaped} == shaped
    new = sum(shaped.values())
    vectors, maps, features = 4 * 4 + 4 * 4 + 4 + new, 2 * 4 * 4 * 3, 5 * 4 + 6 * 2 + 5 * 2 + 7 + 7 * 6
    outputs = 3 * (4 * 4 + 4)
    assert len(CASES) == vectors + maps + features + outputs and len(OUTPUT_CASES) == outputs
    assert len(VECTOR_LOGIT_CASES) == vectors and len(LOGIT_CASES) == vectors + maps and len(FEATURE_CASES) == features
    assert len(ROW_CASES) == len(CASES) - 7 - 7 * 6 - 2 * 3 - shaped["dist"]
    taught = 4 * 4 + 4 + new - shaped["hard_label"] - shaped["dkd"]
    assert len(TEACHER_CASES) == taught + 2 * 2 * 4 + 2 * 4 + 3 * 2 + 2 * 2 + 3 + 3 * 6 + 3 * (4 + 2)


@pytest.mark.parametrize("name", LOSSES)
def test_every_numeric_option_has_a_range_that_holds_its_default(name):
    row = LOSSES[name]
    options = list(inspect.signature(row.function).parameters.values())[3 if row.with_teacher else 2 :]
    assert all(option.kind is option.KEYWORD_ONLY for option in options)
    numeric = {option.name: option.default for option in options if option.annotation in (int, float, float | None)}
    assert row.ranges.keys() == numeric.keys()
    known = {option: NEEDED.get(name, {}).get(option, default) for option, default in numeric.items()}
    assert all(row.ranges[option][0] <= value <= row.ranges[option][1] for option, value in known.items())


@pytest.mark.parametrize("name", LOSSES)
def test_every_row_names_fields_that_exist(name):
    row = LOSSES[name]
    assert row.student in StudentOutput._fields
    assert row.against == "targets" or row.against in TeacherSignal._fields
    assert (row.student == "logits") == (row.against != "features")
    assert row.function.__name__ == name
    assert not row.with_teacher or (row.against == "targets" and not row.relational)
    assert row.relational or not row.gather


@pytest.mark.parametrize(
    ("task", "classes", "names"),
    [
        ("classification", 2, "cross_entropy hard_label kd kd_binary logit_mse"),
        ("classification", 3, "cross_entropy dist dkd hard_label kd logit_mse logit_std"),
        ("segmentation", 21, "cross_entropy cwd kd_pixel"),
        ("regression", 1, "ail ccc huber kd_ccc kd_huber kd_mse mse teacher_bounded"),
        ("sound", 2, ""),
    ],
)
def test_which_losses_on_outputs_suit_a_task(task, classes, names):
    suited = [name for name, row in LOSSES.items() if suits(row, task, classes)]
    assert sorted(name for name in suited if LOSSES[name].against != "features") == names.split()
    for name in suited:
        check_losses({name: {}}, task, classes, ["f"])


# ------------------------------------------------------------------------------------------ properties of each loss


@pytest.mark.parametrize("name, shapes, options", CASES)
def test_equals_the_float64_oracle(name, shapes, options):
    student, against = inputs(name, shapes)
    exact = ORACLES[name](student.double().numpy(), wide(against), **options)
    values = function_of(name)(student, against, **options)
    assert values.shape == (() if LOSSES[name].relational else (64,))
    np.testing.assert_allclose(values.numpy(), exact, rtol=1e-5, atol=rounding(name, options))


@pytest.mark.parametrize("name, shapes, options", CASES)
def test_gradient_equals_that_of_the_oracle(name, shapes, options):
    student, against = inputs(name, shapes, batch=4)
    student.requires_grad_()
    function_of(name)(student, against, **options).sum().backward()
    exact = student.detach().double().numpy()
    nudges = [np.zeros_like(exact) for _ in range(min(shapes[0][0], 5))]
    for channel, nudge in enumerate(nudges):
        nudge[:, channel] = 1
    h = 1e-4 * options.get("temperature", 1.0)
    for nudge in [*nudges, np.random.default_rng(0).normal(size=exact.shape)]:
        above, below = (
            ORACLES[name](tensor, wide(against), **options) for tensor in (exact + h * nudge, exact - h * nudge)
        )
        slope = (above - below) / (2 * h)
        ours = (student.grad.numpy() * nudge).reshape(4, -1).sum(axis=1)
        ours = ours.sum() if LOSSES[name].relational else ours
        np.testing.assert_allclose(ours, slope, rtol=1e-3, atol=3 * rounding(name, options))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name, shapes, options", CASES)
def test_any_precision_in_is_float32_out_and_computed_in_it(name, shapes, options, dtype):
    student, against = inputs(name, shapes)
    student = student.to(dtype)
    against = against.to(dtype) if against.is_floating_point() else against
    against_in_float32 = against.float() if against.is_floating_point() else against
    values = function_of(name)(student, against, **options)
    assert values.dtype == torch.float32
    assert torch.equal(values, function_of(name)(student.float(), against_in_float32, **options))
    if not LOSSES[name].relational:  # their matrix products need what Objective does
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(values, function_of(name)(student, against, **options))


@pytest.mark.parametrize("name, shapes, options", LOGIT_CASES)
def test_adding_a_constant_to_the_logits_of_a_place_changes_nothing(name, shapes, options):
    student, against = inputs(name, shapes)
    function = function_of(name)
    values = function(student, against, **options)
    # A shift of 50 rounds the logits themselves to 2^-19, which T < 1 magnifies.
    tolerance = {"rtol": 1e-4, "atol": 10 * rounding(name, options)}

    def shifted(logits):
        places = logits[:, :1]
        return logits + torch.linspace(-50, 50, places.numel()).reshape(places.shape)

    torch.testing.assert_close(function(shifted(student), against, **options), values, **tolerance)
    if LOSSES[name].with_teacher:  # behind the column of labels
        against = torch.cat([against[:, :1], shifted(against[:, 1:])], dim=1)
        torch.testing.assert_close(function(student, against, **options), values, **tolerance)
    elif against.is_floating_point():
        torch.testing.assert_close(function(student, shifted(against), **options), values, **tolerance)


@pytest.mark.parametrize("name, shapes, options", CASES)
def test_is_never_negative(name, shapes, options):
    for scale in (0.01, 1.0, 30.0):
        student, against = inputs(name, shapes, scale=scale)
        assert function_of(name)(student, against, **options).min() >= -rounding(name, options)


@pytest.mark.parametrize("name, shapes, options", ROW_CASES)
def test_each_row_is_computed_by_itself(name, shapes, options):
    student, against = inputs(name, shapes, batch=8)
    function = function_of(name)
    values = function(student, against, **options)
    order = torch.tensor([3, 3, 0, 7])
    torch.testing.assert_close(function(student[order], against[order], **options), values[order], rtol=1e-6, atol=1e-6)
    assert function(student[:0], against[:0], **options).shape == (0,)


@pytest.mark.parametrize("name, shapes, options", TEACHER_CASES)
def test_saying_the_same_as_the_teacher_is_the_minimum(name, shapes, options):
    other, teacher = inputs(name, (shapes[1], shapes[1]))
    function = function_of(name)
    student = teacher.clone().requires_grad_()
    match = function(student, teacher, **options)
    assert torch.equal(match, torch.zeros_like(match))
    match.sum().backward()
    assert student.grad.abs().max() <= 2e-7 * options.get("temperature", 4.0)
    # At T = 0.1 argmax is all.
    assert (function(other, teacher, **options) > rounding(name, options)).float().mean() > 0.4
    nearer = [function(torch.lerp(other, teacher, step), teacher, **options).mean() for step in (0, 0.25, 0.5, 0.75, 1)]
    assert nearer == sorted(nearer, reverse=True)


@pytest.mark.parametrize("name, shapes, options", LOGIT_CASES)
def test_extreme_logits_give_finite_values_and_gradients(name, shapes, options):
    big, (classes, *grid) = 1e4, shapes[0]
    rows = [[big] + [-big] * (classes - 1), [-big] + [big] * (classes - 1), [big] * classes, [0.0] * classes]
    pairs = [(s, t) for s in rows for t in rows]

    def maps(rows, grid):
        """Each row at every place, but zero at the first."""
        made = torch.tensor(rows).reshape(len(rows), classes, *[1] * len(grid)).repeat(1, 1, *grid)
        if grid:
            made[:, :, 0, 0] = 0
        return made

    student = maps([s for s, _ in pairs], grid).requires_grad_()
    if LOSSES[name].with_teacher:
        against = torch.cat([torch.arange(len(pairs))[:, None] % 2, maps([t for _, t in pairs], ())], dim=1)
    elif LOSSES[name].against == "targets":
        against = torch.arange(len(pairs)).reshape(-1, *[1] * len(grid)).repeat(1, *shapes[1]) % classes
    else:
        against = maps([t for _, t in pairs], shapes[1][1:])
    values = function_of(name)(student, against, **options)
    values.sum().backward()
    assert values.isfinite().all() and student.grad.isfinite().all()
    # Confidently wrong is expensive; CWD has the mean over classes, most of which are the same everywhere, and what
    # has been brought to one scale has a bound.
    if name not in ("dist", "logit_std"):
        assert values.max() > (min(1000, 400 * options.get("temperature", 4)) if name == "cwd" else 1000)


@pytest.mark.parametrize("name, shapes, options", FEATURE_CASES)
def test_extreme_features_give_finite_values_and_gradients(name, shapes, options):
    def maps(shape):
        one = torch.zeros(shape)
        one.view(-1)[0] = 1e4
        return [torch.zeros(shape), torch.full(shape, 1e4), torch.full(shape, -1e4), one, torch.full(shape, 1e-30)]

    pairs = [(s, t) for s in maps(shapes[0]) for t in maps(shapes[1])]
    student = torch.stack([s for s, _ in pairs]).requires_grad_()
    against = torch.stack([t for _, t in pairs])
    parts = [slice(0, 25)] if LOSSES[name].relational else []
    for part in [*parts, slice(0, 2), slice(0, 5), slice(6, 7), slice(0, 25)]:  # 0:5, a student that is dead
        student.grad = None
        values = function_of(name)(student[part], against[part], **options)
        values.sum().backward()
        assert values.isfinite().all() and student.grad.isfinite().all()
        if name != "cwd_features":  # the rest compare directions: nothing grows with the scale of a feature
            assert student.grad.abs().max() <= 1 + 1e-2 * sum(options.values())


def test_saying_the_same_as_the_teacher_is_the_minimum_of_dkd_whatever_the_label():
    other, both = inputs("dkd", ((10,), (11,)))
    student = both[:, 1:].clone().requires_grad_()
    match = function_of("dkd")(student, both)
    assert torch.equal(match, torch.zeros(64))
    match.sum().backward()
    assert student.grad.abs().max() <= 1e-5
    nearer = [function_of("dkd")(torch.lerp(other, both[:, 1:], step), both).mean() for step in (0, 0.25, 0.5, 0.75, 1)]
    assert nearer == sorted(nearer, reverse=True) and nearer[0] > 1


@pytest.mark.parametrize("name, shapes, options", LIKELIHOOD_CASES)
def test_an_infinite_logit_of_the_student_is_never_nan(name, shapes, options):
    student, against = inputs(name, shapes, batch=8)
    student[:, 0] = -INF
    agrees, wants_it = slice(0, 4), slice(4, 8)
    if LOSSES[name].with_teacher:
        against[agrees, :2], against[wants_it, :2] = torch.tensor([1.0, -1e5]), torch.tensor([0.0, 30.0])
    elif against.is_floating_point():
        against[agrees, 0], against[wants_it, 0] = -1e5, 30
    else:
        against[agrees], against[wants_it] = 1, 0
    student.requires_grad_()
    values = function_of(name)(student, against, **options)
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
        function_of(name)(torch.zeros(shape), torch.zeros(8, 2))


def test_kd_binary_refuses_another_number_of_classes():
    with pytest.raises(ModelError, match="loss 'kd_binary': needs logits of 2 classes, not 3; use 'kd'"):
        kd_binary(torch.zeros(8, 3), torch.zeros(8, 3))


# ----------------------------------------------------------------------------------- where half precision is not enough


def kl_of_probabilities(s, t, T):
    return nn.KLDivLoss()(torch.log(torch.softmax(s / T, dim=1)), torch.softmax(t / T, dim=1)) * T * T


def kl_by_hand(s, t, T):
    p, q = torch.softmax(t / T, dim=1), torch.softmax(s / T, dim=1)
    return (p * (torch.log(p) - torch.log(q))).sum(dim=1).mean() * T * T


def kl_of_logarithms(s, t, T):
    p = torch.softmax(t / T, dim=1)
    return nn.KLDivLoss(reduction="batchmean")(torch.log_softmax(s / T, dim=1), p) * T * T


def bce_of_probabilities(s, t, T):
    q, p = torch.sigmoid((s[:, 1] - s[:, 0]) / T), torch.sigmoid((t[:, 1] - t[:, 0]) / T)
    return nn.BCELoss()(q, p) * T * T


def bce_by_hand(s, t, T):
    q, p = torch.sigmoid((s[:, 1] - s[:, 0]) / T), torch.sigmoid((t[:, 1] - t[:, 0]) / T)
    return -(p * torch.log(q) + (1 - p) * torch.log(1 - q)).mean() * T * T


def nll_of_probabilities(s, t, T):
    return nn.NLLLoss()(torch.log(torch.softmax(s, dim=1)), t.argmax(dim=1))


COLD = 0.3  # margin of a student that has random weights
# A formula as it is often written, the temperature, the margins of student and teacher, and where it was seen to fail:
# in half precision all through, under autocast, or in both.
NAIVE = [
    (kl_by_hand, 1, COLD, 200, "both"),  # 0 * log(0), of the teacher's probability
    (kl_by_hand, 4, COLD, -200, "both"),
    (kl_by_hand, 100, COLD, 6e4, "both"),
    (kl_of_probabilities, 1, 200, 200, "both"),  # log(0), of the student's, though both say the same
    (kl_of_probabilities, 4, 200, -200, "both"),
    (kl_of_probabilities, 20, -200, 200, "both"),  # a finite value whose gradient is not
    (kl_of_probabilities, 100, 6e4, -6e4, "both"),
    (kl_of_logarithms, 4, 6e4, -6e4, "half"),  # the product with T^2 is above 65504
    (kl_of_logarithms, 100, 6e4, 200, "half"),
    (bce_of_probabilities, 1, 200, 200, "half"),
    (bce_of_probabilities, 4, 200, -200, "both"),
    (bce_of_probabilities, 100, 200, -200, "both"),
    (bce_by_hand, 4, 200, 200, "both"),
    (bce_by_hand, 20, -200, 200, "both"),
    (nll_of_probabilities, 1, 200, -200, "both"),
    (nll_of_probabilities, 1, 6e4, -6e4, "both"),
]


def margins(*values):
    """Logits (B, 2) of these margins, in half precision."""
    return torch.tensor([[-value / 2, value / 2] for value in values], dtype=torch.float16)


def assert_exact_in_half(student, teacher, temperature, autocast):
    """Our losses on logits in half precision: values and gradients are those of float64, so they are finite."""
    exact, said = student.double().numpy(), teacher.double().numpy()
    targets = teacher.argmax(dim=1)
    known = {name: ORACLES[name](exact, said, temperature=temperature) for name in ("kd", "kd_binary")}
    known["cross_entropy"] = ORACLES["cross_entropy"](exact, targets.numpy())
    softened = [torch.softmax(logits.double() / temperature, dim=1) for logits in (student, teacher)]
    slopes = dict.fromkeys(("kd", "kd_binary"), temperature * (softened[0] - softened[1]))
    slopes["cross_entropy"] = torch.softmax(student.double(), dim=1) - F.one_hot(targets, 2)
    for name, values in known.items():
        leaf = student.clone().requires_grad_()
        options = {} if name == "cross_entropy" else {"temperature": temperature}
        with torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
            ours = function_of(name)(leaf, targets if name == "cross_entropy" else teacher, **options)
        ours.sum().backward()
        assert ours.dtype == torch.float32 and ours.isfinite().all() and leaf.grad.isfinite().all(), name
        np.testing.assert_allclose(ours.detach().numpy(), values, rtol=1e-5, atol=rounding(name, options), err_msg=name)
        torch.testing.assert_close(leaf.grad.double(), slopes[name], rtol=2e-3, atol=2e-6 * temperature, msg=name)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize("autocast", [False, True], ids=["half", "autocast"])
@pytest.mark.parametrize("formula, temperature, mine, other, where", NAIVE)
def test_where_the_usual_formula_is_not_finite_ours_is_exact(formula, temperature, mine, other, where, autocast):
    student, teacher = margins(mine), margins(other)
    leaf = student.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
        value = formula(leaf, teacher, temperature)
    value.backward()
    if where == "both" or not autocast:
        assert not (value.isfinite().all() and leaf.grad.isfinite().all())  # this is how it happens
    assert_exact_in_half(student, teacher, temperature, autocast)


@pytest.mark.parametrize("autocast", [False, True], ids=["half", "autocast"])
@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0, 100.0])
def test_logits_in_half_precision_of_any_size_give_exact_values_and_gradients(temperature, autocast):
    sizes = [0.0, COLD, 20, 200, 4e3, 6e4]
    every = [sign * size for size in sizes for sign in (1, -1)]
    pairs = [(mine, other) for mine in every for other in every]
    assert len(pairs) == 144 and margins(*every).isfinite().all()
    student, teacher = (margins(*values) for values in zip(*pairs, strict=True))
    assert_exact_in_half(student, teacher, temperature, autocast)


# ---------------------------------------------------------------------------------------- against other formulations


def test_cross_entropy_equals_the_mean_of_torch():
    logits, targets = inputs("cross_entropy", ((10,), ()))
    for smoothing in (0.0, 0.1):
        ours = cross_entropy(logits, targets, label_smoothing=smoothing).mean()
        torch.testing.assert_close(ours, F.cross_entropy(logits, targets, label_smoothing=smoothing))
    assert cross_entropy(torch.zeros(1, 8), torch.tensor([3])).item() == pytest.approx(math.log(8))


def test_kd_equals_the_batchmean_of_torch():
    student, teacher = inputs("kd", ((10,), (10,)))
    q, p = torch.log_softmax(student / 3, dim=1), torch.softmax(teacher / 3, dim=1)
    reference = 9 * F.kl_div(q, p, reduction="batchmean")
    torch.testing.assert_close(kd(student, teacher, temperature=3.0).mean(), reference)


def test_kd_binary_equals_the_stated_formula_with_torch():
    student, teacher = inputs("kd_binary", ((2,), (2,)))
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
    student, teacher = inputs(name, ((classes,), (classes,)), scale=1.0)
    student.requires_grad_()
    difference = student.detach() - teacher
    limit = (difference - difference.mean(dim=1, keepdim=True)) / classes
    for temperature in (10.0, 100.0):
        loss = LOSSES[name].function(student, teacher, temperature=temperature).sum()
        (gradient,) = torch.autograd.grad(loss, student)
        assert (gradient - limit).norm() / limit.norm() < 2 / temperature


def test_the_gradient_of_kd_is_the_stated_one():
    student, teacher = inputs("kd", ((10,), (10,)))
    student.requires_grad_()
    kd(student, teacher, temperature=4.0).sum().backward()
    expected = 4 * (torch.softmax(student.detach() / 4, dim=1) - torch.softmax(teacher / 4, dim=1))
    torch.testing.assert_close(student.grad, expected, rtol=1e-5, atol=1e-6)


def test_dkd_with_the_teacher_s_doubt_for_a_weight_is_kd():
    student, both = inputs("dkd", ((10,), (11,)))
    for row, (label, *teacher) in enumerate(both.tolist()):
        one = both[row : row + 1]
        p = torch.softmax(torch.tensor(teacher) / 2, dim=0)[int(label)]
        found = function_of("dkd")(student[row : row + 1], one, beta=float(1 - p), temperature=2.0)
        torch.testing.assert_close(found, kd(student[row : row + 1], one[:, 1:], temperature=2.0), rtol=1e-4, atol=1e-5)


def test_kd_tends_to_half_of_logit_mse():
    student, teacher = inputs("kd", ((10,), (10,)), scale=1.0)
    half = LOSSES["logit_mse"].function(student, teacher) / 2
    torch.testing.assert_close(kd(student, teacher, temperature=50.0), half, rtol=0.05, atol=0)


def test_logit_std_and_dist_leave_the_scale_of_the_student_free():
    _, teacher = inputs("logit_std", ((10,), (10,)))
    assert LOSSES["logit_std"].function(3 * teacher + 1, teacher).max() < 1e-5 < kd(3 * teacher, teacher).min()
    p = torch.softmax(teacher, dim=1)
    blurred = torch.log(0.5 * p + 0.05)  # probabilities that are a straight line of the teacher's
    assert LOSSES["dist"].function(blurred, teacher) < 1e-5 < kd(blurred, teacher).min()


@pytest.mark.parametrize("name, bound", [("logit_std", 2000.0), ("dist", 2000.0)])
def test_a_student_that_says_nothing_yet_has_a_bounded_gradient(name, bound):
    _, teacher = inputs(name, ((10,), (10,)))
    student = torch.zeros_like(teacher, requires_grad=True)
    LOSSES[name].function(student, teacher).sum().backward()
    assert 1e-3 < student.grad.abs().max() < bound


# ------------------------------------------------------------------------------------------------------ the objective

BOTH = {"cross_entropy": {"weight": 0.1, "label_smoothing": 0.1}, "kd": {"weight": 0.9, "temperature": 3.0}}


def batch_of(rows, classes=10, total=None, seed=0, valid=None, grid=(), real=False):
    """With labels; with masks of twice `grid`, a third of them void, where that is given; or with real outputs, which
    the last row lacks."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (rows, *(2 * side for side in grid)), generator=generator)
    if real:
        targets = unlabelled_last(3 * torch.randn(rows, classes, generator=generator))
    return Batch(
        keys=tuple(f"k{i}" for i in range(rows)),
        images=torch.zeros(rows, 3, 2, 2, dtype=torch.uint8),
        targets=void_some(targets, generator) if grid else targets,
        sizes=torch.tensor([targets.shape[1:]] * rows) if grid else None,
        valid=torch.ones(rows, dtype=torch.bool) if valid is None else torch.tensor(valid),
        total=total or rows,
        signals=TeacherSignal(
            logits=3 * torch.randn(rows, classes, *grid, generator=generator),
            features={
                "low": torch.randn(rows, 7, 4, 4, generator=generator),
                "high": torch.randn(rows, 6, 2, 2, generator=generator),
            },
        ),
    )


def logits_for(batch, seed=1):
    shape = batch.signals.logits.shape
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).requires_grad_()


def output_for(batch, seed=1):
    """Of a student with the features of the teacher and every projection, on other grids."""
    generator = torch.Generator().manual_seed(seed)
    grids = {"low": (6, 8), "high": (1, 2)}

    def features(channels):
        return {
            name: torch.randn(len(batch.keys), channels[name], *grid, generator=generator).requires_grad_()
            for name, grid in grids.items()
        }

    teacher = {name: value.shape[1] for name, value in batch.signals.features.items()}
    projected = {name: features(teacher) for name, row in LOSSES.items() if row.student == "projected"}
    return StudentOutput(logits_for(batch), features({"low": 5, "high": 4}), projected)


def whole_batch(name, rows, **more):
    """A batch and a student's output that the loss can be computed from."""
    row = LOSSES[name]
    real = row.tasks == ("regression",)
    grid = () if real or "classification" in row.tasks else (4, 3)
    batch = batch_of(rows, row.classes[1] or 10, grid=grid, real=real, **more)
    return batch, output_for(batch)


def only(name):
    """The losses of a recipe with one, which says what it must."""
    return {name: NEEDED.get(name, {})}


def leaves(tree):
    """Every tensor in nested tuples and mappings."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [leaf for part in (tree.values() if isinstance(tree, dict) else tree) for leaf in leaves(part)]


def mapped(function, tree):
    """The same structure with another tensor for each."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {name: mapped(function, part) for name, part in tree.items()}
    return type(tree)(*(mapped(function, part) for part in tree))


def output_rows(output, rows):
    return mapped(lambda tensor: tensor[rows], output)


def rows_of(batch, rows):
    """A part of a batch, of the same step: `total` stays."""
    return batch._replace(
        keys=tuple(f"k{i}" for i in torch.arange(len(batch.keys))[rows]),
        images=batch.images[rows],
        targets=batch.targets[rows],
        valid=batch.valid[rows],
        signals=mapped(lambda tensor: tensor[rows], batch.signals),
    )


def gradients(loss, output):
    """By leaf; zeros where the loss does not depend on it."""
    return torch.autograd.grad(loss, leaves(output), retain_graph=True, materialize_grads=True)


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
    """Not so for SP, whose mean over B^2 entries with rows of unit length falls as 1/B: half of it."""
    batch, output = whole_batch(name, 8)
    every_row_twice = torch.arange(8).repeat(2)
    objective = Objective(only(name), epochs=1)
    once, _ = objective(output, batch, 0.0)
    twice = rows_of(batch, every_row_twice)._replace(total=16)
    doubled, _ = objective(output_rows(output, every_row_twice), twice, 0.0)
    assert once > 1e-4
    torch.testing.assert_close(doubled, once / 2 if name == "sp" else once)


def whole_and_shares(losses, output, batch, cut):
    """(loss, terms) of a batch, and of its two parts; then the gradients of the first and of the parts' sum."""
    objective = Objective(losses, epochs=10)
    whole = objective(output, batch, 3.0)
    parts = [slice(0, cut), slice(cut, len(batch.keys))]
    shares = [objective(output_rows(output, rows), rows_of(batch, rows), 3.0) for rows in parts]
    return whole, shares, gradients(whole[0], output), gradients(shares[0][0] + shares[1][0], output)


@pytest.mark.parametrize("cut", [0, 1, 4, 7])
@pytest.mark.parametrize(
    "task, count, grid", [("classification", 11, ()), ("segmentation", 8, (4, 3)), ("regression", 11, ())]
)
def test_the_shares_of_a_step_add_up_to_the_whole(cut, task, count, grid):
    rows = {name: row for name, row in LOSSES.items() if task in row.tasks and not row.relational}
    losses = {name: {"weight": 0.1, **NEEDED.get(name, {})} for name in rows}
    losses.pop("kd_binary", None)
    assert len(losses) == count
    batch = batch_of(7, total=7, grid=grid, real=task == "regression")
    output = output_for(batch)
    whole, shares, whole_gradients, gradients_of_shares = whole_and_shares(losses, output, batch, cut)
    torch.testing.assert_close(sum(loss for loss, _ in shares), whole[0])
    torch.testing.assert_close(gradients_of_shares, whole_gradients)
    for name, term in whole[1].items():
        torch.testing.assert_close(shares[0][1][name] + shares[1][1][name], term)


@pytest.mark.parametrize("name", LOSSES)
def test_rows_that_are_not_valid_add_exactly_nothing(name):
    full, output = whole_batch(name, 6, total=100)
    objective = Objective(only(name), epochs=1)
    alone, _ = objective(output_rows(output, slice(0, 4)), rows_of(full, slice(0, 4)), 0.0)
    alone_gradients = gradients(alone, output)
    assert any(gradient.any() for gradient in alone_gradients)

    def spoiled(tensor):
        garbage, big = tensor.detach().clone(), 1e30 if tensor is output.logits and tensor.ndim == 2 else 1e4
        garbage[4], garbage[5] = big, -big
        garbage[5].view(-1)[0] = big
        return garbage.requires_grad_()

    spoilt = mapped(spoiled, output)
    masked = full._replace(valid=torch.tensor([True] * 4 + [False] * 2))
    loss, terms = objective(spoilt, masked, 0.0)
    assert torch.equal(loss, alone) and torch.equal(terms[name], alone.detach())
    for gradient, wanted in zip(gradients(loss, spoilt), alone_gradients, strict=True):
        assert torch.equal(gradient[:4], wanted[:4]) or LOSSES[name].student != "logits"
        torch.testing.assert_close(gradient, wanted)
        assert not gradient[4:].any()


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_reaches_what_the_student_says_and_never_the_teacher(name):
    """And only what the loss reads: every one of its features, no other loss's projection."""
    batch, output = whole_batch(name, 4)
    teacher = mapped(lambda tensor: tensor.clone().requires_grad_(), batch.signals)
    constant = batch._replace(signals=mapped(torch.Tensor.detach, teacher))
    loss, _ = Objective(only(name), epochs=1)(output, constant, 0.0)
    loss.backward()
    read = output.projected[name] if LOSSES[name].student == "projected" else getattr(output, LOSSES[name].student)
    wanted = {id(leaf) for leaf in leaves(read)}
    assert len(wanted) == (1 if LOSSES[name].student == "logits" else 2)
    for leaf in leaves(output):
        assert (leaf.grad is not None and bool(leaf.grad.any())) == (id(leaf) in wanted)
    assert all(leaf.grad is None for leaf in leaves(teacher))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_under_autocast_every_loss_is_computed_in_float32(name, dtype):
    batch, output = whole_batch(name, 4)
    half = mapped(lambda tensor: tensor.detach().to(dtype), output)
    objective = Objective(only(name), epochs=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast, _ = objective(half, batch, 0.0)
    plain, _ = objective(mapped(torch.Tensor.float, half), batch, 0.0)
    assert torch.equal(under_autocast, plain) and plain.dtype == torch.float32


@pytest.mark.parametrize("name", LOSSES)
def test_an_empty_share_has_a_zero_loss_with_a_zero_gradient(name):
    batch, output = whole_batch(name, 1, total=31, valid=[False])
    loss, terms = Objective(only(name), epochs=1)(output, batch, 0.0)
    assert loss.item() == 0 and loss.requires_grad and terms[name].item() == 0
    assert not any(gradient.any() for gradient in gradients(loss, output))


class Waits(TorchDispatchMode):
    """Notes for what the host would have to wait if tensors were on a GPU: numbers, and shapes that numbers decide. But
    for what is asked of `known`, which is on the host anyway."""

    def __init__(self, known):
        super().__init__()
        self.known, self.answers, self.found = known, [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made, aten = function(*args, **(kwargs or {})), torch.ops.aten
        if function is aten.all.default and args[0] is self.known:
            self.answers.append(made)
        asks = function is aten._local_scalar_dense.default and not any(args[0] is one for one in self.answers)
        chooses = function is aten.index.Tensor and any(one is not None and one.dtype == torch.bool for one in args[1])
        if asks or chooses or function in (aten.nonzero.default, aten.masked_select.default):
            self.found.append(function)
        return made


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_has_a_gpu_waited_for(name):
    """But `ccc`, which leaves out unlabelled rows, and must know how many they are."""
    batch, output = whole_batch(name, 4)
    with Waits(batch.valid) as waits:
        Objective(only(name), epochs=1)(output, batch, 0.0)[0].backward()
    assert bool(waits.found) == (name == "ccc") and bool(waits.answers) == (name != "ccc")


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
    assert signals_needed(BOTH) == signals_needed({"dkd": {}}) == signals_needed({"hard_label": {}}) == {"logits"}
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
    ({}, f"no loss is named; known: {', '.join(NAMES)}"),
    ({"cross_entopy": {}}, "unknown loss 'cross_entopy'; did you mean 'cross_entropy'?"),
    ({"focal": {}}, f"unknown loss 'focal'; known: {', '.join(NAMES)}"),
    ({"kd": {"features": ["low"]}}, "loss 'kd': unknown option 'features'; did you mean"),
    (
        {"cwd": {}},
        "loss 'cwd': is for segmentation with at least 2 classes, not for classification with 10; losses that",
    ),
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
        "losses that fit: cross_entropy, kd, logit_mse, hard_label, logit_std, dkd, dist, cwd_features, cosine, hint, "
        "at, saliency, sp, rkd",
    ),
    ({"dkd": {"beta": 0}}, "loss 'dkd': option 'beta' must be from 0.01 to 100, not 0"),
    ({"hard_label": {"label_smoothing": 0.1}}, "loss 'hard_label': unknown option 'label_smoothing'; known: weight"),
    ({"kd": {"weight": -1}}, "loss 'kd': weight: 'value' must be finite and not negative, not -1"),
    ({"cross_entropy": {}, "kd": {"weight": "high"}}, "loss 'kd': weight: must be a number or one schedule"),
    ({"kd": {"weight": {"linaer": {}}}}, "loss 'kd': weight: unknown schedule 'linaer'; did you mean 'linear'?"),
]


@pytest.mark.parametrize("losses, message", WRONG, ids=[message[:60] for _, message in WRONG])
def test_what_cannot_be_meant_is_refused_in_one_sentence(losses, message):
    with pytest.raises(RecipeError) as caught:
        check_losses(losses, "classification", 10)
    assert str(caught.value).startswith(message)


def test_segmentation_has_losses_of_its_own():
    check_losses({"cross_entropy": {"label_smoothing": 0.1}, "kd_pixel": {}, "cwd": {"weight": 3}}, "segmentation", 21)
    fit = "cross_entropy, kd_pixel, cwd, cwd_features, cosine, hint, at, saliency, sp, rkd"
    with pytest.raises(RecipeError, match=f"loss 'kd': .*, not for segmentation with 21; losses that fit: {fit}$"):
        check_losses({"kd": {}}, "segmentation", 21)


@pytest.mark.parametrize(
    "task, classes, fit",
    [("ranking", 10, "none"), ("classification", 1, "cwd_features, cosine, hint, at, saliency, sp, rkd")],
)
def test_another_task_and_too_few_classes_are_refused(task, classes, fit):
    message = f"is for classification with at least 2 classes, not for {task} with {classes}; losses that fit: {fit}"
    with pytest.raises(RecipeError, match=f"^loss 'kd': {message}$"):
        check_losses({"kd": {}}, task, classes)
