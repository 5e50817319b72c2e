"""Our small vision transformer: its size, its grid, its taps, that it learns, and that it can be exported."""

import pytest
import torch
from torch import nn

from kd_dist.errors import ModelError, RecipeError
from kd_dist.models import build_network
from kd_dist.models.mobile_vit import MobileViT
from kd_dist.models.taps import Taps

NAME = "kd_dist/mobile_vit"
SMALL = {"width": 16, "heads": 2, "blocks": 2, "patch": 4}


def student(outputs: int = 2, channels: int = 1, bounds=(-1.0, 1.0), **options):
    torch.manual_seed(0)
    return build_network(NAME, outputs, channels=channels, bounds=bounds, options=options)


def pixels(batch: int, height: int, width: int, channels: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, channels, height, width), dtype=torch.uint8, generator=generator)


def parameters(module: nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())


def test_its_size():
    assert 1.7e6 < parameters(student()) < 2.2e6
    for sizes in ({"blocks": 2}, {"width": 256, "heads": 8, "blocks": 8}, {"width": 320, "heads": 5, "blocks": 6}):
        assert 0.9e6 < parameters(student(**sizes)) < 8e6
    assert parameters(student(channels=3)) - parameters(student()) == 2 * 9 * 24  # the first convolution alone
    backbone = student().backbone
    assert (len(backbone.blocks), backbone.blocks[0].attn.heads, backbone.head.in_features) == (4, 4, 192)


@pytest.mark.parametrize(
    ("height", "width", "patch", "grid"),
    [(64, 96, 16, (4, 6)), (128, 1296, 16, (8, 81)), (16, 16, 16, (1, 1)), (65, 95, 16, (5, 6)), (8, 12, 2, (4, 6))],
)
def test_its_grid(height, width, patch, grid):
    """Any size of image by the same weights."""
    model = student(**SMALL | {"patch": patch}).eval()
    shapes = Taps(model, {"stem": "stem", "a": "blocks.0", "b": "grid(blocks.1)"}).probe((height, width))
    assert shapes == {"stem": (16, *grid), "a": (16, grid[0] * grid[1]), "b": (16, *grid)}
    assert model(pixels(3, height, width)).shape == (3, 2)
    assert model.backbone.patch_embed.dynamic_feat_size((height, width)) == grid


def test_every_patch_reaches_every_output_and_has_a_place():
    model = student(**SMALL).eval()
    images = pixels(1, 16, 24).float().div(255).requires_grad_()
    model(images)[0, 0].backward()
    reached = images.grad[0, 0].abs().unfold(0, 4, 4).unfold(1, 4, 4).amax(dim=(2, 3))
    assert reached.shape == (4, 6) and (reached > 0).all()
    with torch.no_grad():  # the same patches elsewhere are another image
        assert not torch.allclose(model(images), model(images.flip(-1).roll(4, dims=-1)), atol=1e-6)
        block = model.backbone.blocks[0]
        alike = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(2)).expand(1, 24, 16)
        assert block(alike, 4, 6).std(dim=1).max() > 1e-3  # equal tokens differ by where they are


def test_seen_attention_is_the_fused_one():
    model = student(**SMALL).eval()
    with torch.no_grad():
        fused = model(pixels(2, 16, 24))
        taps = Taps(model, {f"a{number}": f"attention(blocks.{number}.attn)" for number in range(2)})
        assert not any(block.attn.fused_attn for block in model.backbone.blocks)
        torch.testing.assert_close(model(pixels(2, 16, 24)), fused, atol=1e-6, rtol=1e-5)
    assert {name: tuple(value.shape) for name, value in taps.collect(2).items()} == {
        "a0": (2, 1, 4, 6),
        "a1": (2, 1, 4, 6),
    }


@pytest.mark.parametrize("channels", [1, 3])
def test_it_learns_on_a_cpu(channels):
    """Eight images by heart: every part gets a gradient, outputs stay within their bounds."""
    model, images = student(channels=channels, dropout=0.1, **SMALL).train(), pixels(8, 16, 24, channels)
    targets = torch.rand(8, 2, generator=torch.Generator().manual_seed(3)) * 1.6 - 0.8
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(150):
        optimizer.zero_grad()
        output = model(images)
        assert output.abs().max() <= 1
        losses.append((output - targets).square().mean())
        losses[-1].backward()
        assert all(value.grad is not None and value.grad.isfinite().all() for value in model.parameters())
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]


def test_images_are_brought_to_one_around_zero():
    model, seen = student(**SMALL), []
    model.backbone.stem.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(torch.tensor([0, 255], dtype=torch.uint8).repeat(1, 1, 8, 4))
    assert seen[0].unique().tolist() == [-1, 1]


@pytest.mark.parametrize(
    ("options", "given", "error", "sentence"),
    [
        ({"width": 30}, {}, ModelError, "width 30 cannot be divided by 4 heads"),
        ({"blocks": 0}, {}, ModelError, "option 'blocks' must be above 0, not 0"),
        ({"mlp_ratio": -1}, {}, ModelError, "option 'mlp_ratio' must be above 0, not -1"),
        ({"patch": 12}, {}, ModelError, "option 'patch' must be one of 2, 4, 8, 16, 32, 64, not 12"),
        ({"dropout": 1.0}, {}, ModelError, "option 'dropout' must be from 0 to below 1, not 1.0"),
        ({}, {"maps": True}, ModelError, "gives one answer for an image; use kd_dist/mobilenet_v3_small_aspp for maps"),
        ({}, {"pretrained": True}, ModelError, "has no pretrained weights; leave them out, or give a file"),
        ({"widht": 3}, {}, RecipeError, "unknown option 'widht'; did you mean 'width'"),
        ({"channels": 3}, {}, RecipeError, "unknown option 'channels'"),
        ({"heads": 2.5}, {}, RecipeError, "option 'heads' must be a whole number, not 2.5"),
    ],
)
def test_what_cannot_be_built(options, given, error, sentence):
    with pytest.raises(error, match=f"^(kd_dist/mobile_vit: )?{sentence}"):
        build_network(NAME, 2, channels=1, options=options, **given)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_it_can_be_exported():
    model, example, other = student().eval(), pixels(1, 64, 96), pixels(1, 64, 96).flip(-1)
    with torch.no_grad():
        eager = model(other)
        assert not torch.allclose(model(example), eager)
        traced = torch.jit.trace(model, example)
        exported = torch.export.export(model, (example,)).module()
        for graph in (traced, exported):
            torch.testing.assert_close(graph(other), eager, atol=1e-5, rtol=1e-5)


def test_its_defaults_are_those_of_its_docstring():
    assert MobileViT(2).blocks[0].mlp[0].out_features == 4 * 192
    assert MobileViT(2).stem.dynamic_feat_size((32, 48)) == (2, 3)
