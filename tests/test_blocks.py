"""What of a network learns: its blocks in order, what is frozen, statistics that rest, groups of the optimiser."""

import pytest
import torch
from torch import nn

from kd_dist import assemble
from kd_dist.config import load
from kd_dist.errors import KdError, ModelError
from kd_dist.models import Built, Network, build_network
from kd_dist.models.blocks import freeze, groups, head_parameters
from kd_dist.recipe import Head, Stage
from kd_dist.stage import build_optimizer
from kd_dist.student import Student
from kd_dist.trial import check_models

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 3, "num_heads": 3}


def vit(**more) -> Network:
    return build_network("timm/vit_tiny_patch16_224", 2, options=VIT, **more)


def learning(network: Network) -> set[str]:
    """The top two levels of what learns."""
    return {".".join(name.split(".")[:2]) for name, value in network.backbone.named_parameters() if value.requires_grad}


def images(batch: int = 4) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("model", "options", "count", "stem", "head"),
    [
        ("timm/vit_tiny_patch16_224", VIT, 5, "patch_embed.proj.weight", {"head"}),
        ("timm/resnet10t", {}, 6, "conv1.0.weight", {"fc"}),
        ("timm/mobilevit_xxs", {}, 12, "stem.conv.weight", {"head"}),
        ("torchvision/resnet18", {}, 7, "conv1.weight", {"fc"}),
        ("torchvision/mobilenet_v3_small", {}, 2, "features.0.0.weight", {"classifier"}),
        ("kd_dist/mobile_vit", {"width": 16, "heads": 2}, 6, "stem.layers.0.0.weight", {"head"}),
        ("timm/pit_ti_224", {}, None, "pos_embed", {"head"}),  # it has no group_matcher
    ],
)
def test_blocks_of_real_models(model, options, count, stem, head):
    backbone = build_network(model, 2, options=options).backbone
    found = groups(backbone)
    assert count is None or len(found) == count
    assert stem in found[0] and {name.partition(".")[0] for name in found[-1]} == head
    names = [name for one in found for name in one]
    assert len(names) == len(set(names)) and set(names) == {name for name, _ in backbone.named_parameters()}


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (0, set()),
        (1, {"blocks.2", "norm.weight", "norm.bias"}),
        (2, {"blocks.1", "blocks.2", "norm.weight", "norm.bias"}),
    ],
)
@pytest.mark.parametrize("head", [None, Head(hidden=(5,))])
def test_the_last_blocks_learn_and_nothing_else(last, expected, head):
    network = vit(head=head)
    freeze(network, last)
    assert learning(network) == expected | ({"head.weight", "head.bias"} if head is None else {"head.0", "head.3"})
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.train()(images()).square().sum().backward()
    torch.optim.SGD([value for value in network.parameters() if value.requires_grad], lr=1.0).step()
    changed = {
        name.removeprefix("backbone.") for name, value in network.state_dict().items() if not value.equal(before[name])
    }
    assert {".".join(name.split(".")[:2]) for name in changed} == learning(network)


def test_all_blocks_are_everything():
    network = vit()
    freeze(network, 4)
    assert all(value.requires_grad for value in network.parameters())
    with pytest.raises(
        ModelError, match="^timm/vit_tiny_patch16_224: has 4 blocks before its head, of which the last 5"
    ):
        freeze(network, 5)


def statistics(network: Network) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.named_buffers() if "running" in name}


@pytest.mark.parametrize(("last", "resting"), [(0, 14), (1, 11), (5, 0)])
def test_statistics_of_what_is_frozen_rest(last, resting):
    """Also after `train()`, of the network or of what holds it."""
    student = Student(build_network("timm/resnet10t", 2, options={}))
    network = student.network
    freeze(network, last)
    assert len(network.resting) == resting
    before = statistics(network)
    assert len(before) == 2 * 14
    for _ in range(2):
        student.eval()
        student.train()
        student(images())
    moved = {
        name.rpartition(".")[0].removeprefix("backbone.")
        for name, value in statistics(network).items()
        if not value.equal(before[name])
    }
    assert len(moved) == 14 - resting and not moved & set(network.resting)
    assert network.training and network.backbone.fc.training


def test_a_norm_without_weights_goes_with_what_stands_before_it():
    parts = [nn.BatchNorm2d(3, affine=False), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False)]
    parts += [
        nn.Conv2d(4, 4, 1),
        nn.BatchNorm2d(4, affine=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    ]
    for last, resting in ((0, ("0", "2", "4")), (1, ("0", "2")), (2, ())):
        network = Network(Built(nn.Sequential(*parts), (0.0,) * 3, (1.0,) * 3), 2, None, "own:model")
        freeze(network.requires_grad_(True), last)
        assert network.resting == resting
        network.train()
        assert [network.backbone[number].training for number in (0, 2, 4)] == [str(n) not in resting for n in (0, 2, 4)]


def test_layers_that_rest_are_found_again_when_they_were_replaced():
    """As SyncBatchNorm replaces them."""
    network = build_network("timm/resnet10t", 2, options={})
    freeze(network, 0)
    network = nn.SyncBatchNorm.convert_sync_batchnorm(network).train()
    synchronised = [one for one in network.modules() if isinstance(one, nn.SyncBatchNorm)]
    assert len(synchronised) == 14 and not any(one.training for one in synchronised)
    assert not any(value.requires_grad for one in synchronised for value in one.parameters())


# ------------------------------------------------------------------------------------------------ the optimiser


def stage(**more) -> Stage:
    return Stage(losses={}, epochs=1, batch_size=4, lr=0.5, weight_decay=0.25, **more)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("last", [None, 1])
def test_the_backbone_has_groups_of_its_own(optimizer, last):
    student = Student(vit(head=Head(hidden=(5,))), {"f": "blocks.1"}, {"hint": {"f": 7}}, (32, 32))
    if last is not None:
        freeze(student.network, last)
    built = build_optimizer(student, stage(backbone_lr=0.1, optimizer=optimizer))
    names = {value: name for name, value in student.named_parameters()}
    found = [
        ({names[one] for one in group["params"]}, group["weight_decay"], group.get("lr_scale"))
        for group in built.param_groups
    ]
    assert [(decay, scale) for _, decay, scale in found] == [(0.25, 0.1), (0.0, 0.1), (0.25, None), (0.0, None)]
    fast = {f"network.backbone.head.{number}.{what}" for number in (0, 3) for what in ("weight", "bias")}
    fast |= {"projections.hint-f.weight", "projections.hint-f.bias"}
    assert found[2][0] | found[3][0] == fast
    assert found[0][0] | found[1][0] == {name for value, name in names.items() if value.requires_grad} - fast
    assert all(name.endswith("bias") or "norm" in name for name in found[1][0] | found[3][0])


def test_without_a_factor_the_groups_are_those_of_always():
    student = Student(vit())
    built = build_optimizer(student, stage())
    assert [sorted(group.keys() & {"lr_scale"}) for group in built.param_groups] == [[], []]
    assert sum(len(group["params"]) for group in built.param_groups) == len(list(student.parameters()))
    assert {id(one) for one in head_parameters(student.network)} == {
        id(one) for one in student.network.backbone.head.parameters()
    }


# ------------------------------------------------------------------------------------------------ recipes


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["stages.pretrain.train_last=2"],
            "stages.pretrain.train_last: tiny_model:network: has 1 blocks before its head, of which the last 2 cannot",
        ),
        (
            [
                "cache.features={f: {tap: '0'}}",
                "student.taps={f: '0'}",
                "stages.distill.losses={saliency: {}}",
                "stages.distill.train_last=0",
            ],
            "stages.distill.losses: none depends on what the stage trains; raise train_last, now 0, or add a loss",
        ),
    ],
)
def test_what_cannot_learn_is_told_before_anything_is_spent(experiment, words, sentence):
    with pytest.raises(KdError) as caught:
        check_models(load("tiny.yaml", ["teacher.weights=null", *words]))
    assert str(caught.value).startswith(sentence)


def test_a_stage_of_the_recipe_is_frozen_and_is_another_run(packed):
    recipes = [load("tiny.yaml", [f"stages.pretrain.{one}"]) for one in ("clip=1.0", "train_last=0", "backbone_lr=0.5")]
    corridors = [assemble.training_corridor(recipe, "pretrain", 0, 1) for recipe in recipes]
    runs = [assemble.stage_identity(*both) for both in zip(recipes, ["pretrain"] * 3, corridors, strict=True)]
    assert all(one != other for number, one in enumerate(runs) for other in runs[:number])
    check_models(load("tiny.yaml", ["stages.pretrain.train_last=0", "stages.distill.train_last=1"]))
    learn = [
        {
            name
            for name, value in assemble.module(recipe, "pretrain", corridor, None).named_parameters()
            if value.requires_grad
        }
        for recipe, corridor in zip(recipes, corridors, strict=True)
    ]
    assert learn[0] == learn[2] and learn[1] == {"network.backbone.4.weight", "network.backbone.4.bias"}
