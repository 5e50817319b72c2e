"""signals/topk.py: what top-K rows keep, how well they know the mass of the rest, and bytes for another reader."""

import math
import struct

import numpy as np
import pytest
import torch

from kd_dist.batch import TopLogits, each_tensor
from kd_dist.errors import RecipeError
from kd_dist.extract import Extraction, Rows, Said, note
from kd_dist.signals import codec_of, from_row_bytes, npy_header_size, pack_rows, row_dtype, to_npy
from kd_dist.signals.codecs import LogitsCodec, OutputsCodec
from kd_dist.signals.fidelity import add_sums
from kd_dist.signals.topk import NODES, TopCodec, is_top, spread_out, tail_at, tail_lse, tail_weights
from kd_dist.tasks.classification import Classification
from kd_dist.views.images import VIEW_DTYPE, ImageViews

KINDS = ("gaussian", "saturated", "clusters", "two far clusters", "Laplace", "Student t, 3", "Student t, 2")
TEMPERATURES = np.geomspace(1, 8, 30)


def drawn(kind: str, rows: int, classes: int, seed: int = 0) -> np.ndarray:
    """Logits (rows, C) float32 of a distribution."""
    rng = np.random.default_rng(seed)
    if kind == "clusters":  # eight of them, anywhere
        centres, which = rng.uniform(-15, 5, (rows, 8)), rng.integers(0, 8, (rows, classes))
        z = np.take_along_axis(centres, which, axis=1) + 0.3 * rng.normal(size=(rows, classes))
    elif kind == "two far clusters":  # most classes out of the question, of the others more than are kept
        z = 0.5 * rng.normal(size=(rows, classes)) - 25
        likely = max(60, classes // 100)
        z[:, :likely] = rng.normal(size=(rows, likely))
    elif kind == "Laplace":
        z = 2 * rng.laplace(size=(rows, classes))
    elif kind.startswith("Student"):
        z = 1.5 * rng.standard_t(int(kind[-1]), size=(rows, classes))
    else:
        z = rng.normal(size=(rows, classes)) * rng.uniform(1, 4, (rows, 1))
        z[:, 0] += 40 * (kind == "saturated")
    return z.astype(np.float32)


def rows_of(codec: TopCodec, logits: np.ndarray, targets: np.ndarray | None = None) -> np.ndarray:
    """Through rows, npy bytes and row bytes."""
    fields, storable = codec.encode(logits, targets)
    assert storable.all()
    views = np.array([ImageViews((8, 8)).canonical((8, 8))] * len(logits), VIEW_DTYPE)
    rows = pack_rows(row_dtype(VIEW_DTYPE, codec.fields()), views, np.zeros(len(logits), np.uint32), fields)
    return from_row_bytes(to_npy(rows)[npy_header_size(rows.dtype, len(rows)) :], rows.dtype, "here")


def stored(name: str, logits: np.ndarray, targets: np.ndarray | None = None) -> TopLogits:
    """As tensors."""
    codec = TopCodec(name, logits.shape[1])
    return each_tensor(codec.decode(rows_of(codec, logits, targets)), torch.from_numpy)


def log_mass(logits: np.ndarray, ids: np.ndarray, temperature: float) -> np.ndarray:
    """The logarithm of the share of the classes that are not kept, in float64."""
    z = logits.astype(np.float64) / temperature
    z -= z.max(axis=1, keepdims=True)
    rest = z.copy()
    np.put_along_axis(rest, ids, -np.inf, axis=1)
    highest = rest.max(axis=1, keepdims=True)
    return highest[:, 0] + np.log(np.exp(rest - highest).sum(axis=1)) - np.log(np.exp(z).sum(axis=1))


def stored_log_mass(kept: TopLogits, temperature: float) -> np.ndarray:
    tail = tail_at(kept.tail, temperature)
    return (tail - torch.cat([kept.logits / temperature, tail[:, None]], dim=1).logsumexp(dim=1)).double().numpy()


# ------------------------------------------------------------------------------------------------- the tail's mass


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", [5, 20, 50])
@pytest.mark.parametrize("classes", [100, 1000, 22_000])
def test_the_mass_of_the_rest_is_within_two_percent_at_every_temperature(classes, kept, kind):
    logits = drawn(kind, 60 if classes < 10_000 else 8, classes)
    top = stored(f"top{kept}", logits)
    errors = [
        np.abs(np.expm1(stored_log_mass(top, T) - log_mass(logits, top.ids.numpy(), T))).max() for T in TEMPERATURES
    ]
    assert len(errors) == 30 and max(errors) < 0.02
    assert kind in KINDS[3:] or max(errors) < 0.004  # what is usual is far better


def test_between_the_nodes_it_is_a_polynomial_through_them():
    for number, node in enumerate(NODES):
        assert tail_weights(1 / node) == pytest.approx([float(one == number) for one in range(16)], abs=1e-9)
    assert NODES[0] == 1 and NODES[-1] == pytest.approx(1 / 8) and sorted(NODES, reverse=True) == list(NODES)
    values = np.array(NODES) ** 15 - 3 * np.array(NODES) ** 2
    assert np.dot(tail_weights(3.0), values) == pytest.approx(3**-15 - 3 / 9, abs=1e-12)
    for temperature in (0.99, 8.01, 100):
        with pytest.raises(ValueError, match=f"at temperatures from 1 to 8, not at {temperature:g}"):
            tail_weights(temperature)


def test_a_mass_of_a_millionth_of_a_millionth_and_less_is_known():
    logits = drawn("gaussian", 20, 1000)
    logits[:, 0] += np.linspace(25, 80, 20, dtype=np.float32)
    top = stored("top2", logits)
    exact = log_mass(logits, top.ids.numpy(), 1.0)
    assert exact.min() < math.log(1e-20) and (exact < math.log(1e-12)).sum() > 5
    np.testing.assert_allclose(stored_log_mass(top, 1.0), exact, rtol=0, atol=0.01)


# ------------------------------------------------------------------------------------------------- what is kept


def test_the_largest_are_kept_and_the_label_whatever_it_is():
    logits = drawn("gaussian", 50, 100)
    targets = np.random.default_rng(1).integers(0, 100, 50)
    ids, kept, _ = stored("top5", logits, targets)
    order = np.argsort(-logits, axis=1, kind="stable")
    below = logits - logits.max(axis=1, keepdims=True)
    outside = 0
    for row, label in enumerate(targets):
        wanted = list(order[row, :5])
        if label not in wanted:
            wanted[-1], outside = label, outside + 1
        assert ids[row].tolist() == wanted
        np.testing.assert_allclose(kept[row], below[row, wanted], rtol=2**-11, atol=2**-25)
    assert 30 < outside < 50
    assert stored("top5", logits).ids.tolist() == order[:, :5].tolist()


@pytest.mark.parametrize("kept", [2, 3, 5])
def test_of_a_view_that_shows_two_examples_both_labels_are_kept_where_there_is_room(kept):
    """In every order: neither, one or both among the largest, and at any place there."""
    logits = np.tile(np.array([[9, 8, 7, 6, 5, 4, 3, 2, 1, 0]], np.float32), (100, 1))
    labels = np.stack(np.divmod(np.arange(100), 10), axis=1)
    ids, values, tail = stored(f"top{kept}", logits, labels)
    wanted = []
    for first, second in labels.tolist():
        largest = list(range(kept))
        for label, spare in ((first, {first}), (second, {first, second})):
            if label not in largest:
                free = [place for place in range(1, kept) if largest[place] not in spare]
                if free:
                    largest[free[-1]] = label
        wanted.append(largest)
    assert ids.tolist() == wanted and (ids[:, 0] == 0).all()
    both = (ids[:, None] == torch.from_numpy(labels)[:, :, None]).any(dim=2)
    assert both[:, 0].all() and (~both[:, 1]).sum() == (72 if kept == 2 else 0)
    assert torch.equal(values, torch.from_numpy(logits).gather(1, ids) - 9)
    exact = [math.log(sum(math.exp(9 - one - 9) for one in range(10) if one not in row)) for row in wanted]
    np.testing.assert_allclose(tail[:, 0], exact, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stored_of_the_tail_is_what_its_sixteen_bits_allow(kind):
    """The slow twin: the tail's log-sum-exp at the nodes as it is, in float64."""
    logits = drawn(kind, 40, 1000)
    codec = TopCodec("top5", 1000)
    rows = rows_of(codec, logits)
    exact = tail_lse(logits - logits.max(axis=1, keepdims=True), rows["logits_ids"].astype(np.int64), NODES)
    stored = codec.decode(rows).tail
    np.testing.assert_array_equal(stored[:, [0, -1]], exact[:, [0, -1]].astype(np.float32))
    allowed = 0.51 * rows["tail_step"][:, None] + 2e-6 * np.abs(exact).max(axis=1, keepdims=True)
    assert (np.abs(stored - exact) <= allowed).all() and (rows["tail_step"] < 1e-3).all()
    assert (rows["tail_below"].max(axis=1) == 2**16 - 1).all()


def test_a_tail_whose_logits_are_all_equal_lies_on_its_chord():
    logits = np.zeros((3, 50), np.float32)
    logits[1, 0], logits[2, 0] = 40, 700
    codec = TopCodec("top2", 50)
    rows = rows_of(codec, logits)
    exact = np.log(48) - np.outer([0, 40, 700], NODES)
    np.testing.assert_allclose(codec.decode(rows).tail, exact, rtol=2e-7, atol=1e-6)


def test_the_statistics_are_those_of_all_classes():
    logits = drawn("Laplace", 20, 300)
    codec = TopCodec("top7", 300)
    rows = rows_of(codec, logits, np.arange(20))
    below = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    np.testing.assert_allclose(rows["logits_sum"], below.sum(axis=1), rtol=1e-6)
    np.testing.assert_allclose(rows["logits_squares"], (below**2).sum(axis=1), rtol=1e-6)


def test_another_reader_decodes_a_row_from_the_format_alone():
    """As shards/FORMAT.md says, without NumPy's dtypes and without us."""
    logits, label = drawn("gaussian", 1, 70_000), 69_999
    codec = TopCodec("top20", 70_000)
    row = rows_of(codec, logits, np.array([label])).tobytes()
    begin = row_dtype(VIEW_DTYPE, codec.fields()).fields["tail_ends"][1]
    first, last, step = struct.unpack_from("<3f", row, begin)
    below = [0, *struct.unpack_from("<14H", row, begin + 12), 0]
    total, squares = struct.unpack_from("<2f", row, begin + 40)
    ids, kept = struct.unpack_from("<20I", row, begin + 48), struct.unpack_from("<20e", row, begin + 128)
    assert begin + 168 == len(row) and ids[19] == label and kept[0] == 0
    z = [float(one) - float(logits.max()) for one in logits[0]]
    rest = [one for number, one in enumerate(z) if number not in set(ids)]
    assert kept == pytest.approx([z[number] for number in ids], rel=1e-3)
    assert total == pytest.approx(sum(z), rel=1e-5)
    assert (total - sum(kept)) / (70_000 - 20) == pytest.approx(sum(rest) / len(rest), rel=1e-5)
    assert squares == pytest.approx(sum(one * one for one in z), rel=1e-5)
    nodes = [9 / 16 + 7 / 16 * math.cos(math.pi * j / 15) for j in range(16)]
    lse = [first + (last - first) * (1 - b) / (7 / 8) - q * step for b, q in zip(nodes, below, strict=True)]
    assert lse == pytest.approx([math.log(sum(math.exp(b * one) for one in rest)) for b in nodes], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(("classes", "kind", "size"), [(100, "<u2", 128), (65_536, "<u2", 128), (65_537, "<u4", 168)])
def test_ids_are_as_wide_as_the_classes_need(classes, kind, size):
    codec = TopCodec("top20", classes)
    assert dict(field[:2] for field in codec.fields())["logits_ids"] == kind and codec.row_bytes == size
    logits = np.zeros((1, classes), np.float32)
    logits[0, -1] = 5
    assert codec.decode(rows_of(codec, logits)).ids[0, 0] == classes - 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_reported_and_its_neighbours_are_kept(value):
    codec, logits = TopCodec("top3", 10), drawn("gaussian", 5, 10)
    clean, _ = codec.encode(logits)
    logits[1, 4] = value
    logits[3] = value
    before = logits.copy()
    fields, storable = codec.encode(logits, np.full(5, 4))
    assert storable.tolist() == [True, False, True, False, True] and np.array_equal(before, logits, equal_nan=True)
    for name, values in fields.items():
        assert not values[~storable].any() and np.isfinite(values).all(), name
    assert np.array_equal(codec.encode(logits)[0]["tail_below"][storable], clean["tail_below"][storable])


def test_a_label_too_far_below_for_fp16_is_reported_and_another_class_is_not():
    logits = np.zeros((2, 10), np.float32)
    logits[:, 7] = -70_000
    assert TopCodec("top3", 10).encode(logits, np.array([7, 1]))[1].tolist() == [False, True]


@pytest.mark.parametrize(
    ("name", "classes", "grid", "message"),
    [
        ("top5", 5, None, "'top5' of 5 classes leaves none out; use fp16"),
        ("top5", 50, (3, 4), "'top5' is for images; maps store the logits of every class"),
    ],
)
def test_what_cannot_be_is_refused(name, classes, grid, message):
    with pytest.raises(RecipeError, match=message):
        codec_of("classification", name, classes, grid)


def test_which_names_are_of_this_kind():
    assert [name for name in ("top2", "top20", "top99999", "top1", "top0", "top02", "top", "fp16") if is_top(name)] == [
        "top2",
        "top20",
        "top99999",
    ]
    assert isinstance(codec_of("classification", "top5", 50, None), TopCodec)


# ------------------------------------------------------------------------------------------------- measured errors


def test_the_measured_error_is_that_of_the_probabilities_that_are_served():
    logits, targets = drawn("gaussian", 40, 200), np.arange(40)
    codec = TopCodec("top10", 200)
    top = codec.decode(rows_of(codec, logits, targets))
    report = codec.report(codec.error(logits, top))
    assert (report["count"], report["top_class_agreement"]) == (40, 1.0) and 0 < report["max_abs"] < 0.01
    assert 0 < report["tail_error"] < 1e-4 and 0 <= report["mean_kl_t1"] < 1e-5 and 0 <= report["mean_kl_t4"] < 1e-5
    for T, error in report["gradient_error"].items():
        p = torch.softmax(torch.from_numpy(logits).double() / int(T), dim=1).numpy()
        mass = np.exp(log_mass(logits, top.ids, int(T)))
        served = np.repeat(mass[:, None] / 190, 200, axis=1)
        np.put_along_axis(served, top.ids, np.take_along_axis(p, top.ids, axis=1), axis=1)
        assert error == pytest.approx(np.linalg.norm(served - p) / np.linalg.norm(p - 1 / 200), rel=1e-2)
    assert list(report["gradient_error"].values()) == sorted(report["gradient_error"].values())
    parts = [codec.error(logits[rows], TopLogits(*(one[rows] for one in top))) for rows in (slice(0, 7), slice(7, 40))]
    whole, added = codec.error(logits, top), add_sums(*parts)
    assert added.keys() == whole.keys()
    for name, value in whole.items():
        np.testing.assert_allclose(added[name], value, rtol=1e-7)
    assert "top10 logits" in codec.words(report) and "at T = 8" in codec.words(report)
    assert codec.report(None)["gradient_error"] == dict.fromkeys("1248", 0.0)


@pytest.mark.parametrize(
    "name, classes, every", [("top5", 256, 1), ("top5", 257, 2), ("fp16", 1000, 4), ("uint8", 22_000, 86)]
)
def test_of_many_classes_a_sample_of_rows_is_measured_while_they_are_cached(name, classes, every):
    """The first row of a batch that can be stored, and every n-th after it; what is not finite is passed over."""
    codec, rows = codec_of("classification", name, classes, None), 2 * every + 3
    logits = drawn("gaussian", rows, classes)
    logits[1] = np.nan
    fields, good = codec.encode(logits)
    views = np.array([ImageViews((8, 8)).canonical((8, 8))] * rows, VIEW_DTYPE)
    stored_rows = pack_rows(row_dtype(VIEW_DTYPE, codec.fields()), views, np.zeros(rows, np.uint32), fields)
    some = np.delete(np.arange(rows), 1)[::every]
    task = Classification(classes)
    work = Extraction(None, None, task, "teacher", None, 1, codec, {}, rows, 1)
    targets = np.zeros(rows, np.int64)
    batch = Said(Rows(["a"] * rows, views, None, targets, None, targets, None), logits, {}, {}, {})
    notes = {"error": None, "teacher": None, "overflow": None}
    note(work, notes, batch, stored_rows, good)
    note(work, notes, batch, stored_rows, good)
    assert (codec.every, good.sum(), len(some)) == (every, rows - 1, (rows - 2) // every + 1)
    once = codec.error(logits[some], codec.decode(stored_rows[some]))
    assert notes["error"] == add_sums(once, once) and notes["error"]["count"] == 2 * len(some)
    said = codec.words(codec.report(notes["error"]))
    assert said.endswith(f"; as measured on one row in {every}") == (every > 1)
    assert LogitsCodec("fp16", 1000, (2, 2)).every == OutputsCodec("fp16", 1000).every == 1
    assert LogitsCodec("uint8", 21, (65, 65)).every == 11


def test_of_a_teacher_that_says_nothing_the_report_is_finite():
    logits, codec = np.zeros((3, 40), np.float32), TopCodec("top5", 40)
    report = codec.report(codec.error(logits, codec.decode(rows_of(codec, logits))))
    assert np.isfinite(list(report["gradient_error"].values())).all() and report["tail_error"] < 1e-6


def test_another_teacher_is_told_from_this_one():
    logits = drawn("gaussian", 40, 200)
    codec = TopCodec("top10", 200)
    top = codec.decode(rows_of(codec, logits))
    assert codec.report(codec.error(drawn("gaussian", 40, 200, seed=1), top))["mean_kl_t1"] > 1
    assert codec.report(codec.error(logits[:, ::-1], top))["mean_kl_t1"] > 1


def test_spread_out_it_says_what_metrics_ask():
    logits, targets = drawn("Laplace", 64, 300), np.random.default_rng(0).integers(0, 300, 64)
    dense, exact = spread_out(stored("top6", logits, targets), 300), torch.from_numpy(logits)
    log_p, log_q = dense.log_softmax(dim=1), exact.log_softmax(dim=1)
    assert torch.equal(dense.argmax(1), exact.argmax(1))
    rows = torch.arange(64)
    torch.testing.assert_close(log_p[rows, targets], log_q[rows, targets], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(log_p.max(dim=1).values, log_q.max(dim=1).values, rtol=1e-3, atol=1e-3)
    assert spread_out(exact, 300) is exact


def test_the_type_of_a_temperature_leaves_nothing_behind():
    tail_weights.cache_clear()
    first = tail_weights(np.float64(2.5))
    assert all(type(weight) is float for weight in first) and tail_weights(2.5) == first
    assert tail_at(torch.zeros(3, len(NODES)), np.float64(2.5)).dtype == torch.float32
