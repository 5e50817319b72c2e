"""Someone's own webdataset, whoever wrote its tars: used as it is, never changed, or refused in a sentence."""

import gzip
import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import webdataset
from conftest import CLASSES, pack_examples, picture
from processes import contents, done, kd_dist, run, sentence

from kd_dist import assemble, cache_teacher, journey, manifest, train
from kd_dist.config import load
from kd_dist.disk import file_digest
from kd_dist.errors import DataError, MismatchError, RecipeError, ShardError
from kd_dist.shards import VIEWED, Shard, index_path
from kd_dist.verify import verify

Examples = list[tuple[str, dict[str, bytes]]]  # key, {extension: content}
SPLITS = ("train", "val", "test")
PATTERNS = {split: f"pets-{split}-*.tar" for split in SPLITS}


def png(label: int, seed: int) -> bytes:
    file = io.BytesIO()
    picture(label, seed).save(file, "PNG")
    return file.getvalue()


def some(first: int = 0, count: int = 4) -> Examples:
    return [(f"pet{n:03d}", {"png": png(n % 3, n), "cls": b"%d" % (n % 3)}) for n in range(first, first + count)]


def stock(path: Path, examples: Examples) -> None:
    """As webdataset's own writer does it: a float mtime, so a PAX header before every member."""
    with webdataset.TarWriter(str(path), encoder=False) as tar:
        for key, members in examples:
            tar.write({"__key__": key, **members})


def gnu(path: Path, examples: Examples, *options: str, prefix: str = "") -> None:
    """As GNU tar does it, from files, folders being entries of their own."""
    folder = path.with_suffix(".d")
    names = []
    for key, members in examples:
        for extension, content in members.items():
            names.append(f"{prefix}{key}.{extension}")
            (folder / names[-1]).parent.mkdir(parents=True, exist_ok=True)
            (folder / names[-1]).write_bytes(content)
    folders = sorted({os.path.dirname(name) for name in names} - {""})
    (folder / "list").write_text("\n".join([*folders, *names]) + "\n")
    command = ["tar", "--create", f"--file={path}", "--no-recursion", "--mode=0600", *options, "--files-from=list"]
    subprocess.run(command, cwd=folder, check=True)
    shutil.rmtree(folder)


def python(path: Path, examples: Examples, kind: int = tarfile.USTAR_FORMAT) -> None:
    """As Python's tarfile does it, with an owner and a mode that mean nothing here."""
    with tarfile.open(path, "w", format=kind) as tar:
        for key, members in examples:
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size, info.mode, info.uid, info.uname = len(content), 0o777, 4242, "nobody"
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def pets(experiment) -> Path:
    """The folder of `experiment` with `pets/`, tars of three writers, and `wds.yaml`, a recipe of them."""
    (experiment / "pets").mkdir()
    for number, split in enumerate(SPLITS):
        stock(experiment / "pets" / f"pets-{split}-0.tar", some(100 * number))
        gnu(experiment / "pets" / f"pets-{split}-1.tar", some(100 * number + 10), prefix="./folder/")
    python(experiment / "pets" / "pets-train-2.tar", some(20, 3))
    (experiment / "wds.yaml").write_text(recipe_of(PATTERNS))
    return experiment


def recipe_of(options: dict, root: str = "pets") -> str:
    text = (Path("tiny.yaml")).read_text().replace("source: image_folder", "source: webdataset")
    return text.replace("root: pictures", f"root: {root}\n  options: {json.dumps(options)}")


def index(*words: str) -> dict:
    return journey.index_recipe(load("wds.yaml", words))


def linked(split: str = "train", number: int = 0) -> Path:
    return Path("shards/wds") / split / f"data-{number:06d}.tar"


def traces(folder: Path) -> dict[str, tuple]:
    """Digest, size and times of change of each file, and its name."""
    stats = {path.name: path.stat() for path in sorted(folder.iterdir())}
    return {name: (file_digest(folder / name), one.st_size, one.st_mtime_ns) for name, one in stats.items()}


def test_tars_are_linked_and_not_touched(pets, capsys):
    before = traces(Path("pets"))
    for path in Path("pets").iterdir():
        path.chmod(0o444)
    Path("pets").chmod(0o555)
    made = index()
    Path("pets").chmod(0o755)
    assert traces(Path("pets")) == before and len(before) == 7
    assert {split: (one["examples"], len(one["shards"])) for split, one in made.items()} == {
        "test": (8, 2),
        "train": (11, 3),
        "val": (8, 2),
    }
    train = made["train"]
    assert train["tars"] == ["pets-train-0.tar", "pets-train-1.tar", "pets-train-2.tar"]
    assert train["members"] == {"image": ["jpg", "jpeg", "png", "webp"], "label": "cls"}
    assert train["class_names"] == ["0", "1", "2"] and train["quarantined"] == []
    assert not {"shard_size", "fractions"} & train.keys()
    for number, name in enumerate(train["tars"]):
        assert os.readlink(linked("train", number)) == str(pets / "pets" / name)
        assert not index_path(linked("train", number)).is_symlink()
        assert train["shards"][number]["sha256"] == before[name][0]
    assert Shard(linked("train", 1)).keys == [f"./folder/pet{n:03d}" for n in range(10, 14)]
    assert "index train: 3 tars" in capsys.readouterr().err
    files = {path: path.stat().st_mtime_ns for path in Path("shards").rglob("*") if path.name != ".lock"}
    assert index() == made and journey.pack_recipe(load("wds.yaml")) == made  # done before
    assert {path: path.stat().st_mtime_ns for path in files} == files and len(files) == 21


def test_stock_webdataset_reads_the_links(pets):
    index()
    with_labels = webdataset.WebDataset([str(linked("train", n)) for n in range(3)], shardshuffle=False)
    read = [(sample["__key__"], int(sample["cls"])) for sample in with_labels]
    shards = assemble.examples(load("wds.yaml"), "train")
    decode = assemble.task(load("wds.yaml")).decode
    ours = [decode(*shards.read(n, i)) for n in range(3) for i in range(len(shards.shard(n)))]
    assert [(one.key, one.target) for one in ours] == read and len(read) == 11


def twins(folder: Path) -> None:
    """`wds.yaml`, of the examples that `tiny.yaml` has packed, in the same tars by three writers."""
    pack_examples(load("tiny.yaml"))
    (folder / "pets").mkdir()
    for split in SPLITS:
        for number, path in enumerate(sorted((folder / "shards/tiny" / split).glob("*.tar"))):
            shard = Shard(path)
            theirs = []
            for place, key in enumerate(shard.keys):
                packed = shard.read(place)
                label = json.loads(packed["json"])["label"]
                theirs.append((key, {"PNG": packed["png"], "json": json.dumps({"kind": label}).encode()}))
            write = (stock, gnu, python)[number % 3]
            write(folder / "pets" / f"pets-{split}-{number:02d}.tar", theirs)
    (folder / "wds.yaml").write_text(recipe_of({**PATTERNS, "label": "json:kind", "class_names": list(CLASSES)}))


@pytest.mark.slow
def test_the_same_images_train_to_the_same_bytes(experiment):
    """Batches, the cached signals, the student: those of the same images in class folders."""
    twins(experiment)
    done(run(kd_dist, "index", "wds.yaml", folder=experiment))
    words = ["teacher.weights=null"]
    recipes = {name: load(f"{name}.yaml", words) for name in ("tiny", "wds")}
    assert sum(len(list((experiment / f"shards/{name}/train").glob("*.tar"))) for name in recipes) == 2 * 4
    batches = {}
    for name, recipe in recipes.items():
        corridor = assemble.training_corridor(recipe, "pretrain", 0, 1)
        batches[name] = [corridor[cursor] for cursor in range(len(corridor))]
        cache_teacher.cache_teacher(recipe)
    assert len(batches["tiny"]) == len(batches["wds"]) >= 6
    for one, other in zip(*batches.values(), strict=True):
        assert one.keys == other.keys and torch.equal(one.targets, other.targets)
        assert torch.equal(one.images, other.images)
    caches = [contents(experiment / "shards" / name / "train" / "teacher", "*.tar", "*.idx") for name in recipes]
    assert caches[0] == caches[1] and len(caches[0]) == 2 * 4
    assert [verify(recipes["wds"], split, 64)["ok"] for split in SPLITS] == [True] * 3
    taught = [assemble.training_corridor(recipe, "distill", 0, 1) for recipe in recipes.values()]
    for cursor in range(len(taught[0])):
        one, other = (corridor[cursor] for corridor in taught)
        assert torch.equal(one.images, other.images) and torch.equal(one.signals.logits, other.signals.logits)
    done(run(train.main, ["wds.yaml", "--stage", "distill", *words], folder=experiment))
    # What changes afterwards is noticed, and the user's tar is named.
    tar = experiment / "pets/pets-train-01.tar"
    whole = tar.read_bytes()
    at = whole.index(b"IDAT") + 9
    tar.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    named = rf"{tar}: bring that back as it was, or delete .*/train and index anew"
    with pytest.raises(
        ShardError, match=f"data-000001.tar: .* its sha256 is not the manifest's; it is a link to {named}"
    ):
        verify(recipes["wds"], "train", 64)
    corridor = assemble.training_corridor(recipes["wds"], "pretrain", 0, 1)
    with pytest.raises(ShardError, match=f"data-000001.tar: example '.*' is damaged: .*; it is a link to {named}"):
        [corridor[cursor] for cursor in range(len(corridor))]
    said = sentence(run(kd_dist, "index", "wds.yaml", *words, folder=experiment))
    assert said.startswith(f"{tar}: is not the tar that was indexed as shards/wds/train/data-000001.tar: its sha256 is")
    tar.write_bytes(whole[:-512])
    with pytest.raises(MismatchError, match=f"^{tar}: is not the tar that was indexed as .*; bring that one back, or"):
        journey.pack_recipe(recipes["wds"])
    tar.write_bytes(whole)
    assert index().keys() == set(SPLITS)


# What a tar may be, and what is done to it


def hard_linked(path: Path) -> None:
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("pet900.png")
        info.type, info.linkname = tarfile.LNKTYPE, "pet000.png"
        tar.addfile(info)


def sparse(path: Path) -> None:
    with open(path.parent / "pet901.png", "wb") as file:
        file.truncate(1_000_000)
    subprocess.run(["tar", "-cSf", path, "pet901.png"], cwd=path.parent, check=True)
    os.unlink(path.parent / "pet901.png")


def rewritten(change: Callable[[bytes], bytes]) -> Callable[[Path], int]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


def holding(*names: str) -> Callable[[Path], None]:
    """A tar of members with these names, images and labels being sound."""
    content = {"png": png(0, 0), "cls": b"0"}

    def write(path: Path) -> None:
        with tarfile.open(path, "w") as tar:
            for name in names:
                info, held = tarfile.TarInfo(name), content.get(name.rpartition(".")[2], b"text")
                info.size = len(held)
                tar.addfile(info, io.BytesIO(held))

    return write


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "gzip": (rewritten(gzip.compress), r"is compressed \(gzip\), .*; decompress it"),
    "zstd": (rewritten(lambda data: b"\x28\xb5\x2f\xfd" + data), r"is compressed \(zstd\), .*; decompress it"),
    "text": (rewritten(lambda data: b"no tar\n" * 300), "it cannot be read as an uncompressed tar .*; copy it again"),
    "no bytes": (rewritten(lambda data: b""), "it cannot be read as an uncompressed tar .*; copy it again or make it"),
    "no members": (rewritten(lambda data: bytes(10240)), "holds no example; take it out of data.options"),
    "cut in a member": (rewritten(lambda data: data[:700]), "cannot be read|cut short or damaged at byte"),
    "cut between members": (
        rewritten(lambda data: data.rstrip(b"\0").ljust(-(-len(data.rstrip(b"\0")) // 512) * 512, b"\0")),
        "the tar is cut short or damaged at byte .*; copy it again or make it again",
    ),
    "a hard link": (hard_linked, "'pet900.png' is a hard link to 'pet000.png'; write .* with --hard-dereference"),
    "sparse": (sparse, "'pet901.png' is sparse, with holes .*; write the tar again without --sparse"),
    "not adjacent": (
        holding("a.png", "b.png", "a.cls", "b.cls"),
        r"the key 'a' comes twice; .* side by side \(rename the members and write the tar again\)",
    ),
    "twice": (holding("a.png", "a.cls", "a.png", "a.cls"), "the key 'a' has an extension twice .*write the tar again"),
    "dotted": (
        holding("a.1.png", "a.1.cls", "a.2.png", "a.2.cls"),
        "'a.1.png' and its label are of an example of their own, but a key ends at its first dot, so webdataset merges",
    ),
    "partly dotted": (holding("a.png", "a.cls", "a.2.png", "a.2.cls"), "'a.2.png' and its label are of an example of"),
    "a pickle": (holding("a.png", "a.cls", "a.boxes.pyd"), "the key 'a' has a pickled member 'boxes.pyd', which can"),
    "no image": (holding("a.cls", "a.txt"), "no example has the image 'jpg;jpeg;png;webp', only cls, txt; set data.op"),
    "no label": (holding("a.png", "a.txt"), "no example has the label 'cls', only png, txt; set data.options.label"),
    "a long key": (holding("k" * 64 + ".png", "k" * 64 + ".cls"), "has 64 characters, and the name of its signals"),
    "not ASCII": (holding("é.png", "é.cls"), "the key 'é' holds something else than printable ASCII"),
    "no extension": (holding("a.png", "a.cls", "README"), "the key 'README' has the extension ''"),
    "another key's": (
        lambda path: stock(path, some(2)),
        "the key 'pet002' is in .*pets-train-0.tar too; a key comes o",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_tar_cannot_be(pets, case):
    assert len(REFUSED) == 20
    spoil, words = REFUSED[case]
    tar = pets / "pets" / "pets-train-2.tar"
    spoil(tar)
    with pytest.raises(ShardError, match=f"^{tar}: .*({words})"):
        index()
    assert not (pets / "shards/wds/train/manifest.json").exists()
    with pytest.raises(ShardError, match="there is no manifest, so these shards are not finished"):
        assemble.examples(load("wds.yaml"), "train")
    python(tar, some(20, 3))  # mended
    assert index()["train"]["examples"] == 11


def test_every_tar_that_cannot_be_used_is_told(pets, capsys):
    for number in (0, 2):
        holding("a.png", "a.cls", "a.pkl")(pets / f"pets/pets-train-{number}.tar")
    with pytest.raises(ShardError, match="wds/train: 2 of 3 tars cannot be used, as told above; mend them, and run"):
        index()
    told = [line for line in capsys.readouterr().err.splitlines() if "pickled member 'pkl'" in line]
    assert [line.split(": ")[1] for line in told] == [f"{pets}/pets/pets-train-{number}.tar" for number in (0, 2)]


def test_long_names_and_every_format(pets):
    """PAX and GNU headers for long names; the key itself may have 63 characters."""
    long = "folder-of-some-length/" + "k" * 41
    count = 0
    for write in (
        lambda path, one: gnu(path, one, "--format=gnu"),
        lambda path, one: gnu(path, one, "--format=posix"),
        lambda path, one: gnu(path, one, "--format=v7"),
        lambda path, one: python(path, one, tarfile.GNU_FORMAT),
        lambda path, one: python(path, one, tarfile.PAX_FORMAT),
    ):
        shutil.rmtree("shards", ignore_errors=True)
        more = {} if count == 2 else {"a-comment-that-is-longer-than-the-header-has-room-for." + "x" * 60: b"text"}
        write(pets / "pets/pets-train-2.tar", [(long, {"png": png(1, 1), "cls": b" 1\n", **more})])
        made = index()
        assert Shard(linked("train", 2)).keys == [long] and made["train"]["examples"] == 9
        count += 1
    assert count == 5 and len(long) == 63


def test_bad_examples_are_left_out_and_listed(pets):
    good = png(1, 1)
    bad = {
        "torn": {"png": good[:60], "cls": b"1"},
        "high": {"png": good, "cls": b"3"},
        "words": {"png": good, "cls": b"cat"},
        "alone": {"png": good},
        "blind": {"cls": b"1", "txt": b"a cat"},
    }
    stock(pets / "pets/pets-train-2.tar", [*some(20, 2), *bad.items(), *some(30, 2)])
    made = index()["train"]
    reasons = {row["key"]: row["reason"] for row in made["quarantined"]}
    assert list(reasons) == list(bad) and made["quarantined"][0]["name"] == "pets-train-2.tar: torn"
    for key, words in {
        "torn": "the image cannot be decoded",
        "high": "label 3 is outside 0..2, the task's 3 classes",
        "words": "its label 'cls' is b'cat', no whole number",
        "alone": "it has no label 'cls', only png",
        "blind": "it has no image, only cls, txt",
    }.items():
        assert words in reasons[key]
    shards = assemble.examples(load("wds.yaml"), "train")
    assert shards.shard(2).keys == ["pet020", "pet021", "pet030", "pet031"] and len(shards) == made["examples"] == 12
    decode = assemble.task(load("wds.yaml")).decode
    assert [decode(*shards.read(2, place)).target for place in range(4)] == [2, 0, 0, 1]


def test_fields_of_json_and_the_first_of_several_images(pets):
    record = json.dumps({"breed": 2, "odd": "2"}).encode()
    members = {"left.png": png(0, 1), "png": png(1, 1), "json": record, "txt": b"." * VIEWED}
    for path in Path("pets").iterdir():
        stock(path, [(f"{path.stem}-{n}", members) for n in range(2)])
    (pets / "wds.yaml").write_text(recipe_of({**PATTERNS, "image": "left.png;png", "label": "json:breed"}))
    index()
    shards = assemble.examples(load("wds.yaml"), "val")
    assert shards.read(0, 0)[1] == {"png": png(0, 1), "json": b'{"label": 2}'}
    for field, words in {"age": "JSON without a field 'age'", "odd": "label '2' is not a class index"}.items():
        (pets / "wds.yaml").write_text(recipe_of({**PATTERNS, "image": "png", "label": f"json:{field}"}))
        with pytest.raises(
            MismatchError, match="wds/test: was made with members.image.0 = 'left.png', the recipe says"
        ):
            index()
        with pytest.raises(DataError, match=f"every example is quarantined, the first is 'pets-test-0.*{words}"):
            index(f"name=of-{field}")


def test_a_data_set_that_has_moved_keeps_its_indexes(pets):
    made = index()
    before = {path: path.stat().st_mtime_ns for path in Path("shards").rglob("*.idx")}
    Path("pets").rename("moved")
    with pytest.raises(
        ShardError, match=rf"the tar is missing though .*; it is a link to {pets}/pets/pets-train-0.tar"
    ):
        Shard(linked())
    again = journey.pack_recipe(load("wds.yaml", ["data.root=moved"]))
    assert os.readlink(linked()) == str(pets / "moved/pets-train-0.tar")
    assert again["train"] == {**made["train"], "source": {**made["train"]["source"], "root": "moved"}}
    assert {path: path.stat().st_mtime_ns for path in before} == before and len(before) == 7
    stock(pets / "moved/pets-train-0.tar", some(50))
    shutil.copytree("moved", "third")
    with pytest.raises(MismatchError, match=f"^{pets}/third/pets-train-0.tar: is not the tar that was indexed as"):
        journey.pack_recipe(load("wds.yaml", ["data.root=third"]))


def test_a_killed_index_goes_on_and_trusts_no_index_that_is_not_its_tar_s(pets):
    """Where no manifest vouches for an index, the bytes of its tar have to: the size alone may be the same."""
    index()
    tar, indexes = pets / "pets/pets-train-2.tar", [index_path(linked("train", number)) for number in range(3)]
    (pets / "shards/wds/train/manifest.json").unlink()
    times, size = [path.stat().st_mtime_ns for path in indexes], tar.stat().st_size
    python(tar, [(key, {**members, "cls": b"0"}) for key, members in some(20, 3)])
    assert tar.stat().st_size == size
    made = index()["train"]
    assert [path.stat().st_mtime_ns == time for path, time in zip(indexes, times, strict=True)] == [True, True, False]
    assert made["shards"][2]["sha256"] == file_digest(tar)
    (pets / "shards/wds/train/manifest.json").unlink()
    tar.write_bytes(tar.read_bytes().replace(b"pet022.cls", b"pet020.cls"))  # and a header's checksum is wrong
    assert tar.stat().st_size == size
    with pytest.raises(ShardError, match="cut short or damaged at byte"):
        index()
    assert [path.exists() for path in indexes] == [True, True, False]
    python(tar, some(20, 3))
    for path in (pets / "shards").rglob("manifest.json"):
        path.unlink()
    assert index("task.classes=4")["train"]["classes"] == 4  # another judge looks at all of them again
    assert not any(path.stat().st_mtime_ns == time for path, time in zip(indexes, times, strict=True))


def test_folders_of_another_kind_are_left_alone(pets, packed):
    for words in (["name=tiny"], []):
        if not words:  # without its manifest a packed shard is still no link
            shutil.copytree("shards/tiny", "shards/wds")
            for path in Path("shards/wds").glob("*/manifest.json"):
                path.unlink()
        before = contents(pets / "shards", "**/*.tar")
        with pytest.raises(
            MismatchError, match="source = 'image_folder', the recipe says 'webdataset'|is no link, but a"
        ):
            index(*words)
        assert contents(pets / "shards", "**/*.tar") == before
    index("name=other")
    with pytest.raises(MismatchError, match="shards/other/.*: was made with"):
        journey.pack_recipe(load("tiny.yaml", ["name=other"]))


OPTIONS: dict[str, tuple[dict, str]] = {
    "no tar": ({"train": "cats-*.tar"}, "data.options.train: no file pets/cats-\\*.tar; correct data.root or the patt"),
    "a hole": ({"train": "pets-train-{0..3}.tar"}, "data.options.train: no file pets/pets-train-3.tar; correct"),
    "braces": ({"train": "pets-train-{0..1.tar"}, "has unbalanced braces; close them"),
    "a number": ({"train": [3]}, "must be a pattern of tars, or a list of them, not .3."),
    "a URL": ({"train": "https://x.org/{0..9}.tar"}, "is no local file; index a local copy of the tars, then copy"),
    "a pipe": ({"train": "pipe:cat x.tar"}, "is no local file; index a local copy of the tars, then copy"),
    "in two splits": ({"val": "pets-train-1.tar"}, "pets-train-1.tar: stands twice in .*, in 'train' and 'val'"),
    "twice": ({"train": ["*-train-0.tar", "pets-train-0.tar"]}, "pets-train-0.tar: stands twice in data.options"),
    "no split": ({"test": None}, "no tars for split 'test'; name some: tars are used as they are, so data.splits cann"),
    "a typo": ({"lable": "txt"}, "'lable' is neither a split of data.splits nor an option; did you mean 'label'?"),
    "no images": ({"image": "jpg;npy"}, "data.options.image: 'npy' is none of jpg"),
    "a pickle": ({"label": "PKL"}, "data.options.label: 'pkl' is a pickle, which is never read"),
    "no field": ({"label": "json"}, "'json' does not name the label; write cls, or json:field"),
    "names": ({"class_names": ["a", "b"]}, "has 2 classes, the recipe's task.classes says 3"),
}


def test_options_that_cannot_be(pets):
    for options, words in OPTIONS.values():
        given = {name: one for name, one in {**PATTERNS, **options}.items() if one is not None}
        (pets / "wds.yaml").write_text(recipe_of(given))
        with pytest.raises(DataError, match=words):
            index()
    assert len(OPTIONS) == 14 and not (pets / "shards").exists()
    with pytest.raises(RecipeError, match="data.options of webdataset: option 'root' is missing"):
        index("data.root=null")
    with pytest.raises(RecipeError, match="data.source image_folder: has no tars to be indexed; run `kd-dist pack`"):
        journey.index_recipe(load("tiny.yaml"))
    segmentation = ["task.name=segmentation", "evaluate.metric=miou"]
    with pytest.raises(RecipeError, match="'webdataset' gives images with one class each, for classification only"):
        load("wds.yaml", segmentation)


def test_braces_and_lists(pets):
    (pets / "wds.yaml").write_text(
        recipe_of({**PATTERNS, "train": ["pets-train-{2..1}.tar", str(pets / "pets/pets-train-0.tar")]})
    )
    assert index()["train"]["tars"] == [f"pets-train-{number}.tar" for number in (2, 1, 0)]


def test_finished_links_under_a_url_are_read_like_any_shard(pets):
    made = index()
    subprocess.run(["cp", "-rL", "shards", "store"], check=True)
    shutil.rmtree("pets")
    shutil.rmtree("shards")
    from fsspec import filesystem

    filesystem("memory").put(str(pets / "store"), "/store", recursive=True)
    recipe = load("wds.yaml", ["data.shards=memory://store"])
    assert journey.pack_recipe(recipe) == made
    shards = assemble.examples(recipe, "train")
    assert [shards.read(0, place) for place in range(4)] == [
        (key, {"png": members["png"], "json": json.dumps({"label": int(members["cls"])}).encode()})
        for key, members in some()
    ]
    with pytest.raises(ShardError, match="memory://store/fresh: lacks a split; nothing can be indexed under a URL"):
        journey.pack_recipe(load("wds.yaml", ["data.shards=memory://store", "name=fresh"]))


def test_a_manifest_that_names_no_members_is_refused(pets):
    index()
    path = pets / "shards/wds/train/manifest.json"
    whole = json.loads(path.read_text())
    spoilt = [3, [], {}, {"image": "png", "label": "cls"}, {"image": ["png"]}, {"image": [1], "label": "cls"}]
    for members in spoilt:
        path.write_text(json.dumps({**whole, "members": members}))
        with pytest.raises(ShardError, match="the manifest makes no sense: members"):
            manifest.read_manifest(path.parent)
    assert len(spoilt) == 6
