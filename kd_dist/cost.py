"""What a model takes: parameters, arithmetic, time and memory of one example."""

import statistics
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from kd_dist.models import Network

LATENCY_RUNS, LATENCY_SECONDS = 30, 10.0  # as many, or what fits into that time, but at least 3


def measure(network: Network, size: tuple[int, int]) -> dict[str, Any]:
    """Parameters, multiply-accumulates of one image, the median latency in ms of one image on one CPU thread, and the
    memory in MB (10^6 bytes): weights, buffers, and the most that one image's activations take at once."""
    network = network.cpu().eval()
    image = torch.zeros(1, network.channels, *size, dtype=torch.uint8)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            with FlopCounterMode(display=False) as counter:
                network(image)
            seconds = []
            while len(seconds) < (LATENCY_RUNS if sum(seconds) < LATENCY_SECONDS else 3):
                start = time.perf_counter()
                network(image)
                seconds.append(time.perf_counter() - start)
        memory = peak_bytes(network, image)
    finally:
        torch.set_num_threads(threads)
    return {
        "parameters": sum(value.numel() for value in network.parameters()),
        "macs": counter.get_total_flops() // 2,
        "latency_ms": statistics.median(seconds) * 1e3,
        "memory_mb": memory / 1e6,
    }


def peak_bytes(network: Network, images: Tensor) -> int:
    """The most bytes that weights, buffers, the images and all tensors made of them take at one moment of a forward
    pass.

    Counted from the tensors that are alive after each operation, so it is the same on every machine; what a library
    takes within an operation, and what an allocator keeps, are not in it.
    """
    with torch.no_grad(), Alive() as alive:  # not inference mode, in which composite operations hide what they make
        alive.hold([*network.parameters(), *network.buffers(), images])
        network(images)
    return alive.most


class Alive(TorchDispatchMode):
    """Counts the bytes of every storage that operations make until it is freed: now, and `most` at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.held: set[int] = set()  # addresses of the storages that are counted

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        self.hold([one for one in tree_leaves(made) if isinstance(one, Tensor)])
        return made

    def hold(self, tensors: Sequence[Tensor]) -> None:
        """Count the storages of these tensors that are not counted yet."""
        for storage in (tensor.untyped_storage() for tensor in tensors):
            address = storage._cdata
            if address not in self.held:
                self.held.add(address)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.release, address, storage.nbytes()).atexit = False
        self.most = max(self.most, self.now)

    def release(self, address: int, size: int) -> None:
        """A storage is freed."""
        self.held.discard(address)
        self.now -= size
