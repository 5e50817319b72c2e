"""Deep heads: where they are put, what they are made of, and that a teacher with another head is another teacher."""

import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kd_dist import assemble, caches
from kd_dist.config import load
from kd_dist.errors import ModelError
from kd_dist.models import build_network, load_weights
from kd_dist.models.heads import with_head
from kd_dist.recipe import Head

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3}
# Where the classifier of a model is.
PLACES = {
    "timm/vit_tiny_patch16_224": (VIT, "head", 12),
    "timm/resnet10t": ({}, "fc", 512),
    "timm/mobilenetv3_small_050": ({}, "classifier", 1024),
    "timm/convnext_atto": ({}, "head.fc", 320),
    "timm/mobilevitv2_050": ({}, "head.fc", 256),
    "torchvision/resnet18": ({}, "fc", 512),
    "torchvision/mobilenet_v3_small": ({"width_mult": 0.5}, "classifier.3", 512),
    "kd_dist/mobile_vit": ({"width": 16, "heads": 2, "blocks": 1, "patch": 8}, "head", 16),
}


def network(model: str, options: dict, head: Head | None, outputs: int = 2):
    torch.manual_seed(0)
    return build_network(model, outputs, bounds=(-1, 1), head=head, options=options)


def pixels(batch: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("model", PLACES)
def test_it_stands_where_the_classifier_stood(model):
    options, place, features = PLACES[model]
    plain, deep = (network(model, options, head).eval() for head in (None, Head(hidden=(6, 5), dropout=0.25)))
    layers = list(deep.backbone.get_submodule(place))
    assert [(one.in_features, one.out_features) for one in layers[::3]] == [(features, 6), (6, 5), (5, 2)]
    assert [type(one) for one in layers] == [nn.Linear, nn.GELU, nn.Dropout] * 2 + [nn.Linear]
    assert [one.p for one in layers[2::3]] == [0.25, 0.25]
    others = {name for name in plain.state_dict() if not name.startswith(f"backbone.{place}.")}
    new = {f"backbone.{place}.{number}.{what}" for number in (0, 3, 6) for what in ("weight", "bias")}
    assert set(deep.state_dict()) == others | new
    with torch.no_grad():
        said = deep(pixels())
        assert said.shape == (2, 2) and said.abs().max() <= 1
        layers[-1].bias.fill_(30)  # the head is what answers
        assert torch.equal(deep(pixels()), torch.ones(2, 2))


def test_the_head_of_a_large_teacher():
    """A ViT-Base without its blocks: 768 -> 512 -> 128 -> 2."""
    options = {"img_size": 32, "depth": 0}
    head = network("timm/vit_base_patch16_224", options, Head()).backbone.head
    assert [tuple(one.weight.shape) for one in head if isinstance(one, nn.Linear)] == [(512, 768), (128, 512), (2, 128)]


def test_dropout_acts_in_training_alone():
    model = network("timm/vit_tiny_patch16_224", VIT, Head(hidden=(64,), dropout=0.5))
    assert not torch.equal(model.train()(pixels()), model(pixels()))
    assert torch.equal(model.eval()(pixels()), model(pixels()))


class Two(nn.Module):
    """A hidden layer of as many outputs as the task has, before the last one."""

    def __init__(self):
        super().__init__()
        self.gate, self.head = nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, images):
        return self.head(self.gate(images.mean(dim=(2, 3))))


def test_the_last_of_several_is_meant():
    backbone = Two()
    with_head(backbone, 2, Head(hidden=(4,)), "own:model")
    assert isinstance(backbone.gate, nn.Linear) and backbone.head[0].out_features == 4
    assert backbone(torch.rand(5, 3, 4, 4)).shape == (5, 2)


@pytest.mark.parametrize(
    ("model", "options", "sentence"),
    [
        ("timm/dla34", {}, "has no linear layer with 2 outputs at its end, so `head` has nothing to replace; leave"),
        ("timm/levit_128s", {}, "answers with 2 layers together (head.linear, head_dist.linear), so `head` cannot rep"),
        ("torchvision/squeezenet1_1", {}, "has no linear layer with 2 outputs at its end, so `head` has nothing to"),
    ],
)
def test_a_model_without_a_classifier_to_replace(model, options, sentence):
    with pytest.raises(ModelError, match=f"^{re.escape(f'{model}: {sentence}')}"):
        network(model, options, Head())


def test_a_backbone_that_is_nothing_but_its_classifier():
    with pytest.raises(ModelError, match="^own:model: has no linear layer with 2 outputs at its end"):
        with_head(nn.Linear(4, 2), 2, Head(), "own:model")


def test_weights_go_with_the_head_that_they_were_made_for(tmp_path):
    one = network("timm/vit_tiny_patch16_224", VIT, Head(hidden=(6,)))
    other = network("timm/vit_tiny_patch16_224", VIT, Head(hidden=(6,)))
    nn.init.ones_(other.backbone.head[3].bias)
    save_file(one.backbone.state_dict(), tmp_path / "w.safetensors")
    load_weights(other, tmp_path / "w.safetensors")
    assert torch.equal(one.eval()(pixels()), other.eval()(pixels()))
    for head, problem in ((None, "lacks 'head.bias'"), (Head(hidden=(7,)), r"'head\.\d\.\w+' is ")):
        with pytest.raises(ModelError, match=problem):
            load_weights(network("timm/vit_tiny_patch16_224", VIT, head), tmp_path / "w.safetensors")


def test_another_head_is_another_teacher_and_another_run(packed):
    words = [
        [],
        ["teacher.head={hidden: [4]}"],
        ["teacher.head={hidden: [5]}"],
        ["teacher.head={hidden: [4], dropout: 0.1}"],
    ]
    words = [["teacher.weights=null", *one] for one in words]
    recipes = [load("tiny.yaml", one) for one in words]
    teachers = [caches.teacher_identity(recipe) for recipe in recipes]
    runs = [
        assemble.stage_identity(recipe, "teacher", assemble.training_corridor(recipe, "teacher", 0, 1))
        for recipe in recipes
    ]
    for found in (teachers, runs):
        assert all(one != other for number, one in enumerate(found) for other in found[:number])
    assert "head" not in teachers[0]  # caches from before there were heads
    assert teachers[1]["head"] == {"hidden": [4], "dropout": 0.0}
    built = assemble.teacher(recipes[1]).network
    assert built.backbone[4][0].out_features == 4  # the recipe's head reaches the model
