"""signals.py: error bounds, bytes that other tools read, and damage that is never passed over."""

import ast
import io
import json
import zlib

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from kd_dist.errors import RecipeError, ShardError
from kd_dist.signals import (
    LogitsCodec,
    add_sums,
    dtype_from_json,
    dtype_to_json,
    from_row_bytes,
    npy_header_size,
    pack_rows,
    row_dtype,
    to_npy,
)
from kd_dist.signals.codecs import CODECS, LEVELS
from kd_dist.signals.fidelity import PIECE, error_report, measured_error, merge_errors
from kd_dist.views.images import VIEW_DTYPE, ImageViews

DENSE = [(name, 10) for name in CODECS]
MARGIN = [("fp32", 2), ("fp16", 2)]
ALL = DENSE + MARGIN
GRID = (5, 4)


def gaussian(rows: int, classes: int, seed: int = 0, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(rows, classes)) * scale).astype(np.float32)


def views_of(count: int) -> np.ndarray:
    policy = ImageViews((8, 8), (0.3, 1), flip=0.5, brightness=0.4)
    return np.array([policy.draw("a", number, (60, 80)) for number in range(count)], VIEW_DTYPE)


def packed(codec: LogitsCodec, logits: np.ndarray) -> np.ndarray:
    fields, storable = codec.encode(logits)
    assert storable.all()
    dtype = row_dtype(VIEW_DTYPE, codec.fields())
    return pack_rows(dtype, views_of(len(logits)), np.arange(len(logits), dtype=np.uint32) + 1000, fields)


def codec_of(name: str, logits: np.ndarray) -> LogitsCodec:
    return LogitsCodec(name, logits.shape[1], logits.shape[2:] or None)


def there_and_back(name: str, logits: np.ndarray) -> np.ndarray:
    """Logits through rows, npy bytes and row bytes."""
    codec = codec_of(name, logits)
    rows = packed(codec, logits)
    payload = to_npy(rows)[npy_header_size(rows.dtype, len(rows)) :]
    return codec.decode(from_row_bytes(payload, rows.dtype, "here"))


def below_maximum(logits: np.ndarray) -> np.ndarray:
    exact = logits.astype(np.float64)
    return exact - exact.max(axis=1, keepdims=True)


# ---------------------------------------------------------------------------------------------- the codec's bounds


def within_bounds(name: str, logits: np.ndarray) -> None:
    """Assert the bounds that LogitsCodec's docstring states."""
    decoded = there_and_back(name, logits)
    assert decoded.dtype == np.float32 and decoded.shape == logits.shape and decoded.flags.writeable
    if logits.shape[1] == 2:
        exact = logits[:, 1].astype(np.float64) - logits[:, 0]
        error = np.abs(decoded[:, 1] - decoded[:, 0].astype(np.float64) - exact)
        assert not decoded[:, 0].any()
    else:
        exact = below_maximum(logits)
        error = np.abs(decoded - exact)
        assert (decoded.max(axis=1) == 0).all()
    if name in LEVELS:
        steps = LEVELS[name] ** (1 if logits.ndim == 2 else 2)
        scale = codec_of(name, logits).encode(logits)[0]["logits_scale"]
        assert np.allclose(scale, -exact.min(axis=tuple(range(1, exact.ndim))) / steps, rtol=1e-6, atol=1e-37)
        scale = scale.reshape(-1, *[1] * (logits.ndim - 1)).astype(np.float64)
        equal, growing = {"uint8": (0.5001, 1.0003), "uint16": (0.52, 1.02)}[name]
        allowed = equal * scale if logits.ndim == 2 else growing * (np.sqrt(scale * np.abs(exact)) + scale / 4)
        assert (error <= allowed).all()
    else:
        allowed = 2.0**-24 * np.abs(exact) if name == "fp32" else 2.0**-11 * np.abs(exact) + 2.0**-25
        assert (error <= allowed).all()


def rows_of(classes: int, largest: float, grid: tuple[int, ...] = ()) -> st.SearchStrategy[np.ndarray]:
    values = st.floats(-largest, largest, width=32)
    return st.integers(1, 4).flatmap(lambda rows: arrays.arrays(np.float32, (rows, classes, *grid), elements=values))


@given(st.sampled_from(list(CODECS)), st.sampled_from([3, 7]), st.sampled_from([(), (1, 1), (3, 2)]), st.data())
@settings(max_examples=200, deadline=None)
def test_dense_logits_stay_within_the_stated_bounds(name, classes, grid, data):
    within_bounds(name, data.draw(rows_of(classes, 3e4, grid)))


@given(st.sampled_from(["fp32", "fp16"]), st.sampled_from([(), (3, 2)]), st.data())
@settings(max_examples=80, deadline=None)
def test_margins_stay_within_the_stated_bounds(name, grid, data):
    within_bounds(name, data.draw(rows_of(2, 3e4, grid)))


@pytest.mark.parametrize(("name", "classes"), ALL)
def test_extreme_finite_logits_stay_within_the_stated_bounds(name, classes):
    logits = np.zeros((7, classes), np.float32)
    logits[0] = np.linspace(-1e4, 1e4, classes)
    logits[1] = 1e4
    logits[2, 0] = 1e-45  # the smallest float32 above zero
    logits[3] = np.linspace(0, 1e-38, classes)
    logits[4] = -1e4
    logits[5, -1] = 65504
    logits[6] = np.linspace(5, 5.0001, classes)
    within_bounds(name, logits)
    within_bounds(name, np.stack([logits, logits[::-1]], axis=2)[..., None])


def maps(rows: int, classes: int, grid: tuple[int, int], spread: float, seed: int = 0) -> np.ndarray:
    """Logits as a segmentation network gives them: smooth, sure inside the regions, of a range of about `spread`."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(rows, classes, 8, 8, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, grid, mode="bicubic")
    two = fine.topk(2, dim=1)
    fine = fine.scatter_add(1, two.indices[:, :1], 2 * (two.values[:, :1] - two.values[:, 1:]))
    return (fine * (spread / (fine.amax(1) - fine.amin(1)).amax())).numpy()


@pytest.mark.parametrize("spread", [8, 40, 400])
def test_uint8_maps_keep_the_distribution_of_every_place_in_one_byte_a_class(spread):
    logits = maps(3, 21, (65, 65), spread)
    codec = LogitsCodec("uint8", 21, (65, 65))
    assert row_dtype(VIEW_DTYPE, codec.fields()).itemsize == 36 + 21 * 65 * 65 + 3 <= 92_000
    report = error_report(measured_error(logits, there_and_back("uint8", logits)))
    assert report["count"] == 3 * 65 * 65
    assert report["top_class_agreement"] >= 0.999 and report["mean_kl_t1"] <= 1e-4 and report["mean_kl_t4"] <= 1e-4


def test_a_map_has_one_scale_a_row_and_a_distance_of_q_squared():
    logits = np.zeros((2, 3, 1, 2), np.float32)
    logits[0, :, 0, 0] = (0, -255 * 255 * 2, -2 * 9.0)  # the scale is 2
    logits[0, :, 0, 1] = (7, 7 - 2 * 100.0**2, 7 - 2 * 100.4**2)
    logits[1, :, 0, 1] = (-65025, 0, -4)
    fields, _ = LogitsCodec("uint8", 3, (1, 2)).encode(logits)
    assert fields["logits_scale"].tolist() == [2, 1] and fields["logits_scale"].dtype == np.dtype("<f4")
    assert fields["logits"][0, :, 0].T.tolist() == [[0, 255, 3], [0, 100, 100]]
    assert fields["logits"][1, :, 0].T.tolist() == [[0, 0, 0], [255, 0, 2]]


@pytest.mark.parametrize("name", ["fp32", "uint16", "uint8"])
def test_differences_as_large_as_float32_are_stored(name):
    logits = np.array([[0, -3e38, -1e38], [1e38, -2e38, 0]], np.float32)
    within_bounds(name, logits)
    within_bounds(name, logits.reshape(2, 3, 1, 1))


@pytest.mark.parametrize(("name", "classes"), ALL)
def test_equal_logits_decode_to_zeros(name, classes):
    assert not there_and_back(name, np.full((3, classes), 7.25, np.float32)).any()
    assert not there_and_back(name, np.full((3, classes, *GRID), 7.25, np.float32)).any()


@pytest.mark.parametrize(("name", "classes"), ALL)
def test_an_additive_constant_does_not_change_what_is_stored(name, classes):
    logits = np.round(gaussian(20, classes) * 64) / 64  # multiples of 1/64, so that adding 512 is exact
    assert np.array_equal(there_and_back(name, logits), there_and_back(name, logits + np.float32(512)))
    places = np.stack([logits, logits[::-1]], axis=2)[..., None]  # each place may have a constant of its own
    other = places + np.array([[512], [-512]], np.float32)
    assert np.array_equal(there_and_back(name, places), there_and_back(name, other))


@pytest.mark.parametrize(("name", "classes"), ALL)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_reported_and_its_neighbours_are_kept(name, classes, value):
    logits = gaussian(5, classes)
    logits[1, 0] = value
    logits[3] = value
    before = logits.copy()
    codec = LogitsCodec(name, classes)
    fields, storable = codec.encode(logits)
    assert storable.dtype == bool and storable.tolist() == [True, False, True, False, True]
    assert np.array_equal(logits, before, equal_nan=True)
    clean, _ = codec.encode(gaussian(5, classes))
    for field, values in fields.items():
        assert np.isfinite(values).all()
        assert np.array_equal(values[storable], clean[field][storable])
    assert not any(values[~storable].any() for field, values in fields.items() if field != "logits_scale")


@pytest.mark.parametrize(("name", "classes"), ALL)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_map_with_one_place_that_is_not_finite_is_reported_whole(name, classes, value):
    logits = gaussian(3, classes * 20).reshape(3, classes, *GRID)
    logits[1, 1, 2, 3] = value
    codec = LogitsCodec(name, classes, GRID)
    fields, storable = codec.encode(logits)
    assert storable.shape == (3,) and storable.tolist() == [True, False, True]
    clean, _ = codec.encode(gaussian(3, classes * 20).reshape(3, classes, *GRID))
    for field, values in fields.items():
        assert np.isfinite(values).all() and np.array_equal(values[::2], clean[field][::2])
        assert field == "logits_scale" or not values[1].any()


@pytest.mark.parametrize(
    ("name", "classes", "spread", "fits"),
    [
        ("fp16", 3, 65504, True),
        ("fp16", 3, 65536, False),
        ("fp16", 2, 65504, True),
        ("fp16", 2, -65504, True),
        ("fp16", 2, 65536, False),
        ("fp16", 2, -65536, False),
        ("fp32", 3, 65536, True),
        ("uint8", 3, 65536, True),
    ],
)
def test_a_difference_too_large_for_fp16_is_reported(name, classes, spread, fits):
    logits = np.zeros((2, classes), np.float32)
    logits[1, 1] = spread
    assert LogitsCodec(name, classes).encode(logits)[1].tolist() == [True, fits]


@pytest.mark.parametrize(("name", "classes"), ALL)
def test_a_difference_too_large_for_float32_is_reported(name, classes):
    logits = np.zeros((2, classes), np.float32)
    logits[1, :2] = (3e38, -3e38)
    assert LogitsCodec(name, classes).encode(logits)[1].tolist() == [True, False]


@pytest.mark.parametrize(("name", "classes"), ALL)
def test_no_rows_encode_and_decode_to_no_rows(name, classes):
    codec = LogitsCodec(name, classes)
    fields, storable = codec.encode(np.zeros((0, classes), np.float32))
    assert storable.shape == (0,)
    rows = pack_rows(row_dtype(VIEW_DTYPE, codec.fields()), views_of(0), np.zeros(0, np.uint32), fields)
    assert codec.decode(rows).shape == (0, classes)
    codec = LogitsCodec(name, classes, GRID)
    fields, storable = codec.encode(np.zeros((0, classes, *GRID), np.float32))
    rows = pack_rows(row_dtype(VIEW_DTYPE, codec.fields()), views_of(0), np.zeros(0, np.uint32), fields)
    assert storable.shape == (0,) and codec.decode(rows).shape == (0, classes, *GRID)


def kd_gradient(student: np.ndarray, teacher: np.ndarray, temperature: float) -> np.ndarray:
    leaf = torch.tensor(student, dtype=torch.float64, requires_grad=True)
    target = torch.softmax(torch.tensor(teacher, dtype=torch.float64) / temperature, dim=1)
    torch.nn.functional.cross_entropy(leaf / temperature, target, reduction="sum").backward()
    return leaf.grad.numpy()


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize(
    ("name", "least"), [("uint8", 0.999), ("uint16", 0.999999), ("fp16", 0.9999), ("fp32", 0.999999)]
)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_gradient_of_kd_keeps_its_direction(name, least, classes, temperature):
    teacher, student = gaussian(64, classes, 1), gaussian(64, classes, 2)
    exact = kd_gradient(student, teacher, temperature)
    stored = kd_gradient(student, there_and_back(name, teacher), temperature)
    cosine = (exact * stored).sum(axis=1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(stored, axis=1)
    assert cosine.min() > least


@pytest.mark.parametrize(
    ("name", "classes", "named"),
    [
        ("fp61", 10, r"unknown logits codec 'fp61'; did you mean 'fp16'\?"),
        ("uint8", 2, r"two classes store one margin, which uint8 cannot hold; use fp16 or fp32"),
        ("uint16", 2, r"two classes store one margin, which uint16 cannot hold; use fp16 or fp32"),
        ("fp16", 1, r"a teacher of 1 classes has no logits to distil; it needs at least 2"),
    ],
)
def test_an_impossible_codec_is_refused(name, classes, named):
    with pytest.raises(RecipeError, match=named):
        LogitsCodec(name, classes)


# ---------------------------------------------------------------------------------------------- rows


def test_the_layout_of_a_row_is_golden():
    dtype = row_dtype(VIEW_DTYPE, LogitsCodec("uint8", 10).fields())
    offsets = {name: offset for name, (_, offset) in dtype.fields.items()}
    assert offsets == {"row_crc": 0, "view": 4, "input_crc": 28, "logits_scale": 32, "logits": 36}
    assert dtype.itemsize == 48 and dtype["view"] == VIEW_DTYPE and dtype.isalignedstruct


def test_the_row_of_a_binary_head_is_36_bytes():
    assert row_dtype(VIEW_DTYPE, LogitsCodec("fp16", 2).fields()).itemsize == 36


@pytest.mark.parametrize(
    ("name", "classes", "fields"),
    [
        ("uint8", 21, [("logits_scale", "<f4"), ("logits", "u1", (21, 5, 4))]),
        ("uint16", 21, [("logits_scale", "<f4"), ("logits", "<u2", (21, 5, 4))]),
        ("fp16", 21, [("logits", "<f2", (21, 5, 4))]),
        ("fp16", 2, [("margin", "<f2", (5, 4))]),
        ("fp32", 2, [("margin", "<f4", (5, 4))]),
    ],
)
def test_the_fields_of_maps(name, classes, fields):
    codec = LogitsCodec(name, classes, GRID)
    assert codec.fields() == fields
    encoded, _ = codec.encode(gaussian(3, classes * 20).reshape(3, classes, *GRID))
    assert {one: (values.dtype, values.shape) for one, values in encoded.items()} == {
        one: (np.dtype(kind), (3, *(shape[0] if shape else ()))) for one, kind, *shape in fields
    }


def test_the_bytes_of_a_member_are_golden():
    views = np.zeros(2, VIEW_DTYPE)
    views["height"], views["width"], views["brightness"] = 7, 9, 1
    codec = LogitsCodec("fp16", 2)
    fields, _ = codec.encode(np.array([[0, 1.5], [2, -1]], np.float32))
    rows = pack_rows(row_dtype(VIEW_DTYPE, codec.fields()), views, np.array([1, 2**32 - 1], np.uint32), fields)
    payload = to_npy(rows)
    assert payload[:10] == b"\x93NUMPY\x01\x00\x36\x01" and len(payload) == 320 + 72
    assert ast.literal_eval(payload[10:320].decode()) == {
        "descr": [
            ("row_crc", "<u4"),
            (
                "view",
                [(name, "<f4") for name in ("brightness", "contrast", "saturation")]
                + [(name, "<u2") for name in ("top", "left", "height", "width")]
                + [("flip", "|u1"), ("", "|V3")],
            ),
            ("input_crc", "<u4"),
            ("margin", "<f2"),
            ("", "|V2"),
        ],
        "fortran_order": False,
        "shape": (2,),
    }
    first = "0000803f0000000000000000000000000700090000000000" + "01000000" + "003e" + "0000"
    second = "0000803f0000000000000000000000000700090000000000" + "ffffffff" + "00c2" + "0000"
    for row, expected in ((0, first), (1, second)):
        body = bytes.fromhex(expected)
        start = 320 + 36 * row
        assert payload[start : start + 36] == zlib.crc32(body).to_bytes(4, "little") + body


@pytest.mark.parametrize(("name", "classes"), [*ALL, ("uint8", 3), ("fp16", 3), ("uint8", 1000)])
@pytest.mark.parametrize("count", [0, 1, 8, 1000])
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves the tar to the collector
def test_numpy_and_webdataset_read_a_member(name, classes, count, tmp_path):
    rows = packed(LogitsCodec(name, classes), gaussian(count, classes))
    payload = to_npy(rows)
    assert len(payload) == npy_header_size(rows.dtype, count) + rows.nbytes
    assert npy_header_size(rows.dtype, count) % 64 == 0
    loaded = np.load(io.BytesIO(payload), allow_pickle=False)
    assert loaded.dtype == rows.dtype and np.array_equal(loaded, rows)
    with open(tmp_path / "s.tar", "wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0) as tar:
        tar.write({"__key__": "a", "net.npy": payload})
    (sample,) = webdataset.WebDataset(str(tmp_path / "s.tar"), shardshuffle=False).decode()
    assert sample["net.npy"].dtype == rows.dtype and np.array_equal(sample["net.npy"], rows)


def test_a_row_keeps_its_view_and_input_crc():
    rows = packed(LogitsCodec("fp16", 10), gaussian(4, 10))
    assert np.array_equal(rows["view"], views_of(4))
    assert rows["input_crc"].tolist() == [1000, 1001, 1002, 1003]


def test_padding_is_zero_whatever_the_views_bring():
    codec = LogitsCodec("fp16", 2)
    fields, _ = codec.encode(gaussian(3, 2))
    memory = bytearray(b"\xaa" * 72)
    views = np.frombuffer(memory, VIEW_DTYPE)
    for name in VIEW_DTYPE.names:
        views[name] = views_of(3)[name]
    assert [memory[at : at + 3] for at in (21, 45, 69)] == [b"\xaa" * 3] * 3
    payload = pack_rows(row_dtype(VIEW_DTYPE, codec.fields()), views, np.zeros(3, np.uint32), fields).tobytes()
    for start in (0, 36, 72):
        assert payload[start + 25 : start + 28] == b"\0\0\0"  # after the view
        assert payload[start + 34 : start + 36] == b"\0\0"  # after the margin


def test_fields_that_do_not_belong_to_the_row_are_refused():
    dtype = row_dtype(VIEW_DTYPE, LogitsCodec("fp16", 10).fields())
    fields, _ = LogitsCodec("uint8", 10).encode(gaussian(2, 10))
    with pytest.raises(ValueError, match=r"fields \('logits',\), given were \('logits_scale', 'logits'\)"):
        pack_rows(dtype, views_of(2), np.zeros(2, np.uint32), fields)
    with pytest.raises(ValueError, match=r"given were \(\)"):
        pack_rows(dtype, views_of(2), np.zeros(2, np.uint32), {})


def test_one_view_is_one_slice_of_the_member_read_without_a_copy():
    codec = LogitsCodec("uint8", 10)
    rows = packed(codec, gaussian(8, 10))
    payload, header, stride = to_npy(rows), npy_header_size(rows.dtype, 8), rows.dtype.itemsize
    for number in range(8):
        one = from_row_bytes(payload[header + number * stride :][:stride], rows.dtype, "here")
        assert one.shape == (1,) and one.tobytes() == rows[number : number + 1].tobytes()
    whole = memoryview(payload)[header:]
    assert np.shares_memory(from_row_bytes(whole, rows.dtype, "here"), np.frombuffer(payload, np.uint8))


def test_every_flipped_bit_of_a_row_is_noticed():
    rows = packed(LogitsCodec("fp16", 2), gaussian(2, 2))
    payload = bytearray(rows.tobytes())
    noticed = 0
    for bit in range(8 * len(payload)):
        payload[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ShardError, match=rf"^s-000.tar: 'a' view 3: row {bit // 288} of those read is damaged"):
            from_row_bytes(bytes(payload), rows.dtype, "s-000.tar: 'a' view 3")
        payload[bit // 8] ^= 1 << bit % 8
        noticed += 1
    assert noticed == 576
    assert np.array_equal(from_row_bytes(bytes(payload), rows.dtype, "here"), rows)


@pytest.mark.parametrize("length", [0, 1, 35, 37, 71])
def test_bytes_that_are_no_whole_rows_are_refused(length):
    rows = packed(LogitsCodec("fp16", 2), gaussian(2, 2))
    named = f"^s.tar: {length} bytes were read where rows of 36 bytes belong; delete the shard and run `kd-dist cache-t"
    with pytest.raises(ShardError, match=named):
        from_row_bytes(rows.tobytes()[:length], rows.dtype, "s.tar")


# ---------------------------------------------------------------------------------------------- the dtype in a manifest


@pytest.mark.parametrize(("name", "classes"), ALL)
def test_a_row_dtype_survives_json(name, classes):
    dtype = row_dtype(VIEW_DTYPE, LogitsCodec(name, classes).fields())
    described = dtype_to_json(dtype)
    read = json.loads(json.dumps(described))
    assert read == described
    assert dtype_from_json(read) == dtype
    rows = packed(LogitsCodec(name, classes), gaussian(3, classes))
    back = from_row_bytes(rows.tobytes(), dtype_from_json(read), "here")
    assert np.array_equal(back, rows) and back["view"][2].item() == views_of(3)[2].item()


FRAME = [["row_crc", "<u4"], ["view", [["top", "<u2"]]], ["input_crc", "<u4"]]


@pytest.mark.parametrize(
    ("description", "named"),
    [
        ([*FRAME, ["logits", "|O"]], r"cannot be read \(field 'logits' is of type '\|O', which is no number\)"),
        ([["row_crc", "<u4"], ["view", [["top", "|O"]]], ["input_crc", "<u4"]], "field 'top' is of type"),
        ([*FRAME, ["logits", "(2,"]], "which is no number"),
        ([*FRAME, ["logits", "<f3"]], "cannot be read"),
        ([*FRAME, ["logits", "<f4", [-1]]], "cannot be read"),
        ([*FRAME, ["logits", "<f4", 3]], "cannot be read"),
        ([*FRAME, ["logits", "<f4", [2**70]]], "cannot be read"),
        ([*FRAME, ["logits", None]], "cannot be read"),
        ([*FRAME, ["row_crc", "<u4"]], "cannot be read"),
        ([*FRAME, ["logits"]], "cannot be read"),
        ([*FRAME, 5], "cannot be read"),
        ("<f4", "cannot be read"),
        (None, r"cannot be read .* delete this cache and run `kd-dist cache-teacher`"),
        ([], r"begins with the fields \(\), not \('row_crc', 'view', 'input_crc'\)"),
        (FRAME[1:], r"begins with the fields \('view', 'input_crc'\)"),
    ],
)
def test_a_foreign_description_is_refused(description, named):
    with pytest.raises(ShardError, match=named):
        dtype_from_json(description)


def test_a_row_of_python_objects_is_refused():
    with pytest.raises(ShardError, match="a row cannot hold Python objects"):
        row_dtype(VIEW_DTYPE, [("logits", "O")])


# ---------------------------------------------------------------------------------------------- measured errors


def flat(sums: dict) -> dict:
    return {(name, place): one for name, value in sums.items() for place, one in enumerate(np.ravel(value))}


def torch_kl(exact: np.ndarray, stored: np.ndarray, temperature: float) -> float:
    p, q = (torch.log_softmax(torch.tensor(z, dtype=torch.float64) / temperature, dim=1) for z in (exact, stored))
    return float(torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True))


@pytest.mark.parametrize("grid", [(), GRID])
@pytest.mark.parametrize(("name", "classes"), ALL)
def test_measured_error_is_what_torch_measures(name, classes, grid):
    logits = gaussian(50, classes * (20 if grid else 1)).reshape(50, classes, *grid) + 20
    decoded = there_and_back(name, logits)
    error = measured_error(logits, decoded)
    assert error["count"] == 50 * (20 if grid else 1)
    assert error["max_abs"] == pytest.approx(np.abs(below_maximum(logits) - below_maximum(decoded)).max(), abs=1e-15)
    assert error["agreement"] == (logits.argmax(1) == decoded.argmax(1)).sum()
    # Of a fp32 row it is the rounding of the sums that is measured.
    assert error["kl_t1"] == pytest.approx(torch_kl(logits, decoded, 1), rel=1e-6, abs=1e-12)
    assert error["kl_t4"] == pytest.approx(torch_kl(logits, decoded, 4), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("grid", [(), GRID])
@pytest.mark.parametrize(("name", "classes"), ALL)
def test_the_gradient_error_is_that_of_kd_for_a_student_that_says_nothing(name, classes, grid):
    logits = gaussian(50, classes * (20 if grid else 1)).reshape(50, classes, *grid)
    decoded = there_and_back(name, logits)
    report = error_report(measured_error(logits, decoded))["gradient_error"]
    rows, kept = (np.moveaxis(one.reshape(50, classes, -1), 1, 2).reshape(-1, classes) for one in (logits, decoded))
    assert list(report) == ["1", "2", "4", "8"]
    for temperature, error in report.items():
        exact, ours = (kd_gradient(np.zeros_like(rows), one, float(temperature)) for one in (rows, kept))
        assert error == pytest.approx(np.linalg.norm(ours - exact) / np.linalg.norm(exact), rel=1e-5, abs=1e-9)
        assert (
            error
            < {"fp32": 1e-6, "fp16": 2e-3, "uint16": 1e-3 if grid else 1e-4, "uint8": 0.03 if grid else 0.02}[name]
        )


def test_measured_error_of_a_known_pair():
    error = measured_error(np.log(np.array([[1, 1], [1, 3]], np.float64)), np.zeros((2, 2), np.float32))
    assert error["max_abs"] == pytest.approx(np.log(3)) and (error["count"], error["agreement"]) == (2, 1)
    assert error["kl_t1"] == pytest.approx(0.25 * np.log(0.5) + 0.75 * np.log(1.5))


def test_maps_that_are_measured_in_pieces_lose_no_row():
    logits = maps(20, 5, (30, 30), 20)
    assert logits.size > 2 * PIECE and 2 * logits[0].size < PIECE and PIECE % logits[0].size
    decoded = there_and_back("uint8", logits)
    rows = merge_errors(measured_error(one[None], other[None]) for one, other in zip(logits, decoded, strict=True))
    assert flat(measured_error(logits, decoded)) == pytest.approx(flat(rows), rel=1e-9)
    assert rows["count"] == 20 * 30 * 30


def test_measured_errors_add_up_over_shards():
    logits = gaussian(90, 10)
    decoded = there_and_back("uint8", logits)
    whole = measured_error(logits, decoded)
    parts = [measured_error(logits[a:b], decoded[a:b]) for a, b in ((0, 7), (7, 7), (7, 60), (60, 90))]
    merged = merge_errors(json.loads(json.dumps(part)) for part in parts)
    assert flat(merged) == pytest.approx(flat(whole), rel=1e-9)
    report = error_report(merged)
    assert min(report.pop("gradient_error").values()) > 0
    assert report == pytest.approx(
        {
            "count": 90,
            "max_abs": whole["max_abs"],
            "top_class_agreement": whole["agreement"] / 90,
            "mean_kl_t1": whole["kl_t1"] / 90,
            "mean_kl_t4": whole["kl_t4"] / 90,
        }
    )
    assert 0 < error_report(merged)["mean_kl_t1"] < 1e-3


def test_the_report_of_nothing_is_zeros():
    nothing = {"count": 0, "max_abs": 0.0, "top_class_agreement": 0.0, "mean_kl_t1": 0.0, "mean_kl_t4": 0.0}
    assert error_report(merge_errors([])) == {**nothing, "gradient_error": dict.fromkeys("1248", 0.0)}


def test_sums_of_a_version_that_measured_less_can_still_be_added():
    older, newer = {"count": 2, "max_abs": 3.0}, {"count": 3, "max_abs": 1.0, "gap": [1.0]}
    assert add_sums(older, newer) == add_sums(newer, older) == {"count": 5, "max_abs": 3.0}
    old = {"count": 1, "max_abs": 0.0, "agreement": 1, "kl_t1": 0.0, "kl_t4": 0.0}
    assert "gradient_error" not in error_report(old)
