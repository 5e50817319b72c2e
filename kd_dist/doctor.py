"""`kd-dist doctor`: what this machine has of what is needed, line by line, with what to do about the rest.

Libraries are tried in processes of their own: one that is broken, or takes its process with it, is a finding.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from kd_dist.errors import KdError, cause

# Modules that are tried, by the distribution that has them: what a broken one breaks.
MODULES = {
    "numpy": "numpy",
    "pillow": "PIL",
    "torch": "torch",
    "torchvision": "torchvision",
    "torchmetrics": "torchmetrics",
    "timm": "timm",
    "accelerate": "accelerate",
    "webdataset": "webdataset",
    "scikit-learn": "sklearn",
    "matplotlib": "matplotlib",
    "soundfile": "soundfile",
    "librosa": "librosa",
    "deepspeed": "deepspeed",
    "av": "av",
    "aiohttp": "aiohttp",
    "onnx": "onnx",
    "onnxscript": "onnxscript",
    "onnxruntime": "onnxruntime",
    "executorch": "executorch",
    "torchao": "torchao",
}
MARK = "kd-dist doctor: "  # begins the lines of a probe; libraries print what they like
PATIENCE = 300  # seconds for a probe
LITTLE_DISK, LITTLE_SHM, FEW_FILES = 2 * 10**9, 10**9, 1024
TRY = """
import importlib, json, sys
for name in sys.argv[1:]:
    print("MARK" + json.dumps([name, None]), flush=True)
    try:
        importlib.import_module(name)
        said = ""
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
    print("MARK" + json.dumps([name, said]), flush=True)
"""
LOOK = """
import json, os, torch
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
found = {"cuda": torch.version.cuda, "gpus": [], "config": default_config_file, "settings": None}
for number in range(torch.cuda.device_count()):
    about = torch.cuda.get_device_properties(number)
    with torch.cuda.device(number):
        found["gpus"].append([about.name, about.total_memory, torch.cuda.is_bf16_supported()])
if os.path.isfile(default_config_file):
    read = load_config_from_file(default_config_file)
    names = ("distributed_type", "num_processes", "use_cpu", "mixed_precision")
    found["settings"] = {name: str(getattr(read, name, None)) for name in names}
print("MARK" + json.dumps(found), flush=True)
"""


class Finding(NamedTuple):
    """One line."""

    what: str
    status: Literal["ok", "warning", "missing"]
    says: str
    mend: str = ""  # what to do
    needed: bool = True  # of what is missing: whether nothing goes without it


def examine(recipe: Path | None, overrides: Sequence[str]) -> list[Finding]:
    """All findings, those of a recipe last."""
    tried = dict(try_modules(list(MODULES.values())))
    found = [Finding("python", "ok", platform.python_version()), *library_findings(tried), *extra_findings()]
    found += machine_findings()
    if tried.get("torch") == "" and tried.get("accelerate") == "":
        found += device_findings(look())
    found += compiler_findings()
    if recipe is None:
        return found + place_findings({"shards": Path("shards"), "runs": Path("runs")})
    return found + recipe_probe(recipe, overrides)


def probe(code: str, *arguments: str) -> tuple[list[Any], str]:
    """What a Python process prints behind MARK, and, when it does not end well, why."""
    try:
        ended = subprocess.run(
            [sys.executable, *(["-c", code.replace("MARK", MARK)] if "\n" in code else ["-m", code]), *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired as error:
        printed, why = (error.stdout or b"").decode(errors="replace"), f"it did not end within {PATIENCE} s"
    else:
        printed, why = ended.stdout, ""
        if ended.returncode < 0:
            why = f"its process was ended by {signal.Signals(-ended.returncode).name}"
        elif ended.returncode:
            why = (ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"])[-1]
    said = [line.removeprefix(MARK) for line in printed.splitlines() if line.startswith(MARK)]
    return [json.loads(line) for line in said], why


def try_modules(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(module, "" or why it cannot be imported), in order; modules that are not there are left out."""
    left = [name for name in names if is_there(name)]
    while left:
        said, why = probe(TRY, *left)
        ended = [(name, reason) for name, reason in said if reason is not None]
        yield from ended
        left = left[len(ended) :]
        if left:  # the next one took the process with it
            yield left.pop(0), why or "its process ended"


def is_there(module: str) -> bool:
    """Whether a module can be found, not whether it works."""
    return importlib.machinery.PathFinder.find_spec(module) is not None


def library_findings(tried: Mapping[str, str]) -> list[Finding]:
    """One for each library that the package requires, and each further one that is there and was tried."""
    required = {name: wanted for name, wanted, extra in requirements() if extra is None}
    found = []
    for name in dict.fromkeys([*required, *MODULES]):
        version, reason = installed(name), tried.get(MODULES.get(name, ""), "")
        needed = name in required
        if version is None:
            if needed:
                found.append(Finding(name, "missing", "is not installed", f"pip install '{name}{required[name]}'"))
        elif reason:
            found.append(Finding(name, "missing", f"{version} cannot be imported ({reason})", mended(reason), needed))
        elif needed and not suits(version, required[name]):
            mend = f"pip install '{name}{required[name]}'"
            found.append(Finding(name, "warning", f"{version}, and {required[name]} is what is tested", mend))
        else:
            found.append(Finding(name, "ok", version))
    return found


def mended(reason: str) -> str:
    """What to do about a library that cannot be imported for this reason."""
    if "torchvision::nms" in reason or "torchvision::" in reason:
        return (
            "torch and torchvision must come from the same index as a pair: pip install --force-reinstall torch "
            "torchvision"
        )
    return "install it again: pip install --force-reinstall --no-deps, or mend what it names"


def installed(name: str) -> str | None:
    """The version of a distribution that is installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def requirements() -> Iterator[tuple[str, str, str | None]]:
    """(distribution, version that is wanted, extra), of the package as it is installed."""
    try:
        listed = importlib.metadata.requires("kd_dist") or []
    except importlib.metadata.PackageNotFoundError:
        return
    for line in listed:
        wanted, _, marker = line.partition(";")
        name = wanted.strip()
        for place, letter in enumerate(name):
            if letter in "<>=!~[ ":
                name, version = name[:place], name[place:]
                break
        else:
            version = ""
        extra = marker.partition("extra ==")[2].strip().strip("\"'") or None
        yield name.replace("_", "-") if name != "kd_dist" else name, version, extra


def suits(version: str, wanted: str) -> bool:
    """Whether a version is one that is wanted, such as >=2.11."""
    try:
        from packaging.specifiers import SpecifierSet

        return SpecifierSet(wanted).contains(version, prereleases=True)
    except (ImportError, ValueError):
        return True


def extra_findings() -> list[Finding]:
    """What is missing for which extra."""
    by_extra: dict[str, list[tuple[str, str]]] = {}
    for name, version, extra in requirements():
        if extra is not None:
            by_extra.setdefault(extra, []).append((name, version))

    def all_of(extra: str) -> set[str]:
        names: set[str] = set()
        for name, version in by_extra.get(extra, []):
            inner = version.partition("[")[2].partition("]")[0]
            names |= {part for one in inner.split(",") for part in all_of(one.strip())} if name == "kd_dist" else {name}
        return names

    found = []
    for extra in sorted(by_extra):
        lacking = sorted(name for name in all_of(extra) if installed(name) is None)
        what = f"extra '{extra}'"
        if lacking:
            mend = f"pip install 'kd_dist[{extra}]', or -e '.[{extra}]' in a checkout"
            found.append(Finding(what, "missing", f"lacks {', '.join(lacking)}", mend, needed=False))
        else:
            found.append(Finding(what, "ok", "all installed"))
    return found or [Finding("extras", "warning", "kd_dist is not installed here", "pip install -e .")]


def machine_findings() -> list[Finding]:
    """Cores, memory, open files, room for loader processes."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cores = len(os.sched_getaffinity(0))
    found = [Finding("cpu", "ok", f"{cores} cores for this process, {pages / 1e9:,.1f} GB of memory")]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft != resource.RLIM_INFINITY and soft < FEW_FILES
    said = "open files without a limit" if soft == resource.RLIM_INFINITY else f"{soft:,} open files"
    mend = f"raise the limit: ulimit -n {FEW_FILES}, or more"
    found.append(Finding("limits", "warning" if few else "ok", said, mend if few else ""))
    shared = Path("/dev/shm")
    if not shared.is_dir():
        return [*found, Finding("/dev/shm", "missing", "is not there", "set data.workers: 0", needed=False)]
    room = shutil.disk_usage(shared).free
    mend = "loader processes hand batches over in it: docker run --shm-size 8g, or data.workers: 0"
    little = room < LITTLE_SHM
    return [*found, Finding("/dev/shm", "warning" if little else "ok", f"{room / 1e9:,.2f} GB", mend if little else "")]


def look() -> dict[str, Any] | str:
    """Devices and the launcher's settings, or why they cannot be known."""
    said, why = probe(LOOK)
    return said[0] if said else why


def device_findings(found: Mapping[str, Any] | str) -> list[Finding]:
    """GPUs, and what `accelerate launch` does here."""
    if isinstance(found, str):
        return [
            Finding("devices", "missing", f"cannot be asked for ({found})", "mend the driver, or torch's CUDA build")
        ]
    gpus = [
        Finding(f"gpu {number}", "ok", f"{name}, {memory / 1e9:,.0f} GB, {'bf16' if bf16 else 'no bf16: use fp16'}")
        for number, (name, memory, bf16) in enumerate(found["gpus"])
    ]
    none = f"none; torch is built for CUDA {found['cuda']}" if found["cuda"] else "none; torch is a CPU build"
    return [*(gpus or [Finding("gpu", "ok", f"{none}: everything runs on the CPU")]), launcher_finding(found)]


def launcher_finding(found: Mapping[str, Any]) -> Finding:
    """What `accelerate launch` does without options."""
    settings, gpus, what = found["settings"], len(found["gpus"]), "accelerate launch"
    several = "`kd-dist train --num-processes N` sets what is needed"
    asked = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_USE_")}
    said = f"; {', '.join(f'{name}={value}' for name, value in sorted(asked.items()))} is set" if asked else ""
    if settings is None:
        processes = f"{gpus} processes, one a GPU" if gpus > 1 else "one process"
        words = f"no configuration at {found['config']}: {processes}{said}"
        if gpus == 0:
            words += f"; with --cpu --num_processes 2 it still runs as one process without a word: {several}"
        return Finding(what, "ok", words)
    words = ", ".join(f"{name} {value}" for name, value in settings.items())
    processes = int(settings["num_processes"]) if str(settings["num_processes"]).isdecimal() else 1
    words = f"{found['config']}: {words}{said}"
    cpu = settings["use_cpu"] == "True" or asked.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if gpus == 0 and processes > 1 and not cpu and "DEEPSPEED" not in settings["distributed_type"]:
        mend = f"each process would take itself for the only one: set ACCELERATE_USE_CPU=true, or: {several}"
        return Finding(what, "warning", words, mend)
    if gpus and processes > gpus and not cpu:
        return Finding(what, "warning", f"{words}, of {gpus} GPUs", f"launch with --num_processes {gpus}")
    return Finding(what, "ok", words)


def compiler_findings() -> list[Finding]:
    """What DeepSpeed compiles its operations with at its first start, where it is installed."""
    if installed("deepspeed") is None:
        return []
    found = []
    for program, mend in (("ninja", "pip install ninja"), ("g++", "install g++ (apt-get install g++)")):
        path = shutil.which(program)
        mend = f"DeepSpeed's first start compiles with it: {mend}; have it on PATH"
        found.append(
            Finding(program, "warning" if path is None else "ok", path or "is not on PATH", "" if path else mend)
        )
    return found


def place_findings(places: Mapping[str, Path]) -> list[Finding]:
    """Whether files can be written in these folders, or made where they are to be, and how much room there is."""
    found = []
    for what, folder in places.items():
        at = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
        try:
            with tempfile.TemporaryFile(dir=at) as file:
                file.write(b"kd_dist")
        except OSError as error:
            mend = "choose another folder, or mend its permissions"
            found.append(Finding(what, "missing", f"{folder}: nothing can be written in {at} ({error.strerror})", mend))
            continue
        free = shutil.disk_usage(at).free
        little = free < LITTLE_DISK
        mend = "make room, or choose another folder; `kd-dist plan` counts what is needed" if little else ""
        found.append(Finding(what, "warning" if little else "ok", f"{folder}: {free / 1e9:,.1f} GB free", mend))
    return found


def recipe_probe(recipe: Path, overrides: Sequence[str]) -> list[Finding]:
    """The findings of a recipe, made in a process of its own: its models are built there."""
    said, why = probe("kd_dist.doctor", str(recipe), *overrides)
    found = [Finding(*one) for one in said]
    if why:
        found.append(Finding("recipe", "missing", f"{recipe}: cannot be tried ({why})", "mend what is named above"))
    return found


def recipe_findings(path: str, overrides: Sequence[str]) -> Iterator[Finding]:
    """What a recipe needs beside the libraries: its places, source and models; files of weights are looked for when it
    is read."""
    from kd_dist import places, trial
    from kd_dist.config import load
    from kd_dist.formats import FORMATS, missing
    from kd_dist.recipe import Recipe
    from kd_dist.sources import source_function

    try:
        recipe: Recipe = load(path, overrides)
    except KdError as error:
        yield Finding("recipe", "missing", str(error), "correct the recipe")
        return
    yield Finding("recipe", "ok", f"{path}: reads as a recipe")
    d, folders = recipe.data, {"runs": Path(recipe.runs)}
    if "://" not in d.shards:
        folders["shards"] = Path(d.shards)
    elif d.local_cache is not None:
        folders["cache_dir"] = places.shards_folder(recipe).cache.folder
    yield from place_findings(folders)
    try:
        source_function(d.source)
        there = d.root is None or Path(d.root).exists()
        said = f"{d.source}, root {d.root}" + ("" if there else ": there is no such folder")
        yield Finding("data.source", "ok" if there else "missing", said, "" if there else "correct data.root")
    except Exception as error:
        yield Finding("data.source", "missing", f"{d.source}: {cause(error)}", "install what it needs")
    if d.source == "face_frames" and installed("av") is None:
        mend = "pip install 'kd_dist[video]'; folders of frames do without"
        yield Finding("av", "warning", "is not installed, and video files need it", mend)
    lacking = dict.fromkeys(one for name in recipe.export.formats or FORMATS for one in missing(FORMATS[name]))
    if lacking:
        said = f"`kd-dist export` needs {', '.join(lacking)}, which cannot be found"
        yield Finding("export", "warning", said, "pip install 'kd_dist[export]', or choose other export.formats")
    if "pretrained" in (recipe.teacher.weights, recipe.student.weights):
        yield Finding("pretrained", "ok", "weights are fetched once from the model's hub, which needs a network")
    try:
        trial.check_models(recipe)
        yield Finding(
            "models", "ok", f"{recipe.teacher.model} and {recipe.student.model} can be built, losses fit them"
        )
    except Exception as error:
        yield Finding("models", "missing", cause(error), "correct the recipe, or install what it names")


def healthy(found: Sequence[Finding]) -> bool:
    """Whether nothing that is needed is missing."""
    return not any(one.status == "missing" and one.needed for one in found)


def sentences(found: Sequence[Finding]) -> list[str]:
    """The findings in lines of three columns."""
    width = max(len(one.what) for one in found)
    return [
        f"{one.status:7}  {one.what:{width}}  {one.says}" + (f" -> {one.mend}" if one.mend else "") for one in found
    ]


if __name__ == "__main__":
    for finding in recipe_findings(sys.argv[1], sys.argv[2:]):
        print(MARK + json.dumps(finding), flush=True)
