"""Every byte of a shard changed, and every shard cut short: damage is named, or nothing that is read has changed."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from processes import inside, laboratory

from kd_dist import assemble, cache_teacher, journey
from kd_dist.config import load
from kd_dist.errors import ShardError
from kd_dist.folders import Shards
from kd_dist.rows import SignalShards
from kd_dist.shards import Shard, index_path
from kd_dist.verify import refuse_damaged

RECIPE = ["teacher.weights=null", "data.shard_size=3"]
EXAMPLES, VIEWS = 3, 2  # of the one shard that is damaged
IDS, NUMBERS = np.repeat(np.arange(EXAMPLES), VIEWS), np.tile(np.arange(VIEWS), EXAMPLES)
TRAIN = Path("shards/tiny/train")
BOTH = pytest.mark.parametrize("folder", [TRAIN, TRAIN / "teacher"], ids=["examples", "signals"])


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A user's folder with examples and a cache in shards of three."""
    folder = laboratory(tmp_path_factory.mktemp("corrupt"))
    with inside(folder):
        recipe = load("tiny.yaml", RECIPE)
        journey.pack_recipe(recipe)
        cache_teacher.cache_split(recipe, "train", assemble.teacher(recipe), Accelerator(cpu=True))
    return folder


@pytest.fixture(autouse=True)
def _inside(home, monkeypatch) -> Iterator[None]:
    """Works in the folder, and leaves every file of it as it was."""
    monkeypatch.chdir(home)
    before = {path: path.read_bytes() for path in TRAIN.rglob("*.*")}
    yield
    assert {path: path.read_bytes() for path in TRAIN.rglob("*.*")} == before


def opened(folder: Path) -> Shards:
    """Either kind of shards, opened anew."""
    return Shards(folder) if folder == TRAIN else SignalShards(folder, Shards(TRAIN))


def shard_in(folder: Path) -> Path:
    return folder / ("data-000000.tar" if folder == TRAIN else "signals-000000.tar")


def spans_of(shard: Shard, held: list[dict[str, bytes]]) -> list[range]:
    """The bytes of the tar that belong to each example, its headers and padding among them."""
    ends = [max(-(-sum(shard.member(i, name)) // 512) * 512 for name in one) for i, one in enumerate(held)]
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


@contextmanager
def patched(path: Path) -> Iterator[tuple[bytes, Callable[[int, bytes], None]]]:
    """The bytes of a file, and a function that writes some in place; they are put back in the end."""
    good = path.read_bytes()
    with open(path, "r+b", buffering=0) as file:
        yield good, lambda at, content: os.pwrite(file.fileno(), content, at)
        os.ftruncate(file.fileno(), len(good))
        os.pwrite(file.fileno(), good, 0)


def flipped(good: bytes, at: int) -> bytes:
    """The byte at `at` as any other: which one depends on the place alone."""
    return bytes([good[at] ^ (at * 73 % 255 + 1)])


def noticed(read: Callable[[], object], path: Path, expected: object) -> bool:
    """Whether reading was refused with the name of the file; if it was not, it must give what it gave before."""
    try:
        found = read()
    except ShardError as error:
        assert str(error).startswith(f"{path}: ")
        return True
    assert found == expected
    return False


@BOTH
def test_every_changed_byte_of_a_tar_is_noticed_or_changes_nothing(folder):
    path, shards = shard_in(folder), opened(folder)
    shard = shards.shard(0)
    expected = [shard.read(i) for i in range(EXAMPLES)]
    spans = spans_of(shard, expected)
    held = sum(map(len, spans))
    caught = by_digest = 0
    with patched(path) as (good, write):
        for at in range(len(good)):
            write(at, flipped(good, at))
            hit = [i for i in range(EXAMPLES) if noticed(lambda i=i: shard.read(i), path, expected[i])]
            assert hit == [i for i in range(EXAMPLES) if at in spans[i]]
            caught += len(hit)
            with pytest.raises(ShardError, match=f"{path}: is missing or damaged, its sha256 is not the manifest's"):
                refuse_damaged(shards)
            by_digest += 1
            write(at, good[at : at + 1])
    assert caught == held > 3000 and by_digest == len(good) >= 10_240


def test_every_changed_byte_of_a_signal_shard_is_noticed_by_the_rows_or_changes_none():
    """The reader of a training run takes single rows, so headers and padding are nothing to it."""
    folder = TRAIN / "teacher"
    path, shards = shard_in(folder), opened(folder)
    expected = [shards.rows(IDS[row : row + 1], NUMBERS[row : row + 1]).tobytes() for row in range(len(IDS))]
    caught = same = 0
    with patched(path) as (good, write):
        for at in range(len(good)):
            write(at, flipped(good, at))
            hit = 0
            for row in range(len(IDS)):
                ids, numbers = IDS[row : row + 1], NUMBERS[row : row + 1]
                hit += noticed(lambda ids=ids, n=numbers: shards.rows(ids, n).tobytes(), path, expected[row])
            assert hit <= 1
            caught, same = caught + hit, same + (not hit)
            write(at, good[at : at + 1])
    assert caught == len(IDS) * shards.dtype.itemsize > 200  # every byte of every row
    assert caught + same == 10_240


@BOTH
def test_every_changed_byte_of_an_index_is_noticed(folder):
    path, shards = index_path(shard_in(folder)), opened(folder)
    caught = 0
    with patched(path) as (good, write):
        for at in range(len(good)):
            write(at, flipped(good, at))
            for read in (lambda: Shard(shard_in(folder)), lambda: opened(folder).shard(0)):
                caught += noticed(read, path, None)
            with pytest.raises(ShardError, match=f"{path}: "):
                refuse_damaged(Shards(folder))
            write(at, good[at : at + 1])
    assert caught == 2 * len(good) > 500
    assert len(opened(folder).shard(0)) == len(shards.shard(0)) == EXAMPLES


@BOTH
def test_a_shard_that_is_cut_short_is_noticed(folder):
    path, cuts = shard_in(folder), 0
    for file, step in ((path, 512), (index_path(path), 64)):
        with patched(file) as (good, _):
            for size in range(0, len(good), step):
                os.truncate(file, size)
                with pytest.raises(ShardError, match=f"{file}: "):
                    opened(folder).shard(0)
                with pytest.raises(ShardError, match=f"{folder}/.*-000000"):
                    refuse_damaged(Shards(folder))
                cuts += 1
                file.write_bytes(good)
    assert cuts >= 20 + 5


@BOTH
def test_a_tar_that_is_cut_short_under_a_reader_is_noticed_or_changes_nothing(folder):
    """The end first, so that the file need not be put back."""
    path, shards = shard_in(folder), opened(folder)
    shard = shards.shard(0)
    expected = [shard.read(i) for i in range(EXAMPLES)]
    caught = cases = 0
    with patched(path) as (good, _):
        for size in range(len(good) - 512, -1, -512):
            os.truncate(path, size)
            for i in range(EXAMPLES):
                caught += noticed(lambda i=i: shard.read(i), path, expected[i])
                cases += 1
    assert cases == EXAMPLES * len(good) // 512 >= 60
    assert caught == sum(span.stop // 512 for span in spans_of(shard, expected)) >= 10
