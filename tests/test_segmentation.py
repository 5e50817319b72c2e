"""Segmentation: masks keep their values, IoU agrees with scikit-learn, two processes count as one."""

import io
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import done, ranks
from scipy.special import softmax
from scipy.stats import entropy
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score
from torch.nn.functional import interpolate

from kd_dist.batch import Example
from kd_dist.errors import DataError
from kd_dist.extract import add_sums
from kd_dist.tasks.segmentation import IGNORED, Segmentation, decode_mask, palette
from kd_dist.views.images import ImageViews, replay_mask

CLASSES = 5
TASK = Segmentation(CLASSES)
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 3), np.uint8)
MASK = np.array([[0, 1, 2, 4], [3, 3, 255, 4], [0, 0, 0, 0], [4, 3, 2, 1], [255, 255, 1, 1], [2, 2, 2, 2]], np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def in_colours(mask: np.ndarray, **options) -> bytes:
    """A mask as Pascal VOC stores it: a PNG with a palette."""
    image = Image.fromarray(mask)
    image.putpalette(palette().tobytes())
    return encoded(image, **options)


def with_2_as(value: int) -> np.ndarray:
    return np.where(MASK == 2, np.uint8(value), MASK)


PNG = encoded(Image.fromarray(PIXELS))
COLOURED = in_colours(MASK)


# ------------------------------------------------------------------------------------------------ masks


@pytest.mark.parametrize("payload", [COLOURED, encoded(Image.fromarray(MASK)), memoryview(COLOURED)])
def test_a_mask_keeps_its_values(payload):
    mask = decode_mask(payload, CLASSES)
    assert (mask.dtype, mask.tolist()) == (np.uint8, MASK.tolist())
    assert mask.flags.writeable


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_palette_of_few_bits_keeps_its_indices(bits):
    mask = np.arange(24, dtype=np.uint8).reshape(4, 6) % min(2**bits, CLASSES)
    payload = in_colours(mask, bits=bits)
    assert payload[24] == bits
    assert np.array_equal(decode_mask(payload, CLASSES), mask)


def grey_of_4_bits() -> bytes:
    """The mask above with few bits, its palette's kind (3) rewritten as grey (0) and the header's CRC mended."""
    header = bytearray(in_colours(MASK % CLASSES, bits=4)[12:29])
    header[13] = 0
    payload = in_colours(MASK % CLASSES, bits=4)
    return payload[:12] + bytes(header) + zlib.crc32(header).to_bytes(4, "big") + payload[33:]


@pytest.mark.parametrize(
    ("payload", "sentence"),
    [
        (
            encoded(Image.fromarray(PIXELS)),
            "the mask has pixels of mode RGB, not class indices of 8 bits; convert it to",
        ),
        (encoded(Image.fromarray(PIXELS).convert("RGBA")), "the mask has pixels of mode RGBA, not class indices"),
        (encoded(Image.fromarray(MASK).convert("LA")), "the mask has pixels of mode LA, not class indices"),
        (encoded(Image.fromarray(MASK.astype(np.uint16))), "the mask has pixels of mode I;16, not class indices"),
        (encoded(Image.fromarray(MASK > 2)), "the mask has pixels of mode 1, not class indices"),
        (grey_of_4_bits(), "the mask has grey levels of 4 bits; save them with 8 bits"),
        (encoded(Image.fromarray(MASK), "JPEG"), "the mask is a JPEG, which may change its values; save it as PNG"),
        (encoded(Image.fromarray(MASK), "BMP"), "the mask is a BMP, which may change its values; save it as PNG"),
        (COLOURED[:-30], "the mask cannot be decoded ("),
        (COLOURED[:20], "the mask cannot be decoded ("),
        (b"", "the mask is of no known format, or its first bytes are damaged"),
        (
            in_colours(with_2_as(30)),
            "the mask holds 30, which is neither in 0..4, the task's 5 classes, nor 255",
        ),
        (
            in_colours(with_2_as(5)),
            "the mask holds 5, which is neither in 0..4, the task's 5 classes, nor 255",
        ),
        (in_colours(with_2_as(254)), "the mask holds 254, which is neither in 0..4"),
    ],
)
def test_a_mask_that_cannot_be_used(payload, sentence):
    with pytest.raises(DataError, match=f"^{re.escape(sentence)}"):
        decode_mask(payload, CLASSES)


# ------------------------------------------------------------------------------------------------ one example


@pytest.mark.parametrize("label", [COLOURED, lambda: COLOURED])
def test_an_example_through_its_members(label):
    members = TASK.encode(PNG, "png", label, {"name": "ä/1"})
    assert sorted(members) == ["json", "mask.png", "png"]
    assert (members["png"], members["mask.png"]) == (PNG, COLOURED)
    assert json.loads(members["json"]) == {"metadata": {"name": "ä/1"}}
    example = TASK.decode("1", {**members, "teacher.npy": b""})
    assert isinstance(example, Example) and example.key == "1"
    assert np.array_equal(example.image, PIXELS)
    assert np.array_equal(example.target, MASK)


@pytest.mark.parametrize(
    ("image", "extension", "label", "sentence"),
    [
        (PNG, "gif", COLOURED, "the extension 'gif' is none of jpg, jpeg, png"),
        (PNG, "png", 3, "the label is no mask but int; give the bytes of a PNG, or what reads them"),
        (PNG, "png", lambda: None, "the label is no mask but NoneType; give"),
        (PNG[:60], "png", COLOURED, "the image cannot be decoded"),
        (PNG, "png", COLOURED[:60], "the mask cannot be decoded"),
        (PNG, "png", in_colours(MASK[:5]), "the mask has 5 x 4 pixels and the image 6 x 4"),
        (PNG, "png", in_colours(MASK.T), "the mask has 4 x 6 pixels and the image 6 x 4"),
        (PNG, "png", in_colours(with_2_as(5)), "the mask holds 5, which is neither"),
    ],
)
def test_what_may_not_enter_a_shard(image, extension, label, sentence):
    with pytest.raises(DataError, match=f"^{re.escape(sentence)}"):
        TASK.encode(image, extension, label, {})


def test_a_mask_that_is_not_there_is_the_callers_to_report(tmp_path):
    with pytest.raises(FileNotFoundError):
        TASK.encode(PNG, "png", (tmp_path / "absent.png").read_bytes, {})


def test_no_flipped_bit_of_a_mask_changes_it_in_silence():
    refused = 0
    for bit in range(len(COLOURED) * 8):
        damaged = bytearray(COLOURED)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            members = TASK.encode(PNG, "png", bytes(damaged), {})
        except DataError:
            refused += 1
        else:
            assert np.array_equal(TASK.decode("1", members).target, MASK), bit
    assert refused > len(COLOURED) * 7


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ({"png": PNG}, "it has no mask.png member, only png"),
        ({"mask.png": COLOURED, "json": b"{}"}, "expected one image, found json, mask.png"),
        ({"png": PNG, "mask.png": in_colours(MASK[:5])}, "the mask has 5 x 4 pixels and the image 6 x 4"),
        ({"png": PNG, "mask.png": PNG}, "the mask has pixels of mode RGB"),
        ({"png": b"", "mask.png": COLOURED}, "the image is of no known format"),
    ],
)
def test_an_example_that_cannot_be_used(members, sentence):
    sentence = f"^example 'a/b': {re.escape(sentence)}.*; correct the source and pack again$"
    with pytest.raises(DataError, match=sentence):
        TASK.decode("a/b", members)


def test_the_target_of_a_view_is_the_replayed_mask():
    view = ImageViews((3, 4), whole=True).canonical(MASK.shape)
    view["flip"] = 1
    assert np.array_equal(TASK.replay_target(MASK, view, (3, 4)), replay_mask(MASK, view, (3, 4)))
    assert np.array_equal(TASK.replay_target(MASK, view, (3, 4)), MASK[1::2, ::-1])


def test_masks_of_a_batch_are_padded_below_and_on_the_right():
    targets, sizes = TASK.collate([MASK[:2, :3], MASK[:, :2], MASK[:1, :1]])
    assert (targets.shape, targets.dtype, sizes.dtype) == ((3, 6, 3), np.uint8, np.int64)
    assert sizes.tolist() == [[2, 3], [6, 2], [1, 1]]
    for padded, (height, width) in zip(targets, sizes, strict=True):
        assert np.array_equal(padded[:height, :width], MASK[:height, :width])
        assert (padded[height:] == IGNORED).all() and (padded[:, width:] == IGNORED).all()


# ------------------------------------------------------------------------------------------------ metrics


def judged(seed: int = 0, rows: int = 6, absent: int | None = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits at a coarse grid, padded masks with ignored pixels, and sizes. Class `absent` is never seen nor said."""
    random = np.random.default_rng(seed)
    masks = []
    for _ in range(rows):
        mask = random.integers(0, CLASSES, random.integers(5, 20, 2), np.uint8)
        mask[mask == absent] = 0
        mask[random.random(mask.shape) < 0.2] = IGNORED
        masks.append(mask)
    logits = torch.from_numpy(random.normal(size=(rows, CLASSES, 4, 5)).astype(np.float32))
    if absent is not None:
        logits[:, absent] = -100
    targets, sizes = TASK.collate(masks)
    return logits, torch.from_numpy(targets), torch.from_numpy(sizes)


def pixel_pairs(logits: torch.Tensor, targets: torch.Tensor, sizes: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Truth and prediction of every pixel that counts, in one list each."""
    truth, predicted = [], []
    for one, mask, (height, width) in zip(logits, targets, sizes.tolist(), strict=True):
        scaled = interpolate(one[None], size=(height, width), mode="bilinear", align_corners=False)[0]
        counted = mask[:height, :width] != IGNORED
        truth.append(mask[:height, :width][counted])
        predicted.append(scaled.argmax(0)[counted])
    return torch.cat(truth).numpy(), torch.cat(predicted).numpy()


def values(metrics) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.compute().items()}


@pytest.mark.parametrize("absent", [3, 0, None])
def test_metrics_agree_with_scikit_learn(absent):
    batch = judged(absent=absent)
    metrics = TASK.metrics()
    TASK.update(metrics, *batch)
    found, (truth, predicted) = values(metrics), pixel_pairs(*batch)
    seen = [index for index in range(CLASSES) if index in truth or index in predicted]
    assert len(seen) == CLASSES - (absent == 3)  # the masks have class 0 where another is absent
    assert np.array_equal(metrics.counts, confusion_matrix(truth, predicted, labels=range(CLASSES)))
    by_class = jaccard_score(truth, predicted, labels=seen, average=None)
    assert [found[f"iou/{index}"] for index in seen] == pytest.approx(by_class, rel=1e-12)
    assert found["miou"] == pytest.approx(by_class.mean(), rel=1e-12)
    assert found["pixel_accuracy"] == pytest.approx(accuracy_score(truth, predicted), rel=1e-12)
    assert [index for index in range(CLASSES) if np.isnan(found[f"iou/{index}"])] == ([3] if absent == 3 else [])
    assert set(found) == {"miou", "pixel_accuracy", *(f"iou/{index}" for index in range(CLASSES))}


def test_a_class_that_is_only_predicted_counts_as_zero():
    """An absent class has no IoU; one that is only said, or only there, has 0 and counts in the mean."""
    logits = torch.zeros(1, 3, 1, 4)
    logits[0, [0, 0, 1, 1], 0, range(4)] = 1
    metrics = Segmentation(3).metrics()
    metrics.update(logits, torch.zeros(1, 1, 4, dtype=torch.uint8), torch.tensor([[1, 4]]))
    found = values(metrics)
    assert (found["iou/0"], found["iou/1"], found["miou"], found["pixel_accuracy"]) == (0.5, 0.0, 0.25, 0.5)
    assert np.isnan(found["iou/2"])


def test_metrics_do_not_depend_on_the_batches():
    logits, targets, sizes = judged(absent=None)
    whole, single = TASK.metrics(), TASK.metrics()
    TASK.update(whole, logits, targets, sizes)
    for row, (height, width) in enumerate(sizes.tolist()):  # without its padding
        TASK.update(single, logits[row : row + 1], targets[row : row + 1, :height, :width], sizes[row : row + 1])
    assert torch.equal(whole.counts, single.counts) and whole.counts.dtype == torch.int64
    assert int(whole.counts.sum()) == int((targets != IGNORED).sum()) > 300
    assert values(whole) == values(single)


def test_a_perfect_prediction_at_full_size_and_half_precision():
    mask = torch.randint(0, CLASSES, (2, 9, 7), generator=torch.Generator().manual_seed(0))
    logits = torch.nn.functional.one_hot(mask, CLASSES).permute(0, 3, 1, 2).bfloat16()
    metrics = TASK.metrics()
    TASK.update(metrics, logits, mask.byte(), torch.tensor([[9, 7], [9, 7]]))
    assert {name: value for name, value in values(metrics).items() if "/" not in name} == {
        "miou": 1.0,
        "pixel_accuracy": 1.0,
    }


def test_pixels_that_are_all_ignored_give_no_number():
    metrics = TASK.metrics()
    metrics.update(
        torch.zeros(1, CLASSES, 2, 2), torch.full((1, 4, 4), IGNORED, dtype=torch.uint8), torch.tensor([[4, 4]])
    )
    assert all(np.isnan(value) for value in values(metrics).values())


SHARES = ([[0, 1, 2, 3], [4, 5]], [[0, 1, 2, 3, 4, 5], []])


def count_a_share(arguments: list[str]) -> None:
    """One rank of a distributed evaluation: count some rows, a batch each, and write down the values of all."""
    torch.distributed.init_process_group("gloo")
    batch, metrics = judged(), TASK.metrics()
    for row in json.loads(arguments[0]):
        TASK.update(metrics, *(part[row : row + 1] for part in batch))
    Path(arguments[1]).write_text(json.dumps([values(metrics), metrics.counts.tolist()]))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("shares", SHARES)
def test_two_processes_count_as_one(tmp_path, shares):
    metrics = TASK.metrics()
    TASK.update(metrics, *judged())
    (tmp_path / "work").mkdir()
    each = [[json.dumps(rows), str(tmp_path / f"{rank}.json")] for rank, rows in enumerate(shares)]
    for ended in ranks(count_a_share, each, tmp_path / "work"):
        done(ended)
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for found, _ in results:
        np.testing.assert_equal(found, values(metrics))  # NaN equals NaN
    counts = [np.array(own) for _, own in results]
    assert np.array_equal(sum(counts), metrics.counts)  # each kept its own
    assert (counts[1].sum() == 0) == (shares[1] == [])


# ------------------------------------------------------------------------------------------------ the teacher


def at_the_grid(logits: np.ndarray, masks: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Truth (n,) and logits (n, C) of each grid point that counts, found by the definition of a centre."""
    truth, rows = [], []
    _, _, height, width = logits.shape
    for one, mask in zip(logits, masks, strict=True):
        for y in range(height):
            for x in range(width):
                value = mask[int((y + 0.5) * mask.shape[0] / height), int((x + 0.5) * mask.shape[1] / width)]
                if value != IGNORED:
                    truth.append(value)
                    rows.append(one[:, y, x])
    return np.array(truth), np.array(rows)


def said(logits: np.ndarray, targets: np.ndarray, sizes: np.ndarray | None) -> dict:
    return TASK.teacher_report(TASK.teacher_sums(logits, targets, sizes))


def test_what_a_teacher_said():
    logits, targets, sizes = (part.numpy() for part in judged(rows=8))
    logits = logits * 3
    logits[:2] *= 20
    masks = [mask[:height, :width] for mask, (height, width) in zip(targets, sizes, strict=True)]
    truth, z = at_the_grid(logits, masks)
    top, p = z.argmax(1), softmax(z.astype(np.float64), axis=1)
    report = said(logits, targets, sizes)
    assert (report["rows"], report["pixels"]) == (8, len(truth)) and 100 < len(truth) < 160
    assert report["pixel_accuracy"] == pytest.approx(accuracy_score(truth, top), rel=1e-12)
    by_class = jaccard_score(truth, top, labels=[0, 1, 2, 4], average=None)
    assert report["miou"] == pytest.approx(by_class.mean(), rel=1e-12)
    assert report["iou_per_class"][3] is None
    assert np.delete(report["iou_per_class"], 3).tolist() == pytest.approx(by_class, rel=1e-12)
    assert report["entropy"] == pytest.approx(entropy(p, axis=1).mean(), rel=1e-9)
    assert report["saturated"] == (p.max(1) > 0.99).mean() > 0
    assert report["labelled_per_class"] == np.bincount(truth, minlength=CLASSES).tolist()
    assert report["predicted_per_class"] == np.bincount(top, minlength=CLASSES).tolist()
    json.dumps(report, allow_nan=False)


def test_a_teachers_sums_add_up_and_need_no_sizes_without_padding():
    logits, targets, sizes = (part.numpy() for part in judged())
    logits[:2] *= 20
    whole = TASK.teacher_sums(logits, targets, sizes)
    one, two = (TASK.teacher_sums(logits[cut], targets[cut], sizes[cut]) for cut in (slice(0, 2), slice(2, None)))
    both = add_sums(one, two)
    assert both.pop("entropy") == pytest.approx(whole.pop("entropy"), rel=1e-12)
    assert both == whole and whole["saturated"] > 0
    full = np.tile([20, 20], (6, 1))
    assert targets.shape[1:] != (20, 20)
    targets = np.pad(targets, [(0, 0), (0, 20 - targets.shape[1]), (0, 20 - targets.shape[2])], constant_values=IGNORED)
    assert TASK.teacher_sums(logits, targets, None) == TASK.teacher_sums(logits, targets, full)


def test_a_teachers_report_in_words():
    logits, targets, sizes = (part.numpy() for part in judged(rows=8))
    first, second = TASK.teacher_sentences(report := said(logits, targets, sizes))
    assert first == (
        f"miou {report['miou']:.4f} and pixel accuracy {report['pixel_accuracy']:.4f} at the grid of the logits, "
        f"entropy {report['entropy']:.4f} nat, saturated {100 * report['saturated']:.1f}% of {report['pixels']} pixels "
        f"in 8 rows"
    )
    assert re.fullmatch(r"  IoU per class: 0\.\d{3}, 0\.\d{3}, 0\.\d{3}, -, 0\.\d{3}", second)
    *_, warning = TASK.teacher_sentences(said(logits * 1e4, targets, sizes))
    assert warning.startswith("warning: the teacher's mean entropy is 0.00")


def test_a_teacher_that_said_nothing():
    silent = said(np.zeros((2, CLASSES, 3, 3), np.float32), np.full((2, 6, 6), IGNORED, np.uint8), None)
    assert (silent["pixels"], silent["miou"], silent["iou_per_class"]) == (0, None, [None] * CLASSES)
    assert TASK.teacher_sentences(silent) == ["2 rows without a pixel that is not ignored"]
    json.dumps(silent, allow_nan=False)


# ------------------------------------------------------------------------------------------------ to look at


def test_colours_are_all_different_and_those_of_pascal_voc():
    colours = palette()
    assert (colours.shape, colours.dtype) == ((256, 3), np.uint8)
    assert len({tuple(colour) for colour in colours.tolist()}) == 256
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 4: (0, 0, 128), 8: (64, 0, 0), 15: (192, 128, 128)}
    assert {index: tuple(colours[index].tolist()) for index in known} == known
    assert colours[IGNORED].tolist() == [255, 255, 255]


def cells(
    sheet: np.ndarray, expected: Callable[[int, int], np.ndarray], rows: int, columns: int
) -> list[tuple[int, int]]:
    """Where each expected picture lies in the sheet, which must hold it at one place of the grid."""
    places = []
    for row in range(rows):
        for column in range(columns):
            wanted = expected(row, column)
            windows = np.lib.stride_tricks.sliding_window_view(sheet, wanted.shape)[:, :, 0]
            places += [tuple(place) for place in np.argwhere((windows == wanted).all(axis=(2, 3, 4))).tolist()]
    return places


def test_a_picture_shows_image_truth_and_predictions():
    images = np.random.default_rng(1).integers(0, 256, (2, 8, 6, 3), np.uint8)
    random = np.random.default_rng(2)
    masks = [random.integers(0, CLASSES, (16, 12), np.uint8), random.integers(0, CLASSES, (8, 6), np.uint8)]
    masks[0][1, 1] = IGNORED
    predictions = {
        name: [random.normal(size=(CLASSES, 3, 3)).astype(np.float32) for _ in range(2)] for name in ("teacher", "kd")
    }
    sheet = TASK.picture(images, masks, predictions)
    assert (sheet.dtype, sheet.ndim, sheet.shape[2]) == (np.uint8, 3, 3)

    def expected(row: int, column: int) -> np.ndarray:
        if column == 0:
            return images[row]
        if column == 1:
            return palette()[masks[row][1::2, 1::2] if row == 0 else masks[row]]
        scaled = torch.from_numpy(predictions[("teacher", "kd")[column - 2]][row])[None]
        scaled = interpolate(scaled, size=(8, 6), mode="bilinear", align_corners=False)[0]
        return palette()[scaled.argmax(0).numpy()]

    places = cells(sheet, expected, 2, 4)
    assert len(places) == 8
    tops, lefts = sorted({top for top, _ in places}), sorted({left for _, left in places})
    assert places == [(top, left) for top in tops for left in lefts] and (len(tops), len(lefts)) == (2, 4)
    for left in lefts:  # a title above each column
        assert sheet[: tops[0], left : left + 12].max() > 200
    assert TASK.picture(images, masks, {}).shape[1] < sheet.shape[1]


def test_a_table_of_classes():
    names = ["sky", "road", "car"]
    metrics = {"miou": 0.5, "iou/2": 0.25, "iou/0": 0.75, "iou/3": 1.0}
    assert TASK.table(metrics, names) == [("sky", 0.75), ("car", 0.25)]
    assert TASK.table({**metrics, "iou/1": float("nan")}, names) == [("sky", 0.75), ("car", 0.25)]
