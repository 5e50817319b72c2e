"""What export says of a small package, for tests of what is made of it."""

from typing import Any

FILES = {
    "safetensors": "model.safetensors",
    "torchscript": "model.torchscript",
    "onnx": "model.onnx",
    "onnx_int8": "model.int8.onnx",
    "executorch": "model.pte",
    "executorch_int8": "model.int8.pte",
}
METRICS = {
    "classification": {"accuracy": 0.8125, "nll": 0.4321, "ece": 0.0321},
    "segmentation": {"miou": 0.4567, "pixel_accuracy": 0.8765, "iou/0": 0.3456, "iou/1": None},
    "regression": {"ccc": 0.6543, "mae": 0.1234, "ccc/valence": 0.5432, "mae/valence": 0.2345},
}
TEACHER = {
    "classification": {"accuracy": 0.875, "nll": 0.3888, "ece": 0.0222},
    "segmentation": {"miou": 0.5111, "pixel_accuracy": 0.9, "iou/0": 0.4444, "iou/1": 0.1},
    "regression": {"ccc": 0.7, "mae": 0.1, "ccc/valence": 0.6, "mae/valence": 0.2},
}
OUTPUT = {
    "classification": {"name": "logits", "shape": [1, 3], "range": None},
    "segmentation": {"name": "logits", "shape": [1, 3, 4, 7], "range": None},
    "regression": {"name": "values", "shape": [1, 2], "range": [-1.0, 1.0]},
}
SOUND = {"sample_rate": 8000, "n_fft": 256, "hop": 128, "mels": 16, "fmin": 20.0, "fmax": 4000.0, "db": [-60.0, 40.0]}
FRONT_END = {
    "files": {"onnx": {"file": "front_end.onnx", "bytes": 7_777, "sha256": "f" * 64, "max_difference": 0.513}},
    "not_written": {"executorch": "too | far"},
}


def file_info(number: int, name: str, metrics: dict[str, Any]) -> dict[str, Any]:
    """What is said of one file; figures that no other file has."""
    times = {"one_thread": {"median": 1.11 + number, "p95": 2.22 + number}}
    times["all_threads"] = {"median": 3.33 + number, "p95": 4.44 + number, "threads": 2}
    return {
        "file": FILES[name],
        "bytes": 100_001 + number,
        "sha256": f"{number}" * 64,
        "int8": "int8" in name,
        "note": f"run it | with {name}",
        "max_difference": 1.25e-6 * (number + 1),
        "largest_output": 5.5 + number,
        "metrics": {key: None if value is None else value - 0.001 * number for key, value in metrics.items()},
        "retention": 0.91 + 0.001 * number,
        "kept": 0.995 - 0.001 * number,
        "latency_ms": times,
        "memory_mb": 31.5 + number,
    }


def deployment(
    task: str = "classification", size: tuple[int, int] = (24, 32), view: str = "centre", sound: bool = False
) -> dict[str, Any]:
    """`info` of a package with a file of each of FILES; `size` is (H, W) of its input."""
    channels, metrics, stage = 1 if sound else 3, METRICS[task], "distill"
    losses = {"cross_entropy": {}, "kd": {"weight": 0.75, "temperature": 4.0}}
    return {
        "version": 1,
        "name": "digits",
        "stage": stage,
        "seed": 7,
        "task": task,
        "made_with": {"kd_dist": "0.1.0", "torch": "2.15.0+cpu", "onnxruntime": "1.31.0", "executorch": "1.5.1"},
        "machine": {"processor": "a processor", "threads": 2, "load": 1.25},
        "model": {"name": "timm/some_model", "parameters": 123_456, "macs": 7_654_321},
        "input": {
            "name": "spectrogram" if sound else "image",
            "shape": [1, channels, *size],
            "dtype": "float32",
            "range": [0, 1],
            "layout": "NCHW",
            "channels": "level" if sound else "RGB",
            "view": view,
            "resize": None if sound else "a filter",
            "normalisation": {"mean": [0.485] * channels, "std": [0.229] * channels, "in_graph": True},
            "resized_in_graph_to": 48,
        },
        "output": OUTPUT[task],
        "class_names": None if task == "regression" else ["cat", "dog", "a|b"],
        "outputs": ["valence", "arousal"] if task == "regression" else None,
        "front_end": {**SOUND, "frames": size[1], **FRONT_END} if sound else None,
        "files": {name: file_info(number, name, metrics) for number, name in enumerate(FILES)},
        "not_written": {"torch_export": "the graph | breaks", "onnx_dynamic_int8": "keeps 0.61 of accuracy"},
        "metrics": {
            "split": "test",
            "examples": 1_234,
            "metric": next(iter(metrics)),
            "student": metrics,
            "teacher": TEACHER[task],
            "retention": 0.9285,
        },
        "teacher": {
            "name": "first",
            "model": "timm/big_model",
            "weights_sha256": "t" * 64,
            "cache": {"train": "c0ffee", "test": "decade"},
        },
        "student": {"weights_sha256": "s" * 64},
        "examples": {"train": "facade", "test": "accede"},
        "licences": {"weights": "CC-BY-4.0", "teacher": None, "data": None},
        "recipe": {
            "data": {"source": "camera"},
            "stages": {stage: {"teacher": "cached", "losses": losses, "epochs": 30, "generated": False}},
        },
    }
