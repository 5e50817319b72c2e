"""Taps: the true outputs of modules by name, and a clear sentence for whatever cannot be one."""

import copy
import re

import pytest
import torch
from torch import nn

from kd_dist.errors import ModelError
from kd_dist.models import Built, Network, build_network
from kd_dist.models.taps import Taps

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3}


class Gives(nn.Module):
    """Whatever a function makes of the input."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, value):
        return self.function(value)


def network(**modules: nn.Module) -> Network:
    """The modules one after the other, then the means of 3 channels as logits."""
    backbone = nn.Sequential()
    for name, module in modules.items():
        backbone.add_module(name, module)
    backbone.add_module("head", Gives(lambda value: value.flatten(2).mean(dim=2)[:, :3]))
    return Network(Built(backbone, (0.0,) * 3, (1.0,) * 3), 3, None, "own:model")


def beside(function) -> nn.Module:
    """A module that gives `function(input)`, after which the network goes on with the input: taps only see it."""
    inner = Gives(function)
    outer = Gives(lambda value: (inner(value), value)[1])
    outer.inner = inner
    return outer


def images(batch: int = 4, size: int = 8) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def error(problem: str, feature: str = "f", label: str = "own:model") -> str:
    return f"^{re.escape(f'{label}: feature ')}'{feature}': {re.escape(problem)}$"


# ------------------------------------------------------------------------------------------------ what they give


def test_features_are_channels_first():
    model = network(
        maps=nn.Conv2d(3, 5, 3),
        tokens=beside(lambda value: value.flatten(2).transpose(1, 2)),
        vector=beside(lambda value: value.mean(dim=(2, 3))),
    )
    taps = Taps(model, {"a": "maps", "b": "tokens.inner", "c": "vector.inner"})
    shapes = {"a": (5, 4, 6), "b": (5, 24), "c": (5,)}
    assert taps.probe((6, 8)) == shapes
    model(images(3, 8)[:, :, :6])
    features = taps.collect(3)
    assert {name: tuple(value.shape) for name, value in features.items()} == {k: (3, *v) for k, v in shapes.items()}
    assert torch.equal(features["b"], features["a"].flatten(2))
    assert torch.equal(features["c"], features["a"].mean(dim=(2, 3)))


@pytest.mark.parametrize(
    ("function", "selector"),
    [
        (lambda value: (value, value * 2), "1"),
        (lambda value: [value, value * 2], "1"),
        (lambda value: {"in": value, "out": value * 2}, "out"),
        (lambda value: {0: value, 7: value * 2}, "7"),
    ],
)
def test_one_of_several_outputs(function, selector):
    model = network(conv=nn.Conv2d(3, 4, 1), many=beside(function))
    taps = Taps(model, {"plain": "conv", "double": f"many.inner[{selector}]"})
    assert taps.probe((8, 8)) == {"plain": (4, 8, 8), "double": (4, 8, 8)}
    model(images())
    features = taps.collect(4)
    assert torch.equal(features["double"], 2 * features["plain"])


def test_gradients_flow_through_what_is_collected():
    model = network(conv=nn.Conv2d(3, 4, 1), relu=nn.ReLU())
    taps = Taps(model, {"f": "conv"})
    model(images())
    taps.collect(4)["f"].sum().backward()
    pixels = images().float().sum(dim=(0, 2, 3)) / 255
    torch.testing.assert_close(model.backbone.conv.weight.grad[:, :, 0, 0], pixels.expand(4, 3))


def test_collecting_forgets():
    model = network(conv=nn.Conv2d(3, 4, 1))
    taps = Taps(model, {"f": "conv"})
    model(images())
    assert taps.collect(4)["f"].shape == (4, 4, 8, 8)
    assert not taps.taken
    with pytest.raises(ModelError, match=error("module 'conv' did not run in the forward; tap another module")):
        taps.collect(4)
    model(images(2))
    assert taps.collect(2)["f"].shape == (2, 4, 8, 8)


def test_removed_taps_take_nothing():
    model = network(conv=nn.Conv2d(3, 4, 1))
    taps = Taps(model, {"f": "conv"})
    model(images())
    taps.remove()
    assert not taps.taken
    model(images())
    assert not taps.taken and not model.backbone.conv._forward_hooks


def test_a_copy_of_a_network_has_taps_of_its_own():
    model = network(conv=nn.Conv2d(3, 4, 1))
    one = Taps(model, {"f": "conv"})
    other = copy.deepcopy(one)
    nn.init.zeros_(other.network.backbone.conv.weight)
    other.network(images())
    assert not one.taken and not other.collect(4)["f"].std(dim=(0, 2, 3)).any()


# ------------------------------------------------------------------------------------------------ in place


def batch_norm() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


@pytest.mark.parametrize("training", [True, False])
def test_an_output_that_the_next_module_changes_in_place(training):
    """The tap gives what the module gave, with the gradient of that."""
    torch.manual_seed(0)
    model = network(conv=nn.Conv2d(3, 4, 1), norm=batch_norm(), relu=nn.ReLU(inplace=True)).train(training)
    reference = copy.deepcopy(model)
    taps = Taps(model, {"f": "norm", "conv": "conv"})
    taps.probe((8, 8))
    assert taps.overwritten == {"f"}  # and nothing else is copied
    logits, feature = model(images()), taps.collect(4)["f"]
    expected = reference.backbone.norm(reference.backbone.conv(images() / 255))
    assert expected.min() < 0
    assert torch.equal(feature, expected)
    assert torch.equal(logits, expected.relu().flatten(2).mean(dim=2)[:, :3])
    (logits.sum() + feature.pow(2).sum()).backward()
    (expected.relu().flatten(2).mean(dim=2)[:, :3].sum() + expected.pow(2).sum()).backward()
    pairs = list(zip(model.parameters(), reference.parameters(), strict=True))
    assert len(pairs) == 4
    for one, other in pairs:
        torch.testing.assert_close(one.grad, other.grad)


def test_a_probe_sees_changes_in_place_whatever_mode_is_on():
    model = network(conv=nn.Conv2d(3, 4, 1), relu=nn.ReLU(inplace=True)).eval()
    nn.init.constant_(model.backbone.conv.bias, -9)
    taps = Taps(model, {"f": "conv"})
    with torch.inference_mode():
        taps.probe((8, 8))
        model(images())
        assert taps.collect(4)["f"].max() < 0


def test_an_output_that_is_changed_in_place_in_training_only():
    model = network(conv=nn.Conv2d(3, 4, 1), drop=nn.Dropout(0.5, inplace=True))
    taps = Taps(model, {"f": "conv"})
    taps.probe((8, 8))
    model.eval()(images())
    taps.collect(4)
    model.train()(images())
    problem = (
        "the output of module 'conv' is changed in place by a later one, which no probe in evaluation mode has sho"
    )
    with pytest.raises(ModelError, match=error(problem + "wn; tap that later module")):
        taps.collect(4)


# ------------------------------------------------------------------------------------------------ the probe


def test_a_probe_leaves_everything_as_it_was():
    model = network(conv=nn.Conv2d(3, 4, 1), norm=batch_norm(), drop=nn.Dropout(0.5)).train()
    model.backbone.norm.eval()  # as a frozen BatchNorm is
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    seed = torch.get_rng_state()
    taps = Taps(model, {"f": "norm"})
    assert taps.probe((8, 12)) == {"f": (4, 8, 12)}
    assert [module.training for module in model.modules()] == modes
    assert sorted(modes) == [False] + [True] * 5
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert all(value.grad is None for value in model.parameters())
    assert torch.equal(seed, torch.get_rng_state())
    model.train()
    taps.probe((8, 12))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_probe_that_fails_restores_the_mode():
    model = network(conv=nn.Conv2d(3, 4, 9)).train()
    taps = Taps(model, {"f": "conv"})
    with pytest.raises(RuntimeError, match="size"):
        taps.probe((8, 8))
    assert all(module.training for module in model.modules())
    assert taps.probe((9, 10)) == {"f": (4, 1, 2)}


def test_a_probe_does_not_count_as_a_forward():
    model = network(conv=nn.Conv2d(3, 4, 1))
    taps = Taps(model, {"f": "conv"})
    model(images())
    taps.probe((8, 8))
    model(images())
    assert torch.equal(taps.collect(4)["f"], model.backbone.conv(images() / 255))


# ------------------------------------------------------------------------------------------------ mistakes


NO_READINGS = ["grid(conv, 4x8)", "attention(conv[0])", "saliency(conv, 4 x 8)", "saliency (conv)"]
NO_READINGS += ["saliency(conv, 0x8)", "saliency(conv, 4x8, 2)", "grid(conv[)"]


@pytest.mark.parametrize(
    "text", ["", "conv[", "conv[]", "conv[0][1]", "[0]", "conv [0]", " conv", "conv[0", "a]b", *NO_READINGS]
)
def test_what_is_no_tap(text):
    problem = (
        f"'{text}' is no tap; write a module path, with [index] or [key] to pick an output, or grid(PATH), "
        f"saliency(PATH), attention(PATH), the last two also with a grid: saliency(PATH, 4x8)"
    )
    with pytest.raises(ModelError, match=error(problem)):
        Taps(network(conv=nn.Conv2d(3, 4, 1)), {"f": text})


def test_a_module_that_is_not_there():
    model = network(block=nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()))
    for path, hint in {"blok.0": "; did you mean 'block.0'?", "qq": "; known: block, block.0, block.1, head"}.items():
        with pytest.raises(ModelError, match=error(f"there is no module '{path}'{hint}", "high")):
            Taps(model, {"low": "block.0", "high": path})
    assert not any(module._forward_hooks for module in model.modules())  # the good tap left nothing behind either


@pytest.mark.parametrize(
    ("function", "tap", "problem"),
    [
        (lambda x: (x, x), "m.inner", "module 'm.inner' has several outputs; pick one of 'm.inner[0]', 'm.inner[1]'"),
        (lambda x: [x], "m.inner", "module 'm.inner' has several outputs; pick one of 'm.inner[0]'"),
        (lambda x: {"out": x}, "m.inner", "module 'm.inner' has several outputs; pick one of 'm.inner[out]'"),
        (lambda x: {"out": x}, "m.inner[0]", "module 'm.inner' has no output '0'; pick one of 'm.inner[out]'"),
        (
            lambda x: (x, x),
            "m.inner[-1]",
            "module 'm.inner' has no output '-1'; pick one of 'm.inner[0]', 'm.inner[1]'",
        ),
        (lambda x: x, "m.inner[0]", "module 'm.inner' has one output, so '[0]' picks none; leave it out"),
        (
            lambda x: x.long(),
            "m.inner",
            "module 'm.inner' gives torch.int64, not a floating-point tensor; tap another mod",
        ),
        (lambda x: None, "m.inner", "module 'm.inner' gives NoneType, not a floating-point tensor; tap another mod"),
        (lambda x: (x, 3), "m.inner[1]", "module 'm.inner' gives int, not a floating-point tensor; tap another mod"),
    ],
)
def test_an_output_that_is_no_feature(function, tap, problem):
    taps = Taps(network(m=beside(function)), {"f": tap})
    with pytest.raises(ModelError, match=error(problem + "ule" * problem.endswith("another mod"))):
        taps.probe((8, 8))


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x: x.reshape(-1, 16, 3), (8, 16, 3)),
        (lambda x: x.mean(), ()),
        (lambda x: x.mean(dim=(1, 2, 3)), (2,)),
        (lambda x: x.unsqueeze(1), (2, 1, 3, 8, 8)),
        (lambda x: x[0], (3, 8, 8)),
    ],
)
def test_an_output_of_another_shape(function, shape):
    taps = Taps(network(m=beside(function)), {"f": "m.inner"})
    problem = (
        f"module 'm.inner' gives {shape} for 2 images, not (2, C), (2, N, C) or (2, C, h, w); tap a module whose fi"
    )
    with pytest.raises(ModelError, match=error(problem + "rst dimension is the batch")):
        taps.probe((8, 8))


def test_a_first_dimension_that_only_looks_like_the_batch():
    model = network(m=beside(lambda x: x.flatten(2).new_zeros(2, 5)))
    taps = Taps(model, {"f": "m.inner"})
    assert taps.probe((8, 8)) == {"f": (5,)}
    model(images(4))
    with pytest.raises(ModelError, match=r"^own:model: feature 'f': module 'm.inner' gives \(2, 5\) for 4 images, not"):
        taps.collect(4)


def test_a_module_that_runs_twice():
    shared = nn.Conv2d(3, 3, 1)
    model = network(one=shared, two=shared)
    problem = (
        "ran 2 times before the feature was collected, so it is shared within the network or the network itself ran"
    )
    for path in ("one", "two"):  # whichever of its names is given
        taps = Taps(model, {"f": path})
        with pytest.raises(ModelError, match=error(f"module '{path}' {problem} again; tap another module")):
            taps.probe((8, 8))
        taps.remove()
    model = network(conv=nn.Conv2d(3, 4, 1))
    taps = Taps(model, {"f": "conv"})
    model(images())
    model(images())
    with pytest.raises(ModelError, match=error(f"module 'conv' {problem} again; tap another module")):
        taps.collect(4)
    model(images())
    taps.collect(4)  # the mistake is forgotten too


def test_a_module_that_does_not_run():
    model = network(conv=nn.Conv2d(3, 4, 1))
    model.backbone.conv.idle = nn.Linear(1, 1)
    with pytest.raises(ModelError, match=error("module 'conv.idle' did not run in the forward; tap another module")):
        Taps(model, {"f": "conv.idle"}).probe((8, 8))


# ------------------------------------------------------------------------------------------------ real models


def test_tokens_of_a_vision_transformer():
    model = build_network("timm/vit_tiny_patch16_224", 2, options=VIT, image_size=32).eval()
    taps = Taps(model, {"first": "blocks.0", "last": "blocks.1", "out": "norm"})
    assert taps.probe((40, 30)) == {"first": (12, 17), "last": (12, 17), "out": (12, 17)}
    assert not taps.overwritten
    with torch.no_grad():
        model(images(3, 32))
        tokens = taps.collect(3)
        expected = model.backbone.forward_features((images(3, 32) / 255 - 0.5) / 0.5)
    torch.testing.assert_close(tokens["out"].transpose(1, 2), expected)


def test_attention_that_timm_has_fused():
    model = build_network("timm/vit_tiny_patch16_224", 2, options=VIT, image_size=32)
    problem = (
        "module 'blocks.0.attn.attn_drop' did not run in the forward; tap another module, or set TIMM_FUSED_ATTN=0 "
        "before starting: timm's fused attention passes over modules inside it"
    )
    taps = Taps(model, {"f": "blocks.0.attn.attn_drop"})
    with pytest.raises(ModelError, match=error(problem, label="timm/vit_tiny_patch16_224")):
        taps.probe((32, 32))
    model.backbone.blocks[0].attn.fused_attn = False  # what the variable does
    assert taps.probe((32, 32)) == {"f": (3, 17, 17)}


def test_stages_of_a_residual_network():
    model = build_network("timm/resnet10t", 3, options={})
    taps = Taps(model, {"low": "layer2", "high": "layer4", "norm": "bn1"})
    assert taps.probe((33, 64)) == {"low": (128, 5, 8), "high": (512, 2, 2), "norm": (64, 17, 32)}
    assert taps.overwritten == {"norm"}
    model(images(2, 32))
    features = taps.collect(2)
    assert features["norm"].min() < 0 <= features["low"].min()


def test_patches_that_mobilevit_folds_into_the_batch():
    model = build_network("timm/mobilevit_xxs", 3, options={})
    with pytest.raises(ModelError, match=r"'stages.2.1.transformer' gives \(8, 16, 64\) for 2 images, not \(2, C\), "):
        Taps(model, {"f": "stages.2.1.transformer"}).probe((64, 64))


def test_mobilevitv2_keeps_the_batch_first():
    """(B, C, patch area, patches): its first dimension is the batch, unlike in the first version."""
    model = build_network("timm/mobilevitv2_050", 3, options={})
    taps = Taps(model, {"stage": "stages.2.1", "inside": "stages.2.1.transformer"})
    assert taps.probe((64, 64)) == {"stage": (128, 8, 8), "inside": (64, 4, 16)}


def test_the_mapping_that_torchvisions_backbones_give():
    model = build_network("torchvision/fcn_resnet50", 3, maps=True, options={}).eval()
    taps = Taps(model, {"mid": "backbone.layer2", "high": "backbone[out]"})
    assert taps.probe((33, 40)) == {"mid": (512, 5, 5), "high": (2048, 5, 5)}
    with pytest.raises(ModelError, match=r"'backbone' has several outputs; pick one of 'backbone\[out\]'$"):
        Taps(model, {"f": "backbone"}).probe((33, 40))


def test_taps_of_our_student():
    model = build_network("kd_dist/mobilenet_v3_small_aspp", 3, maps=True, options={"width": 0.5})
    taps = Taps(model, {name: name for name in ("low", "mid", "high")})
    assert taps.probe((60, 80)) == {"low": (8, 15, 20), "mid": (16, 8, 10), "high": (288, 4, 5)}
    assert not taps.overwritten
    model.train()(images(2, 32))
    assert all(value.requires_grad for value in taps.collect(2).values())
