"""Our own student for segmentation: its size, its grids, its taps, and that it can be exported."""

import functools

import pytest
import torch
from torch import nn
from torchvision import models

from kd_dist.errors import ModelError, RecipeError
from kd_dist.models import build_network
from kd_dist.models.mobile import Aspp, joined_up, scaled

NAME = "kd_dist/mobilenet_v3_small_aspp"


def student(classes: int = 21, pretrained: bool = False, maps: bool = True, **options):
    torch.manual_seed(0)
    return build_network(NAME, classes, maps=maps, options=options, pretrained=pretrained)


def pixels(batch: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)


def parameters(module: nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())


def test_its_size():
    sizes = [parameters(student(width=width)) for width in (0.25, 0.5, 1.0, 1.5)]
    assert 2.6e6 < sizes[2] < 3.0e6
    assert sizes == sorted(sizes)
    assert sizes[0] < 0.1 * sizes[2]  # the decoder shrinks as well
    assert parameters(student(2).backbone.aspp) == parameters(student(21).backbone.aspp)


def test_channels_are_multiples_of_eight():
    assert [scaled(48, width) for width in (1, 0.5, 0.25, 0.01, 1.5)] == [48, 24, 16, 8, 72]


@pytest.mark.parametrize(("height", "width"), [(120, 160), (521, 389), (33, 47), (4, 4)])
def test_its_grids(height, width):
    """Any size of image, and one image alone."""
    model, seen = student(5, width=0.25).eval(), {}

    def look(name, module, inputs, output):
        seen[name] = (output.shape, output, output._version)

    for name in ("low", "mid", "high"):
        model.backbone.get_submodule(name).register_forward_hook(functools.partial(look, name))
    with torch.no_grad():
        assert model(pixels(1, height, width)).shape == (1, 5, -(-height // 4), -(-width // 4))
    for name, stride in {"low": 4, "mid": 8, "high": 16}.items():
        shape, value, version = seen[name]
        assert shape[2:] == (-(-height // stride), -(-width // stride))
        assert value._version == version  # nothing afterwards changed it in place


def test_its_taps_are_the_ends_of_the_encoders_stages():
    backbone = student().eval().backbone
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        features = backbone.encode(images)
        for value, end in zip(features, (2, 4, 13), strict=True):
            assert torch.equal(value, backbone.encoder[:end](images))
    assert [value.shape[1] for value in features] == [16, 24, 576]


def test_one_image_alone_can_be_trained_on():
    model = student(3, width=0.25).train()
    model(pixels(1, 64, 64)).square().mean().backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in model.parameters())
    assert all(module.training for module in model.modules())


def test_every_part_reaches_the_logits():
    """Neither a branch of the pyramid, nor a skip, nor the whole image's mean is left out."""
    model = student(3, width=0.25).eval()
    parts = [*model.backbone.aspp.branches, model.backbone.aspp.pooled]
    parts += [model.backbone.reduce_low, model.backbone.reduce_mid, model.backbone.aspp]
    assert len(parts) == 8
    with torch.no_grad():
        before = model(pixels(1, 96, 96))
        for part in parts:
            handle = part.register_forward_hook(lambda module, inputs, output: output + 1)
            assert not torch.allclose(model(pixels(1, 96, 96)), before, atol=1e-4)
            handle.remove()
        assert torch.equal(model(pixels(1, 96, 96)), before)


def test_the_pyramid_looks_as_far_as_its_rates():
    """What a single bright place can reach, but for the mean of the whole: itself, and 6, 12 and 18 places away."""
    torch.manual_seed(0)
    pyramid = Aspp(8, 8, 8).eval()
    dark, bright = torch.zeros(2, 1, 8, 41, 41)
    bright[..., 20, 20] = 1
    with torch.no_grad():
        assert (pyramid(bright) != pyramid(dark)).any(dim=1).all()  # the mean reaches every place
        nn.init.zeros_(pyramid.pooled[0].weight)
        rows, columns = (pyramid(bright) != pyramid(dark)).any(dim=1)[0].nonzero(as_tuple=True)
    assert set((rows - 20).abs().tolist()) == set((columns - 20).abs().tolist()) == {0, 6, 12, 18}


def test_the_coarse_grid_is_brought_to_the_fine_one():
    ramp = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 3, 4)
    both = joined_up(ramp, torch.zeros(1, 2, 6, 8))
    assert both.shape == (1, 3, 6, 8)
    assert both[0, 0, 0].tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]
    assert not both[0, 1:].any()


def test_imagenet_weights_of_the_encoder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(
        ModelError, match=f"^{NAME}: its official weights mobilenet_v3_small-047dcff4.pth can be neithe"
    ):
        student(pretrained=True)
    torch.manual_seed(5)
    theirs = models.mobilenet_v3_small(weights=None, dilated=True).eval()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True, exist_ok=True)
    torch.save(theirs.state_dict(), tmp_path / "hub" / "checkpoints" / "mobilenet_v3_small-047dcff4.pth")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = theirs.features(images)
        assert not torch.equal(student().eval().backbone.encode(images)[2], expected)
        assert torch.equal(student(pretrained=True).eval().backbone.encode(images)[2], expected)
    with pytest.raises(
        ModelError, match=f"^{NAME}: its official weights .* do not fit it with these options; leave the"
    ):
        student(pretrained=True, width=0.5)


def test_images_are_normalised_as_imagenet_was():
    model = student()
    assert model.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert model.std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])


@pytest.mark.parametrize(
    ("name", "maps", "options", "error", "sentence"),
    [
        (
            "mobilenet_v3_smal_aspp",
            True,
            {},
            ModelError,
            "^kd_dist/.*: there is no such student; did you mean 'mobilenet",
        ),
        (
            "mobilenet_v3_small_aspp",
            False,
            {},
            ModelError,
            "^kd_dist/.*: answers at every place of an image; use timm/..",
        ),
        ("mobilenet_v3_small_aspp", True, {"widht": 1.0}, RecipeError, "unknown option 'widht'; did you mean 'width'"),
        ("mobilenet_v3_small_aspp", True, {"classes": 1}, RecipeError, "unknown option 'classes'"),
        ("mobilenet_v3_small_aspp", True, {"width": "a"}, RecipeError, "option 'width' must be a number, not 'a'"),
        (
            "mobilenet_v3_small_aspp",
            True,
            {"width": 0},
            ModelError,
            "^kd_dist/.*: option 'width' must be above 0, not 0",
        ),
    ],
)
def test_a_student_that_cannot_be_built(name, maps, options, error, sentence):
    with pytest.raises(error, match=sentence):
        build_network(f"kd_dist/{name}", 3, maps=maps, options=options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_it_can_be_exported():
    model, example, other = student().eval(), pixels(1, 120, 160), pixels(1, 120, 160).flip(-1)
    with torch.no_grad():
        eager = model(other)
        assert eager.std() > 0
        traced = torch.jit.trace(model, example)
        exported = torch.export.export(model, (example,)).module()
        for graph in (traced, exported):
            torch.testing.assert_close(graph(other), eager, atol=1e-5, rtol=1e-5)
