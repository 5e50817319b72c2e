"""What a teacher said, as structured rows and back: one row a view, checked by its own CRC, never pickled.

A row is `row_crc`, `view`, `input_crc`, then the fields of the codecs. Every field has a fixed size, so one view of
one example is one read at a known offset.
"""

import json
import re
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from isal.isal_zlib import crc32

from kd_dist.errors import ShardError
from kd_dist.signals.codecs import LogitsCodec, NoLogits, OutputsCodec
from kd_dist.signals.fidelity import add_sums as add_sums  # for those who have sums of codecs to add
from kd_dist.signals.topk import TopCodec, is_top

FRAME = ("row_crc", "view", "input_crc")  # the fields that every row begins with
NUMBER = r"[<|][biufV]\d+"  # an npy type string: bool, int, uint, float, or V for bytes of padding

Codec = LogitsCodec | OutputsCodec | TopCodec | NoLogits


def codec_of(task: str, name: str | None, classes: int, grid: tuple[int, int] | None) -> Codec:
    """How what a teacher of this task says is stored; without a name it is not, for rows of features alone. Raises
    RecipeError for what does not go together."""
    if name is None:
        return NoLogits(classes)
    if task == "regression":
        return OutputsCodec(name, classes)
    return TopCodec(name, classes, grid) if is_top(name) else LogitsCodec(name, classes, grid)


def row_dtype(view_dtype: np.dtype, fields: list[tuple]) -> np.dtype:
    """The dtype of a row: the frame, with `view_dtype` as its named sub-dtype, then the signal fields, aligned."""
    frame = zip(FRAME, ("<u4", view_dtype, "<u4"), strict=True)
    dtype = np.dtype([*frame, *fields], align=True)
    if dtype.hasobject:
        raise ShardError(f"a row cannot hold Python objects, as {dtype} would; give its fields numeric types")
    return dtype


def dtype_to_json(dtype: np.dtype) -> list:
    """The npy description of a row dtype as nested lists, for a manifest."""
    return json.loads(json.dumps(np.lib.format.dtype_to_descr(dtype)))


def dtype_from_json(description: Any) -> np.dtype:
    """The row dtype that `dtype_to_json` described. Raises ShardError for anything else."""
    try:
        dtype = np.lib.format.descr_to_dtype(_from_lists(description))
    except (KeyError, TypeError, ValueError) as error:
        raise ShardError(
            f"the row dtype in the manifest cannot be read ({error}); delete this cache and run `kd-dist cache-teacher`"
        ) from error
    if dtype.names[:3] != FRAME:
        raise ShardError(
            f"a row of this cache begins with the fields {dtype.names[:3]}, not {FRAME}; "
            "delete it and run `kd-dist cache-teacher`"
        )
    return dtype


def pack_rows(
    dtype: np.dtype, views: np.ndarray, input_crcs: np.ndarray, fields: Mapping[str, np.ndarray]
) -> np.ndarray:
    """The (V,) rows of one example: its views (V,), their input CRCs (V,) uint32 and each signal field (V, ...).

    Fills `row_crc` with the CRC32 of the row's other bytes. Padding is zero, so equal values are equal bytes.
    """
    if fields.keys() != set(dtype.names[3:]):
        raise ValueError(f"the row has the signal fields {dtype.names[3:]}, given were {tuple(fields)}")
    rows = np.zeros(len(views), dtype)
    for name in views.dtype.names:  # one by one: NumPy 2.5 copies the padding of a whole record, 2.4 does not
        rows["view"][name] = views[name]
    rows["input_crc"] = input_crcs
    for name, values in fields.items():
        rows[name] = values
    payload, stride = memoryview(rows.tobytes()), dtype.itemsize
    rows["row_crc"] = [crc32(payload[end - stride + 4 : end]) for end in range(stride, len(payload) + 1, stride)]
    return rows


def to_npy(rows: np.ndarray) -> bytes:
    """The bytes of an npy file, format 1.0, that holds the rows (V,) of `pack_rows`; a copy may lose its padding."""
    return _npy_header(rows.dtype, len(rows)) + rows.tobytes()


def npy_header_size(dtype: np.dtype, views: int) -> int:
    """Bytes before the first row in the npy file of `views` rows."""
    return len(_npy_header(dtype, views))


def from_row_bytes(payload: bytes | memoryview, dtype: np.dtype, where: str) -> np.ndarray:
    """The bytes of k whole rows -> (k,) read without a copy, each checked against its `row_crc`.

    Raises ShardError, which begins with `where`, when the bytes are no whole rows or a row is damaged.
    """
    stride = dtype.itemsize
    if len(payload) == 0 or len(payload) % stride:
        raise ShardError(
            f"{where}: {len(payload)} bytes were read where rows of {stride} bytes belong; "
            "delete the shard and run `kd-dist cache-teacher`"
        )
    whole = memoryview(payload)
    for start in range(0, len(payload), stride):
        stored = int.from_bytes(whole[start : start + 4], "little")
        actual = crc32(whole[start + 4 : start + stride])
        if stored != actual:
            raise ShardError(
                f"{where}: row {start // stride} of those read is damaged, its CRC is {actual:08x} and not the "
                f"stored {stored:08x}; delete the shard and run `kd-dist cache-teacher`"
            )
    return np.frombuffer(payload, dtype)


def are_sound(payload: bytes | memoryview, stride: int) -> bool:
    """Whether the bytes of whole rows, `stride` each, are those that were written."""
    whole = memoryview(payload)
    for start in range(0, len(whole), stride):
        if crc32(whole[start + 4 : start + stride]) != int.from_bytes(whole[start : start + 4], "little"):
            return False
    return True


def _from_lists(description: Any) -> list[tuple]:
    """An npy description with its tuples back, which JSON made into lists; only numbers and padding are let through."""
    fields = []
    for name, kind, *shape in description:
        if isinstance(kind, list):
            kind = _from_lists(kind)
        elif not re.fullmatch(NUMBER, kind):
            raise ValueError(f"field '{name}' is of type '{kind}', which is no number")
        fields.append((name, kind, *map(tuple, shape)))
    return fields


def _npy_header(dtype: np.dtype, views: int) -> bytes:
    """The header of an npy file, format 1.0, for a (views,) array.

    Written here because the length of NumPy's own header has changed between its versions, and readers of rows
    compute offsets from it.
    """
    text = repr({"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (views,)})
    before = len(b"\x93NUMPY\x01\x00") + 2
    padded = text.encode("latin1") + b" " * (-(before + len(text) + 1) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded
