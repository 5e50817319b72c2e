"""Files made to do harm: each is refused in one sentence, runs nothing, writes nothing and takes little memory."""

import gzip
import io
import json
import os
import pickle
import re
import resource
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from accelerate import Accelerator
from conftest import picture
from PIL import Image
from processes import contents, done, inside, laboratory, run
from test_index import DEEP, EXAMPLES, INDEXES, LONG, resealed
from torch import nn

from kd_dist import assemble, cache_teacher, checkpoint, journey, manifest
from kd_dist.config import load
from kd_dist.disk import file_digest
from kd_dist.errors import KdError
from kd_dist.folders import Shards
from kd_dist.models import Built, Network, load_weights
from kd_dist.rows import SignalShards, feature_codecs
from kd_dist.shards import Shard, index_tar, write_shard
from kd_dist.signals import dtype_from_json

MOST = 200 * 2**20  # bytes of memory that all refusals together may take
CANARY = "canary"  # the file that whatever is executed makes, in the working directory
HOSTILE_NAMES = ("a.pkl", "a.pyd", "a.pth", "a.pt", "a.b.pkl", "a.cls.pickle.gz", "a.PKL.gz.gz", "a.pt.gz")
STRAY_NAMES = ("../x.png", "/abs/x.png", "a/../../x.png", "./../x.png", "a/./../x.png")


class Touch:
    """Makes a file when it is unpickled."""

    def __reduce__(self):
        return os.mknod, (CANARY,)


# ---------------------------------------------------------------------------------------------- bait


def tar_of(path: Path, *members: tuple[str, bytes], kind: bytes = tarfile.REGTYPE, link: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, link, len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar header that claims a content of `size` bytes."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def pax(*records: str) -> bytes:
    """A PAX header, whose records count for the member behind it."""
    content = b"".join(f"{len(one) + 1 + len(str(len(one) + 4))} {one}\n".encode() for one in records)
    return header("pax", len(content), tarfile.XHDTYPE) + content.ljust(-(-len(content) // 512) * 512, b"\0")


def tars(folder: Path) -> Iterator[Path]:
    """Tars that `index_tar` must refuse."""
    folder.mkdir(parents=True)
    for number, name in enumerate((*HOSTILE_NAMES, *STRAY_NAMES)):
        yield tar_of(folder / f"name-{number}.tar", (name, pickle.dumps(Touch())))
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
        yield tar_of(folder / f"kind-{kind.decode()}.tar", ("a.png", b""), kind=kind, link="/etc/passwd")
    end = bytes(10240)
    for name, content in {
        "size": header("a.png", 2**60) + end,
        "negative": header("a.png", -(2**40)) + end,
        "long-name": header("././@LongLink", 2**40, tarfile.GNUTYPE_LONGNAME) + end,
        "pax": header("pax", 2**60, tarfile.XHDTYPE) + end,
        "pax-size": pax("size=" + "9" * 80) + header("a.png", 1) + end,
        "chain": header("././@LongLink", 0, tarfile.GNUTYPE_LONGNAME) * 5000 + header("a.png", 1) + end,
        "sparse": pax("GNU.sparse.map=" + "0,1," * 9 + "x") + header("a.png", 1) + end,
        "sparse-size": pax("GNU.sparse.size=-1", "GNU.sparse.map=0,9") + header("a.png", 1) + end,
    }.items():
        (folder / f"{name}.tar").write_bytes(content)
        yield folder / f"{name}.tar"


def indexes(folder: Path) -> Iterator[Path]:
    """Shards whose index has a right checksum and wrong tables."""
    for number, (change, _) in enumerate(INDEXES.values()):
        path = folder / f"{number}.tar"
        write_shard(path, EXAMPLES, {})
        yield resealed(path, change)


MANIFESTS: dict[str, Callable[[dict], Any]] = {
    "a shard elsewhere": lambda about: about["shards"][0].update(name="../val/data-000000.tar"),
    "an absolute shard": lambda about: about["shards"][0].update(name="/etc/passwd"),
    "a shard of a folder": lambda about: about["shards"][0].update(name="..\\x.tar"),
    "2^40 examples": lambda about: about["shards"][0].update(examples=2**40),
    "less than none": lambda about: about["shards"][0].update(examples=-1),
    "half an example": lambda about: about["shards"][0].update(examples=0.5),
    "many examples": lambda about: about["shards"][0].update(examples=2**31),
    "no shards": lambda about: about.pop("shards"),
    "shards of another kind": lambda about: about.update(shards={"0": about["shards"][0]}),
    "a row that is a list": lambda about: about.update(shards=[[]]),
    "another kind": lambda about: about.update(kind="pickle"),
    "quarantined of another kind": lambda about: about.update(quarantined=[0]),
}
OF_SIGNALS: dict[str, Callable[[dict], Any]] = {
    **MANIFESTS,
    "objects": lambda about: about["row_dtype"].append(["x", "|O"]),
    "a million fields": lambda about: about.update(row_dtype=about["row_dtype"] + [["x", "<f4", [2**40]]]),
    "a field of another kind": lambda about: about.update(row_dtype=[0]),
    "a type of another kind": lambda about: about["row_dtype"][0].__setitem__(1, {}),
    "another row": lambda about: about["row_dtype"].append(["more", "<f4"]),
    "no view": lambda about: about["row_dtype"][1].__setitem__(1, "<f4"),
    "no grid": lambda about: about["codec"].pop("grid"),
    "a grid of another kind": lambda about: about["codec"].update(grid=3),
    "features without a shape": lambda about: about["codec"].update(features={"low": {}}),
    "a feature of another kind": lambda about: about["codec"].update(features={"low": 0}),
    "a huge feature": lambda about: about["codec"].update(
        features={"low": {"shape": [2**62, 2**62], "store": "fp32", "pool": 1, "dither": False}}
    ),
    "an unknown codec": lambda about: about["codec"].update(logits="pickle"),
    "no teacher": lambda about: about.pop("teacher"),
    "views of another kind": lambda about: about["views"].update(count="8"),
}


def safetensors_of(described: Any, content: bytes = b"", claimed: int | None = None) -> bytes:
    text = (described if isinstance(described, str) else json.dumps(described)).encode()
    return struct.pack("<Q", len(text) if claimed is None else claimed) + text + content


SAFETENSORS = {
    "a header of 2^60 bytes": safetensors_of("{}", claimed=2**60),
    "a header of 2^26 bytes": safetensors_of("{}", claimed=2**26),
    "a deep header": safetensors_of(DEEP),
    "10^9 numbers": safetensors_of({"x": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}}, b"1234"),
    "a shape that wraps": safetensors_of({"x": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}}),
    "an unknown type": safetensors_of({"x": {"dtype": "O", "shape": [1], "data_offsets": [0, 8]}}, bytes(8)),
    "a pickle": pickle.dumps(Touch()),
    "nothing": b"",
}


def zip_bomb(path: Path, target: dict[str, torch.Tensor]) -> Path:
    """A torch file whose storages are deflated: a thousand times their size."""
    torch.save(target, path.with_suffix(".whole"))
    with zipfile.ZipFile(path.with_suffix(".whole")) as whole, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for one in whole.namelist():
            with bomb.open(one, "w", force_zip64=True) as file:
                file.write(whole.read(one))
    path.with_suffix(".whole").unlink()
    return path


def weights(folder: Path) -> Iterator[Path]:
    """Weights files that `load_weights` must refuse."""
    folder.mkdir(parents=True)
    for number, content in enumerate(SAFETENSORS.values()):
        (folder / f"{number}.safetensors").write_bytes(content)
        yield folder / f"{number}.safetensors"
    for ending in ("pt", "pth", "tar", "bin"):
        for how in ({}, {"_use_new_zipfile_serialization": False}):
            path = folder / f"touch-{len(how)}.{ending}"
            torch.save({"weight": Touch()}, path, **how)
            yield path
    (folder / "bare.pth").write_bytes(pickle.dumps(Touch()))
    yield folder / "bare.pth"
    yield tar_of(folder / "old.tar", *((name, pickle.dumps(Touch())) for name in ("pickle", "storages", "tensors")))
    for name, held in {
        "numbers": {0: torch.zeros(2)},
        "sparse": {"weight": torch.zeros(2, 3).to_sparse(), "bias": torch.zeros(2)},
        "list": [torch.zeros(2)],
        "text": {"weight": "x"},
    }.items():
        torch.save(held, folder / f"{name}.pt")
        yield folder / f"{name}.pt"
    (folder / "deep.pt").write_bytes(b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".")
    yield folder / "deep.pt"
    (folder / "long.pt").write_bytes(b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b".")
    yield folder / "long.pt"
    yield zip_bomb(folder / "bomb.pt", {"weight": torch.zeros(64_000_000)})


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def zeros(count: int) -> bytes:
    """So many zeros, deflated."""
    packer, block = zlib.compressobj(9), bytes(2**20)
    parts = [packer.compress(block[: min(2**20, count - start)]) for start in range(0, count, 2**20)]
    return b"".join(parts) + packer.flush()


def png(width: int, height: int, *chunks: bytes) -> bytes:
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return start + b"".join(chunks) + chunk(b"IEND", b"")


def images() -> dict[str, bytes]:
    """Files of an image folder that cannot be packed, by name."""
    whole = io.BytesIO()
    picture(0, 0).save(whole, "PNG")
    eps = io.BytesIO()
    picture(0, 0).save(eps, "EPS")
    archive = io.BytesIO()
    np.savez(archive, x=np.array([Touch()], object))
    return {
        "bomb.png": png(50_000, 50_000, chunk(b"IDAT", zeros(50_000 * 6_251))),
        "text.png": png(1, 1, chunk(b"zTXt", b"note\0\0" + zeros(2**28))),
        "eps.png": eps.getvalue(),
        "pickle.jpg": pickle.dumps(Touch()),
        "archive.bmp": archive.getvalue(),
        "cut.png": whole.getvalue()[:-40],
        "sides.ppm": b"P6 1000000000 1000000000 255\n",
        "digits.pgm": b"P5 " + b"9" * 5000 + b" 1 255\n",
        "empty.webp": b"",
    }


MEMBERS_OF_EXAMPLES = {
    "a deep label": DEEP.encode(),
    "a long label": b'{"label": ' + LONG.encode() + b"}",
    "an infinite label": b'{"label": 1e999}',
    "a label that is a list": b'{"label": [0]}',
    "no JSON": pickle.dumps(Touch()),
}
FACTORS = {"brightness": np.nan, "contrast": np.inf, "saturation": -1.0, "height": 60_000, "top": 60_000, "width": 0}
STATES = {
    "deep": DEEP,
    "long": '{"version": ' + LONG + "}",
    "not UTF-8": "\udcff",
}


# ---------------------------------------------------------------------------------------------- what meets it


def network() -> Network:
    return Network(Built(nn.Linear(2, 3), (0.0,) * 3, (1.0,) * 3), 3, None, "bait")


def read_signals(folder: Path) -> None:
    train = Shards(Path("shards/tiny/train"))
    SignalShards(folder, train).rows(np.arange(len(train)), np.zeros(len(train), np.int64))


def read_examples(folder: Path) -> None:
    shards = Shards(folder)
    for number in range(len(shards.paths)):
        shards.shard(number).read(0)


def read_bases(folder: Path) -> None:
    low = {"shape": [4, 2, 2], "store": "fp16", "pool": 1, "dither": False}
    digest = file_digest(folder / "bases.safetensors")
    feature_codecs(folder, {"bases_sha256": digest, "features": {"x": low}})


def read_checkpoint(folder: Path) -> None:
    checkpoint.load(folder, {})


def decode(folder: Path) -> None:
    members = {path.name: path.read_bytes() for path in folder.iterdir()}
    assemble.task(load("tiny.yaml")).decode("key", members)


def drain(folder: Path) -> None:
    """Every batch of a training run whose signals lie in `folder`."""
    recipe = load("tiny.yaml", ["teacher.weights=null", f"data.shards={folder}"])
    corridor = assemble.training_corridor(recipe, "distill", 0, 1)
    for cursor in range(len(corridor)):
        corridor[cursor]


ENTRIES: dict[str, tuple[Callable[[Path], Any], int]] = {  # folder of the bait: what reads it, and how many there are
    "tars": (index_tar, len(HOSTILE_NAMES) + len(STRAY_NAMES) + 5 + 8),
    "indexes": (Shard, len(INDEXES)),
    "examples": (read_examples, len(MANIFESTS) + 2),
    "signals": (read_signals, len(OF_SIGNALS) + 2),
    "bases": (read_bases, len(SAFETENSORS)),
    "weights": (lambda path: load_weights(network(), path), len(SAFETENSORS) + 8 + 2 + 4 + 3),
    "checkpoints": (read_checkpoint, len(STATES) + 2 * len(SAFETENSORS)),
    "members": (decode, len(MEMBERS_OF_EXAMPLES)),
    "rows": (drain, len(FACTORS) + 2),
}


def attack(folder: str) -> None:
    """Read every bait with a gigabyte to spare; say what each was answered with, as lines of JSON."""
    os.environ["PATH"] = f"{Path.cwd()}/bin:{os.environ['PATH']}"
    drain(Path("shards"))  # all is imported and warm
    claimed = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (claimed + 2**30, claimed + 2**30))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, (entry, _) in ENTRIES.items():
        for bait in sorted(path for path in (Path(folder) / name).iterdir() if path.suffix != ".idx"):
            try:
                entry(bait)
                said = "accepted"
            except KdError as error:
                said = f"refused: {error}"
            except BaseException as error:  # whatever a command would end in with a traceback
                said = f"escaped: {error!r}"
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            print(json.dumps([name, bait.name, said, grown * 1024]))
    journey.pack_recipe(load("tiny.yaml", ["name=hostile", "data.root=hostile", "task.classes=2"]))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps(["pack", "hostile", "done", grown * 1024]))


def lay(bait: Path) -> None:
    """All bait, each in the folder of the entry that it is for."""
    tiny = Path("shards/tiny/train")
    list(tars(bait / "tars"))
    list(indexes(bait / "indexes"))
    list(weights(bait / "weights"))
    for name, changes, source in (("examples", MANIFESTS, tiny), ("signals", OF_SIGNALS, tiny / "teacher")):
        texts = [b"{" + b'"a":{' * 100_000, b'{"version": ' + LONG.encode() + b"}"]
        for change in changes.values():
            about = json.loads((source / "manifest.json").read_text())
            change(about)
            texts.append(json.dumps(about).encode())
        for number, text in enumerate(texts):
            copied(source, bait / name / f"{number:02d}")
            (bait / name / f"{number:02d}" / "manifest.json").write_bytes(text)
    for number, content in enumerate(SAFETENSORS.values()):
        folder = bait / "bases" / str(number)
        folder.mkdir(parents=True)
        (folder / "bases.safetensors").write_bytes(content)
        for one in ("model", "optimizer"):
            lay_checkpoint(bait / "checkpoints" / f"{one}-{number}")
            (bait / "checkpoints" / f"{one}-{number}" / f"{one}.safetensors").write_bytes(content)
    for name, text in STATES.items():
        lay_checkpoint(bait / "checkpoints" / name)
        (bait / "checkpoints" / name / "state.json").write_text(text, errors="surrogateescape")
    for number, text in enumerate(MEMBERS_OF_EXAMPLES.values()):
        folder = bait / "members" / str(number)
        folder.mkdir(parents=True)
        (folder / "json").write_bytes(text)
        picture(0, 0).save(folder / "image.png")
        (folder / "image.png").rename(folder / "png")
    lay_rows(bait / "rows")


def copied(source: Path, folder: Path) -> None:
    """A folder's own files, without its folders."""
    folder.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())


def lay_checkpoint(folder: Path) -> None:
    module = nn.Linear(2, 3)
    moments = torch.optim.AdamW(module.parameters()).state_dict()
    checkpoint.save(folder, module.state_dict(), moments, checkpoint.Progress(), {})
    [made] = folder.iterdir()
    for path in made.iterdir():
        path.rename(folder / path.name)
    made.rmdir()


def lay_rows(bait: Path) -> None:
    """Whole folders of shards whose first signals are others: right checksums everywhere, wrong rows."""
    for field, value in FACTORS.items():
        relaid(bait / field, lambda npy, field=field, value=value: with_value(npy, field, value))
    objects = io.BytesIO()
    np.save(objects, np.array([Touch()], object), allow_pickle=True)
    relaid(bait / "objects", lambda npy: objects.getvalue())
    relaid(bait / "objects-padded", lambda npy: objects.getvalue().ljust(len(npy), b"\0"))


def relaid(home: Path, change: Callable[[bytes], bytes]) -> Path:
    """The shards of the tiny recipe at `home`, the first signal member changed, shards and manifests consistent."""
    source, folder = Path("shards/tiny/train"), home / "tiny" / "train"
    copied(source, folder)
    copied(source / "teacher", folder / "teacher")
    path = folder / "teacher" / "signals-000000.tar"
    shard = Shard(path)
    held = [(shard.key(i), shard.read(i)) for i in range(len(shard))]
    held[0] = (held[0][0], {name: change(content) for name, content in held[0][1].items()})
    write_shard(path, held, shard.notes)
    about = manifest.read_manifest(path.parent)
    about["shards"][0] = manifest.shard_entry(Shard(path))
    manifest.write_manifest(path.parent, about)
    return home


def with_value(npy: bytes, field: str, value: float) -> bytes:
    """Rows with another view, and checksums that are right again."""
    dtype = dtype_from_json(manifest.read_manifest("shards/tiny/train/teacher")["row_dtype"])
    start = 10 + int.from_bytes(npy[8:10], "little")
    rows = np.frombuffer(bytearray(npy[start:]), dtype)
    rows["view"][field] = value
    for row in range(len(rows)):
        rows["row_crc"][row] = zlib.crc32(rows[row : row + 1].tobytes()[4:])
    return npy[:start] + rows.tobytes()


@pytest.fixture
def canary(tmp_path, monkeypatch) -> Path:
    """The file that executed bait would make; the folder of `gs` comes first on the path."""
    monkeypatch.chdir(tmp_path)
    ghostscript(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=":")
    return tmp_path / CANARY


def ghostscript(folder: Path) -> None:
    """A `gs` that only leaves a trace."""
    path = folder / "bin" / "gs"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\ntouch {folder / CANARY}\necho 10.0\n")
    path.chmod(0o755)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A user's folder with a cache and all bait in it."""
    folder = laboratory(tmp_path_factory.mktemp("hostile") / "home")
    with inside(folder):
        recipe = load("tiny.yaml", ["teacher.weights=null"])
        journey.pack_recipe(recipe)
        for split in ("train", "val"):
            cache_teacher.cache_split(recipe, split, assemble.teacher(recipe), Accelerator(cpu=True))
        lay(Path("bait"))
    for split in ("train", "val", "test"):
        for number in range(2):
            path = folder / "hostile" / split / f"c{number}" / "a b.png"
            path.parent.mkdir(parents=True)
            picture(0, number).save(path)
    for name, content in images().items():
        (folder / "hostile/train/c0" / name).write_bytes(content)
    os.symlink("/etc/passwd", folder / "hostile/train/c1/link.png")
    os.symlink("/", folder / "hostile/train/c1/root")
    os.mkfifo(folder / "hostile/train/c1/fifo.png")
    os.symlink("/dev/zero", folder / "hostile/train/c1/zero.png")
    ghostscript(folder)
    return folder


@pytest.mark.slow
def test_every_bait_is_refused_in_one_sentence_without_harm(home):
    before, outside = contents(home), sorted(home.parent.iterdir())
    ended = run(attack, "bait", folder=home)
    answers = [json.loads(line) for line in done(ended).splitlines() if line.startswith("[")]
    for name, (_, count) in ENTRIES.items():
        assert sum(one[0] == name for one in answers) == count, name
    wrong = [one for one in answers if not one[2].startswith("refused: ") and one[0] != "pack"]
    assert not wrong, "\n".join(map(str, wrong))
    assert all("\n" not in said and len(said) < 600 for _, _, said, _ in answers)
    assert max(grown for *_, grown in answers) < MOST, [(one[0], one[1], one[3] >> 20) for one in answers]
    made = {name for name in contents(home).keys() ^ before.keys() if not name.startswith("shards/hostile/")}
    assert made == set() and not (home / CANARY).exists()
    assert [path for path in sorted(home.parent.iterdir()) if not path.name.startswith("said-")] == outside
    said = {f"{name}/{bait}": sentence for name, bait, sentence, _ in answers}
    for bait, words in {
        "examples/02": "no folder has a shard '../val/data-000000.tar' of 8 examples; delete it and run kd-dist pack",
        "examples/07": "the manifest makes no sense: shards.0.examples is no int;",
        "examples/08": "its index holds 8 examples with sha256",
        "signals/18": "the manifest's row_dtype is not that of its codecs; delete the folder and run",
        "signals/20": "the manifest describes no codecs (KeyError('grid')); delete the folder and run",
        "weights/touch-0.pth": "it holds more than tensors, or pickled code, which is not loaded",
        "weights/bomb.pt": "it is a compressed archive",
        "weights/sparse.pt": "holds no plain state dict",
        "tars/chain.tar": "cannot be read as an uncompressed tar (maximum recursion depth",
        "tars/long-name.tar": "cannot be read as an uncompressed tar (MemoryError())",
        "rows/brightness": "the view's factors nan, 1.0, 1.0 are not from 0 to 2; cache again",
    }.items():
        assert words in said[bait], said[bait]
    packed = Shards(home / "shards/hostile/train")
    left_out = {one["name"].removeprefix("c0/"): one["reason"] for one in packed.manifest["quarantined"]}
    assert set(left_out) == {*images(), "c1/link.png"}
    assert "decompression bomb" in left_out["bomb.png"] and "no known format" in left_out["eps.png"]
    keys = [key for number in range(len(packed.paths)) for key in packed.shard(number).keys]
    assert sorted(keys) == ["c0/a%20b", "c1/a%20b"]


def test_the_bait_is_live(canary):
    """Without the care that is taken each of the three would leave its trace."""
    pickle.loads(pickle.dumps(Touch()))
    assert canary.exists()
    canary.unlink()
    torch.save({"weight": Touch()}, "x.pt")
    torch.load("x.pt", weights_only=False)
    assert canary.exists()
    canary.unlink()
    with pytest.raises(OSError):
        Image.open(io.BytesIO(images()["eps.png"])).load()
    assert canary.exists()


def test_arrays_of_objects_are_bytes_to_us_and_refused_by_the_stock_reader(canary):
    """`npy` and `npz` may hold pickles: their names are allowed, as NumPy does not load these unless it is told to."""
    one, more = io.BytesIO(), io.BytesIO()
    np.save(one, np.array([Touch()], object), allow_pickle=True)
    np.savez(more, x=np.array([Touch()], object))
    for extension, content in {"npy": one.getvalue(), "npz": more.getvalue()}.items():
        tar = tar_of(Path(f"{extension}.tar"), (f"a.{extension}", content))
        index_tar(tar)
        assert Shard(tar).read(0) == {extension: content}
        with pytest.raises(webdataset.autodecode.DecodingError) as raised:
            list(webdataset.WebDataset(str(tar), shardshuffle=False).decode())
        assert "allow_pickle=False" in str(raised.value.__cause__ or raised.value.__context__)
    assert not canary.exists()


@pytest.mark.parametrize("name", ["a.cls.pickle.gz", "a.pkl.gz"])
def test_the_stock_reader_would_unpickle_what_the_names_are_refused_for(canary, name):
    tar = tar_of(Path("x.tar"), (name, gzip.compress(pickle.dumps(Touch()))))
    list(webdataset.WebDataset(str(tar), shardshuffle=False).decode())
    assert canary.exists()


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_no_writer_lets_such_a_name_through(tmp_path, name):
    key, _, extension = name.partition(".")
    with pytest.raises(KdError, match="has a pickled member"):
        write_shard(tmp_path / "x.tar", [(key, {extension: b""})], {})
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_the_header_of_an_array_of_rows_is_not_believed(home, monkeypatch):
    """It may claim any shape: readers compute where rows are."""
    monkeypatch.chdir(home)
    said, claimed = b"'fortran_order': False, 'shape': (2,)", b"'shape': (2000000000,)"
    relaid(home / "claims", lambda npy: npy.replace(said, claimed.ljust(len(said))))
    train, ids = Shards(Path("shards/tiny/train")), np.arange(8)
    views = np.ones(8, np.int64)
    changed = SignalShards(Path("claims/tiny/train/teacher"), train)
    there = SignalShards(Path("shards/tiny/train/teacher"), train)
    assert changed.shard(0).sha256 != there.shard(0).sha256
    assert changed.rows(ids, views).tobytes() == there.rows(ids, views).tobytes()
