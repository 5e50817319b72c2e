"""Semantic segmentation: one class index a pixel, in a mask of the image's own size; 255 means ignored."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torchmetrics
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate
from torchmetrics.functional.classification import multiclass_confusion_matrix

from kd_dist.batch import IGNORED, Example
from kd_dist.errors import DataError
from kd_dist.inputs import Span
from kd_dist.inputs.images import Images, decode_image, image_member, opened
from kd_dist.tasks import records
from kd_dist.tasks.certainty import certainty, certainty_warnings
from kd_dist.views.images import replay_mask, sample

HIGHER_IS_BETTER = {"miou": True, "pixel_accuracy": True}
MASK = "mask.png"  # the extension of a mask in a shard
BIT_DEPTH_AT = 24  # in a PNG: 8 bytes signature, then length, name, width and height of its first chunk, 4 bytes each
GAP = 4  # pixels between the parts of a picture
SHEET = (40, 40, 40)  # what lies behind them: the colour of no class


@dataclass(frozen=True)
class Segmentation:
    """Each pixel is of one of `classes` classes; logits are maps (B, C, h, w), not yet scaled up to the image."""

    classes: int
    input: Images = Images()

    name: ClassVar[str] = "segmentation"
    maps: ClassVar[bool] = True
    shown: ClassVar[int] = 4  # examples in a picture
    canonical_whole: ClassVar[bool] = True  # no pixel of an image may go unjudged
    metrics_known: ClassVar[tuple[str, ...]] = tuple(HIGHER_IS_BETTER)

    def encode(
        self, payload: bytes, extension: str, label: Any, metadata: Mapping[str, Any], span: Span = None
    ) -> dict[str, bytes]:
        """The members of one example in its shard: image and mask as they came, and the metadata as JSON.

        `label` is an encoded PNG mask, or a function that returns it. Raises DataError when the image or the mask
        cannot be decoded or they do not fit each other, and whatever the function raises.
        """
        members = {**image_member(payload, extension), **records.encoded({"metadata": metadata})}
        mask = label() if callable(label) else label
        if not isinstance(mask, bytes):
            raise DataError(
                f"the label is no mask but {type(mask).__name__}; give the bytes of a PNG, or what reads them"
            )
        with opened(mask, "mask") as stored:
            stored.verify()  # decoding a PNG does not look at the CRC of its pixels
        self._pair(decode_image(payload), mask)
        return {**members, MASK: mask}

    def decode(self, key: str, members: Mapping[str, bytes | memoryview]) -> Example:
        """One example of a shard. Raises DataError that names the key."""
        with records.naming(key):
            if MASK not in members:
                raise DataError(f"it has no {MASK} member, only {', '.join(sorted(members))}")
            return Example(key, *self._pair(self.input.decode(members), members[MASK]))

    def _pair(self, pixels: np.ndarray, mask: bytes | memoryview) -> tuple[np.ndarray, np.ndarray]:
        target = decode_mask(mask, self.classes)
        if pixels.shape[:2] != target.shape:
            (rows, columns), (own_rows, own_columns) = pixels.shape[:2], target.shape
            raise DataError(f"the mask has {own_rows} x {own_columns} pixels and the image {rows} x {columns}")
        return pixels, target

    def replay_target(self, target: np.ndarray, view: np.void, size: tuple[int, int]) -> np.ndarray:
        """The mask of a view, (h, w) uint8, with `size` = (h, w)."""
        return replay_mask(target, view, size)

    def no_target(self, size: tuple[int, int]) -> np.ndarray:
        """The target of a row without an example: a mask of (h, w) `size` in which every pixel is ignored."""
        return np.full(size, IGNORED, np.uint8)

    def collate(self, targets: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Masks (B, H, W) uint8, each padded with 255 below and on the right to the largest, and their own sizes
        (B, 2) int64."""
        sizes = np.array([mask.shape for mask in targets], np.int64)
        padded = np.full((len(targets), *sizes.max(axis=0)), IGNORED, np.uint8)
        for row, mask in enumerate(targets):
            padded[row, : mask.shape[0], : mask.shape[1]] = mask
        return padded, sizes

    def metrics(self) -> torchmetrics.Metric:
        """Counts for `update`, which merge exactly over any number of processes; `compute()` gives values by name."""
        return Confusion(self.classes)

    def update(
        self, metrics: torchmetrics.Metric, logits: Tensor, targets: Tensor, sizes: Tensor, groups: Tensor | None = None
    ) -> None:
        """Count the pixels of logits (B, C, h, w), each row scaled up to its own mask: targets (B, H, W) uint8 with
        `sizes` (B, 2)."""
        metrics.update(logits, targets, sizes)

    def teacher_sums(self, logits: np.ndarray, targets: np.ndarray, sizes: np.ndarray | None) -> dict[str, Any]:
        """Sums over pixels that are not ignored, which add up over batches and shards.

        Logits (B, C, h, w) float32; masks (B, H, W) uint8 with `sizes` (B, 2), None: without padding. Each of the
        h x w logits is compared with the mask's value at its centre.
        """
        sums: dict[str, Any] = {"rows": len(logits), "pixels": 0, "entropy": 0.0, "saturated": 0}
        labelled, predicted, right = np.zeros((3, self.classes), np.int64)
        for row, mask in enumerate(unpadded(targets, sizes)):
            seen = sample(mask, logits.shape[2:])
            counted = seen != IGNORED
            truth, z = seen[counted], logits[row][:, counted].T
            top = z.argmax(axis=1)
            _, certain = certainty(z)
            sums = {**sums, **{name: sums[name] + value for name, value in certain.items()}}
            sums["pixels"] += len(truth)
            labelled += np.bincount(truth, minlength=self.classes)
            predicted += np.bincount(top, minlength=self.classes)
            right += np.bincount(truth[top == truth], minlength=self.classes)
        counts = {"labelled_per_class": labelled, "predicted_per_class": predicted, "right_per_class": right}
        return {**sums, **{name: values.tolist() for name, values in counts.items()}}

    def teacher_report(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        """What a teacher said over a split, at the grid of its logits: miou, pixel accuracy, entropy (nat), saturated
        share, and by class pixels and IoU (None: neither labelled nor predicted)."""
        counts = {name: sums[name] for name in ("rows", "pixels", "labelled_per_class", "predicted_per_class")}
        values = scores(*(torch.tensor(sums[f"{name}_per_class"]) for name in ("right", "labelled", "predicted")))
        known = {name: None if value.isnan() else float(value) for name, value in values.items()}
        pixels = max(sums["pixels"], 1)
        return {
            "miou": known["miou"],
            "pixel_accuracy": known["pixel_accuracy"],
            "entropy": sums["entropy"] / pixels,
            "saturated": sums["saturated"] / pixels,
            **counts,
            "iou_per_class": [known[f"iou/{index}"] for index in range(self.classes)],
        }

    def teacher_sentences(self, report: Mapping[str, Any]) -> list[str]:
        """A teacher's report in words; the first goes on after `teacher on SPLIT: `."""
        if not report["pixels"]:
            return [f"{report['rows']:,} rows without a pixel that is not ignored"]
        by_class = ", ".join("-" if value is None else f"{value:.3f}" for value in report["iou_per_class"])
        return [
            f"miou {report['miou']:.4f} and pixel accuracy {report['pixel_accuracy']:.4f} at the grid of the logits, "
            f"entropy {report['entropy']:.4f} nat, saturated {report['saturated']:.1%} of {report['pixels']:,} pixels "
            f"in {report['rows']:,} rows",
            f"  IoU per class: {by_class}",
            *certainty_warnings(report["entropy"]),
        ]

    def picture(
        self, images: np.ndarray, targets: list[np.ndarray], predictions: dict[str, list[np.ndarray]]
    ) -> np.ndarray:
        """A row an example: its image (H, W, 3) uint8, its mask of any size, and what each of `predictions`, logits
        (C, h, w) by name, makes of it; one (height, width, 3) uint8 RGB array, ignored pixels white."""
        size = images.shape[1:3]
        columns = {"image": list(images), "truth": [coloured(sample(mask, size)) for mask in targets]}
        for name, maps in predictions.items():
            columns[name] = [coloured(classes_at(torch.from_numpy(one), size).numpy()) for one in maps]
        return contact_sheet(columns)

    def table(self, metrics: Mapping[str, float], names: Sequence[str]) -> list[tuple[str, float]]:
        """(class name, IoU) of each class, in class order, that has an IoU in `metrics`."""
        found = ((name, metrics.get(f"iou/{index}", np.nan)) for index, name in enumerate(names))
        return [(name, value) for name, value in found if not np.isnan(value)]


def decode_mask(payload: bytes | memoryview, classes: int) -> np.ndarray:
    """Encoded PNG mask -> (H, W) uint8 class indices, 255: ignored.

    A palette's indices, or 8-bit grey levels, are the classes: colours mean nothing. Raises DataError when the mask
    is damaged, of another kind, or holds a value that is no class.
    """
    with opened(payload, "mask") as image:
        if image.format != "PNG":
            raise DataError(f"the mask is a {image.format}, which may change its values; save it as PNG")
        if image.mode not in ("P", "L"):
            raise DataError(
                f"the mask has pixels of mode {image.mode}, not class indices of 8 bits; convert it to a PNG of mode "
                f"P or L"
            )
        if image.mode == "L" and payload[BIT_DEPTH_AT] != 8:  # Pillow would stretch its levels to 0..255
            raise DataError(f"the mask has grey levels of {payload[BIT_DEPTH_AT]} bits; save them with 8 bits")
        mask = np.array(image)
    strange = mask[(mask >= classes) & (mask != IGNORED)]
    if strange.size:
        raise DataError(
            f"the mask holds {strange[0]}, which is neither in 0..{classes - 1}, the task's {classes} classes, nor "
            f"{IGNORED}, ignored"
        )
    return mask


def unpadded(masks: np.ndarray, sizes: np.ndarray | None) -> Iterator[np.ndarray]:
    """Each of the masks (B, H, W) without its padding, given their sizes (B, 2); None: they have none."""
    for row, mask in enumerate(masks):
        yield mask if sizes is None else mask[: sizes[row, 0], : sizes[row, 1]]


def classes_at(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits (C, h, w) -> the class (H, W) of each pixel, with `size` = (H, W): the largest after bilinear scaling."""
    scaled = interpolate(logits[None].float(), size=size, mode="bilinear", align_corners=False)[0]
    return scaled.max(dim=0).indices  # as argmax, in a fifth of its time on a CPU


def scores(right: Tensor, labelled: Tensor, predicted: Tensor) -> dict[str, Tensor]:
    """Pixels counted by class, each (C,) int64 -> `miou`, `pixel_accuracy` and `iou/<class>`, each () float64.

    IoU_c = right_c / (labelled_c + predicted_c - right_c), NaN where that is 0 / 0; miou is the mean of the others.
    """
    iou = right.double() / (labelled + predicted - right)
    by_class = {f"iou/{index}": value for index, value in enumerate(iou)}
    return {"miou": iou.nanmean(), "pixel_accuracy": right.sum().double() / labelled.sum(), **by_class}


class Confusion(torchmetrics.Metric):
    """One confusion matrix (truth, prediction) over every pixel that is not ignored, in int64."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.add_state("counts", torch.zeros(classes, classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor, sizes: Tensor) -> None:
        # Row by row: one image at its own resolution is what memory must hold.
        for row, (height, width) in enumerate(sizes.tolist()):
            predicted = classes_at(logits[row], (height, width))
            self.counts += multiclass_confusion_matrix(
                predicted, targets[row, :height, :width], self.classes, ignore_index=IGNORED, validate_args=False
            )

    def compute(self) -> dict[str, Tensor]:
        return scores(self.counts.diagonal(), self.counts.sum(dim=1), self.counts.sum(dim=0))


def palette() -> np.ndarray:
    """(256, 3) uint8: a colour for each class, far apart for the first ones, and white for what is ignored.

    Bits 3k, 3k + 1 and 3k + 2 of the class are bits 7 - k of red, green and blue: Pascal VOC's colours.
    """
    bits = np.arange(256)[:, None] >> np.arange(9) & 1
    place = 128 >> np.arange(9) // 3
    colours = np.stack([(bits * place)[:, channel::3].sum(axis=1) for channel in range(3)], axis=1).astype(np.uint8)
    colours[IGNORED] = 255
    return colours


def coloured(mask: np.ndarray) -> np.ndarray:
    """Class indices (H, W) -> (H, W, 3) uint8."""
    return palette()[mask]


def contact_sheet(columns: dict[str, list[np.ndarray]]) -> np.ndarray:
    """Columns of pictures (H, W, 3) uint8, all of one size, under their titles, as one uint8 RGB array."""
    font = ImageFont.load_default()
    rows, (height, width, _) = len(next(iter(columns.values()))), next(iter(columns.values()))[0].shape
    boxes = [font.getbbox(title) for title in columns]
    step = max(width, *(int(box[2]) + 1 for box in boxes)) + GAP
    top = max(int(box[3]) + 1 for box in boxes) + 2 * GAP
    sheet = Image.new("RGB", (GAP + len(columns) * step, top + rows * (height + GAP)), SHEET)
    pen = ImageDraw.Draw(sheet)
    for column, (title, pictures) in enumerate(columns.items()):
        left = GAP + column * step
        pen.text((left, GAP), title, fill="white", font=font)
        for row, pixels in enumerate(pictures):
            sheet.paste(Image.fromarray(pixels), (left, top + row * (height + GAP)))
    return np.array(sheet)
