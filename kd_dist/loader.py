"""The way of a batch from the corridor to the step: worker processes, prefetching, the device."""

import contextlib
import math
import multiprocessing.queues
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from kd_dist.batch import Batch, mapped
from kd_dist.compress import FeatureCodec
from kd_dist.data import Corridor
from kd_dist.errors import KdError, LoaderError, cause
from kd_dist.launch import tie
from kd_dist.preempt import SIGNALS

KEPT_OUT = (*SIGNALS, signal.SIGINT)  # what may be sent to all processes at once, and is for the training process alone
QUEUE_DEPTH = 4  # items that wait
PATIENCE = 3.0  # seconds that what makes items is given to end by itself when no more are wanted
WORTH = 4  # batches that are read in the time in which a loader process is started, about
ALIGNED = 64  # bytes: where each tensor of a packed batch begins


def batches(corridor: Corridor, start: int, stop: int, workers: int, pin: bool) -> Iterator[Batch]:
    """Batches `start` to `stop` in order, prefetched by `workers` processes (0: read in this one).

    A thread takes them over from the processes, which costs milliseconds, so that the training loop finds them ready.
    """
    # Forked from this process, they have its signal mask, and it for a parent; Python's default differs by version.
    options: dict[str, Any] = {"prefetch_factor": 4, "multiprocessing_context": "fork"} if workers else {}
    loader = DataLoader(
        _Delivered(corridor),
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin,
        generator=torch.Generator(),  # the global one belongs to the training step
        worker_init_fn=partial(_begin_worker, os.getpid()),
        **options,
    )
    try:
        stream = _started(loader)
        # One that hangs, as at a file server that is gone, must not keep a training process that is to stop.
        end = lambda: [one.terminate() for one in stream._workers]  # noqa: E731
        ahead = prefetch(stream, unheard=(*KEPT_OUT, signal.SIGCHLD), end=end) if workers else (one for one in stream)
        with contextlib.closing(ahead):
            for delivered in ahead:
                if isinstance(delivered, KdError):
                    raise delivered
                yield unpacked(delivered) if isinstance(delivered, Packed) else delivered
    except (OSError, EOFError) as error:
        if not workers or str(error).startswith("Caught"):  # what a worker has raised, not what became of it
            raise
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise of the same death, even at exit
        raise LoaderError(cause(error)) from error  # it died while it handed over a batch


def split_batches(
    corridor: Corridor, workers: int, device: torch.device
) -> contextlib.closing[Iterator[Batch]]:
    """All batches of a split that is judged by, once, for a model on `device`: a block in which they are read, by as
    many of so many `workers` as they are worth."""
    count = len(corridor)
    return contextlib.closing(batches(corridor, 0, count, worthwhile(workers, count), pin=device.type == "cuda"))


def worthwhile(workers: int, count: int) -> int:
    """How many of so many loader processes `count` batches are worth, as those of a small validation split are none."""
    return min(workers, count // WORTH)


class Packed(NamedTuple):
    """A batch whose tensors lie in one memory: handing over a tensor takes a worker longer than filling it."""

    batch: Batch  # with (offset, dtype, shape) in the place of each tensor
    memory: Tensor  # uint8, shared between processes


def packed(batch: Batch) -> Packed:
    """A batch to be handed over to another process; copies its tensors into shared memory."""
    ends = [0]
    mapped(batch, lambda value: ends.append(ends[-1] + -(-value.nbytes // ALIGNED) * ALIGNED))
    memory, starts = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(ends[-1])), iter(ends)

    def move(value: Tensor) -> tuple[int, torch.dtype, tuple[int, ...]]:
        place = next(starts), value.dtype, tuple(value.shape)
        _at(memory, place).copy_(value)
        return place

    return Packed(mapped(batch, move), memory)


def unpacked(handed: Packed) -> Batch:
    """The batch, its tensors views of the one memory."""
    return mapped(handed.batch, partial(_at, handed.memory))


def _at(memory: Tensor, place: tuple[int, torch.dtype, tuple[int, ...]]) -> Tensor:
    start, dtype, shape = place
    return memory[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


class _Delivered(Dataset[Packed | Batch | KdError]):
    """A corridor whose errors come out as values: a worker that raises one would bury its sentence in a traceback."""

    def __init__(self, corridor: Corridor) -> None:
        self.corridor = corridor

    def __getitem__(self, cursor: int) -> Packed | Batch | KdError:
        try:
            batch = self.corridor[cursor]
        except KdError as error:
            return error
        if get_worker_info() is None:
            return batch
        try:
            return packed(batch)
        except RuntimeError as error:
            _give_up(error, batch)


def _started(loader: DataLoader) -> Iterator[Packed | Batch | KdError]:
    """The loader's batches, its processes started with KEPT_OUT blocked: torch gives them handlers of its own."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, KEPT_OUT)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(parent: int, worker: int) -> None:
    """What a loader process does first. It ends with `parent`, its training process, and when that asks for it."""
    tie(parent)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_give_up)
    threading.Thread(target=_heed, args=(parent,), daemon=True).start()


def _give_up(error: BaseException, delivered: Packed | Batch | KdError) -> NoReturn:
    """End this loader process when a batch cannot be handed over, as without room in /dev/shm: multiprocessing would
    drop the batch, and the training process would wait for it for ever."""
    # In one piece, where `print` writes the end of the line by itself: another process may speak too.
    sys.stderr.write(f"a loader process could not hand over a batch: {cause(error)}\n")
    sys.stderr.flush()
    os._exit(1)


def _heed(parent: int) -> NoReturn:
    """Wait for one of KEPT_OUT from `parent`, which multiprocessing sends at its exit, and end; others' go unheard."""
    while signal.sigwaitinfo(KEPT_OUT).si_pid != parent:
        pass
    os._exit(0)


def _as_it_is(delivered: Packed | Batch | KdError) -> Packed | Batch | KdError:
    return delivered


def prefetch(
    items: Iterator[Any],
    depth: int = QUEUE_DEPTH,
    unheard: Collection[signal.Signals] = (),
    end: Callable[[], Any] | None = None,
) -> Iterator[Any]:
    """The items in order, made ahead by a thread, of which `depth` wait; `unheard` signals are not for that thread. Its
    exceptions come out here; closing this generator ends it, after the item that it is at. Where that takes longer than
    PATIENCE `end` is called, which is to end `items`; a thread that does not heed that either is left behind."""
    slots: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(kind: str, value: Any) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                slots.put((kind, value), timeout=0.1)
                return

    def produce() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, unheard)
        try:
            for item in items:
                put("item", item)
                if stopped.is_set():
                    return
            put("end", None)
        except BaseException as error:  # handed over whole: the consumer raises it
            put("error", error)

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    try:
        while True:
            kind, value = slots.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        stopped.set()
        thread.join(None if end is None else PATIENCE)
        if thread.is_alive():
            end()
            thread.join(2 * PATIENCE)  # torch looks every 5 seconds whether its processes live


def to_device(batch: Batch, device: torch.device, codecs: Mapping[str, FeatureCodec] | None = None) -> Batch:
    """The batch with its tensors but `valid` on the device, its features decoded there by their codecs. Nothing waits
    for the copies of pinned tensors."""
    moved = mapped(batch, lambda value: value.to(device, non_blocking=True))._replace(valid=batch.valid)
    if moved.signals is None:
        return moved
    features = {name: codec.decode(moved.signals.features) for name, codec in (codecs or {}).items()}
    return moved._replace(signals=moved.signals._replace(features=features))


def on_device(codecs: Mapping[str, FeatureCodec], device: torch.device) -> dict[str, FeatureCodec]:
    """The codecs with their bases on the device."""
    return {
        name: codec
        if codec.basis is None
        else replace(codec, basis=type(codec.basis)(*(one.to(device) for one in codec.basis)))
        for name, codec in codecs.items()
    }
