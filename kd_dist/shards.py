"""Shards on disk: write, index, read. A shard is a plain webdataset tar and, beside it, an index that commits it.

`shards/FORMAT.md` describes every byte. Nothing here decodes what an example holds, so nothing here can execute it.
"""

import functools
import hashlib
import json
import mmap
import os
import re
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from isal.isal_zlib import crc32  # zlib's, several times as fast

from kd_dist.disk import mapped, published, sync
from kd_dist.errors import ShardError
from kd_dist.index import EXAMPLE, MEMBER, checked_texts
from kd_dist.remote import Remote, location, remedy
from kd_dist.tars import BLOCK, TarExample, check_example, scan

NAME_BYTES = 100  # the name field of a ustar header
KEY_BYTES = 59  # leaves room for "." and an extension of 40
INDEX_MAGIC = b"KDDISTIX"
INDEX_VERSION = 1
VIEWED = 2**14  # bytes of an example from which on its contents are not copied; below, a copy is cheaper than a view
OPEN_TARS = 256  # file descriptors that a process keeps; a thousand shards must not exhaust the usual limit of 1024

# Header: magic, version, examples, tar size, tar sha256, members, bytes of all keys, bytes of the JSON text.
_HEADER = struct.Struct("<8sIIQ32sIIQ")
_EXAMPLE = struct.Struct("<QQIIIHH")  # offset, size, crc32, first member, key offset, members, key bytes
_MEMBER = struct.Struct("<QQI4x")  # offset, size, extension

_RESIDUE = 0x2144DF1C  # the CRC32 of any bytes with their own CRC32 behind them
_UNSAFE = re.compile(rb"[^A-Za-z0-9_/-]|\A_(?=_)|\A/|(?<=/)/|/\Z")
_AGAIN = "delete the file and run the command that writes it (kd-dist pack or kd-dist cache-teacher)"

Contents = Callable[[TarExample], dict[str, bytes]]  # {extension: content} of an example of a tar
Choose = Callable[[list[TarExample], Contents], Iterable[bool]]  # of each example whether it is to be used


def member_key(path: str) -> str:
    """The key of the example whose file has this relative path, safe in tar names and for webdataset.

    Different paths have different keys. Bytes of the UTF-8 path outside `A-Z a-z 0-9 _ - /` become `%XX`; so do a slash
    that separates nothing and the first of two leading underscores, which webdataset would skip. A key of up to 58
    bytes is kept; of a longer one stay the first 42 bytes, `-`, and 16 hex digits of its blake2b, 59 bytes in all.
    """
    raw = path.encode("utf-8", "surrogateescape")
    key = _UNSAFE.sub(lambda match: b"%%%02X" % match[0][0], raw)
    if len(key) >= KEY_BYTES:
        key = key[: KEY_BYTES - 17] + b"-" + hashlib.blake2b(key, digest_size=8).hexdigest().encode()
    return key.decode("ascii")


def shard_path(folder: str | os.PathLike, stem: str, number: int) -> Path:
    """The tar of shard `number`: `<folder>/<stem>-000123.tar`."""
    return Path(folder) / f"{stem}-{number:06d}.tar"


def index_path(path: str | os.PathLike | Remote) -> Path | Remote:
    """The index that belongs to a tar: the same path, ending in `.idx`."""
    return location(path).with_suffix(".idx")


def mend(path: Path | Remote) -> str:
    """What to do about a tar that is not what its index says."""
    if isinstance(path, Path) and path.is_symlink():
        return f"it is a link to {os.readlink(path)}: bring that back as it was, or delete {path.parent} and index anew"
    return remedy(path, _AGAIN)


def write_shard(
    path: str | os.PathLike, examples: Iterable[tuple[str, Mapping[str, bytes | memoryview]]], notes: Mapping[str, Any]
) -> None:
    """Write the examples, in order, as the tar `path`, then its index. The same input gives the same bytes.

    `examples` yields (key, {extension: content}) and is consumed one example at a time. `notes` goes into the index
    as JSON; it is read after the last example, so the generator may fill it. A shard that was there is replaced.
    Raises ShardError for a key or extension that webdataset would skip, split or merge. Whatever goes wrong, nothing
    stays behind that looks finished.
    """
    from webdataset import TarWriter  # here, because it imports torch and a reader needs neither

    path = Path(path)
    entries: list[TarExample] = []
    seen: set[str] = set()
    offset = 0
    with published(path) as file:
        stream = _Measured(file)
        # An integer mtime: a float one costs every member a PAX header and reading more than twice the time.
        with TarWriter(stream, encoder=False, mtime=0, mode=0o444, user="kd_dist", group="kd_dist") as tar:
            for key, contents in examples:
                check_example(path, key, list(contents), seen)
                entries.append(TarExample(key, offset, []))
                for extension in sorted(contents):  # the order in which TarWriter writes them
                    if len(key) + 1 + len(extension) > NAME_BYTES:
                        raise ShardError(
                            f"{path}: the member name '{key}.{extension}' is longer than the {NAME_BYTES} bytes "
                            "of a tar header; shorten the key (kd_dist.shards.member_key makes short ones)"
                        )
                    entries[-1].members.append((extension, offset + BLOCK, len(contents[extension])))
                    offset = entries[-1].end
                stream.ends.append(offset)
                tar.write({"__key__": key, **contents})
        if index_path(path).exists():  # an old index must never vouch for the new tar
            index_path(path).unlink()
            sync(path.parent)
    _write_index(path, entries, stream.crcs, stream.size, stream.sha256.digest(), notes)


def index_tar(
    path: str | os.PathLike,
    notes: Mapping[str, Any] | None = None,
    at: str | os.PathLike | None = None,
    choose: Choose | None = None,
) -> None:
    """Write the index of an existing tar by one scan; for a tar of `write_shard` and its notes, the same bytes.

    The index belongs to `at`, a link to the tar, where that is given. `choose` says of each example whether it is to be
    in the index; `notes` are read after the last, so it may fill them. Raises ShardError for a tar that is compressed,
    cut short or damaged, that holds links or sparse files, or whose members webdataset would skip or merge (no
    extension, a key in two places, a pickled member).
    """
    path = Path(path)
    entries, end = scan(path)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as tar:
        tail = tar[end:]
        # tarfile takes a damaged header, or a hole of zeros, for the end: only the true end has nothing behind it.
        if len(tail) < 2 * BLOCK or tail.strip(b"\0"):
            raise ShardError(
                f"{path}: the tar is cut short or damaged at byte {end}, where either a member or the two zero "
                "blocks of its end should be; copy it again or make it again"
            )

        def contents(entry: TarExample) -> dict[str, bytes]:
            return {extension: tar[start : start + size] for extension, start, size in entry.members}

        if choose is not None:
            entries = [entry for entry, good in zip(entries, choose(entries, contents), strict=True) if good]
        with memoryview(tar) as view:
            crcs = [crc32(view[entry.offset : entry.end]) for entry in entries]
            digest = hashlib.sha256(view).digest()
    _write_index(Path(at or path), entries, crcs, end + len(tail), digest, notes or {})


def is_committed(path: str | os.PathLike | Remote) -> bool:
    """Whether the tar `path` was written to its end: it has a valid index, which names the size that it has."""
    try:
        Shard(path)
    except ShardError:
        return False
    return True


class Shard:
    """One committed shard, read by position. Safe to share between threads and over fork; pickles as its path.

    Raises ShardError if the index is missing, damaged or of another version, or the tar has not the size it names.
    """

    def __init__(self, path: str | os.PathLike | Remote):
        self.path = location(path)  # of the tar
        self._name = str(self.path)
        index, self._index = _checked_index(self.path)
        _, _, self._examples, self.tar_bytes, digest, members, key_bytes, json_bytes = _HEADER.unpack_from(index)
        self.sha256: str = digest.hex()  # of the tar when it was written
        self._members_at = _HEADER.size + self._examples * _EXAMPLE.size
        self._keys_at = self._members_at + members * _MEMBER.size
        self._texts_at = self._keys_at + key_bytes
        counts, again = (self._examples, members, key_bytes, json_bytes), mend(self.path)
        try:
            self._extensions, _ = checked_texts(index, _HEADER.size, counts, self.tar_bytes)
        except ValueError as error:
            raise ShardError(f"{index_path(self.path)}: the index makes no sense: {error}; {again}") from error
        try:
            status = self.path.stat()
        except FileNotFoundError as error:
            raise ShardError(f"{self.path}: the tar is missing though its index is there; {again}") from error
        if status.st_size != self.tar_bytes:
            sizes = f"the tar has {status.st_size} bytes but its index says {self.tar_bytes}"
            raise ShardError(f"{self.path}: {sizes}, so it was cut short or replaced; {again}")
        self._inode = status.st_ino

    @functools.cached_property
    def notes(self) -> dict[str, Any]:
        """What the command that wrote the shard noted; parsed when asked for, since readers of examples never ask."""
        return json.loads(bytes(self._index[self._texts_at : -4]))["notes"]

    def __len__(self) -> int:
        return self._examples

    def __reduce__(self):
        return Shard, (self.path,)

    @property
    def keys(self) -> list[str]:
        """Every key, in order; a new list each time."""
        return [self.key(i) for i in range(self._examples)]

    def key(self, i: int) -> str:
        """The key of example `i`, 0 <= i < len."""
        _, _, _, _, key_offset, _, key_bytes = self._entry(i)
        start = self._keys_at + key_offset
        return str(self._index[start : start + key_bytes], "ascii")

    def read(self, i: int) -> dict[str, bytes | memoryview]:
        """Example `i` as {extension: content}: one read of its whole span, checked by its CRC32, headers too. Contents
        of a large example, `VIEWED` bytes or more, are views of what was read: to copy them takes longer than that.

        Raises ShardError, naming shard and key, when the bytes are not those that were written.
        """
        offset, size, crc, first, _, members, _ = self._entry(i)
        # A default, not a closure: that would make every other use of `crc` here, and so every small example, slower.
        data = self.pread(offset, size, lambda data, crc=crc: crc32(data) == crc)
        if (actual := crc32(data)) != crc:
            sums = f"the CRC32 of its {size} bytes at {offset} is {actual:08x}, the index says {crc:08x}"
            raise ShardError(f"{self.path}: example '{self.key(i)}' is damaged: {sums}; {mend(self.path)}")
        if size >= VIEWED:
            data = memoryview(data)
        names, rows = self._extensions, self._rows(first, members)
        return {names[number]: data[start - offset : start - offset + length] for start, length, number in rows}

    def member(self, i: int, extension: str) -> tuple[int, int]:
        """Where the content of one member of example `i` lies in the tar: (offset, size) in bytes, for `pread`."""
        _, _, _, first, _, members, _ = self._entry(i)
        places = {self._extensions[row[2]]: row[:2] for row in self._rows(first, members)}
        if extension not in places:
            held = ", ".join(places)
            raise ShardError(f"{self.path}: example '{self.key(i)}' has no member '{extension}'; it holds {held}")
        return places[extension]

    def pread(self, offset: int, size: int, sound: Callable[[bytes], bool]) -> bytes:
        """`size` bytes of the tar from `offset`: of a file unchecked, of a URL asked for until they are `sound`."""
        if isinstance(self.path, Remote):
            return self.path.pread(offset, size, sound, (self.tar_bytes, self.sha256))
        try:
            tar = _open_tar(self._name, self._inode)  # a name: without one, another thread may close it meanwhile
            data = os.pread(tar.descriptor, size, offset)
        except OSError as error:
            raise self._unreadable(error) from error
        if len(data) != size:
            raise self._short(len(data), size, offset)
        return data

    def pread_into(self, into: memoryview, offset: int, sound: Callable[[bytes | memoryview], bool]) -> None:
        """As `pread`, as many bytes as `into` takes; of a file without a copy."""
        if isinstance(self.path, Remote):
            into[:] = self.pread(offset, len(into), sound)
            return
        try:
            tar = _open_tar(self._name, self._inode)
            size = os.preadv(tar.descriptor, [into], offset)
        except OSError as error:
            raise self._unreadable(error) from error
        if size != len(into):
            raise self._short(size, len(into), offset)

    def note(self, name: str) -> Any:
        """What the command that wrote the shard noted. Raises ShardError when the index was made without its notes."""
        if name not in self.notes:
            raise ShardError(f"{index_path(self.path)}: lacks what the command that wrote it noted, '{name}'; {_AGAIN}")
        return self.notes[name]

    def same_keys(self, other: "Shard") -> bool:
        """Whether both hold the same keys in the same order."""
        mine, others = (bytes(one._index[one._keys_at : one._texts_at]) for one in (self, other))
        return mine == others and np.array_equal(*(one._table(EXAMPLE)["key_bytes"] for one in (self, other)))

    def offsets(self, extension: str, size: int) -> np.ndarray | None:
        """Where the contents lie in the tar, (N,) in bytes, if every example is this one member of `size` bytes."""
        members = self._table(MEMBER)
        if self._extensions != [extension] or len(members) != len(self) or (members["size"] != size).any():
            return None
        return members["offset"]

    def _table(self, kind: np.dtype) -> np.ndarray:
        start, end = (_HEADER.size, self._members_at) if kind is EXAMPLE else (self._members_at, self._keys_at)
        return np.frombuffer(self._index, kind, (end - start) // kind.itemsize, start)

    def _unreadable(self, error: OSError) -> ShardError:
        return ShardError(f"{self.path}: the tar cannot be read ({error}); check the disk, or {mend(self.path)}")

    def _short(self, there: int, size: int, offset: int) -> ShardError:
        return ShardError(f"{self.path}: only {there} of {size} bytes at {offset} are there; {mend(self.path)}")

    def _entry(self, i: int) -> tuple[int, int, int, int, int, int, int]:
        if not 0 <= i < self._examples:
            raise IndexError(f"{self.path}: there is no example {i} among {self._examples}")
        return _EXAMPLE.unpack_from(self._index, _HEADER.size + i * _EXAMPLE.size)

    def _rows(self, first: int, members: int) -> Iterator[tuple[int, int, int]]:
        start = self._members_at + first * _MEMBER.size
        return _MEMBER.iter_unpack(self._index[start : start + members * _MEMBER.size])


class _Measured:
    """The file under a tar writer. It takes the sha256, and the CRC32 up to each of `ends`, as bytes pass through."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._crc = 0
        self.sha256 = hashlib.sha256()
        self.size = 0  # bytes written so far
        self.ends: deque[int] = deque()  # where the examples end that are not yet wholly written
        self.crcs: list[int] = []  # of the examples that are

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self.sha256.update(data)
        rest = memoryview(data)
        while self.ends and rest:
            part = rest[: self.ends[0] - self.size]
            self._crc = crc32(part, self._crc)
            self.size += len(part)
            rest = rest[len(part) :]
            if self.size == self.ends[0]:
                self.ends.popleft()
                self.crcs.append(self._crc)
                self._crc = 0
        self.size += len(rest)


class _OpenTar:
    """A descriptor of a tar, closed when the last reader lets go of it."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def __del__(self):
        os.close(self.descriptor)


@functools.lru_cache(maxsize=OPEN_TARS)
def _open_tar(path: str, inode: int) -> _OpenTar:
    """The tar, opened for reading. `inode` tells a replaced file from the one that is open."""
    return _OpenTar(os.open(path, os.O_RDONLY))


def _checked_index(path: Path | Remote) -> tuple[bytes, bytes | memoryview]:
    """The bytes of a tar's index, complete, undamaged and of this version; and the same to keep: of a file, in memory
    that processes share. It is read first, so that what a disk cannot give is an error here and not a signal later."""
    index, again = index_path(path), remedy(path, _AGAIN)
    try:
        if isinstance(index, Path):
            data, kept = mapped(index)
        else:
            data = kept = index.read_bytes(lambda data: crc32(data) == _RESIDUE)
    except FileNotFoundError as error:
        raise ShardError(f"{path}: there is no {index.name} beside it, so it was never finished; {again}") from error
    if len(data) < _HEADER.size + 4 or not data.startswith(INDEX_MAGIC):
        raise ShardError(f"{index}: this is not a shard index, or only a part of one; {again}")
    version = _HEADER.unpack_from(data)[1]
    if version != INDEX_VERSION:
        versions = f"the index has version {version} and this kd_dist reads version {INDEX_VERSION}"
        raise ShardError(f"{index}: {versions}; use the kd_dist that wrote it, or {again}")
    if crc32(data) != _RESIDUE:
        raise ShardError(f"{index}: the index is damaged (its own CRC32 differs); {again}")
    return data, kept


def index_bytes(examples: int, members: int, key_bytes: int, texts: Mapping[str, Any]) -> int:
    """Bytes of the index of a shard with so many examples, members and bytes of keys; its JSON holds `texts`."""
    parts = _HEADER.size + examples * _EXAMPLE.size + members * _MEMBER.size + key_bytes
    return parts + len(_texts(texts)) + 4  # its own CRC32


def _texts(texts: Mapping[str, Any]) -> bytes:
    return json.dumps(texts, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _write_index(
    path: Path, entries: list[TarExample], crcs: list[int], tar_size: int, tar_sha256: bytes, notes: Mapping[str, Any]
) -> None:
    """Publish the index of a tar that is already on disk under its final name."""
    extensions = sorted({extension for entry in entries for extension, _, _ in entry.members})
    numbers = {extension: number for number, extension in enumerate(extensions)}
    examples, members, keys = bytearray(), bytearray(), bytearray()
    for entry, crc in zip(entries, crcs, strict=True):
        key = entry.key.encode("utf-8")
        first = len(members) // _MEMBER.size
        size, count = entry.end - entry.offset, len(entry.members)
        examples += _EXAMPLE.pack(entry.offset, size, crc, first, len(keys), count, len(key))
        for extension, offset, size in entry.members:
            members += _MEMBER.pack(offset, size, numbers[extension])
        keys += key
    text = _texts({"extensions": extensions, "notes": dict(notes)})
    counts = (len(members) // _MEMBER.size, len(keys), len(text))
    header = _HEADER.pack(INDEX_MAGIC, INDEX_VERSION, len(entries), tar_size, tar_sha256, *counts)
    body = b"".join((header, examples, members, keys, text))
    with published(index_path(path)) as file:
        file.write(body + crc32(body).to_bytes(4, "little"))
