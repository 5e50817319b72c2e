"""Shards: the bytes on disk, what reading them detects, and what a broken writer leaves behind."""

import gzip
import hashlib
import io
import json
import multiprocessing
import os
import random
import re
import signal
import struct
import subprocess
import sys
import tarfile
import textwrap
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from isal.isal_zlib import crc32

from kd_dist import disk
from kd_dist.errors import ShardError
from kd_dist.shards import (
    OPEN_TARS,
    VIEWED,
    Shard,
    index_path,
    index_tar,
    is_committed,
    member_key,
    shard_path,
    write_shard,
)

EXAMPLES = [
    ("cats/a", {"png": b"\x89PNG" + bytes(range(256)) * 3, "json": b'{"label":0}', "mask.png": b""}),
    ("cats/b", {"jpg": b"x" * 512}),
    ("0001-dog_%20", {"json": b"{}", "Big_Teacher.npy": b"\x93NUMPY" * 90}),
]
NOTES = {"quarantined": [{"key": "z", "reason": "schön"}], "rows": 3}
TAR_SHA256 = "eff26360605d8810427f32f08f445676dabbefcb58fa168db35bbdf16ad950e2"
INDEX_SHA256 = "d2a0813577462a1313a265440364e89bb5cb27839a3c6655648d559d1d66f457"


def written(folder: Path, examples=EXAMPLES, notes=NOTES, number: int = 0) -> Path:
    path = shard_path(folder, "data", number)
    write_shard(path, examples, notes)
    return path


def contents(path: Path) -> list[tuple[str, dict[str, bytes]]]:
    shard = Shard(path)
    return [(shard.key(i), shard.read(i)) for i in range(len(shard))]


def plain_tar(path: Path, members: list[tuple[str, bytes]], **options) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def second_reader(path: Path) -> tuple[list[tuple[str, dict[str, bytes]]], dict]:
    """Written from shards/FORMAT.md alone."""
    tar, index = path.read_bytes(), path.with_suffix(".idx").read_bytes()
    magic, version, examples, size, digest, members, key_bytes, json_bytes = struct.unpack("<8sIIQ32sIIQ", index[:72])
    assert (magic, version, size, digest) == (b"KDDISTIX", 1, len(tar), hashlib.sha256(tar).digest())
    assert len(index) == 72 + 32 * examples + 24 * members + key_bytes + json_bytes + 4
    assert struct.unpack("<I", index[-4:])[0] == zlib.crc32(index[:-4])
    assert len(tar) % 10240 == 0
    member_table = 72 + 32 * examples
    key_table = member_table + 24 * members
    texts = json.loads(index[key_table + key_bytes : -4])
    delivered = []
    for i in range(examples):
        row = struct.unpack("<QQIIIHH", index[72 + 32 * i : 104 + 32 * i])
        offset, span, crc, first, key_at, count, key_length = row
        assert zlib.crc32(tar[offset : offset + span]) == crc
        held = {}
        for j in range(first, first + count):
            at = member_table + 24 * j
            start, length, extension, zero = struct.unpack("<QQII", index[at : at + 24])
            assert zero == 0 and offset + 512 <= start <= start + length <= offset + span
            held[texts["extensions"][extension]] = tar[start : start + length]
        key = index[key_table + key_at : key_table + key_at + key_length].decode()
        delivered.append((key, held))
    return delivered, texts["notes"]


# Writing


def test_what_is_written_is_read(tmp_path):
    path = written(tmp_path / "made" / "on the way")
    shard = Shard(path)
    assert path.name == "data-000000.tar" and index_path(path).name == "data-000000.idx"
    assert contents(path) == EXAMPLES
    assert len(shard) == 3 and shard.keys == [key for key, _ in EXAMPLES]
    assert shard.notes == NOTES and shard.path == path
    assert shard.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sorted(os.listdir(path.parent)) == ["data-000000.idx", "data-000000.tar"]


def test_the_bytes_are_these_and_no_others(tmp_path):
    one, two = written(tmp_path / "one"), written(tmp_path / "two")
    assert one.read_bytes() == two.read_bytes()
    assert index_path(one).read_bytes() == index_path(two).read_bytes()
    assert hashlib.sha256(one.read_bytes()).hexdigest() == TAR_SHA256
    assert hashlib.sha256(index_path(one).read_bytes()).hexdigest() == INDEX_SHA256


def test_the_order_in_which_members_and_notes_are_given_does_not_matter(tmp_path):
    turned = [(key, dict(reversed(members.items()))) for key, members in EXAMPLES]
    one, two = written(tmp_path / "one"), written(tmp_path / "two", turned, dict(reversed(NOTES.items())))
    assert one.read_bytes() == two.read_bytes()
    assert index_path(one).read_bytes() == index_path(two).read_bytes()


def test_the_second_reader_agrees(tmp_path):
    assert second_reader(written(tmp_path)) == (EXAMPLES, NOTES)


@pytest.mark.parametrize("count", [0, 1])
def test_small_shards(tmp_path, count):
    path = written(tmp_path, EXAMPLES[:count], {})
    assert is_committed(path) and contents(path) == EXAMPLES[:count]
    assert second_reader(path) == (EXAMPLES[:count], {})
    with tarfile.open(path) as tar:
        assert len(tar.getmembers()) == count * 3


@given(
    st.dictionaries(
        st.text("abcXYZ019_%-", min_size=1, max_size=20).filter(lambda key: not key.startswith("__")),
        st.dictionaries(st.sampled_from(["png", "json", "a.npy", "mask.png"]), st.binary(max_size=3000), min_size=1),
        max_size=6,
    )
)
def test_any_shard_reads_back_and_its_index_can_be_made_again(tmp_path_factory, examples):
    path = written(tmp_path_factory.mktemp("shard"), examples.items(), {})
    index = index_path(path).read_bytes()
    index_path(path).unlink()
    index_tar(path)
    assert index_path(path).read_bytes() == index
    assert dict(contents(path)) == examples
    assert second_reader(path) == (list(examples.items()), {})


def test_contents_longer_than_every_buffer(tmp_path):
    chance, sizes = random.Random(0), [70_000, 10_240, 9_728, 1, 300_000]
    examples = [(f"k{i}", {"bin": chance.randbytes(size)}) for i, size in enumerate(sizes)]
    path = written(tmp_path, examples)
    assert contents(path) == examples
    index = index_path(path).read_bytes()
    index_tar(path, NOTES)
    assert index_path(path).read_bytes() == index


def test_examples_are_taken_one_by_one_and_notes_after_the_last(tmp_path):
    notes = {}

    def generate():
        for i in range(4):
            [temporary] = tmp_path.glob("data-000000.tar.*.tmp")
            notes[f"seen {i}"] = temporary.stat().st_size
            yield f"k{i}", {"bin": bytes(1_000_000)}

    path = written(tmp_path, generate(), notes)
    sizes = list(Shard(path).notes.values())
    assert len(sizes) == 4
    assert all(size >= 1_000_000 * i - 30_000 for i, size in enumerate(sizes))  # but for what waits in small buffers


def test_stock_webdataset_reads_it(tmp_path):
    path = written(tmp_path)
    read = [dict(sample) for sample in webdataset.WebDataset(str(path), shardshuffle=False)]
    assert [sample["__key__"] for sample in read] == [key for key, _ in EXAMPLES]
    for sample, (_, members) in zip(read, EXAMPLES, strict=True):
        held = {name: content for name, content in sample.items() if not name.startswith("__")}
        assert held == {name.lower(): content for name, content in members.items()}


def test_tar_lists_it(tmp_path):
    done = subprocess.run(["tar", "tf", written(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [f"{key}.{name}" for key, members in EXAMPLES for name in sorted(members)]


def test_headers_are_fixed_and_short(tmp_path):
    path = written(tmp_path)
    with tarfile.open(path) as tar:
        infos = tar.getmembers()
    assert len(infos) == 6
    owners = {(info.uid, info.gid, info.uname, info.gname) for info in infos}
    assert owners == {(0, 0, "kd_dist", "kd_dist")} and {(info.mode, info.mtime) for info in infos} == {(0o444, 0)}
    assert all(info.offset_data - info.offset == 512 for info in infos)  # no PAX header


REFUSED = [
    ("a.b", {"png": b""}, "key 'a.b' has a dot after its last slash"),
    ("", {"png": b""}, "has an empty part"),
    ("/a", {"png": b""}, "has an empty part"),
    ("a//b", {"png": b""}, "has an empty part"),
    ("a/", {"png": b""}, "has an empty part"),
    ("../a", {"png": b""}, "or '..' between its slashes"),
    ("__a", {"png": b""}, "starts with '__', so webdataset would skip it"),
    ("ä", {"png": b""}, "something else than printable ASCII"),
    ("a\n", {"png": b""}, "something else than printable ASCII"),
    ("cats/a", {"png": b""}, "key 'cats/a' comes twice"),
    ("a", {}, "has no members"),
    ("a", {"_png": b""}, "has the extension '_png'; use letters"),
    ("a", {"": b""}, "has the extension ''; use letters"),
    ("a", {"x/y": b""}, "has the extension 'x/y'; use letters"),
    ("a", {"png": b"", "PNG": b""}, r"has an extension twice \(case does not count\)"),
    ("a", {"x.PKL": b""}, "has a pickled member 'x.pkl', which can execute code"),
    ("k" * 96, {"jpeg": b""}, "'k{96}.jpeg' is longer than the 100 bytes"),
]


@pytest.mark.parametrize("key, members, message", REFUSED)
def test_unsafe_names_are_refused(tmp_path, key, members, message):
    with pytest.raises(ShardError, match=f"data-000000.tar: .*{message}.*member_key"):
        written(tmp_path, [*EXAMPLES, (key, members)])
    assert os.listdir(tmp_path) == []


def test_the_longest_name_is_written(tmp_path):
    path = written(tmp_path, [("k" * 95, {"jpeg": b"here"})])
    assert contents(path) == [("k" * 95, {"jpeg": b"here"})]


# Keys from paths


@pytest.mark.parametrize(
    "path, key",
    [
        ("cats/fluffy_1-b", "cats/fluffy_1-b"),
        ("a.b.png", "a%2Eb%2Epng"),
        ("../x y", "%2E%2E/x%20y"),
        ("50%25", "50%2525"),
        ("ü\n", "%C3%BC%0A"),
        ("/a//b/", "%2Fa/%2Fb%2F"),
        ("__meta__/x", "%5F_meta__/x"),
        ("_a__b", "_a__b"),
        (os.fsdecode(b"\xff"), "%FF"),
        ("p" * 58, "p" * 58),
        ("p" * 59, "p" * 42 + "-" + hashlib.blake2b(b"p" * 59, digest_size=8).hexdigest()),
    ],
)
def test_keys_of_paths(path, key):
    assert member_key(path) == key


@given(st.lists(st.text("aA_/.%-é", min_size=1, max_size=80), min_size=2, max_size=40, unique=True))
def test_different_paths_have_different_keys_and_every_key_can_be_written(tmp_path_factory, paths):
    keys = [member_key(path) for path in paths]
    assert len(set(keys)) == len(paths) and max(map(len, keys)) <= 59
    examples = [(key, {"x" * 40: path.encode()}) for key, path in zip(keys, paths, strict=True)]
    shard = written(tmp_path_factory.mktemp("keys"), examples)
    read = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    assert [(sample["__key__"], {"x" * 40: sample["x" * 40]}) for sample in read] == examples == contents(shard)


def test_a_cut_key_is_no_other_path_kept_whole():
    cut = member_key("long/" * 30)
    assert member_key(cut) != cut


# Reading


def test_members_and_rows(tmp_path):
    path = written(tmp_path)
    shard, tar = Shard(path), path.read_bytes()
    found = 0
    for i, (_, members) in enumerate(EXAMPLES):
        for extension, content in members.items():
            offset, size = shard.member(i, extension)
            assert tar[offset : offset + size] == content == shard.pread(offset, size, bool)
            found += 1
    assert found == 6
    with pytest.raises(ShardError, match="data-000000.tar: example 'cats/b' has no member 'png'; it holds jpg"):
        shard.member(1, "png")


@pytest.mark.parametrize("i", [-1, 3])
def test_positions_outside(tmp_path, i):
    shard = Shard(written(tmp_path))
    for access in (shard.key, shard.read, lambda i: shard.member(i, "png")):
        with pytest.raises(IndexError, match=f"there is no example {i} among 3"):
            access(i)


def test_threads_and_processes_share_a_shard(tmp_path):
    examples = [(f"k{i}", {"txt": str(i).encode() * 1000}) for i in range(200)]
    shard = Shard(written(tmp_path, examples))
    expected = [members for _, members in examples]
    assert shard.read(0) == expected[0]  # the tar is open before the fork
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(shard.read, range(200))) == expected
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(shard.read, range(200), chunksize=1) == expected


def test_a_shard_crosses_into_a_spawned_process(tmp_path):
    shard = Shard(written(tmp_path))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(shard.read, (1,)) == EXAMPLES[1][1]


def test_more_shards_than_a_process_may_open(tmp_path):
    first = written(tmp_path, EXAMPLES[1:2])
    shards = []
    for number in range(OPEN_TARS + 40):
        path = shard_path(tmp_path, "more", number)
        os.link(first, path)
        os.link(index_path(first), index_path(path))
        shards.append(Shard(path))
    before = len(os.listdir("/proc/self/fd"))
    assert all(shard.read(0) == EXAMPLES[1][1] for shard in shards + shards[:1])
    assert len(os.listdir("/proc/self/fd")) - before <= OPEN_TARS


def test_contents_of_a_large_example_are_views_of_one_read_and_equal_the_copies(tmp_path):
    header, block = 512, 512
    sizes = [VIEWED - header - block, VIEWED - header, VIEWED - header + 1, 5 * VIEWED]
    examples = [(f"k{size}", {"a": random.Random(size).randbytes(size)}) for size in sizes]
    examples.append(("two", {"a": examples[1][1]["a"], "b": b""}))
    shard = Shard(written(tmp_path, examples))
    read = [shard.read(i) for i in range(len(shard))]
    assert read == [members for _, members in examples]  # a view equals the bytes that it shows
    kinds = [{type(content) for content in one.values()} for one in read]
    assert kinds == [{bytes}, *[{memoryview}] * 4]
    assert read[4]["a"].obj is read[4]["b"].obj and read[4]["a"].readonly


def test_the_checksums_are_those_of_zlib():
    whole = random.Random(0).randbytes(3 * 10**5)
    cases = 0
    for size in (*range(300), 4095, 4096, 4097, 10**5, len(whole) - 7):
        for start in (0, 1, 7):
            part = memoryview(whole)[start : start + size]
            assert crc32(part) == zlib.crc32(part) and crc32(part, 0xFEDCBA98) == zlib.crc32(part, 0xFEDCBA98)
            cases += 1
    assert cases == 915


def maps(path: Path) -> list[str]:
    """The permissions of each mapping of a file."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line.split()[1] for line in lines if str(path) in line]


def test_an_index_is_shared_memory_that_stays_what_it_was_and_is_given_back(tmp_path):
    path = written(tmp_path, [(f"k{i:03d}", {"txt": b"%d" % i}) for i in range(300)])
    before, shard = len(os.listdir("/proc/self/fd")), Shard(path)
    assert maps(index_path(path)) == ["r--s"] and len(os.listdir("/proc/self/fd")) == before
    keys, notes = shard.keys, shard.notes
    assert shard.offsets("txt", 1) is None  # some have two digits, some three
    written(tmp_path, [("other", {"txt": b"x"})])
    assert shard.keys == keys and shard.notes == notes and len(Shard(path)) == 1
    assert shard.same_keys(shard) and not shard.same_keys(Shard(path))
    places = Shard(path).offsets("txt", 1)  # keeps the index, though not the shard
    assert places.tolist() == [512] and len(maps(index_path(path))) == 2
    del shard, places
    assert not maps(index_path(path))


def test_more_indexes_than_may_be_mapped_are_kept_as_they_were_read(tmp_path, monkeypatch):
    path = written(tmp_path)
    shared = Shard(path)
    monkeypatch.setattr(disk, "MAPPINGS", 0)
    alone = Shard(path)
    assert len(maps(index_path(path))) == 1
    assert [one.same_keys(other) for one, other in ((shared, alone), (alone, shared))] == [True, True]
    assert alone.keys == shared.keys and alone.notes == shared.notes == NOTES
    assert [alone.read(i) for i in range(3)] == [shared.read(i) for i in range(3)]
    assert alone.member(2, "json") == shared.member(2, "json")


def test_a_shard_that_was_replaced_is_read_anew(tmp_path):
    path = written(tmp_path, [("k", {"txt": b"old"})])
    assert contents(path) == [("k", {"txt": b"old"})]
    written(tmp_path, [("k", {"txt": b"new"})])
    assert contents(path) == [("k", {"txt": b"new"})]


# Damage


def test_every_flipped_byte_of_a_tar_is_noticed(tmp_path):
    path = written(tmp_path)
    shard, good = Shard(path), path.read_bytes()
    caught = 0
    with open(path, "r+b", buffering=0) as file:
        for at in range(len(good)):
            os.pwrite(file.fileno(), bytes([good[at] ^ 1 << at % 8]), at)
            damaged = []
            for i in range(3):
                try:
                    assert shard.read(i) == EXAMPLES[i][1]
                except ShardError as error:
                    damaged.append(str(error))
            os.pwrite(file.fileno(), good[at : at + 1], at)
            assert len(damaged) <= 1
            caught += len(damaged)
    members = [content for _, held in EXAMPLES for content in held.values()]
    assert caught == sum(512 + -(-len(content) // 512) * 512 for content in members)  # all but the end blocks
    assert contents(path) == EXAMPLES


def test_damage_is_told_with_shard_key_and_remedy(tmp_path):
    path = written(tmp_path)
    offset, _ = Shard(path).member(1, "jpg")
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(b"y")
    with pytest.raises(ShardError, match=r"data-000000.tar: example 'cats/b' is damaged: .*delete the file and run"):
        Shard(path).read(1)


def test_every_flipped_byte_of_an_index_is_noticed(tmp_path):
    path = written(tmp_path)
    index = index_path(path)
    good = index.read_bytes()
    for at in range(len(good)):
        index.write_bytes(good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :])
        with pytest.raises(ShardError, match="data-000000.idx: .*delete the file"):
            Shard(path)
        assert not is_committed(path)
    for size in range(len(good)):
        index.write_bytes(good[:size])
        with pytest.raises(ShardError, match="data-000000.idx: "):
            Shard(path)


def test_an_index_of_another_version_is_refused(tmp_path):
    path = written(tmp_path)
    index = index_path(path)
    index.write_bytes(index.read_bytes().replace(b"KDDISTIX\1", b"KDDISTIX\2"))
    with pytest.raises(ShardError, match="has version 2 and this kd_dist reads version 1; use the kd_dist that wrote"):
        Shard(path)


def test_a_missing_index_or_tar_is_not_committed(tmp_path):
    path = written(tmp_path)
    kept = index_path(path).rename(tmp_path / "kept")
    with pytest.raises(ShardError, match="no data-000000.idx beside it, so it was never finished; .*kd-dist pack"):
        Shard(path)
    assert not is_committed(path)
    kept.rename(index_path(path))
    assert is_committed(path)
    path.unlink()
    with pytest.raises(ShardError, match="the tar is missing though its index is there"):
        Shard(path)
    assert not is_committed(path)


def test_a_tar_cut_anywhere_is_noticed(tmp_path):
    path = written(tmp_path)
    whole, index = path.read_bytes(), index_path(path).read_bytes()
    with tarfile.open(path) as tar:
        end = max(info.offset_data + -(-info.size // 512) * 512 for info in tar.getmembers())
    refused = 0
    for size in [*range(0, len(whole), 512), *range(100, len(whole), 512)]:
        path.write_bytes(whole[:size])
        index_path(path).write_bytes(index)
        with pytest.raises(ShardError, match=f"the tar has {size} bytes but its index says {len(whole)}"):
            Shard(path)
        assert not is_committed(path)
        index_path(path).unlink()
        if size < end + 1024:
            with pytest.raises(ShardError, match="cut short or damaged at byte|cannot be read as an uncompressed tar"):
                index_tar(path)
            assert not is_committed(path)
            refused += 1
        else:  # only padding is gone
            index_tar(path)
            assert contents(path) == EXAMPLES
    assert refused == 2 * (end // 512 + 2)


def test_a_tar_that_grew_is_noticed(tmp_path):
    path = written(tmp_path)
    size = path.stat().st_size
    with open(path, "ab") as file:
        file.write(b"more")
    with pytest.raises(ShardError, match=f"the tar has {size + 4} bytes but its index says {size}, so"):
        Shard(path)
    assert not is_committed(path)


def test_a_tar_that_shrinks_or_vanishes_under_a_reader(tmp_path):
    path = written(tmp_path)
    shard = Shard(path)
    os.truncate(path, 1000)
    with pytest.raises(ShardError, match="data-000000.tar: only .* bytes at 0 are there"):
        shard.read(0)
    shard = Shard(written(tmp_path, number=1))
    shard.path.unlink()
    with pytest.raises(ShardError, match="data-000001.tar: the tar cannot be read .*No such file"):
        shard.read(0)
    shard.path.mkdir()
    with pytest.raises(ShardError, match="data-000001.tar: the tar cannot be read .*directory"):
        shard.read(0)


# What a broken writer leaves


def test_an_exception_leaves_nothing(tmp_path):
    def generate():
        yield from EXAMPLES
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        written(tmp_path, generate())
    assert os.listdir(tmp_path) == []


def test_unwritable_notes_leave_a_shard_uncommitted(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        written(tmp_path, notes={"loss": float("nan")})
    assert not is_committed(shard_path(tmp_path, "data", 0))
    assert os.listdir(tmp_path) == ["data-000000.tar"]


def test_an_old_index_does_not_vouch_for_a_new_tar_of_the_same_size(tmp_path):
    path = written(tmp_path, [("k", {"txt": b"old"})])
    old = path.stat().st_size
    with pytest.raises(ValueError, match="not JSON compliant"):
        written(tmp_path, [("k", {"txt": b"new"})], {"loss": float("nan")})
    assert path.stat().st_size == old and b"new" in path.read_bytes()
    assert not is_committed(path)


def test_a_broken_rewrite_keeps_what_was_committed(tmp_path):
    path = written(tmp_path)
    with pytest.raises(ShardError, match="comes twice"):
        written(tmp_path, EXAMPLES * 2)
    assert is_committed(path) and contents(path) == EXAMPLES


PROGRAM = """
    import resource, sys
    from kd_dist.shards import write_shard
    def generate():
        for i in range(1000):
            if i == 500 and sys.argv[2] == "killed":
                print("half way", flush=True)
                sys.stdin.read()
            yield f"k{i}", {"bin": bytes(1000)}
    if sys.argv[2] == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
    write_shard(sys.argv[1], generate(), {})
"""


def started(path: Path, how: str) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(path), how]
    root = Path(__file__).parents[1]
    return subprocess.Popen(
        command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_killed_writer_leaves_nothing_that_looks_finished(tmp_path):
    path = shard_path(tmp_path, "data", 0)
    with started(path, "killed") as process:
        assert process.stdout.readline() == "half way\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    [left] = os.listdir(tmp_path)
    assert re.fullmatch(r"data-000000\.tar\.[0-9a-f]{8}\.tmp", left)
    assert not is_committed(path)
    examples = [(f"k{i}", {"bin": bytes(1000)}) for i in range(1000)]
    write_shard(path, examples, {})
    assert sorted(os.listdir(tmp_path)) == ["data-000000.idx", "data-000000.tar"]
    assert contents(path) == examples


def test_a_full_disk_leaves_nothing(tmp_path):
    with started(shard_path(tmp_path, "data", 0), "full") as process:
        _, error = process.communicate()
    assert process.returncode == 1 and "File too large" in error
    assert os.listdir(tmp_path) == []


# Indexing


def test_the_index_is_made_again_to_the_byte(tmp_path):
    path = written(tmp_path)
    index = index_path(path).read_bytes()
    index_path(path).unlink()
    index_tar(path, NOTES)
    assert index_path(path).read_bytes() == index


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_foreign_webdataset(tmp_path, kind):
    path = tmp_path / "foreign.tar"
    long = "./v1.0/" + "x" * 60 + "/" + "y" * 30
    members = [("b.cls", b"1"), ("b.JPG", b"image"), (f"{long}.jpg", b"other")]
    plain_tar(path, members, format=kind)
    index_tar(path)
    assert contents(path) == [("b", {"cls": b"1", "JPG": b"image"}), (long, {"jpg": b"other"})]
    assert second_reader(path)[0] == contents(path)
    read = webdataset.WebDataset(str(path), shardshuffle=False)
    assert [sample["__key__"] for sample in read] == Shard(path).keys


def test_links_are_refused_and_folders_passed_over(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("folder.d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    index_tar(path)
    assert len(Shard(path)) == 0
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(ShardError, match="'a.png' is a link to '/etc/passwd'; write the tar again with --deref"):
        index_tar(path)


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_sparse_members_are_refused(tmp_path, form):
    with open(tmp_path / "a.bin", "wb") as file:
        file.truncate(1_000_000)
    command = ["tar", "--create", "--sparse", f"--format={form}", "--file=x.tar", "a.bin"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert (tmp_path / "x.tar").stat().st_size < 100_000
    with pytest.raises(ShardError, match="'a.bin' is sparse, .*; write the tar again without --sparse"):
        index_tar(tmp_path / "x.tar")


@pytest.mark.parametrize(
    "names, message",
    [
        (["a.png", "b.png", "a.json"], "key 'a' comes twice; .*members side by side"),
        (["a.png", "a.png"], "key 'a' has an extension twice"),
        (["a.png", "README"], "key 'README' has the extension ''"),
        (["a.png", ".hidden"], "key '' has an empty part"),
        (["__meta__/a.png"], "key '__meta__/a' starts with '__'"),
        (["a.png", "a.pth"], "key 'a' has a pickled member 'pth'"),
    ],
)
def test_foreign_members_that_webdataset_would_skip_merge_or_execute(tmp_path, names, message):
    path = plain_tar(tmp_path / "x.tar", [(name, b"content") for name in names])
    with pytest.raises(ShardError, match=f"x.tar: the {message}"):
        index_tar(path)
    assert os.listdir(tmp_path) == ["x.tar"]


def test_what_is_no_tar_is_refused(tmp_path):
    path = written(tmp_path)
    no_tar = "it cannot be read as an uncompressed tar .*; copy it again"
    for name, (content, sentence) in {
        "compressed": (gzip.compress(path.read_bytes()), r"is compressed \(gzip\), .*; decompress it"),
        "text": (b"this is no tar\n" * 100, no_tar),
        "empty": (b"", no_tar),
        "absent": (None, no_tar),
    }.items():
        other = tmp_path / f"{name}.tar"
        if content is not None:
            other.write_bytes(content)
        with pytest.raises(ShardError, match=f"{name}.tar: {sentence}"):
            index_tar(other)


def test_two_tars_joined_or_a_hole_of_zeros_are_refused(tmp_path):
    path = written(tmp_path)
    whole = path.read_bytes()
    for damaged in (whole + whole, whole[:512] + bytes(1024) + whole[1536:], whole[:2048] + bytes(2048) + whole[4096:]):
        path.write_bytes(damaged)
        with pytest.raises(ShardError, match="cut short or damaged at byte"):
            index_tar(path)


def test_every_flipped_byte_of_a_header_is_noticed_by_the_scan(tmp_path):
    path = written(tmp_path, EXAMPLES[:2])
    good = path.read_bytes()
    with tarfile.open(path) as tar:
        headers = [info.offset for info in tar.getmembers()]
    assert len(headers) == 4
    noticed = 0
    for at in (offset + byte for offset in headers for byte in range(512)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :])
        try:
            index_tar(path, NOTES)
        except ShardError:
            noticed += 1
        else:  # another spelling of the header's own checksum
            assert contents(path) == EXAMPLES[:2]
    assert noticed >= 4 * 500
