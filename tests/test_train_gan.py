"""A generator learns from packed recordings; what it makes is packed, labelled by the teacher alone, and trained on."""

import json
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import done, kd_dist, run, sentence, start, wait_until
from recordings import encoded, tones
from trainings import scalars

from kd_dist import assemble, cache_teacher, places, train, train_gan
from kd_dist.config import load
from kd_dist.manifest import GENERATED, read_manifest
from kd_dist.models.gan import Discriminator, Gan, Generator, grids
from kd_dist.shards import Shard

RATE, SONGS, MELS, FRAMES = 8000, 12, 16, 40
RECIPE = f"""
name: tunes
task: {{name: regression, outputs: [valence, arousal]}}
audio: {{sample_rate: {RATE}, n_fft: 256, hop: 128, mels: {MELS}}}
data: {{source: audio_folder, root: songs, options: {{label_columns: [valence, arousal]}},
  splits: {{train: 0.7, val: 0.3}}, shard_size: 4, workers: 0}}
views: {{count: 2, size: [{MELS}, {FRAMES}], gain: 3, time_mask: 4}}
gan: {{share: 0.4, epochs: 4, batch_size: 4, width: 8, latent: 8}}
teacher:
  model: kd_dist/mobile_vit
  options: {{width: 32, blocks: 1, heads: 2, patch: 8}}
cache:
  features: {{tokens: {{tap: "grid(blocks.0)", pca: 4}}}}
student:
  model: kd_dist/mobile_vit
  options: {{width: 16, blocks: 1, heads: 2, patch: 8}}
  taps: {{tokens: "grid(blocks.0)"}}
stages:
  alone: {{losses: {{huber: {{weight: 1.0}}}}, epochs: 2, batch_size: 4, lr: 1e-3}}
  taught:
    losses: {{huber: {{weight: 0.5}}, kd_huber: {{weight: 0.5}}, cosine: {{weight: 0.1, features: [tokens]}}}}
    epochs: 2
    batch_size: 4
    lr: 1e-3
  more:
    losses: {{huber: {{weight: 0.5}}, kd_huber: {{weight: 0.5}}, cosine: {{weight: 0.1, features: [tokens]}}}}
    generated: true
    epochs: 2
    batch_size: 4
    lr: 1e-3
evaluate: {{split: val}}
"""


@pytest.fixture(scope="module")
def studio(tmp_path_factory) -> Path:
    """A folder with packed recordings and the recipe `tunes.yaml`."""
    folder = tmp_path_factory.mktemp("studio")
    (folder / "songs").mkdir()
    rows = ["file,valence,arousal"]
    for song in range(SONGS):
        wave = tones(1.5, RATE, 200.0 + 100 * song) * (0.2 + 0.05 * song)
        (folder / f"songs/{song}.wav").write_bytes(encoded(wave, RATE))
        rows.append(f"{song}.wav,{song / SONGS - 0.5:.3f},{0.5 - song / SONGS:.3f}")
    (folder / "songs/labels.csv").write_text("\n".join(rows) + "\n")
    (folder / "tunes.yaml").write_text(RECIPE)
    done(run(kd_dist, "pack", "tunes.yaml", folder=folder))
    return folder


def test_grids_halve_and_reach_any_size():
    assert grids((64, 512)) == [(4, 32), (8, 64), (16, 128), (32, 256), (64, 512)]
    assert grids((5, 9)) == [(5, 9)]
    for size in ((16, 40), (17, 61)):
        made = Generator(8, 8, size)(torch.randn(3, 8))
        assert made.shape == (3, 1, *size) and made.abs().max() <= 1
        assert Discriminator(8, size)(made).shape == (3,)


def test_instance_noise_falls_to_its_floor():
    found = [train_gan.noise_at(share, (0.1, 0.02)) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert found == pytest.approx([0.1, 0.06, 0.02, 0.02, 0.02])
    assert train_gan.noise_at(0.1, (0.0, 0.0)) == 0


def test_an_epoch_that_was_stopped_has_the_means_of_all_its_steps():
    steps = [{"loss_g": torch.tensor(1.0), "d_real": torch.tensor(0.5)}, {"loss_g": torch.tensor(4.0)}]
    whole, first = train_gan.Sums(), train_gan.Sums()
    first.add(steps[0])
    rest = train_gan.Sums(json.loads(json.dumps(first.state())))
    rest.add(steps[1])
    for one in steps:
        whole.add(one)
    assert rest.means() == whole.means() == {"loss_g": 2.5, "d_real": 0.5}


def test_a_step_of_one_network_leaves_the_other_alone():
    torch.manual_seed(0)
    gan = Gan(8, 8, (MELS, FRAMES))
    optimizer = train_gan.optimizer_of(gan, 1e-2)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 5e-3]
    for network, other in ((gan.generator, gan.discriminator), (gan.discriminator, gan.generator)):
        before = {name: value.clone() for name, value in other.named_parameters()}
        mine = [value.clone() for value in network.parameters()]
        with torch.no_grad():
            fake = gan.generator(torch.randn(4, 8))
        levels = gan.generator(torch.randn(4, 8)) if network is gan.generator else fake
        other.requires_grad_(False)
        train_gan.take(network, optimizer, train_gan.against(gan.discriminator(levels), 0.9), 0)
        other.requires_grad_(True)
        assert all(value.equal(before[name]) for name, value in other.named_parameters())
        assert not all(one.equal(two) for one, two in zip(mine, network.parameters(), strict=True))


def test_a_gradient_that_is_not_finite_is_one_sentence():
    gan = Gan(8, 8, (MELS, FRAMES))
    loss = gan.discriminator(torch.full((2, 1, MELS, FRAMES), torch.nan)).sum()
    with pytest.raises(train_gan.TrainingError, match=r"^train-gan: the gradient of step 7 is not finite; lower"):
        train_gan.take(gan.discriminator, train_gan.optimizer_of(gan, 1e-3), loss, 7)


@pytest.fixture(scope="module")
def generated(studio) -> Path:
    """The studio after its generator was trained."""
    done(run(kd_dist, "train-gan", "tunes.yaml", folder=studio))
    return studio


@pytest.mark.slow
def test_what_a_generator_makes_is_its_share_of_examples_without_labels(generated, monkeypatch):
    monkeypatch.chdir(generated)
    recipe = load("tunes.yaml", [])
    packed, made = assemble.examples(recipe, "train"), assemble.examples(recipe, GENERATED)
    assert len(made) == round(0.4 / 0.6 * len(packed)) and 0.35 < len(made) / (len(made) + len(packed)) < 0.45
    decode = assemble.task(recipe).decode
    shards = [made.shard(number) for number in range(len(made.paths))]
    examples = [decode(shard.key(place), shard.read(place)) for shard in shards for place in range(len(shard))]
    assert len(examples) == len(made) == len({one.key for one in examples})
    assert len({one.image.tobytes() for one in examples}) == len(made)
    assert all(one.image.shape == (MELS, FRAMES, 1) and np.isnan(one.target).all() for one in examples)
    folder = places.generator_folder(recipe)
    pictures = sorted(folder.glob("samples-*.png"))
    assert len(pictures) == 4 and min(Image.open(pictures[-1]).size) > 2 * MELS
    logged = scalars(folder)
    assert {"gan/d_real", "gan/d_fake", "gan/loss_d", "gan/loss_g", "gan/spread"} <= logged.keys()
    assert len(logged["gan/d_real"]) == 4
    again = run(kd_dist, "train-gan", "tunes.yaml", folder=generated)
    done(again)
    assert f"train-gan: done before, {len(made)} examples" in again.stderr


@pytest.mark.slow
def test_a_generator_that_was_stopped_goes_on_to_the_same_examples(generated, tmp_path):
    words = ["tunes.yaml", f"runs={tmp_path}/runs", f"data.shards={tmp_path}/shards"]
    done(run(kd_dist, "pack", *words, folder=generated))
    child = start(kd_dist, "train-gan", *words, "gan.epochs=4", folder=generated)
    where = tmp_path / "runs/tunes/generator/seed-0"
    wait_until(lambda: where.is_dir() and any(where.glob("samples-*.png")), "the first part of the training")
    child.send(signal.SIGTERM)
    ended = child.wait()
    assert ended.status == 0 and "train-gan: stopped by SIGTERM" in ended.stderr, ended
    done(run(kd_dist, "train-gan", *words, folder=generated))
    one, two = (read_manifest(folder / "shards/tunes" / GENERATED) for folder in (generated, tmp_path))
    assert one["shards"] == two["shards"] and one["complete"] and two["complete"]


@pytest.mark.slow
def test_another_share_takes_more_of_the_same_generator(generated, tmp_path):
    shutil.copytree(generated / "runs", tmp_path / "runs")
    shutil.copytree(generated / "shards", tmp_path / "shards")
    folder = tmp_path / "shards/tunes" / GENERATED
    few = len(read_manifest(folder)["shards"]), read_manifest(folder)["examples"]
    words = ["tunes.yaml", f"runs={tmp_path}/runs", f"data.shards={tmp_path}/shards", "gan.share=0.7"]
    assert "made with source.options.share = 0.4" in sentence(run(kd_dist, "train-gan", *words, folder=generated))
    shutil.rmtree(folder)
    ended = run(kd_dist, "train-gan", *words, folder=generated)
    done(ended)
    assert "goes on from" in ended.stdout and "epoch" not in ended.stdout  # nothing was left to train
    more = read_manifest(folder)
    assert more["examples"] > few[1] and len(more["shards"]) > few[0]
    first = [
        shard.read(0)
        for shard in (Shard(one / "data-000000.tar") for one in (folder, generated / "shards/tunes" / GENERATED))
    ]
    assert first[0] == first[1]


@pytest.mark.slow
def test_recordings_that_cannot_be_read_are_not_learnt_from_as_silence(studio, tmp_path):
    words = ["tunes.yaml", f"runs={tmp_path}/runs", f"data.shards={tmp_path}/shards", "data.on_error=replace_masked"]
    done(run(kd_dist, "pack", *words, folder=studio))
    shard = tmp_path / "shards/tunes/train/data-000000.tar"
    payload = bytearray(shard.read_bytes())
    payload[512 : 512 + 64] = bytes(64)  # of the first example's levels
    shard.write_bytes(payload)
    ended = run(kd_dist, "train-gan", *words, "gan.batch_size=2", folder=studio)
    done(ended)
    warned = re.findall(r"warning: train-gan: step \d+ goes without an example: .*damaged", ended.stderr)
    assert len(warned) == 4  # once an epoch
    shutil.rmtree(tmp_path / "shards/tunes/generated")
    more = [*words, f"runs={tmp_path}/other", "data.error_limit=1"]
    shard.write_bytes(bytes(len(payload)))  # all four
    said = sentence(run(kd_dist, "train-gan", *more, folder=studio))
    assert re.match(r"train-gan: [234] recordings of an epoch could not be read, more than data.error_limit 1; ", said)


@pytest.mark.slow
def test_a_student_learns_from_both_and_the_report_says_whether_it_helped(generated, monkeypatch):
    done(run(cache_teacher.main, ["tunes.yaml"], folder=generated))
    for stage in ("alone", "taught"):
        done(run(train.main, ["tunes.yaml", "--stage", stage], folder=generated))
    done(run(kd_dist, "run", "tunes.yaml", folder=generated))  # launches the last one
    folder = generated / "shards/tunes"
    about = {split: read_manifest(folder / split / "teacher") for split in ("train", GENERATED)}
    assert about["train"]["codec"]["bases_sha256"] == about[GENERATED]["codec"]["bases_sha256"] is not None
    seen = [about[split]["feature_report"]["tokens"] for split in about]
    assert seen[0]["relative_error"] != seen[1]["relative_error"]
    assert "kept_variance" in seen[0] and "kept_variance" not in seen[1]  # fitted on the first alone
    assert about[GENERATED]["views"]["count"] == 2 and about[GENERATED]["teacher_report"]["labelled"] == 0
    proof = run(kd_dist, "verify", "tunes.yaml", "--examples", "4", folder=generated)
    done(proof)
    assert proof.stdout.count("the cache is this teacher's") == 3
    report = json.loads((generated / "runs/tunes/report.json").read_text())
    pairs = [(one["stage"], one["against"], one["generated"]) for one in report["gains"]]
    assert pairs == [("taught", "alone", False), ("more", "alone", False), ("more", "taught", True)]
    said = (generated / "runs/tunes/report.md").read_text()
    with_them, without = (
        json.loads((generated / f"runs/tunes/{stage}/seed-0/result.json").read_text())["steps"]
        for stage in ("more", "taught")
    )
    assert with_them > without
    assert f"`more` against `taught`, which has no generated examples, {with_them} steps against {without}: " in said
    monkeypatch.chdir(generated)
    second = "teachers.other={model: kd_dist/mobile_vit, options: {width: 16, blocks: 1, heads: 2, patch: 8}}"
    recipe = load("tunes.yaml", [second, "stages.more.teachers=[teacher, other]"])
    cache_teacher.cache_teacher(recipe)
    corridor, live = assemble.training_corridor(recipe, "more", 0, 1), assemble.online_teacher(recipe, "more")
    both = [corridor[cursor] for cursor in range(corridor.plan.steps_per_epoch)]
    assert sum(key.startswith("generated") for batch in both for key in batch.keys) > 4
    for batch in both:
        torch.testing.assert_close(batch.signals.logits, live(batch.images).logits, atol=1e-5, rtol=0)
    other = run(kd_dist, "train", "tunes.yaml", "--stage", "more", "gan.seed=1", folder=generated)
    assert "generated: was made with source.options.seed = 0, the recipe says 1; " in sentence(other)


@pytest.mark.slow
def test_generated_examples_that_are_not_there_are_one_sentence(studio, tmp_path):
    words = ["tunes.yaml", f"runs={tmp_path}/runs", f"data.shards={tmp_path}/shards"]
    done(run(kd_dist, "pack", *words, folder=studio))
    for function, more in ((cache_teacher.main, []), (train.main, ["--stage", "more"])):
        said = sentence(run(function, [*words, *more], folder=studio))
        assert said.endswith("/tunes/generated: no example shards; run `kd-dist train-gan` first"), said
    assert (tmp_path / "shards/tunes/train").is_dir() and not (tmp_path / "shards/tunes/train/teacher").exists()
    assert sentence(run(kd_dist, "train-gan", *words, "gan=null", "stages.more.generated=false", folder=studio)) == (
        "tunes: has no section `gan`; add `gan: {}`, and `generated: true` to a stage"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gan=null"], "stages.more.generated: needs the section `gan`, which says how examples are generated"),
        (["stages.alone.generated=true"], "stages.alone.generated: generated examples have no labels; they are for"),
        (
            ["stages.more.losses={huber: {}, ail: {}, teacher_bounded: {}}"],
            "stages.more.generated: generated examples have no labels; they are for a student with a loss that",
        ),
        (["stages.more.shards=1"], "stages.more.shards: is for a part of the packed examples, and generated ones are"),
        (["gan.batch_size=1"], "gan.batch_size: must be a whole number, at least 2, not 1"),
        (["audio.mels=1", f"views.size=[1, {FRAMES}]"], "gan: needs views of two bands and two frames at least"),
        (["gan.labels=[0.1, 0.9]"], "gan.labels: recordings must be called more than samples, not [0.1, 0.9]"),
        (["gan.noise=[0.01, 0.1]"], "gan.noise: must not grow, from 0.01 to 0.1"),
        (["gan.share=1"], "gan.share: must be a number, between 0 and 1, not 1"),
        (["gan.width=12"], "gan.width: must be a whole number, a multiple of 8, not 12"),
        (["data.splits={train: 0.5, val: 0.2, generated: 0.3}"], "data.splits.generated: is the name of generated"),
        (
            ["audio=null", "views.gain=0", "views.time_mask=0"],
            "gan: is for regression from recordings: only there an example may have no label",
        ),
    ],
)
def test_a_recipe_whose_generator_makes_no_sense_is_refused(tmp_path, words, said):
    (tmp_path / "tunes.yaml").write_text(RECIPE)
    load(tmp_path / "tunes.yaml", [])
    with pytest.raises(train_gan.RecipeError) as caught:
        load(tmp_path / "tunes.yaml", words)
    assert said in str(caught.value)


def test_no_stage_has_the_name_of_the_generators_folder(tmp_path):
    (tmp_path / "tunes.yaml").write_text(RECIPE.replace("  alone:", "  generator:"))
    with pytest.raises(train_gan.RecipeError, match="stages.generator: is the name of the generator's folder; take"):
        load(tmp_path / "tunes.yaml", [])
