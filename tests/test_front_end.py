"""deploy/front_end.py and LogMel.java: every level against float64, in every runtime that an app may have."""

import json
import re
import shutil
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
import tree_sitter
import tree_sitter_java
from recordings import tones
from torch.utils.flop_counter import FlopCounterMode

from kd_dist.choose import imported
from kd_dist.deploy import front_end
from kd_dist.deploy.front_end import FrontEnd
from kd_dist.formats import FORMATS
from kd_dist.inputs.spectrograms import LogMel, filters, golden
from kd_dist.views.spectrograms import SpectrogramViews

JAVA = Path(front_end.__file__).with_name("android") / "LogMel.java"
SMALL = LogMel(sample_rate=8000, n_fft=256, hop=100, mels=24, fmin=50.0, fmax=3500.0, db=(-40.0, 30.0))
FRONT_ENDS = {
    "default": LogMel(),
    "vgmidi": LogMel(hop=1024, mels=64),
    "small": SMALL,
    "from 0 Hz, hop of a frame": LogMel(sample_rate=16_000, n_fft=400, hop=400, mels=40, fmin=0.0),
    "odd mels, no power of two": LogMel(sample_rate=11_025, n_fft=630, hop=147, mels=33, fmin=30.0),
    "two factors, a large prime": LogMel(sample_rate=8000, n_fft=2 * 127, hop=90, mels=21, fmin=60.0),
    "fine steps": LogMel(sample_rate=16_000, n_fft=512, hop=160, mels=32, db=(-80.0, 0.0)),
}


def music(rate: int, seconds: float) -> np.ndarray:
    """(n,) float32, in steps of 16 bits: struck notes of a chord with overtones that die away, and faint noise."""
    time = np.arange(round(seconds * rate)) / rate
    wave = 0 * time
    for number in range(round(6 * seconds)):
        since = time - number / 6
        pitch = 110 * 2 ** ([0, 4, 7, 11, 12, 16, 19][number * 3 % 7] / 12 + number % 3)
        struck = np.where(since >= 0, np.exp(-3 * np.maximum(since, 0)), 0)
        partials = (one for one in range(1, 9) if pitch * one < rate / 2)
        wave += struck * sum(np.sin(2 * np.pi * pitch * one * since) / one**1.5 for one in partials)
    noise = np.sin(1e4 * np.arange(len(time)) ** 2 % 1e3)
    return (np.rint((0.2 * wave + 1e-3 * noise).clip(-1, 1) * 32767) / 32768).astype(np.float32)


def sounds(parameters: LogMel) -> dict[str, np.ndarray]:
    rate = parameters.sample_rate
    return {
        "golden": golden(parameters)["waveform"],
        "music": music(rate, 5),
        "quiet music": music(rate, 2) * np.float32(0.004),
        "silence": np.zeros(rate, np.float32),
        "full scale": np.sign(np.sin(2 * np.pi * 440 * np.arange(rate) / rate)).astype(np.float32),
        "constant": np.full(rate, -1, np.float32),
        "short": tones(0.4, rate),
        "shorter than a frame": tones(1, rate)[: parameters.n_fft // 3],
        "one sample": np.ones(1, np.float32),
    }


def canonical(parameters: LogMel, waveform: np.ndarray, frames: int) -> np.ndarray:
    """The levels of the canonical view, (mels, frames) uint8, as evaluation sees them."""
    steps = parameters.spectrogram(waveform)
    views = SpectrogramViews(size=(parameters.mels, frames))
    return views.replay(steps[..., None], views.canonical(steps.shape))[..., 0]


def as_an_app(run, info: dict, waveform: np.ndarray) -> np.ndarray:
    """A student's input (mels, frames) from the graph, by what `info` says: `rule`, in code."""
    found = 1 + len(waveform) // info["hop"]
    start = max(0, found - info["frames"]) // 2 * info["hop"] - info["n_fft"] // 2
    place = np.arange(start, start + info["samples"])
    known = (place >= 0) & (place < len(waveform))
    given = np.where(known, waveform[place.clip(0, len(waveform) - 1)], 0).astype(np.float32)
    spectrogram = run(given[None])
    assert spectrogram.shape == (1, 1, info["mels"], info["frames"]) and spectrogram.dtype == np.float32
    spectrogram[..., found:] = 0
    return spectrogram[0, 0]


def difference(spectrogram: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """How many levels a student's input is off, by place; every value is a level / 255 to the bit, as in training."""
    found = np.rint(spectrogram * 255).astype(np.uint8)
    assert np.array_equal(spectrogram, (torch.from_numpy(found).float() / 255).numpy())
    assert not np.signbit(spectrogram).any()
    return np.abs(found.astype(int) - levels)


def running(module: torch.nn.Module):
    def run(given: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return module(torch.from_numpy(given)).numpy()

    return run


# ------------------------------------------------------------------------------------------------------- the graph


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_the_graph_hears_what_training_heard(name):
    """At most one level off, in fewer than 1 of 1,000 places of all sounds together, and in fewer than 1 of 10,000 of
    music; in none of what is silent or constant. Views shorter and longer than the recordings."""
    parameters, off = FRONT_ENDS[name], {}
    for frames in (40, 150):
        run, info = running(FrontEnd(parameters, frames)), front_end._described(parameters, frames)
        for sound, waveform in sounds(parameters).items():
            levels = canonical(parameters, waveform, frames)
            off[frames, sound] = difference(as_an_app(run, info, waveform), levels)
            if sound == "music":
                assert len(np.unique(levels)) > 40
    every = np.concatenate([one.ravel() for one in off.values()])
    assert len(off) == 18 and every.max() <= 1 and (every > 0).mean() < 1e-3
    assert np.mean([(off[frames, "music"] > 0).mean() for frames in (40, 150)]) < 1e-4
    assert not any(off[frames, sound].any() for frames in (40, 150) for sound in ("silence", "constant"))


def test_frames_behind_a_short_recording_are_for_the_app_to_silence():
    """Why `rule` says so: they still hear its end."""
    waveform = tones(0.4, SMALL.sample_rate)
    given = np.pad(waveform, (128, front_end.samples(SMALL, 60)))[None, : front_end.samples(SMALL, 60)]
    spectrogram, found = running(FrontEnd(SMALL, 60))(given)[0, 0], SMALL.frames(len(waveform))
    assert spectrogram[:, found].any() and not canonical(SMALL, waveform, 60)[:, found:].any()


def test_the_graph_is_light():
    """What the docstring says, of a frame: multiplications of both products and of the bands, and bytes."""
    module = FrontEnd(LogMel(), 64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.zeros(1, front_end.samples(LogMel(), 64)))
    bands = 128 * 33 * 32
    assert counter.get_total_flops() / 2 / 64 == 32 * 64 * 66 + 33 * 64 * 64 + bands
    sizes = {name: one.numel() * 4 for name, one in module.named_buffers()}
    assert sizes.pop("bands") == 4 * bands and 0.55e6 < sum(sizes.values()) < 0.57e6


@pytest.mark.parametrize("n_fft, inner", [(4096, 128), (2048, 64), (1024, 64), (400, 25), (1764, 63), (254, 127)])
def test_the_two_factors_take_the_fewest_multiplications(n_fft, inner):
    assert front_end._inner(n_fft) == inner


# ------------------------------------------------------------------------------------------------------- the files


@pytest.fixture(scope="module", params=["default", "small"])
def written(request, tmp_path_factory):
    """(parameters, folder, what write() says)."""
    parameters, folder = FRONT_ENDS[request.param], tmp_path_factory.mktemp("package")
    frames = {"default": 90, "small": 120}[request.param]
    return parameters, folder, front_end.write(folder, parameters, frames)


@pytest.mark.slow
def test_every_runtime_hears_what_training_heard(written):
    parameters, folder, info = written
    heard = sounds(parameters)
    assert list(info["files"]) == ["torchscript", "onnx", "executorch"] and info["not_written"] == {}
    assert [one["file"] for one in info["files"].values()] == [f"front_end.{n}" for n in ("torchscript", "onnx", "pte")]
    for name, told in info["files"].items():
        run, off = imported(FORMATS[name].open)(folder / told["file"], 1), []
        assert told["bytes"] == (folder / told["file"]).stat().st_size < 1.2e6 and told["off"] < 1e-3
        assert 0 <= told["max_difference"] <= 1
        for waveform in heard.values():
            off.append(difference(as_an_app(run, info, waveform), canonical(parameters, waveform, info["frames"])))
        assert np.max(off) <= 1 and np.mean(np.array(off) > 0) < 1e-3
        two = np.stack([np.resize(heard["music"], info["samples"]), np.resize(heard["golden"], info["samples"])])
        assert np.array_equal(run(two), np.concatenate([run(two[:1]), run(two[1:])]))


@pytest.mark.slow
def test_what_is_said_of_the_front_end(written):
    parameters, folder, info = written
    assert json.loads(json.dumps(info)) == info
    said = {**info, "fmax": parameters.fmax, "db": tuple(info["db"])}
    assert info["fmax"] == parameters.highest
    assert LogMel(**{name: said[name] for name in LogMel.__dataclass_fields__}) == parameters
    assert info["samples"] % info["hop"] == 0 and info["samples"] >= (info["frames"] - 1) * info["hop"] + info["n_fft"]
    (example,) = info["golden"]
    with wave.open(str(folder / example["waveform"])) as file:
        assert file.getparams()[:4] == (1, 2, parameters.sample_rate, example["samples"])
        samples = np.frombuffer(file.readframes(example["samples"]), "<i2")
    shown = golden(parameters)
    assert np.array_equal(samples.astype(np.float32) / 32768, shown["waveform"])
    levels = np.frombuffer((folder / example["levels"]).read_bytes(), np.uint8).reshape(example["shape"])
    assert np.array_equal(levels, shown["mel"])
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {*(one["file"] for one in info["files"].values()), example["waveform"], example["levels"]}


@pytest.mark.slow
def test_a_file_that_is_too_far_off_is_refused(tmp_path, capsys):
    """Steps of 1/25 dB are finer than float32 hears faint sound beside a loud one."""
    told = front_end.write(tmp_path, LogMel(db=(-50, -40)), 64, ["torchscript"])
    assert told["files"] == {} and re.fullmatch(
        r"as torchscript the front end differs from training by up to 1, in 0\.\d\d% of all "
        r"levels; 1, in 0\.1% of them, may be; compute them with LogMel\.java, which does not take float32",
        told["not_written"]["torchscript"],
    )
    said = f"export front_end.torchscript: not written: {told['not_written']['torchscript']}\n"
    assert capsys.readouterr().err.endswith(said)
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["front_end.u8", "front_end.wav"]


def test_a_missing_library_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    told = front_end.write(tmp_path, SMALL, 30, ["onnx"])
    assert told["files"] == {} and told["not_written"] == {
        "onnx": "onnx cannot be written without onnxscript; run pip install 'kd_dist[export]'"
    }


# ------------------------------------------------------------------------------------------------------------ Java

TRIAL = """\
package dev.kd_dist.student;

import java.io.*;
import java.nio.file.*;
import java.util.List;

public final class Trial {
    public static void main(String[] folder) throws IOException {
        for (String line : Files.readAllLines(Paths.get(folder[0], "cases"))) {
            String[] n = line.split(" ");
            File at = new File(folder[0], n[0]);
            try (DataOutputStream out = new DataOutputStream(new BufferedOutputStream(new FileOutputStream(at)))) {
                LogMel logMel = new LogMel(
                        Integer.parseInt(n[2]), Integer.parseInt(n[3]), Integer.parseInt(n[4]), Integer.parseInt(n[5]),
                        Double.parseDouble(n[6]), Double.parseDouble(n[7]), Double.parseDouble(n[8]),
                        Double.parseDouble(n[9]));
                byte[] samples = Files.readAllBytes(Paths.get(folder[0], n[1]));
                float[] waveform = new float[samples.length / 4];
                java.nio.ByteBuffer.wrap(samples).asFloatBuffer().get(waveform);
                out.write(logMel.spectrogram(waveform));
                for (float value : logMel.input(waveform, Integer.parseInt(n[10]))) {
                    out.writeFloat(value);
                }
                for (int m = 0; m < logMel.first.length; m++) {
                    double[] band = new double[Integer.parseInt(n[3]) / 2 + 1];
                    System.arraycopy(logMel.weights[m], 0, band, logMel.first[m], logMel.weights[m].length);
                    for (double weight : band) {
                        out.writeDouble(weight);
                    }
                }
            } catch (IllegalArgumentException error) {
                Files.write(at.toPath(), error.getMessage().getBytes("UTF-8"));
            }
        }
    }
}
"""
WRONG = {  # parameters as LogMel.java takes them, and what it says
    "8000 255 100 20 0 4000 -60 40": "nFft must be even, hop from 1 to nFft and mels at least 1, not 255, 100, 20",
    "8000 256 257 20 0 4000 -60 40": "nFft must be even, hop from 1 to nFft and mels at least 1, not 256, 257, 20",
    "8000 256 100 20 0 4001 -60 40": "fmin must be below fmax, fmax at most half of the sample rate and dbLow below "
    "dbHigh, not 0.0, 4001.0 of 8000 Hz, -60.0, 40.0",
    "22050 256 100 100 0 8000 -60 40": "band 0 of 100 holds no frequency of a transform of 256 samples; take fewer "
    "bands or a larger nFft",
}


@pytest.fixture(scope="module")
def java(tmp_path_factory):
    """What LogMel.java makes of every sound in every front end, all in one process: {file: bytes}."""
    if shutil.which("javac") is None or shutil.which("java") is None:
        pytest.skip("there is no JDK: javac and java are not on the path")
    folder, cases = tmp_path_factory.mktemp("java"), []
    for number, parameters in enumerate(FRONT_ENDS.values()):
        numbers = [getattr(parameters, name) for name in ("sample_rate", "n_fft", "hop", "mels", "fmin", "highest")]
        for sound, waveform in sounds(parameters).items():
            name = f"{number}-{sound.replace(' ', '-')}"
            (folder / f"{name}.samples").write_bytes(waveform.astype(">f4").tobytes())
            cases.append(" ".join(map(str, [name, f"{name}.samples", *numbers, *parameters.db, 80])))
    (folder / "nan").write_bytes(np.full(3000, np.nan, ">f4").tobytes())
    cases += [f"wrong-{number} nan {line} 80" for number, line in enumerate([*WRONG, "8000 256 100 20 0 4000 -60 40"])]
    (folder / "cases").write_text("\n".join(cases))
    (folder / "Trial.java").write_text(TRIAL)
    compiler = ["javac", "--release", "8", "-Xlint:all,-options", "-Werror", "-d", folder, JAVA, folder / "Trial.java"]
    subprocess.run(compiler, check=True)
    subprocess.run(["java", "-cp", folder, "dev.kd_dist.student.Trial", folder], check=True)
    made = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert len(cases) == 9 * len(FRONT_ENDS) + 5
    return made


@pytest.mark.slow
@pytest.mark.parametrize("number, name", list(enumerate(FRONT_ENDS)))
def test_java_hears_what_training_heard(java, number, name):
    """Every byte of every sound; the canonical view of 80 frames to the bit; the weights to 1e-12."""
    parameters = FRONT_ENDS[name]
    for sound, waveform in sounds(parameters).items():
        made = java[f"{number}-{sound.replace(' ', '-')}"]
        steps = parameters.spectrogram(waveform)
        levels, rest = np.frombuffer(made[: steps.size], np.uint8), made[steps.size :]
        assert np.array_equal(levels.reshape(steps.shape), steps), sound
        view = torch.from_numpy(canonical(parameters, waveform, 80)).float() / 255
        assert rest[: 4 * view.numel()] == view.numpy().astype(">f4").tobytes(), sound
        weights = np.frombuffer(rest[4 * view.numel() :], ">f8").reshape(filters(parameters).shape)
        assert np.abs(weights - filters(parameters)).max() < 1e-12 * filters(parameters).max()


@pytest.mark.slow
def test_java_refuses_what_no_front_end_can_have(java):
    said = [java[f"wrong-{number}"].decode() for number in range(len(WRONG) + 1)]
    assert said == [*WRONG.values(), "the waveform has numbers that are not finite"]


def test_the_java_needs_nothing_of_android():
    parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_java.language()))
    root = parser.parse(JAVA.read_bytes()).root_node
    assert not root.has_error
    imports = [node.text.decode() for node in root.children if node.type == "import_declaration"]
    assert imports == ["import java.util.Arrays;"]
    assert max(map(len, JAVA.read_text().splitlines())) <= 120
