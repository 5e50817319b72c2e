"""What is missing, broken or odd on a machine is a line that says what to do, never a traceback."""

import json
import os
import sys
from pathlib import Path

import pytest
from processes import done, kd_dist, run
from typer.testing import CliRunner

from kd_dist import doctor
from kd_dist.cli import app
from kd_dist.doctor import Finding

METADATA = """\
Metadata-Version: 2.1
Name: kd_dist
Version: 9.9
Requires-Dist: numpy>=1.26
Requires-Dist: pillow>=900
Requires-Dist: no_such_library>=2
Provides-Extra: video
Provides-Extra: clouds
Provides-Extra: all
Requires-Dist: pillow>=1; extra == "video"
Requires-Dist: no_cloud<3,>=2; extra == "clouds"
Requires-Dist: kd_dist[clouds,video]; extra == "all"
"""
NMS = "RuntimeError: operator torchvision::nms does not exist"
ASKED = {"cuda": None, "gpus": [], "config": "/home/default_config.yaml", "settings": None}


def by_name(found: list[Finding]) -> dict[str, Finding]:
    names = [one.what for one in found]
    assert len(set(names)) == len(names)
    return dict(zip(names, found, strict=True))


@pytest.fixture
def installation(tmp_path, monkeypatch) -> Path:
    """A folder on the path in which kd_dist seems to be installed with other requirements."""
    folder = tmp_path / "site"
    (folder / "kd_dist-9.9.dist-info").mkdir(parents=True)
    (folder / "kd_dist-9.9.dist-info" / "METADATA").write_text(METADATA)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *sys.path]))
    return folder


# ---------------------------------------------------------------------------------------------- libraries


def test_libraries_are_held_against_what_the_package_requires(installation):
    found = by_name(doctor.library_findings({"torchvision": NMS, "numpy": "", "aiohttp": "ImportError: x"}))
    assert found["numpy"].status == "ok" and found["numpy"].mend == ""
    assert found["pillow"].status == "warning" and found["pillow"].says.endswith(", and >=900 is what is tested")
    lost = found["no-such-library"]
    assert (lost.status, lost.needed, lost.mend) == ("missing", True, "pip install 'no-such-library>=2'")
    pair = found["torchvision"]
    assert pair.status == "missing" and pair.says.endswith(f"cannot be imported ({NMS})")
    assert pair.mend.startswith("torch and torchvision must come from the same index as a pair: ")
    assert found["aiohttp"].mend.startswith("install it again")
    # Nothing here requires these two, so that nothing fails for the lack of them.
    assert not pair.needed and not found["aiohttp"].needed
    assert not doctor.healthy(list(found.values())) and doctor.healthy([pair, found["pillow"]])


def test_each_extra_says_what_it_lacks(installation):
    found = by_name(doctor.extra_findings())
    assert found.keys() == {"extra 'all'", "extra 'clouds'", "extra 'video'"}
    assert found["extra 'video'"].status == "ok"
    for name in ("clouds", "all"):
        one = found[f"extra '{name}'"]
        assert (one.status, one.needed, one.says) == ("missing", False, "lacks no-cloud")
        assert one.mend.startswith(f"pip install 'kd_dist[{name}]'")


@pytest.mark.slow
def test_a_library_that_takes_its_process_with_it_is_a_finding(installation):
    bodies = {
        "fine_one": "print('noise')",
        "nms_one": "raise RuntimeError('operator torchvision::nms does not exist')",
        "abort_one": "import os\nos.abort()",
        "exit_one": "import sys\nsys.exit(3)",
        "last_one": "",
    }
    for name, body in bodies.items():
        (installation / f"{name}.py").write_text(body + "\n")
    found = dict(doctor.try_modules([*bodies, "not_there_at_all"]))
    assert found == {
        "fine_one": "",
        "nms_one": NMS,
        "abort_one": "its process was ended by SIGABRT",
        "exit_one": "SystemExit: 3",
        "last_one": "",
    }


# ---------------------------------------------------------------------------------------------- machine, launcher


def test_the_machine_has_cores_files_and_shared_memory(monkeypatch):
    found = by_name(doctor.machine_findings())
    assert found.keys() == {"cpu", "limits", "/dev/shm"} and " cores for this process, " in found["cpu"].says
    monkeypatch.setattr(doctor, "LITTLE_SHM", 10**18)
    monkeypatch.setattr(doctor, "FEW_FILES", 10**9)
    short = by_name(doctor.machine_findings())
    assert short["/dev/shm"].status == "warning" and "data.workers: 0" in short["/dev/shm"].mend
    assert short["limits"].status == "warning" and short["limits"].mend.startswith("raise the limit: ulimit -n ")
    assert doctor.healthy(list(short.values()))


SETTINGS = {"distributed_type": "MULTI_GPU", "num_processes": "2", "use_cpu": "False", "mixed_precision": "no"}


@pytest.mark.parametrize(
    "changed, status, words",
    [
        ({}, "ok", "no configuration at /home/default_config.yaml: one process; with --cpu --num_processes 2 it still"),
        ({"gpus": [["H", 10**11, True]] * 2}, "ok", "no configuration at /home/default_config.yaml: 2 processes, one"),
        ({"settings": SETTINGS}, "warning", "each process would take itself for the only one: set ACCELERATE_USE_CPU"),
        ({"settings": {**SETTINGS, "use_cpu": "True"}}, "ok", "use_cpu True"),
        ({"settings": {**SETTINGS, "distributed_type": "DistributedType.DEEPSPEED"}}, "ok", "DEEPSPEED"),
        ({"settings": SETTINGS, "gpus": [["H", 10**11, True]]}, "warning", "launch with --num_processes 1"),
    ],
)
def test_what_the_launcher_would_do_is_told(monkeypatch, changed, status, words):
    for name in ("CPU", "DEEPSPEED"):
        monkeypatch.delenv(f"ACCELERATE_USE_{name}", raising=False)
    *gpus, launcher = doctor.device_findings({**ASKED, **changed})
    assert launcher.what == "accelerate launch" and launcher.status == status
    assert words in f"{launcher.says} {launcher.mend}"
    assert len(gpus) == max(1, len(changed.get("gpus", []))) and all(one.status == "ok" for one in gpus)
    if status == "warning" and "gpus" not in changed:
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        assert doctor.launcher_finding({**ASKED, **changed}).status == "ok"


def test_devices_that_cannot_be_asked_for_are_a_finding():
    [found] = doctor.device_findings("its process was ended by SIGSEGV")
    assert found.status == "missing" and "SIGSEGV" in found.says and found.mend


def test_what_deepspeed_compiles_with_has_to_be_on_the_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = by_name(doctor.compiler_findings())
    assert found.keys() == {"ninja", "g++"} and {one.status for one in found.values()} == {"warning"}
    (tmp_path / "ninja").write_text("#!/bin/sh\n")
    (tmp_path / "ninja").chmod(0o755)
    assert by_name(doctor.compiler_findings())["ninja"] == Finding("ninja", "ok", str(tmp_path / "ninja"))


def test_folders_that_cannot_be_written_are_found(tmp_path, monkeypatch):
    found = by_name(doctor.place_findings({"runs": tmp_path / "a" / "b", "shards": Path("/proc/no")}))
    assert found["runs"].status == "ok" and found["runs"].says.endswith(" GB free") and not list(tmp_path.iterdir())
    assert found["shards"].status == "missing" and "/proc/no: nothing can be written in /proc (" in found["shards"].says
    monkeypatch.setattr(doctor, "LITTLE_DISK", 10**18)
    [little] = doctor.place_findings({"runs": tmp_path})
    assert little.status == "warning" and "`kd-dist plan` counts" in little.mend


# ---------------------------------------------------------------------------------------------- a recipe


def test_a_recipes_own_needs(experiment):
    fine = by_name(list(doctor.recipe_findings("tiny.yaml", [])))
    assert fine.keys() == {"recipe", "runs", "shards", "data.source", "models"}
    assert {one.status for one in fine.values()} == {"ok"}
    poor = by_name(list(doctor.recipe_findings("tiny.yaml", ["data.root=nowhere", "student.model=tiny_model:gone"])))
    assert {name for name, one in poor.items() if one.status == "missing"} == {"data.source", "models"}
    assert poor["data.source"].says == "image_folder, root nowhere: there is no such folder"
    assert "module 'tiny_model' has no 'gone'" in poor["models"].says
    [lost] = doctor.recipe_findings("tiny.yaml", ["teacher.weights=lost.pt"])
    assert lost.status == "missing" and "no file 'lost.pt'" in lost.says
    [wrong] = doctor.recipe_findings("tiny.yaml", ["views.sise=3"])
    assert wrong.status == "missing" and "unknown key 'sise'; did you mean 'size'?" in wrong.says
    none = by_name(list(doctor.recipe_findings("tiny.yaml", ["data.source=not_there:at_all"])))
    assert "no module 'not_there' can be imported" in none["data.source"].says


def test_a_recipe_says_what_its_export_lacks(experiment, monkeypatch):
    for name in ("executorch", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    lacking = by_name(list(doctor.recipe_findings("tiny.yaml", [])))["export"]
    assert (lacking.status, lacking.needed) == ("warning", True) and doctor.healthy([lacking])
    assert lacking.says == "`kd-dist export` needs onnxruntime, executorch, which cannot be found"
    assert lacking.mend == "pip install 'kd_dist[export]', or choose other export.formats"
    fewer = by_name(list(doctor.recipe_findings("tiny.yaml", ["export.formats=[safetensors, torchscript]"])))
    assert "export" not in fewer


@pytest.mark.slow
def test_the_command_says_it_line_by_line_and_fails_for_what_is_needed(experiment):
    found = json.loads(done(run(kd_dist, "doctor", "tiny.yaml", "--json", folder=experiment)))
    lines = by_name([Finding(**one) for one in found])
    assert {"python", "torch", "torchvision", "timm", "accelerate", "deepspeed", "webdataset"} <= lines.keys()
    assert {"onnx", "onnxscript", "onnxruntime", "executorch", "torchao"} <= lines.keys()
    assert {"librosa", "numpy", "pillow", "cpu", "limits", "accelerate launch", "ninja", "models"} <= lines.keys()
    assert all(one.mend or one.status == "ok" for one in lines.values())
    text = doctor.sentences(list(lines.values()))
    assert len(text) == len(lines) and all(line.startswith(("ok ", "warning ", "missing ")) for line in text)


def test_the_command_ends_with_status_1_when_something_is_broken(monkeypatch):
    monkeypatch.setattr(doctor, "MODULES", {})
    ended = CliRunner().invoke(app, ["doctor", "--json"])
    lines = by_name([Finding(**one) for one in json.loads(ended.stdout)])
    assert ended.exit_code == 0 and {"shards", "runs"} <= lines.keys() and "gpu" not in lines
    monkeypatch.setattr(doctor.sys, "executable", "/bin/false")
    ended = CliRunner().invoke(app, ["doctor", "tiny.yaml"])
    assert ended.exit_code == 1
    assert "cannot be tried (exit status 1) -> mend what is named above" in ended.stdout
