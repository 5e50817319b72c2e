"""Readings of taps: tokens as maps, saliency, attention, against what they are made of."""

import copy
import re
import shutil

import pytest
import torch
from processes import done, ranks, run, sentence
from torch import nn
from trainings import PLAIN, SGD, arguments, assert_same_weights, result, trained

from kd_dist import cache_teacher, train
from kd_dist.errors import ModelError
from kd_dist.losses.features import at
from kd_dist.losses.features import saliency as saliency_loss
from kd_dist.losses.grid import on_grid
from kd_dist.models import Built, Network, build_network
from kd_dist.models.taps import Taps

VIT = {"img_size": [32, 48], "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3}
GRID = (4, 6)
MOBILE = {"width": 16, "heads": 2, "blocks": 2, "patch": 8}


def images(batch: int = 3, height: int = 32, width: int = 48, channels: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, channels, height, width), dtype=torch.uint8, generator=generator)


def vit(name: str = "vit_tiny_patch16_224", **options) -> Network:
    torch.manual_seed(0)
    built = build_network(f"timm/{name}", 2, channels=1, bounds=(-1, 1), options=VIT | options)
    return sharpened(built)


def mobile() -> Network:
    torch.manual_seed(0)
    return sharpened(build_network("kd_dist/mobile_vit", 2, channels=1, bounds=(-1, 1), options=MOBILE))


def sharpened(network: Network) -> Network:
    """Attention that differs more from place to place than that of first weights."""
    for name, value in network.named_parameters():
        if "qkv" in name:
            nn.init.normal_(value, std=0.5)
    return network


class Passes(nn.Module):
    """Something of the images beside what goes on."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, value):
        return self.function(value)


class Own(nn.Module):
    """A backbone of which a tap sees `function(images)`; `embed` says the grid."""

    def __init__(self, function, embed=None, prefix=0):
        super().__init__()
        self.seen, self.patch_embed, self.num_prefix_tokens = Passes(function), embed, prefix

    def forward(self, pixels):
        self.seen(pixels)
        return pixels.mean(dim=(2, 3)).repeat(1, 2)


def own(function, **more) -> Network:
    return Network(Built(Own(function, **more), (0.0,), (1.0,)), 2, None, "own:model")


def embed(height: int, width: int) -> nn.Module:
    module = nn.Identity()
    module.grid_size = (height, width)
    return module


def collected(network: Network, pixels: torch.Tensor, **paths: str) -> dict[str, torch.Tensor]:
    taps = Taps(network, paths)
    network(pixels)
    found = taps.collect(len(pixels))
    taps.remove()
    return found


# ------------------------------------------------------------------------------------------------ grid


@pytest.mark.parametrize(
    ("name", "options", "prefix"),
    [
        ("vit_tiny_patch16_224", {}, 1),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, 0),
        ("vit_tiny_patch16_224", {"reg_tokens": 3}, 4),
        ("vit_tiny_patch16_224", {"dynamic_img_size": True, "img_size": 64}, 1),
        ("deit_tiny_distilled_patch16_224", {}, 2),
    ],
)
def test_tokens_lie_where_their_patches_do(name, options, prefix):
    network = vit(name, **options).eval()
    found = collected(network, images(), tokens="blocks.1", maps="grid(blocks.1)")
    assert found["tokens"].shape == (3, 12, prefix + 24) and found["maps"].shape == (3, 12, *GRID)
    for row in range(4):
        for column in range(6):
            token = found["tokens"][:, :, prefix + 6 * row + column]
            assert torch.equal(found["maps"][:, :, row, column], token)


def test_the_place_of_a_patch_is_that_of_its_pixels():
    for network in (vit().eval(), mobile().eval()):
        path = "patch_embed" if hasattr(network.backbone, "cls_token") else "stem"
        reading = "grid(patch_embed)" if path == "patch_embed" else "stem"
        bright = images(1)
        bright[..., 8:16, 32:40] = 255
        one, other = (collected(network, pixels, f=reading)["f"] for pixels in (images(1), bright))
        changed = (one - other).abs().amax(dim=1)[0]
        assert changed.argmax() == 1 * 6 + 4 and changed.shape == GRID


def test_tokens_of_our_student_follow_the_images():
    taps = Taps(mobile(), {"f": "grid(blocks.0)", "s": "saliency(blocks.1)", "a": "attention(blocks.1.attn)"})
    for height, width in ((32, 48), (16, 8), (40, 44)):
        grid = (-(-height // 8), -(-width // 8))
        assert taps.probe((height, width)) == {"f": (16, *grid), "s": (1, *grid), "a": (1, *grid)}


TOKENS = torch.zeros(2, 7, 5)


@pytest.mark.parametrize(
    ("network", "tap", "problem"),
    [
        (
            own(lambda x: TOKENS, embed=embed(2, 3), prefix=2),
            "grid(seen)",
            "gives 7 tokens, which are no 2x3 patches, with or without 2 tokens before them; tap a module that keeps a "
            "token for each patch",
        ),
        (
            own(lambda x: TOKENS),
            "saliency(seen)",
            "gives tokens, and the network does not say on what grid (`patch_embed.grid_size`); tap a map",
        ),
        (
            own(lambda x: x),
            "grid(seen)",
            "gives (2, 1, 8, 8), and grid() is for tokens (B, N, C); leave it out",
        ),
        (
            own(lambda x: x.mean(dim=(2, 3))),
            "saliency(seen, 2x2)",
            "gives vectors (2, 1), which have no places; tap maps or tokens",
        ),
    ],
)
def test_what_lies_on_no_grid(network, tap, problem):
    problem = re.escape(f"own:model: feature 'f': module 'seen' {problem}")
    taps = Taps(network, {"f": tap})
    with pytest.raises(ModelError, match=f"^{problem}$"):
        taps.probe((8, 8))
    network(images(2, 8, 8))
    with pytest.raises(ModelError, match=f"^{problem}$"):
        taps.collect(2)


def test_tokens_with_and_without_the_prefix():
    for count in (6, 8):
        network = own(lambda x, count=count: torch.arange(2.0 * count).view(2, count, 1), embed=embed(2, 3), prefix=2)
        first = count - 6
        assert collected(network, images(2, 8, 8), f="grid(seen)")["f"][0, 0].tolist() == [
            [first, first + 1, first + 2],
            [first + 3, first + 4, first + 5],
        ]


# ------------------------------------------------------------------------------------------------ saliency


def feature(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [None, (4, 6), (2, 3), (3, 4), (8, 12), (2, 12), (1, 1)])
def test_saliency_is_the_root_of_a_distribution(size):
    value = feature(1, 3, 5, 4, 6)
    tap = "saliency(seen)" if size is None else f"saliency(seen, {size[0]}x{size[1]})"
    found = collected(own(lambda x: value), images(3, 8, 8), f=tap)["f"]
    energies = on_grid(value.square().mean(dim=1, keepdim=True), size or GRID)
    assert found.shape == (3, 1, *(size or GRID)) and found.dtype == torch.float32
    torch.testing.assert_close(found.square(), energies / energies.sum(dim=(2, 3), keepdim=True), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.square().sum(dim=(1, 2, 3)), torch.ones(3))


@pytest.mark.parametrize("loss", [saliency_loss, at])
def test_losses_on_saliency_are_those_on_the_features(loss):
    """The root is what makes them see the distribution itself."""
    one, other = feature(1, 3, 5, 4, 6), feature(2, 3, 9, 4, 6)
    read = [collected(own(lambda x, v=value: v), images(3, 8, 8), f="saliency(seen)")["f"] for value in (one, other)]
    assert loss(one, other).min() > 1e-3
    torch.testing.assert_close(loss(*read), loss(one, other), rtol=1e-3, atol=1e-6)


def test_saliency_of_nothing_is_uniform_and_has_a_gradient():
    value = torch.zeros(2, 5, 4, 6, requires_grad=True)
    found = collected(own(lambda x: value * 1), images(2, 8, 8), f="saliency(seen)")["f"]
    torch.testing.assert_close(found, torch.full((2, 1, 4, 6), 24**-0.5))
    saliency_loss(found, feature(1, 2, 1, 4, 6)).sum().backward()
    assert value.grad.isfinite().all()
    spot = torch.zeros(2, 5, 4, 6)
    spot[:, :, 1, 2] = 3
    spot.requires_grad_()
    found = collected(own(lambda x: spot * 1), images(2, 8, 8), f="saliency(seen)")["f"]
    saliency_loss(found, feature(1, 2, 1, 4, 6)).sum().backward()
    assert found.argmax() == 8 and spot.grad.isfinite().all()


def test_saliency_of_tokens_is_that_of_their_map():
    found = collected(vit().eval(), images(), maps="grid(blocks.1)", f="saliency(blocks.1, 2x3)")
    again = collected(own(lambda x: found["maps"]), images(), f="saliency(seen, 2x3)")["f"]
    assert torch.equal(found["f"], again)


def test_saliency_of_what_is_changed_in_place():
    network = build_network("timm/resnet10t", 2, options={}).eval()
    taps = Taps(network, {"plain": "bn1", "f": "saliency(bn1)"})
    taps.probe((32, 48))
    assert taps.overwritten == {"plain", "f"}
    network(images(channels=3))
    found = taps.collect(3)
    expected = collected(own(lambda x: found["plain"]), images(), f="saliency(seen)")["f"]
    assert found["plain"].min() < 0 and torch.equal(found["f"], expected)


@pytest.mark.parametrize("name", ["mobilevit_xxs", "mobilevitv2_050"])
def test_timms_mobilevits_look_at_spectrograms(name):
    network = build_network(f"timm/{name}", 2, channels=1, bounds=(-1, 1), options={})
    taps = Taps(network, {f"s{number}": f"saliency(stages.{number}, 4x6)" for number in (2, 3, 4)})
    assert taps.probe((64, 96)) == {f"s{number}": (1, 4, 6) for number in (2, 3, 4)}
    output = network.train()(images(3, 64, 96))
    assert output.shape == (3, 2) and output.abs().max() <= 1
    features = taps.collect(3)
    loss = output.square().mean() + sum(saliency_loss(one, feature(4, 3, 1, 4, 6)).mean() for one in features.values())
    loss.backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in network.parameters())


# ------------------------------------------------------------------------------------------------ attention


def expected_attention(network: Network, pixels: torch.Tensor, block: int) -> torch.Tensor:
    """p over the patches from the input of the module itself, in float64."""
    attn, seen = network.backbone.blocks[block].attn, []
    handle = attn.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().double()))
    network(pixels)
    handle.remove()
    tokens, heads = seen[0], getattr(attn, "num_heads", None) or attn.heads
    bias, scores = attn.qkv.bias, 0.0
    if bias is None:  # BEiT's, which scores by distance, too
        bias, scores = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias]), attn._get_rel_pos_bias().double()
    qkv = tokens @ attn.qkv.weight.double().T + bias.double()
    query, key, _ = qkv.view(*tokens.shape[:2], 3, heads, -1).unbind(2)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key).div(query.shape[-1] ** 0.5) + scores
    weights = scores.softmax(-1)
    received = weights.mean(dim=(1, 2))[:, -24:]
    return (received / received.sum(dim=1, keepdim=True)).view(-1, 1, *GRID).detach()


@pytest.mark.parametrize("make", [vit, mobile, lambda: vit(reg_tokens=2), lambda: vit("beit_base_patch16_224")])
def test_attention_is_what_patches_receive(make):
    network = make().eval()
    expected = expected_attention(network, images(), 1)
    assert expected.std() > 1e-4
    found = collected(network, images(), f="attention(blocks.1.attn)", small="attention(blocks.1.attn, 2x3)")
    torch.testing.assert_close(found["f"].double().square(), expected, rtol=1e-4, atol=1e-7)
    small = on_grid(expected, (2, 3))
    torch.testing.assert_close(found["small"].double().square(), small / small.sum((2, 3), True), rtol=1e-4, atol=1e-7)


def test_dropout_of_attention_is_not_looked_at():
    network = vit(attn_drop_rate=0.5).eval()
    resting = collected(network, images(), f="attention(blocks.0.attn)")["f"]
    assert torch.equal(resting, collected(network.train(), images(), f="attention(blocks.0.attn)")["f"])


def test_a_module_is_unfused_while_it_is_tapped():
    network = vit().eval()
    blocks, fused = network.backbone.blocks, network(images())
    taps = Taps(network, {"f": "attention(blocks.0.attn)", "g": "attention(blocks.0.attn, 2x3)"})
    assert [block.attn.fused_attn for block in blocks] == [False, True]
    taps.probe((32, 48))
    torch.testing.assert_close(network(images()), fused, atol=1e-6, rtol=1e-5)
    assert taps.collect(3)["g"].shape == (3, 1, 2, 3)
    taps.remove()
    assert [block.attn.fused_attn for block in blocks] == [True, True]
    network(images())
    assert not taps.taken and not any(module._forward_hooks for module in network.modules())
    assert not network.backbone._forward_pre_hooks


def test_readings_carry_gradients_and_need_none():
    for network in (vit(), mobile()):
        taps = Taps(network, {"g": "grid(blocks.0)", "s": "saliency(blocks.1)", "a": "attention(blocks.1.attn, 2x3)"})
        taps.probe((32, 48))
        network.train()(images())
        found = taps.collect(3)
        block = network.backbone.blocks[1]
        (gradient,) = torch.autograd.grad(found["a"].pow(4).sum(), block.attn.qkv.weight, retain_graph=True)
        width = len(gradient) // 3
        assert gradient[: 2 * width].abs().max() > 0 and not gradient[2 * width :].any()  # values have no part in it
        sum(value.pow(4).sum() for value in found.values()).backward()
        assert all(value.grad.isfinite().all() for value in network.parameters() if value.grad is not None)
        with torch.no_grad():
            network(images())
            assert not any(value.requires_grad for value in taps.collect(3).values())
        with torch.inference_mode():
            network(images(2))
            assert {len(value) for value in taps.collect(2).values()} == {2}


def test_in_lower_precision_readings_are_float32():
    network = vit()
    taps = Taps(network, {"s": "saliency(blocks.1)", "a": "attention(blocks.1.attn)"})
    with torch.autocast("cpu", torch.bfloat16):
        output = network(images())
        found = taps.collect(3)
    assert {output.dtype, *(value.dtype for value in found.values())} == {torch.float32}
    for value in found.values():
        torch.testing.assert_close(value.square().sum(dim=(1, 2, 3)), torch.ones(3))


def test_a_copy_reads_its_own_network():
    taps = Taps(vit().eval(), {"f": "attention(blocks.0.attn)", "g": "grid(blocks.0)"})
    other = copy.deepcopy(taps)
    with torch.no_grad():
        other.network.backbone.blocks[0].attn.qkv.weight.zero_()
        other.network.backbone.blocks[0].attn.qkv.bias.zero_()
        other.network(images())
    assert not taps.taken and taps.patches.grid is None
    assert not taps.taken and taps.patches.grid is None
    torch.testing.assert_close(other.collect(3)["f"], torch.full((3, 1, *GRID), 24**-0.5))  # it looks everywhere alike


@pytest.mark.parametrize(
    ("network", "tap", "problem"),
    [
        (mobile, "attention(blocks.0)", "module 'blocks.0' is no attention that can be read (it has no attn_drop and"),
        (mobile, "attention(blocks.0.atn)", "there is no module 'blocks.0.atn'; did you mean 'blocks.0.attn'?"),
        (mobile, "saliency(blocks.9)", "there is no module 'blocks.9'; did you mean"),
    ],
)
def test_attention_that_cannot_be_read(network, tap, problem):
    with pytest.raises(ModelError, match=f"^kd_dist/mobile_vit: feature 'f': {re.escape(problem)}"):
        Taps(network(), {"f": tap})


def test_attention_within_parts_of_an_image():
    network = build_network("timm/mobilevit_xxs", 2, channels=1, bounds=(-1, 1), options={})
    problem = "module 'stages.2.1.transformer.0.attn' attends within 8 parts of 2 images, not within each image; use"
    with pytest.raises(ModelError, match=f"^timm/mobilevit_xxs: feature 'f': {re.escape(problem)}"):
        Taps(network, {"f": "attention(stages.2.1.transformer.0.attn)"}).probe((64, 64))


# ------------------------------------------------------------------------------------------------ training

TEACHER = ["teacher.model=timm/vit_tiny_patch16_224", "teacher.weights=null", "teacher.name=looks"]
TEACHER += ["teacher.options={img_size: 8, patch_size: 2, embed_dim: 12, depth: 2, num_heads: 2}"]
TEACHER += [
    "cache.features={s: {tap: 'saliency(blocks.1, 2x2)'}, a: {tap: 'attention(blocks.1.attn, 2x2)', store: fp16}, "
    "t: {tap: 'grid(blocks.1)'}}"
]
LOSSES = "stages.distill.losses={kd: {}, saliency: {features: [s, a]}, cosine: {features: [t]}}"
LOOKS = [
    *TEACHER,
    LOSSES,
    "student.taps={s: 'saliency(blocks.0, 2x2)', a: 'attention(blocks.0.attn, 2x2)', t: grid(blocks.0)}",
]
VIT_STUDENT = ["student.model=timm/vit_tiny_patch16_224"]
VIT_STUDENT += ["student.options={img_size: 8, patch_size: 4, embed_dim: 8, depth: 2, num_heads: 2}"]
MOBILE_STUDENT = ["student.model=kd_dist/mobile_vit"]
MOBILE_STUDENT += ["student.options={patch: 4, width: 16, heads: 2, blocks: 1}"]


@pytest.fixture(scope="module")
def looking(lab, tmp_path_factory):
    """The laboratory with the cache of a teacher that says where it looks."""
    folder = tmp_path_factory.mktemp("looking") / "lab"
    shutil.copytree(lab, folder)
    done(run(cache_teacher.main, ["tiny.yaml", *TEACHER, "cache.batch_size=8"], folder=folder))
    return folder


@pytest.mark.slow
def test_a_student_learns_where_to_look_under_every_engine(looking, tmp_path):
    words = [*SGD, *LOOKS, *VIT_STUDENT, "cache.batch_size=8"]
    one = trained(looking, tmp_path / "one", *words)
    ddp = trained(looking, tmp_path / "ddp", *words, world=2)
    zero = trained(looking, tmp_path / "zero", *words, world=2, zero=2)
    for other in (ddp, zero):
        assert_same_weights(one, other, 2e-5, tensors=34)
    history = result(one)["history"]
    assert history[-1]["saliency"] < history[0]["saliency"]


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_loss_that_no_part_in_training_can_change(looking, tmp_path, world):
    words = [*PLAIN, *LOOKS, *VIT_STUDENT, "cache.batch_size=8", "train.train_last=0"]
    words += ["stages.distill.losses={saliency: {features: [s]}}"]
    ended = ranks(train.main, arguments(tmp_path, *words) * world, looking)
    said = sentence(ended[0])
    assert said.startswith("no loss of the stage depends on what it trains; raise `train_last`, or add a loss")
    assert all(one.status == 1 and "Traceback" not in one.output for one in ended)


@pytest.mark.slow
def test_our_student_learns_it_too(looking, tmp_path):
    folder = trained(
        looking, tmp_path, *PLAIN, *LOOKS, *MOBILE_STUDENT, "train.epochs=6", "cache.batch_size=8", world=2
    )
    history = result(folder)["history"]
    assert len(history) == 6 and history[-1]["saliency"] < history[0]["saliency"]
    assert history[-1]["cosine"] < history[0]["cosine"]
