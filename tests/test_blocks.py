"""What of a network learns: its blocks in order, what is frozen, statistics that rest, groups of the optimiser."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from timm.optim import param_groups_layer_decay
from torch import nn

from kd_dist import assemble
from kd_dist.batch import Batch, StudentOutput
from kd_dist.config import load
from kd_dist.engine import Engine
from kd_dist.errors import KdError, ModelError
from kd_dist.guard import Keep
from kd_dist.models import Built, Network, build_network
from kd_dist.models.blocks import depths, freeze, groups, recompute
from kd_dist.recipe import Head, Stage
from kd_dist.stage import build_optimizer
from kd_dist.step import learn
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
    head = {value for value, depth in depths(student.network).items() if depth == 0}
    assert head == set(student.network.backbone.head.parameters())


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


def test_an_option_that_is_not_used_and_how_a_step_is_computed_leave_a_run_what_it_was(packed):
    def identity(*words: str) -> dict:
        recipe = load("tiny.yaml", [f"stages.pretrain.{word}" for word in words])
        return assemble.stage_identity(recipe, "pretrain", assemble.training_corridor(recipe, "pretrain", 0, 1))

    plain = identity()
    keys = {"ema", "layer_decay", "unfreeze", "cycle_epochs", "cycle_factor", "sam"}
    assert not plain["stage"].keys() & {*keys, "gradient_checkpointing", "compile", "channels_last"}
    for word in ("gradient_checkpointing=true", "compile=true", "channels_last=true"):
        assert identity(word) == plain
    for word in ("ema=0.9", "layer_decay=0.5", "cycle_epochs=1"):
        assert identity(word)["stage"] == {**plain["stage"], word.partition("=")[0]: float(word.partition("=")[2])}
    late = identity("train_last=0", "unfreeze={1: null}")["stage"]
    assert late["unfreeze"] == {"1": None} and late == json.loads(json.dumps(late))


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


# ------------------------------------------------------------------------------------------------ rates of blocks


def rates(student: Student, **more) -> dict[str, float]:
    """What factor of the learning rate each parameter is given."""
    names = {value: name for name, value in student.named_parameters()}
    built = build_optimizer(student, stage(**more))
    return {names[one]: group.get("lr_scale", 1.0) for group in built.param_groups for one in group["params"]}


@pytest.mark.parametrize("model", ["timm/vit_tiny_patch16_224", "timm/resnet10t", "kd_dist/mobile_vit"])
def test_the_rate_of_a_block_falls_with_its_distance_from_the_head(model):
    """As the formula has it, and of timm's models as timm's own optimisers have it."""
    options = {"timm/vit_tiny_patch16_224": VIT, "kd_dist/mobile_vit": {"width": 16, "heads": 2}}.get(model, {})
    backbone = (network := build_network(model, 2, options=options)).backbone
    found = rates(Student(network), layer_decay=0.75)
    expected = {
        f"network.backbone.{name}": 0.75**distance
        for distance, block in enumerate(reversed(groups(backbone)))
        for name in block
    }
    assert found == expected and len(set(found.values())) == len(groups(backbone)) >= 4
    if model.startswith("timm/"):
        names = {value: f"network.backbone.{name}" for name, value in backbone.named_parameters()}
        theirs = {
            names[one]: group["lr_scale"]
            for group in param_groups_layer_decay(backbone, layer_decay=0.75)
            for one in group["params"]
        }
        assert theirs == pytest.approx(found)


def test_projections_learn_as_fast_as_the_head_and_an_engine_heeds_the_rates():
    student = Student(vit(), {"f": "blocks.1"}, {"hint": {"f": 7}}, (32, 32))
    freeze(student.network, 2)
    found = rates(student, layer_decay=0.5)
    assert {name: rate for name, rate in found.items() if rate == 1} == dict.fromkeys(
        (
            "network.backbone.head.weight",
            "network.backbone.head.bias",
            "projections.hint-f.weight",
            "projections.hint-f.bias",
        ),
        1.0,
    )
    assert {rate for name, rate in found.items() if ".blocks.1." in name} == {0.25}
    assert set(found.values()) == {1.0, 0.5, 0.25}  # what is frozen is in no group
    built = build_optimizer(student, stage(layer_decay=0.5))
    Engine(Accelerator(cpu=True), student, built, None).set_lr(0.1)
    assert {group["lr"] for group in built.param_groups} == {0.1, 0.05, 0.025}


# ------------------------------------------------------------------------------------------------ blocks run again


class Counted(nn.Module):
    """A block, own to nobody, that counts its passes."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Dropout(0.3)
        self.inplace, self.passes = inplace, 0

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        found = self.drop(self.norm(self.conv(values)).relu())
        return values.add_(1) + found if self.inplace else values + found


def own(**more) -> Network:
    parts = [nn.Conv2d(3, 3, 3), nn.Sequential(Counted(), Counted(**more)), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return Network(Built(nn.Sequential(*parts, nn.Linear(3, 2)), (0.0,) * 3, (1.0,) * 3), 2, None, "own:model")


def dropping_vit() -> Network:
    return build_network("timm/vit_tiny_patch16_224", 2, options={**VIT, "proj_drop_rate": 0.2, "drop_path_rate": 0.2})


def resnet() -> Network:
    return build_network("timm/resnet10t", 2, options={"drop_path_rate": 0.2})


def objective(output: StudentOutput, batch: Batch, epoch: float) -> tuple[torch.Tensor, dict]:
    values = [output.logits, *output.projected["hint"].values(), *output.features.values()]
    return sum(one.square().mean() for one in values), {}


def noted(seen: list[int], value: torch.Tensor) -> torch.Tensor:
    seen.append(value.numel())
    return value


@pytest.mark.parametrize(
    ("build", "taps"),
    [
        (own, {"f": "1.0", "inner": "1.1.conv"}),
        (dropping_vit, {"f": "blocks.1", "inner": "blocks.0.mlp.fc1", "seen": "attention(blocks.2.attn)"}),
        (resnet, {"f": "layer1", "inner": "layer2.0.conv1"}),
    ],
)
def test_blocks_that_run_again_have_the_same_gradients_features_and_statistics(build, taps):
    """Two micro-batches, features from within the blocks, dropout, BatchNorm: to the last bit."""
    students, kept = [], []
    for again in (False, True):
        torch.manual_seed(0)
        student = Student(build(), taps, {"hint": {"f": 7, "inner": 5}}, (32, 32)).train()
        if again:
            recompute(student.network)
        run = SimpleNamespace(
            student=student,
            teacher=None,
            stage=SimpleNamespace(sync_bn=False),
            engine=Engine(Accelerator(cpu=True), student, torch.optim.SGD(student.parameters()), None),
            once=Keep(student) if again else None,
            objective=objective,
        )
        torch.manual_seed(1)
        seen: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(partial(noted, seen), lambda value: value):
            for _ in range(2):
                batch = Batch(("a",) * 4, images(), torch.zeros(4), None, torch.ones(4, dtype=torch.bool), 4, None)
                learn(run, batch, 0.0, 0.0, 1.0)
        students.append(student)
        kept.append(sum(seen))
    plain, again = students
    ours, theirs = dict(plain.named_parameters()), dict(again.named_parameters())
    assert len(ours) == len(theirs) >= 10
    for name, value in ours.items():
        assert value.grad is not None and torch.equal(value.grad, theirs[name].grad), name
    for name, value in plain.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    if build is own:
        assert [one.passes for one in again.modules() if isinstance(one, Counted)] == [5, 5]  # one is the probe
        assert [one.passes for one in plain.modules() if isinstance(one, Counted)] == [3, 3]


def test_models_whose_blocks_cannot_run_again_are_refused():
    flat = Network(Built(nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), (0.0,) * 3, (1.0,) * 3), 2, None, "own:model")
    with pytest.raises(ModelError, match="^own:model: has no blocks that could be computed again; set it to false$"):
        recompute(flat)
    network = own(inplace=True).train()
    recompute(network)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        network(images()).sum().backward()


@pytest.mark.parametrize(
    ("model", "options", "count", "inside"),
    [
        ("timm/vit_tiny_patch16_224", VIT, 4, "blocks.2"),
        ("timm/resnet10t", {}, 6, "layer4.0"),
        ("torchvision/resnet18", {}, 8, "layer4.1"),
        ("timm/swin_tiny_patch4_window7_224", {}, 17, "layers.2.blocks.5"),
    ],
)
def test_blocks_that_run_again_are_those_of_the_model(model, options, count, inside):
    network = build_network(model, 2, options=options)
    recompute(network)
    found = [name for name, module in network.backbone.named_modules() if "forward" in vars(module)]
    assert inside in found, found
    assert not any(one != other and one.startswith(f"{other}.") for one in found for other in found)
    assert len(found) == count, found
