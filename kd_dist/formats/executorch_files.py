"""Files that ExecuTorch runs on phones, through XNNPACK: float32, and 8 bits. A batch is one example."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kd_dist.formats import Graph, Run
from kd_dist.formats.files import opening, writing
from kd_dist.formats.torch_files import examples, exported


def write_executorch(graph: Graph, calibration: Tensor, path: Path) -> None:
    """All that XNNPACK knows goes to it; portable kernels do the rest."""
    with writing("executorch", path) as file:
        file.write(_lowered(exported(graph, 1)))


def write_int8(graph: Graph, calibration: Tensor, path: Path) -> None:
    """Weights in 8 bits a channel, activations in 8 bits of the range that the calibration shows."""
    with writing("executorch_int8", path) as file:
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
        with torch.no_grad():
            prepared = prepare_pt2e(exported(graph, 1).module(), quantizer)
            for one in calibration:
                prepared(one[None])
            converted = convert_pt2e(prepared)
            file.write(_lowered(torch.export.export(converted, (examples(graph, 1),))))


def open_executorch(path: Path, threads: int) -> Run:
    """Run a program of ExecuTorch, one example after the other, in a pool of `threads` threads for the process."""
    with opening("executorch", path):
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime

        portable_lib._unsafe_reset_threadpool(threads)  # unsafe while a program runs; there is no other way
        program = Runtime.get().load_program(path)
        method = program.load_method("forward")

    def run(inputs: np.ndarray) -> np.ndarray:
        rows = torch.from_numpy(inputs).split(1)
        return np.concatenate([method.execute([row.contiguous()])[0].numpy().copy() for row in rows])

    return run


def _lowered(program: torch.export.ExportedProgram) -> bytes:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    return to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch().buffer
