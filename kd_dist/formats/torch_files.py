"""Files that PyTorch itself runs: plain weights, TorchScript, torch.export."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from kd_dist.formats import CONFIG, Graph, Run
from kd_dist.formats.files import opening, writing
from kd_dist.models import build_network, load_weights

METADATA = "metadata.json"  # in the archives of TorchScript and torch.export
PLAIN = ("weight_", "tensor_")  # what tensors are called in those of torch.export


def write_safetensors(graph: Graph, calibration: Tensor, path: Path) -> None:
    """The backbone's weights, and `config.json` beside them, from which `open_safetensors` builds their network."""
    from safetensors.torch import save

    with writing("safetensors", path.with_name("config.json")) as file:
        config = json.loads(graph.metadata[CONFIG])
        file.write((json.dumps(config, indent=1) + "\n").encode())
    with writing("safetensors", path) as file:
        # Each a copy of its own: safetensors refuses tensors that share memory, as tied weights do.
        state = graph.module.backbone.state_dict()
        file.write(save({name: one.detach().clone().contiguous() for name, one in state.items()}, dict(graph.metadata)))


def open_safetensors(path: Path, threads: int) -> Run:
    """Build the network of the `config.json` beside the weights. A user's own factory must be importable."""
    with opening("safetensors", path):
        config = json.loads(path.with_name("config.json").read_bytes())
        if config["head"] is not None:
            config["head"] = SimpleNamespace(**config["head"])
        network = build_network(**config)
        load_weights(network, path)
    return _run(network.eval(), threads)


def write_torchscript(graph: Graph, calibration: Tensor, path: Path) -> None:
    """A trace for any batch. What torch.export refuses is refused here: a trace would keep one branch in silence."""
    with writing("torchscript", path) as file:
        exported(graph)
        with torch.no_grad():
            traced = torch.jit.trace(graph.module, examples(graph), check_trace=False)
        torch.jit.save(traced, file, _extra_files={METADATA: _metadata(graph)})


def open_torchscript(path: Path, threads: int) -> Run:
    """Run a TorchScript archive on the CPU."""
    with opening("torchscript", path):
        module = torch.jit.load(path, map_location="cpu")
    return _run(module, threads)


def write_torch_export(graph: Graph, calibration: Tensor, path: Path) -> None:
    """An exported program for any batch."""
    with writing("torch_export", path) as file:
        program = exported(graph)
        program.example_inputs = None  # megabytes that nobody needs
        torch.export.save(program, file, extra_files={METADATA: _metadata(graph)})


def open_torch_export(path: Path, threads: int) -> Run:
    """Run an exported program on the CPU. One that holds pickled objects is refused: ours do not."""
    with opening("torch_export", path):
        _refuse_pickles(path)
        module = torch.export.load(path).module()
    return _run(module, threads)


def examples(graph: Graph, count: int = 2) -> Tensor:
    """Inputs to follow a graph with, (count, *shape). Two, as torch takes a batch of one for a constant."""
    return torch.zeros(count, *graph.shape)


def exported(graph: Graph, count: int | None = None) -> torch.export.ExportedProgram:
    """The graph as torch.export sees it, of a batch of `count` examples, or of any."""
    dynamic = ({0: torch.export.Dim("batch")},) if count is None else None
    with torch.no_grad():
        program = torch.export.export(graph.module, (examples(graph, count or 2),), dynamic_shapes=dynamic)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # where on this machine its source lies is nobody's business
    return program


def _metadata(graph: Graph) -> str:
    return json.dumps(dict(graph.metadata))


def _refuse_pickles(path: Path) -> None:
    """Raise an ExportError when an archive of torch.export holds more than tensors: loading it would run its code."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(".pt") and archive.getinfo(name).file_size:
                torch.load(io.BytesIO(archive.read(name)), weights_only=True)
            elif name.endswith("_config.json"):
                for one in json.loads(archive.read(name))["config"].values():
                    if one["use_pickle"] or not one["path_name"].startswith(PLAIN):
                        raise ValueError("it holds pickled objects, which are not loaded")


def _run(module: nn.Module | Callable[[Tensor], Tensor], threads: int) -> Run:
    torch.set_num_threads(threads)

    def run(inputs: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return module(torch.from_numpy(inputs)).numpy()

    return run
