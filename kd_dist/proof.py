"""Whether an exported file is the student: what it says of every held-out example, and what it takes to run it.

`python -m kd_dist.proof FORMAT FILE C,H,W` measures one file in a process of its own and prints a line of JSON.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from kd_dist.choose import imported
from kd_dist.errors import NO_ROOM, ExportError, ModelError, Preempted, cause, is_out_of_memory
from kd_dist.formats import FORMATS, Format, Run
from kd_dist.launch import tied

# The process that measures a file loads what runs it, and no more: what judges is imported where it is used.
if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor, nn

    from kd_dist.batch import Batch
    from kd_dist.tasks import Task

Made = TypeVar("Made")

MARK = "kd-dist proof: "  # begins the line of figures; runtimes print what they like
PATIENCE = 600  # seconds for a process that measures
WARM_UP, RUNS, FEWEST_RUNS, SECONDS = 5, 200, 10, 2.0  # of one example: as many, or what fits, but at least the fewest


class Outcome(NamedTuple):
    """What a model said of a whole split."""

    metrics: dict[str, float | None]  # as `kd-dist evaluate` gives them; None: undefined
    range: tuple[float, float]  # the lowest and the highest output
    max_difference: float = 0.0  # of an output from the student's
    failure: str | None = None  # why the file is no student, completes "onnx ..."; then the rest means nothing

    @property
    def largest(self) -> float:
        """The largest absolute output."""
        return max(map(abs, self.range))


@dataclass
class _Heard:
    """What has been heard of a file up to now."""

    run: Run
    metrics: Any  # of the task: sums, or every score
    low: float = np.inf
    high: float = -np.inf
    difference: float = 0.0
    failure: str | None = None

    def hear(self, task: Task, batch: Batch, expected: Tensor) -> None:
        """One more batch, every row of it valid, of which the student says `expected`. Nothing after a failure."""
        import torch

        if self.failure is not None:
            return
        inputs = (batch.images.float() / 255).numpy()
        try:
            said, alone = self.run(inputs), self.run(inputs[:1])  # an app asks for one example at a time
        except Exception as error:  # every runtime has exceptions of its own
            self.failure = f"cannot be run ({reason(error)})"
            return
        for ours, theirs in ((said, expected), (alone, expected[:1])):
            if ours.shape != theirs.shape:
                self.failure = f"gives outputs of shape {ours.shape} where the student's are {tuple(theirs.shape)}"
                return
        finite = np.isfinite(said).reshape(len(said), -1).all(axis=1)
        if not finite.all():
            key = batch.keys[int(finite.argmin())]
            self.failure = f"gives an output that is not finite, for example '{key}' first"
            return
        self.low, self.high = min(self.low, float(said.min())), max(self.high, float(said.max()))
        off = [np.abs(ours - theirs.numpy()).max() for ours, theirs in ((said, expected), (alone, expected[:1]))]
        self.difference = float(np.max([self.difference, *off]))  # NaN stays NaN, which no bound allows
        task.update(self.metrics, torch.from_numpy(said).float(), batch.targets, batch.sizes, batch.groups)

    def outcome(self) -> Outcome:
        """What it comes to."""
        if self.failure is not None:
            return Outcome({}, (np.nan, np.nan), np.nan, self.failure)
        return Outcome(finite_numbers(self.metrics.compute()), (self.low, self.high), self.difference)


def compare(
    student: nn.Module, files: Mapping[str, Run], stream: Iterable[Batch], task: Task, error_limit: int | None
) -> tuple[Outcome, dict[str, Outcome]]:
    """What the student and every file say of each example of `stream`, in one pass.

    The student's metrics are those of `evaluation.judge`, which counts failed examples too; those of a file are made
    of the same rows in the same way; of each batch its first row is asked for alone, too, as an app does, and counts
    for the difference. A file that fails is asked no more. Raises ModelError when the student itself
    gives outputs that are not finite.
    """
    import torch

    from kd_dist.batch import valid_rows
    from kd_dist.evaluation import judge

    heard = {name: _Heard(run, task.metrics()) for name, run in files.items()}
    low, high = np.inf, -np.inf

    def predict(batch: Batch) -> Tensor:
        nonlocal low, high
        outputs = student(batch.images)
        if batch.valid.any():
            rows, said = valid_rows(batch), outputs[batch.valid]
            refuse_senseless(said, rows.keys)
            low, high = min(low, float(said.min())), max(high, float(said.max()))
            for one in heard.values():
                one.hear(task, rows, said)
        return outputs

    found = judge(predict, stream, task, torch.device("cpu"), error_limit)
    return Outcome(finite_numbers(found), (low, high)), {name: one.outcome() for name, one in heard.items()}


def one_by_one(run: Run) -> Run:
    """The same for one example after the other, as an app asks: what is quantised as it comes has the range of all that
    comes with it."""
    return lambda images: np.concatenate([run(images[row : row + 1]) for row in range(len(images))])


def refuse_senseless(outputs: Tensor, keys: Sequence[str]) -> None:
    """Raise a ModelError when the student's outputs (B, ...) for the examples `keys` are not finite."""
    finite = outputs.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        raise ModelError(
            f"the student's output for example '{keys[int(finite.int().argmin())]}' is not finite, so there is nothing "
            f"to export; train the stage again, with a lower lr or another precision"
        )


def finite_numbers(found: Mapping[str, Tensor]) -> dict[str, float | None]:
    """The metrics that are numbers; None in the place of one that is undefined."""
    from kd_dist.evaluation import numbers

    return {name: value if np.isfinite(value) else None for name, value in numbers(found).items()}


def allowed(parity: float, largest: float) -> float:
    """How far a float32 file's outputs may be from the student's, whose largest is `largest`."""
    return parity * max(1.0, largest)


def share(metric: str, ours: Mapping[str, float | None], theirs: Mapping[str, float | None]) -> float | None:
    """What is kept of another model's metric; None where that is undefined."""
    from kd_dist.tasks import retention

    value, reference = ours.get(metric), theirs.get(metric)
    return None if None in (value, reference) else retention(metric, value, reference)


def verdict(
    form: Format, outcome: Outcome, student: Outcome, metric: str, parity: float, int8: float
) -> str | None:
    """Why a file is not the student, completing "onnx ..."; None: it is. An int8 file is held to `int8`, the share of
    the student's metric that it must keep, another to `parity`."""
    from kd_dist.tasks import is_better

    if outcome.failure is not None:
        return outcome.failure
    if not form.int8:
        most = allowed(parity, student.largest)
        if outcome.max_difference <= most:
            return None
        return (
            f"differs from the student by {outcome.max_difference:.1e}, and export.limits.parity {parity:g} allows "
            f"{most:.1e}"
        )
    value, reference = outcome.metrics[metric], student.metrics[metric]
    kept = share(metric, outcome.metrics, student.metrics)
    if kept >= int8 if kept is not None else value is not None and not is_better(metric, reference, value):
        return None
    shown, part = ("undefined" if one is None else f"{one:.4f}" for one in (value, kept))
    return (
        f"has {metric} {shown} where the student has {reference:.4f}: it keeps {part}, and export.limits.int8 asks for "
        f"{int8:g}"
    )


def reason(error: Exception) -> str:
    """Why a format cannot be written or run, in a few words. What is not the format's fault, as a signal or a full
    disk, is raised again, whatever a library has made of it."""
    first: BaseException | None = error
    while first is not None:
        full = isinstance(first, OSError) and first.errno in (*NO_ROOM, errno.EIO)
        if full or isinstance(first, Preempted) or is_out_of_memory(first):
            raise first
        first = first.__cause__ or first.__context__
    return cause(error)


# ---------------------------------------------------------------------------------------------- what a file takes


def cost(name: str, path: Path, shape: Sequence[int]) -> dict[str, Any]:
    """What a file of the format `name` takes to be run on one input of `shape`, measured in a process of its own.

    `latency_ms`: median and p95 of one example on one thread, and on all of this process's cores. `memory_mb`: how far
    the resident memory (10^6 bytes) rises at most while the file is opened and run on one thread: the weights as the
    runtime holds them, its plans and buffers, the activations, and pages of the file that are mapped. The runtime's
    code and what it sets up once for all files are not in it. Raises ExportError, whose sentence goes
    on after the format's name, when the process fails.
    """
    command = [sys.executable, "-m", "kd_dist.proof", name, str(path), ",".join(map(str, shape))]
    # A user's own model is imported from where this process has found it.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        ended = subprocess.run(
            tied(command), capture_output=True, text=True, errors="replace", timeout=PATIENCE, env=environment
        )
    except subprocess.TimeoutExpired as error:
        raise ExportError(f"did not run its examples within {PATIENCE} s; export a smaller model") from error
    if ended.returncode:
        why = (ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"])[-1]
        if ended.returncode < 0:
            why = f"ended by {signal.Signals(-ended.returncode).name}"
        raise ExportError(f"cannot be measured: its process failed ({why})")
    [line] = [line for line in ended.stdout.splitlines() if line.startswith(MARK)]
    return json.loads(line.removeprefix(MARK))


def main() -> None:
    """Measure the file that the command line names."""
    name, path, shape = sys.argv[1:]
    opened = imported(FORMATS[name].open)
    size = (1, *map(int, shape.split(",")))
    example = np.linspace(0, 1, num=int(np.prod(size)), dtype=np.float32).reshape(size)
    opened(Path(path), 1)(example)  # once before anything is measured: a runtime loads its parts when they are used
    memory, run = risen(lambda: _first_run(opened, Path(path), example))
    one, threads = timed(run, example), len(os.sched_getaffinity(0))
    every = {**timed(opened(Path(path), threads), example), "threads": threads}
    found = {"latency_ms": {"one_thread": one, "all_threads": every}, "memory_mb": memory / 1e6}
    print("\n" + MARK + json.dumps(found), flush=True)  # a model may have left a line without its end


def _first_run(opened: Callable[[Path, int], Run], path: Path, example: np.ndarray) -> Run:
    run = opened(path, 1)
    run(example)
    return run


def risen(work: Callable[[], Made]) -> tuple[int, Made]:
    """How many bytes the resident memory of this process rose at most above what it was before `work()`, and what that
    returned."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else what was freed before would be taken for nothing
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the highest so far is forgotten
    before = _status("VmRSS")
    made = work()
    return max(0, _status("VmHWM") - before), made


def _status(field: str) -> int:
    """A size in bytes of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [kilobytes] = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(kilobytes) * 1024


def timed(run: Run, example: np.ndarray) -> dict[str, float]:
    """Median and 95th percentile, in ms, of running one example."""
    for _ in range(WARM_UP):
        run(example)
    seconds: list[float] = []
    while len(seconds) < FEWEST_RUNS or (len(seconds) < RUNS and sum(seconds) < SECONDS):
        start = time.perf_counter()
        run(example)
        seconds.append(time.perf_counter() - start)
    return {"median": statistics.median(seconds) * 1e3, "p95": float(np.percentile(seconds, 95)) * 1e3}


def processor() -> str:
    """What this machine's processor is called."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(named), platform.processor() or platform.machine())


# ---------------------------------------------------------------------------------------------- what is shown


def table(info: Mapping[str, Any]) -> Table:
    """The files of a package, for a terminal."""
    from rich.table import Table

    from kd_dist.tasks import METRICS

    known = info["metrics"]
    metrics = [name for name in known["student"] if name in METRICS]
    threads = f"{info['machine']['threads']} threads ms"
    headings = ["format", "MB", "parity", *metrics, "of teacher", "1 thread ms, p95", f"{threads}, p95", "memory MB"]
    shown = Table(title=f"{info['name']}, {info['stage']}, {known['split']} split")
    for heading in headings:
        shown.add_column(heading, overflow="fold")
    for name, one in info["files"].items():
        values = ["-" if one["metrics"][metric] is None else f"{one['metrics'][metric]:.4f}" for metric in metrics]
        times = [
            f"{one['latency_ms'][which]['median']:.2f}, {one['latency_ms'][which]['p95']:.2f}"
            for which in ("one_thread", "all_threads")
        ]
        retained = "-" if one["retention"] is None else f"{one['retention']:.1%}"
        size, memory = f"{one['bytes'] / 1e6:.3f}", f"{one['memory_mb']:.1f}"
        shown.add_row(name, size, f"{one['max_difference']:.1e}", *values, retained, *times, memory)
    return shown


if __name__ == "__main__":
    main()
