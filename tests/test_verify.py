"""The live teacher against the cache: an honest cache passes, a wrong teacher or other pixels do not."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from forgeries import forge_examples, forge_signals
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from kd_dist import assemble, cache_teacher, caches, manifest, places
from kd_dist.cli import app
from kd_dist.config import load
from kd_dist.data import CHECK_ONE_IN
from kd_dist.errors import MismatchError, ShardError
from kd_dist.inputs import images
from kd_dist.recipe import Recipe
from kd_dist.shards import Shard, write_shard
from kd_dist.signals import pack_rows, to_npy
from kd_dist.verify import FEATURE_TOLERANCE, sentence, verify
from kd_dist.views.images import ImageViews, replay


@pytest.fixture
def cached(packed) -> Recipe:
    """The tiny recipe with examples and with signals of a random teacher whose weights are a file."""
    network = assemble.network(packed, "teacher", None, 0)
    save_file(network.backbone.state_dict(), "teacher.safetensors")
    recipe = load("tiny.yaml", ["teacher.weights=teacher.safetensors"])
    cache_teacher.cache_teacher(recipe)
    return recipe


def test_an_honest_cache_passes(cached):
    for split, sample in (("train", 10), ("train", 10**6), ("val", 3)):
        found = verify(cached, split, sample)
        assert found["ok"] and found["other_pixels"] == []
        assert found["examples"] == min(sample, len(assemble.examples(cached, split)))
        assert found["error"]["top_class_agreement"] == 1 and found["features"] == {}
        assert found["error"]["mean_kl_t1"] <= found["codec_error"]["mean_kl_t1"] + 1e-6
        assert sentence(found).endswith(": the cache is this teacher's")


def test_other_weights_behind_the_same_identity_are_found(cached):
    """As when the teacher's own code has changed: digest and manifest agree, the outputs do not."""
    weights = assemble.teacher(cached).network.backbone.state_dict()
    weights["4.bias"] = weights["4.bias"] + torch.tensor([1.0, 0.0, 0.0])
    save_file(weights, "teacher.safetensors")
    for split in places.splits(cached):
        folder = places.signals_folder(cached, split)
        content = manifest.read_manifest(folder)
        content["teacher"]["weights_sha256"] = caches.teacher_identity(cached)["weights_sha256"]
        manifest.write_manifest(folder, content)
    found = verify(cached, "train", 16)
    assert not found["ok"] and found["other_pixels"] == []
    assert found["error"]["mean_kl_t1"] > 1e-3
    assert sentence(found).endswith("NOT this teacher's; cache it again")


def test_pixels_that_a_shifted_crop_changes_are_named(cached, monkeypatch):
    def shifted(policy, image, view):
        return replay(image, view, policy.size)[:, ::-1].copy()

    monkeypatch.setattr(ImageViews, "replay", shifted)
    found = verify(cached, "val", 4)
    assert not found["ok"] and len(found["other_pixels"]) == 4
    assert f"4 with other pixels than the teacher saw, first '{found['other_pixels'][0]}'" in sentence(found)


def test_the_command_ends_with_what_it_found(cached):
    words = ["verify", "tiny.yaml", "teacher.weights=teacher.safetensors", "--examples", "5", "--json"]
    good = CliRunner().invoke(app, words)
    assert good.exit_code == 0
    rows = json.loads(good.stdout)
    assert [row["split"] for row in rows] == ["train", "val", "test"] and all(row["ok"] for row in rows)
    folder = places.signals_folder(cached, "val")
    content = manifest.read_manifest(folder)
    content["codec_error"]["logits"]["mean_kl_t1"] = -1.0
    manifest.write_manifest(folder, content)
    bad = CliRunner().invoke(app, words)
    assert bad.exit_code == 1
    assert [row["ok"] for row in json.loads(bad.stdout)] == [True, False, True]


# ---------------------------------------------------------------------------------------------- other pixels


def trained_on(recipe: Recipe, stage: str = "distill") -> None:
    """Read what a stage reads in so many epochs that every example's pixels are checked once."""
    corridor = assemble.training_corridor(recipe, stage, 0, 1)
    assert corridor.epochs >= CHECK_ONE_IN
    for cursor in range(len(corridor)):
        corridor[cursor]


def other_decoder(payload: bytes | memoryview) -> np.ndarray:
    """Pillow with its own conversion of colours in place of the JPEG library's: off by one level here and there."""
    with Image.open(io.BytesIO(payload)) as image:
        image.draft("YCbCr", image.size)
        return np.asarray(image.convert("RGB"))


def test_another_librarys_decode_is_found_by_verify_and_by_training(seen, monkeypatch):
    examples = assemble.examples(seen, "train")
    for place in range(4):  # it really differs, by so little that no eye would see it
        payload = examples.shard(0).read(place)["jpg"]
        gap = np.abs(images.decode_image(payload).astype(int) - other_decoder(payload))
        assert gap.max() == 1 and 0.2 < (gap > 0).mean() < 0.8
    monkeypatch.setattr(images, "decoded", other_decoder)
    found = verify(seen, "train", 64)
    assert not found["ok"] and sorted(found["other_pixels"]) == sorted(
        key for number in range(3) for key in examples.shard(number).keys
    )
    # What the teacher says hardly tells: the CRC does.
    assert found["error"]["top_class_agreement"] > 0.97 and found["error"]["mean_kl_t1"] < 1e-4
    assert "10 with other pixels than the teacher saw, first '" in sentence(found)
    with pytest.raises(
        MismatchError, match="its pixels have CRC [0-9a-f]{8}, the teacher saw [0-9a-f]{8} .* run `kd-dis"
    ):
        trained_on(load("scenes.yaml", ["stages.distill.epochs=16"]))


def test_pictures_that_a_library_has_encoded_again_are_found(seen):
    """Every CRC, digest and fingerprint of the shards fits: only the pixels are not those that the teacher saw."""

    def again(key: str, members: dict[str, bytes]) -> dict[str, bytes]:
        if key != "003":
            return members
        buffer = io.BytesIO()
        Image.open(io.BytesIO(members["jpg"])).save(buffer, "JPEG", quality=95)
        assert buffer.getvalue() != members["jpg"]
        return {**members, "jpg": buffer.getvalue()}

    forge_examples(seen, "train", again)
    found = verify(seen, "train", 64)
    assert not found["ok"] and found["other_pixels"] == ["003"]
    with pytest.raises(MismatchError, match="example '003': its pixels have CRC "):
        trained_on(load("scenes.yaml", ["stages.distill.epochs=16"]))


def test_a_stored_crop_that_is_shifted_by_a_pixel_is_found_and_the_command_says_so(seen):
    """The row's own CRC, the shard's and the manifest's are right."""

    def shifted(key: str, rows: np.ndarray) -> np.ndarray:
        rows = rows.copy()
        if key == "005":
            inside = rows["view"]["left"] > 0
            rows["view"]["left"] += np.where(inside, -1, 1).astype(np.uint16)
            rows["view"]["width"] -= np.where(inside, 0, 1).astype(np.uint16)
        return rows

    def untouched(key: str, rows: np.ndarray) -> np.ndarray:
        return rows

    forge_signals(seen, "train", untouched)
    assert verify(seen, "train", 64)["ok"]
    forge_signals(seen, "train", shifted)
    ended = CliRunner().invoke(app, ["verify", "scenes.yaml"])
    assert ended.exit_code == 1
    train, val = ended.stdout.splitlines()
    assert "; 1 with other pixels than the teacher saw, first '005': NOT this teacher's; cache it again" in train
    for signal in ("mean KL ", "nat (codec ", "largest difference ", ", high off by ", ", low off by "):
        assert signal in train
    assert val.endswith(": the cache is this teacher's") and "off by" not in val
    with pytest.raises(MismatchError, match="example '005': its pixels have CRC "):
        trained_on(load("scenes.yaml", ["stages.distill.epochs=16"]))


def test_signals_of_a_wrong_teacher_end_the_command_with_their_errors(seen):
    """What is stored is another teacher's, drawn at random, under this one's name."""
    random = np.random.default_rng(0)

    def others(key: str, rows: np.ndarray) -> np.ndarray:
        rows = rows.copy()
        rows["logits"] = -random.random(rows["logits"].shape, np.float32) * 5
        return rows

    forge_signals(seen, "train", others)
    ended = CliRunner().invoke(app, ["verify", "scenes.yaml", "--json"])
    assert ended.exit_code == 1
    train, val = json.loads(ended.stdout)
    assert (train["ok"], val["ok"]) == (False, True) and train["other_pixels"] == []
    assert train["error"]["mean_kl_t1"] > 0.1 and train["codec_error"]["mean_kl_t1"] < 1e-6
    assert all(one["relative_error"] < 1e-3 for one in train["features"].values())


# ---------------------------------------------------------------------------------------------- features


TWISTED = """\
from scene_model import network as straight
from torch import nn


class Twist(nn.Conv2d):
    def forward(self, images):
        return -super().forward(images)


class Negative(nn.Module):
    def forward(self, values):
        return -values


def network(classes, width=4):
    parts = straight(classes, width)
    parts.low.__class__ = Twist
    parts.act = nn.Sequential(Negative(), nn.ReLU())
    return parts
"""


@pytest.fixture
def seen(scenery) -> Recipe:
    """The tiny segmentation experiment, cached with features."""
    recipe = load("scenes.yaml")
    cache_teacher.cache_teacher(recipe)
    return recipe


def test_features_of_an_honest_cache_are_what_their_codec_makes_of_the_live_ones(seen):
    found = verify(seen, "train", 64)
    assert found["ok"] and found["examples"] == 10 and found["features"].keys() == {"high", "low"}
    for one in found["features"].values():
        assert one["relative_error"] <= 1e-3 and one["cosine"] == pytest.approx(1, abs=1e-5)
    assert "high off by " in sentence(found) and "low off by " in sentence(found)
    assert verify(seen, "val", 64)["features"] == {}
    one = load("scenes.yaml", ["cache.features={high: {tap: high, pca: 6, store: fp16}}", "student.taps={high: high}"])
    assert verify(one, "train", 64)["features"].keys() == {"high"}


def test_features_of_other_weights_are_found_and_named(seen):
    """The logits agree: only what is tapped has changed its sign, and the next layer makes up for it."""
    Path("twisted_model.py").write_text(TWISTED)
    folder = places.signals_folder(seen, "train")
    other = load("scenes.yaml", ["teacher.model=twisted_model:network"])
    content = manifest.read_manifest(folder)
    content["teacher"]["model"] = other.teacher.model
    manifest.write_manifest(folder, content)
    found = verify(other, "train", 64)
    assert found["error"]["mean_kl_t1"] < 1e-6 and not found["ok"]
    assert found["features"]["low"]["relative_error"] > 1 and found["features"]["high"]["relative_error"] < 1e-3
    assert f"low off by {found['features']['low']['relative_error']:.1e}: NOT this teacher's" in sentence(found)


def test_a_feature_that_was_tampered_with_is_found(seen):
    """One example's `low` is scaled by 0.5 in a shard that is written anew, every CRC and digest right."""
    folder = places.signals_folder(seen, "train")
    cache = caches.signals(seen, "train", assemble.examples(seen, "train"))
    path, old = cache.paths[1], Shard(cache.paths[1])
    examples = []
    for place, key in enumerate(old.keys):
        rows = cache.rows(np.array([4 + place] * 2), np.arange(2))
        fields = {name: rows[name].copy() for name in rows.dtype.names[3:]}
        if place == 2:
            fields["low_scale"] *= np.float16(0.5)
        packed = pack_rows(cache.dtype, rows["view"], rows["input_crc"], fields)
        examples.append((key, {"teacher.npy": to_npy(packed)}))
    write_shard(path, examples, old.notes)
    with pytest.raises(ShardError, match="signals-000001.tar: is missing or damaged, its sha256 is not the manifest's"):
        verify(seen, "train", 64)
    content = manifest.read_manifest(folder)
    content["shards"][1] = manifest.shard_entry(Shard(path))
    manifest.write_manifest(folder, content)
    found = verify(seen, "train", 64)
    assert not found["ok"] and found["features"]["low"]["relative_error"] > FEATURE_TOLERANCE
    assert found["features"]["high"]["relative_error"] <= 1e-3 and found["error"]["mean_kl_t1"] < 1e-6
