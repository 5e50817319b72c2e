"""Shards under a URL: the same bytes in the same order as from the disk, whatever a store does wrong; a bounded cache.

The store is a real HTTP server on this machine, which also says how often it did what it should not.
"""

import fcntl
import pickle
import re
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest
from accelerate import Accelerator
from processes import contents, done, inside, kd_dist, laboratory, run, sentence, start, wait_until

from kd_dist import assemble, cache_teacher, journey, places, remote, train
from kd_dist.config import load
from kd_dist.data import Corridor
from kd_dist.errors import RecipeError, ShardError
from kd_dist.loader import batches
from kd_dist.remote import LocalCache, Remote, location
from kd_dist.shards import Shard, shard_path, write_shard

TRAIN = 21  # examples, in shards of 8, 8 and 5
RECIPE = ["teacher.weights=null"]
PASSING = ("500", "503", "429", "cut", "short", "reset", "flip", "late")  # what a store may do once
EXAMPLES, EXAMPLE_BYTES = 6, 3000  # of a shard of noise


class Store(ThreadingHTTPServer):
    """Serves a folder, by range too, and does wrong what it is told to."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.root, self.url = root, f"http://127.0.0.1:{self.server_port}"
        self.asked: list[tuple[str, str | None]] = []  # "GET /a/b", range
        self.faults: list[list] = []
        self.happened: Counter[str] = Counter()
        self.met: Counter[tuple[str, str | None]] = Counter()  # faults, by request and range
        self.most_met = 10**9  # a request that has met so many faults is answered well
        self.replacement = b""  # what a file becomes at a "replace"
        self.now = self.most = 0  # late answers under way
        self.lock = threading.Lock()

    def fail(self, kind: str, where: str, times: int = 10**9, every: int = 1) -> None:
        """Do `kind` so many times to requests that the pattern fits, to each `every`-th of them."""
        self.faults.append([kind, re.compile(where), times, every, 0])

    def fault(self, request: str, wanted: str | None) -> str | None:
        with self.lock:
            if self.met[request, wanted] == self.most_met:
                return None
            for fault in self.faults:
                kind, where, times, every, _ = fault
                if times and where.search(request):
                    fault[4] += 1
                    if fault[4] % every == 0:
                        fault[2] -= 1
                        self.happened[kind] += 1
                        self.met[request, wanted] += 1
                        return kind
        return None

    def count(self, pattern: str) -> int:
        """How many requests the pattern fits."""
        return sum(1 for request, _ in self.asked if re.search(pattern, request))


class Answer(BaseHTTPRequestHandler):
    """One answer of a Store."""

    protocol_version = "HTTP/1.1"
    server: Store

    def do_GET(self) -> None:
        request, wanted = f"{self.command} {self.path}", self.headers.get("Range")
        path = self.server.root / self.path[1:]
        self.server.asked.append((request, wanted))
        kind = self.server.fault(request, wanted)
        if kind == "replace":
            path.write_bytes(self.server.replacement)
        if kind == "late":
            with self.server.lock:
                self.server.now += 1
                self.server.most = max(self.server.most, self.server.now)
            time.sleep(0.2)
            with self.server.lock:
                self.server.now -= 1
        if kind == "reset":
            self.close_connection = True
        elif kind is not None and kind.isdigit():
            self.answer(int(kind), b"")
        elif not path.is_file():
            self.answer(404, b"")
        elif wanted is None or kind == "whole":
            self.answer(200, path.read_bytes(), kind)
        else:
            first, last = map(int, wanted.removeprefix("bytes=").split("-"))
            self.answer(206, path.read_bytes()[first : last + 1], kind)

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes, kind: str | None = None) -> None:
        if kind == "flip":
            body = body[: len(body) // 2] + bytes([body[len(body) // 2] ^ 1]) + body[len(body) // 2 + 1 :]
        if kind == "short":
            body = body[:-2]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if kind == "cut":
            body, self.close_connection = body[: len(body) // 2], True
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


def served(root: Path) -> Iterator[Store]:
    store = Store(root)
    threading.Thread(target=store.serve_forever, daemon=True).start()
    yield store
    store.shutdown()
    store.server_close()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A user's folder with packed examples and cached signals of a random teacher."""
    folder = laboratory(tmp_path_factory.mktemp("remote"))
    with inside(folder):
        recipe = load("tiny.yaml", RECIPE)
        journey.pack_recipe(recipe)
        for split in ("train", "val"):
            cache_teacher.cache_split(recipe, split, assemble.teacher(recipe), Accelerator(cpu=True))
    return folder


@pytest.fixture
def home(made, tmp_path, monkeypatch) -> Path:
    """A copy of it, as the working directory, where a try is made at once after another."""
    shutil.copytree(made, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    monkeypatch.syspath_prepend(tmp_path / "home")
    monkeypatch.setattr(remote, "WAITS", (0.0,) * len(remote.WAITS))
    return tmp_path / "home"


@pytest.fixture
def store(home) -> Iterator[Store]:
    """A server of `home/shards`."""
    yield from served(home / "shards")


@pytest.fixture(params=["ranges", "cache"])
def words(request, store, tmp_path) -> list[str]:
    """What makes the recipe read from the store: by range, and by whole shards."""
    kept = ["data.local_cache=1MB", f"data.cache_dir={tmp_path / 'kept'}"] if request.param == "cache" else []
    return [f"data.shards={store.url}", *kept]


def corridor(*overrides: str, name: str = "tiny", batch_size: int = 6) -> Corridor:
    words = ["stages.distill.epochs=2", f"stages.distill.batch_size={batch_size}", *overrides]
    return assemble.training_corridor(load(f"{name}.yaml", words), "distill", 0, 1)


def everything(of: Corridor, workers: int = 0) -> list[tuple]:
    """Every byte of every batch, in order."""
    found = []
    for batch in batches(of, 0, len(of), workers, pin=False):
        features = sorted(batch.signals.features.items())
        tensors = [batch.images, batch.targets, batch.valid, batch.signals.logits, *(value for _, value in features)]
        found.append((batch.keys, batch.total, *(tensor.numpy().tobytes() for tensor in tensors)))
    return found


# ---------------------------------------------------------------------------------------------- what a URL is


def test_a_url_stands_where_a_path_stands():
    assert location("shards") == Path("shards") and type(location("/a/b")) is type(Path("/a"))
    assert location("file:///a/b") == Path("/a/b") and location("local:///a") == Path("/a")
    cache = LocalCache(Path("kept"), 10)
    folder = location("s3://bucket/some.where/", cache) / "pets" / "train"
    assert folder == Remote("s3://bucket/some.where/pets/train", cache) and location(folder) is folder
    tar = folder / "data-000000.tar"
    assert (str(tar), tar.name) == ("s3://bucket/some.where/pets/train/data-000000.tar", "data-000000.tar")
    assert str(tar.with_suffix(".idx")) == "s3://bucket/some.where/pets/train/data-000000.idx"
    assert not [name for name in dir(tar) if name.startswith(("write", "mkdir", "open", "unlink", "touch"))]


def test_a_url_that_cannot_be_read_is_refused_with_the_recipe(home):
    with pytest.raises(RecipeError, match=r"^command line: data.shards: 'sftpp://' is no kind of URL that fsspec know"):
        load("tiny.yaml", ["data.shards=sftpp://host/x"])
    with pytest.raises(RecipeError, match=r"^command line: data.local_cache: must be a text, a size such as 20GB, not"):
        load("tiny.yaml", ["data.local_cache=plenty"])
    assert load("tiny.yaml", ["data.local_cache=20000"]).data.local_cache == "20000"


def test_the_cache_is_in_the_users_cache_directory_unless_it_is_said(home, monkeypatch):
    words = ["data.shards=memory://x", "data.local_cache=20GB"]
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/me")
    found = places.shards_folder(load("tiny.yaml", words))
    assert found == Remote("memory://x/tiny", LocalCache(Path("/var/cache/me/kd_dist"), 20 * 10**9))
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert places.shards_folder(load("tiny.yaml", words)).cache.folder == Path.home() / ".cache" / "kd_dist"
    said = places.shards_folder(load("tiny.yaml", [*words, "data.cache_dir=fast"]))
    assert said.cache.folder == Path("fast")


# ---------------------------------------------------------------------------------------------- the same batches


@pytest.mark.parametrize("cache", [False, True])
def test_batches_from_memory_are_those_from_the_disk(home, tmp_path, cache):
    expected = everything(corridor(*RECIPE))
    fsspec.filesystem("memory").put("shards/tiny", "/here/tiny", recursive=True)
    shutil.rmtree("shards")
    kept = ["data.local_cache=1MB", f"data.cache_dir={tmp_path / 'kept'}"] if cache else []
    there = corridor(*RECIPE, "data.shards=memory://here", *kept)
    assert len(expected) == 8 and everything(there) == expected
    assert len(list((tmp_path / "kept").glob("*.tar"))) == (6 if cache else 0)


def test_masks_features_and_their_components_come_from_memory(scenery):
    recipe = load("scenes.yaml")
    for split in ("train", "val"):
        cache_teacher.cache_split(recipe, split, assemble.teacher(recipe, recipe.cache.features), Accelerator(cpu=True))
    here = corridor(name="scenes")
    assert here.signals.features["high"].basis is not None and len(here.features) == 2
    fsspec.filesystem("memory").put("shards/scenes", "/there/scenes", recursive=True)
    there = corridor("data.shards=memory://there", name="scenes")
    assert len(here) == 4 and everything(there) == everything(here)
    components = "/there/scenes/train/teacher/bases.safetensors"
    fsspec.filesystem("memory").pipe(components, fsspec.filesystem("memory").cat(components)[:-1] + b"x")
    with pytest.raises(ShardError, match=r"^memory://there/scenes/train/teacher/bases.safetensors: cannot be had aft"):
        corridor("data.shards=memory://there", name="scenes")


@pytest.mark.slow
def test_loader_processes_ask_for_themselves_and_find_every_index_there(home, store, words):
    """The parent has asked the store before it forks: its connections and its event loop are not its children's."""
    expected, there = everything(corridor(*RECIPE)), corridor(*RECIPE, *words)
    assert there.examples.shard(0).read(0) and store.count("GET .*tar") == 1
    assert everything(there, workers=2) == expected
    assert store.count("GET .*tar") == (1 + 2 * 2 * TRAIN if len(words) == 1 else 6)
    assert store.count("GET .*idx") == store.count("HEAD .*tar") == 6


def test_a_batch_is_asked_for_all_at_once(home, store):
    there = corridor(*RECIPE, f"data.shards={store.url}", batch_size=TRAIN)
    store.fail("late", "GET .*tar")
    store.most = 0
    assert everything(there)[0] == everything(corridor(*RECIPE, batch_size=TRAIN))[0]
    assert 4 <= store.most <= remote.AT_ONCE and store.happened == {"late": 2 * 2 * TRAIN}


def test_a_shard_pickles_as_its_url(home, store):
    shard = Shard(location(f"{store.url}/{TAR}", LocalCache(home / "kept", 10**6)))
    again = pickle.loads(pickle.dumps(shard))
    assert len(pickle.dumps(shard)) < 500 and again.path == shard.path and again.read(0) == shard.read(0)


def test_an_index_is_fetched_once_and_an_example_or_a_row_is_one_range(home, store):
    there = corridor(*RECIPE, f"data.shards={store.url}")
    assert everything(there) == everything(corridor(*RECIPE))
    counted = Counter(request for request, wanted in store.asked if wanted is None)
    # the manifest is looked for by nobody else; each tar is asked for its size once
    assert counted == dict.fromkeys(counted, 1) and len(counted) == 2 + 2 * 6
    sizes: dict[str, list[int]] = {"data": [], "signals": []}
    for request, wanted in store.asked:
        if wanted is not None:
            first, last = map(int, wanted.removeprefix("bytes=").split("-"))
            sizes[request.rpartition("/")[2].partition("-")[0]].append(last + 1 - first)
    assert sizes["signals"] == [there.signals.dtype.itemsize] * 2 * TRAIN
    assert len(sizes["data"]) == 2 * TRAIN and sum(sizes["data"]) == 2 * sum(map(spans, there.examples.paths))


def spans(tar: Remote) -> int:
    """Bytes of all examples of a tar: all of it but its end."""
    shard = Shard(tar)
    offset, size = shard.member(len(shard) - 1, "png")  # the last member
    return offset + -(-size // 512) * 512


# ---------------------------------------------------------------------------------------------- what passes


@pytest.mark.parametrize("kind", PASSING)
def test_what_a_store_does_wrong_once_changes_nothing(home, store, words, kind):
    expected = everything(corridor(*RECIPE))
    places = [r"GET .*idx", r"GET .*data-.*tar", r"GET .*signals-.*tar"]
    if kind != "flip":  # nothing in a manifest says what its other bytes must be
        places.append(r"GET .*manifest\.json")
    if kind not in ("cut", "short", "flip"):  # an answer to HEAD has no body
        places.append("HEAD .*tar")
    for where in places:
        store.fail(kind, where, times=2)
    assert everything(corridor(*RECIPE, *words)) == expected
    assert store.happened == {kind: 2 * len(places)}


@pytest.mark.slow
def test_a_storm_of_all_of_them_changes_neither_bytes_nor_order(home, store, words):
    expected = everything(corridor(*RECIPE))
    there = corridor(*RECIPE, *words)
    few = len(words) > 1  # six whole shards, not 84 ranges
    store.most_met = 2  # of five tries: where the faults fall depends on which process asks first
    for number, kind in enumerate(PASSING):
        store.fail(kind, "GET .*tar", every=(4 if few else 11) + number, times=1 if few else 2)
    assert everything(there, workers=2) == expected
    assert len(store.happened) >= (2 if few else 6), store.happened


def test_the_waits_between_tries_double(home, store, monkeypatch):
    monkeypatch.undo()
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    store.fail("503", "GET .*idx", times=4)
    assert len(Shard(location(store.url) / "tiny" / "train" / "data-000000.tar")) == 8
    assert slept == [0.1, 0.2, 0.4, 0.8] and store.happened == {"503": 4}


# ---------------------------------------------------------------------------------------------- what does not


TAR, SIGNALS = "tiny/train/data-000001.tar", "tiny/train/teacher/signals-000001.tar"
TRIED = "cannot be had after 5 tries, at last: "
COPY = "check the connection and the store, and if it is damaged there, copy it there again from where it was written"


@pytest.mark.parametrize(
    "kind, path, asked, said",
    [
        ("500", TAR, 5, r": bytes \d+ to \d+: " + TRIED + f"ClientResponseError: 500, .*; {COPY}"),
        ("reset", TAR, 5, r": bytes \d+ to \d+: " + TRIED + f"ServerDisconnectedError: Server disconnected; {COPY}"),
        ("cut", TAR, 5, r": bytes \d+ to \d+: " + TRIED + f"ClientPayloadError: .*; {COPY}"),
        ("short", TAR, 5, r": bytes \d+ to \d+: " + TRIED + rf"only \d+ of \d+ bytes came; {COPY}"),
        ("flip", TAR, 5, r": bytes \d+ to \d+: " + TRIED + f"what came is not what was written; {COPY}"),
        ("flip", SIGNALS, 5, r": bytes \d+ to \d+: " + TRIED + f"what came is not what was written; {COPY}"),
        ("404", TAR, 1, ": is missing though its index is there; copy it there again from where it was written"),
        ("403", TAR, 1, ": the store refuses (.*403.*); check the URL and the credentials that fsspec uses for it"),
        ("whole", TAR, 1, r": \d+ bytes came where \d+ were asked for, so the store serves no byte ranges; use one .*"),
        ("flip", "tiny/train/data-000001.idx", 5, f": {TRIED}what came is not what was written; {COPY}"),
        ("404", "tiny/train/data-000001.idx", 1, None),
        ("404", "tiny/train/manifest.json", 1, ": there is no manifest, so these shards are not finished; copy it .*"),
        ("cut", "tiny/train/manifest.json", 5, f": {TRIED}ClientPayloadError: .*; {COPY}"),
        ("short", "tiny/train/manifest.json", 5, f": {TRIED}what came is not what was written; {COPY}"),
    ],
)
def test_what_stays_wrong_is_one_sentence(home, store, kind, path, asked, said):
    """One example a batch: nothing else is under way when the first one fails."""
    store.fail(kind, f"GET /{path}$")
    with pytest.raises(ShardError) as caught:
        everything(corridor(*RECIPE, f"data.shards={store.url}", batch_size=1))
    if said is None:
        url = f"{store.url}/tiny/train/data-000001.tar"
        said = ": there is no data-000001.idx beside it, so it was never finished; copy it there again .*"
    else:
        url = f"{store.url}/{path}"
    assert re.fullmatch(re.escape(url) + said, str(caught.value)), caught.value
    # aiohttp asks once more by itself over a connection that was cut
    assert store.count(f"GET /{path}$") == store.happened[kind] == asked * (2 if kind == "reset" else 1)


def test_a_tar_of_another_size_is_refused_before_it_is_read(home, store):
    with open(store.root / TAR, "ab") as file:
        file.write(bytes(512))
    with pytest.raises(ShardError, match="so it was cut short or replaced; copy it there again from where it was wr"):
        corridor(*RECIPE, f"data.shards={store.url}")


def test_a_store_that_is_not_there_is_one_sentence(home):
    with pytest.raises(ShardError, match=rf"^http://127.0.0.1:9/tiny/train/manifest.json: {TRIED}ClientConnectorError"):
        corridor(*RECIPE, "data.shards=http://127.0.0.1:9")


def test_a_store_that_takes_the_connection_and_says_nothing_is_one_sentence(home, monkeypatch):
    """The kernel accepts for whoever listens."""
    monkeypatch.setattr(remote, "ANSWER", 0.2)
    with socket.create_server(("127.0.0.1", 0), backlog=50) as silent:
        there = location(f"http://127.0.0.1:{silent.getsockname()[1]}") / "data-000000.tar"
        said = f"{TRIED}FSTimeoutError: no answer within 0.2 s; {COPY}"
        for ask in (there.stat, lambda: there.read_bytes(bool), lambda: there.pread(0, 9, bool, (9, ""))):
            with pytest.raises(ShardError) as caught:
                ask()
            assert str(caught.value).endswith(said)


def test_an_answer_that_is_late_once_is_asked_for_again(home, store, monkeypatch):
    shard = Shard(location(store.url) / TAR)
    monkeypatch.setattr(remote, "ANSWER", 0.1)
    store.fail("late", f"GET /{TAR}$", times=1)  # by 0.2 s
    assert shard.read(0) == Shard(home / "shards" / TAR).read(0)
    assert store.happened == {"late": 1} and store.count(f"GET /{TAR}$") == 2


def test_a_shard_that_is_replaced_midway_is_never_taken(home, store, words):
    there = corridor(*RECIPE, *words, batch_size=1)
    store.replacement = (store.root / TAR).read_bytes()[::-1]  # as large
    store.fail("replace", f"GET /{TAR}$", times=1)
    with pytest.raises(ShardError) as caught:
        everything(there)
    assert str(caught.value).startswith(f"{store.url}/{TAR}: ") and TRIED in str(caught.value)
    assert store.happened == {"replace": 1}


def test_a_shard_that_is_replaced_while_it_is_fetched_is_never_taken(home, store, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "CHUNK", 4096)
    there = corridor(*RECIPE, f"data.shards={store.url}", "data.local_cache=1MB", f"data.cache_dir={tmp_path / 'kept'}")
    shard, written = there.examples.shard(1), (store.root / TAR).read_bytes()
    store.replacement = written[:-1024] + b"!" + written[-1023:]
    store.fail("replace", f"GET /{TAR}$", times=1)
    with pytest.raises(ShardError, match=rf"^{store.url}/{TAR}: {TRIED}what came has sha256 "):
        shard.read(0)
    assert sorted(one.name for one in (tmp_path / "kept").iterdir()) == ["lock"]
    chunks = -(-len(written) // 4096)
    assert chunks >= 2 and store.count(f"GET /{TAR}$") == 5 * chunks and store.happened == {"replace": 1}
    (store.root / TAR).write_bytes(written)
    assert shard.read(0) == Shard(home / "shards" / TAR).read(0)


# ---------------------------------------------------------------------------------------------- the local cache


def noise(folder: Path, shards: int) -> list[Path]:
    """Shards of noise, all of one size."""
    random, paths = np.random.default_rng(0), [shard_path(folder, "data", number) for number in range(shards)]
    for number, path in enumerate(paths):
        write_shard(path, [(f"{number}-{one}", {"bin": random.bytes(EXAMPLE_BYTES)}) for one in range(EXAMPLES)], {})
    return paths


@pytest.fixture
def noisy(tmp_path, monkeypatch) -> Iterator[Store]:
    """A server of six shards of noise."""
    monkeypatch.setattr(remote, "WAITS", (0.0,) * len(remote.WAITS))
    noise(tmp_path / "noise", 6)
    yield from served(tmp_path / "noise")


def opened(store: Store, cache: LocalCache | None, number: int) -> Shard:
    return Shard(location(store.url, cache) / f"data-{number:06d}.tar")


def size_of_one(store: Store) -> int:
    return (store.root / "data-000000.tar").stat().st_size


def names(cache: LocalCache, shards: list[Shard]) -> list[int]:
    """Which shards the folder holds."""
    assert not list(cache.folder.glob("*.part"))
    return [number for number, shard in enumerate(shards) if (cache.folder / f"{shard.sha256}.tar").exists()]


def test_what_was_used_longest_ago_makes_room(noisy, tmp_path):
    cache = LocalCache(tmp_path / "kept", 2 * size_of_one(noisy) + 100)
    shards = [opened(noisy, cache, number) for number in range(4)]
    order, held = [0, 1, 0, 2, 2, 0, 3, 1], []
    for number in order:
        time.sleep(0.01)  # the clock of the file system ticks
        assert shards[number].read(1) == Shard(noisy.root / f"data-{number:06d}.tar").read(1)
        held.append(names(cache, shards))
    assert held == [[0], [0, 1], [0, 1], [0, 2], [0, 2], [0, 2], [0, 3], [1, 3]]
    assert noisy.count("GET .*tar") == 5


def test_a_cache_smaller_than_a_shard_is_refused(noisy, tmp_path):
    size = size_of_one(noisy)
    shard = opened(noisy, LocalCache(tmp_path / "kept", size - 1), 0)
    with pytest.raises(ShardError) as caught:
        shard.read(0)
    assert str(caught.value) == (
        f"{noisy.url}/data-000000.tar: its {size:,} bytes do not fit into data.local_cache, {size - 1:,} bytes; give "
        f"it room for several shards, or null for range reads"
    )
    assert opened(noisy, LocalCache(tmp_path / "kept", size), 0).read(0)


@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied"])
def test_a_shard_that_went_bad_in_the_cache_is_fetched_again(noisy, tmp_path, damage):
    cache = LocalCache(tmp_path / "kept", 10**6)
    shard, expected = opened(noisy, cache, 0), Shard(noisy.root / "data-000000.tar").read(2)
    assert shard.read(2) == expected
    kept = cache.folder / f"{shard.sha256}.tar"
    whole = kept.read_bytes()
    offset, size = shard.member(2, "bin")
    flipped = whole[:offset] + bytes([whole[offset] ^ 1]) + whole[offset + 1 :]
    kept.write_bytes({"flipped": flipped, "cut": whole[: offset + size - 1], "emptied": b""}[damage])
    assert shard.read(2) == expected and kept.read_bytes() == whole
    assert noisy.count("GET .*tar") == 2


def test_a_cache_that_cannot_be_written_is_one_sentence(noisy, tmp_path):
    (tmp_path / "kept").write_text("a file")
    with pytest.raises(ShardError, match=r"kept: the local cache cannot be used \(.*\); make room, choose another"):
        opened(noisy, LocalCache(tmp_path / "kept", 10**6), 0).read(0)


def test_threads_that_want_one_shard_fetch_it_once(noisy, tmp_path):
    cache = LocalCache(tmp_path / "kept", 10**6)
    shard, here = opened(noisy, cache, 0), Shard(noisy.root / "data-000000.tar")
    noisy.fail("late", "GET .*tar")
    places = [place % EXAMPLES for place in range(48)]
    assert remote.at_once(shard.path, shard.read, places) == [here.read(place) for place in places]
    assert noisy.count("GET .*tar") == 1 and noisy.happened == {"late": 1}


def read_at_random(url: str, root: str, folder: str, capacity: int, seed: int) -> None:
    """Read 60 examples of six shards in an order of its own, each compared with the file."""
    cache, random = LocalCache(Path(folder), capacity), np.random.default_rng(seed)
    there = [Shard(location(url, cache) / f"data-{number:06d}.tar") for number in range(6)]
    here = [Shard(Path(root) / f"data-{number:06d}.tar") for number in range(6)]
    for _ in range(60):
        number, place = (int(value) for value in random.integers(6, size=2))
        assert there[number].read(place) == here[number].read(place)
    print("all bytes right")


def taken(folder: Path) -> tuple[int, int]:
    """Bytes of all shards in a cache, whole and on their way, and how many they are; nobody changes it meanwhile."""
    with open(folder / "lock", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        sizes = [one.stat().st_size for one in folder.iterdir() if one.name != "lock"]
    return sum(sizes), len(sizes)


@pytest.mark.slow
@pytest.mark.parametrize("room", [1, 3])
def test_processes_that_share_a_cache_keep_its_bound(noisy, tmp_path, room):
    """Four readers and room for fewer shards; one is killed while it fetches and leaves a part of one behind."""
    capacity, folder = room * size_of_one(noisy) + 100, tmp_path / "kept"
    folder.mkdir()
    arguments = (noisy.url, str(noisy.root), str(folder), capacity)
    noisy.most_met = 2  # of five tries: where the faults fall depends on which process asks first
    noisy.fail("late", "GET .*tar", times=1)
    victim = start(read_at_random, *arguments, 99, folder=tmp_path)
    wait_until(lambda: noisy.happened["late"] == 1, "the first fetch")
    victim.kill()
    [left] = folder.glob("*.part")
    for number, kind in enumerate(("500", "flip", "cut", "reset")):
        noisy.fail(kind, "GET .*tar", every=13 + number)
    readers = [start(read_at_random, *arguments, seed, folder=tmp_path) for seed in range(4)]
    most, looks = 0, 0
    while any(one.process.is_alive() for one in readers):
        found, _ = taken(folder)
        most, looks = max(most, found), looks + 1
    assert [done(one.wait()) for one in readers] == ["all bytes right\n"] * 4
    assert size_of_one(noisy) <= most <= capacity and looks > 20
    assert not left.exists() and taken(folder)[1] == room
    assert noisy.count("GET .*tar") > 6 + room and {"500", "flip", "cut", "reset"} <= set(noisy.happened)


# ---------------------------------------------------------------------------------------------- the commands


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a trained teacher, its cache, and a student of two steps."""
    folder = laboratory(tmp_path_factory.mktemp("trained"))
    done(run(kd_dist, "pack", "tiny.yaml", folder=folder))
    done(run(train.main, ["tiny.yaml", "--stage", "teacher"], folder=folder))
    done(run(cache_teacher.main, ["tiny.yaml"], folder=folder))
    student(folder, "runs/local")
    return folder


def student(folder: Path, runs: str, *words: str) -> dict[str, bytes]:
    """Two steps of the student with two loader processes; the weights that it leaves."""
    teacher = "teacher.weights=runs/tiny/teacher/seed-0/best.safetensors"
    steps = ["train.max_steps=2", "train.checkpoint_every=1", "data.workers=2", f"runs={runs}"]
    done(run(train.main, ["tiny.yaml", "--stage", "distill", teacher, *steps, *words], folder=folder))
    return contents(folder / runs, "**/*.safetensors")


@pytest.fixture
def away(trained) -> Iterator[Store]:
    yield from served(trained / "shards")


@pytest.mark.slow
@pytest.mark.parametrize("cache", [False, True])
def test_training_from_a_store_leaves_the_same_weights(trained, away, tmp_path, cache):
    for every, kind in enumerate(("500", "cut", "flip"), start=2):
        away.fail(kind, "GET .*tar", times=1, every=every)  # once: no request meets five of them
    kept = ["data.local_cache=1MB", f"data.cache_dir={tmp_path / 'kept'}"] if cache else []
    there = student(trained, f"runs/away-{cache}", f"data.shards={away.url}", *kept)
    here = contents(trained / "runs" / "local", "**/*.safetensors")
    assert there == here and len(here) == 3 and any(name.endswith("model.safetensors") for name in here)
    assert away.happened.total() >= 3 and len(list((tmp_path / "kept").glob("*.tar"))) == (10 if cache else 0)


@pytest.mark.slow
def test_finished_shards_under_a_url_are_done_before_and_all_commands_read_them(trained, away, tmp_path):
    there = f"data.shards={away.url}"
    before = contents(trained / "shards")
    packed = done(run(kd_dist, "pack", "tiny.yaml", there, folder=trained))
    assert "pack train: done before, 21 examples in 3 shards" in packed
    assert done(run(kd_dist, "cache-teacher", "tiny.yaml", there, folder=trained)) == "cache teacher: done before\n"
    launched = done(run(cache_teacher.main, ["tiny.yaml", there], folder=trained))
    assert launched.count("done before") == 3
    assert done(run(kd_dist, "verify", "tiny.yaml", there, folder=trained)).count("the cache is this teacher's") == 3
    assert f"{away.url}/tiny/train/teacher: tiny_model:network" in done(
        run(kd_dist, "inspect", "tiny.yaml", there, "--sheet", tmp_path / "sheet.png", folder=trained)
    )
    assert (tmp_path / "sheet.png").stat().st_size > 1000
    assert "teacher" in done(run(kd_dist, "evaluate", "tiny.yaml", there, folder=trained))
    assert contents(trained / "shards") == before


@pytest.mark.slow
def test_verify_notices_a_byte_under_a_url_that_no_example_has(trained, away):
    path = trained / "shards" / TAR
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:-1] + b"!")
        said = sentence(run(kd_dist, "verify", "tiny.yaml", f"data.shards={away.url}", folder=trained))
    finally:
        path.write_bytes(whole)
    assert said.startswith(f"{away.url}/{TAR}: {TRIED}what came has sha256 ") and COPY in said


@pytest.mark.slow
@pytest.mark.parametrize("command", ["pack", "cache-teacher", "plan"])
def test_writing_under_a_url_is_refused(trained, away, tmp_path, command):
    shutil.copytree(trained / "shards" / "tiny", tmp_path / "other" / "tiny")
    lost = {"pack": "tiny/test/manifest.json", "cache-teacher": "tiny/test/teacher/manifest.json"}
    if command in lost:
        (tmp_path / "other" / lost[command]).unlink()
    away.root = tmp_path / "other"
    said = sentence(run(kd_dist, command, "tiny.yaml", f"data.shards={away.url}", folder=trained))
    place = "/tiny/test/teacher" if command == "cache-teacher" else "/tiny"
    assert said == (
        f"{away.url}{place}: nothing can be written under a URL; set data.shards to a local folder, run the same "
        f"command, and copy the finished shards to the URL with the store's own tool"
    )


@pytest.mark.slow
def test_a_copy_that_lacks_a_shard_is_not_taken_for_finished(trained, away, tmp_path):
    shutil.copytree(trained / "shards" / "tiny", tmp_path / "other" / "tiny")
    (tmp_path / "other" / TAR).unlink()
    away.root = tmp_path / "other"
    said = sentence(run(kd_dist, "pack", "tiny.yaml", f"data.shards={away.url}", folder=trained))
    assert said == f"{away.url}/{TAR}: the tar is missing though its index is there; {COPY.rpartition(', ')[2]}"
