"""losses/ beside implementations that others have published: torchdistill, mmrazor's decoupled loss, timm's.

Theirs work in the precision that they are given, so float64 makes them a second oracle. Where conventions differ, as in
T^2 or the variance, the case says by how much, and nothing else is set right. `sp` has no case: torchdistill divides
the rows of its similarities by their L1 norm, the paper by the L2 norm.
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from timm.task import TokenDistillationTask
from torch import Tensor, nn
from torchdistill.losses import mid_level

from kd_dist.losses import LOSSES

LOGITS = [(5, 3), (16, 10), (7, 100), (32, 1000)]  # rows, classes
FEATURES = [(3, 3, 4, 5), (9, 8, 7, 7), (16, 24, 1, 3)]  # rows, channels, grid
TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
Theirs = Callable[[Tensor, Tensor, Tensor], Tensor]  # of student, labels and teacher: a number


def torchdistill(name: str, *paths: str, **options) -> Theirs:
    """A loss of torchdistill, which finds tensors by the paths of modules and what they are of them."""
    loss = getattr(mid_level, name)(*(paths or ("model", "output", "model", "output")), **options)
    return lambda student, labels, teacher: loss({"model": {"output": student}}, {"model": {"output": teacher}})


def torchdistill_attention() -> Theirs:
    """Its attention transfer, which takes pairs of maps."""
    one = {"io": "output", "path": "model"}
    loss = mid_level.ATLoss({"pair": {"student": one, "teacher": one}}, mode="code")
    return lambda student, labels, teacher: loss({"model": {"output": student}}, {"model": {"output": teacher}})


def mmrazor_dkd(**options) -> Theirs:
    """The one file of mmrazor that has the loss. Its package asks for mmcv, which the loss does not need: what it is
    registered in is left out."""
    folder = Path(importlib.util.find_spec("mmrazor").origin).parent
    registry = ModuleType("mmrazor.registry")
    registry.MODELS = SimpleNamespace(register_module=lambda: lambda loss: loss)
    spec = importlib.util.spec_from_file_location("published_dkd", folder / "models" / "losses" / "decoupled_kd.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "mmrazor", ModuleType("mmrazor"))
        patch.setitem(sys.modules, "mmrazor.registry", registry)
        spec.loader.exec_module(module)
    loss = module.DKDLoss(**options)
    return lambda student, labels, teacher: loss(student, teacher, labels)


class Says(nn.Module):
    """A model that says the same of every image; as DeiT's, with a second head while it is trained."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits, self.distilled = logits, False
        self.num_classes, self.in_chans = logits.shape[1], 3
        self.pretrained_cfg = {"mean": (0, 0, 0), "std": (1, 1, 1)}
        self.weight = nn.Parameter(torch.zeros(()))

    def set_distilled_training(self, enable: bool = True) -> None:
        self.distilled = enable

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return (self.logits, self.logits) if self.distilled else self.logits


def timm_token(kind: str, temperature: float = 1.0) -> Theirs:
    """timm's distillation by a token, hard as in DeiT or soft."""

    def loss(student: Tensor, labels: Tensor, teacher: Tensor) -> Tensor:
        told = {"distill_type": kind, "temperature": temperature, "verbose": False}
        task = TokenDistillationTask(Says(student), Says(teacher), criterion=nn.CrossEntropyLoss(), **told)
        return task(torch.zeros(len(student), 3, 4, 4), labels)["distill_loss"]

    return loss


class Case(NamedTuple):
    """One of ours with options, beside one of theirs times a factor, on a shape."""

    name: str
    options: dict[str, float]
    theirs: Theirs
    factor: float
    shape: tuple[int, ...]


def at(T: float, shape: tuple[int, int]) -> list[Case]:
    """Losses on logits at a temperature."""
    classes = shape[1]
    # Its deviation has C - 1, ours C: the same is said at a temperature that much higher.
    wider = T * (classes / (classes - 1)) ** 0.5
    found = [
        # torchdistill leaves T^2 out where the label has no share.
        Case("kd", {"temperature": T}, torchdistill("KDLoss", temperature=T, alpha=0), T**2, shape),
        Case("kd", {"temperature": T}, timm_token("soft", T), 1, shape),
    ]
    standardised = torchdistill("LogitStdKDLoss", temperature=T, alpha=0)
    found.append(Case("logit_std", {"temperature": wider}, standardised, wider**2, shape))
    for beta, gamma in ((1.0, 1.0), (2.0, 0.5)):
        ours = {"beta": beta, "gamma": gamma, "temperature": T}
        found.append(Case("dist", ours, torchdistill("DISTLoss", beta=beta, gamma=gamma, tau=T), 1, shape))
    for alpha, beta in ((1.0, 8.0), (0.5, 1.0)):
        ours = {"alpha": alpha, "beta": beta, "temperature": T}
        found.append(Case("dkd", ours, mmrazor_dkd(alpha=alpha, beta=beta, tau=T), 1, shape))
    return found


def on_features(shape: tuple[int, ...]) -> list[Case]:
    """Losses on maps."""
    both = {"distance": 25.0, "angle": 50.0}
    rkd = torchdistill("RKDLoss", "model", "model", dist_factor=25.0, angle_factor=50.0, reduction="mean")
    return [
        Case("at", {}, torchdistill_attention(), shape[2] * shape[3], shape),  # its mean is over the places too
        Case("rkd", both, rkd, 1, shape),
    ]


CASES = [case for shape in LOGITS for T in TEMPERATURES for case in at(T, shape)]
CASES += [Case("hard_label", {}, timm_token("hard"), 1, shape) for shape in LOGITS]
CASES += [case for shape in FEATURES for case in on_features(shape)]


def test_every_loss_that_is_published_is_here():
    assert len(CASES) == 4 * 4 * 7 + 4 + 3 * 2
    assert {case.name for case in CASES} == {"kd", "logit_std", "dist", "dkd", "hard_label", "at", "rkd"}


@pytest.mark.filterwarnings("ignore:size_average and reduce args")
@pytest.mark.parametrize("case", CASES, ids=[f"{number}-{case.name}-{case.shape}" for number, case in enumerate(CASES)])
def test_value_and_gradient_are_those_of_the_published_implementation(case):
    generator = torch.Generator().manual_seed(0)
    ours, teacher = (3 * torch.randn(case.shape, generator=generator) for _ in range(2))
    labels = torch.randint(case.shape[1], case.shape[:1], generator=generator)
    theirs = ours.double().requires_grad_()
    value = case.factor * case.theirs(theirs, labels, teacher.double())
    row = LOSSES[case.name]
    ours.requires_grad_()
    against = (labels, teacher) if row.with_teacher else (teacher,)
    mine = row.function(ours, *against, **case.options).mean()
    value.backward()
    mine.backward()
    assert value.dtype == torch.float64 and value > 0
    # DIST: ours keeps a root from 0 by 1e-6 of a mean square, theirs by a floor of 1e-8.
    close = 1e-3 if case.name == "dist" else 2e-5
    torch.testing.assert_close(mine.double(), value, rtol=close, atol=1e-6)
    largest = theirs.grad.abs().max().item()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=close * largest)
