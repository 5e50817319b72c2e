"""Real processes for tests, and a small experiment for them to work on.

A process comes from a fork server that has torch imported, so it starts in moments; it shares nothing with the test.
"""

import contextlib
import multiprocessing
import os
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import CLASSES, MODEL, RECIPE, picture
from PIL import Image

from kd_dist import cli
from kd_dist.errors import one_sentence

CONTEXT = multiprocessing.get_context("forkserver")
ZERO = "deepspeed.runtime.zero.muon.muon_optimizer"  # with what DeepSpeed imports when training begins: 2 s
CONTEXT.set_forkserver_preload(["kd_dist.train", "kd_dist.cache_teacher", "kd_dist.journey", "kd_dist.cli", ZERO])
PATIENCE = 300  # seconds; a whole run of six launches takes about 60 on an idle machine
PICTURES = {"train": 7, "val": 3, "test": 4}  # of each class

IMPORTS = "import os\nimport time\nfrom pathlib import Path\n\nimport torch\n"
NETWORKS = '''

class Noisy(nn.Sequential):
    """A network that sleeps before it speaks, or breaks on bright pictures."""

    def __init__(self, *parts, seconds=0.0, limit=2.0):
        super().__init__(*parts)
        self.seconds, self.limit = seconds, limit

    def forward(self, images):
        time.sleep(self.seconds)
        bright = images.mean(dim=(1, 2, 3)) > self.limit
        return super().forward(images) * torch.where(bright, torch.nan, 1.0)[:, None]


def slow(classes, width=4, seconds=0.1):
    return Noisy(*network(classes, width), seconds=seconds)


def fragile(classes, width=4, limit=0.7):
    return Noisy(*network(classes, width), limit=limit)


def dropping(classes, width=4):
    return nn.Sequential(nn.Dropout(0.2), *network(classes, width)[:-1], nn.Dropout(0.5), nn.Linear(4 * width, classes))


def narrow(classes, width=4):
    return nn.Sequential(*network(classes, width)[:-1], nn.BatchNorm1d(4 * width), nn.Linear(4 * width, classes))


class Witness(nn.Sequential):
    """A network that leaves a trace of the process it ran in."""

    def forward(self, images):
        Path(f"rank-{os.environ.get('RANK')}-of-{os.environ.get('WORLD_SIZE')}").touch()
        return super().forward(images)


def witness(classes, width=8):
    return Witness(*network(classes, width))


def normed(classes, width=4):
    return nn.Sequential(nn.BatchNorm2d(3), *network(classes, width))


class Lingering(nn.Sequential):
    """A network that leaves a trace when it is evaluated, and takes its time."""

    def forward(self, images):
        if not self.training:
            Path("evaluating").touch()
            time.sleep(1)
        return super().forward(images)


def lingering(classes, width=4):
    return Lingering(*network(classes, width))


class Poison(torch.autograd.Function):
    """Passes values on as they are; the gradients of bright pictures become NaN."""

    @staticmethod
    def forward(context, values, bright):
        context.save_for_backward(bright)
        return values.clone()

    @staticmethod
    def backward(context, gradient):
        [bright] = context.saved_tensors
        return gradient * torch.where(bright, torch.nan, 1.0)[:, None], None


class Brittle(nn.Sequential):
    """A network whose logits, or whose gradients, are not finite for bright pictures, or whose logits are huge."""

    def __init__(self, *parts, where="forward", limit=0.7):
        super().__init__(*parts)
        self.where, self.limit = where, limit

    def forward(self, images):
        bright = images.mean(dim=(1, 2, 3)) > self.limit
        values = super().forward(images)
        if self.where == "backward":
            return Poison.apply(values, bright)
        return values * torch.where(bright, torch.nan if self.where == "forward" else 1e4, 1.0)[:, None]


def brittle(classes, width=4, where="forward", limit=0.7, norm=True):
    """Wide enough for its largest weight to be divided under ZeRO 3."""
    parts = list(network(classes, width)[:-1]) + [nn.Linear(4 * width, 340), nn.ReLU(), nn.Linear(340, 340), nn.ReLU()]
    return Brittle(*([nn.BatchNorm2d(3)] if norm else []), *parts, nn.Linear(340, classes), where=where, limit=limit)


class Cliff(nn.Sequential):
    """A network whose logits, or whose gradients, are not finite for bright pictures once its weight `edge` is far from
    where it began: up the slope, in the second pass of a step."""

    def __init__(self, *parts, where="forward", limit=0.7):
        super().__init__(*parts)
        self.edge, self.where, self.limit = nn.Parameter(torch.zeros(())), where, limit

    def forward(self, images):
        beyond = (images.mean(dim=(1, 2, 3)) > self.limit) & (self.edge.abs() > 0.2)
        values = super().forward(images) + 10 * self.edge * torch.tensor([1.0, 0.0, 0.0])
        if self.where == "backward":
            return Poison.apply(values, beyond)
        return values * torch.where(beyond, torch.nan, 1.0)[:, None]


def cliff(classes, width=4, where="forward", limit=0.7):
    return Cliff(nn.BatchNorm2d(3), *network(classes, width), where=where, limit=limit)


class Doomed(nn.Sequential):
    """A network whose weights are ruined in its forward pass number `at`."""

    def __init__(self, *parts, at=0):
        super().__init__(*parts)
        self.at, self.passes = at, 0

    def forward(self, images):
        self.passes += self.training
        if self.training and self.passes == self.at:
            with torch.no_grad():
                self[0].weight.fill_(torch.nan)
        return super().forward(images)


def doomed(classes, width=4, at=0):
    return Doomed(*network(classes, width), at=at)


class Huge(torch.autograd.Function):
    """Passes values on as they are, and gradients so large that their squares are not finite."""

    @staticmethod
    def forward(context, values):
        return values.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * 1e25


class Steep(nn.Sequential):
    def forward(self, images):
        return Huge.apply(super().forward(images))


def steep(classes, width=4):
    return Steep(*network(classes, width))


class Loud(nn.Sequential):
    """A network that is far too sure."""

    def __init__(self, *parts, factor=1.0):
        super().__init__(*parts)
        self.factor = factor

    def forward(self, images):
        return super().forward(images) * self.factor


def loud(classes, width=4, factor=1e4):
    return Loud(*network(classes, width), factor=factor)


def bare(classes, width=4):
    """Without biases and norms."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(4 * width, classes, bias=False),
    )


class Idle(nn.Sequential):
    """A network with a layer that has no part in what it says."""

    def __init__(self, *parts):
        super().__init__(*parts)
        self.idle = nn.Linear(3, 3)

    def forward(self, images):
        for part in list(self)[:-1]:
            images = part(images)
        return images


def idle(classes, width=4):
    return Idle(*network(classes, width))


class Block(nn.Module):
    """What may be computed again: statistics, something random, a way around."""

    def __init__(self, width):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.Dropout(0.2)

    def forward(self, values):
        return values + self.drop(self.norm(self.conv(values)).relu())


def blocky(classes, width=4):
    stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
    return nn.Sequential(
        stem, nn.Sequential(Block(width), Block(width)), nn.Sequential(nn.ReLU(), Block(width)),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, classes),
    )


class Hungry(nn.Sequential):
    """A network that takes more memory than there is when it gets more pictures than `limit`."""

    def forward(self, images):
        if self.training and len(images) > self.limit:
            torch.empty(2**50)
        return super().forward(images)


def hungry(classes, width=4, limit=0):
    made = Hungry(*network(classes, width))
    made.limit = limit
    return made
'''


class Ended(NamedTuple):
    """A process that is over."""

    status: int  # negative: killed by that signal
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


class Started(NamedTuple):
    """A process that runs."""

    process: multiprocessing.Process
    streams: list[Path]  # what takes its stdout and stderr

    def wait(self) -> Ended:
        """Its end."""
        self.process.join(PATIENCE)
        if self.process.is_alive():
            raise AssertionError(f"still running after {PATIENCE} s: {self.kill()}")
        return self._ended()

    def send(self, number: int) -> None:
        """A signal, for it and for whatever it started, if they still run."""
        with contextlib.suppress(ProcessLookupError):
            try:
                os.killpg(self.process.pid, number)
            except ProcessLookupError:  # it has no group of its own yet
                os.kill(self.process.pid, number)

    def kill(self) -> Ended:
        """SIGKILL, for it and for whatever it started."""
        self.send(signal.SIGKILL)
        self.process.join()
        return self._ended()

    def _ended(self) -> Ended:
        return Ended(self.process.exitcode, *(path.read_text() for path in self.streams))


def _work(
    function: Callable, arguments: Sequence, folder: Path, streams: list[Path], environment: dict[str, str]
) -> None:
    """What a new process does."""
    import torch

    os.setsid()
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY), number)
    os.environ.update({"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no", **environment})
    torch.set_num_threads(1)
    with one_sentence():
        function(*arguments)


def start(function: Callable, *arguments, folder: Path, **environment: str) -> Started:
    """Call `function(*arguments)` in a process of its own, in `folder`, as a command does."""
    place = Path(tempfile.mkdtemp(prefix="said-", dir=folder.parent))
    streams = [place / "stdout", place / "stderr"]
    for path in streams:
        path.touch()
    process = CONTEXT.Process(target=_work, args=(function, arguments, folder, streams, environment))
    process.start()
    return Started(process, streams)


def run(function: Callable, *arguments, folder: Path) -> Ended:
    """The same, to its end."""
    return start(function, *arguments, folder=folder).wait()


def done(ended: Ended) -> str:
    """What a process said that has ended well."""
    assert ended.status == 0, ended
    return ended.output


def kd_dist(*words: str) -> None:
    """The `kd-dist` command, for a process to be."""
    sys.argv = ["kd-dist", *words]
    cli.main()


def start_ranks(function: Callable, each: Iterable[list[str]], folder: Path, **more: str) -> list[Started]:
    """Call `function(arguments)` in one distributed process for each arguments, as a launcher does."""
    each = list(each)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": len(each), "LOCAL_WORLD_SIZE": len(each), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = []
    for rank, arguments in enumerate(each):
        environment = {name: str(value) for name, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()}
        started.append(start(function, arguments, folder=folder, **environment, **more))
    return started


def ranks(function: Callable, each: Iterable[list[str]], folder: Path, **more: str) -> list[Ended]:
    """The same, to their ends."""
    return [one.wait() for one in start_ranks(function, each, folder, **more)]


def wait_until(happened: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < end, f"{PATIENCE} s have gone by and {what} has not happened"
        time.sleep(0.005)


def sentence(ended: Ended) -> str:
    """The one line that a failed command may say, without its `error: ` or `error (rank 1): `."""
    assert ended.status not in (0, None), ended
    assert "Traceback" not in ended.output, ended.output
    said = re.findall(r"^error(?: \(rank \d+\))?: (.*)$", ended.output, re.MULTILINE)
    assert len(said) == 1, ended.output
    return said[0]


def laboratory(folder: Path) -> Path:
    """A user's folder: `tiny.yaml`, `tiny_model.py`, and `pictures/` with 21, 9 and 12 pictures in its splits.

    The first picture of class red in `train` is white, brighter than any other view can be.
    """
    for split, count in PICTURES.items():
        for label, name in enumerate(CLASSES):
            place = folder / "pictures" / split / name
            place.mkdir(parents=True)
            for number in range(count):
                picture(label, 100 * len(split) + number).save(place / f"{number:02d}.png")
    Image.new("RGB", (10, 12), "white").save(folder / "pictures" / "train" / "red" / "00.png")
    (folder / "tiny_model.py").write_text(IMPORTS + MODEL + NETWORKS)
    (folder / "tiny.yaml").write_text(RECIPE)
    return folder


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """This process in a user's folder, with the `tiny_model` of that folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        patch.delitem(sys.modules, "tiny_model", raising=False)
        yield


def contents(folder: Path, *patterns: str) -> dict[str, bytes]:
    """Every file below a folder, or those that fit a pattern, by relative path."""
    found = {path for pattern in patterns or ("**/*",) for path in folder.glob(pattern) if path.is_file()}
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(found)}
