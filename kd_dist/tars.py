"""What a tar holds, whoever wrote it: its examples by their headers, and why one cannot be used as it is."""

import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kd_dist.errors import ShardError

BLOCK = 512  # bytes; a tar is made of them
OURS = "kd_dist.shards.member_key makes safe keys"  # what to do about a key that cannot be written
THEIRS = "rename the members and write the tar again"  # and about one that is there
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}  # first bytes

_EXTENSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_PICKLED = re.compile(r"(.*\.)?(pickle|pkl|pt|pth|pyd)(\.gz)*")  # extensions that a stock decoder may execute


class TarExample(NamedTuple):
    """Where one example lies in the tar; all numbers are bytes from the start of the tar."""

    key: str
    offset: int  # of its first header
    members: list[tuple[str, int, int]]  # extension, offset and size of the content

    @property
    def end(self) -> int:
        """Behind the padding of its last member."""
        _, offset, size = self.members[-1]
        return -(-(offset + size) // BLOCK) * BLOCK


def scan(path: Path) -> tuple[list[TarExample], int]:
    """The examples of a tar from its headers, and the offset where the member headers end.

    Raises ShardError for a tar that is compressed or no tar, that holds links, devices or sparse files, or whose
    members webdataset would skip or merge.
    """
    entries: list[TarExample] = []
    try:
        _refuse_compressed(path)
        with tarfile.open(path, "r:", encoding="utf-8") as tar:
            for info in tar:
                if info.isdir():
                    continue
                _refuse_kind(path, info)
                # webdataset cuts a name at the first dot after the last slash
                folders, slash, last = info.name.rpartition("/")
                stem, _, extension = last.partition(".")
                key = folders + slash + stem
                if not entries or entries[-1].key != key:
                    entries.append(TarExample(key, info.offset, []))
                entries[-1].members.append((extension, info.offset_data, info.size))
            end = tar.offset
    except (OSError, ValueError, OverflowError, MemoryError, RecursionError, tarfile.TarError) as error:
        raise ShardError(
            f"{path}: it cannot be read as an uncompressed tar ({str(error) or repr(error)}); copy it again or make it "
            "again"
        ) from error
    seen: set[str] = set()
    for entry in entries:
        check_example(path, entry.key, [extension for extension, _, _ in entry.members], seen, THEIRS)
    return entries, end


def check_example(path: Path, key: str, extensions: Sequence[str], seen: set[str], remedy: str = OURS) -> None:
    """Raise a ShardError unless every webdataset reader delivers this example, alone and whole; add it to `seen`."""
    *folders, stem = key.split("/")
    unusable = next((extension for extension in extensions if not _EXTENSION.fullmatch(extension)), None)
    folded = {extension.lower() for extension in extensions}
    pickled = next((extension for extension in sorted(folded) if is_pickled(extension)), None)
    cases = {
        "holds something else than printable ASCII": not (key.isascii() and key.isprintable()),
        "has a dot after its last slash, where webdataset would cut it off": "." in stem,
        "has an empty part or '..' between its slashes": not stem or "" in folders or ".." in folders,
        "starts with '__', so webdataset would skip it": key.startswith("__"),
        "comes twice; a key may come once, with its members side by side": key in seen,
        "has no members": not extensions,
        f"has the extension {unusable!r}; use letters, digits, '_', '.' and '-'": unusable is not None,
        "has an extension twice (case does not count), which webdataset refuses": len(folded) < len(extensions),
        f"has a pickled member {pickled!r}, which can execute code; store arrays as npy": pickled is not None,
    }
    for problem, found in cases.items():
        if found:
            raise ShardError(f"{path}: the key {key!r} {problem} ({remedy})")
    seen.add(key)


def is_pickled(extension: str) -> bool:
    """Whether a stock decoder may execute a member with this extension, in lower case."""
    return _PICKLED.fullmatch(extension) is not None


def _refuse_compressed(path: Path) -> None:
    with open(path, "rb") as file:
        start = file.read(8)
    kind = next((kind for magic, kind in COMPRESSED.items() if start.startswith(magic)), None)
    if kind is not None:
        raise ShardError(f"{path}: is compressed ({kind}), and nothing in it can be read by position; decompress it")


def _refuse_kind(path: Path, info: tarfile.TarInfo) -> None:
    """Raise a ShardError for a member that is no plain file; GNU tar's options tell how to make it one."""
    if info.isreg() and not info.issparse():
        return
    kind, option = "a device or a pipe, which holds nothing", "take it out"
    if info.issparse():
        kind, option = "sparse, with holes in place of its zeros", "write the tar again without --sparse"
    elif info.islnk():
        kind, option = f"a hard link to '{info.linkname}'", "write the tar again with --hard-dereference"
    elif info.issym():
        kind, option = f"a link to '{info.linkname}'", "write the tar again with --dereference"
    raise ShardError(f"{path}: '{info.name}' is {kind}; {option}")
