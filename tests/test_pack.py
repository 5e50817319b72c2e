"""Packing: what is packed, what is left out and why, and what a second run does."""

import dataclasses
import errno
import json
import os
import random
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from conftest import CLASSES, pack_examples, picture

from kd_dist import assemble, journey, manifest, places
from kd_dist.config import load
from kd_dist.data import Shards, read_examples
from kd_dist.errors import DataError, KdError, MismatchError, RecipeError, ShardError, one_sentence
from kd_dist.inputs.spectrograms import LogMel, Spectrograms
from kd_dist.pack import assign, choose_split, item_key, listing_digest, pack
from kd_dist.shards import index_tar
from kd_dist.sources import Item
from kd_dist.tasks import Classification, Regression

FRACTIONS = {"train": 0.6, "val": 0.2, "test": 0.2}

OWN_SOURCE = '''\
"""A user's own source: pictures of one colour, and one item that is as the test wants it."""

import io
import os
import signal
import pathlib
from PIL import Image
from kd_dist.sources import Item, Listing


def png(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (colour, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def read(number, die_at):
    if number == die_at and pathlib.Path("deadly").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    if number == die_at and pathlib.Path("stopping").exists():
        os.kill(os.getpid(), signal.Signals[pathlib.Path("stopping").read_text()])
    if number == die_at and pathlib.Path("broken").exists():
        raise ZeroDivisionError("the user's own")
    return png(number)


def listing(count: int = 20, die_at: int = -1, labels: str = "", twice: bool = False):
    items = [Item(f"{n:03d}", "train", "png", n % 2, lambda n=n: read(n, die_at)) for n in range(count)]
    if labels:
        values = [float("nan"), 0.5, True, "cat", 2, -1, None, 1.0]
        items += [Item(f"label-{n}", "train", "png", value, lambda: png(0)) for n, value in enumerate(values)]
    return Listing(("even", "odd"), items + items[:1] if twice else items)
'''


@pytest.fixture
def own(experiment) -> Path:
    (experiment / "own_pictures.py").write_text(OWN_SOURCE)
    return experiment


def pack_own(folder: Path, shard_size: int = 4, classes: int = 2, **options) -> dict:
    given = {"source": "own_pictures:listing", "root": None, "options": options, "fractions": FRACTIONS}
    return pack(folder, **given, required=["train"], task=Classification(classes), shard_size=shard_size)["train"]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def items(*names: str) -> list[Item]:
    return [Item(name, None, "png", 0, bytes) for name in names]


def examples(recipe, split: str) -> list:
    shards = assemble.examples(recipe, split)
    return read_examples(shards, np.arange(len(shards)), assemble.task(recipe).decode)


# ------------------------------------------------------------------------------------------------ what is packed


def test_every_picture_once_with_its_label(packed, pictures):
    found = {split: examples(packed, split) for split in FRACTIONS}
    keys = [example.key for some in found.values() for example in some]
    assert sorted(keys) == sorted(f"{name}/{number:02d}" for name in CLASSES for number in range(16))
    for some in found.values():
        assert some
        for example in some:
            name, number = example.key.split("/")
            assert example.target == CLASSES.index(name)
            assert np.array_equal(example.image, np.asarray(picture(example.target, int(number))))


def test_members_are_the_files_as_they_came(packed, pictures):
    shards = assemble.examples(packed, "train")
    for number in range(len(shards.paths)):
        shard = shards.shard(number)
        for place, key in enumerate(shard.keys):
            members = shard.read(place)
            assert bytes(members["png"]) == (pictures / f"{key}.png").read_bytes()
            assert json.loads(bytes(members["json"]))["metadata"] == {"name": f"{key}.png"}


def test_the_manifest_tells_what_was_packed(packed):
    content = manifest.read_manifest(places.shards_folder(packed) / "train")
    shards = assemble.examples(packed, "train")
    assert content["complete"] is True
    assert (content["split"], content["classes"], content["class_names"]) == ("train", 3, list(CLASSES))
    assert content["examples"] == len(shards) == sum(row["examples"] for row in content["shards"])
    assert [row["examples"] for row in content["shards"][:-1]] == [8] * (len(shards) // 8)
    assert content["quarantined"] == []
    assert content["fractions"] == FRACTIONS
    assert content["source"] == {"name": "image_folder", "root": "pictures", "options": {}}


def test_the_classes_are_mixed_within_a_shard(packed):
    labels = [example.target for example in examples(packed, "train")]
    assert len(set(labels[:8])) == 3
    assert labels != sorted(labels)


def test_the_same_data_gives_the_same_bytes(experiment):
    recipe = load("tiny.yaml")
    (experiment / "pictures/red/00.png").write_bytes(b"no picture")  # its reason is part of the bytes
    for name in ("a", "b"):
        pack_examples(dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, shards=name)))
    first = files(experiment / "a")
    assert len(first) >= 3 * 3
    assert first == files(experiment / "b")
    assert any(b"red/00" in content for name, content in first.items() if name.endswith(".idx"))


def test_the_order_of_a_listing_changes_nothing():
    names = [f"{number}.png" for number in range(500)]
    shuffled = random.Random(0).sample(names, len(names))
    assert assign(items(*names), FRACTIONS) == assign(items(*shuffled), FRACTIONS)


# ------------------------------------------------------------------------------------------------ splits


def test_added_items_move_no_other():
    few = assign(items(*(f"{number}.png" for number in range(0, 1000, 3))), FRACTIONS)
    many = assign(items(*(f"{number}.png" for number in range(1000))), FRACTIONS)
    assert few.keys() == many.keys() == FRACTIONS.keys()
    for split, some in few.items():
        kept = {item.name for item in some}
        assert [item.name for item in many[split] if item.name in kept] == [item.name for item in some]
        assert len(many[split]) > len(some)


def test_an_item_is_left_out_where_it_has_no_place():
    every = [item._replace(not_in=("train",)) for item in items(*(f"{number}.png" for number in range(100)))]
    assert set(assign(every, FRACTIONS)) == {"val", "test"}
    with pytest.raises(DataError, match="^'0.png' is to be left out of split 'trian', which data.splits does not name"):
        assign([every[0]._replace(not_in=("trian",))], FRACTIONS)


def test_splits_have_the_sizes_that_are_asked_for():
    names = [f"class/{number}.jpg" for number in range(30_000)]
    shares = {split: 0 for split in FRACTIONS}
    for name in names:
        shares[choose_split(name, FRACTIONS)] += 1
    for split, fraction in FRACTIONS.items():  # five standard deviations
        assert abs(shares[split] / len(names) - fraction) < 5 * (fraction * (1 - fraction) / len(names)) ** 0.5


def test_a_split_is_independent_of_the_order_within_it():
    """Both come from a hash of the name: from the same bits, the splits would each hold one end of the order."""
    names = [f"{number}.png" for number in range(3000)]
    everything = [item.name for item in assign(items(*names), {"all": 1.0})["all"]]
    positions = [everything.index(item.name) / 3000 for item in assign(items(*names), FRACTIONS)["val"]]
    assert abs(np.mean(positions) - 0.5) < 0.06


def test_fractions_may_sum_to_a_little_less_than_one():
    sums_low = {"a": 0.1, "b": 1e-9}
    assert {choose_split(f"{number}", sums_low) for number in range(100)} == {"a", "b"}


def test_a_split_that_the_source_names_is_kept():
    named = [Item("x", "holdout", "png", 0, bytes), *items("y")]
    assert [item.name for item in assign(named, {"train": 1.0})["holdout"]] == ["x"]


# ------------------------------------------------------------------------------------------------ keys


@pytest.mark.parametrize(
    ("name", "extension", "key"),
    [
        ("cat/1.png", "png", "cat/1"),
        ("cat/1.JPG", "jpg", "cat/1%2EJPG"),
        ("cat/1.2.png", "png", "cat/1%2E2"),
        ("digit-0001", "png", "digit-0001"),
        ("a b/ä.png", "png", "a%20b/%C3%A4"),
    ],
)
def test_keys(name, extension, key):
    assert item_key(Item(name, None, extension, 0, bytes)) == key


def test_twins_are_refused_before_anything_is_written(experiment):
    for path in (experiment / "pictures/red").glob("*.png"):
        shutil.copy(path, path.with_suffix(".jpg"))  # some of the pairs fall into one split
    with pytest.raises(DataError, match=r"^'red/(\d+)\.\w+' and 'red/\1\.\w+' would share the key 'red/\1'; rename"):
        pack_examples(load("tiny.yaml"))
    assert not (experiment / "shards").exists()


def test_an_item_that_is_listed_twice_is_refused_in_whichever_shard(own):
    with pytest.raises(DataError, match="^'000' and '000' would share the key '000'; rename one of them$"):
        pack_own(own / "out", twice=True)
    assert not (own / "out").exists()


# ------------------------------------------------------------------------------------------------ quarantine


def test_bad_labels_are_left_out_and_listed(own):
    made = pack_own(own / "out", labels="bad")
    reasons = {row["name"]: row["reason"] for row in made["quarantined"]}
    assert reasons == {
        "label-0": "label nan is not a whole number",
        "label-1": "label 0.5 is not a whole number",
        "label-2": "label True is not a class index",
        "label-3": "label 'cat' is not a class index",
        "label-4": "label 2 is outside 0..1, the task's 2 classes",
        "label-5": "label -1 is outside 0..1, the task's 2 classes",
        "label-6": "label None is not a class index",
    }
    assert {row["key"] for row in made["quarantined"]} == set(reasons)
    assert made["examples"] == 21  # 1.0 is a class index
    assert all((own / "out/train" / row["name"]).stat().st_size for row in made["shards"])


def test_damaged_pictures_are_left_out_and_listed(experiment):
    red = experiment / "pictures/red"
    picture(2, 5).resize((64, 64)).save(red / "cut.jpg")
    (red / "cut.jpg").write_bytes((red / "cut.jpg").read_bytes()[:-300])
    (red / "empty.png").touch()
    (red / "text.png").write_text("hello")
    made = pack_examples(load("tiny.yaml"))
    rows = {row["name"]: row["reason"] for one in made.values() for row in one["quarantined"]}
    assert rows.keys() == {"red/cut.jpg", "red/empty.png", "red/text.png"}
    assert re.fullmatch(r"the image cannot be decoded \(image file is truncated.*\)", rows["red/cut.jpg"])
    assert rows["red/text.png"] == "the image is of no known format, or its first bytes are damaged"
    assert sum(one["examples"] for one in made.values()) == 48
    for split, one in made.items():
        assert one["examples"] == len(Shards(experiment / "shards/tiny" / split))


def test_a_picture_that_is_gone_when_it_is_read(experiment, monkeypatch):
    """It was there when the folder was listed."""
    from kd_dist.sources import list_items

    listing = list_items("image_folder", "pictures", {})
    everything = list(listing.items)
    (experiment / "pictures/blue/03.png").unlink()
    (experiment / "own_gone.py").write_text("listing = None\n")
    import own_gone

    own_gone.listing = lambda: listing._replace(items=everything)
    made = pack(
        experiment / "out",
        source="own_gone:listing",
        root=None,
        options={},
        fractions={"train": 1.0},
        required=["train"],
        task=Classification(3),
        shard_size=16,
    )["train"]
    [row] = made["quarantined"]
    assert (row["key"], made["examples"]) == ("blue/03", 47)
    assert "No such file or directory" in row["reason"]


def test_a_machine_that_is_short_of_something_quarantines_nothing(own):
    (own / "own_short.py").write_text(
        OWN_SOURCE + "\n\ndef short(number):\n    raise OSError(number, os.strerror(number))\n\n\n"
        'def troubled(number: int):\n    return Listing(("even", "odd"), [Item("a", "train", "png", 0, '
        "lambda: short(number))])\n"
    )
    given = {"source": "own_short:troubled", "root": None, "fractions": FRACTIONS, "required": ["train"]}
    for number in (errno.EMFILE, errno.ENOMEM, errno.EACCES):
        told = "every example is quarantined" if number == errno.EACCES else "^a: cannot be read now "
        with pytest.raises(KdError, match=told):
            pack(own / f"out-{number}", **given, options={"number": number}, task=Classification(2), shard_size=4)


def test_parts_shorter_than_a_recording_may_be_are_refused_before_anything_is_written(own):
    (own / "own_parts.py").write_text(
        OWN_SOURCE + "\n\ndef parts():\n"
        '    return Listing(("a",), [Item("x", "train", "wav", (0.0,), bytes, None, (15.0, 15.5))])\n'
    )
    given = {"source": "own_parts:parts", "root": None, "options": {}, "fractions": FRACTIONS, "required": ["train"]}
    task = Regression(("a",), (-1.0, 1.0), Spectrograms(LogMel(), 1.0))
    with pytest.raises(DataError, match=r"^'x' is a part of 0\.5 s, less than audio\.shortest, 1 s; take longer"):
        pack(own / "out", **given, task=task, shard_size=4)
    assert not (own / "out").exists()


def test_a_front_end_that_cannot_be_claims_no_folder(own):
    given = {"source": "own_pictures:listing", "root": None, "options": {}, "fractions": FRACTIONS}
    task = Regression(("even", "odd"), (-1.0, 1.0), Spectrograms(LogMel(n_fft=256, hop=128), 1.0))
    with pytest.raises(RecipeError, match=r"^audio\.mels: \d+ of the 128 mel bands hold no frequency") as caught:
        pack(own / "out", **given, required=["train"], task=task, shard_size=4)
    assert "take fewer mels or a larger n_fft" in str(caught.value) and not (own / "out").exists()


def test_a_group_that_its_source_divides_is_refused():
    named = [Item(name, split, "png", 0, bytes, "song") for name, split in (("x", "train"), ("y", "val"))]
    said = r"^'x' is in split 'train' and 'y' in 'val', but both are of group 'song', which stays in one; correct the"
    with pytest.raises(DataError, match=said):
        assign(named, FRACTIONS)


def test_when_every_example_is_bad(experiment):
    for path in (experiment / "pictures").rglob("*.png"):
        path.write_bytes(b"bad")
    with pytest.raises(DataError, match=r"every example is quarantined, the first is 'blue/\d+.png': the image"):
        pack_examples(load("tiny.yaml"))
    with pytest.raises(ShardError, match="not finished"):
        Shards(experiment / "shards/tiny/test")


def test_when_every_example_was_bad_and_the_data_is_mended(experiment, pictures):
    for path in (experiment / "pictures").rglob("*.png"):
        path.write_bytes(b"bad")
    with pytest.raises(DataError, match=r"shards/tiny/test: every example .*; correct the data, delete the folder and"):
        pack_examples(load("tiny.yaml"))
    shutil.rmtree(experiment / "pictures")
    shutil.copytree(pictures, experiment / "pictures")
    shutil.rmtree(experiment / "shards/tiny/test")
    assert sum(one["examples"] for one in pack_examples(load("tiny.yaml")).values()) == 48


# ------------------------------------------------------------------------------------------------ refusals


def test_another_number_of_classes(experiment):
    with pytest.raises(DataError, match="^data.source image_folder: has 3 classes, the recipe's task.classes says 4"):
        pack_examples(load("tiny.yaml", ["task.classes=4"]))
    assert not (experiment / "shards").exists()


def test_a_split_without_examples(experiment):
    for name in CLASSES:
        for path in list((experiment / "pictures" / name).iterdir())[1:]:
            path.unlink()
    recipe = load("tiny.yaml", ["data.splits={train: 0.000001, val: 0.000001, test: 0.999998}"])
    with pytest.raises(DataError, match=r"image_folder: no example for split 'train'; it has \['test'\]; name in"):
        pack_examples(recipe)
    shutil.rmtree(experiment / "pictures/red")
    (experiment / "pictures/red").mkdir()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("data.shard_size=5", "was made with shard_size = 8, the recipe says 5; restore the recipe, give it"),
        ("data.root=./pictures", "was made with source.root = 'pictures', the recipe says './pictures';"),
        ("data.splits={train: 0.5, val: 0.3, test: 0.2}", "was made with fractions.train = 0.6, the recipe says 0.5;"),
        ("task.classes=2", "was made with classes = 3, the recipe says 2;"),
    ],
)
def test_another_recipe_under_the_same_name(packed, override, sentence):
    before = files(Path("shards"))
    with pytest.raises(MismatchError, match=f"^shards/tiny/(test|train|val): {re.escape(sentence)}"):
        pack_examples(load("tiny.yaml", [override]))
    assert files(Path("shards")) == before


def unfinished(recipe, split: str) -> None:
    """As a kill leaves a split: its last shard and the end of its manifest are missing."""
    folder = places.shards_folder(recipe) / split
    content = manifest.read_manifest(folder)
    manifest.write_manifest(folder, {**content, "complete": False})
    last = max(folder.glob("*.tar"))
    last.unlink()
    last.with_suffix(".idx").unlink()


def test_a_listing_that_changed_half_way(packed, experiment):
    unfinished(packed, "train")
    added = next(name for name in map(str, range(99)) if choose_split(f"red/{name}.png", packed.data.splits) == "train")
    picture(2, 77).save(experiment / f"pictures/red/{added}.png")
    with pytest.raises(MismatchError, match=r"^shards/tiny/train: was made with listing = '\w{64}', the recipe"):
        pack_examples(packed)


def test_other_windows_are_another_listing():
    """And the digests of what has no windows are those that are on disks by now."""
    plain = [Item("a.png", None, "png", 3, bytes), Item("b.png", "val", "png", None, bytes)]
    assert listing_digest(plain) == "26102a49fdb9fba68ce6da059797ae4fa33b84acaa44da0631b6cc8adf948f35"
    one = Item("2/15000ms", None, "mp3", (0.5, -1.0), bytes, "2", (15.0, 25.0))
    others = [one._replace(group=group) for group in (None, "3")]
    others += [one._replace(span=span) for span in (None, (15.0, 25.0000001), (15.5, 25.0), (5.0, 15.0))]
    others += [one._replace(name="2/0ms"), one._replace(label=(0.5, -0.5)), one._replace(extension="wav")]
    digests = [listing_digest([item]) for item in (one, *others)]
    assert len(set(digests)) == len(digests) == 10
    assert listing_digest([one._replace(span=(15, 25), split="val")]) == digests[0]  # the same part, and its own folder


# ------------------------------------------------------------------------------------------------ a second run


def test_what_is_finished_is_not_read_again(packed, experiment):
    before = files(experiment / "shards")
    shutil.rmtree(experiment / "pictures")
    made = pack_examples(packed)
    assert made["train"] == manifest.read_manifest(experiment / "shards/tiny/train")
    assert files(experiment / "shards") == before


def test_it_says_which_splits_were_done_before(packed, capsys):
    def said() -> list[str]:
        capsys.readouterr()
        made = journey.pack_recipe(packed)
        lines = [line for line in capsys.readouterr().err.splitlines() if " shards" in line]
        assert len(lines) == len(made) == 3
        return [line.partition(", ")[0] for line in lines if "done before" in line]

    assert said() == ["pack test: done before", "pack train: done before", "pack val: done before"]
    unfinished(packed, "train")
    assert said() == ["pack test: done before", "pack val: done before"]
    shutil.rmtree("shards")
    assert said() == []


def test_what_another_command_has_finished_meanwhile_is_left_as_it_is(own):
    """The other one packs while this one lists its items."""
    (own / "own_late.py").write_text(
        "from own_pictures import listing as early\n\nmeanwhile = []\n\n\n"
        "def listing():\n    for do in list(meanwhile):\n        do()\n    return early()\n"
    )
    import own_late

    def pack_late() -> dict:
        given = {"source": "own_late:listing", "root": None, "options": {}, "fractions": FRACTIONS, "shard_size": 4}
        return pack(own / "out", **given, required=["train"], task=Classification(2))

    def other() -> None:
        own_late.meanwhile.clear()
        made.append(pack_late())
        times.update({path: path.stat().st_mtime_ns for path in (own / "out/train").iterdir()})

    made, times = [], {}
    own_late.meanwhile.append(other)
    assert pack_late() == made[0] and len(made) == 1
    assert len(times) == 2 * 5 + 1
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_committed_shards_are_kept_and_the_rest_is_made(packed, experiment):
    before = files(experiment / "shards")
    train = experiment / "shards/tiny/train"
    unfinished(packed, "train")
    (train / "data-000001.idx").unlink()  # not committed: its index is the mark
    times = {path.name: path.stat().st_mtime_ns for path in train.glob("data-*")}
    pack_examples(packed)
    assert files(experiment / "shards") == before
    after = {path.name: path.stat().st_mtime_ns for path in train.glob("data-*")}
    kept = {name for name in times if after[name] == times[name]}
    assert len(after) == 2 * 4
    assert kept == {f"data-{number:06d}.{kind}" for number in (0, 2) for kind in ("tar", "idx")}


@pytest.mark.parametrize("die_at", [0, 7, 19])
def test_a_killed_run_goes_on_where_it_was(own, die_at):
    """SIGKILL while item `die_at` is read; then the same command again."""
    whole = pack_own(own / "whole", die_at=die_at)
    (own / "deadly").touch()
    child = os.fork()
    if child == 0:
        pack_own(own / "out", die_at=die_at)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    with pytest.raises(ShardError, match="not finished"):
        Shards(own / "out/train")
    (own / "deadly").unlink()
    committed = {path: path.stat().st_mtime_ns for path in (own / "out/train").glob("*.idx")}
    made = pack_own(own / "out", die_at=die_at)
    assert made == whole
    assert all(path.stat().st_mtime_ns == time for path, time in committed.items())
    assert files(own / "out") == files(own / "whole")


def test_what_was_quarantined_before_a_kill_is_still_listed(own):
    whole = pack_own(own / "whole", labels="bad")
    pack_own(own / "out", labels="bad")
    train = own / "out/train"
    manifest.write_manifest(train, {**manifest.read_manifest(train), "complete": False, "quarantined": []})
    assert pack_own(own / "out", labels="bad") == whole
    assert len(whole["quarantined"]) == 7


TENTH = 2  # the number of the item that is tenth in the keyed order, second of its shard


def half_made(own: Path, whole: dict[str, bytes], shards: int) -> None:
    """So many shards are there, as they will be, and nothing that is half-written; then the run goes on."""
    there = files(own / "out")
    assert not json.loads(there.pop("train/manifest.json"))["complete"]
    assert sum(name.endswith(".idx") for name in there) == shards
    assert all(whole[name] == content for name, content in there.items())
    for name in ("stopping", "broken"):
        (own / name).unlink(missing_ok=True)
    pack_own(own / "out", die_at=TENTH)
    assert files(own / "out") == whole


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_stops_it_and_keeps_what_is_finished(own, capsys, name):
    """It comes while the tenth of twenty items is read, in the third of five shards."""
    pack_own(own / "whole", die_at=TENTH)
    (own / "stopping").write_text(name)
    with pytest.raises(SystemExit) as ended, one_sentence():
        pack_own(own / "out", die_at=TENTH)
    assert ended.value.code == 0
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"pack train: stopped by {name} after 2 of 5 shards; the same command goes on"
    half_made(own, files(own / "whole"), 2)


def test_an_exception_of_the_users_source_leaves_nothing_half_written(own):
    pack_own(own / "whole", die_at=TENTH)
    (own / "broken").touch()
    with pytest.raises(ZeroDivisionError), one_sentence():
        pack_own(own / "out", die_at=TENTH)
    half_made(own, files(own / "whole"), 2)


@pytest.mark.parametrize("kind", ["tar", "idx"])
def test_a_full_disk_is_a_sentence_and_what_is_finished_is_kept(own, same_names, kind):
    """The kernel's own full device is put where the third shard is begun."""
    pack_own(own / "whole", die_at=TENTH)
    (own / "out/train").mkdir(parents=True)
    file = own / f"out/train/data-000002.{kind}"
    same_names(file).symlink_to("/dev/full")
    with pytest.raises(SystemExit) as ended, one_sentence():
        pack_own(own / "out", die_at=TENTH)
    assert ended.value.code.startswith(f"error: {file}: No space left on device; make room or choose another")
    half_made(own, files(own / "whole"), 2)


def test_an_index_that_has_lost_its_notes_is_one_sentence(own):
    """As `index_tar` leaves it, in a folder that is not finished."""
    whole = pack_own(own / "out")
    train = own / "out/train"
    manifest.write_manifest(train, {**manifest.read_manifest(train), "complete": False})
    index_tar(train / "data-000001.tar")
    with pytest.raises(ShardError) as caught:
        pack_own(own / "out")
    assert str(caught.value) == (
        f"{train}/data-000001.idx: lacks what the command that wrote it noted, 'quarantined'; delete the file and run "
        f"the command that writes it (kd-dist pack or kd-dist cache-teacher)"
    )
    (train / "data-000001.idx").unlink()
    assert pack_own(own / "out") == whole
