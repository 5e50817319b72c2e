"""Published weights in the naming of efficientnet_pytorch give the outputs of efficientnet_pytorch."""

from pathlib import Path

import pytest
import torch
from efficientnet_pytorch import EfficientNet
from torch import nn

from kd_dist.errors import ModelError
from kd_dist.models import build_network, load_weights
from kd_dist.models.efficientnet import is_published, renamed

SIZES = [f"b{number}" for number in range(8)]


def uint8(size: int, seed: int = 0) -> torch.Tensor:
    """Two images with edges at their borders: dark with bright stripes, and the other way round."""
    one = torch.randint(0, 60, (1, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    one[..., ::7] = 200
    one[..., -3:, :] = 255
    return torch.cat([one, 255 - one])


class Detector(nn.Module):
    """The published wrapper: a network under `net`."""

    def __init__(self, size: str, pixels: int) -> None:
        super().__init__()
        # What from_pretrained("efficientnet-b4", advprop=True, num_classes=2) builds before it downloads.
        self.net = EfficientNet.from_name(f"efficientnet-{size}", num_classes=2, image_size=pixels, drop_connect_rate=0)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images)


def published(size: str, pixels: int) -> Detector:
    """A detector whose weights are drawn; its BatchNorm has the statistics of two images, so that what an image is like
    is still felt at the end."""
    torch.manual_seed(pixels)
    made = Detector(size, pixels)
    norms = [one for one in made.modules() if isinstance(one, nn.BatchNorm2d)]
    with torch.no_grad():
        for one in norms:
            one.momentum = 1.0
            one.weight.uniform_(0.7, 1.7)
            one.bias.normal_(0, 0.2)
        made.train()(uint8(pixels).float() / 255)
    return made.eval()


def save(detector: Detector, path: Path, **changed: torch.Tensor | None) -> Path:
    """Save it as FFc23.tar is: with an optimiser that has taken a step, and the number of the epoch."""
    optimizer = torch.optim.SGD(detector.parameters(), lr=0.0, momentum=0.9)
    detector.net._fc(torch.ones(1, detector.net._fc.in_features)).sum().backward()
    optimizer.step()
    state = {name: value for name, value in {**detector.state_dict(), **changed}.items() if value is not None}
    torch.save({"model": state, "optimizer": optimizer.state_dict(), "epoch": 99}, path)
    return path


def ours(model: str, path: Path | None = None):
    made = build_network(model, 2, options={}, mean=(0.0,) * 3, std=(1.0,) * 3).eval()
    if path is not None:
        load_weights(made, path)
    return made


# ------------------------------------------------------------------------------------------------ the same outputs


@pytest.mark.slow
@pytest.mark.parametrize(("size", "pixels"), [("b4", 380), ("b0", 224), ("b0", 225), ("b0", 380)])
def test_a_published_file_gives_the_outputs_of_its_own_package(tmp_path, size, pixels):
    """Even, odd and asymmetric paddings. With timm's other model of these shapes the outputs are others."""
    detector, images = published(size, pixels), uint8(pixels)
    loaded = ours(f"timm/tf_efficientnet_{size}", save(detector, tmp_path / "FFc23.tar"))
    plain = ours(f"timm/efficientnet_{size}")
    plain.backbone.load_state_dict(loaded.backbone.state_dict())  # so every shape is the same
    with torch.no_grad():
        expected, found, wrong = detector(images.float() / 255), loaded(images), plain(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 0.05  # what an image is like is felt
    assert (wrong - expected).abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_every_tensor_of_every_size_has_its_place(size):
    import timm

    theirs = EfficientNet.from_name(f"efficientnet-{size}", num_classes=2).state_dict()
    wanted = timm.create_model(f"tf_efficientnet_{size}", num_classes=2).state_dict()
    found = renamed(theirs, wanted)
    assert len(found) == len(theirs) >= 360
    assert {name: value.shape for name, value in found.items()} == {name: one.shape for name, one in wanted.items()}
    assert is_published(theirs) and not is_published(wanted)
    assert renamed(theirs, reversed(wanted)).keys() == found.keys()  # in whatever order the names come


# ------------------------------------------------------------------------------------------------ what does not fit

NO_MARGIN = torch.zeros(1, 1280)
BLOCK = "net._blocks.1._expand_conv.weight"
WRONG = [
    ({BLOCK: None}, "lacks 'blocks.1.0.conv_pw.weight' and 0 more; give the weights of this model"),
    ({"net._fc.bias": None}, "lacks 'classifier.bias' and 0 more; give"),
    ({"net._blocks.16._bn0.bias": torch.ones(3)}, "has '_blocks.16._bn0.bias' and 0 more that the model lacks; give"),
    ({"net._blocks.0._bn0.bias": torch.ones(32)}, "has '_blocks.0._bn0.bias' and 0 more that the model lacks; give"),
    ({"net._swish": torch.ones(1)}, "has '_swish' and 0 more that the model lacks; give"),
    ({"net._fc.weight": NO_MARGIN}, r"'classifier.weight' is \(1, 1280\), the model's \(2, 1280\); give"),
    ({"head.bias": torch.ones(2)}, "lacks 'blocks.0.0.bn1.bias' and 310 more; has 'head.bias' and 360 more that"),
]


@pytest.mark.parametrize(("changed", "sentence"), WRONG, ids=[next(iter(changed)) for changed, _ in WRONG])
def test_a_file_that_does_not_fit(tmp_path, changed, sentence):
    path = save(published("b0", 32), tmp_path / "w.tar", **changed)
    with pytest.raises(ModelError, match=f"^{path}: does not fit timm/tf_efficientnet_b0: {sentence}"):
        ours("timm/tf_efficientnet_b0", path)


def test_a_weight_under_two_names_is_refused(tmp_path):
    path = save(published("b0", 32), tmp_path / "w.tar", **{"net.conv_stem.weight": torch.ones(32, 3, 3, 3)})
    with pytest.raises(ModelError, match=f"^{path}: has a weight under two names; give the file as it was published"):
        ours("timm/tf_efficientnet_b0", path)


def test_the_file_of_another_size(tmp_path):
    path = save(published("b1", 32), tmp_path / "w.tar")
    sentence = "lacks 'blocks.1.0.bn1.bias' and 4 more; has '_blocks.16._bn0.bias' and 153 more that the model lacks;"
    with pytest.raises(ModelError, match=f"^{path}: does not fit timm/tf_efficientnet_b0: {sentence}"):
        ours("timm/tf_efficientnet_b0", path)


@pytest.mark.parametrize(
    ("model", "better"),
    [
        ("timm/efficientnet_b0", "timm/tf_efficientnet_b0"),
        ("timm/efficientnet_b0.ra_in1k", "timm/tf_efficientnet_b0"),
        ("timm/resnet10t", "timm/tf_efficientnet_b4, or the size of the file"),
    ],
)
def test_a_model_that_computes_something_else_is_refused(tmp_path, model, better):
    path = save(published("b0", 32), tmp_path / "w.tar")
    with pytest.raises(ModelError) as caught:
        ours(model, path)
    assert str(caught.value) == (
        f"{path}: has weights named as in efficientnet_pytorch, of a model that pads and normalises as TensorFlow "
        f"does, and {model} does not; write model: {better}"
    )


def test_an_epsilon_or_a_padding_alone_is_another_model(tmp_path):
    path = save(published("b0", 32), tmp_path / "w.tar")
    for options, fits in (
        ({"pad_type": "same", "bn_eps": 1e-3}, True),
        ({"pad_type": "same"}, False),
        ({"bn_eps": 1e-3}, False),
    ):
        made = build_network("timm/efficientnet_b0", 2, options=options)
        if fits:
            load_weights(made, path)
        else:
            with pytest.raises(ModelError, match="write model: timm/tf_efficientnet_b0$"):
                load_weights(made, path)


def test_a_model_of_the_package_itself_takes_its_own_names(tmp_path, monkeypatch):
    (tmp_path / "their_model.py").write_text(
        "from efficientnet_pytorch import EfficientNet\n\n\n"
        "def network(classes):\n    return EfficientNet.from_name('efficientnet-b0', num_classes=classes)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    detector = published("b0", 32)
    made = ours("their_model:network", save(detector, tmp_path / "w.tar"))
    assert torch.equal(made.backbone._fc.weight, detector.net._fc.weight)
