"""The recipes that are shipped: each can be read, and the full-scale ones run as they are, but for data and steps."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import done, inside, kd_dist
from processes import run as start_run
from recordings import encoded, tones
from safetensors.torch import load_file, save_file

from kd_dist import assemble, cache_teacher, caches, cost, train
from kd_dist.batch import Batch, StudentOutput, TeacherSignal
from kd_dist.config import load
from kd_dist.losses import Objective
from kd_dist.models import build_network
from kd_dist.sources.voc import VOC_CLASSES

CONFIGS = Path(__file__).parent.parent / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))
STEPS = 2


def test_every_shipped_recipe_is_found():
    names = ["camvid", "deepfake_sbi", "digits", "digits_losses", "emotion_deam", "emotion_vgmidi", "faces_sbi"]
    names += ["voc_fcn_resnet50"]
    assert [path.stem for path in RECIPES] == names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_can_be_read_and_its_header_says_how_to_run_it(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("FFc23.tar").touch()  # the teacher of deepfake_sbi, which has to be there
    assert load(path).name == path.stem
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"kd-dist run configs/{path.name}" in line for line in header)
    assert any("Hardware: " in line for line in header)


def test_the_losses_on_digits_differ_in_nothing_but_the_loss():
    """And from the digits' own recipe in nothing at all but more stages: its `kd` is their `distill`."""
    recipe, digits = load(CONFIGS / "digits_losses.yaml"), load(CONFIGS / "digits.yaml")
    students = {name: stage for name, stage in recipe.stages.items() if stage.model == "student"}
    assert list(students) == ["pretrain", "kd", "logit_mse", "dkd", "dist", "logit_std", "hard_label"]
    assert {repr(replace(stage, losses={})) for stage in students.values()} == {
        repr(replace(digits.stages["distill"], losses={}))
    }
    assert replace(recipe, name="digits", stages={}) == replace(digits, stages={})
    assert recipe.stages["teacher"] == digits.stages["teacher"] and students["kd"] == digits.stages["distill"]
    generator = torch.Generator().manual_seed(0)
    labels, teacher = torch.arange(8), TeacherSignal(torch.randn(8, 10, generator=generator))
    batch = Batch(tuple("abcdefgh"), torch.zeros(8, 3, 1, 1), labels, None, labels >= 0, 8, teacher)
    for name, stage in students.items():
        assert {"pretrain": "cross_entropy"}.get(name, name) in stage.losses
        logits = torch.randn(8, 10, generator=generator).requires_grad_()
        loss, _ = Objective(stage.losses, stage.epochs)(StudentOutput(logits), batch, epoch=30.0)
        loss.backward()
        assert loss > 0 and logits.grad.isfinite().all() and logits.grad.any()


@pytest.fixture
def ran(tmp_path) -> Callable[..., str]:
    """Run a function to a good end in a process of its own, in the test's folder; returns what it printed."""

    def run(function: Callable, *arguments) -> str:
        ended = start_run(function, *arguments, folder=tmp_path)
        done(ended)
        return ended.stdout

    return run


def evaluate(*words: str) -> None:
    """`kd-dist evaluate`, where no model is timed more than three times; for a process to be."""
    cost.LATENCY_SECONDS = 0.0
    kd_dist("evaluate", *words, "--json")


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


def fewer(views: int) -> pytest.MarkDecorator:
    """All that a recipe says and, for time, with fewer views of an example."""
    all_of_them = pytest.param([], marks=pytest.mark.nightly)
    return pytest.mark.parametrize("fewer", [[f"views.count={views}"], all_of_them], ids=["few", "all"])


@pytest.mark.slow
@pytest.mark.timeout(900)
@fewer(views=2)
def test_the_voc_recipe_runs_at_full_scale(tmp_path, ran, fewer):
    """FCN-ResNet50 at 520 pixels with its three features, the student, both stages; weights are random."""
    recipe = str(CONFIGS / "voc_fcn_resnet50.yaml")
    voc_tree(tmp_path / "voc")
    torch.manual_seed(0)
    teacher = build_network("torchvision/fcn_resnet50", len(VOC_CLASSES), maps=True, options={})
    torch.save(teacher.backbone.state_dict(), tmp_path / "teacher.pth")
    words = [recipe, f"data.root={tmp_path}/voc", f"teacher.weights={tmp_path}/teacher.pth", *fewer]

    ran(kd_dist, "pack", *words)
    ran(cache_teacher.main, words)
    about = json.loads((tmp_path / "shards/voc_fcn_resnet50/train/teacher/manifest.json").read_text())
    assert about["row_bytes"] - sum(one["bytes"] for one in about["feature_report"].values()) <= 92_000
    assert about["codec"]["grid"] == [65, 65] and about["quarantined"] == []
    assert about["codec_error"]["logits"]["top_class_agreement"] >= 0.995
    assert about["codec_error"]["logits"]["mean_kl_t1"] <= 1e-4
    for name, one in about["feature_report"].items():
        assert one["bytes"] * 8 <= one["fp16_bytes"], name
        assert one["gradient_cosine"] >= 0.99, name
    assert "the cache is this teacher's" in ran(kd_dist, "verify", *words, "--examples", "1")
    for stage in ("pretrain", "distill"):
        ran(train.main, [*words, "--stage", stage, f"train.max_steps={STEPS}"])
        result = json.loads((tmp_path / f"runs/voc_fcn_resnet50/{stage}/seed-0/result.json").read_text())
        assert result["steps"] == STEPS and result["skipped"] == 0
        assert np.isfinite([one["loss"] for one in result["history"]]).all()
    rows = json.loads(ran(evaluate, *words))
    assert [row["stage"] for row in rows] == ["given", "pretrain", "distill"]
    assert rows[0]["parameters"] > 30e6 and 2.4e6 < rows[1]["parameters"] < 3.0e6


AVERAGES = "annotations/annotations averaged per song/song_level"
SONGS = 24
STUDIED = ["teacher", "pretrain", "response", "features", "distill", "distill_generated"]
PARTS = {f"{metric}{output}" for metric in ("ccc", "mae") for output in ("", "/valence", "/arousal")}


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
    """Its real models and resolution, with random weights, on generated songs: every stage, two steps each. Nothing is
    left for `run` to launch, which takes its time: it makes the report."""
    deam_tree(tmp_path / "deam")
    words = [str(CONFIGS / "emotion_vgmidi.yaml"), f"data.root={tmp_path}/deam", "views.count=2", "evaluate.split=val"]
    words += ["data.splits={train: 0.6, val: 0.4}"]
    short = ("epochs=2", f"max_steps={STEPS}", "warmup_epochs=1")
    words += [f"stages.{stage}.{option}" for stage in STUDIED for option in short] + ["gan.epochs=1"]
    done(start_run(kd_dist, "pack", *words, folder=tmp_path))
    done(start_run(train.main, [*words, "--stage", "teacher"], folder=tmp_path))
    done(start_run(kd_dist, "train-gan", *words, folder=tmp_path))
    done(start_run(cache_teacher.main, words, folder=tmp_path))
    for stage in STUDIED[1:]:
        done(start_run(train.main, [*words, "--stage", stage], folder=tmp_path))
    said = done(start_run(kd_dist, "run", *words, folder=tmp_path))
    assert said.count("done before") == 2 + 1 + len(STUDIED) + 1  # splits, generator, stages, cache
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
    for stage in STUDIED:
        [path] = (tmp_path / f"runs/emotion_vgmidi/{stage}").glob("seed-*/result.json")
        result = json.loads(path.read_text())
        assert result["steps"] == STEPS and result["skipped"] == 0
        assert np.isfinite([one["loss"] for one in result["history"]]).all()
    proof = start_run(kd_dist, "verify", *words, "--examples", "4", folder=tmp_path)
    done(proof)
    assert proof.stdout.count("the cache is this teacher's") == 3 and "mean squared difference" in proof.stdout
    report = json.loads((tmp_path / "runs/emotion_vgmidi/report.json").read_text())
    assert [row["stage"] for row in report["summary"]] == STUDIED
    assert [one["against"] for one in report["gains"] if one["generated"]] == ["distill"]
    assert {name for name, *_ in report["summary"][0]["parts"]} == PARTS
    assert (tmp_path / "runs/emotion_vgmidi/examples.png").stat().st_size > 10_000


PER_SECOND = "annotations/annotations averaged per song/dynamic (per second annotations)"
PUBLISHED = {"train": ("2", "2001"), "val": ("3", "14"), "test": ("5", "2003")}  # by the recipe's own splits
BROKEN = "4"
WEIGHT = "blocks.{}.mlp.fc1.weight"


def published_deam(root: Path) -> None:
    """DEAM as it is published, both pairs of lists with their own columns: clips of 31 s and a song of 50 s, and a
    recording that is none."""
    lists, dynamic = root / AVERAGES, root / PER_SECOND
    for folder in (root / "MEMD_audio", lists, dynamic):
        folder.mkdir(parents=True)
    short = "song_id, valence_mean, valence_std, arousal_mean, arousal_std"
    more = ", {0}_mean, {0}_std, {0}_max_mean, {0}_max_std, {0}_min_mean, {0}_min_std"
    static = {"1_2000": [short], "2000_2058": ["song_id" + more.format("valence") + more.format("arousal")]}
    header = ",".join(["song_id", *(f"sample_{time}ms" for time in range(15_000, 50_000, 500))])
    by_second = {"valence": [header], "arousal": [header]}
    for song in sorted(map(int, [*sum(PUBLISHED.values(), ()), BROKEN])):
        levels = {"valence": 1 + song % 7, "arousal": 2 + song % 6}
        seconds = 50.0 if song == 2001 else 31.0
        wave = tones(seconds, 44100, 110.0 * levels["arousal"]) * (0.1 * levels["valence"])
        (root / f"MEMD_audio/{song}.mp3").write_bytes(encoded(wave, 44100, "mp3"))
        if song <= 2000:
            static["1_2000"].append(f"{song},{levels['valence']},1.0,{levels['arousal']},1.0")
        else:  # the largest and the smallest of a song stand beside its mean
            row = [f"{level},1,{level + 1},1,{level - 1},1" for level in levels.values()]
            static["2000_2058"].append(f"{song},{','.join(row)}")
        count = round(2 * (seconds - 15))
        for name, level in levels.items():
            by_second[name].append(",".join([str(song), *[f"{(level - 5) / 4}"] * count, *[""] * (70 - count)]))
    (root / f"MEMD_audio/{BROKEN}.mp3").write_bytes(b"<html>404 Not Found</html>" * 400)
    for name, rows in static.items():
        (lists / f"static_annotations_averaged_songs_{name}.csv").write_text("\n".join(rows) + "\n")
    for name, rows in by_second.items():
        (dynamic / f"{name}.csv").write_text("\n".join(rows) + "\n")


@pytest.mark.slow
@pytest.mark.timeout(900)
@fewer(views=1)
def test_the_deam_recipe_runs_at_full_scale(tmp_path, ran, fewer):
    """ViT-B/16 at 128 x 1280, the student, all three stages. The pretrained weights are a file of random ones, of
    timm's own ViT-B/16: 3 channels, 224 pixels, 1,000 classes."""
    published_deam(tmp_path / "DEAM")
    torch.manual_seed(1)
    given = build_network("timm/vit_base_patch16_224", 1000, options={}).backbone.state_dict()
    save_file(given, tmp_path / "imagenet.safetensors")
    words = [str(CONFIGS / "emotion_deam.yaml"), f"data.root={tmp_path}/DEAM", *fewer]
    words += [f"teacher.options.pretrained_cfg_overlay.file={tmp_path}/imagenet.safetensors"]
    stages = ("teacher", "pretrain", "distill")
    words += [f"stages.{stage}.max_steps={STEPS}" for stage in stages]

    ran(kd_dist, "pack", *words)
    folder = tmp_path / "shards/emotion_deam"
    packed = {split: json.loads((folder / split / "manifest.json").read_text()) for split in PUBLISHED}
    assert {split: one["examples"] for split, one in packed.items()} == {"train": 2, "val": 2, "test": 2}
    quarantined = [row for one in packed.values() for row in one["quarantined"]]
    assert [row["name"] for row in quarantined] == [BROKEN] and "cannot be decoded" in quarantined[0]["reason"]
    ran(train.main, [*words, "--stage", "teacher"])
    kept = load_file(tmp_path / "runs/emotion_deam/teacher/seed-0/best.safetensors")
    assert kept["pos_embed"].shape == (1, 1 + 8 * 80, 768) and kept["patch_embed.proj.weight"].shape == (768, 1, 16, 16)
    same = {block: torch.equal(kept[name], given[name]) for block in range(12) if (name := WEIGHT.format(block))}
    assert [block for block, equal in same.items() if equal] == list(range(8))  # the last four have learnt
    assert [kept[f"head.{layer}.weight"].shape for layer in (0, 3, 6)] == [(512, 768), (128, 512), (2, 128)]
    ran(cache_teacher.main, words)
    about = json.loads((folder / "train/teacher/manifest.json").read_text())
    features = sum(one["bytes"] for one in about["feature_report"].values())
    assert 0 < about["row_bytes"] - features <= 56
    assert about["teacher"]["head"] == {"hidden": [512, 128], "dropout": 0.3} and about["quarantined"] == []
    assert about["feature_report"]["tokens"]["bytes"] * 64 <= about["feature_report"]["tokens"]["fp16_bytes"]
    assert about["feature_report"]["attention"]["bytes"] == 2 * 8 * 16
    assert ran(kd_dist, "verify", *words, "--examples", "1").count("the cache is this teacher's") == 3
    for stage in ("pretrain", "distill"):
        ran(train.main, [*words, "--stage", stage])
    for stage in stages:
        result = json.loads((tmp_path / f"runs/emotion_deam/{stage}/seed-0/result.json").read_text())
        assert result["steps"] == STEPS and result["skipped"] == 0 and result["metric"] == "ccc"
        assert len(result["history"]) == STEPS  # both songs fit into a step
        for epoch in result["history"]:
            assert np.isfinite([epoch[name] for name in ("loss", "grad_norm", "val_ccc", "val_mae")]).all()
            assert 0 < epoch["logit_max"] <= 1
    recipe = load(*words[:1], words[1:])
    with inside(tmp_path):
        cached = caches.signals(recipe, "train", assemble.examples(recipe, "train"))
        said = cached.codec.decode(cached.rows(np.arange(2), np.zeros(2, int)))
    assert said.shape == (2, 2) and 0 < np.abs(said).max() <= 1
    rows = json.loads(ran(evaluate, *words))
    assert [row["stage"] for row in rows] == list(stages)
    assert all(np.isfinite([row["value"], *dict(row["parts"]).values()]).all() for row in rows)
    assert {name for name, _ in rows[0]["parts"]} == PARTS
    assert 85e6 < rows[0]["parameters"] < 87e6 and all(1e6 < row["parameters"] < 8e6 for row in rows[1:])


METHODS = ("Deepfakes", "Face2Face", "FaceSwap", "NeuralTextures")
PAIRS = {"train": ("000", "001"), "val": ("002", "003"), "test": ("004", "005")}
FRAMES = 1


def forensics_tree(root: Path) -> None:
    """FaceForensics++ as it is published, with what SBI's preprocessing leaves beside it: two videos a list with a
    frame of a face of noise each, and each of the four methods on all of them."""
    (root / "splits").mkdir(parents=True)
    for split, pair in PAIRS.items():
        (root / "splits" / f"{split}.json").write_text(json.dumps([list(pair)]))
    videos = [("original_sequences/youtube", name) for pair in PAIRS.values() for name in pair]
    fakes = [name for one, other in PAIRS.values() for name in (f"{one}_{other}", f"{other}_{one}")]
    videos += [(f"manipulated_sequences/{method}", name) for method in METHODS for name in fakes]
    for number, (folder, name) in enumerate(videos):
        random, place = np.random.default_rng(number), root / folder / "c23"
        for kind in ("frames", "retina", "landmarks"):
            (place / kind / name).mkdir(parents=True)
        for frame in range(FRAMES):
            corner, size = random.integers(40, 80, 2), random.integers(180, 220, 2)
            image = np.full((360, 480, 3), 90, np.uint8)
            (left, top), (wide, tall) = corner, size
            image[top : top + tall, left : left + wide] = random.integers(0, 256, (tall, wide, 3))
            stem = f"{7 * frame:03d}"
            Image.fromarray(image).save(place / "frames" / name / f"{stem}.png")
            points = corner + random.uniform(0.1, 0.9, (1, 81, 2)) * size
            box = np.stack([corner, corner + size, *points[0, :5]])[None]
            np.save(place / "retina" / name / f"{stem}.npy", box)
            np.save(place / "landmarks" / name / f"{stem}.npy", points)


@pytest.mark.slow
@pytest.mark.timeout(900)
@fewer(views=2)
def test_the_deepfake_recipe_runs_at_full_scale(tmp_path, ran, fewer):
    """EfficientNet-B4 at 380 pixels from a file in the published form, MobileViTv2-2.0, all three stages, on
    FaceForensics++'s folders."""
    from efficientnet_pytorch import EfficientNet

    forensics_tree(tmp_path / "FaceForensics++")
    torch.manual_seed(0)
    given = EfficientNet.from_name("efficientnet-b4", num_classes=2).state_dict()
    published = {
        "model": {f"net.{name}": value for name, value in given.items()},
        "optimizer": {"state": {}},
        "epoch": 1,
    }
    torch.save(published, tmp_path / "FFc23.tar")
    words = [str(CONFIGS / "deepfake_sbi.yaml"), f"data.root={tmp_path}/FaceForensics++", *fewer]
    words += [f"teacher.weights={tmp_path}/FFc23.tar"]
    stages = ("pretrain", "distill", "distill_features")
    words += [f"stages.{stage}.max_steps={STEPS}" for stage in stages]

    ran(kd_dist, "pack", *words)
    folder = tmp_path / "shards/deepfake_sbi"
    packed = {split: json.loads((folder / split / "manifest.json").read_text()) for split in PAIRS}
    faces = 2 * FRAMES  # of a list: real ones, with as many self-blended, or those of four methods
    assert {name: one["examples"] for name, one in packed.items()} == {
        "train": faces,
        "val": 2 * faces,
        "test": 5 * faces,
    }
    assert not any(one["quarantined"] for one in packed.values())
    ran(cache_teacher.main, words)
    about = json.loads((folder / "train/teacher/manifest.json").read_text())
    features = sum(one["bytes"] for one in about["feature_report"].values())
    assert about["row_bytes"] - features == 212 and about["quarantined"] == []
    real, fake = about["teacher_report"]["labelled_per_class"]
    assert real + fake == about["teacher_report"]["rows"] and min(real, fake) > 0  # of real faces alone
    assert about["codec_error"]["logits"]["top_class_agreement"] == 1
    assert ran(kd_dist, "verify", *words, "--examples", "1").count("the cache is this teacher's") == 3
    for stage in stages:
        ran(train.main, [*words, "--stage", stage])
        result = json.loads((tmp_path / f"runs/deepfake_sbi/{stage}/seed-0/result.json").read_text())
        assert result["steps"] == STEPS and result["skipped"] == 0 and result["metric"] == "video_auc"
        assert np.isfinite([one["loss"] for one in result["history"]]).all()
    rows = json.loads(ran(evaluate, *words))
    assert [row["stage"] for row in rows] == ["given", *stages]
    assert [row["parameters"] for row in rows] == [17_552_202, *[17_426_379] * 3]
    assert all(0 <= row["value"] <= 1 for row in rows)
