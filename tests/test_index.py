"""Indexes whose checksum is right and whose tables are not."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from kd_dist.errors import ShardError
from kd_dist.shards import Shard, index_path, is_committed, write_shard

DEEP = "[" * 100_000
LONG = "9" * 1_000_000  # digits of one number
EXAMPLES = [("a", {"png": b"x" * 700, "json": b"{}"}), ("b", {"png": b"y"})]


def resealed(path: Path, change: Callable[[bytearray], bytes | bytearray | None]) -> Path:
    """The index of a tar, changed, with a checksum that is right again."""
    index = bytearray(index_path(path).read_bytes()[:-4])
    index = change(index) or index
    index_path(path).write_bytes(index + zlib.crc32(index).to_bytes(4, "little"))
    return path


def packed_at(form: str, at: int, *values: int) -> Callable[[bytearray], None]:
    return lambda index: struct.pack_into(form, index, at, *values)


def with_text(text: bytes) -> Callable[[bytearray], bytes]:
    """An index of no examples with this JSON."""

    def changed(index: bytearray) -> bytes:
        magic, version, _, size, digest, *_ = struct.unpack_from("<8sIIQ32s", index)
        return struct.pack("<8sIIQ32sIIQ", magic, version, 0, size, digest, 0, 0, len(text)) + text

    return changed


# Where the fields of an index of two examples with three members lie: shards/FORMAT.md.
FIRST, SECOND, MEMBERS = 72, 72 + 32, 72 + 64
INDEXES: dict[str, tuple[Callable, str]] = {
    "2^31 examples": (packed_at("<I", 12, 2**31), "its header speaks of 68719476926 bytes, it has 254"),
    "2^32 members": (packed_at("<I", 56, 2**32 - 1), "its header speaks of"),
    "2^31 key bytes": (packed_at("<I", 60, 2**31), "its header speaks of"),
    "2^60 JSON bytes": (packed_at("<Q", 64, 2**60), "its header speaks of"),
    "an example behind the end": (packed_at("<Q", FIRST, 2**40), "an example lies outside the tar"),
    "an offset of 2^64": (packed_at("<Q", FIRST, 2**64 - 512), "an example lies outside the tar"),
    "an example of 2^62 bytes": (packed_at("<Q", FIRST + 8, 2**62), "an example lies outside the tar"),
    "an offset and a size that wrap": (packed_at("<QQ", FIRST, 512, 2**64 - 512), "an example lies outside the tar"),
    "a first member of others": (
        packed_at("<I", FIRST + 20, 1),
        "the members of its examples are not those of its table",
    ),
    "members of others": (packed_at("<H", FIRST + 28, 3), "the members of its examples are not"),
    "no members": (packed_at("<H", SECOND + 28, 0), "the members of its examples are not"),
    "a key elsewhere": (packed_at("<I", SECOND + 24, 0), "the keys of its examples are not"),
    "a longer key": (packed_at("<H", SECOND + 30, 60_000), "the keys of its examples are not"),
    "overlapping examples": (packed_at("<Q", SECOND, 0), "examples overlap"),
    "a member outside its example": (packed_at("<Q", MEMBERS, 4096), "a member lies outside its example"),
    "a member of 2^62 bytes": (packed_at("<Q", MEMBERS + 8, 2**62), "a member lies outside the tar"),
    "a member without extension": (packed_at("<I", MEMBERS + 16, 7), "a member has an extension that is not listed"),
    "a key that is not ASCII": (lambda index: index.__setitem__(MEMBERS + 72, 255), "a key is not ASCII"),
    "no JSON": (with_text(b"pickle"), "Expecting value"),
    "deep JSON": (with_text(DEEP.encode()), "its JSON is nested too deep"),
    "a long number": (with_text(b'{"extensions": [], "notes": ' + LONG.encode() + b"}"), "Exceeds the limit"),
    "JSON of another kind": (with_text(b"[]"), "its JSON lists no extensions"),
    "extensions of another kind": (
        with_text(b'{"extensions": {"0": "png"}, "notes": {}}'),
        "its JSON lists no extensions",
    ),
    "extensions that are numbers": (with_text(b'{"extensions": [0], "notes": {}}'), "its JSON lists no extensions"),
    "no notes": (with_text(b'{"extensions": []}'), "its JSON has no notes"),
}

EXAMPLES = [("a", {"png": b"x" * 700, "json": b"{}"}), ("b", {"png": b"y"})]


def test_a_resealed_index_is_one_that_can_be_read(tmp_path):
    path = tmp_path / "x.tar"
    write_shard(path, EXAMPLES, {"rows": 2})
    before = index_path(path).read_bytes()
    shard = Shard(resealed(path, lambda index: None))
    assert index_path(path).read_bytes() == before and shard.notes == {"rows": 2}
    assert [(shard.key(i), shard.read(i)) for i in range(2)] == EXAMPLES
    assert len(Shard(resealed(path, with_text(b'{"extensions": [], "notes": {}}')))) == 0


@pytest.mark.parametrize("name", INDEXES)
def test_tables_that_cannot_be_are_refused(tmp_path, name):
    path, (change, message) = tmp_path / "x.tar", INDEXES[name]
    write_shard(path, EXAMPLES, {})
    with pytest.raises(ShardError, match=f"x.idx: the index makes no sense: {message}.*; delete the file and run"):
        Shard(resealed(path, change))
    assert not is_committed(path)
