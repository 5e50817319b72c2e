"""The manifest: written whole, read strictly, compared value by value."""

import hashlib
import importlib
import json
import os
import platform

import pytest

import kd_dist
from kd_dist.errors import ShardError
from kd_dist.manifest import (
    ABSENT,
    FILE_NAME,
    digest,
    fingerprint,
    first_difference,
    plain,
    read_manifest,
    shard_entry,
    versions,
    write_manifest,
)
from kd_dist.shards import Shard, shard_path, write_shard

CONTENT = {"kind": "examples", "shards": [{"name": "data-000000.tar", "sha256": "ab", "examples": 2}], "note": "schön"}


def test_what_is_written_is_read(tmp_path):
    folder = tmp_path / "pets" / "train"
    write_manifest(folder, CONTENT)
    assert read_manifest(folder) == {**CONTENT, "format": "kd_dist", "version": 2}
    assert os.listdir(folder) == [FILE_NAME] == ["manifest.json"]


def test_the_mark_of_the_format_is_always_ours(tmp_path):
    write_manifest(tmp_path, {"version": 7, "format": "other"})
    assert read_manifest(tmp_path) == {"format": "kd_dist", "version": 2}


def test_the_bytes_are_sorted_ascii_and_end_with_a_newline(tmp_path):
    write_manifest(tmp_path, CONTENT)
    first = (tmp_path / FILE_NAME).read_bytes()
    write_manifest(tmp_path, dict(reversed(CONTENT.items())))
    assert (tmp_path / FILE_NAME).read_bytes() == first
    assert first.isascii() and first.startswith(b'{\n "format": "kd_dist",\n "kind"') and first.endswith(b"\n}\n")


def test_a_read_manifest_can_be_written_back(tmp_path):
    write_manifest(tmp_path, CONTENT)
    before = (tmp_path / FILE_NAME).read_bytes()
    write_manifest(tmp_path, read_manifest(tmp_path))
    assert (tmp_path / FILE_NAME).read_bytes() == before


@pytest.mark.parametrize("content", [{"loss": float("nan")}, {"what": object()}])
def test_a_manifest_that_cannot_be_written_keeps_the_old_one(tmp_path, content):
    write_manifest(tmp_path, CONTENT)
    with pytest.raises((ValueError, TypeError), match="not JSON"):
        write_manifest(tmp_path, content)
    assert os.listdir(tmp_path) == [FILE_NAME]
    assert read_manifest(tmp_path)["kind"] == "examples"


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "there is no manifest, so these shards are not finished; run kd-dist pack .* or kd-dist cache-teacher"),
        (b"", "the manifest is damaged .*; delete it and run kd-dist pack"),
        (b'{"format": "kd_dist", "ver', "the manifest is damaged"),
        (b'{"format": "\xff"}', "the manifest is damaged"),
        (b"[]", "this is not a manifest of kd_dist"),
        (b"{}", "this is not a manifest of kd_dist"),
        (b'{"format": "other", "version": 1}', "this is not a manifest of kd_dist"),
        (b'{"format": "kd_dist"}', "has version None and this kd_dist reads version 2"),
        (b'{"format": "kd_dist", "version": true}', "has version True and this kd_dist reads version 2"),
        (b'{"format": "kd_dist", "version": 1}', "has version 1 and this kd_dist reads version 2; install the kd_dist"),
    ],
)
def test_what_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / FILE_NAME).write_bytes(text)
    with pytest.raises(ShardError, match=f"manifest.json: .*{message}"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "ours, theirs, difference",
    [
        ({}, {}, None),
        ({"a": 1, "b": {"c": [1, {"d": 2}]}}, {"b": {"c": [1, {"d": 2}]}, "a": 1.0}, None),
        ({"size": (3, 4)}, {"size": [3, 4]}, None),
        ({"a": 1}, {"a": 2}, ("a", 1, 2)),
        ({"a": 1}, {"a": True}, ("a", 1, True)),
        ({"a": None}, {}, ("a", None, ABSENT)),
        ({}, {"a": None}, ("a", ABSENT, None)),
        ({"a": {}}, {"a": []}, ("a", {}, [])),
        ({"a": {}}, {"a": {"b": 1}}, ("a.b", ABSENT, 1)),
        ({"a": "10"}, {"a": ["1", "0"]}, ("a", "10", ["1", "0"])),
        ({"b": 1, "a": {"z": 1}}, {"b": 2, "a": {"z": 2}}, ("a.z", 1, 2)),
        ({"a": {"b": [1, {"c": 2}]}}, {"a": {"b": [1, {"c": 3}]}}, ("a.b.1.c", 2, 3)),
        ({"a": [1, 2]}, {"a": [1]}, ("a.1", 2, ABSENT)),
        ({"a": list(range(12))}, {"a": [*range(2), 9, *range(3, 10), 8, 8]}, ("a.2", 2, 9)),
    ],
)
def test_first_difference(ours, theirs, difference):
    assert first_difference(ours, theirs) == difference
    mirrored = difference and (difference[0], difference[2], difference[1])
    assert first_difference(theirs, ours) == mirrored


def test_versions_are_those_that_run():
    found = versions()
    modules = {"numpy": "numpy", "pillow": "PIL", "torch": "torch", "webdataset": "webdataset"}
    assert found.keys() == {"python", "kd_dist", *modules}
    assert found["python"] == platform.python_version() and found["kd_dist"] == kd_dist.__version__
    for library, module in modules.items():
        running = importlib.import_module(module).__version__
        assert running.partition("+")[0] == found[library].partition("+")[0]


def test_plain_values_compare_with_a_manifest(tmp_path):
    value = {"size": (3, 4), "name": "ü", "nested": [{"scale": (0.5, 1.0)}]}
    write_manifest(tmp_path, {"views": value})
    assert read_manifest(tmp_path)["views"] == plain(value) != value


def test_a_digest_is_of_the_value_not_of_its_order():
    assert digest({"b": [1, "ü"], "a": None}) == digest({"a": None, "b": [1, "ü"]})
    assert digest({"b": [1, "ü"], "a": None}) == hashlib.sha256(b'{"a":null,"b":[1,"\\u00fc"]}').hexdigest()
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest(float("inf"))


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"name": 3}, "shards.{}.name is no str"),
        ({"sha256": None}, "shards.{}.sha256 is no str"),
        ({"examples": True}, "shards.{}.examples is no int"),
        ({"name": "../x.tar"}, "no folder has a shard '../x.tar' of 2 examples"),
        ([], "shards.{} is no dict"),
    ],
)
def test_one_shard_among_others_that_makes_no_sense_is_named(tmp_path, number, wrong, sentence):
    rows = [{"name": f"data-{n:06d}.tar", "sha256": "ab", "examples": 2} for n in range(3)]
    about = {"kind": "examples", "complete": True, "split": "train", "task": "classification", "classes": 2}
    about |= {"class_names": ["a", "b"], "quarantined": [], "versions": {}, "shards": rows}
    write_manifest(tmp_path, about)
    assert read_manifest(tmp_path)["shards"] == rows
    rows[number] = {**rows[number], **wrong} if wrong else wrong
    write_manifest(tmp_path, about)
    with pytest.raises(ShardError, match=f"the manifest makes no sense: {sentence.format(number)}"):
        read_manifest(tmp_path)
    del about["shards"][number]
    write_manifest(tmp_path, {**about, "shards": [*rows, {"name": "data-000003.tar", "examples": 2}]})
    with pytest.raises(ShardError, match="shards.2.sha256 is no str"):
        read_manifest(tmp_path)


def test_the_fingerprint_is_of_the_shards(tmp_path):
    path = shard_path(tmp_path, "data", 0)
    write_shard(path, [("a", {"png": b"1"}), ("b", {"png": b"2"})], {})
    entry = shard_entry(Shard(path))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert entry == {"name": "data-000000.tar", "sha256": sha256, "examples": 2}
    mark = fingerprint({"shards": [entry], "versions": "any"})
    assert mark == hashlib.sha256(json.dumps([entry], sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    others = [{**entry, "sha256": "0" * 64}, {**entry, "examples": 3}, {**entry, "name": "data-000001.tar"}]
    assert len({mark, *(fingerprint({"shards": [other]}) for other in others), fingerprint({"shards": []})}) == 5
