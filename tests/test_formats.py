"""Students in every format: the same model again, or one sentence."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import forget

from kd_dist.choose import imported
from kd_dist.errors import ExportError, KdError
from kd_dist.formats import CONFIG, FORMATS, Graph, missing
from kd_dist.formats.files import opening, writing
from kd_dist.models import build_network

OWN = '''\
"""A user's own models."""

import dataclasses

import torch
from torch import nn


def mobilevitv2(classes):
    """The student of configs/deepfake_sbi.yaml with one transformer block a stage, as each takes seconds to lower."""
    import timm
    from timm.models.mobilevit import model_cfgs

    def shallow(block):
        if isinstance(block, tuple):
            return tuple(map(shallow, block))
        kwargs = {**block.block_kwargs, "transformer_depth": 1} if "transformer_depth" in block.block_kwargs else {}
        return dataclasses.replace(block, d=1, block_kwargs=kwargs or block.block_kwargs)

    return timm.create_model(
        "mobilevitv2_050", num_classes=classes, blocks=tuple(map(shallow, model_cfgs["mobilevitv2_050"].blocks))
    )


def plain(classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes)
    )


class Branching(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.dark, self.bright = plain(classes), plain(classes)

    def forward(self, images):
        return self.bright(images) if images.mean() > 0.5 else self.dark(images)
'''

STUDENTS = {  # of the recipes, small: arguments of build_network, shape of an input, names
    "deepfake": (dict(model="own_formats:mobilevitv2", classes=2, options={}), (3, 64, 64), ("image", "logits")),
    "segmentation": (
        dict(model="kd_dist/mobilenet_v3_small_aspp", classes=5, options={"width": 0.5}, maps=True),
        (3, 64, 96),
        ("image", "logits"),
    ),
    "emotion": (
        dict(model="kd_dist/mobile_vit", classes=2, options={"blocks": 1}, channels=1, bounds=[-1.0, 1.0]),
        (1, 64, 128),
        ("spectrogram", "values"),
    ),
}
FLOAT32 = ("safetensors", "torchscript", "torch_export", "onnx", "executorch")
INT8 = ("onnx_int8", "onnx_dynamic_int8", "executorch_int8")
# At least so many times fewer bytes than the same runtime's float32.
SMALLER = {
    "deepfake": {"onnx_int8": 2, "onnx_dynamic_int8": 2, "executorch_int8": 2},
    "segmentation": {"onnx_int8": 2, "onnx_dynamic_int8": 2, "executorch_int8": 2},
    "emotion": {"onnx_int8": 2, "onnx_dynamic_int8": 2, "executorch_int8": 2},
}
AWAY = {"onnx_int8": 0.5, "onnx_dynamic_int8": 0.5, "executorch_int8": 0.5}  # of the outputs' spread


@dataclasses.dataclass
class Package:
    """A student in all formats."""

    graph: Graph
    inputs: np.ndarray
    expected: np.ndarray  # what the network itself makes of them
    folder: Path
    said: str  # what was printed while the files were written

    def run(self, name: str, inputs: np.ndarray) -> np.ndarray:
        return imported(FORMATS[name].open)(self.folder / FORMATS[name].file, 1)(inputs)


def a_graph(arguments: dict, shape: tuple[int, ...], names: tuple[str, str] = ("image", "logits")) -> Graph:
    torch.manual_seed(0)
    network = build_network(**arguments).eval()
    for module in network.modules():  # as if trained: statistics of their own
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return Graph(network, shape, *names, {CONFIG: json.dumps({"head": None, **arguments}), "licence": "none yet"})


def scenes(count: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Smooth random inputs in [0, 1]."""
    coarse = torch.rand(count, shape[0], 4, 4, generator=torch.Generator().manual_seed(3))
    return torch.nn.functional.interpolate(coarse, shape[1:], mode="bicubic").clamp(0, 1)


def write(name: str, graph: Graph, folder: Path) -> Path:
    path = folder / FORMATS[name].file
    imported(FORMATS[name].write)(graph, scenes(8, graph.shape), path)
    return path


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    """A folder with a user's models, which can be imported."""
    (tmp_path / "own_formats.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture(scope="module", params=STUDENTS)
def package(request, tmp_path_factory):
    """Each student of the recipes in every format, written once."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "own_formats.py").write_text(OWN)
    forget(tmp_path_factory.getbasetemp())
    sys.path.insert(0, str(folder))
    graph = a_graph(*STUDENTS[request.param])
    inputs = scenes(11, graph.shape)[8:]
    with torch.no_grad():
        expected = graph.module(inputs).numpy()
    with (folder / "said").open("w+b") as file:
        kept = [(number, os.dup(number)) for number in (1, 2)]
        capture = request.config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            for number, _ in kept:
                os.dup2(file.fileno(), number)
            try:
                for name in FORMATS:
                    write(name, graph, folder)
                for name in FORMATS:
                    imported(FORMATS[name].open)(folder / FORMATS[name].file, 1)(inputs.numpy())
            finally:
                for number, copy in kept:
                    os.dup2(copy, number)
                    os.close(copy)
        file.seek(0)
        said = file.read().decode()
    yield Package(graph, inputs.numpy(), expected, folder, said)
    sys.path.remove(str(folder))
