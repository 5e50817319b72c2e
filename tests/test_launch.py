"""The launcher and the files of launch/: read as their programs read them, and started here with two processes.

Slurm and Kubernetes are not here. Their job files run as they are, with stand-ins for Slurm's own commands.
"""

import functools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import typer
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from processes import PATIENCE, done, laboratory, run, wait_until
from safetensors.torch import load_file

import kd_dist
from kd_dist import cache_teacher, cli, journey, launch, train
from kd_dist.config import load
from kd_dist.errors import RecipeError

PACKAGE = Path(kd_dist.__file__).parent
REPOSITORY = PACKAGE.parent
FILES = {path.name: path.read_text() for path in sorted((REPOSITORY / "launch").iterdir()) if path.suffix != ".md"}
JOBS = [name for name in FILES if name.endswith((".slurm", ".k8s.yaml"))]
CONFIGS = [name for name in FILES if name.endswith(".yaml") and name not in JOBS]

PROBE = '''\
"""Leaves its mark and, if it is told to, waits for a signal of the scheduler, and then for a file."""

import json
import os
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs

from kd_dist.preempt import noticed


class Plugin(DeepSpeedPlugin):
    def set_deepspeed_weakref(self):
        """Accelerate would ask for transformers."""


with noticed() as notice:
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    plugin, handlers = (Plugin(), [InitProcessGroupKwargs(backend="gloo")]) if deepspeed else (None, [])
    accelerator = Accelerator(mixed_precision="no", deepspeed_plugin=plugin, kwargs_handlers=handlers)
    mark = {
        "world": accelerator.num_processes,
        "type": accelerator.distributed_type.value,
        "device": accelerator.device.type,
        "zero": plugin and plugin.deepspeed_config["zero_optimization"]["stage"],
        "precision": os.environ["ACCELERATE_MIXED_PRECISION"],
        "sum": int(accelerator.reduce(torch.tensor(accelerator.process_index + 1))),
        "pid": os.getpid(),
    }
    rank = accelerator.process_index
    Path(f"writing-{rank}").write_text(json.dumps(mark))
    os.rename(f"writing-{rank}", f"mark-{rank}")
    while "wait" in sys.argv and (notice.name is None or not Path("go").exists()):
        time.sleep(0.01)
        if notice.name is not None:
            Path(f"noticed-{notice.name}-{rank}").touch()
if "fail" in sys.argv:
    time.sleep(99 * rank)  # the launcher ends the others
    sys.exit(3)
accelerator.end_training()  # together: one that is left alone with a lost store may end badly
'''

DEAF = '''\
import os, time

open(f"writing-{os.environ.get('RANK', 0)}", "w").write("{}")
os.rename(f"writing-{os.environ.get('RANK', 0)}", f"mark-{os.environ.get('RANK', 0)}")
time.sleep(99)
'''

SRUN = '''\
#!/usr/bin/env bash
# One task a node, all on this machine; `started` holds how often.
while [[ $1 == --* ]]; do shift; done
for ((node = 0; node < SLURM_NNODES; node++)); do
    SLURM_NODEID=$node "$@" &
    tasks+=($!)
done
echo >>started
for task in "${tasks[@]}"; do wait "$task" || status=$?; done
exit "${status:-0}"
'''

SCONTROL = '''\
#!/usr/bin/env bash
case $1 in
show) echo 127.0.0.1 ;;
requeue) echo "$2" >>requeued ;;
esac
'''


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    """As a user has it, with our Python and package first."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    kept["CUDA_VISIBLE_DEVICES"] = ""
    kept["PATH"] = f"{Path(sys.executable).parent}:{kept['PATH']}"
    kept["PYTHONPATH"] = f"{REPOSITORY}:{kept.get('PYTHONPATH', '')}"
    return {**kept, **more}


def start(command: list[str], folder: Path, **more: str) -> subprocess.Popen:
    """Start a command in `folder`; what it says goes to `said` there."""
    with open(folder / "said", "a") as said:
        return subprocess.Popen(command, cwd=folder, env=environment(**more), stdout=said, stderr=said)


def launcher(folder: Path, *words: str, module: str = "kd_dist.launch", **more: str) -> subprocess.Popen:
    return start([sys.executable, "-m", module, *words], folder, **more)


def status(process: subprocess.Popen) -> int:
    return process.wait(PATIENCE)


def gone(pid: int) -> bool:
    """Whether a process has ended; nobody may have asked for its exit status yet."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def marks(folder: Path, world: int, process: subprocess.Popen) -> list[dict]:
    """What each rank has left, as soon as all have."""
    paths = [folder / f"mark-{rank}" for rank in range(world)]
    wait_until(lambda: all(map(Path.exists, paths)) or process.poll() is not None, "that every rank left its mark")
    assert all(map(Path.exists, paths)), (folder / "said").read_text()
    return [json.loads(path.read_text()) for path in paths]


@pytest.fixture
def probe(tmp_path) -> Path:
    """A folder with the script `probe.py`."""
    (tmp_path / "probe.py").write_text(PROBE)
    return tmp_path


# ---------------------------------------------------------------------------------------------- the files, as text


def test_every_file_is_here():
    assert (len(FILES), len(CONFIGS), len(JOBS)) == (15, 10, 4)
    assert set(FILES) - set(CONFIGS) - set(JOBS) == {"Dockerfile"}
    for text in FILES.values():
        comments = "".join(line for line in text.splitlines() if line.startswith("#"))
        assert re.search(r"# (Tried|.*Never built)", comments)
    readme = (REPOSITORY / "README.md").read_text()
    assert set(re.findall(r"launch/(\w[\w.]*\w)", readme)) <= {*FILES, "FAULTS.md"}


def commands(text: str) -> list[list[str]]:
    """The commands of ours that a file holds, comments too; a variable is a 1."""
    joined = re.sub(r"\s*\\\n#?\s*", " ", text)
    found = re.findall(r"\b(?:kd-dist|python -m kd_dist\.launch) [^\n&'`]*", joined)
    return [shlex.split(re.sub(r'"?\$(?:\{[^}]*\}|\w+|@)"?', "1", one)) for one in found]


def check_launched(script: str, words: list[str]) -> None:
    """A training script is there, and takes its words."""
    assert (REPOSITORY / script).is_file()
    if words != ["1"]:  # Slurm's script passes its own
        with pytest.raises(RecipeError, match="the recipe cannot be read"):
            train.main(["no recipe", *words[1:]])


def check(command: list[str]) -> None:
    """A command is taken by its parser."""
    if command[0] == "kd-dist":
        context = typer.main.get_command(cli.app).make_context("kd-dist", command[1:])
        name, found, words = context.command.resolve_command(context, command[1:])
        assert found.make_context(name, words).params["recipe"]
    else:
        given = launch_command_parser().parse_args([word if word != "RANK" else "0" for word in command[3:]])
        assert Path(REPOSITORY / given.config_file).is_file()
        check_launched(given.training_script, given.training_script_args)


@pytest.mark.parametrize("name", FILES)
def test_commands_are_taken_by_their_parsers(name, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    found = commands(FILES[name])
    assert found
    for command in found:
        check(command)
    if name in CONFIGS:
        assert f"launch/{name}" in found[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_are_accelerates(name):
    config = load_config_from_file(str(REPOSITORY / "launch" / name))  # refuses unknown keys
    known = vars(launch_command_parser().parse_args(["script"]))
    assert set(config.deepspeed_config) <= set(known)
    assert set(yaml.safe_load(FILES[name])) <= {*config.to_dict(), "deepspeed_config"}
    stage = re.fullmatch(r"zero(\d).yaml", name)
    if stage:
        assert config.deepspeed_config["zero_stage"] == int(stage[1])
        assert "deepspeed_config_file" not in config.deepspeed_config


@pytest.mark.parametrize("name", [name for name in JOBS if name.endswith(".slurm")])
def test_slurm_jobs(name):
    subprocess.run(["bash", "-n", REPOSITORY / "launch" / name], check=True)
    head = FILES[name].partition("\nset -euo")[0]
    options = [line.split("=")[0] for line in head.splitlines() if line.startswith("#SBATCH ")]
    assert [line for line in head.splitlines() if line[0] != "#"] == [] and len(options) == 10
    assert {"#SBATCH --requeue", "#SBATCH --signal=USR1@120", "#SBATCH --open-mode=append"} <= set(head.splitlines())


def documents(name: str) -> dict[str, dict]:
    return {one["kind"]: one for one in yaml.safe_load_all(FILES[name])}


@pytest.mark.parametrize("name", [name for name in JOBS if name.endswith(".k8s.yaml")])
def test_kubernetes_jobs(name):
    kinds = documents(name)
    job = kinds["Job"]
    assert job["apiVersion"] == "batch/v1" and job["metadata"]["name"].startswith("kd-")
    spec = job["spec"]["template"]["spec"]
    [container] = spec["containers"]
    assert spec["restartPolicy"] == "Never" and spec["terminationGracePeriodSeconds"] >= 60
    assert container["image"] and container["command"] == ["bash", "-c"] and len(container["args"]) == 1
    subprocess.run(["bash", "-n", "-c", container["args"][0]], check=True)
    mounted = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
    assert mounted == {"shards": "/kd_dist/shards", "runs": "/kd_dist/runs", "shm": "/dev/shm"}
    assert {one["name"] for one in spec["volumes"]} == set(mounted)
    assert {one["name"]: one["emptyDir"]["medium"] for one in spec["volumes"] if "emptyDir" in one} == {"shm": "Memory"}
    ignored = [one for one in job["spec"]["podFailurePolicy"]["rules"] if "onExitCodes" in one]
    assert [one["onExitCodes"]["containerName"] for one in ignored] == [container["name"]]
    if "Service" in kinds:
        service = kinds["Service"]
        assert service["apiVersion"] == "v1" and service["spec"]["clusterIP"] == "None"
        assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
        assert spec["subdomain"] == service["metadata"]["name"]
        assert job["spec"]["completionMode"] == "Indexed" and job["spec"]["completions"] == job["spec"]["parallelism"]
        first = {one["name"]: one["value"] for one in container["env"]}["FIRST"]
        assert first == f"{job['metadata']['name']}-0.{spec['subdomain']}"


def test_there_are_two_jobs_of_each_kind():
    expected = {f"{what}.{kind}" for what in ("cache_teacher", "train") for kind in ("k8s.yaml", "slurm")}
    assert set(JOBS) == expected
    assert set(documents("train.k8s.yaml")) == {"Service", "Job"}


def test_the_image():
    lines = [line for line in FILES["Dockerfile"].splitlines() if line and line[0] != "#"]
    instructions = [line.split(maxsplit=1) for line in lines]
    assert [word for word, _ in instructions] == ["FROM", "RUN", "WORKDIR", *["COPY"] * 2, "RUN", *["COPY"] * 2, "CMD"]
    sources = [source for word, rest in instructions if word == "COPY" for source in rest.split()[:-1]]
    assert len(sources) == 6 and all((REPOSITORY / source).exists() for source in sources)
    check(json.loads(instructions[-1][1]))


# ---------------------------------------------------------------------------------------------- configurations, started

EXPECTED = {  # processes, the type that Accelerate gives them, ZeRO's stage, precision
    "cpu.yaml": (1, "NO", None, "no"),
    "one_gpu.yaml": (1, "NO", None, "no"),
    "cpus.yaml": (2, "MULTI_CPU", None, "no"),
    "one_node.yaml": (2, "MULTI_CPU", None, "no"),
    "bf16.yaml": (2, "MULTI_CPU", None, "bf16"),
    "fp16.yaml": (2, "MULTI_CPU", None, "fp16"),
    "zero1.yaml": (2, "DEEPSPEED", 1, "no"),
    "zero2.yaml": (2, "DEEPSPEED", 2, "no"),
    "zero3.yaml": (2, "DEEPSPEED", 3, "no"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_processes_of_a_configuration_know_of_each_other(name, probe):
    world, kind, zero, precision = EXPECTED[name]
    module = "accelerate.commands.launch" if zero else "kd_dist.launch"
    words = ["--config_file", str(REPOSITORY / "launch" / name), "--num_processes", str(world)]
    process = launcher(probe, *words, "--main_process_port", "0", "probe.py", module=module)
    found = marks(probe, world, process)
    assert status(process) == 0
    for one in found:
        assert (one["world"], one["type"], one["zero"], one["precision"]) == (world, kind, zero, precision)
        assert one["device"] == "cpu" and one["sum"] == world * (world + 1) // 2
    assert len({one["pid"] for one in found}) == world and len(list(probe.glob("mark-*"))) == world


def test_every_configuration_is_started():
    assert {*EXPECTED, "several_nodes.yaml"} == set(CONFIGS)


# ---------------------------------------------------------------------------------------------- signals

ONE = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
TWO = [*ONE, "--multi_gpu", "--main_process_port", "0"]
WORLDS = {1: [*ONE, "--num_processes", "1"], 2: [*TWO, "--num_processes", "2"]}


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_reaches_every_process_and_the_launcher_waits_for_them(name, world, probe):
    process = launcher(probe, *WORLDS[world], "probe.py", "wait")
    marks(probe, world, process)
    process.send_signal(signal.Signals[name])
    wait_until(lambda: len(list(probe.glob(f"noticed-{name}-*"))) == world, f"that every rank noticed {name}")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    (probe / "go").touch()
    assert status(process) == 0


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_processes_that_a_signal_ends_have_not_failed(world, probe):
    """They had not begun to note it: nothing is lost, and the same command goes on."""
    (probe / "deaf.py").write_text(DEAF)
    process = launcher(probe, *WORLDS[world], "deaf.py", KD_DIST_STOPPED="stopped")
    marks(probe, world, process)
    process.terminate()
    assert status(process) == 0 and (probe / "stopped").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("world", "name"), [(1, "SIGKILL"), (2, "SIGKILL"), (1, "SIGABRT")])
def test_a_process_that_cannot_say_what_ended_it_is_named(world, name, probe):
    process = launcher(probe, *WORLDS[world], "probe.py", "wait", KD_DIST_STOPPED="stopped")
    last = marks(probe, world, process)[-1]["pid"]
    (probe / "go").touch()  # for the other one, which the launcher then stops
    os.kill(last, signal.Signals[name])
    assert status(process) == 1 and not (probe / "stopped").exists()
    said = (probe / "said").read_text()
    hint = ", most often for lack of memory; " if name == "SIGKILL" else "; the same command goes on"
    assert said.count("\nerror: ") + said.startswith("error: ") == 1
    assert f"error: rank {world - 1} was ended by {name}{hint}" in said


@pytest.mark.slow
def test_a_rank_that_is_killed_beside_loader_processes_is_two_sentences(home):
    """Its own by the launcher, and that of the rank that has lost it; the launcher signals all its processes then."""
    folder = home / "runs/tiny/distill/seed-0"
    words = ["kd_dist/train.py", "tiny.yaml", "--stage", "distill", "train.checkpoint_every=1"]
    process = launcher(home, *WORLDS[2], *words)
    wait_until((folder / "checkpoint-00000002").exists, "a checkpoint")
    found = psutil.Process(process.pid).children(recursive=True)
    ranks = {one.environ()["RANK"]: one for one in psutil.Process(process.pid).children()}
    assert len(ranks) == 2 and len(found) == 6  # two loader processes each
    ranks["1"].kill()
    assert status(process) == 1
    said = (home / "said").read_text()
    assert "error: lost contact with the other processes (" in said and "Traceback" not in said, said
    assert "error: rank 1 was ended by SIGKILL, most often for lack of memory; " in said
    wait_until(lambda: all(gone(one.pid) for one in found), "that every process has ended")


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_a_process_that_fails_is_a_failure_and_says_so_itself(world, probe):
    process = launcher(probe, *WORLDS[world], "probe.py", "fail")
    marks(probe, world, process)
    assert status(process) == 1
    assert "Traceback" not in (probe / "said").read_text()
    process = launcher(probe, *WORLDS[world], "--config_file", "absent.yaml", "probe.py")
    assert status(process) == 1
    said = (probe / "said").read_text()
    assert "error: accelerate launch: The passed configuration file `absent.yaml` does not exist." in said
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_no_process_outlives_a_launcher_that_is_killed(world, probe):
    process = launcher(probe, *WORLDS[world], "probe.py", "wait")
    found = marks(probe, world, process)
    assert not any(gone(one["pid"]) for one in found)
    process.kill()
    assert status(process) == -signal.SIGKILL
    wait_until(lambda: all(gone(one["pid"]) for one in found), "that every rank has ended")


@pytest.mark.slow
def test_a_signal_before_anything_was_started_ends_the_launcher_well(probe):
    process = launcher(probe, *WORLDS[1], "probe.py", KD_DIST_STOPPED="stopped")
    blocked = f"/proc/{process.pid}/status"
    wait_until(lambda: mask(blocked) & (1 << signal.SIGTERM - 1), "that the launcher keeps signals to itself")
    process.terminate()
    assert status(process) == 0 and not list(probe.glob("mark-*")) and (probe / "stopped").exists()


@pytest.mark.slow
def test_a_mark_that_cannot_be_made_is_a_failure_of_the_launcher(probe):
    """At once, or, as its folder vanishes then, when it is stopped before anything was started."""
    process = launcher(probe, *WORLDS[1], "probe.py", KD_DIST_STOPPED="there/stopped")
    assert status(process) == 1 and not list(probe.glob("mark-*"))
    assert (probe / "said").read_text().startswith("error: KD_DIST_STOPPED=there/stopped: No such file or directory;")
    (probe / "there").mkdir()
    process = launcher(probe, *WORLDS[1], "probe.py", KD_DIST_STOPPED="there/stopped")
    blocked = f"/proc/{process.pid}/status"
    wait_until(lambda: mask(blocked) & (1 << signal.SIGTERM - 1), "that the launcher keeps signals to itself")
    (probe / "there").rmdir()
    process.terminate()
    assert status(process) == 1 and not list(probe.glob("mark-*"))
    assert "error: KD_DIST_STOPPED=there/stopped: No such file or directory; name" in (probe / "said").read_text()


def mask(path: str) -> int:
    return int(re.search(r"SigBlk:\s*(\w+)", Path(path).read_text())[1], 16)


def test_what_is_tied_to_a_process_that_has_ended_does_not_start():
    command = launch.tied([sys.executable, "-c", "print('started')"])
    assert subprocess.run(command, capture_output=True, text=True).stdout == "started\n"
    other = [word if word != str(os.getpid()) else "1" for word in command]
    assert subprocess.run(other, capture_output=True, text=True).stdout == ""


# ---------------------------------------------------------------------------------------------- jobs

SGD = "lr: 0.5, optimizer: sgd, momentum: 0, weight_decay: 0, clip: null"  # a rounding error does not lead it elsewhere
RECIPE = {
    "  workers: 0\n": "",  # the default: two loader processes each
    'student: {model: "tiny_model:network", options:': 'student: {model: "tiny_model:slow", options:',
    "kd: {weight: 0.5}}, epochs: 2, batch_size: 8, lr: 1e-2": f"kd: {{weight: 0.5}}}}, epochs: 6, batch_size: 8, {SGD}",
}
QUICK = ["student.options={width: 2, seconds: 0}", "runs=alone"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Path:
    """A checkout to work in: launch/ and kd_dist/ beside a recipe that is packed and cached, whose student is slow."""
    folder = laboratory(tmp_path_factory.mktemp("jobs") / "home")
    text = (folder / "tiny.yaml").read_text()
    for before, after in RECIPE.items():
        assert text.count(before) == 1
        text = text.replace(before, after)
    (folder / "tiny.yaml").write_text(text)
    for name in ("launch", "kd_dist"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    done(run(pack, folder=folder))
    done(run(train.main, ["tiny.yaml", "--stage", "teacher"], folder=folder))
    done(run(cache_teacher.main, ["tiny.yaml"], folder=folder))
    done(run(train.main, ["tiny.yaml", "--stage", "distill", *QUICK], folder=folder))
    return folder


def pack() -> None:
    journey.pack_recipe(load("tiny.yaml"))


@pytest.fixture
def home(lab, tmp_path) -> Path:
    """A copy of it."""
    shutil.copytree(lab, tmp_path / "home", symlinks=True)
    return tmp_path / "home"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(max(folder.glob("checkpoint-*")) / "model.safetensors")


def assert_trained_as_alone(home: Path) -> None:
    """The student that the job has trained is that of one process, to rounding."""
    mine, theirs = (weights(home / runs / "tiny/distill/seed-0") for runs in ("runs", "alone"))
    assert mine.keys() == theirs.keys() and len(mine) == 4
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=2e-5)


def stop_in_the_middle(began: Path, result: Callable[[], bool], stop: Callable[[], None]) -> None:
    wait_until(began.exists, f"{began.name} of a job")
    assert not result()
    stop()


def signal_the_step(job: subprocess.Popen, least: int, number: int) -> None:
    """A signal to every process that `srun` has started."""
    [srun] = [one for one in psutil.Process(job.pid).children() if "srun" in " ".join(one.cmdline())]
    step = srun.children(recursive=True)
    assert len(step) >= least
    for one in step:
        one.send_signal(number)


@pytest.mark.slow
def test_the_slurm_job_trains_on_two_nodes_and_is_queued_again_when_it_is_stopped(home):
    folder = home / "runs/tiny/distill/seed-0"
    words = ["tiny.yaml", "distill", "train.epochs=6"]
    slurm = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "this", "SLURM_JOB_ID": "42", "GPUS": "1", "PORT": free_port()}
    slurm["PATH"] = f"{home / 'bin'}:{environment()['PATH']}"

    job = start(["bash", "launch/train.slurm", *words], home, **slurm)
    # Two launchers, two training processes, four loaders.
    stop = functools.partial(signal_the_step, job, 8, signal.SIGTERM)
    stop_in_the_middle(folder / "checkpoint-00000003", (folder / "result.json").exists, stop)
    assert status(job) == 0, (home / "said").read_text()
    assert (home / "requeued").read_text() == "42\n" and not (folder / "result.json").exists()
    job = start(["bash", "launch/train.slurm", *words], home, **slurm)
    assert status(job) == 0, (home / "said").read_text()
    assert (home / "requeued").read_text() == "42\n" and (folder / "result.json").exists()
    assert_trained_as_alone(home)
    one = {**slurm, "SLURM_NNODES": "1"}
    assert status(start(["bash", "launch/train.slurm", "absent.yaml", *words[1:]], home, **one)) == 1
    assert (home / "requeued").read_text() == "42\n"


def container(name: str) -> str:
    return documents(name)["Job"]["spec"]["template"]["spec"]["containers"][0]["args"][0]


@pytest.mark.slow
def test_the_kubernetes_job_trains_in_two_pods_and_goes_on_after_it_is_stopped(home):
    folder = home / "runs/tiny/distill/seed-0"
    pod = {"RECIPE": "tiny.yaml", "STAGE": "distill", "NODES": "2"}
    pod |= {"PROCESSES": "2", "FIRST": "127.0.0.1", "PORT": free_port()}

    def pods(count: int = 2, **more: str) -> list[subprocess.Popen]:
        shell, own = ["bash", "-c", container("train.k8s.yaml")], tempfile.mkdtemp(dir=home)
        each = [{"JOB_COMPLETION_INDEX": str(index), "KD_DIST_STOPPED": f"{own}/{index}"} for index in range(count)]
        return [start(shell, home, **{**pod, **more, **one}) for one in each]

    both = pods()
    stop_in_the_middle(
        folder / "checkpoint-00000003", (folder / "result.json").exists, lambda: [one.terminate() for one in both]
    )
    assert [status(one) for one in both] == [75, 75], (home / "said").read_text()
    assert [status(one) for one in pods()] == [0, 0], (home / "said").read_text()
    assert_trained_as_alone(home)
    assert [status(one) for one in pods(1, RECIPE="absent.yaml", NODES="1", PROCESSES="1")] == [1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["slurm", "k8s"])
def test_a_job_that_caches_goes_on_after_it_is_stopped(kind, home):
    recipe = (home / "tiny.yaml").read_text().replace("cache: {batch_size: 8}", "cache: {batch_size: 2}")
    recipe = recipe.replace('teacher: {model: "tiny_model:network"', 'teacher: {name: other, model: "tiny_model:slow"')
    (home / "tiny.yaml").write_text(recipe + "evaluate: {split: val}\n")  # `test` is packed, and needs no signals
    more = {"SLURM_NNODES": "1", "SLURM_JOB_ID": "42", "GPUS": "2", "PATH": f"{home / 'bin'}:{environment()['PATH']}"}
    command = ["bash", "launch/cache_teacher.slurm", "tiny.yaml"]
    if kind == "k8s":
        more = {"RECIPE": "tiny.yaml", "PROCESSES": "2"}
        command = ["bash", "-c", container("cache_teacher.k8s.yaml")]

    def complete() -> bool:
        manifests = [home / "shards/tiny" / split / "other/manifest.json" for split in ("train", "val")]
        return all(path.exists() and '"complete": true' in path.read_text() for path in manifests)

    job = start(command, home, **more, **({"KD_DIST_STOPPED": "stopped"} if kind == "k8s" else {}))
    # kd-dist, its launcher, two processes
    stop = job.terminate if kind == "k8s" else functools.partial(signal_the_step, job, 4, signal.SIGUSR1)
    stop_in_the_middle(home / "shards/tiny/train/other/signals-000000.idx", complete, stop)
    assert status(job) == (75 if kind == "k8s" else 0), (home / "said").read_text()
    assert (home / "requeued").exists() == (kind == "slurm")
    more |= {"KD_DIST_STOPPED": "other", "PROCESSES": "1"} if kind == "k8s" else {"GPUS": "1"}  # one goes on for two
    assert status(start(command, home, **more)) == 0
    assert complete() and not (home / "shards/tiny/test/other").exists()
    assert kind == "k8s" or (home / "requeued").read_text() == "42\n"
