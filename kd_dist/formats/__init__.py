"""File formats that a trained student is exported to, and how each is run again. One file a runtime; its library loads
only when the format is chosen, and torch itself only where a format needs it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from torch import nn

CONFIG = "config"  # the key of a graph's metadata that says how its network is built

Run = Callable[[np.ndarray], np.ndarray]  # (B, *shape) float32 -> (B, ...) float32, for any B >= 1


class Graph(NamedTuple):
    """What every format is made from."""

    module: nn.Module  # a Network on the CPU, in evaluation mode: (B, *shape) float32 -> (B, ...) float32
    shape: tuple[int, ...]  # of one input, without the batch
    input: str  # its name, such as `image`
    output: str  # likewise, such as `logits`
    # Goes into the file where its format has a place for it. `config` is JSON: the arguments of build_network() that
    # make the network, without `pretrained`; `head` is null or {"hidden": [...], "dropout": ...}.
    metadata: Mapping[str, str]


class Format(NamedTuple):
    """A format: how a graph is written to a file, and how that file is run."""

    file: str  # its name in a package
    write: str  # "module:function" of (graph, calibration (N, *shape) float32 tensor, path) -> None
    open: str  # "module:function" of (path, threads) -> Run; nothing else of kd_dist's state is needed
    needs: tuple[str, ...]  # libraries that it imports, beside torch and safetensors
    int8: bool  # judged by the task's metric, not by its largest difference
    note: str  # a sentence for the model card: what runs it, and what to know


FORMATS = {
    "safetensors": Format(
        file="model.safetensors",
        write="kd_dist.formats.torch_files:write_safetensors",
        open="kd_dist.formats.torch_files:open_safetensors",
        needs=(),
        int8=False,
        note="Weights alone, for PyTorch with kd_dist: network = build_network(**config) with what config.json "
        "holds, then network.backbone.load_state_dict(load_file(path)).",
    ),
    "torchscript": Format(
        file="model.torchscript",
        write="kd_dist.formats.torch_files:write_torchscript",
        open="kd_dist.formats.torch_files:open_torchscript",
        needs=(),
        int8=False,
        note="For torch.jit.load and libtorch, with any batch. Deprecated, as PyTorch 2.15 warns: take it "
        "only where a server has it already. Its debug records name source files of the machine that wrote it.",
    ),
    "torch_export": Format(
        file="model.pt2",
        write="kd_dist.formats.torch_files:write_torch_export",
        open="kd_dist.formats.torch_files:open_torch_export",
        needs=(),
        int8=False,
        note="For torch.export.load and AOTInductor, with any batch; written by torch.export for the same or a later "
        "PyTorch.",
    ),
    "onnx": Format(
        file="model.onnx",
        write="kd_dist.formats.onnx_files:write_onnx",
        open="kd_dist.formats.onnx_files:open_onnx",
        needs=("onnx", "onnxscript", "onnxruntime"),
        int8=False,
        note="For ONNX Runtime on Android, iOS, desktops and servers, in one file, with any batch.",
    ),
    "onnx_int8": Format(
        file="model.int8.onnx",
        write="kd_dist.formats.onnx_files:write_static_int8",
        open="kd_dist.formats.onnx_files:open_onnx",
        needs=("onnx", "onnxscript", "onnxruntime"),
        int8=True,
        note="For ONNX Runtime; weights and activations in 8 bits (QDQ), in ranges measured on cached training "
        "examples.",
    ),
    "onnx_dynamic_int8": Format(
        file="model.dynamic-int8.onnx",
        write="kd_dist.formats.onnx_files:write_dynamic_int8",
        open="kd_dist.formats.onnx_files:open_onnx",
        needs=("onnx", "onnxscript", "onnxruntime"),
        int8=True,
        note="For ONNX Runtime; weights in 8 bits, activations in ranges of each input.",
    ),
    "executorch": Format(
        file="model.pte",
        write="kd_dist.formats.executorch_files:write_executorch",
        open="kd_dist.formats.executorch_files:open_executorch",
        needs=("executorch",),
        int8=False,
        note="For ExecuTorch with its XNNPACK backend on Android and iOS, one example at a time; the app's runtime "
        "must be of the release that wrote it.",
    ),
    "executorch_int8": Format(
        file="model.int8.pte",
        write="kd_dist.formats.executorch_files:write_int8",
        open="kd_dist.formats.executorch_files:open_executorch",
        needs=("executorch", "torchao"),
        int8=True,
        note="For ExecuTorch with its XNNPACK backend, one example at a time; weights and activations in 8 bits, in "
        "ranges measured on cached training examples.",
    ),
}


def missing(chosen: Format) -> list[str]:
    """The libraries of a format that are not installed; `pip install 'kd_dist[export]'` brings all of them."""
    return [name for name in chosen.needs if importlib.util.find_spec(name) is None]
