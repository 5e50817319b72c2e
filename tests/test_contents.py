"""What a cache holds: the manifest in words, and a sheet of the views that training gets."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import pack_examples
from forgeries import forge_examples
from PIL import Image
from recordings import encoded, tones
from typer.testing import CliRunner

from kd_dist import assemble, cache_teacher, contents, journey, manifest, places
from kd_dist.batch import each_tensor
from kd_dist.cli import app
from kd_dist.config import load
from kd_dist.errors import DataError
from kd_dist.plan import view_number
from kd_dist.recipe import Recipe
from kd_dist.signals.topk import spread_out

MIXED = ["teacher.weights=null", "views.count=3", "views.cutmix=1.0", "views.mixup=1.0", "views.mixed=0.7"]
SONGS = """
name: tunes
task: {name: regression, outputs: [valence, arousal]}
audio: {sample_rate: 8000, n_fft: 256, hop: 128, mels: 16}
data: {source: audio_folder, root: songs, options: {label_columns: [valence, arousal]},
  splits: {train: 0.7, val: 0.3}, shard_size: 4, workers: 0}
views: {count: 2, size: [16, 40], gain: 3, time_mask: 4}
teacher: {model: kd_dist/mobile_vit, options: {width: 32, blocks: 1, heads: 2, patch: 8}}
student: {model: kd_dist/mobile_vit, options: {width: 16, blocks: 1, heads: 2, patch: 8}}
stages: {taught: {losses: {kd_huber: {}}, epochs: 1, batch_size: 4, lr: 1e-3}}
evaluate: {split: val}
"""


def cached(name: str, words: list[str], logits: str = "fp16") -> Recipe:
    """The tiny recipe with these overrides, packed and cached; so few classes as it has may be stored in any way."""
    recipe = load(name, words)
    recipe = replace(recipe, cache=replace(recipe.cache, logits=logits))
    pack_examples(recipe)
    cache_teacher.cache_teacher(recipe)
    return recipe


def delivered(recipe: Recipe, stage: str) -> dict[tuple[str, int], tuple[np.ndarray, torch.Tensor]]:
    """What a stage is given in as many epochs as there are views: by key and view, the pixels and the logits."""
    corridor, found = assemble.training_corridor(recipe, stage, 0, 1), {}
    steps, V = corridor.plan.steps_per_epoch, recipe.views.count
    for epoch in range(V):
        for step in range(epoch * steps, (epoch + 1) * steps):
            batch, ids = corridor[step], corridor.plan.share(step, 0, 0)
            logits = spread_out(each_tensor(batch.signals.logits, lambda one: one), recipe.task.width)
            numbers = view_number(ids, epoch, V, recipe.views.seed).tolist()
            for row, (key, number) in enumerate(zip(batch.keys, numbers, strict=True)):
                found[key, number] = batch.images[row].permute(1, 2, 0).numpy(), logits[row]
    return found


@pytest.mark.parametrize("logits", ["fp16", "top2"])
def test_a_sheet_shows_what_training_gets_and_what_the_teacher_said(experiment, logits):
    recipe = cached("tiny.yaml", [*MIXED, "stages.distill.epochs=3"], logits)
    given = delivered(recipe, "distill")
    shown = contents.seen(recipe, "train", 1000, 8, [])
    flat = [one for row in shown for one in row]
    assert len(flat) == len(given) == 3 * len(assemble.examples(recipe, "train"))
    mixed = 0
    for one in flat:
        pixels, said = given[one.key, one.view]
        assert np.array_equal(one.pixels, pixels) and one.sound
        p = said.double().softmax(dim=0)
        names = ("blue", "green", "red")
        top = ", ".join(f"{names[c]} {p[c]:.0%}" for c in p.argsort(descending=True, stable=True).tolist())
        assert one.teacher == top
        own = one.key.partition("/")[0]
        assert one.label.startswith(own)
        mixed += one.label.endswith((", mixup", ", CutMix"))
    assert 0.4 * len(flat) < mixed < 0.95 * len(flat)
    kinds = {one.label.rpartition(", ")[2] for one in flat if " + " in one.label}
    assert kinds == {"mixup", "CutMix"}
    shares = [one.label.replace("%", "").split() for one in flat if " + " in one.label]
    assert all(int(words[1]) + int(words[4].rstrip(",")) in (99, 100, 101) for words in shares)


def test_the_choice_is_always_the_same_and_keys_can_be_named(experiment):
    recipe = cached("tiny.yaml", MIXED)
    first = [row[0].key for row in contents.seen(recipe, "train", 4, 1, [])]
    assert first == [row[0].key for row in contents.seen(recipe, "train", 6, 2, [])[:4]] and len(set(first)) == 4
    held = [key for number in range(4) for key in assemble.examples(recipe, "train").shard(number).keys]
    assert first != held[:4]
    named = contents.seen(recipe, "train", 4, 2, [held[7], held[0]])
    assert [[(one.key, one.view) for one in row] for row in named] == [
        [(held[7], 0), (held[7], 1)],
        [(held[0], 0), (held[0], 1)],
    ]
    with pytest.raises(DataError, match="^shards/tiny/train: has no example 'blue/99'; did you mean 'blue/"):
        contents.seen(recipe, "train", 4, 2, ["blue/99"])
    for path in ("one.png", "deep/two.png"):
        contents.sheet(Path(path), named, "a title with $signs$")
    assert Path("one.png").read_bytes() == Path("deep/two.png").read_bytes()
    with Image.open("one.png") as image:
        assert image.format == "PNG" and min(image.size) >= 300
        drawn = np.asarray(image.convert("RGB"))
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 100


def test_pixels_that_the_teacher_did_not_see_and_quarantined_examples_are_marked(experiment):
    recipe = cached("tiny.yaml", ["teacher.weights=null"])
    held = assemble.examples(recipe, "train").shard(0).keys
    other = (experiment / "pictures" / "red" / "00.png").read_bytes()
    forge_examples(recipe, "train", lambda key, members: {**members, "png": other} if key == held[1] else members)
    folder = places.signals_folder(recipe, "train")
    bad = {"key": held[2], "reason": "the teacher's logits of views [0] are not finite or too large for a row"}
    manifest.write_manifest(folder, {**manifest.read_manifest(folder), "quarantined": [bad]})
    rows = contents.seen(recipe, "train", 1, 8, held[:3])
    assert [{one.sound for one in row} for row in rows] == [{True}, {False}, {True}]
    assert {one.teacher for one in rows[2]} == {"quarantined"}
    assert contents.caption(rows[1][0], 2.0).endswith("NOT the pixels that the teacher saw")
    text = "\n".join(contents.in_words(recipe, contents.Folder("train", folder, manifest.read_manifest(folder))))
    assert f"1 quarantined\n    '{held[2]}': the teacher's logits of views [0] are not finite" in text


def test_maps_are_shown_over_their_views(scenery):
    recipe = load("scenes.yaml")
    cache_teacher.cache_teacher(recipe)
    [row] = contents.seen(recipe, "train", 1, 8, ["004"])
    [whole] = contents.seen(recipe, "val", 1, 8, [])
    assert len(row) == 2 and len(whole) == 1 and row[0].pixels.shape == (16, 24, 3)
    assert "ground " in row[0].label and "%" in row[0].teacher and row[0].sound
    # Half of each pixel is the colour of a class, of which the palette has a few.
    view = delivered(load("scenes.yaml", ["stages.distill.epochs=2"]), "distill")["004", 0][0]
    colours = {tuple(colour) for colour in (2 * row[0].pixels.astype(int) - view).reshape(-1, 3).tolist()}
    assert len({tuple(round(level / 128) for level in colour) for colour in colours}) <= 3
    wanted = {"split": "val", "examples": "1"}
    ended = CliRunner().invoke(
        app, ["inspect", "scenes.yaml", "--sheet", "s.png", *(x for k, v in wanted.items() for x in (f"--{k}", v))]
    )
    assert ended.exit_code == 0 and Path("s.png").stat().st_size > 1000
    lines = ended.stdout.splitlines()
    assert lines[-1] == "s.png: 1 examples of val" and "train/teacher" not in ended.stdout


def test_a_manifest_is_told_in_words(scenery):
    recipe = load("scenes.yaml")
    cache_teacher.cache_teacher(recipe)
    moment = 1_700_000_000
    for split in ("train", "val"):
        os.utime(places.signals_folder(recipe, split) / manifest.FILE_NAME, (moment, moment))
    made = contents.folders(recipe, None)
    text = "\n".join(contents.in_words(recipe, made["train"]))
    assert "  2 views of each example, 16 x 24, drawn with seed 0: brightness 0.2, crop_ratio " in text
    assert (
        "  stored: logits as fp16 at 4 x 6 places; high (high, 16 x 4 x 6, 6 components) as fp16; low (low, 8 x "
        in text
    )
    assert "  serves exactly: cross_entropy, " in text and "kd_pixel" in text
    total = sum(path.stat().st_size for path in places.signals_folder(recipe, "train").glob("*.tar"))
    assert f"  10 examples x 2 in 3 shards, {total / 1e6:.2f} MB; 0 quarantined\n" in text
    assert "  made on cpu, 8 views at a time, 1 threads: kd_dist " in text and f"torch {torch.__version__}"[:12] in text
    assert "\n  written 2023-11-1" in text
    assert "  one view of each example, 16 x 24, its centre or all of it" in "\n".join(
        contents.in_words(recipe, made["val"])
    )
    assert contents.folders(recipe, "val").keys() == {"val"}
    with pytest.raises(DataError, match="^there is no cache of split 'vall'; did you mean 'val'\\?$"):
        contents.folders(recipe, "vall")


@pytest.mark.slow
def test_recordings_are_shown_as_spectrograms_with_both_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("songs").mkdir()
    rows = ["file,valence,arousal"]
    for song in range(8):
        Path(f"songs/{song}.wav").write_bytes(encoded(tones(1.5, 8000, 200.0 + 100 * song), 8000))
        rows.append(f"{song}.wav,{song / 8 - 0.5:.3f},{0.5 - song / 8:.3f}")
    Path("songs/labels.csv").write_text("\n".join(rows) + "\n")
    Path("tunes.yaml").write_text(SONGS)
    recipe = load("tunes.yaml")
    journey.pack_recipe(recipe)
    cache_teacher.cache_teacher(recipe)
    ended = CliRunner().invoke(app, ["inspect", "tunes.yaml", "--sheet", "s.png", "--examples", "2", "--json"])
    assert ended.exit_code == 0 and Path("s.png").stat().st_size > 1000
    found = json.loads(ended.stdout)
    given = delivered(load("tunes.yaml", ["stages.taught.epochs=2"]), "taught")
    assert len(found["train"]["sheet"]) == 4 and "sheet" not in found["val"]
    for one in found["train"]["sheet"]:
        song = int(one["key"])
        assert one["label"] == f"valence {song / 8 - 0.5:.2f}, arousal {0.5 - song / 8:.2f}"
        values = given[one["key"], one["view"]][1].tolist()
        assert one["teacher"] == ", ".join(f"{n} {v:.2f}" for n, v in zip(("valence", "arousal"), values, strict=True))
    [row] = contents.seen(recipe, "train", 1, 1, [])
    assert row[0].pixels.shape == (16, 40, 1)
