"""Models by name, their preprocessing, their weights, and what each cannot be."""

import argparse
import os
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kd_dist import choose
from kd_dist.errors import ModelError, RecipeError
from kd_dist.models import FAMILIES, Built, Network, build_network, load_weights, read_weights, weights_digest

IMAGES = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Means(nn.Module):
    """The channels' means as logits: shows what reached the model."""

    def forward(self, images):
        return images.mean(dim=(2, 3))


class Shape(nn.Module):
    """The height of its input as the first of two logits."""

    def forward(self, images):
        return torch.full((len(images), 2), float(images.shape[-1]))


class Answer(nn.Module):
    """Always the same answer, whatever that is."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, images):
        return self.value


def network(backbone: nn.Module, classes=3, image_size=None, mean=(0.0,) * 3, std=(1.0,) * 3, maps=False, ignored=()):
    return Network(Built(backbone, mean, std, ignored), classes, image_size, "own:model", maps)


def tiny(seed: int = 0, width: int = 4) -> Network:
    torch.manual_seed(seed)
    return build_network("tiny_model:network", 3, options={"width": width})


# ------------------------------------------------------------------------------------------------ preprocessing


def test_bytes_and_fractions_are_the_same_image():
    model = network(Means())
    assert torch.equal(model(IMAGES), model(IMAGES.float() / 255))
    torch.testing.assert_close(model(IMAGES), IMAGES.double().mean(dim=(2, 3)).float() / 255)


def test_the_model_owns_its_normalisation():
    mean, std = (0.5, 0.25, 0.1), (0.5, 0.25, 2.0)
    expected = (IMAGES.double().mean(dim=(2, 3)) / 255 - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(network(Means(), mean=mean, std=std)(IMAGES).double(), expected, atol=1e-6, rtol=1e-6)


def test_images_are_resized_to_the_models_own_size():
    assert network(Shape(), 2, image_size=6)(IMAGES)[0, 0] == 6
    assert network(Shape(), 2, image_size=None)(IMAGES)[0, 0] == 8
    flat = torch.full((1, 3, 8, 8), 100, dtype=torch.uint8)
    torch.testing.assert_close(network(Means(), image_size=5)(flat), torch.full((1, 3), 100 / 255))


def test_a_smaller_image_is_averaged_and_not_sampled():
    board = torch.zeros(1, 3, 32, 32)
    board[..., ::4] = 1  # without antialiasing these columns would vanish
    seen = []
    model = network(Means(), image_size=8)
    model.backbone.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    model(board)
    assert (seen[0][..., 2:-2] - 0.25).abs().max() < 0.1


def test_the_normalisation_is_no_weight():
    """Weights stay plain weights of the architecture."""
    assert list(network(nn.Linear(2, 2), mean=(0.5,) * 3).state_dict()) == ["backbone.weight", "backbone.bias"]


# ------------------------------------------------------------------------------------------------ outputs


def test_one_output_of_a_two_class_task_is_a_margin():
    z = torch.tensor([[2.0], [-1.0], [0.0], [30.0], [-30.0]])
    logits = network(Answer(z), 2)(IMAGES)
    assert torch.equal(logits, torch.cat([torch.zeros(5, 1), z], dim=1))
    torch.testing.assert_close(logits.softmax(1)[:, 1:], torch.sigmoid(z))


@pytest.mark.parametrize(("shape", "classes"), [((5, 1), 3), ((5, 4), 3), ((5,), 2), ((4, 3), 3), ((5, 3, 1), 3)])
def test_logits_of_another_shape(shape, classes):
    sentence = f"own:model: gives logits of shape {shape} for 5 images, but the task has {classes} classes: expected"
    with pytest.raises(ModelError, match=f"^{re.escape(sentence)} {re.escape(f'(5, {classes})')}$"):
        network(Answer(torch.zeros(shape)), classes)(IMAGES)


@pytest.mark.parametrize(("height", "width", "classes"), [(4, 6, 3), (1, 1, 2), (8, 8, 1)])
def test_maps_of_logits_stay_as_they_are(height, width, classes):
    answer = torch.randn(5, classes, height, width)
    assert network(Answer(answer), classes, maps=True)(IMAGES) is answer


@pytest.mark.parametrize(
    ("shape", "classes"),
    [((5, 1), 2), ((5, 3), 3), ((5, 1, 4, 4), 2), ((5, 4, 4), 4), ((4, 3, 4, 4), 3), ((5, 4, 4, 3), 3)],
)
def test_maps_of_another_shape(shape, classes):
    sentence = f"own:model: gives logits of shape {shape} for 5 images, but the task has {classes} classes: expected"
    with pytest.raises(ModelError, match=f"^{re.escape(sentence)} {re.escape(f'(5, {classes}, h, w)')}$"):
        network(Answer(torch.zeros(shape)), classes, maps=True)(IMAGES)


def test_maps_where_one_answer_is_wanted():
    sentence = "own:model: gives logits of shape (5, 3, 4, 4) for 5 images, but the task has 3 classes: expected (5, 3)"
    with pytest.raises(ModelError, match=f"^{re.escape(sentence)}$"):
        network(Answer(torch.zeros(5, 3, 4, 4)))(IMAGES)


@pytest.mark.parametrize(("answer", "kind"), [((torch.zeros(5, 3),), "tuple"), ({"logits": 1}, "dict"), (None, "None")])
def test_an_output_that_is_no_tensor(answer, kind):
    with pytest.raises(ModelError, match=f"^own:model: returns {kind}.*, not one tensor of logits$"):
        network(Answer(answer))(IMAGES)


@pytest.mark.parametrize("bounds", [(-1.0, 1.0), (0.0, 4.0)])
@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_bounded_outputs(bounds, outputs):
    """No output of one number is taken for a margin; half precision is none."""
    z = torch.tensor([[0.0], [1.0], [-0.5], [90.0], [-90.0]]).repeat(1, outputs)
    for value in (z, z.bfloat16()):
        found = Network(Built(Answer(value), (0.0,) * 3, (1.0,) * 3), outputs, None, "own:model", bounds=bounds)(IMAGES)
        low, high = bounds
        expected = low + (high - low) * torch.sigmoid(2 * z.double())  # (tanh(z) + 1) / 2
        assert found.dtype == torch.float32 and found.min() == low and found.max() == high
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)
    bent = Network(Built(Answer(z[:, :1]), (0.0,) * 3, (1.0,) * 3), outputs + 1, None, "own:model", bounds=bounds)
    with pytest.raises(
        ModelError, match=rf"shape \(5, 1\) for 5 images, but the task has {outputs + 1} outputs: expected"
    ):
        bent(IMAGES)


# ------------------------------------------------------------------------------------------------ channels

GREY = torch.randint(0, 256, (5, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("channels", [1, 2])
def test_timm_models_of_other_channels(channels):
    """Every channel has the mean of timm's three, in mean and in std."""
    model = build_network("timm/resnet10t", 2, channels=channels, bounds=(-1, 1), options={}).eval()
    assert model.channels == channels and model.backbone.conv1[0].in_channels == channels
    assert model.mean.flatten().tolist() == pytest.approx([(0.485 + 0.456 + 0.406) / 3] * channels)
    assert model.std.flatten().tolist() == pytest.approx([(0.229 + 0.224 + 0.225) / 3] * channels)
    grey = GREY.repeat(1, channels, 1, 1)
    assert torch.equal(model(grey), model(grey / 255)) and model(grey).shape == (5, 2)


def test_timm_adapts_its_pretrained_weights(tmp_path):
    import timm

    torch.manual_seed(3)
    theirs = timm.create_model("resnet10t", num_classes=1000)
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    options = {"pretrained_cfg_overlay": {"file": str(tmp_path / "w.safetensors")}}
    ours = build_network("timm/resnet10t", 2, channels=1, options=options, pretrained=True).backbone
    torch.testing.assert_close(ours.conv1[0].weight, theirs.conv1[0].weight.sum(dim=1, keepdim=True))
    assert torch.equal(ours.layer1[0].conv1.weight, theirs.layer1[0].conv1.weight)


def test_a_users_own_model_of_one_channel(experiment):
    (experiment / "grey_model.py").write_text(
        "from torch import nn\n\n\n"
        "def told(classes, channels):\n    return nn.Sequential(nn.Flatten(), nn.Linear(1024 * channels, classes))\n"
        "\n\ndef knows(classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(1024, classes))\n"
    )
    for name in ("told", "knows"):
        model = build_network(f"grey_model:{name}", 2, channels=1, options={}, mean=(0.5,))
        assert model(GREY).shape == (5, 2) and (model.channels, model.std.shape) == (1, (1, 1, 1, 1))
    assert build_network("grey_model:told", 2, options={}).backbone[1].in_features == 3072
    for name in ("told", "knows"):
        with pytest.raises(RecipeError, match="unknown option 'channels'"):
            build_network(f"grey_model:{name}", 2, options={"channels": 1})
    with pytest.raises(
        ModelError, match="^grey_model:told: images have 1 channels, but mean has 3 values; give one a ch"
    ):
        build_network("grey_model:told", 2, channels=1, options={}, mean=(0.5,) * 3)


@pytest.mark.parametrize(
    ("model", "maps", "sentence"),
    [
        ("torchvision/resnet18", False, "torchvision's models take images of 3 channels, and these have 1; use timm/"),
        ("kd_dist/mobilenet_v3_small_aspp", True, "takes images of 3 channels, and these have 1; use kd_dist/mobile_"),
    ],
)
def test_models_of_three_channels_alone(model, maps, sentence):
    with pytest.raises(ModelError, match=f"^{model}: {sentence}"):
        build_network(model, 2, channels=1, maps=maps, options={})


def test_probes_have_the_networks_channels():
    from kd_dist.cost import measure
    from kd_dist.probe import gradient_cosine
    from kd_dist.teacher import Teacher

    model = build_network("timm/resnet10t", 2, channels=1, bounds=(-1, 1), options={})
    assert measure(model, (32, 48))["parameters"] == sum(value.numel() for value in model.parameters())
    logits, features = Teacher(model, {"f": "layer3"}).shapes((32, 48))
    assert (logits, features) == ((2,), {"f": (256, 2, 3)})
    exact = torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    assert gradient_cosine(GREY, exact, exact) == pytest.approx(1)


# ------------------------------------------------------------------------------------------------ by name


def test_every_family_can_be_imported():
    assert len(FAMILIES) >= 3
    for path in FAMILIES.values():
        assert callable(choose.imported(path))


def test_a_users_own_model(experiment):
    model = build_network("tiny_model:network", 3, options={"width": 5}, image_size=16, mean=(0.5,) * 3)
    assert model(IMAGES).shape == (5, 3)
    assert model.backbone[0].out_channels == 5
    assert (model.image_size, model.label) == (16, "tiny_model:network")
    assert (model.mean.flatten().tolist(), model.std.flatten().tolist()) == ([0.5] * 3, [1.0] * 3)
    assert not tiny().mean.any()  # it gets images in [0, 1] as they are


def test_a_users_own_model_of_maps(experiment):
    (experiment / "map_model.py").write_text(
        "from torch import nn\n\n\ndef network(classes, stride=2):\n    return nn.Conv2d(3, classes, 3, stride, 1)\n"
    )
    model = build_network("map_model:network", 2, maps=True, options={"stride": 4}, std=(0.5,) * 3)
    assert model(IMAGES).shape == (5, 2, 2, 2)
    assert (model.maps, model.std.flatten().tolist()) == (True, [0.5] * 3)
    with pytest.raises(ModelError, match=r"^map_model:network: gives logits of shape \(5, 2, 4, 4\) .* \(5, 2\)$"):
        build_network("map_model:network", 2, options={})(IMAGES)


def test_timm_has_no_maps():
    with pytest.raises(ModelError, match=r"^timm/resnet10t: timm has no segmentation models; use torchvision/... or"):
        build_network("timm/resnet10t", 3, maps=True, options={})


@pytest.mark.parametrize(
    ("model", "options", "error", "sentence"),
    [
        ("tiny_model:netwok", {}, RecipeError, r"module 'tiny_model' has no 'netwok'; did you mean 'network'\?"),
        ("tiny_mode:network", {}, RecipeError, "no module 'tiny_mode' can be imported; run from the folder that"),
        ("tiny_model:__doc__", {}, RecipeError, "'__doc__' is not a function or class that could be called"),
        ("tiny_model:network", {"widht": 2}, RecipeError, r"unknown option 'widht'; did you mean 'width'\?"),
        ("tiny_model:network", {"classes": 2}, RecipeError, "unknown option 'classes'"),
        ("odd_model:nothing", {}, ModelError, "^odd_model:nothing: returned dict, not a torch.nn.Module$"),
        ("tim/resnet18", {}, RecipeError, r"unknown model family 'tim'; did you mean 'timm'\?"),
        ("resnet18", {}, RecipeError, "unknown model family 'resnet18'; known: "),
        ("timm/resnet10", {}, ModelError, r"^timm/resnet10: timm has no such model; did you mean 'resnet10t'\?$"),
        ("timm/qqq", {}, ModelError, r"^timm/qqq: timm has no such model; known: (\w+, ){30}and [\d,]+ more$"),
        ("timm/resnet10t", {"widht": 1}, ModelError, r"^timm/resnet10t: cannot be built with {'widht': 1}: .*'widht'"),
    ],
)
def test_a_model_that_cannot_be_built(experiment, model, options, error, sentence):
    (experiment / "odd_model.py").write_text("def nothing(classes):\n    return {}\n")
    with pytest.raises(error, match=sentence):
        build_network(model, 3, options=options)


def test_timm_models_bring_their_own_normalisation():
    resnet = build_network("timm/resnet10t", 7, options={}).eval()
    assert resnet(IMAGES.repeat(1, 1, 4, 4)).shape == (5, 7)
    assert resnet.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 3}
    vit = build_network("timm/vit_tiny_patch16_224", 2, options=options, image_size=32, std=(1.0, 2.0, 4.0)).eval()
    assert vit(IMAGES).shape == (5, 2)
    assert (vit.mean.flatten().tolist(), vit.std.flatten().tolist()) == ([0.5] * 3, [1.0, 2.0, 4.0])


def test_a_timm_model_of_one_size_refuses_another():
    vit = build_network("timm/vit_tiny_patch16_224", 2, channels=1, options={"img_size": [32, 48], "depth": 1})
    assert vit(torch.rand(2, 1, 32, 48)).shape == (2, 2)
    with pytest.raises(ModelError) as caught:
        vit(torch.rand(2, 1, 32, 64))
    assert str(caught.value) == (
        "timm/vit_tiny_patch16_224: takes inputs of 32 x 48, and views.size is [32, 64]; give it `options: {img_size: "
        "[32, 64]}`"
    )
    free = {"img_size": [32, 48], "depth": 1, "dynamic_img_size": True}
    assert build_network("timm/vit_tiny_patch16_224", 2, options=free)(torch.rand(2, 3, 32, 64)).shape == (2, 2)


def test_pretrained_weights_without_a_network(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="^timm/resnet10t: its pretrained weights cannot be fetched .*; give a file"):
        build_network("timm/resnet10t", 3, options={}, pretrained=True)


# ------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_a_torch_file(experiment, wrapper):
    one, other = tiny(0), tiny(1)
    assert not torch.equal(one(IMAGES), other(IMAGES))
    state = one.backbone.state_dict()
    torch.save(state if wrapper is None else {wrapper: state, "epoch": 3}, "w.pth")
    load_weights(other, "w.pth")
    assert torch.equal(one(IMAGES), other(IMAGES))


def test_a_safetensors_file(experiment):
    one, other = tiny(0), tiny(1)
    save_file(one.backbone.state_dict(), "w.safetensors")
    load_weights(other, "w.safetensors")
    assert torch.equal(one(IMAGES), other(IMAGES))


def test_weights_of_another_model(experiment):
    model = tiny()
    state = model.backbone.state_dict()
    cases = {
        "lacks": ({"0.weight": state["0.weight"]}, "lacks '0.bias' and 2 more; give the weights of this model"),
        "more": ({**state, "x": torch.ones(1)}, "has 'x' and 0 more that the model lacks; give"),
        "both": (
            {f"nets.{name}": value for name, value in state.items()},
            "lacks '0.bias' and 3 more; has 'nets.0.bias'",
        ),
        "bent": ({**state, "4.bias": torch.ones(9)}, r"'4.bias' is \(9,\), the model's \(3,\); give"),
        "none": ({}, "lacks '0.bias' and 3 more"),
    }
    before = weights_digest(model)
    for name, (content, sentence) in cases.items():
        save_file(content, f"{name}.safetensors")
        with pytest.raises(ModelError, match=f"^{name}.safetensors: does not fit tiny_model:network: {sentence}"):
            load_weights(model, f"{name}.safetensors")
    assert weights_digest(model) == before


@pytest.mark.parametrize("prefix", ["net.", "model.", "module.", "backbone."])
def test_weights_of_a_module_around_it(experiment, prefix):
    one, other = tiny(0), tiny(1)
    state = {f"{prefix}{name}": value for name, value in one.backbone.state_dict().items()}
    torch.save({"model": state}, "w.pth")
    load_weights(other, "w.pth")
    assert torch.equal(one(IMAGES), other(IMAGES))
    own = network(nn.ModuleDict({prefix[:-1]: nn.Conv2d(3, 4, 3)}))  # a model whose own names begin so
    torch.save(own.backbone.state_dict(), "own.pth")
    load_weights(own, "own.pth")
    cases = {  # one name without it, and two of them
        "part": ({**state, "other": torch.ones(1)}, tiny(), f"lacks '0.bias' and 3 more; has '{prefix}0.bias' and 4"),
        "wrong": ({f"{prefix}{name}": value for name, value in state.items()}, tiny(), "lacks '0.bias' and 3 more"),
    }
    for name, (content, model, sentence) in cases.items():
        torch.save(content, f"{name}.pth")
        with pytest.raises(ModelError, match=f"^{name}.pth: does not fit .*: {sentence}"):
            load_weights(model, f"{name}.pth")


def test_what_the_family_ignores_is_dropped_from_the_file(experiment):
    model = network(nn.Linear(2, 3), ignored=("aux.", "old_"))
    state = {name: torch.randn_like(value) for name, value in model.backbone.state_dict().items()}
    save_file({**state, "aux.weight": torch.ones(1), "old_bias": torch.ones(2)}, "w.safetensors")
    load_weights(model, "w.safetensors")
    assert all(torch.equal(value, state[name]) for name, value in model.backbone.state_dict().items())
    save_file({**state, "auxiliary": torch.ones(1)}, "x.safetensors")
    with pytest.raises(ModelError, match="^x.safetensors: does not fit own:model: has 'auxiliary' and 0 more that the"):
        load_weights(model, "x.safetensors")


def test_a_file_from_before_batchnorm_counted(experiment):
    model = network(nn.Sequential(nn.BatchNorm2d(3)))
    state = {f"0.{name}": torch.rand(3) for name in ("weight", "bias", "running_mean", "running_var")}
    torch.save(state, "w.pth")
    load_weights(model, "w.pth")
    assert all(torch.equal(model.backbone.state_dict()[name], value) for name, value in state.items())
    del state["0.running_var"]
    torch.save(state, "w.pth")
    with pytest.raises(ModelError, match="^w.pth: does not fit own:model: lacks '0.running_var' and 0 more; give"):
        load_weights(model, "w.pth")


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path / "w.pth", tmp_path):
        with pytest.raises(ModelError, match=f"^{path}: no such weights file; train the stage that makes it, or corr"):
            read_weights(path)


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_torn_weights(experiment, kind):
    state, path = tiny().backbone.state_dict(), experiment / f"w.{kind}"
    save_file(state, path) if kind == "safetensors" else torch.save(state, path)
    whole = path.read_bytes()
    assert read_weights(path).keys() == state.keys()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=rf"^{path}: cannot be read as weights \(.*\); copy or make the file"):
            read_weights(path)


class Trap:
    """Makes a file when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("sprung",)


def test_a_torch_file_with_more_than_tensors_is_refused_without_torchs_advice(experiment):
    torch.save({"model": tiny().backbone.state_dict(), "args": argparse.Namespace(lr=1)}, "w.pth")
    with pytest.raises(ModelError, match=r"^w.pth: cannot be read as weights \(it holds more than tensors, or pickled"):
        read_weights("w.pth")


def test_code_in_a_torch_file_is_not_executed(experiment):
    torch.save({"model": tiny().backbone.state_dict(), "extra": Trap()}, "w.pth")
    with pytest.raises(ModelError, match=r"^w.pth: cannot be read as weights"):
        read_weights("w.pth")
    assert not os.path.exists("sprung")
    torch.load("w.pth", weights_only=False)
    assert os.path.exists("sprung")  # the trap works


@pytest.mark.parametrize("content", [[1, 2], {"weight": torch.ones(1), "epoch": 3}, torch.ones(3)])
def test_a_torch_file_of_something_else(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"w.pth: holds no plain state dict; save model.state_dict\(\) and give that"):
        read_weights(tmp_path / "w.pth")


def test_the_digest_is_of_the_weights_alone(experiment):
    one, other = tiny(0), tiny(1)
    assert weights_digest(one) != weights_digest(other)
    for name in ("w.pth", "w.safetensors"):
        state = dict(reversed(one.backbone.state_dict().items()))
        torch.save(state, name) if name.endswith("pth") else save_file(state, name)
        load_weights(other, name)
        assert weights_digest(one) == weights_digest(other)
        weight = other.backbone[0].weight.data
        weight[0, 0, 0, 0] = torch.nextafter(weight[0, 0, 0, 0], torch.tensor(9.0))
        assert weights_digest(one) != weights_digest(other)


def test_the_digest_sees_names_shapes_types_and_counters():
    def digest(**tensors) -> str:
        backbone = nn.Module()
        for name, value in tensors.items():
            backbone.register_buffer(name, value)
        return weights_digest(network(backbone))

    zeros = torch.zeros(4)
    states = [
        {"a": zeros},
        {"b": zeros},
        {"a": zeros.view(2, 2)},
        {"a": zeros.int()},
        {"a": zeros, "count": torch.tensor(3)},
        {"a": zeros, "count": torch.tensor(4)},
        {"a": zeros.bfloat16()},
        {"a": torch.zeros(0)},
        {"a": torch.tensor([True])},
        {},
    ]
    assert len({digest(**state) for state in states}) == len(states)
    assert digest(a=zeros, b=zeros + 1) == digest(b=zeros + 1, a=zeros)
    turned = torch.arange(6.0).view(2, 3).t()
    assert digest(a=turned) == digest(a=turned.contiguous())  # the layout in memory is none of it
