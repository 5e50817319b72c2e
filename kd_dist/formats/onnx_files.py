"""Files that ONNX Runtime runs: float32, and 8 bits."""

import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kd_dist.formats import Graph, Run
from kd_dist.formats.files import opening, writing

if TYPE_CHECKING:
    from torch import Tensor

LINEAR, CONVOLUTION = ("MatMul", "Gemm"), ("Conv",)


def write_onnx(graph: Graph, calibration: "Tensor", path: Path) -> None:
    """One file for any batch; its properties hold the graph's metadata."""
    with writing("onnx", path) as file:
        file.write(_model(graph).SerializeToString())


def write_static_int8(graph: Graph, calibration: "Tensor", path: Path) -> None:
    """Weights in 8 bits a channel, activations in 8 bits between the least and the largest that the calibration shows.

    Normalisations stay as they are: in 8 bits they double the error of a transformer.
    """
    with writing("onnx_int8", path) as file, tempfile.TemporaryDirectory() as folder:
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.registry import QDQRegistry

        target = Path(folder, "int8.onnx")
        quantize_static(
            _prepared(graph, folder),
            target,
            _reader(graph, calibration),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=[name for name in QDQRegistry if "Normalization" not in name],
            per_channel=True,
            activation_type=QuantType.QUInt8,  # faster than QInt8 on x86, and as exact
            weight_type=QuantType.QInt8,
        )
        file.write(_finished(target, graph))


def write_dynamic_int8(graph: Graph, calibration: "Tensor", path: Path) -> None:
    """Weights in 8 bits a channel; activations are quantised as they come.

    Convolutions stay in float32 where linear layers have most of the weights: they would gain few bytes and take three
    times as long.
    """
    with writing("onnx_dynamic_int8", path) as file, tempfile.TemporaryDirectory() as folder:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        source, target = _prepared(graph, folder), Path(folder, "int8.onnx")
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=[*LINEAR, *(() if _is_linear(source) else CONVOLUTION)],
            per_channel=True,
            weight_type=QuantType.QInt8,
        )
        file.write(_finished(target, graph))


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
    import torch

    from kd_dist.formats.torch_files import exported

    program = torch.onnx.export(
        exported(graph),
        dynamo=True,
        external_data=False,
        input_names=[graph.input],
        output_names=[graph.output],
        dynamic_shapes=({0: "batch"},),
        verbose=False,
    )
    return _labelled(program.model_proto, graph)


def _labelled(model: Any, graph: Graph) -> Any:
    """A model with the graph's metadata in place of the exporter's, which tells of this machine's files, checked."""
    import onnx

    for one in (*model.graph.node, *model.graph.input, *model.graph.output, *model.graph.initializer):
        one.ClearField("metadata_props")
    del model.graph.value_info[:]
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


def _finished(path: Path, graph: Graph) -> bytes:
    import onnx

    return _labelled(onnx.load(path), graph).SerializeToString()


def _is_linear(path: Path) -> bool:
    """Whether linear layers have most of a model's weights, and not convolutions."""
    import onnx

    graph = onnx.load(path).graph
    sizes = {one.name: math.prod(one.dims) for one in graph.initializer}
    linear, convolution = (
        sum(sizes.get(name, 0) for node in graph.node if node.op_type in kinds for name in node.input)
        for kinds in (LINEAR, CONVOLUTION)
    )
    return linear > convolution


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
