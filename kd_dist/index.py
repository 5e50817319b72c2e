"""The tables of a shard's index, checked as a whole before anything is read by them. `shards/FORMAT.md` describes them.

A checksum tells damage, not intent: who makes up an index makes up its checksum too.
"""

import itertools
import json
from typing import Any

import numpy as np

EXAMPLE = np.dtype(
    [("offset", "<u8"), ("size", "<u8"), ("crc", "<u4"), ("first", "<u4"), ("key", "<u4"), ("members", "<u2")]
    + [("key_bytes", "<u2")]
)
MEMBER = np.dtype([("offset", "<u8"), ("size", "<u8"), ("extension", "<u4"), ("zero", "<u4")])


def checked_texts(index: bytes, start: int, counts: tuple[int, int, int, int], tar_size: int) -> tuple[list[str], dict]:
    """The extensions and the notes of an index whose tables begin at byte `start`.

    `counts` are those of its header: examples, members, bytes of all keys, bytes of the JSON text. Raises ValueError
    unless the tables fill the file to its checksum, and point into each other and into the tar.
    """
    examples, members, key_bytes, json_bytes = counts
    sizes = (start, examples * EXAMPLE.itemsize, members * MEMBER.itemsize, key_bytes, json_bytes, 4)
    *edges, end = itertools.accumulate(sizes)
    if end != len(index):
        raise ValueError(f"its header speaks of {end} bytes, it has {len(index)}")
    keys, text = index[edges[2] : edges[3]], index[edges[3] : edges[4]]
    extensions, notes = _texts(text)
    held = np.frombuffer(index, MEMBER, members, edges[1])
    _check_tables(np.frombuffer(index, EXAMPLE, examples, edges[0]), held, key_bytes, tar_size)
    if not keys.isascii():
        raise ValueError("a key is not ASCII")
    if members and held["extension"].max() >= len(extensions):
        raise ValueError("a member has an extension that is not listed")
    return extensions, notes


def _texts(text: bytes) -> tuple[list[str], dict[str, Any]]:
    try:
        texts = json.loads(text)
    except RecursionError as error:
        raise ValueError("its JSON is nested too deep") from error
    extensions = texts.get("extensions") if isinstance(texts, dict) else None
    if not isinstance(extensions, list) or not all(isinstance(one, str) for one in extensions):
        raise ValueError("its JSON lists no extensions")
    if not isinstance(texts.get("notes"), dict):
        raise ValueError("its JSON has no notes")
    return extensions, texts["notes"]


def _check_tables(examples: np.ndarray, members: np.ndarray, key_bytes: int, tar_size: int) -> None:
    """Raise a ValueError unless examples follow each other in the tar, and their members and keys in their tables.

    Every shard that a run opens comes through here, so it is done with few passes over the tables.
    """
    if not len(examples):
        if len(members) or key_bytes:
            raise ValueError("the members and keys of its examples are not those of its tables")
        return
    start, end = _spans("an example", examples, tar_size)
    counts = examples["members"].astype(np.int64)
    for starts, length, total, what in (
        (examples["first"], counts, len(members), "members"),
        (examples["key"], examples["key_bytes"].astype(np.int64), key_bytes, "keys"),
    ):
        after = starts + length
        if starts[0] or after[-1] != total or length.min() < 1 or not np.array_equal(starts[1:], after[:-1]):
            raise ValueError(f"the {what} of its examples are not those of its table")
    if (start[1:] < end[:-1]).any():
        raise ValueError("examples overlap")
    inner, outer = _spans("a member", members, tar_size)
    if (inner < np.repeat(start, counts)).any() or (outer > np.repeat(end, counts)).any():
        raise ValueError("a member lies outside its example")


def _spans(where: str, table: np.ndarray, tar_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each row of a table begins and ends in the tar."""
    offset, size = np.ascontiguousarray(table["offset"]), table["size"]
    # Offsets first and sizes by what is left: a sum of two numbers of 64 bits may wrap.
    if offset.max() > tar_size or (size > np.uint64(tar_size) - offset).any():
        raise ValueError(f"{where} lies outside the tar")
    return offset, offset + size
