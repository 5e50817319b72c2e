"""Losses on features and maps: what only they must hold, and what a recipe may say about features."""

import math

import numpy as np
import oracles
import pytest
import torch
import torch.nn.functional as F
from oracles import frame, inputs

from kd_dist.batch import Batch, StudentOutput, TeacherSignal
from kd_dist.compress import Basis, FeatureCodec
from kd_dist.errors import ModelError, RecipeError
from kd_dist.losses import LOSSES, Objective, check_losses, features_read, isometric, projections, signals_needed
from kd_dist.losses.features import at, cosine, hint, rkd, saliency, sp
from kd_dist.losses.grid import on_grid
from kd_dist.losses.logits import cross_entropy, kd
from kd_dist.losses.segmentation import cwd, cwd_features, kd_pixel

FEATURE_LOSSES = sorted(name for name, row in LOSSES.items() if row.against == "features")
MAP_LOSSES = sorted([*FEATURE_LOSSES, "cwd", "kd_pixel"])
SCALE_FREE = sorted(set(FEATURE_LOSSES) - {"cwd_features"})


def pair(name, own=(4, 6), other=(4, 6), batch=6, seed=0):
    """A student's and a teacher's map."""
    channels = 5 if LOSSES[name].student == "features" else 7
    return inputs(name, ((channels, *own), (7, *other)), batch=batch, seed=seed)


def test_these_are_all():
    assert FEATURE_LOSSES == ["at", "cosine", "cwd_features", "hint", "rkd", "saliency", "sp"]
    assert len(MAP_LOSSES) == 9 and len(SCALE_FREE) == 6


# ------------------------------------------------------------------------------------------------ lengths and angles


def in_both(name, grid=(4, 6), batch=6):
    """A student's feature, or what is projected from it to 4 coordinates, and a teacher's of 9 channels: the functions
    of the student's that give the loss by coordinates, and by channels."""
    basis = Basis(torch.linspace(-1, 2, 9), torch.linalg.qr(torch.randn(9, 9, generator=seeded()))[0][:3].contiguous())
    codec = FeatureCodec("f", (9, *grid), "fp16", basis=basis)
    fields = {"f": torch.randn(batch, 3, *grid, generator=seeded()).half()}
    axes, function = frame(basis), LOSSES[name].function
    dense, compact = codec.decode(fields), codec.in_coordinates().decode(fields)
    assert dense.shape == (batch, 9, *grid) and compact.shape == (batch, 4, *grid)

    def by_channels(student):
        projected = LOSSES[name].student == "projected"
        return function(torch.einsum("cw,bw...->bc...", axes, student) if projected else student, dense)

    return lambda student: function(student, compact), by_channels


def seeded():
    return torch.Generator().manual_seed(3)


def both_ways(name, own):
    """Value and gradient by coordinates and by channels."""
    found = []
    for way in in_both(name):
        student = torch.randn(6, 4, *own, generator=seeded()).mul(2).requires_grad_()
        value = way(student)
        value.sum().backward()
        found.append((value.detach(), student.grad))
    return found


ISOMETRIC = sorted(name for name in FEATURE_LOSSES if LOSSES[name].isometric)


def test_all_but_one_see_channels_through_inner_products_alone():
    assert ISOMETRIC == ["at", "cosine", "hint", "rkd", "saliency", "sp"]
    assert not any(row.isometric for name, row in LOSSES.items() if name not in FEATURE_LOSSES)


@pytest.mark.parametrize("name", ISOMETRIC)
@pytest.mark.parametrize("own", [(4, 6), (8, 12), (2, 3)])
def test_coordinates_give_the_loss_and_the_gradient_of_channels(name, own):
    (value, gradient), (dense, reference) = both_ways(name, own)
    torch.testing.assert_close(value, dense, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6)
    assert reference.abs().max() > 1e-5


@pytest.mark.parametrize("name", sorted(set(FEATURE_LOSSES) - set(ISOMETRIC)))
def test_one_that_sees_each_channel_needs_them(name):
    (value, _), (dense, _) = both_ways(name, (4, 6))
    assert (value - dense).abs().min() > 1e-3


@pytest.mark.parametrize(
    "losses, expected",
    [
        ({"cosine": {}}, ["low", "high"]),
        ({"cosine": {"features": ["high"]}, "kd": {}}, ["high"]),
        ({"cosine": {}, "cwd_features": {"features": ["low"]}}, ["high"]),
        ({"at": {}, "cwd_features": {}}, []),
        ({"kd": {}}, []),
    ],
)
def test_a_feature_is_bound_to_its_channels_by_a_single_loss(losses, expected):
    assert isometric(losses, ["low", "high"]) == expected


# ------------------------------------------------------------------------------------------------------- one grid


@pytest.mark.parametrize("own", [(4, 6), (8, 12), (7, 9), (2, 3), (1, 1), (3, 5), (2, 20), (9, 2)])
def test_on_grid_is_the_area_mean_where_it_shrinks_and_bilinear_where_it_grows(own):
    student = inputs("cosine", ((3, *own), (3, 4, 6)), batch=2)[0]
    resized = on_grid(student, (4, 6))
    assert resized.shape == (2, 3, 4, 6)
    np.testing.assert_allclose(resized, oracles.on_grid(student.double().numpy(), (4, 6)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(on_grid(torch.full_like(student, 3.5), (4, 6)), torch.full((2, 3, 4, 6), 3.5))


def test_on_grid_leaves_the_same_grid_untouched():
    for shape in ((2, 3, 4, 6), (2, 3, 9), (2, 3)):
        student = torch.randn(shape)
        assert on_grid(student, torch.Size(shape[2:])) is student


def test_on_grid_agrees_with_the_two_resizings_of_torch():
    student = torch.randn(2, 3, 8, 8)
    assert torch.equal(on_grid(student, (4, 4)), F.avg_pool2d(student, 2))
    grown = F.interpolate(student, scale_factor=2, mode="bilinear", align_corners=False)
    assert torch.equal(on_grid(student, (16, 16)), grown)


@pytest.mark.parametrize("name", ["at", "cosine", "cwd_features", "hint", "saliency"])
@pytest.mark.parametrize("own, other", [((9,), (8,)), ((6,), (2, 3)), ((2, 3), (6,)), ((), (2, 3))])
def test_tokens_and_vectors_that_would_have_to_be_resized_are_refused(name, own, other):
    match = (
        r"the student's positions are \(.*\) and the teacher's \(.*\), and only maps of two sides can be resized; tap"
    )
    with pytest.raises(ModelError, match=match):
        LOSSES[name].function(*pair(name, own, other))


@pytest.mark.parametrize("name", ["at", "saliency", "cwd_features"])
@pytest.mark.parametrize("own", [(), (2, 3)])
def test_vectors_have_no_positions_to_compare(name, own):
    with pytest.raises(
        ModelError, match="vectors have no positions to compare; tap maps in both models, or use cosine"
    ):
        LOSSES[name].function(*pair(name, own, ()))


@pytest.mark.parametrize("name", MAP_LOSSES)
def test_another_number_of_rows_is_refused(name):
    student, teacher = pair(name)
    match = (
        r"the student's tensor has shape \(1, .*\) and the teacher's \(6, 7, 4, 6\); both must be \(B, C, \.\.\.\) with"
    )
    with pytest.raises(ModelError, match=match):
        LOSSES[name].function(student[:1], teacher)
    with pytest.raises(ModelError, match="both must be"):
        LOSSES[name].function(student[:, 0, 0, 0], teacher)


@pytest.mark.parametrize("name", ["cosine", "cwd", "cwd_features", "hint", "kd_pixel"])
def test_another_number_of_channels_is_refused(name):
    student, teacher = pair(name)
    match = (
        "the student's tensor has 1 channels and the teacher's 7; logits need one channel a class in both models, fea"
    )
    with pytest.raises(ModelError, match=match):
        LOSSES[name].function(student[:, :1], teacher)


@pytest.mark.parametrize(
    "logits, targets", [((6, 3), (6, 4, 4)), ((6, 3, 4, 4), (6,)), ((6, 3), (1,)), ((6, 3, 9), (6, 9))]
)
def test_labels_and_masks_need_logits_of_their_kind(logits, targets):
    with pytest.raises(
        ModelError, match=r"the student's logits have shape \(6, .*\) and the targets \(.*\); labels \(B,\)"
    ):
        cross_entropy(torch.zeros(logits), torch.zeros(targets, dtype=torch.int64))


# ------------------------------------------------------------------------------------- resolution, scale, other forms


def finer(maps):
    return maps.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


@pytest.mark.parametrize("name", MAP_LOSSES)
def test_twice_the_resolution_gives_the_same_value(name):
    student, teacher = pair(name)
    function = LOSSES[name].function
    torch.testing.assert_close(
        function(finer(student), finer(teacher)), function(student, teacher), rtol=1e-5, atol=1e-5
    )
    for other in ((4, 6), (2, 3), (1, 2)):  # the student's detail is averaged away
        student, teacher = pair(name, other=other)
        torch.testing.assert_close(function(finer(student), teacher), function(student, teacher), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SCALE_FREE)
def test_the_scale_of_a_feature_is_nothing(name):
    student, teacher = pair(name)
    value = LOSSES[name].function(student, teacher)
    for s, t in ((100, 1), (1, 1e-3), (1e-2, 1e3)):
        torch.testing.assert_close(LOSSES[name].function(s * student, t * teacher), value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, least, most", [("cosine", 0, 2), ("hint", 0, 4), ("at", 0, 2)])
def test_the_stated_bounds_are_reached(name, least, most):
    student = torch.zeros(2, 7, 2, 2)
    student[:, 0, 0, 0] = 3
    if name == "at":
        teacher = student.flip(2)
    else:
        student = torch.randn(2, 7, 2, 2)
        teacher = -2 * student
    torch.testing.assert_close(LOSSES[name].function(student, student), torch.full((2,), float(least)))
    torch.testing.assert_close(LOSSES[name].function(student, teacher), torch.full((2,), float(most)))


def test_cosine_equals_that_of_torch_and_hint_weighs_strong_positions_more():
    student, teacher = pair("cosine")
    torch.testing.assert_close(cosine(student, teacher), (1 - F.cosine_similarity(student, teacher)).mean(dim=(1, 2)))
    vectors = student[:, :, 0, 0], teacher[:, :, 0, 0]
    torch.testing.assert_close(hint(*vectors), 2 * cosine(*vectors))
    wrong = teacher.clone()
    wrong[:, :, 0, 0] *= -1  # wrong at one place of 24
    weak, strong = torch.ones(1, 1, 4, 6), torch.ones(1, 1, 4, 6)
    weak[..., 0, 0], strong[..., 0, 0] = 0.1, 10
    cosines = [cosine(wrong * weight, teacher * weight) for weight in (weak, strong)]
    hints = [hint(wrong * weight, teacher * weight) for weight in (weak, strong)]
    torch.testing.assert_close(cosines, [torch.full((6,), 2 / 24)] * 2)
    assert (hints[0] < 0.01).all() and (hints[1] > 2).all()


def test_a_position_without_a_direction_costs_no_gradient():
    student, teacher = pair("cosine")
    with torch.no_grad():
        student[:, :, 1, 1] = 0
        teacher[:, :, 2, 2] = 0
    student.requires_grad_()
    cosine(student, teacher).sum().backward()
    assert not student.grad[:, :, 1, 1].any() and student.grad[:, :, 2, 2].abs().max() < 1e-8
    assert student.grad[:, :, 0, 0].abs().max() > 1e-3


def test_at_is_the_published_code_times_the_positions():
    """F.normalize(f.pow(2).mean(1).view(B, -1)), and the mean of the squared difference."""
    student, teacher = pair("at")
    maps = [F.normalize(f.pow(2).mean(1).flatten(1)) for f in (student, teacher)]
    torch.testing.assert_close(at(student, teacher), 24 * (maps[0] - maps[1]).pow(2).mean(1))


def test_saliency_tells_places_apart_and_knows_a_dead_map():
    here, there = torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    here[..., 0, 0], there[..., 1, 1] = 5, 7
    assert saliency(here, here * 2).item() == pytest.approx(0, abs=1e-6)
    seen, unseen = (1 + 0.25e-3) / 1.001, 0.25e-3 / 1.001  # a thousandth of the mean, at each of 4 places
    assert saliency(here, there).item() == pytest.approx((seen - unseen) * math.log(seen / unseen), rel=1e-4)
    assert saliency(torch.zeros(1, 3, 2, 2), torch.ones(1, 5, 2, 2)).item() == pytest.approx(0, abs=1e-6)


def test_sp_equals_the_stated_matrices_with_torch():
    student, teacher = (f.flatten(1) for f in pair("sp"))
    similar = [F.normalize(f @ f.T) for f in (student, teacher)]
    torch.testing.assert_close(sp(student, teacher), F.mse_loss(*similar))


def test_rkd_equals_the_published_code():
    student, teacher = (f.flatten(1) for f in pair("rkd"))

    def angles(points):
        steps = F.normalize(points[None] - points[:, None], dim=2)
        return torch.bmm(steps, steps.transpose(1, 2))

    lengths = [torch.cdist(f, f, compute_mode="donot_use_mm_for_euclid_dist") for f in (student, teacher)]
    lengths = [d / d[d > 0].mean() for d in lengths]
    distances = F.smooth_l1_loss(*lengths)
    torch.testing.assert_close(rkd(student, teacher, angle=0.0), 25 * distances)
    turned = F.smooth_l1_loss(angles(student), angles(teacher))
    torch.testing.assert_close(rkd(student, teacher, distance=0.0), 50 * turned)
    torch.testing.assert_close(rkd(student, teacher), 25 * distances + 50 * turned)


@pytest.mark.parametrize("offset", [0.0, 10.0, 1000.0])
def test_rkd_is_not_confused_by_what_all_rows_share_nor_by_equal_rows(offset):
    student, teacher = pair("rkd")
    student, teacher = student.double(), teacher.double()
    student[3] = student[2]
    exact = oracles.oracle_rkd(student.numpy(), teacher.numpy())
    leaf = (student + offset).float().requires_grad_()
    value = rkd(leaf, (teacher + offset).float())
    value.backward()
    assert value.item() == pytest.approx(exact, rel=1e-3)
    plain = student.float().requires_grad_()
    rkd(plain, teacher.float()).backward()
    torch.testing.assert_close(leaf.grad, plain.grad, rtol=1e-2, atol=1e-3 * plain.grad.abs().max().item())


@pytest.mark.parametrize("name", ["rkd", "sp"])
def test_rows_that_are_all_alike_have_no_relations(name):
    teacher = pair(name)[1]
    student = torch.full((6, 5, 4, 6), 2.0, requires_grad=True)
    value = LOSSES[name].function(student, teacher)
    value.backward()
    assert value.isfinite() and value > 0 and student.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------------ maps of logits


def test_kd_pixel_is_the_mean_of_kd_over_the_pixels():
    student, teacher = pair("kd_pixel")
    pixels = [logits.permute(0, 2, 3, 1).reshape(-1, 7) for logits in (student, teacher)]
    reference = kd(*pixels, temperature=3.0).reshape(6, 24).mean(1)
    torch.testing.assert_close(kd_pixel(student, teacher, temperature=3.0), reference)


def test_cwd_does_not_see_what_the_cache_does_not_keep_and_that_of_features_does():
    student, teacher = pair("cwd")
    stored = teacher - teacher.amax(dim=1, keepdim=True)
    torch.testing.assert_close(cwd(student, stored), cwd(student, teacher))
    assert (cwd_features(student, stored) - cwd_features(student, teacher)).abs().min() > 1e-2
    of_a_channel = torch.linspace(-5, 5, 7)[:, None, None]
    torch.testing.assert_close(cwd_features(student + of_a_channel, teacher), cwd_features(student, teacher))


def test_cross_entropy_of_masks_equals_the_mean_of_torch():
    logits, masks = inputs("cross_entropy", ((5, 4, 6), (9, 13)), batch=4)
    up = F.interpolate(logits, (9, 13), mode="bilinear", align_corners=False)
    for smoothing in (0.0, 0.1):
        ours = cross_entropy(logits, masks, label_smoothing=smoothing)
        for row in range(3):
            mask = masks[row : row + 1].long()
            reference = F.cross_entropy(up[row : row + 1], mask, ignore_index=255, label_smoothing=smoothing)
            torch.testing.assert_close(ours[row], reference)
    assert torch.equal(cross_entropy(logits, masks), cross_entropy(logits, masks.long()))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_pixels_without_a_label_count_for_nothing(smoothing):
    logits, masks = inputs("cross_entropy", ((5, 4, 6), (4, 6)), batch=4)
    assert (masks[-1] == 255).all() and (masks[0] == 255).any() and (masks[0] != 255).any()
    logits.requires_grad_()
    values = cross_entropy(logits, masks, label_smoothing=smoothing)
    values.sum().backward()
    assert values[-1] == 0 and values[0] > 0
    void = (masks == 255)[:, None].expand_as(logits)
    assert not logits.grad[void].any() and (logits.grad[~void] != 0).all()


def test_class_255_is_a_class_like_any_other_of_a_label():
    logits, targets = torch.randn(4, 1000), torch.tensor([255, 254, 255, 0])
    torch.testing.assert_close(cross_entropy(logits, targets), F.cross_entropy(logits, targets, reduction="none"))
    assert (cross_entropy(logits, targets) > 0).all()


# ------------------------------------------------------------------------------------- features, as a recipe has them

KNOWN = ("low", "middle", "high")


def lesson(student=KNOWN, teacher=KNOWN, projected=None, rows=4):
    """A student's output and a batch with features of these names; `projected`: by loss."""
    generator = torch.Generator().manual_seed(0)

    def features(names, channels):
        return {name: torch.randn(rows, channels, 4, 4, generator=generator) for name in names}

    signals = TeacherSignal(torch.randn(rows, 3, generator=generator), features(teacher, 7))
    valid, nothing = torch.ones(rows, dtype=torch.bool), torch.zeros(rows, 3, 2, 2, dtype=torch.uint8)
    batch = Batch(("k",) * rows, nothing, torch.zeros(rows, dtype=torch.int64), None, valid, rows, signals)
    projected = {"cosine": KNOWN} if projected is None else projected
    made = {loss: features(names, 7) for loss, names in projected.items()}
    return StudentOutput(torch.randn(rows, 3, generator=generator), features(student, 5), made), batch


@pytest.mark.parametrize("names", [None, ["middle"], ["high", "low"], list(KNOWN)])
@pytest.mark.parametrize("loss", ["at", "cosine", "sp"])
def test_a_loss_is_the_mean_over_the_features_that_it_reads(loss, names):
    output, batch = lesson()
    value, terms = Objective({loss: {"features": names} if names else {}}, epochs=1)(output, batch, 0.0)
    held = output.projected["cosine"] if loss == "cosine" else output.features
    each = [LOSSES[loss].function(held[name], batch.signals.features[name]).mean() for name in names or KNOWN]
    assert len(each) == len(names or KNOWN)
    torch.testing.assert_close(value, sum(each) / len(each))
    torch.testing.assert_close(terms[loss], value)


def test_without_names_a_loss_reads_what_both_have():
    output, batch = lesson(student=("high", "low", "mine"), teacher=("low", "theirs", "high"))
    both, _ = Objective({"at": {}}, epochs=1)(output, batch, 0.0)
    named, _ = Objective({"at": {"features": ["low", "high"]}}, epochs=1)(output, batch, 0.0)
    torch.testing.assert_close(both, named)


@pytest.mark.parametrize(
    "losses, had, message",
    [
        (
            {"at": {"features": ["low"]}},
            {"student": ["lower"]},
            "loss 'at': feature 'low' is not among the student's; did you mean 'lower'?",
        ),
        (
            {"cosine": {"features": ["low"]}},
            {"teacher": ["high"]},
            "loss 'cosine': feature 'low' is not among the teacher's; known: high",
        ),
        (
            {"cosine": {"features": ["low"]}},
            {"projected": {"hint": KNOWN}},
            "loss 'cosine': feature 'low' is not among the student's",
        ),
        (
            {"at": {}},
            {"student": ["a"], "teacher": ["b"]},
            "loss 'at': the student has features ['a'] for it and the teacher ['b']; name the same ones in "
            "cache.features and student.taps",
        ),
    ],
)
def test_a_missing_feature_is_one_sentence(losses, had, message):
    with pytest.raises(ModelError) as caught:
        Objective(losses, epochs=1)(*lesson(**had), 0.0)
    assert str(caught.value) == message


@pytest.mark.parametrize("grid", [(4, 6), (9,), ()])
def test_one_channel_has_no_direction(grid):
    student, teacher = torch.randn(2, 3, 1, *grid, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ModelError, match="^has one channel, whose cosine is a sign; name others in `features`, or use"):
        cosine(student, teacher)
    assert LOSSES["hint"].function(student, teacher).shape == (3,)


def test_a_feature_that_does_not_fit_is_named():
    output, batch = lesson()
    output.projected["cosine"]["middle"] = output.projected["cosine"]["middle"][:, :2]
    match = "^loss 'cosine': feature 'middle': the student's tensor has 2 channels and the teacher's 7; logits need"
    with pytest.raises(ModelError, match=match):
        Objective({"cosine": {}}, epochs=1)(output, batch, 0.0)


LOSSES_OF_A_RECIPE = {
    "cross_entropy": {},
    "kd": {},
    "cosine": {"features": ["high", "low"], "weight": 0.3},
    "hint": {"features": ["high"]},
    "at": {"features": ["middle"]},
}


def test_what_is_read_and_projected_follows_the_order_of_the_known():
    assert features_read(LOSSES_OF_A_RECIPE, KNOWN) == ["low", "middle", "high"]
    assert features_read({"cosine": {"features": ["high", "low"]}}, KNOWN) == ["low", "high"]
    assert features_read({"cosine": {"features": ["high"]}, "sp": {}}, ["high", "low"]) == ["high", "low"]
    assert features_read({"kd": {}, "cross_entropy": {}}, KNOWN) == []
    assert projections(LOSSES_OF_A_RECIPE, KNOWN) == {"cosine": ["low", "high"], "hint": ["high"]}
    assert projections({"cwd_features": {}, "saliency": {}, "rkd": {}, "kd": {}}, KNOWN) == {
        "cwd_features": list(KNOWN)
    }
    assert signals_needed(LOSSES_OF_A_RECIPE) == {"logits", "features"}
    assert signals_needed({"cross_entropy": {}, "at": {}}) == {"features"}


@pytest.mark.parametrize("task", ["classification", "segmentation", "regression"])
def test_sound_losses_on_features_pass(task):
    every = {name: {"features": ["low"], "weight": {"linear": {"start": 0, "end": 1}}} for name in FEATURE_LOSSES}
    check_losses(every, task, 21, KNOWN)
    check_losses({"sp": {"gather": True}, "rkd": {"gather": False, "angle": 0}, "at": {}}, task, 2, {"low": 1})


WRONG = [
    ({"at": {}}, (), "loss 'at': needs features: name them in cache.features and student.taps alike"),
    (
        {"at": {"features": ["lwo"]}},
        KNOWN,
        "loss 'at': teacher and student do not both have a feature 'lwo'; did you mean 'low'?",
    ),
    (
        {"at": {"features": ["low", "x"]}},
        KNOWN,
        "loss 'at': teacher and student do not both have a feature 'x'; known: high, low, middle",
    ),
    ({"at": {"features": []}}, KNOWN, "loss 'at': option 'features' must name at least one; leave it out to read all"),
    ({"at": {"features": "low"}}, KNOWN, "loss 'at': option 'features' must be a list, each a text, not 'low'"),
    ({"at": {"features": [1]}}, KNOWN, "loss 'at': option 'features' must be a list, each a text, not [1]"),
    ({"at": {"gather": True}}, KNOWN, "loss 'at': unknown option 'gather'; known: features, weight"),
    ({"kd": {"gather": True}}, KNOWN, "loss 'kd': unknown option 'gather'; known: temperature, weight"),
    ({"sp": {"gather": 1}}, KNOWN, "loss 'sp': option 'gather' must be true or false, not 1"),
    ({"sp": {"gathr": True}}, KNOWN, "loss 'sp': unknown option 'gathr'; did you mean 'gather'?"),
    ({"rkd": {"angle": -1}}, KNOWN, "loss 'rkd': option 'angle' must be from 0 to 1000, not -1"),
]


@pytest.mark.parametrize("losses, known, message", WRONG, ids=[message[:60] for *_, message in WRONG])
def test_what_cannot_be_meant_is_refused_in_one_sentence(losses, known, message):
    with pytest.raises(RecipeError) as caught:
        check_losses(losses, "classification", 10, known)
    assert str(caught.value) == message


@pytest.mark.parametrize("loss", [cosine, hint, at])
def test_what_is_no_number_stays_none(loss):
    """The guard must see it: a vector with a NaN is not one without length."""
    student, teacher = torch.ones(2, 3, 4), torch.ones(2, 3, 4)
    student[0, 0, 0] = torch.nan
    assert loss(student, teacher).isnan().tolist() == [True, False]
