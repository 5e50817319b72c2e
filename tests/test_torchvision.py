"""torchvision's models: their official weights, and logits before the last upsampling."""

import re

import pytest
import torch
import torch.nn.functional as F
from torchvision import models

from kd_dist.errors import ModelError
from kd_dist.models import build_network, load_weights
from kd_dist.models.torchvision import _option_names

SEGMENTATION = models.list_models(module=models.segmentation)
CLASSIFICATION = models.list_models(module=models)
OFFICIAL = "fcn_resnet50_coco-1167a1af.pth"
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def images(height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in IMAGENET)
    return (pixels / 255 - mean) / std


def random_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights of that model, unlike those that any model starts with."""
    generator = torch.Generator().manual_seed(7)
    return {
        name: value + 0.01 * torch.rand(value.shape, generator=generator) if value.is_floating_point() else value + 5
        for name, value in model.state_dict().items()
    }


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """torch hub's folder for files, empty, on a machine without a network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.delenv("no_proxy", raising=False)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


# ------------------------------------------------------------------------------------------------ segmentation


@pytest.mark.slow
def test_every_segmentation_model(hub):
    assert len(SEGMENTATION) >= 6
    for name in SEGMENTATION:
        model = build_network(f"torchvision/{name}", 4, maps=True, options={}).eval()
        stride = 16 if name == "deeplabv3_mobilenet_v3_large" else 8
        expected = (2, 4, -(-65 // stride), -(-47 // stride))
        with torch.no_grad():
            assert model(images(65, 47)).shape == expected, name
        assert (model.mean.flatten().tolist(), model.std.flatten().tolist()) == tuple(map(pytest.approx, IMAGENET))
    assert not list(hub.iterdir())  # no backbone was fetched either


@pytest.mark.parametrize("name", ["fcn_resnet50", "lraspp_mobilenet_v3_large"])
def test_logits_are_those_before_the_last_upsampling(name):
    theirs = models.get_model(name, weights=None, weights_backbone=None, num_classes=3).eval()
    ours = build_network(f"torchvision/{name}", 3, maps=True, options={}).eval()
    state = random_state(theirs)
    theirs.load_state_dict(state)
    ours.backbone.load_state_dict(state)  # strictly: the names are the same
    pixels = images(40, 33)
    with torch.no_grad():
        logits = ours(pixels)
        expected = theirs(normalised(pixels))["out"]
    assert logits.shape == (2, 3, 5, 5)
    assert expected.std() > 0
    up = F.interpolate(logits, (40, 33), mode="bilinear", align_corners=False)
    torch.testing.assert_close(up, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_the_official_weights(hub, tmp_path):
    """A file with the names of the official one: the auxiliary head is in it. torch checks the hash in its name on a
    download only, or this would not load."""
    theirs = models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, aux_loss=True).eval()
    state = random_state(theirs)
    assert sum(name.startswith("aux_classifier.") for name in state) == 8
    theirs.load_state_dict(state)
    torch.save(state, hub / OFFICIAL)
    torch.save({"model": state}, tmp_path / "local.pth")
    fetched = build_network("torchvision/fcn_resnet50", 21, maps=True, options={}, pretrained=True).eval()
    loaded = build_network("torchvision/fcn_resnet50", 21, maps=True, options={}).eval()
    pixels = images(24, 24)
    with torch.no_grad():
        assert not torch.equal(fetched(pixels), loaded(pixels))
        load_weights(loaded, tmp_path / "local.pth")
        assert torch.equal(fetched(pixels), loaded(pixels))
        up = F.interpolate(loaded(pixels), (24, 24), mode="bilinear", align_corners=False)
        torch.testing.assert_close(up, theirs(normalised(pixels))["out"], atol=1e-5, rtol=1e-5)
    assert not any("aux" in name for name in loaded.backbone.state_dict())


def test_official_weights_without_a_network(hub, capsys):
    sentence = (
        rf"^torchvision/fcn_resnet50: its official weights {OFFICIAL} can be neither read nor downloaded \(.+\); put "
        rf"the file into {re.escape(str(hub))}, or give a local file \(`weights: <file>`\)$"
    )
    with pytest.raises(ModelError, match=sentence):
        build_network("torchvision/fcn_resnet50", 21, maps=True, options={}, pretrained=True)
    assert not capsys.readouterr().out
    (hub / OFFICIAL).write_bytes(b"half a file")
    with pytest.raises(ModelError, match=sentence):
        build_network("torchvision/fcn_resnet50", 21, maps=True, options={}, pretrained=True)


def test_official_weights_for_other_classes(hub):
    sentence = f"its official weights {OFFICIAL} are for 21 classes, not 12; give a local file instead (`weights: <fi"
    with pytest.raises(ModelError, match=f"^torchvision/fcn_resnet50: {re.escape(sentence)}"):
        build_network("torchvision/fcn_resnet50", 12, maps=True, options={}, pretrained=True)


# ------------------------------------------------------------------------------------------------ classification


def test_a_classification_model_and_its_options():
    model = build_network("torchvision/mobilenet_v3_small", 5, options={"width_mult": 0.5}).eval()
    assert model(images(32, 32)).shape == (2, 5)
    assert model.backbone.features[0][0].out_channels == 8
    assert (model.mean.flatten().tolist(), model.std.flatten().tolist()) == tuple(map(pytest.approx, IMAGENET))


@pytest.mark.slow
def test_the_normalisation_is_that_of_the_weights():
    model = build_network("torchvision/efficientnet_v2_l", 2, options={"dropout": 0.1})
    assert (model.mean.flatten().tolist(), model.std.flatten().tolist()) == ([0.5] * 3, [0.5] * 3)


def test_official_weights_of_a_classification_model(hub):
    theirs = models.mobilenet_v3_small(weights=None).eval()
    state = random_state(theirs)
    theirs.load_state_dict(state)
    torch.save(state, hub / "mobilenet_v3_small-047dcff4.pth")
    ours = build_network("torchvision/mobilenet_v3_small", 1000, options={}, pretrained=True).eval()
    pixels = images(48, 48)
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels), theirs(normalised(pixels)), atol=1e-5, rtol=1e-5)
    sentence = (
        "its official weights mobilenet_v3_small-047dcff4.pth do not fit it with these options; leave the options"
    )
    with pytest.raises(ModelError, match=f"^torchvision/mobilenet_v3_small: {sentence} out, or give a local file"):
        build_network("torchvision/mobilenet_v3_small", 1000, options={"width_mult": 0.5}, pretrained=True)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("googlenet", 64), ("inception_v3", 96)])
def test_models_with_auxiliary_heads_are_built_without(hub, name, size):
    """They also have to turn our normalisation into theirs, as torchvision does for its official weights alone."""
    theirs = models.get_model(name, weights=None, aux_logits=True, transform_input=True, init_weights=False).eval()
    state = random_state(theirs)
    theirs.load_state_dict(state)
    torch.save(state, hub / models.get_model_weights(name).DEFAULT.url.rpartition("/")[2])
    ours = build_network(f"torchvision/{name}", 1000, options={}, pretrained=True).eval()
    pixels = images(size, size)
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels), theirs(normalised(pixels)), atol=1e-4, rtol=1e-4)
    assert ours.train()(pixels).shape == (2, 1000)


@pytest.mark.parametrize(
    ("name", "maps", "options", "sentence"),
    [
        ("fcn_resnet5", True, {}, r"torchvision has no such segmentation model; did you mean 'fcn_resnet50'\?"),
        ("qqq", True, {}, "torchvision has no such segmentation model; known: deeplabv3_mobilenet_v3_large, "),
        ("fcn_resnet50", False, {}, "torchvision has no such classification model; "),
        ("resnet1", False, {}, r"torchvision has no such classification model; did you mean 'resnet\d+'\?"),
        ("fcn_resnet50", True, {"aux_loss": True}, "takes no options, not 'aux_loss'"),
        ("mobilenet_v3_small", False, {"widht_mult": 2}, r"unknown option 'widht_mult'; did you mean 'width_mult'\?"),
        ("resnet18", False, {"weights": "DEFAULT"}, "unknown option 'weights'"),
        ("resnet18", False, {"pretrained": True}, "unknown option 'pretrained'"),
        ("resnet18", False, {"num_classes": 3}, "unknown option 'num_classes'"),
        ("resnet18", False, {"groups": 2}, "cannot be built with {'groups': 2}: BasicBlock only supports groups=1"),
        ("resnet18", False, {"block": 2}, "cannot be built with {'block': 2}: .*multiple values"),
    ],
)
def test_a_model_that_cannot_be_built(name, maps, options, sentence):
    with pytest.raises(ModelError, match=f"^torchvision/{name}: {sentence}"):
        build_network(f"torchvision/{name}", 3, maps=maps, options=options)


def test_options_are_known_for_every_classification_model():
    assert len(CLASSIFICATION) >= 80
    names = [_option_names(models.get_model_builder(name)) for name in CLASSIFICATION]
    assert all(names)
    assert not any({"weights", "num_classes", "pretrained", "kwargs"} & one for one in names)
