"""The recipes that are shipped: each can be read, and the full-scale ones run as they are, but for data and steps."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import done, kd_dist
from processes import run as start_run
from recordings import encoded, tones

from kd_dist.config import load
from kd_dist.models import build_network
from kd_dist.sources.voc import VOC_CLASSES

CONFIGS = Path(__file__).parent.parent / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))
STEPS = 2


def test_every_shipped_recipe_is_found():
    assert [path.stem for path in RECIPES] == ["camvid", "digits", "emotion_vgmidi", "voc_fcn_resnet50"]


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


AVERAGES = "annotations/annotations averaged per song/song_level"
SONGS = 24


def deam_tree(root: Path) -> None:
    """DEAM's layout: short songs whose pitch is their arousal and whose loudness is their valence."""
    (root / "MEMD_audio").mkdir(parents=True)
    (root / AVERAGES).mkdir(parents=True)
    rows = ["song_id, valence_mean, valence_std, arousal_mean, arousal_std"]
    for song in range(1, SONGS + 1):
        valence, arousal = 1 + song % 7, 2 + song % 6
        wave = tones(26.0, 22050, 110.0 * arousal) * (0.1 * valence)
        (root / f"MEMD_audio/{song}.mp3").write_bytes(encoded(wave, 22050, "mp3"))
        rows.append(f"{song},{valence},1.0,{arousal},1.0")
    (root / "MEMD_audio/3.mp3").write_bytes(encoded(np.zeros(22050 * 5, np.float32), 22050, "mp3"))
    (root / AVERAGES / "static_annotations_averaged_songs_1_2000.csv").write_text("\n".join(rows) + "\n")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_emotion_recipe_runs_from_recordings_to_a_report(tmp_path):
    """Its real models and resolution, with random weights, on generated songs: every stage, two steps each."""
    deam_tree(tmp_path / "deam")
    words = [str(CONFIGS / "emotion_vgmidi.yaml"), f"data.root={tmp_path}/deam", "views.count=2", "evaluate.split=val"]
    words += ["data.splits={train: 0.6, val: 0.4}"]
    short = ("epochs=2", f"max_steps={STEPS}", "warmup_epochs=1")
    words += [f"stages.{stage}.{option}" for stage in ("teacher", "pretrain", "distill") for option in short]
    said = start_run(kd_dist, "run", *words, folder=tmp_path)
    done(said)
    folder = tmp_path / "shards/emotion_vgmidi"
    packings = [json.loads((folder / split / "manifest.json").read_text()) for split in ("train", "val")]
    quarantined = [row for one in packings for row in one["quarantined"]]
    assert [row["name"] for row in quarantined] == ["3"] and "silent" in quarantined[0]["reason"]
    packed = packings[0]
    assert packed["outputs"] == ["valence", "arousal"] and packed["input"]["mels"] == 64
    assert {"librosa", "soundfile"} <= packed["versions"].keys()
    about = json.loads((folder / "train/teacher/manifest.json").read_text())
    features = sum(one["bytes"] for one in about["feature_report"].values())
    assert about["row_bytes"] - features <= 56 and about["views"]["kind"] == "spectrogram"
    rows = about["teacher_report"]["rows"]
    assert about["codec_error"]["logits"] == {"count": rows, "max_abs": 0.0, "mean_square": 0.0}
    assert 0 < about["teacher_report"]["largest_error"] < 4
    for stage in ("teacher", "pretrain", "distill"):
        [path] = (tmp_path / f"runs/emotion_vgmidi/{stage}").glob("seed-*/result.json")
        result = json.loads(path.read_text())
        assert result["steps"] == STEPS and result["skipped"] == 0
        assert np.isfinite([one["loss"] for one in result["history"]]).all()
    proof = start_run(kd_dist, "verify", *words, "--examples", "4", folder=tmp_path)
    done(proof)
    assert proof.stdout.count("the cache is this teacher's") == 2 and "mean squared difference" in proof.stdout
    report = json.loads((tmp_path / "runs/emotion_vgmidi/report.json").read_text())
    assert [row["stage"] for row in report["summary"]] == ["teacher", "pretrain", "distill"]
    parts = {name for name, _ in report["summary"][0]["parts"]}
    assert parts == {f"{metric}/{output}" for metric in ("ccc", "mae") for output in ("valence", "arousal")}
    assert (tmp_path / "runs/emotion_vgmidi/examples.png").stat().st_size > 10_000
