"""Losses that compare the rows of a batch: what a share of a step adds, on one process and on two real ones."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import done, ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kd_dist.batch import Batch, StudentOutput, TeacherSignal
from kd_dist.losses import LOSSES, Objective
from kd_dist.losses.relations import related

RELATIONAL = ["dist", "ccc", "kd_ccc", "sp", "rkd"]
ROWS, TOTAL, UNLABELLED = 8, 11, 2  # rows of this micro-batch, of the whole step, and which row has no label
SPLITS = {"even": (4, 4), "uneven": (5, 3), "one row": (7, 1), "nothing": (8, 0)}  # rows of each rank


def lesson():
    """Images, targets without one label, and the teacher's signals, of 8 rows."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(ROWS, 3, 4, 4, generator=generator)
    features = {name: torch.randn(ROWS, 7, 2, 2, generator=generator) for name in ("low", "high")}
    targets, outputs = torch.randn(2, ROWS, 3, generator=generator)
    targets[UNLABELLED, 1] = torch.nan
    return images, targets, TeacherSignal(outputs, features)


class Pupil(nn.Module):
    """Two features from images, and three outputs from these."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.low, self.high = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 4, 3)

    def forward(self, images):
        features = {"low": self.low(images), "high": self.high(images)}
        outputs = torch.cat([features["low"][:, :2].mean(dim=(2, 3)), features["high"][:, :1].mean(dim=(2, 3))], dim=1)
        return StudentOutput(outputs, features)


def learn(pupil, losses, rows, world=1):
    """Loss, terms, and the weights' gradient after a backward pass of the loss times `world`, as the loop has it.

    An empty share has one row, which is not valid.
    """
    images, targets, (outputs, features) = lesson()
    valid = torch.ones(len(images[rows]), dtype=torch.bool)
    images, targets, outputs = images[rows], targets[rows], outputs[rows]
    features = {name: value[rows] for name, value in features.items()}
    if not len(valid):
        valid, images = torch.tensor([False]), torch.full((1, 3, 4, 4), 100.0)
        targets, outputs = torch.zeros(1, 3), torch.full((1, 3), -100.0)
        features = {name: torch.full((1, 7, 2, 2), -100.0) for name in features}
    signals = TeacherSignal(outputs, features)
    batch = Batch(("k",) * len(valid), images.to(torch.uint8), targets, None, valid, TOTAL, signals)
    pupil.zero_grad()
    loss, terms = Objective(losses, epochs=1)(pupil(images), batch, 0.0)
    (loss * world).backward()
    return {"loss": loss.detach(), **terms, "gradient": [value.grad.clone() for value in pupil.parameters()]}


def losses_of(name, gather):
    """None: the recipe is silent about it."""
    return {name: {"weight": 2.0} if gather is None else {"gather": gather, "weight": 2.0}}


def work(arguments):
    """One rank: every loss with every split of the rows, with and without `gather`."""
    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), {}
    assert dist.get_world_size() == 2
    for name in RELATIONAL:
        for split, counts in SPLITS.items():
            rows = slice(0, counts[0]) if rank == 0 else slice(counts[0], ROWS)
            for gather in (True, False, None):
                pupil = DistributedDataParallel(Pupil())
                found[f"{name} {split} {gather}"] = learn(pupil, losses_of(name, gather), rows, world=2)
    torch.save(found, arguments[0])
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def shares(tmp_path_factory):
    """What each of two ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    paths = [folder / "0.pt", folder / "1.pt"]
    for ended in ranks(work, [[str(path)] for path in paths], folder):
        done(ended)
    return [torch.load(Path(path), weights_only=True) for path in paths]


def test_these_are_all():
    assert [name for name, row in LOSSES.items() if row.relational] == RELATIONAL


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", RELATIONAL)
def test_two_ranks_that_gather_equal_one_process(shares, name, split):
    whole = learn(Pupil(), losses_of(name, True), slice(0, ROWS))
    assert whole["loss"] > 1e-3
    first, second = (share[f"{name} {split} True"] for share in shares)
    torch.testing.assert_close(first["loss"] + second["loss"], whole["loss"])
    torch.testing.assert_close(first[name] + second[name], whole[name])
    torch.testing.assert_close(first["loss"], second["loss"])  # each its part
    for part in (first, second):  # DDP has brought the mean to both
        torch.testing.assert_close(part["gradient"], whole["gradient"], rtol=1e-4, atol=1e-6)
    assert max(gradient.abs().max() for gradient in whole["gradient"]) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", RELATIONAL)
def test_without_gather_each_rank_relates_its_own_rows(shares, name, split):
    whole = learn(Pupil(), losses_of(name, False), slice(0, ROWS))
    first, second = (share[f"{name} {split} False"] for share in shares)
    cut = SPLITS[split][0]
    parts = [learn(Pupil(), losses_of(name, False), rows) for rows in (slice(0, cut), slice(cut, ROWS))]
    for found, wanted in zip((first, second), parts, strict=True):
        torch.testing.assert_close(found["loss"], wanted["loss"])
    both = [one + other for one, other in zip(*(part["gradient"] for part in parts), strict=True)]
    torch.testing.assert_close(first["gradient"], both, rtol=1e-4, atol=1e-6)
    if split == "nothing":
        assert second["loss"] == 0
        torch.testing.assert_close(first["loss"], whole["loss"])
    else:
        assert (first["loss"] + second["loss"] - whole["loss"]).abs() > 1e-3 * whole["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name, gathers", [("ccc", True), ("kd_ccc", True), ("sp", False), ("rkd", False)])
def test_a_recipe_that_is_silent_gathers_outputs_and_no_features(shares, name, gathers, split):
    for share in shares:
        silent, told = share[f"{name} {split} None"], share[f"{name} {split} {gathers}"]
        assert silent["loss"] == told["loss"]
        torch.testing.assert_close(silent["gradient"], told["gradient"])
        assert split == "nothing" or silent["loss"] != share[f"{name} {split} {not gathers}"]["loss"]


# ------------------------------------------------------------------------------------------------------- one process


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("name", RELATIONAL)
def test_a_share_is_the_value_for_each_of_its_valid_rows(name, gather):
    images, targets, (outputs, features) = lesson()
    output = Pupil()(images)
    student, teacher = output.features["low"], features["low"]
    if LOSSES[name].student == "logits":
        student, teacher = output.logits, targets if LOSSES[name].against == "targets" else outputs
    valid = torch.tensor([True] * 5 + [False] + [True] * 2)
    share = related(LOSSES[name].function, student, teacher, valid, 20, gather)
    value = LOSSES[name].function(student[valid], teacher[valid])
    assert share.shape == () and share.dtype == torch.float32
    torch.testing.assert_close(share, value * 7 / 20)
    assert not torch.autograd.grad(share, student, retain_graph=True)[0][5].any()


def test_an_unlabelled_row_is_not_among_the_rows_that_a_label_relates():
    images, targets, (outputs, _) = lesson()
    student = Pupil()(images).logits.detach()
    known = [row for row in range(ROWS) if row != UNLABELLED]
    labelled, taught = (learn(Pupil(), {name: {}}, slice(0, ROWS))["loss"] for name in ("ccc", "kd_ccc"))
    torch.testing.assert_close(labelled, LOSSES["ccc"].function(student[known], targets[known]) * 7 / TOTAL)
    torch.testing.assert_close(taught, LOSSES["kd_ccc"].function(student, outputs) * 8 / TOTAL)
    alone = learn(Pupil(), {"ccc": {}}, slice(UNLABELLED, UNLABELLED + 2))  # one row is left
    assert alone["loss"] == 0 and not any(gradient.any() for gradient in alone["gradient"])


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("name", RELATIONAL)
def test_fewer_than_two_rows_have_no_relations_but_every_weight_has_a_gradient(name, rows, gather):
    found = learn(Pupil(), losses_of(name, gather), slice(0, rows))
    assert found["loss"] == 0 and found[name] == 0
    assert len(found["gradient"]) == 4 and not any(gradient.any() for gradient in found["gradient"])


def test_micro_batches_add_up_to_the_mean_weighted_by_their_rows():
    parts = [slice(0, 5), slice(5, 8)]
    shares = [learn(Pupil(), {"rkd": {}}, rows)["loss"] for rows in parts]
    images, _, (_, features) = lesson()
    output = Pupil()(images)
    values = []
    for rows in parts:
        each = [LOSSES["rkd"].function(output.features[name][rows], features[name][rows]) for name in features]
        values.append(sum(each) / 2)
    torch.testing.assert_close(sum(shares), ((5 * values[0] + 3 * values[1]) / TOTAL).detach())
