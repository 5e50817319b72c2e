"""What a teacher said, as structured rows and back: one row a view, checked by its own CRC, never pickled.

A row is `row_crc`, `view`, `input_crc`, then the fields of the codecs. Every field has a fixed size, so one view of
one example is one read at a known offset.
"""

import json
import re
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from kd_dist.choose import entry
from kd_dist.errors import RecipeError, ShardError

CODECS = {"fp32": "<f4", "fp16": "<f2", "uint8": "u1"}  # codec of the logits -> what one number is stored as
FRAME = ("row_crc", "view", "input_crc")  # the fields that every row begins with
NUMBER = r"[<|][biufV]\d+"  # an npy type string: bool, int, uint, float, or V for bytes of padding
TINY = np.finfo(np.float32).tiny
LARGEST = ("max_abs", "largest_error")  # entries of sums that are no sums
PIECE = 2**18  # logits whose error is measured at a time


@dataclass(frozen=True)
class LogitsCodec:
    """How C logits are stored, those of an image or, with a grid, of every place. A constant over the classes of one
    place is never kept: no loss depends on it.

    Two classes store one `margin` z1 - z0 a place, as fp32 or fp16. More store `logits`: z - max(z) of each place, as
    fp32, fp16 or uint8. Then `logits_scale` s is one number a row, and the stored q in 0..255 stands for
    -s q without a grid: 255 equal steps span the row;
    -s q^2 with one: a map has one s for all its places, and equal steps of a confident map are too coarse where the
    probability is. These begin at 1/255 of an equal step and end at 2 of them.

    Bounds on the error of d = z - max(z), or of the margin, each tested: fp32 2**-24 |d|; fp16 2**-11 |d| + 2**-25 (the
    second term is for |d| < 2**-14); uint8 0.5001 s, with a grid 1.0003 (sqrt(s |d|) + s/4).

    Raises RecipeError for an unknown codec, fewer than two classes, or uint8 for two.
    """

    name: str  # one of CODECS
    classes: int
    grid: tuple[int, int] | None = None  # (h, w) of a segmentation teacher's logits; None: one row of logits an image

    drift: ClassVar[str] = "mean_kl_t1"  # the entry of a report that says how far two teachers are apart

    def __post_init__(self) -> None:
        entry(CODECS, "logits codec", self.name)
        if self.classes < 2:
            raise RecipeError(f"a teacher of {self.classes} classes has no logits to distil; it needs at least 2")
        if self.classes == 2 and self.name == "uint8":
            raise RecipeError("two classes store one margin, which uint8 cannot hold; use fp16 or fp32")

    def fields(self) -> list[tuple]:
        """The fields that this codec adds to a row, as NumPy describes them."""
        stored, grid = CODECS[self.name], self.grid or ()
        if self.classes == 2:
            return [("margin", stored, grid)] if grid else [("margin", stored)]
        scale = [("logits_scale", "<f4")] if self.name == "uint8" else []
        return [*scale, ("logits", stored, (self.classes, *grid))]

    def encode(self, logits: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Logits (B, C, *grid) float32 -> the fields, each (B, ...), and a mask (B,) bool of the rows that could be
        stored.

        A row with a NaN, an infinity or a difference too large for the codec is False in the mask and holds zeros:
        the caller quarantines its example.
        """
        stored = CODECS[self.name]
        largest = np.finfo(np.float16 if self.name == "fp16" else np.float32).max
        with np.errstate(over="ignore", invalid="ignore"):  # such rows are what the mask is for
            below = logits - logits.max(axis=1, keepdims=True)
        places = tuple(range(1, below.ndim))
        storable = (below >= -np.float32(largest)).all(axis=places)  # a NaN compares False
        below[~storable] = 0
        if self.classes == 2:
            return {"margin": (below[:, 1] - below[:, 0]).astype(stored)}, storable
        if self.name == "uint8":
            scale = np.maximum(
                below.min(axis=places) / (-(255**2) if self.grid else -255), TINY
            )  # never 0: all logits may be equal
            steps = below / -_per_row(scale, below)
            if self.grid:
                steps = np.sqrt(steps)
            return {"logits_scale": scale, "logits": np.rint(steps).astype(stored)}, storable
        return {"logits": below.astype(stored)}, storable

    def decode(self, rows: np.ndarray) -> np.ndarray:
        """Structured rows (B,) -> logits (B, C, *grid) float32: [0, margin] for two classes, otherwise z - max(z)."""
        if self.classes == 2:
            margin = rows["margin"].astype(np.float32)
            return np.stack([np.zeros_like(margin), margin], axis=1)
        logits = rows["logits"].astype(np.float32)
        if self.name == "uint8":
            if self.grid:
                np.square(logits, out=logits)
            logits *= -_per_row(rows["logits_scale"], logits)
        return logits


    def error(self, exact: np.ndarray, decoded: np.ndarray) -> dict[str, float]:
        """What storing finite logits did to them; see `measured_error`."""
        return measured_error(exact, decoded)

    def report(self, sums: Mapping[str, float] | None) -> dict[str, float]:
        """Errors that were added up, None for none, as a manifest states them; see `error_report`."""
        return error_report(sums or merge_errors([]))

    def words(self, report: Mapping[str, float]) -> str:
        """A report in words."""
        return (
            f"{self.name} logits: largest error {report['max_abs']:.1e}, mean KL {report['mean_kl_t1']:.1e} nat, top "
            f"class equal in {report['top_class_agreement']:.2%}"
        )


@dataclass(frozen=True)
class OutputsCodec:
    """How the D real numbers that a regression teacher says are stored: as they are, fp32 exactly, or as fp16.

    Bound on the error of a number x, fp16: 2**-11 |x| + 2**-25. It has the methods of LogitsCodec.
    Raises RecipeError for another codec.
    """

    name: str  # fp32 or fp16
    classes: int  # D
    grid: None = None

    drift: ClassVar[str] = "mean_square"

    def __post_init__(self) -> None:
        if self.name not in ("fp32", "fp16"):
            raise RecipeError(f"the outputs of a regression are stored as fp32 or fp16, not {self.name}")

    def fields(self) -> list[tuple]:
        """The field that this codec adds to a row, as NumPy describes it."""
        return [("outputs", CODECS[self.name], (self.classes,))]

    def encode(self, outputs: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Outputs (B, D) float32 -> the field, (B, D), and a mask (B,) bool of the rows that could be stored; another
        row holds zeros."""
        largest = np.finfo(CODECS[self.name]).max
        storable = (np.abs(outputs) <= largest).all(axis=1)  # a NaN compares False
        return {"outputs": np.where(storable[:, None], outputs, 0).astype(CODECS[self.name])}, storable

    def decode(self, rows: np.ndarray) -> np.ndarray:
        """Structured rows (B,) -> outputs (B, D) float32."""
        return rows["outputs"].astype(np.float32)

    def error(self, exact: np.ndarray, decoded: np.ndarray) -> dict[str, float]:
        """What storing finite outputs (B, D) did to them: `count` rows, `max_abs` difference, and the sum over rows of
        the mean squared difference."""
        gap = exact.astype(np.float64) - decoded
        squares = float((gap**2).mean(axis=1).sum()) if len(gap) else 0.0
        return {"count": len(gap), "max_abs": float(np.abs(gap).max(initial=0)), "squares": squares}

    def report(self, sums: Mapping[str, float] | None) -> dict[str, float]:
        """Errors that were added up, None for none: `count`, `max_abs` and `mean_square`."""
        sums = sums or {"count": 0, "max_abs": 0.0, "squares": 0.0}
        kept = {name: sums[name] for name in ("count", "max_abs")}
        return {**kept, "mean_square": sums["squares"] / max(sums["count"], 1)}

    def words(self, report: Mapping[str, float]) -> str:
        """A report in words."""
        return f"{self.name} outputs: largest error {report['max_abs']:.1e}"


Codec = LogitsCodec | OutputsCodec


def codec_of(task: str, name: str, classes: int, grid: tuple[int, int] | None) -> Codec:
    """How what a teacher of this task says is stored."""
    return OutputsCodec(name, classes) if task == "regression" else LogitsCodec(name, classes, grid)


def add_sums(one: Any, other: Any) -> Any:
    """Two nested structures of numbers added entry by entry, but of LARGEST the larger kept; None counts as zero."""
    if one is None or other is None:
        return other if one is None else one
    if isinstance(one, dict):
        return {
            name: max(value, other[name]) if name in LARGEST else add_sums(value, other[name])
            for name, value in one.items()
        }
    if isinstance(one, list):
        return [add_sums(left, right) for left, right in zip(one, other, strict=True)]
    return one + other


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
    rows["row_crc"] = [zlib.crc32(payload[end - stride + 4 : end]) for end in range(stride, len(payload) + 1, stride)]
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
        actual = zlib.crc32(whole[start + 4 : start + stride])
        if stored != actual:
            raise ShardError(
                f"{where}: row {start // stride} of those read is damaged, its CRC is {actual:08x} and not the "
                f"stored {stored:08x}; delete the shard and run `kd-dist cache-teacher`"
            )
    return np.frombuffer(payload, dtype)


def is_sound(row: bytes) -> bool:
    """Whether the bytes of one row are those that were written."""
    return zlib.crc32(memoryview(row)[4:]) == int.from_bytes(row[:4], "little")


def measured_error(logits: np.ndarray, decoded: np.ndarray) -> dict[str, float]:
    """What a codec did to finite logits (B, C, *grid): figures that `merge_errors` can add up over batches and shards.

    Every place of the grid counts as a row: `count` rows, `max_abs` difference of z - max(z), `agreement`, the rows
    whose top class is the same, and the sums over rows of KL(exact || decoded) in nats at temperatures 1 and 4.
    """
    found = merge_errors([])
    # In pieces, whose float64 copies stay in the processor's cache: seven times as fast for maps.
    step = max(1, PIECE * len(logits) // max(logits.size, 1))
    for start in range(0, len(logits), step):
        exact, stored = (_below_maximum(one[start : start + step]) for one in (logits, decoded))
        top = exact.argmax(axis=1)
        one = {
            "count": top.size,
            "max_abs": float(np.abs(exact - stored).max(initial=0)),
            "agreement": int((top == stored.argmax(axis=1)).sum()),
            "kl_t1": _kl_sum(exact, stored),
            "kl_t4": _kl_sum(exact / 4, stored / 4),
        }
        found = merge_errors([found, one])
    return found


def merge_errors(errors: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The figures of several `measured_error` as those of one; of none, zeros."""
    merged = {"count": 0, "max_abs": 0.0, "agreement": 0, "kl_t1": 0.0, "kl_t4": 0.0}
    for one in errors:
        merged = {name: max(merged[name], one[name]) if name == "max_abs" else merged[name] + one[name] for name in one}
    return merged


def error_report(merged: Mapping[str, float]) -> dict[str, float]:
    """For a manifest: `count`, `max_abs`, `top_class_agreement`, the share of rows whose top class is the same, and
    the mean KL a row in nats, `mean_kl_t1` and `mean_kl_t4`."""
    rows = max(merged["count"], 1)
    means = {f"mean_{name}": merged[name] / rows for name in ("kl_t1", "kl_t4")}
    kept = {name: merged[name] for name in ("count", "max_abs")}
    return {**kept, "top_class_agreement": merged["agreement"] / rows, **means}


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


def _per_row(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Values (B,) in a shape (B, 1, ...) that broadcasts over `like` (B, ...)."""
    return values[(..., *[None] * (like.ndim - 1))]


def _below_maximum(logits: np.ndarray) -> np.ndarray:
    """z - max(z) of each place, in float64."""
    exact = logits.astype(np.float64)
    exact -= exact.max(axis=1, keepdims=True)
    return exact


def _kl_sum(exact: np.ndarray, stored: np.ndarray) -> float:
    """The sum over places of KL between the softmax of `exact` and of `stored`, both with a maximum of 0."""
    weights = np.exp(exact)  # p times its sum: KL = sum(weights * (exact - stored)) / sum(weights) - log of the sums
    total, other = weights.sum(axis=1), np.exp(stored).sum(axis=1)
    weights *= exact - stored
    return float((weights.sum(axis=1) / total - np.log(total / other)).sum())
