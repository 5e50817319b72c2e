"""A tiny segmentation experiment: pictures in VOC's layout, a user's own networks, a recipe with features."""

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = 3
SPLITS = {"train": 10, "val": 4}

MODEL = '''\
"""A user's own networks for segmentation, with names to tap, without BatchNorm."""

from torch import nn


def network(classes, width=4):
    parts = nn.Sequential()
    parts.add_module("low", nn.Conv2d(3, width, 3, stride=2, padding=1))
    parts.add_module("act", nn.ReLU())
    parts.add_module("high", nn.Conv2d(width, 2 * width, 3, stride=2, padding=1))
    parts.add_module("act2", nn.ReLU(inplace=True))
    parts.add_module("head", nn.Conv2d(2 * width, classes, 1))
    return parts
'''

RECIPE = """\
task: {name: segmentation, classes: 3}
data:
  source: voc
  root: scenes
  options: {class_names: [ground, left, right]}
  splits: {train: 0.7, val: 0.3}
  shard_size: 4
  workers: 0
views: {count: 2, size: [16, 24], crop_scale: [0.5, 1], flip: 0.5, brightness: 0.2}
teacher: {model: "scene_model:network", options: {width: 8}, weights: null}
cache:
  logits: fp16
  batch_size: 8
  features:
    low: {tap: low, store: int8, pool: 2, dither: true}
    high: {tap: high, pca: 6, store: fp16}
student: {model: "scene_model:network", options: {width: 3}, taps: {low: low, high: high}}
stages:
  pretrain: {losses: {cross_entropy: {}}, epochs: 2, batch_size: 4, lr: 1e-2}
  distill:
    losses:
      cross_entropy: {weight: 1.0}
      kd_pixel: {weight: 0.5, temperature: 4}
      cosine: {weight: 0.3}
    epochs: 2
    batch_size: 4
    lr: 1e-2
evaluate: {split: val}
"""


def scene(number: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture (H, W, 3) uint8 and its mask: two bright boxes on noise, a strip that is ignored; sizes vary."""
    random = np.random.default_rng(number)
    height, width = 18 + number % 3, 26 + number % 4
    mask = np.zeros((height, width), np.uint8)
    mask[4:14, 2:10], mask[6:16, 14:22] = 1, 2
    mask[0] = 255
    image = random.integers(0, 60, (height, width, 3), np.uint8)
    for label in (1, 2):
        image[mask == label, label] += 120
    return image, mask


def scenes(folder: Path) -> Path:
    """Write `scenes/` in VOC's layout, `scene_model.py` and `scenes.yaml` into a folder; returns the folder."""
    root = folder / "scenes"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    first = 0
    for split, count in SPLITS.items():
        names = [f"{number:03d}" for number in range(first, first + count)]
        for number, name in enumerate(names, first):
            image, mask = scene(number)
            Image.fromarray(image).save(root / "JPEGImages" / f"{name}.jpg", quality=95)
            Image.fromarray(mask).save(root / "SegmentationClass" / f"{name}.png")
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
        first += count
    (folder / "scene_model.py").write_text(MODEL)
    (folder / "scenes.yaml").write_text(RECIPE)
    return folder
