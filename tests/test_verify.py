"""The live teacher against the cache: an honest cache passes, a wrong teacher or other pixels do not."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from kd_dist import assemble, cache_teacher, manifest, places
from kd_dist.cli import app
from kd_dist.config import load
from kd_dist.errors import ShardError
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
        content["teacher"]["weights_sha256"] = assemble.teacher_identity(cached)["weights_sha256"]
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
    cache = assemble.signals(seen, "train", assemble.examples(seen, "train"))
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
