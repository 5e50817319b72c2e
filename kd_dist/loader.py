"""The way of a batch from the corridor to the step: worker processes, prefetching, the device."""

import multiprocessing.queues
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch.utils.data import DataLoader, Dataset

from kd_dist.batch import Batch, Mixture, TeacherSignal, each_tensor
from kd_dist.compress import FeatureCodec
from kd_dist.data import Corridor
from kd_dist.errors import KdError, LoaderError, cause
from kd_dist.launch import tie
from kd_dist.preempt import SIGNALS

KEPT_OUT = (*SIGNALS, signal.SIGINT)  # what may be sent to all processes at once, and is for the training process alone


def batches(corridor: Corridor, start: int, stop: int, workers: int, pin: bool) -> Iterator[Batch]:
    """Batches `start` to `stop` in order, prefetched by `workers` processes (0: read in this one)."""
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
        for delivered in _started(loader):
            if isinstance(delivered, KdError):
                raise delivered
            yield delivered
    except (OSError, EOFError) as error:
        if not workers or str(error).startswith("Caught"):  # what a worker has raised, not what became of it
            raise
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise of the same death, even at exit
        raise LoaderError(cause(error)) from error  # it died while it handed over a batch


class _Delivered(Dataset[Batch | KdError]):
    """A corridor whose errors come out as values: a worker that raises one would bury its sentence in a traceback."""

    def __init__(self, corridor: Corridor) -> None:
        self.corridor = corridor

    def __getitem__(self, cursor: int) -> Batch | KdError:
        try:
            return self.corridor[cursor]
        except KdError as error:
            return error


def _started(loader: DataLoader) -> Iterator[Batch | KdError]:
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


def _give_up(error: BaseException, delivered: Batch | KdError) -> NoReturn:
    """End this loader process when a batch cannot be handed over, as without room in /dev/shm: multiprocessing would
    drop the batch, and the training process would wait for it for ever."""
    print(f"a loader process could not hand over a batch: {cause(error)}", file=sys.stderr, flush=True)
    os._exit(1)


def _heed(parent: int) -> NoReturn:
    """Wait for one of KEPT_OUT from `parent`, which multiprocessing sends at its exit, and end; others' go unheard."""
    while signal.sigwaitinfo(KEPT_OUT).si_pid != parent:
        pass
    os._exit(0)


def _as_it_is(delivered: Batch | KdError) -> Batch | KdError:
    return delivered


def to_device(batch: Batch, device: torch.device, codecs: Mapping[str, FeatureCodec] | None = None) -> Batch:
    """The batch with its tensors but `valid` on the device, its features decoded there by their codecs. Nothing waits
    for the copies of pinned tensors."""
    signals = batch.signals
    if signals is not None:
        fields = {name: value.to(device, non_blocking=True) for name, value in signals.features.items()}
        features = {name: codec.decode(fields) for name, codec in (codecs or {}).items()}
        logits = each_tensor(signals.logits, lambda value: value.to(device, non_blocking=True))
        signals = TeacherSignal(logits, features)
    return batch._replace(
        images=batch.images.to(device, non_blocking=True),
        targets=batch.targets.to(device, non_blocking=True),
        sizes=batch.sizes if batch.sizes is None else batch.sizes.to(device, non_blocking=True),
        signals=signals,
        groups=batch.groups if batch.groups is None else batch.groups.to(device, non_blocking=True),
        mixture=batch.mixture and Mixture(*(one.to(device, non_blocking=True) for one in batch.mixture)),
    )


def on_device(codecs: Mapping[str, FeatureCodec], device: torch.device) -> dict[str, FeatureCodec]:
    """The codecs with their bases on the device."""
    return {
        name: codec
        if codec.basis is None
        else replace(codec, basis=type(codec.basis)(*(one.to(device) for one in codec.basis)))
        for name, codec in codecs.items()
    }
