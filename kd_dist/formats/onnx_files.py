"""Files that ONNX Runtime runs: float32, and 8 bits."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kd_dist.formats import Graph, Run
from kd_dist.formats.files import opening, writing

if TYPE_CHECKING:
    from torch import Tensor


def write_onnx(graph: Graph, calibration: "Tensor", path: Path) -> None:
    """One file for any batch; its properties hold the graph's metadata."""
    with writing("onnx", path) as file:
        file.write(_model(graph).SerializeToString())


def write_static_int8(graph: Graph, calibration: "Tensor", path: Path) -> None:
    """Weights in 8 bits a channel, activations in 8 bits of the range that the calibration shows."""
    from onnxruntime.quantization import QuantFormat, quantize_static

    with writing("onnx_int8", path) as file, tempfile.TemporaryDirectory() as folder:
        quantize_static(
            _prepared(graph, folder),
            Path(folder, "int8.onnx"),
            _reader(graph, calibration),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
        )
        file.write(_with_metadata(Path(folder, "int8.onnx"), graph))


def write_dynamic_int8(graph: Graph, calibration: "Tensor", path: Path) -> None:
    """Weights in 8 bits a channel; activations are quantised as they come."""
    from onnxruntime.quantization import quantize_dynamic

    with writing("onnx_dynamic_int8", path) as file, tempfile.TemporaryDirectory() as folder:
        quantize_dynamic(_prepared(graph, folder), Path(folder, "int8.onnx"), per_channel=True)
        file.write(_with_metadata(Path(folder, "int8.onnx"), graph))


def open_onnx(path: Path, threads: int) -> Run:
    """Run an ONNX file on the CPU. Loads no torch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors
    with opening("onnx", path):
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        (given,) = session.get_inputs()

    def run(inputs: np.ndarray) -> np.ndarray:
        return session.run(None, {given.name: inputs})[0]

    return run


def _model(graph: Graph) -> Any:
    """The graph as an onnx.ModelProto, checked."""
    import onnx
    import torch

    from kd_dist.formats.torch_files import exported

    model = torch.onnx.export(
        exported(graph),
        dynamo=True,
        external_data=False,
        input_names=[graph.input],
        output_names=[graph.output],
        verbose=False,
    ).model_proto
    onnx.helper.set_model_props(model, dict(graph.metadata))
    onnx.checker.check_model(model, full_check=True)
    return model


def _prepared(graph: Graph, folder: str) -> Path:
    """The graph as the quantisers want it: with all shapes, and its constants folded."""
    import onnx
    import onnxruntime
    from onnxruntime.quantization.shape_inference import quant_pre_process

    onnxruntime.set_default_logger_severity(3)  # the quantisers open sessions of their own
    plain, prepared = Path(folder, "plain.onnx"), Path(folder, "prepared.onnx")
    onnx.save(_model(graph), plain)
    quant_pre_process(plain, prepared)
    return prepared


def _with_metadata(path: Path, graph: Graph) -> bytes:
    import onnx

    model = onnx.load(path)
    onnx.helper.set_model_props(model, dict(graph.metadata))
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _reader(graph: Graph, calibration: "Tensor") -> Any:
    """The calibration examples, one at a time."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.waiting = iter(calibration.numpy())

        def get_next(self) -> dict[str, np.ndarray] | None:
            one = next(self.waiting, None)
            return None if one is None else {graph.input: one[None]}

    return Reader()
