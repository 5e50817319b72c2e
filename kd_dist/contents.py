"""`kd-dist inspect`: what a cache holds, in words, and a sheet of its views with what the teacher said of each."""

import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from kd_dist import assemble, caches, manifest, places, policies
from kd_dist.batch import IGNORED, Example, each_tensor
from kd_dist.cache_teacher import summary
from kd_dist.choose import hint
from kd_dist.data import read_examples, with_partners
from kd_dist.errors import DataError
from kd_dist.folders import Shards
from kd_dist.losses.served import MOST
from kd_dist.plan import mix, permute
from kd_dist.recipe import Recipe
from kd_dist.remote import Remote
from kd_dist.rows import feature_codecs, span
from kd_dist.signals.topk import spread_out
from kd_dist.tasks import Regression, Segmentation, Task
from kd_dist.tasks.segmentation import classes_at, coloured
from kd_dist.views import input_crc, replayed
from kd_dist.views.mixed import CUTMIX, partners_of, second_share

SHOWN = 10  # quarantined examples that are listed
TOP = 3  # classes of a view that are named
PLAIN = ("canonical", "count", "first", "kind", "seed", "size", "whole")  # of views; what else is not 0 is told
PANEL, LINE = 2.0, 0.13  # inches: the side of a view on the sheet, and a line under it
DPI = 100


class Seen(NamedTuple):
    """One view of a sheet."""

    key: str
    view: int  # its number
    # (H, W, channels) uint8, as a student gets them; of segmentation under the colours of the teacher's classes
    pixels: np.ndarray
    label: str
    teacher: str  # what it said
    sound: bool  # whether these are the pixels that the teacher saw


class Folder(NamedTuple):
    """One folder of a recipe's caches."""

    split: str
    path: Path | Remote
    made: dict[str, Any]  # its manifest


def folders(recipe: Recipe, split: str | None) -> dict[str, Folder]:
    """The folders of all caches, by split; what was added as `<split>.<number>`, further teachers' as
    `<split>/<teacher>`. Of one split, where it is named."""
    known = places.cached_splits(recipe)
    if split is not None and split not in known:
        raise DataError(f"there is no cache of split '{split}'{hint(split, known)}")
    found = {}
    for one in places.cached_teachers(recipe):
        for name, path in caches.every_folder(one).items():
            held = name.partition(".")[0]
            if split in (None, held):
                called = places.beside(recipe, one.teacher.name, name)
                found[called] = Folder(held, path, manifest.read_manifest(path))
    return found


def in_words(recipe: Recipe, one: Folder) -> list[str]:
    """A folder's manifest in words."""
    split, folder, made = one
    task = assemble.task(recipe)
    feature_codecs(folder, made["codec"])  # refuses a folder that has lost its bases
    teacher, codec, digest = made["teacher"], made["codec"], made["teacher"]["weights_sha256"][:12]
    lines = [f"{folder}: {teacher['model']}, weights {teacher['weights']}, sha256 {digest}", view_words(made["views"])]
    if not made["complete"]:
        return [*lines, "not finished; run `kd-dist cache-teacher` again"]
    lines.append(summary(split, made, task))
    grid = f" at {' x '.join(map(str, codec['grid']))} places" if codec["grid"] else ""
    stored = [] if codec["logits"] is None else [f"logits as {codec['logits']}{grid}"]
    for name, one in codec["features"].items():
        reduced = f", {one['pca']} components" if one["pca"] else ""
        pooled = f", pooled by {one['pool']}" if one["pool"] > 1 else ""
        shape = " x ".join(map(str, one["shape"]))
        stored.append(f"{name} ({one['tap']}, {shape}{pooled}{reduced}) as {one['store']}")
    lines.append(f"  stored: {'; '.join(stored)}")
    near = f"; nearly{near_words(made)}: {', '.join(made['near_losses'])}" if made.get("near_losses") else ""
    lines.append(f"  serves exactly: {', '.join(made.get('exact_losses', ())) or 'no loss that it lists'}{near}")
    count, bad, views = made["examples"], made["quarantined"], made["views"]["count"]
    total = made["bytes_per_view"] * count * views
    lines.append(
        f"  {count:,} examples x {views} in {len(made['shards'])} shards, {total / 1e6:,.2f} MB; {len(bad)} quarantined"
    )
    lines += [f"    '{row['key']}': {row['reason']}" for row in bad[:SHOWN]]
    lines += [f"    and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
    ran, versions = made["execution"], ", ".join(f"{name} {one}" for name, one in sorted(made["versions"].items()))
    lines.append(
        f"  made on {ran['device']}, {ran['batch_size']} views at a time, {ran['threads']} threads: {versions}"
    )
    return [*lines, *written(folder)]


def near_words(made: Mapping[str, Any]) -> str:
    """At which temperatures logits of which a part is kept are near enough to learn from."""
    measured = made["codec_error"]["logits"].get("gradient_error", {})
    fine = [one for one, error in measured.items() if error <= MOST]
    if not measured or len(fine) == len(measured):
        return ""
    return f" (T = {', '.join(fine)})" if fine else f" (but off by more than {MOST:.0%} of the gradient at every T)"


def view_words(views: Mapping[str, Any]) -> str:
    """What is done to a view, as a manifest states it."""
    size = " x ".join(map(str, views["size"]))
    first, count = span({"views": views})
    if views["canonical"]:
        return f"  one view of each example, {size}, its centre or all of it; nothing is drawn"
    drawn = {name: one for name, one in views.items() if name not in PLAIN and one}
    words = ", ".join(f"{name} {one}" for name, one in sorted(drawn.items()))
    which = f"views {first} to {first + count - 1}" if first else f"{count} views"
    return f"  {which} of each example, {size}, drawn with seed {views['seed']}: {words}"


def written(folder: Path | Remote) -> list[str]:
    """When a folder was finished, as its disk has it."""
    if isinstance(folder, Remote):
        return []
    moment = time.localtime((folder / manifest.FILE_NAME).stat().st_mtime)
    return [f"  written {time.strftime('%Y-%m-%d %H:%M', moment)}"]


def seen(recipe: Recipe, split: str, count: int, views: int, keys: Sequence[str]) -> list[list[Seen]]:
    """Of each of `count` examples, or of those with these keys, the first `views` stored views, replayed from their
    rows as training does it. The choice of examples is always the same.

    Raises DataError for an unknown key.
    """
    examples = assemble.examples(recipe, split)
    cache = caches.signals(recipe, split, examples)
    if keys:
        ids = [one_of(examples, key) for key in keys]
    else:
        ids = permute(np.arange(min(count, len(examples))), len(examples), mix(0)).tolist()
    task, policy = assemble.task(recipe), policies.split_policy(recipe, split)
    names, found = examples.manifest["class_names"], []
    for number in ids:
        numbers = np.arange(min(views, cache.views))
        same = np.full(len(numbers), number)
        rows = cache.rows(same, numbers)
        [example] = read_examples(examples, same[:1], task.decode)
        shown = with_partners(examples, [example] * len(numbers), same, partners_of(rows["view"]), task.decode)
        said = each_tensor(cache.codec.decode(rows), lambda one: torch.from_numpy(np.ascontiguousarray(one)))
        logits = spread_out(said, task.classes)
        bad = number in cache.quarantined
        line = []
        for place, (one, row) in enumerate(zip(shown, rows, strict=True)):
            pixels = replayed(policy, one, row["view"])
            sound = input_crc(pixels) == int(row["input_crc"])
            label = label_words(task, one, row["view"], policy.size, names)
            if isinstance(task, Segmentation):
                classes = classes_at(logits[place], policy.size).numpy()
                teacher, pixels = area_words(classes, names), overlaid(pixels, classes)
            else:
                teacher = teacher_words(task, logits[place], names)
            line.append(Seen(one.key, place, pixels, label, "quarantined" if bad else teacher, sound))
        found.append(line)
    return found


def one_of(shards: Shards, key: str) -> int:
    """The number of the example with this key."""
    known: list[str] = []
    for number in range(len(shards.paths)):
        held = shards.shard(number).keys
        if key in held:
            return int(shards.starts[number]) + held.index(key)
        known += held
    raise DataError(f"{shards.folder}: has no example '{key}'{hint(key, known)}")


def label_words(task: Task, example: Example, view: np.void, size: tuple[int, int], names: Sequence[str]) -> str:
    """The label of a view: of a mixed one both, by how much is seen of each; of a blended one that of the blend."""
    target = task.replay_target(example.target, view, size)
    if isinstance(task, Segmentation):
        return area_words(target, names)
    if isinstance(task, Regression):
        return "no label" if np.isnan(target).any() else number_words(names, target)
    share = second_share(view, size)
    if example.partner is not None:
        how = "CutMix" if view["mixing"] == CUTMIX else "mixup"
        second = names[example.partner[1].target]
        return f"{names[target]} {1 - share:.0%} + {second} {share:.0%}, {how}"
    return names[target] + (f", blended from {names[example.target]}" if target != example.target else "")


def teacher_words(task: Task, logits: torch.Tensor, names: Sequence[str]) -> str:
    """What a teacher said of one view, (C,): the largest probabilities, or its numbers."""
    if isinstance(task, Regression):
        return number_words(names, logits.numpy())
    top = logits.double().softmax(dim=0).topk(min(TOP, len(logits)))
    return ", ".join(f"{names[c]} {p:.0%}" for p, c in zip(top.values.tolist(), top.indices.tolist(), strict=True))


def number_words(names: Sequence[str], values: np.ndarray) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in zip(names, values.tolist(), strict=True))


def area_words(classes: np.ndarray, names: Sequence[str]) -> str:
    """The classes that cover most of a map (H, W), ignored pixels apart."""
    counted = classes[classes != IGNORED]
    counts = np.bincount(counted, minlength=len(names))
    order = [one for one in np.argsort(-counts, kind="stable")[:TOP].tolist() if counts[one]]
    return ", ".join(f"{names[one]} {counts[one] / len(counted):.0%}" for one in order) or "all ignored"


def overlaid(pixels: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """An image (H, W, 3) under the colours of its classes (H, W)."""
    return ((pixels.astype(np.uint16) + coloured(classes.astype(np.uint8))) // 2).astype(np.uint8)


def sheet(path: Path, shown: Sequence[Sequence[Seen]], title: str) -> None:
    """Write a PNG: a row an example, a column a view, under each its label and what the teacher said. The same views
    give the same bytes."""
    from matplotlib.figure import Figure

    rows, columns = len(shown), max(map(len, shown))
    height, width = shown[0][0].pixels.shape[:2]
    wide = PANEL * max(1.0, min(3.0, width / height))
    lines = max(caption(one, wide).count("\n") for row in shown for one in row) + 3
    tall = PANEL * max(0.5, min(2.0, wide / PANEL * height / width)) + LINE * lines
    figure = Figure(figsize=(wide * columns, tall * rows + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=8, parse_math=False)
    for axes, one in zip(
        figure.subplots(rows, columns, squeeze=False).flat,
        (one for row in shown for one in [*row, *[None] * (columns - len(row))]),
        strict=True,
    ):
        axes.set_axis_off()
        if one is None:
            continue
        if one.pixels.shape[2] == 1:  # a spectrogram: low bands below
            axes.imshow(one.pixels[..., 0], origin="lower", aspect="auto", cmap="magma", vmin=0, vmax=255)
        else:
            axes.imshow(one.pixels)
        axes.set_title(f"{one.key} view {one.view}", fontsize=5, parse_math=False)
        colour = "black" if one.sound else "red"
        under = {"parse_math": False, "ha": "center", "va": "top", "transform": axes.transAxes}
        axes.text(0.5, -0.03, caption(one, wide), fontsize=5, color=colour, **under)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=DPI, metadata={"Software": None})


def caption(one: Seen, wide: float) -> str:
    """What stands under a view, in lines that fit."""
    letters = int(wide * 22)
    parts = [f"label: {one.label}", f"teacher: {one.teacher}"]
    parts += [] if one.sound else ["NOT the pixels that the teacher saw"]
    return "\n".join(line for part in parts for line in textwrap.wrap(part, letters))


def records(shown: Sequence[Sequence[Seen]]) -> list[dict[str, Any]]:
    """The views of a sheet as JSON has them, without pixels."""
    return [{name: value for name, value in one._asdict().items() if name != "pixels"} for row in shown for one in row]
