"""The recipes that are shipped: each can be read, and the full-scale ones run as they are, but for data and steps."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import done, kd_dist
from processes import run as start_run

from kd_dist.config import load
from kd_dist.models import build_network
from kd_dist.sources.voc import VOC_CLASSES

CONFIGS = Path(__file__).parent.parent / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))
STEPS = 2


def test_every_shipped_recipe_is_found():
    assert [path.stem for path in RECIPES] == ["camvid", "digits", "voc_fcn_resnet50"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_can_be_read_and_its_header_says_how_to_run_it(path):
    assert load(path).name == path.stem
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"kd-dist run configs/{path.name}" in line for line in header)
    assert any("Hardware: " in line for line in header)


def voc_tree(root: Path) -> None:
    """Pascal VOC's layout and usual sizes: a picture to learn from, one to be judged by, made of noise and boxes."""
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    palette = np.arange(768, dtype=np.uint8)
    for number, (key, height, width) in enumerate([("2007_1", 375, 500), ("2008_2", 500, 334)]):
        random = np.random.default_rng(number)
        mask = np.zeros((height, width), np.uint8)
        mask[50:200, 60:260], mask[150:300, 200:330] = 1 + number, 20 - number
        mask[50:54, 60:260] = 255
        image = np.clip(random.integers(0, 90, (height, width, 3)) + 8 * mask[..., None], 0, 255).astype(np.uint8)
        Image.fromarray(image).save(root / "JPEGImages" / f"{key}.jpg")
        picture = Image.fromarray(mask).convert("P")
        picture.putpalette(palette.tobytes())
        picture.save(root / "SegmentationClass" / f"{key}.png")
    (root / "ImageSets" / "Segmentation" / "train.txt").write_text("2007_1\n")
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text("2008_2\n")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_voc_recipe_runs_at_full_scale(tmp_path):
    """FCN-ResNet50 at 520 pixels with its three features, the student, both stages; weights are random."""
    recipe = str(CONFIGS / "voc_fcn_resnet50.yaml")
    voc_tree(tmp_path / "voc")
    torch.manual_seed(0)
    teacher = build_network("torchvision/fcn_resnet50", len(VOC_CLASSES), maps=True, options={})
    torch.save(teacher.backbone.state_dict(), tmp_path / "teacher.pth")
    words = [recipe, f"data.root={tmp_path}/voc", f"teacher.weights={tmp_path}/teacher.pth"]

    def run(*arguments: str) -> str:
        ended = start_run(kd_dist, arguments[0], *words, *arguments[1:], folder=tmp_path)
        done(ended)
        return ended.stdout

    run("pack")
    run("cache-teacher")
    about = json.loads((tmp_path / "shards/voc_fcn_resnet50/train/teacher/manifest.json").read_text())
    assert about["row_bytes"] - sum(one["bytes"] for one in about["feature_report"].values()) <= 92_000
    assert about["codec"]["grid"] == [65, 65] and about["quarantined"] == []
    assert about["codec_error"]["logits"]["top_class_agreement"] >= 0.995
    assert about["codec_error"]["logits"]["mean_kl_t1"] <= 1e-4
    for name, one in about["feature_report"].items():
        assert one["bytes"] * 8 <= one["fp16_bytes"], name
        assert one["gradient_cosine"] >= 0.99, name
    assert "the cache is this teacher's" in run("verify", "--examples", "1")
    for stage in ("pretrain", "distill"):
        run("train", "--stage", stage, f"train.max_steps={STEPS}")
        result = json.loads((tmp_path / f"runs/voc_fcn_resnet50/{stage}/seed-0/result.json").read_text())
        assert result["steps"] == STEPS and result["skipped"] == 0
        assert np.isfinite([one["loss"] for one in result["history"]]).all()
    rows = json.loads(run("evaluate", "--json"))
    assert [row["stage"] for row in rows] == ["given", "pretrain", "distill"]
    assert rows[0]["parameters"] > 30e6 and 2.4e6 < rows[1]["parameters"] < 3.0e6
