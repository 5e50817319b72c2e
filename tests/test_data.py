"""The corridor over real packed shards: every example once, in one order, with its own signals, or an error."""

import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import picture
from processes import inside, laboratory

from kd_dist import assemble, cache_teacher, caches, journey, manifest
from kd_dist.batch import IGNORED, Batch, Example, Mixture, TeacherSignal, TopLogits, mapped, valid_rows
from kd_dist.compress import STORES, Basis, FeatureCodec
from kd_dist.config import load
from kd_dist.data import CHECK_ONE_IN, Corridor
from kd_dist.errors import DataError, MismatchError, ShardError
from kd_dist.folders import Shards
from kd_dist.joined import JoinedShards, JoinedSignals
from kd_dist.loader import batches, packed, to_device, unpacked
from kd_dist.losses import Objective
from kd_dist.plan import Plan
from kd_dist.rows import SignalShards
from kd_dist.shards import Shard, write_shard
from kd_dist.signals import LogitsCodec, from_row_bytes
from kd_dist.signals.codecs import CODECS, LEVELS
from kd_dist.sources import Listing
from kd_dist.sources.image_folder import image_folder
from kd_dist.tasks import Classification
from kd_dist.views import input_crc

TRAIN = 21  # examples, in shards of 8, 8 and 5
VIEWS = 3
RECIPE = ["teacher.weights=null", f"views.count={VIEWS}"]
FRAGILE = [*RECIPE, "teacher.model=tiny_model:fragile", "teacher.options={}", "teacher.name=fragile"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A user's folder with packed examples and two caches, one of a teacher that fails on the white picture."""
    folder = laboratory(tmp_path_factory.mktemp("data"))
    with inside(folder):
        journey.pack_recipe(load("tiny.yaml"))
        for words in (RECIPE, FRAGILE):
            recipe = load("tiny.yaml", words)
            for split in ("train", "val"):
                cache_teacher.cache_split(recipe, split, assemble.teacher(recipe), Accelerator(cpu=True))
    return folder


@pytest.fixture
def home(made, tmp_path, monkeypatch) -> Path:
    """A copy of it to damage, as the working directory."""
    folder = tmp_path / "home"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def corridor(made, monkeypatch) -> Corridor:
    """The distill stage's corridor for one process."""
    monkeypatch.chdir(made)
    return assemble.training_corridor(load("tiny.yaml", RECIPE), "distill", 0, 1)


def spread(corridor: Corridor, batch_size: int, world: int, accumulate: int, epochs: int = 2) -> list[Corridor]:
    """The same corridor for each rank of another topology."""
    plan = Plan(corridor.plan.order, batch_size, world, accumulate, corridor.plan.repeats)
    return [replace(corridor, plan=plan, rank=rank, epochs=epochs) for rank in range(world)]


def steps(ranks: list[Corridor]) -> Iterator[list[Batch]]:
    """The shares of each step in order: of all ranks in its first micro-batch, then in the second."""
    accumulate = ranks[0].plan.accumulate
    for start in range(0, len(ranks[0]), accumulate):
        yield [rank[start + micro] for micro in range(accumulate) for rank in ranks]


def joined(shares: list[Batch]) -> tuple[tuple[str, ...], bytes]:
    """The valid rows of a step: keys, and all their bytes."""
    valid = [one for one in shares if one.valid.all()]
    rows = [torch.cat([one.images.flatten(1).double(), one.targets[:, None], one.signals.logits], 1) for one in valid]
    return tuple(key for one in valid for key in one.keys), torch.cat(rows).numpy().tobytes()


def bytes_of(batch: Batch) -> tuple:
    tensors = (batch.images, batch.targets, batch.valid, batch.signals.logits)
    return batch.keys, batch.total, *(tensor.numpy().tobytes() for tensor in tensors)


# ---------------------------------------------------------------------------------------------- what they show


DARK = "green/03"
FILMED = {"blue/00": ("a", 3), "blue/01": ("a", 3), "green/00": ("a", 4), "green/01": ("b", 3), "red/01": ("b", None)}


def filmed(root: str) -> Listing:
    """The pictures of a folder, some of which are of videos; the frame of the last is not known."""
    listing = image_folder(root)
    items = []
    for item in listing.items:
        video, frame = FILMED.get(item.name.removesuffix(".png"), (None, None))
        about = {} if video is None else {"video": video} if frame is None else {"video": video, "frame": frame}
        items.append(item._replace(about=about))
    return listing._replace(items=items)


def test_a_batch_says_which_rows_are_of_one_video_and_of_one_frame(experiment):
    recipe = load("tiny.yaml", [f"data.source={__name__}:filmed", "data.root=filmed", "data.shard_size=3"])
    for split, many in (("train", 4), ("val", 2), ("test", 2)):
        for name in ("blue", "green", "red"):
            place = experiment / "filmed" / split / name
            place.mkdir(parents=True)
            for number in range(many):
                picture(0, number).save(place / f"{number:02d}.png")
    journey.pack_recipe(recipe)
    corridor = assemble.evaluation_corridor(recipe, "val", 0, 1, cached=False)
    [batch] = [corridor[number] for number in range(len(corridor))]
    rows = dict(zip(batch.keys, batch.groups.tolist(), strict=True))
    assert len(rows) == 6 and batch.groups.dtype == torch.int64
    assert [key for key, group in rows.items() if group == [0, 0]] == ["red/00"]
    assert rows["blue/00"] == rows["blue/01"] != rows["green/00"]
    assert len({video for video, _ in rows.values()}) == 3 and rows["blue/00"][0] == rows["green/00"][0]
    assert len({frame for _, frame in rows.values()}) == 5  # frame 3 of another video is another frame
    learning = assemble.training_corridor(recipe, "pretrain", 0, 1)
    assert len(learning[0].keys) == 8 and learning[0].groups is None  # of 12, of which 5 name a video
    # Masked rows keep their place, those that are left out lose it.
    path = corridor.examples.paths[0]
    path.write_bytes(bytes(path.stat().st_size))
    damaged = replace(assemble.evaluation_corridor(recipe, "val", 0, 1, cached=False), on_error="replace_masked")
    [batch] = [damaged[number] for number in range(len(damaged))]
    assert batch.valid.tolist() == [False] * 3 + [True] * 3 and batch.groups[:3].eq(0).all()
    assert valid_rows(batch).groups.tolist() == batch.groups[3:].tolist() == [rows[key] for key in batch.keys[3:]]
    assert to_device(batch, torch.device("cpu")).groups.tolist() == batch.groups.tolist()


def test_where_nothing_is_named_no_video_is_known(corridor):
    assert assemble.evaluation_corridor(load("tiny.yaml", RECIPE), "val", 0, 1, cached=True)[0].groups is None


# ---------------------------------------------------------------------------------------------- which examples


@pytest.mark.parametrize("batch_size, block", [(1, 1), (6, 4), (8, 1), (8, 4), (21, 1), (64, 4)])
def test_every_example_once_an_epoch_and_one_order_for_every_topology(corridor, batch_size, block):
    order = replace(corridor.plan.order, block=block, lanes=3, window=2 * block)
    corridor = replace(corridor, plan=replace(corridor.plan, order=order))
    first = [joined(shares) for shares in steps(spread(corridor, batch_size, 1, 1))]
    per_epoch = -(-TRAIN // batch_size)
    assert len(first) == 2 * per_epoch
    for epoch in range(2):
        keys = [key for keys, _ in first[epoch * per_epoch : (epoch + 1) * per_epoch] for key in keys]
        assert len(keys) == TRAIN and sorted(keys) == sorted(all_keys(corridor))
    assert [keys for keys, _ in first[:per_epoch]] != [keys for keys, _ in first[per_epoch:]]  # another order
    for world, accumulate in ((2, 1), (1, 3), (3, 2), (5, 1), (30, 1)):
        ranks = spread(corridor, batch_size, world, accumulate)
        assert len({len(rank) for rank in ranks}) == 1  # every rank makes as many steps
        assert [joined(shares) for shares in steps(ranks)] == first, (world, accumulate)


def all_keys(corridor: Corridor) -> list[str]:
    examples = corridor.examples
    return [key for number in range(len(examples.paths)) for key in examples.shard(number).keys]


@pytest.mark.parametrize("world, accumulate", [(1, 1), (2, 1), (4, 2), (13, 1)])
def test_an_empty_share_is_one_filler_row_and_totals_count_the_whole_step(corridor, world, accumulate):
    fillers = 0
    for number, shares in enumerate(steps(spread(corridor, 10, world, accumulate))):
        expected = (10, 10, 1)[number % 3]
        assert {one.total for one in shares} == {expected}
        assert sum(int(one.valid.sum()) for one in shares) == expected
        for one in shares:
            assert one.valid.all() or (len(one.valid) == 1 and not one.valid.item())
            assert len(one.keys) == len(one.images) == len(one.targets) == len(one.signals.logits) > 0
            fillers += not one.valid.all()
    parts = world * accumulate
    assert fillers == 2 * ((parts - 1) + 2 * max(0, parts - 10))


def test_quarantined_examples_are_left_out_and_totals_are_smaller(corridor):
    """The white picture has no signals of the fragile teacher; of two ranks, one meets it each epoch."""
    own = assemble.training_corridor(load("tiny.yaml", FRAGILE), "distill", 0, 1)
    assert [row["key"] for row in own.signals.manifest["quarantined"]] == ["red/00"]
    for batch_size, world in ((8, 2), (1, 1), (21, 3)):
        seen, totals = Counter(), 0
        for shares in steps(spread(own, batch_size, world, 1)):
            valid = [one for one in shares if one.valid.all()]
            seen.update(key for one in valid for key in one.keys)
            totals += shares[0].total if valid else 0
            if valid:
                assert {one.total for one in shares} == {sum(len(one.keys) for one in valid)}
        assert "red/00" not in seen and set(seen.values()) == {2} and len(seen) == TRAIN - 1
        assert totals == 2 * (TRAIN - 1)
    # A step of nothing but quarantined examples has a filler row on every rank, and a total that divides.
    alone = [shares[0] for shares in steps(spread(own, 1, 1, 1)) if not shares[0].valid.all()]
    assert len(alone) == 2 and all(one.total == 1 and len(one.keys) == 1 for one in alone)


# ---------------------------------------------------------------------------------------------- which views


def test_each_epoch_shows_another_view_through_all_of_them(corridor):
    [whole] = spread(corridor, TRAIN, 1, 1, epochs=2 * VIEWS)
    cycles = [{}, {}]
    for epoch in range(2 * VIEWS):
        batch = whole[epoch]
        for key, image in zip(batch.keys, batch.images, strict=True):
            crc = input_crc(image.permute(1, 2, 0).numpy())
            cycles[epoch // VIEWS].setdefault(key, []).append(crc)
    stored = {}
    for number in range(len(corridor.signals.paths)):
        for place, key in enumerate(corridor.signals.shard(number).keys):
            ids = np.full(VIEWS, int(corridor.signals.starts[number]) + place)
            stored[key] = sorted(corridor.signals.rows(ids, np.arange(VIEWS))["input_crc"].tolist())
    assert len(stored) == TRAIN and len({tuple(crcs) for crcs in stored.values()}) == TRAIN
    for shown in cycles:
        assert {key: sorted(crcs) for key, crcs in shown.items()} == stored
    assert cycles[0] != cycles[1]  # in another order


def test_the_logits_are_those_of_the_view_that_is_shown(corridor):
    teacher = assemble.teacher(load("tiny.yaml", RECIPE))
    [whole] = spread(corridor, TRAIN, 1, 1, epochs=VIEWS)
    for epoch in range(VIEWS):
        batch = whole[epoch]
        logits = teacher(batch.images).logits
        logits = logits - logits.max(dim=1, keepdim=True).values
        torch.testing.assert_close(batch.signals.logits, logits, rtol=0, atol=4 * 2**-11)


def test_without_a_teacher_every_epoch_has_a_fresh_view_and_evaluation_has_one(made, monkeypatch):
    monkeypatch.chdir(made)
    recipe = load("tiny.yaml", RECIPE)
    alone = replace(assemble.training_corridor(recipe, "pretrain", 0, 1), epochs=4 * VIEWS)
    assert alone.signals is None
    shown = Counter(
        (key, input_crc(image.permute(1, 2, 0).numpy()))
        for batch in map(alone.__getitem__, range(len(alone)))
        for key, image in zip(batch.keys, batch.images, strict=True)
        if key != "red/00"  # white whatever is cut out of it
    )
    assert len(shown) == 4 * VIEWS * (TRAIN - 1) and set(shown.values()) == {1}
    judged = assemble.evaluation_corridor(recipe, "val", 0, 1, cached=True)
    [batch] = [judged[number] for number in range(len(judged))]
    assert len(batch.keys) == 9 and list(batch.keys) == all_keys(judged)


# ---------------------------------------------------------------------------------------------- views side by side


class Counting(Classification):
    """A decoder that notes what it decodes."""

    decoded: ClassVar[list[str]] = []

    def decode(self, key: str, members: dict) -> Example:
        self.decoded.append(key)
        return super().decode(key, members)


def repeating(corridor: Corridor, repeats: int, batch_size: int = 8) -> Corridor:
    """The corridor with so many views of an example side by side, for two of their rounds of three epochs."""
    plan = replace(corridor.plan, batch_size=batch_size, repeats=repeats)
    return replace(corridor, plan=plan, epochs=2 * VIEWS, task=Counting(3))


def rows_of(corridor: Corridor, first: int, stop: int) -> list[tuple]:
    """All bytes of the valid rows of these epochs, sorted."""
    found = []
    for cursor in range(first * corridor.plan.steps_per_epoch, stop * corridor.plan.steps_per_epoch):
        batch = valid_rows(corridor[cursor])
        parts = [batch.images, batch.targets, *([] if batch.signals is None else [batch.signals.logits])]
        parts += [] if batch.mixture is None else batch.mixture
        found += zip(batch.keys, *([row.numpy().tobytes() for row in part] for part in parts), strict=True)
    return sorted(found)


MIXED = ["views.mixup=0.5", "views.cutmix=0.5", "views.mixed=0.7"]


@pytest.mark.parametrize("stage, words", [("distill", []), ("pretrain", []), ("pretrain", MIXED)])
def test_a_round_has_the_rows_of_as_many_plain_epochs_bit_for_bit(made, monkeypatch, stage, words):
    monkeypatch.chdir(made)
    corridor = assemble.training_corridor(load("tiny.yaml", [*RECIPE, *words]), stage, 0, 1)
    plain, side_by_side = repeating(corridor, 1), repeating(corridor, 3)
    for first in (0, 3):
        rows = rows_of(side_by_side, first, first + 3)
        assert rows == rows_of(plain, first, first + 3) and len(set(rows)) >= 3 * TRAIN - 2  # one picture is white
    assert len(rows_of(side_by_side, 4, 5)) == TRAIN  # an epoch is as long as ever


def test_two_folders_as_one_have_their_views_side_by_side(corridor):
    """As generated examples are beside the packed ones; here, one folder twice."""
    parts = [corridor.examples] * 2
    joint = replace(
        corridor,
        examples=JoinedShards(parts),
        signals=JoinedSignals([corridor.signals] * 2, parts),
        plan=replace(corridor.plan, order=replace(corridor.plan.order, examples=2 * TRAIN)),
    )
    rows = rows_of(repeating(joint, 3), 0, 3)
    assert rows == rows_of(repeating(joint, 1), 0, 3) and len(rows) == 3 * 2 * TRAIN


def test_views_side_by_side_take_one_decode(corridor):
    side_by_side = repeating(corridor, 3)
    for cursor in range(len(side_by_side)):
        Counting.decoded.clear()
        batch = side_by_side[cursor]
        runs = [key for key, before in zip(batch.keys, ("", *batch.keys), strict=False) if key != before]
        assert len(runs) == len(set(batch.keys)) <= 4 and len(batch.keys) in (5, 8)
        assert sorted(Counting.decoded) == sorted(runs)


def test_steps_of_views_side_by_side_are_the_same_for_every_topology(corridor):
    corridor = replace(corridor, plan=replace(corridor.plan, repeats=3))
    first = [joined(shares) for shares in steps(spread(corridor, 8, 1, 1, epochs=3))]
    assert len(first) == 3 * 3 and len(set(first)) == 9
    for world, accumulate in ((2, 1), (1, 3), (3, 2), (30, 1)):
        assert [joined(shares) for shares in steps(spread(corridor, 8, world, accumulate, epochs=3))] == first


def test_views_side_by_side_are_another_run_and_its_shuffle_is_judged_by_its_examples(made, monkeypatch):
    monkeypatch.chdir(made)
    found = []
    for repeats in (1, VIEWS):
        words = [f"stages.distill.views_per_decode={repeats}", f"stages.distill.epochs={2 * VIEWS}"]
        recipe = load("tiny.yaml", [*RECIPE, *words])
        corridor = assemble.training_corridor(recipe, "distill", 0, 1)
        assert corridor.plan.repeats == repeats and corridor.plan.examples_of_step == -(-8 // repeats)
        found.append(assemble.stage_identity(recipe, "distill", corridor))
    assert "views_per_decode" not in found[0]["stage"]  # as checkpoints had it before there was such an option
    assert found[1] == {**found[0], "stage": {**found[0]["stage"], "views_per_decode": VIEWS}}
    judged = assemble.evaluation_corridor(recipe, "val", 0, 1, cached=True)
    assert judged.plan.repeats == 1


def test_quarantined_examples_are_left_out_of_a_round(made, monkeypatch):
    monkeypatch.chdir(made)
    own = assemble.training_corridor(load("tiny.yaml", FRAGILE), "distill", 0, 1)
    side_by_side, shown, totals = repeating(own, 3, 10), Counter(), 0  # some lie across a border
    assert rows_of(side_by_side, 0, 3) == rows_of(repeating(own, 1), 0, 3)
    for cursor in range(3 * side_by_side.plan.steps_per_epoch):
        batch = side_by_side[cursor]
        assert batch.total == len(batch.keys) and batch.valid.all()
        shown.update(batch.keys)
        totals += batch.total
    assert "red/00" not in shown and set(shown.values()) == {3} and totals == 3 * (TRAIN - 1)


def test_side_by_side_the_pixels_of_as_many_views_are_checked(made, monkeypatch):
    """Each example in one of sixteen views that are shown of it."""
    monkeypatch.chdir(made)
    rounds = 2 * CHECK_ONE_IN
    for repeats in (1, 3):
        corridor = assemble.training_corridor(load("tiny.yaml", RECIPE), "distill", 0, 1)
        checked = Counter()
        whole = replace(repeating(corridor, repeats, TRAIN), epochs=rounds * 3, task=Darkened(3))
        for cursor in range(len(whole)):
            try:
                whole[cursor]
            except MismatchError as error:
                checked[str(error).split("'")[1]] += 1
        assert checked == {DARK: rounds * 3 // CHECK_ONE_IN}


# ---------------------------------------------------------------------------------------------- the loader


@pytest.mark.parametrize("workers, repeats", [(0, 1), (2, 1), (2, 2)])
def test_workers_and_resuming_change_nothing(corridor, workers, repeats):
    [_, mine] = spread(replace(corridor, plan=replace(corridor.plan, repeats=repeats)), 8, 2, 2)
    whole = [bytes_of(mine[cursor]) for cursor in range(len(mine))]
    assert len(whole) == 2 * 3 * 2 and len(set(whole)) == len(whole)
    for cursor in (0, 5, 11, 12):
        assert [bytes_of(one) for one in batches(mine, cursor, len(mine), workers, pin=False)] == whole[cursor:]


# ---------------------------------------------------------------------------------------------- what is refused


class Darkened(Classification):
    """A decoder of another version: one picture is black."""

    def decode(self, key: str, members: dict) -> Example:
        example = super().decode(key, members)
        return example._replace(image=np.zeros_like(example.image)) if key == DARK else example


class Brightened(Classification):
    """A decoder of another version: one pixel of one picture is a level brighter."""

    def decode(self, key: str, members: dict) -> Example:
        example = super().decode(key, members)
        if key != "green/03":
            return example
        image = example.image.copy()
        image[6, 5, 0] ^= 8
        return example._replace(image=image)


def test_other_pixels_are_found_and_name_the_example_and_the_versions(corridor):
    """Each example is checked in one epoch of sixteen, so sixteen epochs of any view that shows the pixel find it."""
    [whole] = spread(replace(corridor, task=Brightened(3)), TRAIN, 1, 1, epochs=CHECK_ONE_IN * VIEWS)
    found = []
    for epoch in range(len(whole)):
        try:
            whole[epoch]
        except MismatchError as error:
            found.append(str(error))
    assert 1 <= len(found) <= VIEWS  # an example is checked once in sixteen epochs
    version = manifest.versions()["pillow"]
    for text in found:
        assert text.startswith("example 'green/03': its pixels have CRC ") and "the teacher saw " in text
        assert f"(Pillow {version} then, Pillow {version} now); run `kd-dist verify`" in text


def change(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def drain(corridor: Corridor) -> int:
    return sum(len(corridor[cursor].keys) for cursor in range(len(corridor)))


def fresh() -> Corridor:
    return assemble.training_corridor(load("tiny.yaml", RECIPE), "distill", 0, 1)


def test_a_truncated_tar_is_refused(home):
    for path in ("shards/tiny/train/data-000001.tar", "shards/tiny/train/teacher/signals-000001.tar"):
        whole = Path(path).read_bytes()
        Path(path).write_bytes(whole[:-512])
        with pytest.raises(ShardError, match=f"{path}: the tar has {len(whole) - 512} bytes but its index says"):
            drain(fresh())
        Path(path).write_bytes(whole)
    assert drain(fresh()) == 2 * TRAIN


def test_a_changed_byte_is_refused_and_named(home):
    examples = Shards(Path("shards/tiny/train")).shard(1)
    offset, size = examples.member(2, "png")
    change(examples.path, offset + size // 2)
    with pytest.raises(ShardError, match=f"data-000001.tar: example '{examples.key(2)}' is damaged: the CRC32 of its"):
        drain(fresh())
    change(examples.path, offset + size // 2)

    signals = fresh().signals
    offset, _ = signals.shard(1).member(2, "teacher.npy")
    change(signals.paths[1], offset + signals.header + signals.dtype.itemsize - 1 + signals.dtype.itemsize)
    key = signals.shard(1).key(2)
    with pytest.raises(ShardError, match=f"signals-000001.tar: '{key}' view 1: row 0 of those read is damaged"):
        drain(replace(fresh(), epochs=VIEWS))


# ---------------------------------------------------------------------------------------------- what is masked


def damaged_example() -> str:
    """The key of an example of the second shard, one byte of which is changed."""
    examples = Shards(Path("shards/tiny/train")).shard(1)
    offset, size = examples.member(2, "png")
    change(examples.path, offset + size // 2)
    return examples.key(2)


def damaged_signals() -> str:
    """The key of another, a byte of all whose rows is changed."""
    signals = fresh().signals
    offset, _ = signals.shard(1).member(3, "teacher.npy")
    for view in range(VIEWS):
        change(signals.paths[1], offset + signals.header + (view + 1) * signals.dtype.itemsize - 1)
    return signals.shard(1).key(3)


def tolerant(words: list[str] = RECIPE) -> Corridor:
    recipe = load("tiny.yaml", [*words, "data.on_error=replace_masked"])
    return assemble.training_corridor(recipe, "distill", 0, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_failed_examples_are_rows_of_zeros_that_are_masked(home, workers):
    """All else, and every other row, stays as it was."""
    whole = [fresh()[cursor] for cursor in range(len(fresh()))]
    bad = {damaged_example(): "data-000001.tar: example '", damaged_signals(): "signals-000001.tar: '"}
    assert len(bad) == 2
    masked = 0
    for before, now in zip(whole, batches(tolerant(), 0, len(whole), workers, pin=False), strict=True):
        assert (now.keys, now.total) == (before.keys, before.total)
        expected = torch.tensor([key not in bad for key in now.keys])
        assert torch.equal(now.valid, expected) and before.valid.all() and not before.failed
        for one, other in zip(tensors(now), tensors(before), strict=True):
            assert torch.equal(one[expected], other[expected]) and not one[~expected].any()
        told = [key for key in now.keys if key in bad]
        assert len(now.failed) == len(told)
        for key, sentence in zip(told, now.failed, strict=True):
            assert sentence.startswith(f"shards/tiny/train/data-000001.tar: example '{key}' is masked: ")
            assert bad[key] in sentence.partition("is masked: ")[2] and "damaged" in sentence
        masked += len(told)
    assert masked == 2 * 2
    with pytest.raises(ShardError, match="is damaged"):
        drain(fresh())


def test_an_example_that_fails_fails_in_all_its_views_and_a_row_of_signals_alone(home):
    def shown() -> list[Batch]:
        corridor = repeating(tolerant(), 3)
        return [corridor[cursor] for cursor in range(3 * corridor.plan.steps_per_epoch)]

    whole, bad = shown(), damaged_example()
    signals = fresh().signals
    offset, _ = signals.shard(1).member(3, "teacher.npy")
    change(signals.paths[1], offset + signals.header + 2 * signals.dtype.itemsize - 1)  # of view 1 alone
    told = Counter()
    for before, now in zip(whole, shown(), strict=True):
        assert (now.keys, now.total) == (before.keys, before.total) and len(now.failed) == int((~now.valid).sum())
        told.update(key for key, valid in zip(now.keys, now.valid.tolist(), strict=True) if not valid)
        for one, other in zip(tensors(now), tensors(before), strict=True):
            assert torch.equal(one[now.valid], other[now.valid]) and not one[~now.valid].any()
    assert told == {bad: 3, signals.shard(1).key(3): 1}


def tensors(batch: Batch) -> tuple[torch.Tensor, ...]:
    return batch.images, batch.targets, batch.signals.logits


def test_a_share_that_failed_as_a_whole_is_one_filler_row(home):
    bad = damaged_example()
    fillers = []
    for shares in steps(spread(tolerant(), 8, 4, 2)):
        assert {one.total for one in shares} <= {8, 5}
        for one in shares:
            rows = sum(key == bad for key in one.keys)
            assert len(one.valid) == 1 or not rows
            assert len(one.failed) == rows == int((~one.valid).sum()) or one.keys == ("",)
            fillers += [one] if rows else []
    assert len(fillers) == 2 and not any(one.valid.any() or one.images.any() for one in fillers)
    every = tolerant()
    for path in every.examples.paths:
        path.unlink()
    whole = tolerant()[0]
    assert whole.valid.tolist() == [False] and len(whole.keys) == 1
    assert (len(whole.failed), whole.total) == (8, 8)


def test_quarantined_examples_are_found_without_opening_a_shard(home):
    """Where the manifest says; one of an older kd_dist names keys alone, which have to be looked for."""
    examples, folder = Shards(Path("shards/tiny/train")), Path("shards/tiny/train/fragile")
    about = manifest.read_manifest(folder)
    [row] = about["quarantined"]
    older = {**about, "quarantined": [{"key": row["key"], "reason": row["reason"]}]}
    [found] = SignalShards(folder, examples, about=older).quarantined
    number, place = (int(one[0]) for one in examples.locate(np.array([found])))
    assert (number, place) == (row["shard"], row["place"]) and examples.shard(number).key(place) == "red/00"
    for path in folder.glob("*.idx"):
        path.unlink()
    assert SignalShards(folder, examples).quarantined.tolist() == [found]
    with pytest.raises(ShardError, match="so it was never finished"):
        SignalShards(folder, examples, about=older)
    for wrong in ({"shard": 3}, {"shard": -1}, {"shard": None}, {"place": 8}, {"place": "0"}):
        with pytest.raises(ShardError, match="fragile: the manifest says where no example is .*red/00.*; delete the"):
            SignalShards(folder, examples, about={**about, "quarantined": [{**row, **wrong}]})


@pytest.mark.parametrize("ending", ["tar", "idx"])
@pytest.mark.parametrize("name", ["data-000001", "teacher/signals-000001", "fragile/signals-000001"])
def test_every_example_of_a_shard_that_cannot_be_opened_fails(home, name, ending):
    """Also where the keys of quarantined examples are looked up, in the cache of the fragile teacher."""
    words = FRAGILE if name.startswith("fragile") else RECIPE
    (Path("shards/tiny/train") / f"{name}.{ending}").unlink()
    corridor = tolerant(words)
    read = [corridor[cursor] for cursor in range(len(corridor))]
    failed = [sentence for batch in read for sentence in batch.failed]
    assert len(failed) == 2 * 8 == sum(int((~batch.valid).sum()) for batch in read)
    assert all(f"{name.rpartition('/')[2]}." in sentence for sentence in failed)
    assert sum(int(batch.valid.sum()) for batch in read) == 2 * (TRAIN - 8 - len(corridor.signals.quarantined))
    with pytest.raises(ShardError, match=f"{name}.{ending}: |{name}.tar: "):
        drain(assemble.training_corridor(load("tiny.yaml", words), "distill", 0, 1))


def test_the_bytes_of_an_example_are_those_that_were_packed_whatever_became_of_them(home):
    """They choose the order, and a run whose order changes is refused. An older manifest goes by what is there."""
    examples, folder = tolerant().examples, Path("shards/tiny/train")
    before = examples.example_bytes()
    assert before == sum(path.stat().st_size for path in examples.paths) // TRAIN
    with open(examples.paths[0], "r+b") as tar:
        tar.truncate(1024)
    examples.paths[1].with_suffix(".idx").unlink()
    examples.paths[2].unlink()
    assert tolerant().examples.example_bytes() == before
    about = manifest.read_manifest(folder)
    del about["tar_bytes"]
    manifest.write_manifest(folder, about)
    assert 0 < tolerant().examples.example_bytes() < before


def test_the_policy_holds_for_evaluation_and_no_wrong_cache_is_masked(home):
    recipe = load("tiny.yaml", [*RECIPE, "data.on_error=replace_masked"])
    examples = Shards(Path("shards/tiny/val")).shard(0)
    offset, _ = examples.member(0, "json")
    change(examples.path, offset)
    judged = assemble.evaluation_corridor(recipe, "val", 0, 1, cached=True)
    [batch] = [judged[number] for number in range(len(judged))]
    assert batch.valid.tolist() == [key != examples.key(0) for key in batch.keys]
    assert len(batch.failed) == 1 and batch.total == 9
    [strange] = spread(replace(tolerant(), task=Brightened(3)), TRAIN, 1, 1, epochs=CHECK_ONE_IN * VIEWS)
    with pytest.raises(MismatchError, match="its pixels have CRC"):
        drain(strange)


def test_masked_rows_of_maps_and_features_are_finite_and_teach_nothing(scenery):
    """The loss and its gradients are those of the valid rows alone, with every codec in the row."""
    recipe = load("scenes.yaml", ["data.on_error=replace_masked"])
    teacher = assemble.teacher(recipe, recipe.cache.features)
    cache_teacher.cache_split(recipe, "train", teacher, Accelerator(cpu=True))
    examples = Shards(Path("shards/scenes/train"))
    first = examples.shard(0)
    change(first.path, first.member(1, "mask.png")[0])
    corridor = assemble.training_corridor(recipe, "distill", 0, 1)
    corridor = replace(corridor, plan=replace(corridor.plan, batch_size=len(examples)))
    module = assemble.module(recipe, "distill", corridor, None).train()
    objective = Objective(recipe.stages["distill"].losses, 1)
    batch = corridor[0]
    row = batch.keys.index(first.key(1))
    assert batch.valid.tolist() == [place != row for place in range(10)] and len(batch.failed) == 1
    assert (batch.targets[row] == IGNORED).all() and not batch.images[row].any()
    decoded = to_device(batch, torch.device("cpu"), assemble.stage_codecs(recipe, "distill", corridor))
    assert set(decoded.signals.features) == {"low", "high"}
    assert all(value.isfinite().all() for value in (decoded.signals.logits, *decoded.signals.features.values()))
    gradients = []
    for rows in (torch.arange(10), batch.valid.nonzero()[:, 0]):
        features = {name: value[rows] for name, value in decoded.signals.features.items()}
        signals = TeacherSignal(decoded.signals.logits[rows], features)
        keys = tuple(batch.keys[place] for place in rows)
        part = batch._replace(keys=keys, targets=batch.targets[rows], valid=batch.valid[rows], signals=signals)
        module.zero_grad()
        loss, _ = objective(module(batch.images[rows]), part, 0.0)
        loss.backward()
        gradients.append([loss.detach(), *(value.grad.clone() for value in module.parameters())])
    for masked, without in zip(*gradients, strict=True):
        torch.testing.assert_close(masked, without, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("store", STORES)
def test_a_row_of_zeros_is_finite_whatever_its_codec(store):
    basis = Basis(torch.ones(4), torch.eye(4)[:2])
    for codec in (FeatureCodec("f", (4, 3, 3), store), FeatureCodec("f", (4, 3, 3), store, 2, basis)):
        zeros = np.zeros(1, codec.fields())
        decoded = codec.decode({name: torch.from_numpy(zeros[name].copy()) for name in zeros.dtype.names})
        assert decoded.isfinite().all() and decoded.shape[0] == 1
    for name, classes, grid in (
        (name, classes, grid) for name in CODECS for classes in (2, 3) for grid in (None, (2, 2))
    ):
        if name not in LEVELS or classes > 2:
            codec = LogitsCodec(name, classes, grid)
            assert not codec.decode(np.zeros(1, codec.fields())).any()


# ---------------------------------------------------------------------------------------------- what belongs elsewhere


def test_signals_of_other_examples_are_refused(home):
    train, val = Path("shards/tiny/train/teacher"), Path("shards/tiny/val/teacher")
    train.rename("kept")
    val.rename(train)
    with pytest.raises(MismatchError, match="teacher: was made from examples [0-9a-f]{12}, shards/tiny/train now"):
        fresh()


def test_swapped_shards_are_refused(home):
    folder = Path("shards/tiny/train/teacher")
    for ending in ("tar", "idx"):
        one, other = folder / f"signals-000000.{ending}", folder / f"signals-000001.{ending}"
        one.rename(folder / "kept")
        other.rename(one)
        (folder / "kept").rename(other)
    with pytest.raises(ShardError, match=r"its index holds 8 examples with sha256 [0-9a-f]{12}, the manifest 8 with "):
        drain(fresh())


def plain_rows(signals: SignalShards, ids: np.ndarray, views: np.ndarray) -> list[bytes]:
    """Each row read and checked on its own, found by its member in the index."""
    found = []
    for number, place, view in zip(*(one.tolist() for one in signals.locate(ids)), views.tolist(), strict=True):
        shard, stride = signals.shard(number), signals.dtype.itemsize
        start, _ = shard.member(place, "teacher.npy")
        row = shard.pread(start + signals.header + view * stride, stride, bool)
        found.append(from_row_bytes(row, signals.dtype, "here").tobytes())
    return found


def test_rows_of_a_batch_are_those_that_are_read_one_by_one(home):
    signals, every = fresh().signals, np.arange(TRAIN)
    batches = {
        "in order": (every, np.zeros(TRAIN, int)),
        "mixed": (every * 5 % TRAIN, every % VIEWS),
        "views side by side": (every.repeat(VIEWS), np.tile(np.arange(VIEWS), TRAIN)),
        "views from the last": (every.repeat(VIEWS), np.tile(np.arange(VIEWS)[::-1], TRAIN)),
        "one example again and again": (np.full(5, 3), np.array([1, 1, 0, 1, 0])),
        "neighbours, one view after the other": (np.array([4, 5]), np.array([0, 1])),
        "one": (every[-1:], np.array([1])),
        "none": (every[:0], every[:0]),
    }
    for name, (ids, views) in batches.items():
        rows = signals.rows(ids, views)
        assert rows.dtype == signals.dtype and len(rows) == len(ids)
        assert [row.tobytes() for row in rows] == plain_rows(signals, ids, views), name
    assert len(set(plain_rows(signals, *batches["views side by side"]))) == TRAIN * VIEWS


@pytest.mark.parametrize("what", ["key", "size", "member"])
def test_one_example_that_is_wrong_fails_alone_in_its_shard(home, what):
    folder, third = Path("shards/tiny/train/teacher"), 8 + 2
    before, views = fresh().signals.rows(np.arange(TRAIN), np.ones(TRAIN, int)).copy(), np.ones(1, int)
    old, made = Shard(folder / "signals-000001.tar"), []
    for place, key in enumerate(old.keys):
        [payload] = old.read(place).values()
        wrong = place == 2
        key = f"{key[:-1]}z" if wrong and what == "key" else key  # as long as it was
        extension = "other.npy" if wrong and what == "member" else "teacher.npy"
        made.append((key, {extension: payload + b"0" if wrong and what == "size" else payload}))
    write_shard(old.path, made, old.notes)
    about = manifest.read_manifest(folder)
    about["shards"][1] = manifest.shard_entry(Shard(old.path))
    manifest.write_manifest(folder, about)
    signals = SignalShards(folder, Shards(Path("shards/tiny/train")))
    said = {
        "key": (MismatchError, r"example 2 is '.*z', in .*data-000001.tar it is '.*'; delete"),
        "size": (ShardError, f"has {len(payload) + 1} bytes, not {VIEWS} rows; delete it"),
        "member": (ShardError, "has no member 'teacher.npy'; it holds other.npy"),
    }
    for one in range(TRAIN):
        if one == third:
            with pytest.raises(said[what][0], match=f"signals-000001.tar: .*{said[what][1]}"):
                signals.rows(np.array([one]), views)
        else:
            assert signals.rows(np.array([one]), views).tobytes() == before[one].tobytes()


def test_signals_in_another_order_are_refused(home):
    """A folder that says of itself that it is right, but whose examples stand elsewhere."""
    folder = Path("shards/tiny/train/teacher")
    about = manifest.read_manifest(folder)
    about["shards"][:2] = about["shards"][1::-1]
    manifest.write_manifest(folder, about)
    with pytest.raises(MismatchError, match=r"signals-00000\d.tar: example \d is '.*', in .*data-.*.tar it is '.*'"):
        drain(fresh())


def test_a_folder_that_is_not_finished_or_not_there_is_refused(home):
    folder = Path("shards/tiny/train")
    manifest.write_manifest(folder, {**manifest.read_manifest(folder), "complete": False})
    with pytest.raises(ShardError, match="shards/tiny/train: not finished; run the command that makes it once more"):
        fresh()
    shutil.rmtree(folder)
    with pytest.raises(DataError, match="shards/tiny/train: no example shards; run `kd-dist pack` first"):
        fresh()


def test_a_cache_that_is_not_there_is_refused_only_where_it_is_needed(home):
    shutil.rmtree("shards/tiny/train/teacher")
    with pytest.raises(DataError, match="train/teacher: no cached signals; run `kd-dist cache-teacher` first"):
        fresh()
    recipe = load("tiny.yaml", RECIPE)
    assert drain(assemble.training_corridor(recipe, "pretrain", 0, 1)) == 2 * TRAIN
    assert isinstance(caches.signals(recipe, "val", assemble.examples(recipe, "val")), SignalShards)


def test_examples_of_another_number_of_classes_are_refused(home):
    recipe = load("tiny.yaml", [*RECIPE, "task.classes=4"])
    sentence = "train: was packed for classes 3, the recipe says 4; correct the recipe, or"
    with pytest.raises(MismatchError, match=sentence):
        assemble.examples(recipe, "train")


def tensors_of(batch: Batch) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    mapped(batch, found.append)
    return found


def test_a_batch_comes_out_of_one_memory_as_it_went_in():
    signals = TeacherSignal(
        TopLogits(torch.arange(6).view(3, 2), torch.arange(6.0).view(3, 2), torch.arange(15.0).view(3, 5)),
        {"low_scale": torch.arange(21.0).view(3, 7).half(), "low": torch.arange(21, dtype=torch.int8).view(3, 7)},
    )
    batch = Batch(
        keys=("a", "b", "c"),
        images=torch.arange(3 * 3 * 5 * 4, dtype=torch.uint8).view(3, 5, 4, 3).permute(0, 3, 1, 2),
        targets=torch.tensor([2, 0, 1]),
        sizes=torch.tensor([[5, 4]] * 3),
        valid=torch.tensor([True, False, True]),
        total=7,
        signals=signals,
        failed=("it cannot be read",),
        groups=torch.tensor([[2**62, -1]] * 3),
        mixture=Mixture(torch.tensor([1, 2, 0]), torch.tensor([0.25, 0.0, 1.0])),
    )
    handed = packed(batch)
    assert tensors_of(handed.batch) and not any(isinstance(one, torch.Tensor) for one in tensors_of(handed.batch))
    assert handed.memory.is_shared()
    back = unpacked(handed)
    assert len(tensors_of(back)) == 12
    for one, other in zip(tensors_of(batch), tensors_of(back), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
        assert other.untyped_storage().data_ptr() == handed.memory.data_ptr() and other.data_ptr() % 64 == 0
    assert (back.keys, back.total, back.failed) == (batch.keys, batch.total, batch.failed)
    alone = batch._replace(sizes=None, signals=None, groups=None, mixture=None)
    back = unpacked(packed(alone))
    assert [back.sizes, back.signals, back.groups, back.mixture] == [None] * 4
    assert all(map(torch.equal, tensors_of(alone), tensors_of(back)))
