"""Splits that the benchmarks read: noise pictures and random signals, written as the commands write them; and large
ones, which hold the same shard many times."""

import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kd_dist import manifest
from kd_dist.compress import FeatureCodec
from kd_dist.folders import Shards
from kd_dist.rows import SignalShards
from kd_dist.shards import Shard, index_path, shard_path, write_shard
from kd_dist.signals import LogitsCodec, dtype_to_json, pack_rows, row_dtype, to_npy
from kd_dist.tasks import Classification
from kd_dist.views import input_crc
from kd_dist.views.images import VIEW_DTYPE, ImageViews, replay

CLASSES = 10
TASK = Classification(CLASSES)
POLICY = ImageViews(size=(32, 32), crop_scale=(0.6, 1.0), brightness=0.3)
TEACHER = "teacher"

Copy = Callable[[Path, Path], Any]  # one file to another name


def write_split(
    folder: Path, examples: int, shard_size: int, views: int, feature: int = 0
) -> tuple[Shards, SignalShards]:
    """A split of noise pictures of 32 x 32 pixels, and random logits of so many views each; with a feature of so many
    channels, each of 16 x 16 numbers in fp16."""
    random, codec = np.random.default_rng(0), LogitsCodec("fp16", CLASSES)
    features = [FeatureCodec("feature", (feature, 16, 16), "fp16")] if feature else []
    dtype = row_dtype(VIEW_DTYPE, [field for one in (codec, *features) for field in one.fields()])
    written: dict[str, list[dict[str, Any]]] = {"data": [], "signals": []}
    for number, start in enumerate(range(0, examples, shard_size)):
        pictures, signals = [], []
        for one in range(start, min(start + shard_size, examples)):
            key, pixels = f"{one:08d}", random.integers(0, 256, (*POLICY.size, 3), np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            pictures.append((key, TASK.encode(file.getvalue(), "png", one % CLASSES, {})))
            drawn = np.array([POLICY.draw(key, view, POLICY.size) for view in range(views)], VIEW_DTYPE)
            crcs = np.array([input_crc(replay(pixels, view, POLICY.size)) for view in drawn], np.uint32)
            fields, _ = codec.encode(random.normal(0, 3, (views, CLASSES)).astype(np.float32))
            fields |= {one.name: random.normal(0, 1, (views, *one.shape)).astype("<f2") for one in features}
            signals.append((key, {f"{TEACHER}.npy": to_npy(pack_rows(dtype, drawn, crcs, fields))}))
        for stem, place, content in (("data", folder, pictures), ("signals", folder / TEACHER, signals)):
            path = shard_path(place, stem, number)
            write_shard(path, content, {"quarantined": []})
            written[stem].append(manifest.shard_entry(Shard(path)))
    described = {"tap": "body", "pca": None, "pool": 1, "store": "fp16", "dither": False}
    about = {
        "kind": "signals",
        "teacher": {"name": TEACHER, "weights_sha256": ""},
        "views": {"count": views},
        "row_dtype": dtype_to_json(dtype),
        "codec": {
            "logits": codec.name,
            "grid": None,
            "features": {one.name: {**described, "shape": list(one.shape)} for one in features},
            "bases_sha256": None,
        },
    }
    return finish(folder, written["data"], written["signals"], about)


def finish(folder: Path, data: list[dict], signals: list[dict], about: dict[str, Any]) -> tuple[Shards, SignalShards]:
    """Write the two manifests for these shards, `about` being the rest of that of the signals, and open both."""
    both = {"complete": True, "task": TASK.name, "classes": CLASSES, "quarantined": [], "versions": manifest.versions()}
    sizes = [(folder / row["name"]).stat().st_size for row in data]
    packed = {"kind": "examples", "split": "train", "class_names": [], "shards": data, "tar_bytes": sum(sizes)}
    manifest.write_manifest(folder, {**both, **packed})
    examples = Shards(folder)
    bound = {"shards": signals, "examples_fingerprint": examples.fingerprint}
    manifest.write_manifest(folder / TEACHER, {**both, **about, **bound})
    return examples, SignalShards(folder / TEACHER, examples)


def multiplied(folder: Path, shards: int, copy_index: Copy = shutil.copyfile) -> tuple[Shards, SignalShards]:
    """A split whose first shard is there `shards` times: its tar as links, its index copied, or linked by os.link."""
    about = manifest.read_manifest(folder / TEACHER)
    lists = []
    for place in (folder, folder / TEACHER):
        row = manifest.read_manifest(place)["shards"][0]
        first, stem = place / row["name"], row["name"].partition("-")[0]
        paths = [shard_path(place, stem, number) for number in range(shards)]
        for path in paths[1:]:
            os.link(first, path)
            copy_index(index_path(first), index_path(path))
        lists.append([{**row, "name": path.name} for path in paths])
    return finish(folder, *lists, about)
