"""A file is the student when it says the same of every example; what it takes is measured in a process of its own."""

import errno
import io
import re
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from processes import done, run
from rich.console import Console

from kd_dist import proof
from kd_dist.batch import Batch
from kd_dist.errors import ExportError, ModelError, Preempted
from kd_dist.evaluation import evaluate
from kd_dist.formats import FORMATS
from kd_dist.tasks import Classification
from kd_dist.tasks.regression import Regression

TASK = Classification(3)
ROWS = 7  # of a batch


class Student(torch.nn.Module):
    """(B, 3, 4, 4) uint8 or [0, 1] -> (B, 3): the sums of the channels."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images.float() / 255 if images.dtype == torch.uint8 else images
        return pixels.sum(dim=(2, 3))


def stream(batches: int = 3) -> list[Batch]:
    """Batches of noise, in each of which the second row has failed."""
    random, found = np.random.default_rng(0), []
    for number in range(batches):
        valid = torch.tensor([row != 1 for row in range(ROWS)])
        images = random.integers(0, 256, (ROWS, 3, 4, 4), np.uint8)
        images[1] = 0
        targets = torch.from_numpy(random.integers(0, 3, ROWS))
        keys = tuple(f"{number}-{row}" for row in range(ROWS))
        said = (f"example '{number}-1' is masked",)
        found.append(Batch(keys, torch.from_numpy(images), targets, None, valid, ROWS, None, said))
    return found


def same(images: np.ndarray) -> np.ndarray:
    return Student()(torch.from_numpy(images)).numpy()


def compared(capsys, **files) -> tuple[proof.Outcome, dict[str, proof.Outcome]]:
    found = proof.compare(Student(), files, stream(), TASK, error_limit=3)
    assert "the metrics leave out 3 examples" in capsys.readouterr().err
    return found


def test_a_file_that_is_the_student_has_its_metrics(capsys):
    own, heard = compared(capsys, same=same)
    expected = evaluate(lambda batch: Student()(batch.images), stream(), TASK, torch.device("cpu"))
    assert own.metrics == heard["same"].metrics == expected and expected.keys() == {"accuracy", "nll", "ece"}
    assert heard["same"].range == own.range and 0 < own.range[0] < own.largest == own.range[1] < 16
    assert heard["same"].max_difference == 0 and heard["same"].failure is None


def test_the_largest_difference_is_that_of_one_output_of_one_example(capsys):
    calls = []

    def off(images: np.ndarray) -> np.ndarray:
        if len(images) == 1:  # the first row alone
            return same(images)
        assert images.dtype == np.float32 and images.shape == (ROWS - 1, 3, 4, 4)  # valid rows alone
        said = same(images)
        if len(calls) == 1:
            said[4, 2] -= 0.25
        calls.append(len(images))
        return said

    _, heard = compared(capsys, off=off)
    assert heard["off"].max_difference == pytest.approx(0.25, abs=1e-5) and len(calls) == 3


def test_what_a_file_says_of_an_example_alone_counts(capsys):
    """As an app asks. A student whose answer depends on what else is in a batch is no student of one example."""

    def centred(images: np.ndarray) -> np.ndarray:
        return same(images) - (0 if len(images) > 1 else 0.5)

    def lost(images: np.ndarray) -> np.ndarray:
        return same(images) if len(images) > 1 else np.full((1, 3), np.nan, np.float32)

    own, heard = compared(capsys, centred=centred, lost=lost)
    assert heard["centred"].max_difference == pytest.approx(0.5, abs=1e-5) and heard["centred"].failure is None
    assert proof.verdict(FORMATS["onnx"], heard["lost"], own, "accuracy", 1e9, 1e-9) is not None


def test_a_file_that_fails_says_how_and_is_asked_no_more(capsys):
    asked = []

    def nan(images: np.ndarray) -> np.ndarray:
        asked.append("nan")
        said = same(images)
        said[2:3, 0] = np.nan
        return said

    def broken(images: np.ndarray) -> np.ndarray:
        raise RuntimeError("no kernel for Conv")

    own, heard = compared(capsys, nan=nan, broken=broken, flat=lambda images: same(images).ravel(), same=same)
    # Row 2 of the valid ones is row 3 of the batch.
    assert heard["nan"].failure == "gives an output that is not finite, for example '0-3' first"
    assert heard["broken"].failure == "cannot be run (no kernel for Conv)"
    assert heard["flat"].failure == "gives outputs of shape (18,) where the student's are (6, 3)"
    assert heard["same"].failure is None and asked == ["nan", "nan"]  # a batch and its first row, once
    for name in ("nan", "broken", "flat"):
        for form in (FORMATS["onnx"], FORMATS["onnx_int8"]):
            assert proof.verdict(form, heard[name], own, "accuracy", 1e9, 1e-9) == heard[name].failure


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("error", [Preempted("stopped"), OSError(errno.ENOSPC, "full"), MemoryError()])
def test_what_is_not_the_files_fault_is_raised(error, wrapped):
    """Also when a library has made an error of its own of it."""

    def run(images: np.ndarray) -> np.ndarray:
        try:
            raise error
        except Exception as first:
            raise (RuntimeError("no kernel") if wrapped else first) from (first if wrapped else None)

    with pytest.raises(type(error)):
        proof.compare(Student(), {"onnx": run}, stream(), TASK, None)


def test_a_student_that_is_not_finite_is_no_student():
    def bad(images: torch.Tensor) -> torch.Tensor:
        said = Student()(images)
        said[5] = torch.inf
        return said

    with pytest.raises(ModelError, match=r"the student's output for example '0-5' is not finite, so there is nothing"):
        proof.compare(bad, {}, stream(), TASK, None)


def test_one_by_one_no_example_depends_on_the_others():
    sizes = []

    def centred(images: np.ndarray) -> np.ndarray:
        sizes.append(len(images))
        return same(images - images.mean())

    images = np.random.default_rng(0).random((5, 3, 4, 4), np.float32)
    expected = np.stack([same((one - one.mean())[None])[0] for one in images])
    assert np.abs(centred(images) - expected).max() > 0.01
    np.testing.assert_allclose(proof.one_by_one(centred)(images), expected, rtol=0, atol=1e-5)
    assert sizes == [5, 1, 1, 1, 1, 1]


# ---------------------------------------------------------------------------------------------- the verdict


def outcome(difference: float = 0.0, largest: float = 1.0, **metrics: float | None) -> proof.Outcome:
    return proof.Outcome(metrics, (-largest, largest), difference)


@pytest.mark.parametrize(
    "difference, largest, enough",
    [(1e-5, 1, True), (1.01e-5, 1, False), (1.01e-5, 0.1, False), (1e-4, 10, True), (1.01e-4, 10, False)],
)
def test_float32_files_are_held_to_the_largest_output_of_the_student(difference, largest, enough):
    own = outcome(largest=largest, accuracy=0.9)
    why = proof.verdict(FORMATS["onnx"], outcome(difference, accuracy=0.1), own, "accuracy", 1e-5, 0.95)
    assert (why is None) == enough
    if not enough:
        assert why == (
            f"differs from the student by {difference:.1e}, and export.limits.parity 1e-05 allows "
            f"{1e-5 * max(1, largest):.1e}"
        )


@pytest.mark.parametrize(
    "metric, value, reference, enough",
    [
        ("accuracy", 0.855, 0.9, True),
        ("accuracy", 0.8549, 0.9, False),
        ("accuracy", 0.95, 0.9, True),
        ("mae", 0.1, 0.095, True),  # lower is better
        ("mae", 0.1, 0.094, False),
        ("mae", 0.05, 0.1, True),
        ("ccc", -0.1, -0.2, True),  # no share of less than nothing: then no worse will do
        ("ccc", -0.3, -0.2, False),
        ("accuracy", 0.0, 0.0, True),
        ("ccc", None, 0.5, False),
    ],
)
def test_int8_files_are_held_to_the_metric(metric, value, reference, enough):
    heard, own = outcome(difference=9.0, **{metric: value}), outcome(**{metric: reference})
    why = proof.verdict(FORMATS["executorch_int8"], heard, own, metric, 1e-5, 0.95)
    assert (why is None) == enough
    if metric == "mae" and not enough:
        assert why == (
            "has mae 0.1000 where the student has 0.0940: it keeps 0.9400, and export.limits.int8 asks for 0.95"
        )


def test_an_undefined_metric_is_none():
    task = Regression(("x",))
    sums = task.metrics()
    task.update(sums, torch.zeros(3, 1), torch.zeros(3, 1), None)
    assert proof.finite_numbers(sums.compute()) == {"ccc": None, "mae": 0.0, "mae/x": 0.0}


# ---------------------------------------------------------------------------------------------- what a file takes

WEIGHTS = 5_000_000  # numbers, 20 MB


@pytest.fixture(scope="module")
def heavy(tmp_path_factory):
    """An ONNX file of one large layer: (B, 1, 1, 1000) -> (B, 5000)."""
    path = tmp_path_factory.mktemp("heavy") / "model.onnx"
    weights = numpy_helper.from_array(np.full((1000, WEIGHTS // 1000), 1e-3, np.float32), "w")
    nodes = [helper.make_node("Flatten", ["image"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["logits"])]
    given = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 1, 1000])
    made = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", WEIGHTS // 1000])
    graph = helper.make_graph(nodes, "heavy", [given], [made], [weights])
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    return path


@pytest.mark.slow
def test_a_file_is_measured_in_a_process_of_its_own(heavy, tmp_path, monkeypatch):
    monkeypatch.chdir(heavy.parent)
    found = proof.cost("onnx", heavy.relative_to(heavy.parent), (1, 1, 1000))
    assert found.keys() == {"latency_ms", "memory_mb"}
    one, every = found["latency_ms"]["one_thread"], found["latency_ms"]["all_threads"]
    assert 0 < one["median"] <= one["p95"] and 0 < every["median"] <= every["p95"] and every["threads"] >= 1
    assert 20 <= found["memory_mb"] < 150  # the weights, perhaps packed and in the file's buffer as well; no library
    (tmp_path / "model.onnx").write_bytes(heavy.read_bytes()[:1000])
    with pytest.raises(ExportError, match=r"^cannot be measured: its process failed \(.*cannot be opened as onnx"):
        proof.cost("onnx", tmp_path / "model.onnx", (1, 1, 1000))


@pytest.mark.slow
def test_what_measures_an_onnx_file_loads_no_torch(heavy):
    """Nor anything else that takes its time, or its memory."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['proof', 'onnx', {str(heavy)!r}, '1,1,1000']\n"
        "runpy.run_module('kd_dist.proof', run_name='__main__')\n"
        "print('loaded', sorted(set(sys.modules) & {'torch', 'torchmetrics', 'accelerate', 'rich', 'onnx'}))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.stdout.splitlines()[-1] == "loaded []", ended.stderr


def measure_memory() -> None:
    size = 60_000_000
    waste = [np.ones(100_000, np.uint8) for _ in range(size // 100_000)]  # small pieces stay with the process
    del waste
    rise, kept = proof.risen(lambda: [np.ones(100_000, np.uint8) for _ in range(size // 100_000)])
    assert len(kept) == 600 and 0.9 * size < rise < 1.3 * size
    del kept
    rise, _ = proof.risen(lambda: np.ones(size, np.uint8).sum())  # freed again at once
    assert 0.9 * size < rise < 1.3 * size
    rise, _ = proof.risen(lambda: None)
    assert rise < 2_000_000


def test_memory_is_what_is_taken_at_most_and_not_what_was_free(tmp_path):
    """In a process of its own, as it is measured: here, others' threads may give memory back meanwhile."""
    done(run(measure_memory, folder=tmp_path))


def test_times_are_medians_and_percentiles_of_many_runs(monkeypatch):
    calls = []

    def run(example: np.ndarray) -> np.ndarray:
        calls.append(len(calls))
        time.sleep(0.002 if len(calls) % 10 else 0.02)
        return example

    monkeypatch.setattr(proof, "SECONDS", 0.2)
    found = proof.timed(run, np.zeros(1, np.float32))
    assert 2 <= found["median"] < 20 <= found["p95"]
    assert proof.WARM_UP + proof.FEWEST_RUNS <= len(calls) <= proof.WARM_UP + proof.RUNS
    monkeypatch.setattr(proof, "SECONDS", 0.0)
    calls.clear()
    proof.timed(run, np.zeros(1, np.float32))
    assert len(calls) == proof.WARM_UP + proof.FEWEST_RUNS


def test_the_table_has_a_row_a_file():
    latency = {"one_thread": {"median": 1.234, "p95": 2.0}, "all_threads": {"median": 0.5, "p95": 0.75, "threads": 4}}
    one = {"metrics": {"ccc": 0.5, "mae": None}, "bytes": 1_500_000, "max_difference": 2e-6, "retention": 0.975}
    one |= {"latency_ms": latency, "memory_mb": 12.34}
    info = {"name": "music", "stage": "distill", "machine": {"threads": 4}}
    info |= {"metrics": {"split": "test", "student": {"ccc": 0.5, "ccc/x": 0.1, "mae": 0.1}}}
    info["files"] = {"onnx": one, "executorch": {**one, "retention": None}}
    console = Console(width=150, file=io.StringIO())
    console.print(proof.table(info))
    cells = [re.split(r"\s*[│┃]\s*", line)[1:-1] for line in console.file.getvalue().splitlines() if "onnx" in line]
    assert cells == [["onnx", "1.500", "2.0e-06", "0.5000", "-", "97.5%", "1.23, 2.00", "0.50, 0.75", "12.3"]]
    assert "executorch" in console.file.getvalue() and "4 threads ms, p95" in console.file.getvalue()
