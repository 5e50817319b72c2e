"""DEAM's layout: what is listed, how it is labelled, and what is wrong with a folder that is another."""

import math
import pickle
from pathlib import Path

import librosa
import numpy as np
import pytest
from recordings import encoded, tones

from kd_dist import assemble, journey
from kd_dist.config import load
from kd_dist.data import read_examples
from kd_dist.errors import DataError, RecipeError
from kd_dist.inputs.spectrograms import LogMel, Spectrograms
from kd_dist.sources import list_items

DEAM = Path(__file__).parent.parent / "configs" / "emotion_deam.yaml"
RATE = 8000
TIMES = range(15_000, 45_000, 500)
AVERAGED = "annotations/annotations averaged per song"
DYNAMIC = f"{AVERAGED}/dynamic (per second annotations)"
FIRST = (
    "song_id, valence_mean, valence_std, arousal_mean, arousal_std\r\n"
    "2,9,1,1,1\r\n10,5.0,0.5,7.0,0.5\r\n3,3.1,1.5,3,1.2\r\n"
)
SECOND = (
    "song_id, valence_mean, valence_std, valence_ max_mean, valence_max_std, valence_min_mean, valence_min_std, "
    "arousal_mean, arousal_std, arousal_max_mean, arousal_max_std, arousal_min_mean, arousal_min_std\n"
    "2001,5.5,1,8,1,2,1,4.5,1,7,1,1,1\n"
)


def dynamic(song: int, shift: float, count: int = 60) -> str:
    """A row: the annotation at t ms is t / 100,000 + shift; behind `count` of them the fields are empty."""
    values = [f"{time / 100_000 + shift:.6f}" for time in TIMES][:count]
    return ",".join([str(song), *values, *[""] * (60 - count)])


@pytest.fixture
def tree(tmp_path) -> Path:
    """Three songs of 45 s and one of 30; a fourth recording, 99, that nobody annotated."""
    root = tmp_path / "DEAM"
    for name in ("MEMD_audio", f"{AVERAGED}/song_level", DYNAMIC):
        (root / name).mkdir(parents=True)
    for song, seconds in ((2, 45), (3, 30), (10, 45), (99, 5), (2001, 45)):
        payload = encoded(tones(seconds, RATE, 200 + song % 50), RATE, "mp3")
        (root / f"MEMD_audio/{song}.mp3").write_bytes(payload)
    lists = root / AVERAGED / "song_level"
    (lists / "static_annotations_averaged_songs_1_2000.csv").write_text(FIRST)
    (lists / "static_annotations_averaged_songs_2000_2058.csv").write_text(SECOND)
    header = ",".join(["song_id", *(f"sample_{time}ms" for time in TIMES)])
    for name, sign in (("valence", 1), ("arousal", -1)):
        rows = [dynamic(2, 0.0 if sign > 0 else -0.5), dynamic(3, 0.1, 29), dynamic(10, 0.2, 30), dynamic(2001, 0.0)]
        (root / DYNAMIC / f"{name}.csv").write_text("\n".join([header, *rows]) + "\n")
    return root


def test_songs_with_static_labels(tree):
    listing = list_items("deam", str(tree), {})
    assert listing.classes == ("valence", "arousal")
    items = list(listing.items)
    assert [item.name for item in items] == ["2", "3", "10", "2001"]  # 99 has no annotation
    assert [item.label for item in items] == [(1.0, -1.0), ((3.1 - 5) / 4, -0.5), (0.0, 0.5), (0.125, -0.125)]
    assert {(item.split, item.extension, item.span) for item in items} == {(None, "mp3", None)}
    assert [item.group for item in items] == ["2", "3", "10", "2001"]
    for item in pickle.loads(pickle.dumps(items)):  # readers go to other processes
        assert item.read() == (tree / f"MEMD_audio/{item.name}.mp3").read_bytes()


def test_windows_with_the_mean_of_their_annotations(tree):
    items = list(list_items("deam", str(tree), {"windows": 10}).items)
    assert [(item.name, item.group, item.span) for item in items] == [
        ("2/15000ms", "2", (15.0, 25.0)),
        ("2/25000ms", "2", (25.0, 35.0)),
        ("2/35000ms", "2", (35.0, 45.0)),
        ("3/15000ms", "3", (15.0, 25.0)),  # of 29 annotations 9 remain, fewer than half a window
        ("10/15000ms", "10", (15.0, 25.0)),
        ("10/25000ms", "10", (25.0, 35.0)),  # of 30 there remain 10, just half
        ("2001/15000ms", "2001", (15.0, 25.0)),
        ("2001/25000ms", "2001", (25.0, 35.0)),
        ("2001/35000ms", "2001", (35.0, 45.0)),
    ]
    assert items[0].label == pytest.approx((0.1975, -0.3025), abs=1e-12)  # the mean over 15.0, 15.5, .. 24.5 s
    assert items[2].label == pytest.approx((0.3975, -0.1025), abs=1e-12)
    assert items[5].label == pytest.approx((0.4725, 0.4725), abs=1e-12)  # over 25.0 .. 29.5 s alone
    assert len({item.name for item in items}) == 9


@pytest.mark.parametrize(("windows", "count"), [(0.5, 60), (2.5, 12), (30.0, 1), (60.0, 1), (61.0, 0)])
def test_windows_of_any_length(tree, windows, count):
    """61 s would need 61 annotations, the songs have 60."""
    if not count:
        with pytest.raises(DataError, match=f"^data.root: {tree}/.*: no song has annotations enough"):
            list_items("deam", str(tree), {"windows": windows})
        return
    names = [item.name for item in list_items("deam", str(tree), {"windows": windows}).items if item.group == "2"]
    assert len(names) == count and names[0] == "2/15000ms"


def test_only_times_with_both_annotations_count(tree):
    path = tree / DYNAMIC / "arousal.csv"
    lines = path.read_text().split("\n")
    fields = lines[1].split(",")
    fields[1:11] = [""] * 10  # of song 2 the first 5 s
    path.write_text("\n".join([lines[0], ",".join(fields), *lines[2:]]))
    items = {item.name: item for item in list_items("deam", str(tree), {"windows": 10.0}).items}
    assert items["2/15000ms"].label == pytest.approx((0.2225, -0.2775), abs=1e-12)
    assert len(items) == 9
    fields[11] = "NaN"
    path.write_text("\n".join([lines[0], ",".join(fields), *lines[2:]]))
    assert "2/15000ms" not in {item.name for item in list_items("deam", str(tree), {"windows": 10.0}).items}


@pytest.mark.slow
def test_items_are_what_the_input_packs(tree):
    spectrograms = Spectrograms(LogMel(sample_rate=RATE, n_fft=512, hop=200, mels=32))
    shapes = []
    for options in ({}, {"windows": 10.0}):
        for item in list_items("deam", str(tree), options).items:
            members = spectrograms.encode(item.read(), item.extension, item.span)
            shapes.append(spectrograms.decode(members).shape)
    assert shapes[4:] == [(32, 401, 1)] * 9
    assert [shape[1] // 40 for shape in shapes[:4]] == [45, 30, 45, 45]


@pytest.mark.slow
def test_windows_of_the_full_scale_recipe(tree, tmp_path):
    """30 s at 22,050 Hz, out of clips and of a whole song of 100 s, each of whose windows is two octaves higher."""
    parts = ((45, 220.0), (30, 880.0), (25, 3520.0))
    wave = np.concatenate([tones(seconds, RATE, pitch) for seconds, pitch in parts])
    (tree / "MEMD_audio/2001.mp3").write_bytes(encoded(wave, RATE, "mp3"))
    times = range(15_000, 100_000, 500)
    header = ",".join(["song_id", *(f"sample_{time}ms" for time in times)])
    whole = ",".join(["2001", *(f"{time / 200_000}" for time in times)])
    for name in ("valence", "arousal"):
        rows = [one + "," * (len(times) - 60) for one in (dynamic(2, 0), dynamic(3, 0, 29), dynamic(10, 0))]
        (tree / DYNAMIC / f"{name}.csv").write_text("\n".join([header, *rows, whole]) + "\n")
    words = [f"data.root={tree}", f"data.shards={tmp_path}/shards", "data.options.windows=30"]
    recipe = load(DEAM, [*words, "data.splits={train: 0.5, val: 0.5}", "evaluate.split=val"])
    manifests = journey.pack_recipe(recipe)
    assert {split: one["quarantined"] for split, one in manifests.items()} == {"train": [], "val": []}
    task, policy, found = assemble.task(recipe), assemble.view_policy(recipe), {}
    for split in manifests:
        packed = assemble.examples(recipe, split)
        found[split] = {one.key: one for one in read_examples(packed, np.arange(len(packed)), task.decode)}
    assert {split: sorted(held) for split, held in found.items()} == {
        "train": ["10/15000ms", "2001/15000ms", "2001/45000ms", "2001/75000ms"],
        "val": ["2/15000ms"],  # song 3 has 29 annotations, too few for 30 s
    }
    assert found["val"]["2/15000ms"].image.shape == (128, 1292, 1)
    bands = []
    for number, (seconds, frames) in enumerate([(30, 1292), (30, 1292), (25, 1077)]):
        example = found["train"][f"2001/{15 + 30 * number}000ms"]
        middle = 15 + 30 * number + seconds / 2 - 0.25  # of the window's annotations, in s
        assert example.target == pytest.approx([middle / 200] * 2, abs=1e-6)
        assert example.image.shape == (128, frames, 1)
        loudest = example.image[:, 20:-20, 0].argmax(axis=0)  # but where a window ends
        assert np.ptp(loudest) <= 1
        bands.append(int(np.median(loudest)))
        size = example.image.shape[:2]
        view = policy.replay(example.image, policy.canonical(size))
        assert view.shape == (128, 1280, 1)
        assert [bool(column.any()) for column in (view[:, 0], view[:, -1])] == [True, frames > 1280]
    pitches = librosa.mel_frequencies(130, fmin=20.0, fmax=11025.0)[1:-1]  # the middles of the bands
    assert bands == [int(np.abs(pitches - pitch).argmin()) for _, pitch in parts]


@pytest.mark.parametrize("spelling", ["underscores", "archives", "both"])
def test_folders_as_they_come_out_of_archives(tree, spelling):
    if spelling != "archives":
        (tree / DYNAMIC).rename(tree / AVERAGED / "dynamic_(per_second_annotations)")
        (tree / AVERAGED).rename(tree / "annotations/annotations_averaged_per_song")
    if spelling != "underscores":
        for name, archive in (("MEMD_audio", "DEAM_audio"), ("annotations", "DEAM_Annotations")):
            (tree / archive).mkdir()
            (tree / name).rename(tree / archive / name)
    for options, count in (({}, 4), ({"windows": 10.0}, 9)):
        items = list(list_items("deam", str(tree), options).items)
        assert len(items) == count and items[0].read()


def test_labels_that_are_no_label_are_left_to_the_task(tree):
    path = tree / AVERAGED / "song_level/static_annotations_averaged_songs_1_2000.csv"
    path.write_text(FIRST.replace("2,9,1,1,1", "2,11,1,,1"))
    label = next(iter(list_items("deam", str(tree), {}).items)).label
    assert label[0] == 1.5 and math.isnan(label[1])


def test_songs_without_a_window_are_counted(tree):
    listing = list_items("deam", str(tree), {"windows": 40.0})
    assert {item.group for item in listing.items} == {"2", "2001"}
    assert listing.notes == ("2 songs have no window of 40 s with half of its annotations, left out",)
    assert list_items("deam", str(tree), {"windows": 10.0}).notes == list_items("deam", str(tree), {}).notes == ()


def test_a_song_without_audio(tree):
    (tree / "MEMD_audio/3.mp3").unlink()
    for options, count in (({}, 3), ({"windows": 10.0}, 8)):
        with pytest.raises(DataError) as raised:
            list_items("deam", str(tree), options)
        assert str(raised.value) == (
            f"data.root: {tree}/MEMD_audio/3.mp3: no such file, and so with 1 of 4 annotated songs; add the audio, or "
            f"set data.options.missing to 'skip' if only some of it is there"
        )
        listing = list_items("deam", str(tree), {**options, "missing": "skip"})
        assert len(listing.items) == count and "have no audio, left out" in listing.notes[-1]
    for path in (tree / "MEMD_audio").glob("*.mp3"):
        path.unlink()
    with pytest.raises(DataError, match="so with 4 of 4 annotated songs"):
        list_items("deam", str(tree), {"missing": "skip"})


@pytest.mark.parametrize("missing", ["MEMD_audio", AVERAGED, f"{AVERAGED}/song_level"])
def test_a_folder_that_is_not_there(tree, missing):
    (tree / missing).rename(tree.parent / "elsewhere")
    with pytest.raises(DataError, match=r"^data\.root: .*: no such folder; set data\.root to the folder that"):
        list_items("deam", str(tree), {})
    with pytest.raises(DataError, match=r"^data\.root: nowhere/MEMD_audio: no such folder; set data\.root"):
        list_items("deam", "nowhere", {})


def test_no_list_of_songs(tree):
    for path in (tree / AVERAGED / "song_level").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"song_level: holds no static_annotations_averaged_songs_\*\.csv; set"):
        list_items("deam", str(tree), {})


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (" valence_mean", " valence", r"needs one column 'valence_mean', found song_id, valence, valence_std"),
        ("song_id", "id", "needs one column 'song_id', found id, valence_mean"),
        ("10,5.0", "2,5.0", "song_id '2' stands twice; correct it"),
        ("10,5.0", "x/../3,5.0", r"song_id 'x/\.\./3' is no number; correct it"),
        ("10,5.0", "2001,5.0", "song 2001 is also in another file of .*song_level; remove one of the two"),
        ("10,5.0", "10,five", "'five' in column 'valence_mean' is no number; correct it, or empty it"),
        ("10,5.0", "10,1,5.0", "row 3 has 6 fields, the header 5; correct it"),
    ],
)
def test_a_list_that_cannot_be_read(tree, old, new, sentence):
    path = tree / AVERAGED / "song_level/static_annotations_averaged_songs_1_2000.csv"
    path.write_text(FIRST.replace(old, new, 1))
    with pytest.raises(DataError, match=f"^{tree}/.*/static_annotations_averaged_songs_.*csv: {sentence}"):
        list_items("deam", str(tree), {})


def test_dynamic_annotations_that_cannot_be_read(tree):
    path = tree / DYNAMIC / "valence.csv"
    path.write_text(path.read_text().replace("sample_", "at_"))
    with pytest.raises(DataError, match="valence.csv: needs columns sample_15000ms and so on, found song_id, at_1"):
        list_items("deam", str(tree), {"windows": 10.0})
    path.unlink()
    with pytest.raises(DataError, match="valence.csv: no such file; set data.root"):
        list_items("deam", str(tree), {"windows": 10.0})
    assert list_items("deam", str(tree), {}).items  # which needs no such file


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"windows": 0.2}, "data.options.windows: 0.2 s hold no annotation; take 0.5 s or more, or leave it out"),
        ({"windows": float("inf")}, "data.options.windows: inf s"),
        ({"windows": float("nan")}, "data.options.windows: nan s"),
        ({"missing": "ignore"}, "option 'missing' must be one of 'error', 'skip', not 'ignore'"),
    ],
)
def test_options_that_make_no_sense(tree, options, sentence):
    with pytest.raises(RecipeError, match=sentence):
        list_items("deam", str(tree), options)
