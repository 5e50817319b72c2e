"""The live teacher against the cache: an honest cache passes, a wrong teacher or other pixels do not."""

import json

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from kd_dist import assemble, cache_teacher, manifest, views
from kd_dist.cli import app
from kd_dist.config import load
from kd_dist.recipe import Recipe
from kd_dist.verify import sentence, verify


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
        assert found["top_class_agreement"] == 1
        assert found["error"]["mean_kl_t1"] <= found["codec_error"]["mean_kl_t1"] + 1e-6
        assert sentence(found).endswith(": the cache is this teacher's")


def test_other_weights_behind_the_same_identity_are_found(cached):
    """As when the teacher's own code has changed: digest and manifest agree, the outputs do not."""
    weights = assemble.teacher(cached).network.backbone.state_dict()
    weights["4.bias"] = weights["4.bias"] + torch.tensor([1.0, 0.0, 0.0])
    save_file(weights, "teacher.safetensors")
    for split in assemble.splits(cached):
        folder = assemble.signals_folder(cached, split)
        content = manifest.read_manifest(folder)
        content["teacher"]["weights_sha256"] = assemble.teacher_identity(cached)["weights_sha256"]
        manifest.write_manifest(folder, content)
    found = verify(cached, "train", 16)
    assert not found["ok"] and found["other_pixels"] == []
    assert found["error"]["mean_kl_t1"] > 1e-3
    assert sentence(found).endswith("NOT this teacher's; cache it again")


def test_pixels_that_a_shifted_crop_changes_are_named(cached, monkeypatch):
    def shifted(image, view, size):
        return views.replay(image, view, size)[:, ::-1].copy()

    monkeypatch.setattr("kd_dist.verify.replay", shifted)
    found = verify(cached, "val", 4)
    assert not found["ok"] and len(found["other_pixels"]) == 4
    assert f"4 with other pixels than the teacher saw, first '{found['other_pixels'][0]}'" in sentence(found)


def test_the_command_ends_with_what_it_found(cached):
    words = ["verify", "tiny.yaml", "teacher.weights=teacher.safetensors", "--examples", "5", "--json"]
    good = CliRunner().invoke(app, words)
    assert good.exit_code == 0
    rows = json.loads(good.stdout)
    assert [row["split"] for row in rows] == ["train", "val", "test"] and all(row["ok"] for row in rows)
    folder = assemble.signals_folder(cached, "val")
    content = manifest.read_manifest(folder)
    content["codec_error"]["logits"]["mean_kl_t1"] = -1.0
    manifest.write_manifest(folder, content)
    bad = CliRunner().invoke(app, words)
    assert bad.exit_code == 1
    assert [row["ok"] for row in json.loads(bad.stdout)] == [True, False, True]
