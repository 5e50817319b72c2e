"""The teacher: frozen, always in evaluation mode, in float32, with its features by name."""

import pytest
import torch
from torch import nn

from kd_dist import assemble, cache_teacher
from kd_dist.config import load
from kd_dist.errors import ModelError
from kd_dist.models import build_network
from kd_dist.teacher import Teacher
from kd_dist.verify import verify

SIZE = (16, 24)
RESTLESS = '''\
"""A network whose every forward differs while it trains."""

from torch import nn


def network(classes):
    parts = nn.Sequential()
    parts.add_module("norm", nn.BatchNorm2d(3))
    parts.add_module("drop", nn.Dropout(0.5))
    parts.add_module("pool", nn.AdaptiveAvgPool2d(2))
    parts.add_module("flat", nn.Flatten())
    parts.add_module("head", nn.Linear(12, classes))
    return parts
'''


@pytest.fixture
def teacher(scenery) -> Teacher:
    recipe = load("scenes.yaml")
    return assemble.teacher(recipe, recipe.cache.features)


def images(count: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, *SIZE), dtype=torch.uint8, generator=generator)


def test_it_says_the_shapes_and_types_that_it_announces(teacher):
    logits, features = teacher.shapes(SIZE)
    assert (logits, features) == ((3, 4, 6), {"low": (8, 8, 12), "high": (16, 4, 6)})
    said = teacher(images())
    assert said.logits.shape == (3, *logits) and said.logits.dtype == torch.float32
    assert {name: tuple(one.shape[1:]) for name, one in said.features.items()} == features
    assert {one.dtype for one in said.features.values()} == {torch.float32}


def test_its_features_are_the_outputs_of_the_modules_that_are_named(teacher):
    """`high` is changed in place by the ReLU behind it: what is given is what the module gave."""
    low, act, high, act2, head = teacher.network.backbone
    said, again = teacher(images()), teacher(images() / 255)
    with torch.no_grad():
        first = low(images() / 255)
        second = high(act(first))
        last = head(act2(second.clone()))
    assert torch.allclose(said.features["low"], first, atol=1e-6) and (first < 0).any()
    assert torch.allclose(said.features["high"], second, atol=1e-6) and (second < 0).any()
    assert torch.allclose(said.logits, last, atol=1e-6)
    assert torch.equal(said.logits, again.logits)


def test_it_is_in_float32_under_autocast_and_with_half_weights(teacher):
    exact = teacher(images())
    with torch.autocast("cpu", torch.bfloat16):
        said = teacher(images())
    teacher.network.backbone.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        halved = teacher(images())
    for one in (said, halved):
        assert {value.dtype for value in (one.logits, *one.features.values())} == {torch.float32}
        assert 0 < (one.features["low"] - exact.features["low"]).abs().max() < 0.05


def test_it_is_frozen_and_no_gradient_passes_through_it(teacher):
    assert len(list(teacher.parameters())) == 6 and not any(one.requires_grad for one in teacher.parameters())
    given = (images() / 255).requires_grad_()
    said = teacher(given)
    assert not any(one.requires_grad for one in (said.logits, *said.features.values()))
    weight = nn.Parameter(torch.ones(()))
    (said.logits * weight).sum().backward()
    assert weight.grad is not None and given.grad is None
    assert all(one.grad is None for one in teacher.parameters())


def test_it_stays_in_evaluation_mode_whatever_its_owner_says(scenery):
    (scenery / "restless_model.py").write_text(RESTLESS)
    teacher = Teacher(build_network("restless_model:network", 3, options={}).train(), {"pool": "pool"})
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    said = teacher(images())
    nn.ModuleDict({"teacher": teacher}).train()
    teacher.train()
    assert not any(module.training for module in teacher.modules())
    again = teacher(images())
    assert torch.equal(said.logits, again.logits) and torch.equal(said.features["pool"], again.features["pool"])
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_without_taps_it_gives_logits_alone(scenery):
    teacher = assemble.teacher(load("scenes.yaml"))
    assert teacher.shapes(SIZE) == ((3, 4, 6), {})
    assert teacher(images()).features == {} and teacher.taps is None


def test_a_tap_of_no_module_is_one_sentence(scenery):
    recipe = load("scenes.yaml", ["cache.features.low.tap=lows"])
    with pytest.raises(ModelError, match="scene_model:network: feature 'low': there is no module 'lows'; did you mean"):
        assemble.teacher(recipe, recipe.cache.features)


def test_a_cache_and_its_check_ask_for_exact_arithmetic(scenery):
    flags = ("allow_tf32", "benchmark", "deterministic")
    before = {name: getattr(torch.backends.cudnn, name) for name in flags}
    try:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
        cache_teacher.cache_teacher(load("scenes.yaml"))
        after = {name: getattr(torch.backends.cudnn, name) for name in flags}
        assert after == {"allow_tf32": False, "benchmark": False, "deterministic": True}
        torch.backends.cuda.matmul.allow_tf32 = True
        verify(load("scenes.yaml"), "train", 2)
        assert not torch.backends.cuda.matmul.allow_tf32
    finally:
        for name, value in before.items():
            setattr(torch.backends.cudnn, name, value)
