"""Students in every format: the same model again, or one sentence."""

import dataclasses
import errno
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch

from kd_dist.choose import imported
from kd_dist.errors import ExportError
from kd_dist.formats import CONFIG, FORMATS, Graph, missing
from kd_dist.formats.files import writing
from kd_dist.models import build_network

OWN = '''\
"""A user's own models."""

import dataclasses

from torch import nn


def mobilevitv2(classes):
    """The student of configs/deepfake_sbi.yaml with one transformer block a stage, as each takes seconds to lower."""
    import timm
    from timm.models.mobilevit import model_cfgs

    def shallow(block):
        if isinstance(block, tuple):
            return tuple(map(shallow, block))
        kwargs = {**block.block_kwargs, "transformer_depth": 1} if "transformer_depth" in block.block_kwargs else {}
        return dataclasses.replace(block, d=1, block_kwargs=kwargs or block.block_kwargs)

    return timm.create_model(
        "mobilevitv2_050", num_classes=classes, blocks=tuple(map(shallow, model_cfgs["mobilevitv2_050"].blocks))
    )


def plain(classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes)
    )


class Branching(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.dark, self.bright = plain(classes), plain(classes)

    def forward(self, images):
        return self.bright(images) if images.mean() > 0.5 else self.dark(images)
'''

STUDENTS = {  # of the recipes, small: arguments of build_network, shape of an input, names
    "deepfake": (dict(model="own_formats:mobilevitv2", classes=2, options={}), (3, 64, 64), ("image", "logits")),
    "segmentation": (
        dict(model="kd_dist/mobilenet_v3_small_aspp", classes=5, options={"width": 0.5}, maps=True),
        (3, 64, 96),
        ("image", "logits"),
    ),
    "emotion": (
        dict(model="kd_dist/mobile_vit", classes=2, options={"blocks": 1}, channels=1, bounds=[-1.0, 1.0]),
        (1, 64, 128),
        ("spectrogram", "values"),
    ),
}
FLOAT32 = ("safetensors", "torchscript", "torch_export", "onnx", "executorch")
INT8 = ("onnx_int8", "onnx_dynamic_int8", "executorch_int8")
# Error of int8 files at most, in standard deviations of the outputs (weights that nothing has trained are hard to
# round), and how many times fewer bytes than float32 they have at least.
INT8_BOUNDS = {"deepfake": (0.7, 2.8), "segmentation": (0.05, 2.8), "emotion": (0.1, 2.5)}


@dataclasses.dataclass
class Package:
    """A student in all formats."""

    graph: Graph
    inputs: np.ndarray
    expected: np.ndarray  # what the network itself makes of them
    folder: Path
    said: str  # what was printed while the files were written

    def run(self, name: str, inputs: np.ndarray) -> np.ndarray:
        return imported(FORMATS[name].open)(self.folder / FORMATS[name].file, 1)(inputs)


def a_graph(arguments: dict, shape: tuple[int, ...], names: tuple[str, str] = ("image", "logits")) -> Graph:
    torch.manual_seed(0)
    network = build_network(**arguments).eval()
    for module in network.modules():  # as if trained: statistics of their own
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return Graph(network, shape, *names, {CONFIG: json.dumps({"head": None, **arguments}), "licence": "none yet"})


def scenes(count: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Smooth random inputs in [0, 1]."""
    coarse = torch.rand(count, shape[0], 4, 4, generator=torch.Generator().manual_seed(3))
    return torch.nn.functional.interpolate(coarse, shape[1:], mode="bicubic").clamp(0, 1)


def write(name: str, graph: Graph, folder: Path) -> Path:
    path = folder / FORMATS[name].file
    imported(FORMATS[name].write)(graph, scenes(8, graph.shape), path)
    return path


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    """A folder with a user's models, which can be imported."""
    (tmp_path / "own_formats.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture(scope="module", params=STUDENTS)
def package(request, tmp_path_factory):
    """Each student of the recipes in every format, written once."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "own_formats.py").write_text(OWN)
    sys.modules.pop("own_formats", None)  # of the folder before
    sys.path.insert(0, str(folder))
    graph = a_graph(*STUDENTS[request.param])
    inputs = scenes(11, graph.shape)[8:]
    with torch.no_grad():
        expected = graph.module(inputs).numpy()
    with (folder / "said").open("w+b") as file:
        kept = [(number, os.dup(number)) for number in (1, 2)]
        capture = request.config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            for number, _ in kept:
                os.dup2(file.fileno(), number)
            try:
                for name in FORMATS:
                    write(name, graph, folder)
                for name in FORMATS:
                    imported(FORMATS[name].open)(folder / FORMATS[name].file, 1)(inputs.numpy())
            finally:
                for number, copy in kept:
                    os.dup2(copy, number)
                    os.close(copy)
        file.seek(0)
        said = file.read().decode()
    yield Package(graph, inputs.numpy(), expected, folder, said)
    sys.path.remove(str(folder))


@pytest.mark.slow
def test_float32_files_are_the_same_model_for_any_batch(package):
    limit = 1e-5 * max(1, np.abs(package.expected).max())
    for name in FLOAT32:
        for count in (1, 3):
            got = package.run(name, package.inputs[:count])
            assert got.dtype == np.float32 and got.shape == (count, *package.expected.shape[1:])
            assert np.abs(got - package.expected[:count]).max() <= limit, (name, count)


@pytest.mark.slow
def test_int8_files_are_near_the_model_and_much_smaller(package, request):
    sizes = {name: (package.folder / FORMATS[name].file).stat().st_size for name in FORMATS}
    near, smaller = INT8_BOUNDS[request.node.callspec.params["package"]]
    for name in INT8:
        got = package.run(name, package.inputs)
        assert got.shape == package.expected.shape
        error = np.sqrt(np.mean((got - package.expected) ** 2)) / package.expected.std()
        assert 1e-5 < error < near, (name, error)
        assert sizes[name] * smaller < sizes["executorch" if "executorch" in name else "onnx"], (name, sizes)


@pytest.mark.slow
def test_writing_and_opening_print_nothing_and_leave_nothing_else(package):
    assert package.said == ""
    left = {path.name for path in package.folder.iterdir()} - {"own_formats.py", "said", "__pycache__"}
    assert left == {one.file for one in FORMATS.values()} | {"config.json"}


@pytest.mark.slow
def test_files_hold_the_metadata_and_no_paths_of_this_machine(package):
    metadata = dict(package.graph.metadata)
    for name in ("onnx", *INT8[:2]):
        model = onnx.load(package.folder / FORMATS[name].file)
        assert {one.key: one.value for one in model.metadata_props} == metadata
        ends = (*model.graph.input, *model.graph.output)
        assert [one.name for one in ends] == [package.graph.input, package.graph.output]
        assert {one.type.tensor_type.shape.dim[0].dim_param for one in ends} == {"batch"}
    for name in ("torchscript", "torch_export"):
        with zipfile.ZipFile(package.folder / FORMATS[name].file) as archive:
            (held,) = [one for one in archive.namelist() if one.endswith("metadata.json")]
            assert json.loads(archive.read(held)) == metadata
    for name in FORMATS.keys() - {"torchscript"}:  # whose records of the source cannot be left out
        assert b"site-packages" not in _unpacked(package.folder / FORMATS[name].file), name
    assert json.loads((package.folder / "config.json").read_text()) == json.loads(metadata[CONFIG])


def _unpacked(path: Path) -> bytes:
    if not zipfile.is_zipfile(path):
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        return b"".join(archive.read(name) for name in archive.namelist())


@pytest.mark.slow
def test_an_image_of_another_size_is_resized_inside_every_float32_file(own):
    """Antialiased, as the network itself does it."""
    graph = a_graph(dict(model="own_formats:plain", classes=3, options={}, image_size=16), (3, 24, 24))
    inputs = torch.rand(2, *graph.shape, generator=torch.Generator().manual_seed(1))
    expected = graph.module(inputs).detach().numpy()
    for name in FLOAT32:
        run = imported(FORMATS[name].open)(write(name, graph, own / "out"), 1)
        assert np.abs(run(inputs.numpy()) - expected).max() < 1e-6, name


def test_what_depends_on_values_is_refused_by_all_that_keep_a_graph(own):
    graph = a_graph(dict(model="own_formats:Branching", classes=3, options={}), (3, 24, 24))
    refused = []
    for name in FORMATS:
        try:
            write(name, graph, own / "out")
        except ExportError as error:
            refused.append(name)
            text = str(error)
            assert text.startswith(f"{own / 'out' / FORMATS[name].file}: this model cannot be written as {name} (")
            assert "data-dependent" in text and "\n" not in text
            assert text.endswith(f"; leave {name} out of export.formats, or change the model")
    assert refused == [name for name in FORMATS if name != "safetensors"]
    assert sorted(path.name for path in (own / "out").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FLOAT32)
def test_a_damaged_or_foreign_file_is_one_sentence(own, name):
    graph = a_graph(dict(model="own_formats:plain", classes=3, options={}), (3, 24, 24))
    path = write(name, graph, own / "out")
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"foreign" * 100):
        path.write_bytes(damaged)
        with pytest.raises(ExportError, match=f"{path}: cannot be opened as {name} \\(.+\\); copy the file again, or"):
            imported(FORMATS[name].open)(path, 1)
    path.unlink()
    with pytest.raises(ExportError, match=f"{path}: no such file; run `kd-dist export` again"):
        imported(FORMATS[name].open)(path, 1)


def test_weights_without_their_config_are_one_sentence(own):
    graph = a_graph(dict(model="own_formats:plain", classes=3, options={}), (3, 24, 24))
    path = write("safetensors", graph, own / "out")
    path.with_name("config.json").unlink()
    with pytest.raises(ExportError, match="cannot be opened as safetensors .*config.json"):
        imported(FORMATS["safetensors"].open)(path, 1)


def test_a_deep_head_is_rebuilt(own):
    arguments = dict(model="kd_dist/mobile_vit", classes=2, options={"width": 16, "blocks": 1}, channels=1)
    head = {"hidden": [8], "dropout": 0.1}
    built = build_network(**arguments, head=SimpleNamespace(**head)).eval()
    graph = Graph(built, (1, 32, 32), "spectrogram", "logits", {CONFIG: json.dumps({**arguments, "head": head})})
    inputs = scenes(2, graph.shape)
    run = imported(FORMATS["safetensors"].open)(write("safetensors", graph, own / "out"), 1)
    assert (run(inputs.numpy()) == built(inputs).detach().numpy()).all()


def test_pickled_objects_in_an_archive_of_torch_export_are_not_loaded(own):
    """torch itself would: it says `weights_only=False` where the archive asks for it."""
    graph = a_graph(dict(model="own_formats:plain", classes=3, options={}), (3, 24, 24))
    path = write("torch_export", graph, own / "out")
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (sample,) = [name for name in members if "sample_inputs" in name]
    (weights,) = [name for name in members if name.endswith("weights_config.json")]
    evil = io.BytesIO()
    torch.save(Run(own / "ran"), evil)
    asked = members[weights].replace(b'"use_pickle": false', b'"use_pickle": true', 1)
    assert asked != members[weights]
    for name, content in ((sample, evil.getvalue()), (weights, asked)):
        with zipfile.ZipFile(path, "w") as archive:
            for one, old in members.items():
                archive.writestr(one, content if one == name else old)
        with pytest.raises(ExportError, match="cannot be opened as torch_export"):
            imported(FORMATS["torch_export"].open)(path, 1)
    assert not (own / "ran").exists()


class Run:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


@pytest.mark.slow
def test_onnx_runs_without_torch(own):
    """So that what a process takes to run it is what ONNX Runtime takes."""
    graph = a_graph(dict(model="own_formats:plain", classes=3, options={}), (3, 24, 24))
    path = write("onnx", graph, own / "out")
    code = "import sys, numpy\nfrom pathlib import Path\nfrom kd_dist.formats.onnx_files import open_onnx\n"
    code += "print(open_onnx(Path(sys.argv[1]), 2)(numpy.zeros((2, 3, 24, 24), 'f4')).shape, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("(2, 3) False\n", 0), done.stderr


@pytest.mark.slow
def test_executorch_has_as_many_threads_as_it_is_given(own):
    from executorch.extension.pybindings import portable_lib

    graph = a_graph(dict(model="own_formats:plain", classes=3, options={}), (3, 24, 24))
    path = write("executorch", graph, own / "out")
    for threads in (2, 1):
        imported(FORMATS["executorch"].open)(path, threads)
        assert portable_lib._threadpool_get_thread_count() == threads


def test_a_failure_leaves_the_file_that_was_there(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"before")
    with pytest.raises(ExportError, match=r"be written as onnx \(inner\); leave onnx out"), writing("onnx", path):
        try:
            raise ValueError("inner\nand more of it")
        except ValueError as error:
            raise RuntimeError("step 3 of 3") from error
    with pytest.raises(OSError, match="No space"), writing("onnx", path) as file:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(MemoryError), writing("onnx", path):
        raise MemoryError
    assert [one.name for one in tmp_path.iterdir()] == ["model.onnx"] and path.read_bytes() == b"before"


def test_every_format_is_complete(monkeypatch):
    assert list(FORMATS) == [
        "safetensors", "torchscript", "torch_export", "onnx", "onnx_int8", "onnx_dynamic_int8", "executorch",
        "executorch_int8",
    ]  # fmt: skip
    assert len({one.file for one in FORMATS.values()}) == 8
    for name, one in FORMATS.items():
        assert imported(one.write) and imported(one.open) and one.note.endswith(".")
        assert one.int8 == ("int8" in name)
        assert missing(one) == []
    assert missing(FORMATS["onnx"]._replace(needs=("onnx", "no_such_library"))) == ["no_such_library"]
