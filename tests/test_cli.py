"""The command line: every command explains itself, and whatever goes wrong is one sentence."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import picture
from processes import contents, done, kd_dist, laboratory, run, sentence, start, wait_until
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from kd_dist import assemble, cache_teacher, places, train
from kd_dist.cli import app
from kd_dist.config import load
from kd_dist.disk import file_digest

ROW = {
    *("recipe", "folder", "record", "weights", "examples", "best_step"),  # where its figures are from
    "without_generated",
    "taught_by",
    "steps",
    "role",
    "stage",
    "seed",
    "name",
    "metric",
    "value",
    "metrics",
    "parts",
    "parameters",
    "macs",
    "latency_ms",
    "memory_mb",
}

SOURCE = '''\
"""A user's own source: eight pictures a split, some with a label that is no number."""

import functools
import io

from conftest import picture
from kd_dist.sources import Item, Listing


def read(label, number):
    buffer = io.BytesIO()
    picture(label, number).save(buffer, format="PNG")
    return buffer.getvalue()


def source(broken=1):
    items = [
        Item(f"{split}-{number}", split, "png", float("nan") if number < broken else number % 3,
             functools.partial(read, number % 3, number))
        for split in ("train", "val", "test") for number in range(8)
    ]
    return Listing(("blue", "green", "red"), items)


def wrong():
    return {}
'''


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A user's folder with packed examples, a trained teacher, its cache and a distilled student."""
    folder = laboratory(tmp_path_factory.mktemp("made") / "home")
    done(run(kd_dist, "pack", "tiny.yaml", folder=folder))
    done(run(train.main, ["tiny.yaml", "--stage", "teacher"], folder=folder))
    done(run(cache_teacher.main, ["tiny.yaml"], folder=folder))
    done(run(train.main, ["tiny.yaml", "--stage", "distill"], folder=folder))
    return folder


@pytest.fixture
def home(made, tmp_path, monkeypatch) -> Path:
    """A copy of it to work on and to damage."""
    shutil.copytree(made, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


# ---------------------------------------------------------------------------------------------- help


def commands() -> list[str]:
    return [one.name or one.callback.__name__.replace("_", "-") for one in app.registered_commands]


def test_help_of_each_command_shows_an_example():
    assert {"run", "pack", "train", "cache-teacher", "evaluate", "compare"} <= set(commands())
    top = CliRunner().invoke(app, ["--help"])
    assert top.exit_code == 0
    for name in commands():
        shown = CliRunner().invoke(app, [name, "--help"])
        assert shown.exit_code == 0 and f"Example: kd-dist {name} " in shown.output, shown.output
        assert name in top.output


@pytest.mark.parametrize("main", [train.main, cache_teacher.main])
def test_help_of_what_is_launched_shows_an_example(main, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "example: accelerate launch " in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.slow
def test_a_recipe_that_cannot_be_meant(home):
    text = Path("tiny.yaml").read_text()
    Path("misspelt.yaml").write_text(text.replace("shard_size", "shard_sise"))
    cases = [
        (["misspelt.yaml"], "misspelt.yaml:6: data: unknown key 'shard_sise'; did you mean 'shard_size'?"),
        (["absent.yaml"], "absent.yaml: the recipe cannot be read: No such file or directory"),
        (["tiny.yaml", "views.sise=9"], "command line: views: unknown key 'sise'; did you mean 'size'?"),
        (["tiny.yaml", "teacher.weights=none.pt"], "command line: teacher.weights: no file 'none.pt'; give a file, "),
        (["tiny.yaml", "student.model=tiny"], "command line: student.model: 'tiny' is not a model; write timm/<name>"),
    ]
    before = contents(home)
    for words, expected in cases:
        assert sentence(run(kd_dist, "run", *words, folder=home)).startswith(expected)
    assert contents(home) == before  # found before anything was done


@pytest.mark.slow
def test_models_and_sources_that_are_not_there(home):
    shutil.rmtree("shards")
    cases = [
        (["data.root=nowhere"], "data.root: nowhere: no such folder; set data.root to"),
        (["data.source=none:source"], "'none:source': no module 'none' can be imported; run from the folder"),
        (["task.classes=4"], "data.source image_folder: has 3 classes, the recipe's task.classes says 4"),
    ]
    for words, expected in cases:
        assert sentence(run(kd_dist, "pack", "tiny.yaml", *words, folder=home)).startswith(expected)
    said = sentence(run(kd_dist, "run", "tiny.yaml", "student.model=tiny_model:nope", folder=home))
    assert said.startswith("student.model: 'tiny_model:nope': module 'tiny_model' has no 'nope'")
    assert not Path("shards").exists()  # both models are built before anything is spent


@pytest.mark.slow
def test_a_random_teacher_of_another_seed_is_another_teacher(home):
    words = ["tiny.yaml", "teacher.weights=null", "data.shards=others"]
    done(run(kd_dist, "pack", *words, folder=home))
    done(run(cache_teacher.main, words, folder=home))
    said = sentence(run(train.main, [*words, "--stage", "distill", "runs=others", "teacher.seed=5"], folder=home))
    assert "was made with teacher.weights = 'random, seed 0', the recipe has 'random, seed 5'" in said


@pytest.mark.slow
def test_a_corrupt_picture_is_quarantined_and_the_others_are_packed(home):
    shutil.rmtree("shards")
    for number in range(3):
        picture(2, number).save(f"pictures/train/red/jpeg-{number}.jpg")
    broken = Path("pictures/train/red/jpeg-1.jpg")
    broken.write_bytes(broken.read_bytes()[:-200])
    ended = run(kd_dist, "pack", "tiny.yaml", "--json", folder=home)
    assert "quarantined 'red/jpeg-1.jpg': the image cannot be decoded (" in done(ended)
    made = json.loads(ended.stdout)  # nothing but JSON there
    assert {split: one["examples"] for split, one in made.items()} == {"train": 23, "val": 9, "test": 12}
    assert [row["key"] for row in made["train"]["quarantined"]] == ["red/jpeg-1"]
    assert made["train"].items() <= json.loads(Path("shards/tiny/train/manifest.json").read_text()).items()
    again = done(run(kd_dist, "pack", "tiny.yaml", folder=home))
    assert again.count("quarantined 'red/jpeg-1.jpg'") == 1 and again.count(": done before, ") == 3


@pytest.mark.slow
def test_labels_that_are_not_numbers_from_a_source_of_the_users_own(home):
    shutil.rmtree("shards")
    Path("mine").mkdir()
    Path("mine/own.py").write_text(SOURCE)
    words = ["tiny.yaml", "data.source=mine.own:source", "data.root=null"]
    refused = sentence(run(kd_dist, "pack", "tiny.yaml", "data.source=mine.own:wrong", "data.root=null", folder=home))
    assert refused == "data.source mine.own:wrong: returned dict, not a kd_dist.sources.Listing"
    refused = sentence(run(kd_dist, "pack", *words, "data.options={brokn: 8}", folder=home))
    assert refused == "data.options of mine.own:source: unknown option 'brokn'; did you mean 'broken'?"
    said = done(run(kd_dist, "pack", *words, folder=home))
    assert said.count("quarantined 'train-0': label nan is not a whole number") == 1
    assert "pack train: 7 examples" in said
    shutil.rmtree("shards")
    refused = sentence(run(kd_dist, "pack", *words, "data.options={broken: 8}", folder=home))
    assert "every example is quarantined, the first is" in refused and "label nan is not a whole number" in refused


@pytest.mark.slow
def test_a_truncated_tar(home):
    """Through the real launcher, whose own traceback must not follow the sentence."""
    tar = Path("shards/tiny/train/data-000001.tar")
    tar.write_bytes(tar.read_bytes()[:-512])
    shutil.rmtree("runs/tiny/distill")
    ended = run(kd_dist, "train", "tiny.yaml", "--stage", "distill", folder=home)
    assert ended.status == 1
    assert sentence(ended).startswith(f"{tar}: the tar has ")
    assert not Path("runs/tiny/distill/seed-0/result.json").exists()


@pytest.mark.slow
def test_the_advice_on_a_damaged_shard_mends_it(home):
    """A flipped bit is one sentence from a loader's process too; deleting the file and running its command mends it."""
    for command, tar in (
        ((kd_dist, "pack", "tiny.yaml"), Path("shards/tiny/train/data-000001.tar")),
        ((cache_teacher.main, ["tiny.yaml"]), Path("shards/tiny/train/teacher/signals-000001.tar")),
    ):
        shutil.rmtree("runs/tiny/distill", ignore_errors=True)
        whole = tar.read_bytes()
        tar.write_bytes(whole[:1100] + bytes([whole[1100] ^ 1]) + whole[1101:])
        said = sentence(run(kd_dist, "verify", "tiny.yaml", folder=home))
        assert said.startswith(f"{tar}: is missing or damaged, its sha256 is not the manifest's; delete the file and")
        if tar.name.startswith("data"):
            broken = run(train.main, ["tiny.yaml", "--stage", "distill", "data.workers=1"], folder=home)
            assert "is damaged: the CRC32 of its" in sentence(broken) and "Caught" not in broken.output
        tar.unlink()
        done(run(*command, folder=home))
        assert tar.read_bytes() == whole
    done(run(kd_dist, "verify", "tiny.yaml", folder=home))
    done(run(train.main, ["tiny.yaml", "--stage", "distill", "data.workers=1"], folder=home))


LINGERING = """

import time
from pathlib import Path


class Lingering(nn.Sequential):
    def forward(self, images):
        Path("asked").touch()
        time.sleep(0.5)
        return super().forward(images)


def network(classes, width=4, made=network):
    return Lingering(*made(classes, width))
"""


@pytest.mark.slow
@pytest.mark.parametrize("command", ["verify", "evaluate"])
def test_a_signal_to_a_command_that_leaves_nothing_is_a_failure(home, command):
    with open("tiny_model.py", "a") as file:
        file.write(LINGERING)
    child = start(kd_dist, command, "tiny.yaml", folder=home)
    wait_until(Path("asked").exists, "that the command asks a network")
    os.kill(child.process.pid, signal.SIGTERM)
    ended = child.wait()
    assert ended.status == 128 + signal.SIGTERM and ended.stdout == ""
    said = f"kd-dist {command}: stopped by SIGTERM before it had a result; run it again"
    assert ended.stderr.splitlines()[-1] == said
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_a_cache_of_another_teacher(home):
    recipe = load("tiny.yaml")
    weights = places.weights_file(recipe, recipe.teacher.weights)
    there = json.loads(Path("shards/tiny/train/teacher/manifest.json").read_text())["teacher"]["weights_sha256"]
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)
    here = file_digest(weights)
    result = weights.with_name("result.json")
    result.write_text(json.dumps({**json.loads(result.read_text()), "best_sha256": here}))  # as if it were trained so
    shutil.rmtree("runs/tiny/distill")
    for function, words in (
        (kd_dist, ["cache-teacher", "tiny.yaml"]),
        (train_stage, ["tiny.yaml", "distill"]),
    ):
        said = sentence(run(function, *words, folder=home))
        assert f"was made with teacher.weights_sha256 = '{there}', the recipe has '{here}'; restore the recipe" in said


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["is damaged, its sha256 has changed", "is lost"])
def test_best_weights_that_are_lost_or_changed_are_one_sentence(home, fault):
    best = home / "runs/tiny/teacher/seed-0/best.safetensors"
    content = best.read_bytes()
    best.unlink()
    if fault != "is lost":
        best.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    expected = f"{best.relative_to(home)}: {fault}; delete its folder and train the stage again"
    for words in (["train", "tiny.yaml", "--stage", "teacher"], ["evaluate", "tiny.yaml"], ["verify", "tiny.yaml"]):
        assert sentence(run(kd_dist, *words, folder=home)) == expected
    if fault == "is lost":  # what is cached needs no teacher any more
        assert "done before" in done(run(kd_dist, "cache-teacher", "tiny.yaml", folder=home))
    else:
        assert sentence(run(kd_dist, "cache-teacher", "tiny.yaml", folder=home)) == expected


def train_stage(recipe: str, stage: str) -> None:
    train.main([recipe, "--stage", stage])


@pytest.mark.slow
def test_stages_out_of_order(home):
    shutil.rmtree("runs")
    said = sentence(run(cache_teacher.main, ["tiny.yaml"], folder=home))
    assert said == (
        "stage:teacher: the stage has not been trained to its end; run `kd-dist train RECIPE --stage teacher` first"
    )
    said = sentence(run(kd_dist, "train", "tiny.yaml", "--stage", "distil", folder=home))
    assert said == "command line: unknown stage 'distil'; did you mean 'distill'?"
    said = sentence(run(kd_dist, "evaluate", "tiny.yaml", folder=home))
    assert said == "runs/tiny: no stage has been trained yet; run `kd-dist run` or `kd-dist train` first"
    shutil.rmtree("shards")
    assert "no example shards; run `kd-dist pack` first" in sentence(
        run(train_stage, "tiny.yaml", "pretrain", folder=home)
    )


# ---------------------------------------------------------------------------------------------- what goes right


@pytest.mark.slow
def test_evaluate_prints_json_and_nothing_else(home):
    ended = run(kd_dist, "evaluate", "tiny.yaml", "--json", folder=home)
    done(ended)
    rows = json.loads(ended.stdout)
    assert [(row["role"], row["stage"]) for row in rows] == [("teacher", "teacher"), ("student_kd", "distill")]
    assert [set(row) ^ ROW for row in rows] == [set(), set()]
    assert all(0 <= row["value"] <= 1 and row["metric"] == "accuracy" for row in rows)
    again = run(kd_dist, "evaluate", "tiny.yaml", "--json", folder=home)
    assert json.loads(again.stdout) == rows  # not measured twice, latency included
    blurred = run(kd_dist, "evaluate", "tiny.yaml", "student.image_size=16", "--json", folder=home)
    macs = [row["macs"] for row in json.loads(blurred.stdout)]
    assert macs[0] == rows[0]["macs"] and macs[1] > rows[1]["macs"]  # another input size is measured anew
    other = json.loads(run(kd_dist, "evaluate", "tiny.yaml", "evaluate.metric=nll", "--json", folder=home).stdout)
    assert all(row["metric"] == "nll" and row["value"] > 0 for row in other)
    table = done(run(kd_dist, "evaluate", "tiny.yaml", folder=home))
    assert "student + KD" in table and "tiny_model:network" in table


@pytest.mark.slow
def test_train_says_that_a_stage_is_done(home):
    before = contents(home, "runs/**/*")
    said = done(run(kd_dist, "train", "tiny.yaml", "--stage", "distill", folder=home))
    assert said == "distill (seed-0): done before\n"
    assert contents(home, "runs/**/*") == before and len(before) > 8


@pytest.mark.slow
def test_a_student_becomes_the_teacher_of_the_next(home, monkeypatch):
    """Its cached logits are its outputs, in training views and canonical ones; a student learns from them."""
    text, folder = Path("tiny.yaml").read_text(), "runs/tiny/distill/seed-0"
    [teacher] = [line for line in text.splitlines() if line.startswith("teacher:")]
    next_one = f"teacher: {{run: {folder}, name: first}}\nname: tiny\nruns: next"
    Path("next.yaml").write_text(text.replace(teacher, next_one).replace("cache: {", "cache: {logits: fp32, "))
    before = contents(home, "runs/**/*")
    identity = json.loads(Path("runs/tiny/teacher/seed-0/result.json").read_text())["identity"]
    assert "model" in identity["teacher"] and "run" not in identity["teacher"]  # as it was before there was one
    said = done(run(kd_dist, "cache-teacher", "next.yaml", folder=home))
    assert "cache train: " in said
    for splits in ("train", "val", "test"):
        one = json.loads(Path(f"shards/tiny/{splits}/first/manifest.json").read_text())["teacher"]
        assert (one["name"], one["options"], one["weights"]) == ("first", {"width": 2}, "file")
        assert one["weights_sha256"] == file_digest(Path(folder) / "best.safetensors")
    recipe, first = load("next.yaml"), load("tiny.yaml")
    monkeypatch.syspath_prepend(home)
    student = assemble.network(first, "student", f"{folder}/best.safetensors", 0).eval()
    corridors = [assemble.training_corridor(recipe, "distill", 0, 1)]
    corridors += [assemble.evaluation_corridor(recipe, split, 0, 1, cached=True) for split in ("val", "test")]
    compared = 0
    for batch in (corridor[cursor] for corridor in corridors for cursor in range(len(corridor))):
        with torch.no_grad():
            expected = student(batch.images).log_softmax(1)
        torch.testing.assert_close(batch.signals.logits.log_softmax(1), expected, rtol=0, atol=1e-5)
        compared += len(expected)
    assert compared == 2 * 21 + 9 + 12  # of the training split two epochs
    done(run(train_stage, "next.yaml", "distill", folder=home))
    done(run(kd_dist, "verify", "next.yaml", folder=home))
    after = contents(home, "runs/**/*")
    assert after == before and Path("next/tiny/distill/seed-0/result.json").is_file()
    shutil.rmtree(folder)
    assert sentence(run(kd_dist, "verify", "next.yaml", folder=home)).startswith(
        f"next.yaml:9: teacher.run: {folder} has no finished result (result.json); train that stage to its end"
    )


@pytest.mark.slow
def test_two_processes_of_the_real_launcher_train_as_one(home):
    """Both end with the same losses, and there were two: Accelerate's own `--cpu` quietly starts one."""
    words = ["--stage", "pretrain", "student.model=tiny_model:witness"]
    done(run(train.main, ["tiny.yaml", *words, "runs=one"], folder=home))
    said = done(run(kd_dist, "train", "tiny.yaml", *words, "runs=two", "--num-processes", "2", folder=home))
    assert said.count("pretrain: done after 6 steps") == 1
    one, two = (json.loads(Path(f"{runs}/tiny/pretrain/seed-0/result.json").read_text()) for runs in ("one", "two"))
    for name in ("loss", "grad_norm", "val_nll", "teacher_accuracy"):
        mine, theirs = ([record[name] for record in result["history"]] for result in (one, two))
        assert mine == pytest.approx(theirs, rel=1e-5) and len(mine) == 2
    failed = run(kd_dist, "train", "tiny.yaml", *words, "runs=two", "train.lr=1", "--num-processes", "2", folder=home)
    assert failed.status == 1 and "Traceback" not in failed.output and "Error" not in failed.output
    assert 1 <= failed.output.count("was made with stage.lr = 0.01") <= 2
    assert {path.name for path in home.glob("rank-*")} == {"rank-None-of-None", "rank-0-of-2", "rank-1-of-2"}


@pytest.mark.slow
def test_a_configuration_of_the_launcher_decides_on_the_processes(home):
    (home / "two.yaml").write_text("distributed_type: MULTI_GPU\nnum_machines: 1\nnum_processes: 2\n")
    words = ["train", "tiny.yaml", "--stage", "pretrain", "student.model=tiny_model:witness", "--launch-config"]
    done(run(kd_dist, *words, "two.yaml", folder=home))
    assert {path.name for path in home.glob("rank-*")} == {"rank-0-of-2", "rank-1-of-2"}
    done(run(kd_dist, *words, "two.yaml", "--gpus", "1", "runs=one", folder=home))
    assert len(list(home.glob("rank-*-of-1"))) == 1
    assert "'absent.yaml' does not exist" in " ".join(run(kd_dist, *words, "absent.yaml", folder=home).output.split())
    (home / "two.yaml").write_text("distributed_typ: MULTI_GPU\n")
    said = sentence(run(kd_dist, *words, "two.yaml", "runs=none", folder=home))
    assert said.startswith("accelerate launch: A `distributed_type` must be specified in the config file")
