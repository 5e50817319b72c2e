"""Code for an Android app: compiled, run against what Python says, and parsed."""

import itertools
import re
import shutil
import struct
import subprocess
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
import tree_sitter
import tree_sitter_java
import tree_sitter_kotlin
from deployments import SOUND, deployment
from recordings import tones

import kd_dist
from kd_dist.deploy.app_code import SOURCES, app_code, quoted
from kd_dist.inputs.spectrograms import LogMel
from kd_dist.tasks.segmentation import classes_at
from kd_dist.views.images import ImageViews
from kd_dist.views.spectrograms import SpectrogramViews

ROOT = Path("dev/kd_dist/student")
LANGUAGES = {
    ".java": tree_sitter.Language(tree_sitter_java.language()),
    ".kt": tree_sitter.Language(tree_sitter_kotlin.language()),
}
HOSTILE = ['a "b" \\ c', "\\u0041", "\\é", "line\nbreak\r\t\0", "*/ // */", "𝄞 clef", "${x} $y", "\ud800", "", "|"]

# Compiles each folder that it is given for Java 8 and runs its Cases, in one process.
DRIVER = """
import java.io.File;
import java.net.URL;
import java.net.URLClassLoader;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.stream.Stream;
import javax.tools.ToolProvider;

public class Driver {
    public static void main(String[] folders) throws Exception {
        for (String folder : folders) {
            List<String> line = new ArrayList<>(List.of("--release", "8", "-Xlint:all,-options", "-Werror", "-d"));
            line.add(folder + "/classes");
            try (Stream<Path> found = Files.walk(Path.of(folder))) {
                found.map(Path::toString).filter(one -> one.endsWith(".java")).forEach(line::add);
            }
            if (ToolProvider.getSystemJavaCompiler().run(null, null, null, line.toArray(new String[0])) != 0) {
                System.exit(1);
            }
            URL[] where = {new File(folder, "classes/").toURI().toURL()};
            try (URLClassLoader loader = new URLClassLoader(where)) {
                Class<?> cases = loader.loadClass("dev.kd_dist.student.Cases");
                cases.getMethod("main", String[].class).invoke(null, (Object) new String[] {folder});
            }
        }
    }
}
"""

CASES = """
package dev.kd_dist.student;

import java.io.BufferedInputStream;
import java.io.BufferedOutputStream;
import java.io.DataInputStream;
import java.io.DataOutputStream;
import java.io.FileInputStream;
import java.io.FileOutputStream;

public class Cases {
    public static void main(String[] folder) throws Exception {
        FileInputStream given = new FileInputStream(folder[0] + "/given");
        FileOutputStream found = new FileOutputStream(folder[0] + "/found");
        try (DataInputStream in = new DataInputStream(new BufferedInputStream(given));
             DataOutputStream out = new DataOutputStream(new BufferedOutputStream(found))) {
            for (int left = in.readInt(); left > 0; left--) {
                %s
            }
        }
    }

    static int[] ints(DataInputStream in, int count) throws Exception {
        int[] values = new int[count];
        for (int i = 0; i < count; i++) values[i] = in.readInt();
        return values;
    }

    static float[] floats(DataInputStream in, int count) throws Exception {
        float[] values = new float[count];
        for (int i = 0; i < count; i++) values[i] = in.readFloat();
        return values;
    }

    static void write(DataOutputStream out, float[] values) throws Exception {
        for (float value : values) out.writeFloat(value);
    }
}
"""
INPUT = "int w = in.readInt(), h = in.readInt(); write(out, Preprocess.input(ints(in, w * h), w, h));"
NAMES = 'for (String s : StudentInfo.CLASS_NAMES) { out.writeInt(s.length()); out.writeChars(s); }'
PROBABILITIES = """float[] p = Postprocess.probabilities(floats(in, in.readInt()));
                write(out, p); out.writeFloat(Postprocess.best(p));"""
CLASS_MAP = "int n = in.readInt(); out.write(Postprocess.classMap(floats(in, n), in.readInt(), in.readInt()));"
VALUES = """java.util.Map<String, Float> m = Postprocess.byName(floats(in, in.readInt()));
                for (String s : StudentInfo.OUTPUT_NAMES) out.writeFloat(m.get(s));"""
WAVEFORM = "write(out, Preprocess.input(floats(in, in.readInt())));"

# The signatures that the examples call, as the libraries have them.
STUBS = {
    "android/content/Context": "public abstract class Context {"
    " public abstract java.io.File getNoBackupFilesDir();"
    " public abstract android.content.res.AssetManager getAssets(); }",
    "android/content/res/AssetManager": "public final class AssetManager {"
    " public java.io.InputStream open(String fileName) throws java.io.IOException { return null; } }",
    "android/graphics/Bitmap": "public final class Bitmap {"
    " public int getWidth() { return 0; } public int getHeight() { return 0; }"
    " public void getPixels(int[] pixels, int offset, int stride, int x, int y, int width, int height) {} }",
    "org/pytorch/executorch/Module": "public class Module implements java.io.Closeable {"
    " public static Module load(String modelPath) { return null; }"
    " public EValue[] forward(EValue... inputs) { return null; } public void destroy() {} public void close() {} }",
    "org/pytorch/executorch/EValue": "public class EValue {"
    " public static EValue from(Tensor tensor) { return null; } public Tensor toTensor() { return null; } }",
    "org/pytorch/executorch/Tensor": "public abstract class Tensor {"
    " public static Tensor fromBlob(float[] data, long[] shape) { return null; }"
    " public float[] getDataAsFloatArray() { return null; } }",
    "org/pytorch/Module": "public class Module {"
    " public static Module load(String modelPath) { return null; }"
    " public IValue forward(IValue... inputs) { return null; } public void destroy() {} }",
    "org/pytorch/IValue": "public class IValue {"
    " public static IValue from(Tensor tensor) { return null; } public Tensor toTensor() { return null; } }",
    "org/pytorch/Tensor": "public abstract class Tensor {"
    " public static Tensor fromBlob(float[] data, long[] shape) { return null; }"
    " public float[] getDataAsFloatArray() { return null; } }",
}

SIDES = (1, 2, 3, 5, 8, 17, 24, 31, 32, 33, 64, 100, 257)
SIZES = [*itertools.product(SIDES, SIDES[::2]), (24, 32), (48, 64), (768, 1024), (1023, 77), (40, 900)]  # (H, W)
VIEWS = {"centre": (24, 32), "whole": (17, 40), "square": (64, 64), "tiny": (1, 3)}  # (H, W) of each package's input
TARGETS = [(4, 7), (1, 1), (8, 14), (37, 50), (3, 90), (120, 5), (64, 64)]  # (H, W) of class maps
LOGITS = [[0.0, 1.0, 2.0], [1e4, -1e4, 3.0], [5.0, 5.0, 5.0], [-3.25, -3.5, -800.0]]
WAVES = [tones(seconds, SOUND["sample_rate"]) for seconds in (0.3, 2.0, 1.111)]


def image(height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8: noise, which shows every rounding."""
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), np.uint8)


def maps(number: int) -> np.ndarray:
    """(3, 4, 7) float32."""
    return np.random.default_rng(number).normal(size=(3, 4, 7)).astype(np.float32)


def packages() -> dict[str, dict]:
    """`info` by package: every task, both views, files of every runtime or of one, names that break code."""
    output = {"name": "logits", "shape": [1, len(HOSTILE)], "range": None}
    names = {**deployment(), "class_names": HOSTILE, "name": '"\\u000a*/', "output": output}
    names["files"] = {name: one for name, one in names["files"].items() if name in ("executorch_int8", "onnx_int8")}
    return {
        "centre": deployment("classification", VIEWS["centre"], "centre"),
        "whole": deployment("segmentation", VIEWS["whole"], "whole"),
        "square": deployment("regression", VIEWS["square"], "centre"),
        "tiny": {**deployment("classification", VIEWS["tiny"], "whole"), "class_names": None},
        "probabilities": deployment(),
        "class_map": deployment("segmentation", view="whole"),
        "values": deployment("regression"),
        "sound": deployment("regression", (16, 30), sound=True),
        "names": names,
    }


PACKAGES = packages()


def given(package: str) -> tuple[str, list[bytes]]:
    """What is done in Java with each case of a package, and the cases."""
    if package in VIEWS:
        return INPUT, [struct.pack(">2i", size[1], size[0]) + argb(image(*size)) for size in SIZES]
    if package == "probabilities":
        return PROBABILITIES, [struct.pack(">i3f", 3, *one) for one in LOGITS]
    if package == "class_map":
        logits = [struct.pack(">i", 84) + maps(number).astype(">f4").tobytes() for number in range(len(TARGETS))]
        return CLASS_MAP, [one + struct.pack(">2i", w, h) for one, (h, w) in zip(logits, TARGETS, strict=True)]
    if package == "values":
        return VALUES, [struct.pack(">i2f", 2, 0.25, -0.5)]
    if package == "sound":
        return WAVEFORM, [struct.pack(">i", len(wave)) + wave.astype(">f4").tobytes() for wave in WAVES]
    return NAMES, [b""]


def argb(pixels: np.ndarray) -> bytes:
    """Pixels as `Bitmap.getPixels` gives them, big-endian, of an alpha that must not matter."""
    return np.concatenate([np.full_like(pixels[..., :1], 0x7F), pixels], axis=2).tobytes()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, bytes]:
    """What Java made of each package's cases. All of its code is compiled, the examples against stubs."""
    if shutil.which("javac") is None:
        pytest.skip("no javac on this machine: the generated Java is not compiled")
    folder = tmp_path_factory.mktemp("java")
    for package, info in PACKAGES.items():
        root = folder / package / ROOT
        root.mkdir(parents=True)
        for name, text in app_code(info).items():
            (root / name).write_text(text, encoding="ascii")
        action, cases = given(package)
        (root / "Cases.java").write_text(CASES % action)
        (folder / package / "given").write_bytes(struct.pack(">i", len(cases)) + b"".join(cases))
        for name, body in STUBS.items():
            path = folder / package / "stubs" / f"{name}.java"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"package {name.rpartition('/')[0].replace('/', '.')};\n{body}\n")
    (folder / "Driver.java").write_text(DRIVER)
    command = ["java", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "Driver.java", *PACKAGES]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return {package: (folder / package / "found").read_bytes() for package in PACKAGES}


@pytest.mark.slow
@pytest.mark.parametrize("package", VIEWS)
def test_java_scales_every_image_as_the_student_saw_it(found, package):
    size, whole = VIEWS[package], PACKAGES[package]["input"]["view"] == "whole"
    policy = ImageViews(size, whole=whole)
    inputs = np.frombuffer(found[package], ">f4").reshape(-1, 3, *size)
    assert len(inputs) == len(SIZES) >= 60
    for one, ours in zip(SIZES, inputs, strict=True):
        pixels = image(*one)
        view = policy.replay(pixels, policy.canonical(one))
        expected = torch.from_numpy(view).permute(2, 0, 1) / 255
        assert np.array_equal(ours, expected.numpy()), one


@pytest.mark.slow
def test_java_makes_of_a_recording_what_the_student_heard(found):
    parameters = LogMel(**{**SOUND, "db": tuple(SOUND["db"])})
    policy = SpectrogramViews((16, 30))
    inputs = np.frombuffer(found["sound"], ">f4").reshape(-1, 16, 30)
    assert len(inputs) == len(WAVES) == 3
    for wave, ours in zip(WAVES, inputs, strict=True):
        levels = parameters.spectrogram(wave)
        view = policy.replay(levels[..., None], policy.canonical(levels.shape))[..., 0]
        assert np.array_equal(ours, torch.from_numpy(view) / 255)


@pytest.mark.slow
def test_java_softmax(found):
    rows = np.frombuffer(found["probabilities"], ">f4").reshape(-1, 4)
    assert len(rows) == len(LOGITS)
    for logits, row in zip(LOGITS, rows, strict=True):
        expected = torch.tensor(logits).double().softmax(0).numpy()
        np.testing.assert_allclose(row[:3], expected, atol=1e-6)
        assert row[3] == expected.argmax()


@pytest.mark.slow
def test_java_class_maps_differ_only_where_two_classes_are_equal(found):
    content, place = found["class_map"], 0
    for number, (height, width) in enumerate(TARGETS):
        ours = np.frombuffer(content, np.uint8, height * width, place).reshape(height, width)
        place += height * width
        logits = torch.from_numpy(maps(number))
        expected = classes_at(logits, (height, width)).numpy()
        scaled = torch.nn.functional.interpolate(logits[None], (height, width), mode="bilinear")[0]
        first, second = scaled.topk(2, dim=0).values.numpy()
        clear = first - second > 1e-5
        assert clear.mean() > 0.99
        assert np.array_equal(ours[clear], expected[clear]), (height, width)
    assert place == len(content)


@pytest.mark.slow
def test_java_values_by_name(found):
    assert struct.unpack(">2f", found["values"]) == (0.25, -0.5)


@pytest.mark.slow
def test_java_says_hostile_names_as_they_are(found):
    content, names = found["names"], []
    while content:
        end = 4 + 2 * int.from_bytes(content[:4])
        names.append(content[4:end].decode("utf-16-be", "surrogatepass"))
        content = content[end:]
    assert names == HOSTILE


def test_a_string_of_java_is_ascii_on_one_line():
    for name in HOSTILE:
        assert re.fullmatch(r'"[ -~]*"', quoted(name))
    assert quoted('é"\\\n') == r'"\u00e9\"\\\012"'


def parsed(name: str, text: str) -> tree_sitter.Node:
    return tree_sitter.Parser(LANGUAGES[Path(name).suffix]).parse(text.encode()).root_node


def nodes(root: tree_sitter.Node, kind: str) -> list[tree_sitter.Node]:
    found = [root] if root.type == kind else []
    return found + [one for child in root.children for one in nodes(child, kind)]


def members(text: str) -> set[str]:
    """The fields and methods of a Java class that others may use."""
    root = parsed("X.java", text)
    declared = [(one, one) for one in nodes(root, "method_declaration")]
    declared += [(one, one.child_by_field_name("declarator")) for one in nodes(root, "field_declaration")]
    open_to_all = [name for one, name in declared if not one.text.startswith(b"private")]
    return {one.child_by_field_name("name").text.decode() for one in open_to_all}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_file_parses_and_uses_what_the_others_have(package):
    files = app_code(PACKAGES[package])
    sources = {name: text for name, text in files.items() if name != "README.md"}
    assert len(sources) >= 6
    own = {name.removesuffix(".java") for name in sources if name.endswith(".java")}
    used = 0
    for name, text in sources.items():
        root = parsed(name, text)
        assert not root.has_error, name
        assert text.startswith("package dev.kd_dist.student")
        assert max(map(len, text.splitlines())) <= 120, name
        assert not re.search(r"@\w+@", text)
        for kind, member in re.findall(r"\b([A-Z]\w+)\.(\w+)", re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)):
            if kind in own:
                used += 1
                assert member in members(files[f"{kind}.java"]), (name, kind, member)
    assert used >= 10


def test_kotlin_parts_are_found_as_the_parser_sees_them():
    """The names above are found by their looks; here the parser says that they are what they look like."""
    files = app_code(PACKAGES["centre"])
    for name in ("KotlinExample.kt", "OnnxExample.kt"):
        found = {one.text.decode() for one in nodes(parsed(name, files[name]), "navigation_expression")}
        constants = {one.partition(".")[2] for one in found if re.fullmatch(r"StudentInfo\.\w+", one)}
        assert len(constants) >= 3
        assert constants <= members(files["StudentInfo.java"])


def test_there_is_an_example_of_each_runtime_that_can_run_a_file():
    every = {"StudentInfo.java", "Preprocess.java", "Postprocess.java", "CanonicalBox.java", "README.md"}
    assert set(app_code(PACKAGES["centre"])) == every | {
        "AssetFile.java", "JavaExample.java", "KotlinExample.kt", "OnnxExample.kt", "TorchScriptExample.java"
    }  # fmt: skip
    files = app_code(PACKAGES["names"])
    assert set(files) == every | {"AssetFile.java", "JavaExample.java", "KotlinExample.kt", "OnnxExample.kt"}
    assert "StudentInfo.EXECUTORCH_INT8_FILE" in files["JavaExample.java"]
    assert "StudentInfo.ONNX_INT8_FILE" in files["OnnxExample.kt"]
    info = deployment()
    info["files"] = {"onnx": info["files"]["onnx"]}
    assert set(app_code(info)) == every | {"OnnxExample.kt"}
    info["files"] = {}
    assert set(app_code(info)) == every
    assert "CanonicalBox.java" not in app_code(PACKAGES["sound"])


def test_the_examples_name_the_libraries_that_made_the_files():
    files = app_code(PACKAGES["centre"])
    for name in ("JavaExample.java", "KotlinExample.kt"):
        assert '"org.pytorch:executorch-android:1.5.1"' in files[name]
    assert '"com.microsoft.onnxruntime:onnxruntime-android:1.31.0"' in files["OnnxExample.kt"]
    assert "PyTorch 2.15.0 wrote" in files["TorchScriptExample.java"]
    assert "ImageDecoder" in files["JavaExample.java"]
    assert "full scale 1" in app_code(PACKAGES["sound"])["KotlinExample.kt"]


def test_what_the_code_is_made_of_is_installed_with_the_package():
    project = tomllib.loads((Path(kd_dist.__file__).parents[1] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["kd_dist.deploy"]
    found = [path for path in SOURCES.rglob("*") if any(path.match(f"deploy/{pattern}") for pattern in patterns)]
    assert len(found) >= 14
    assert set(found) == set(SOURCES.rglob("*"))


def test_the_readme_lists_every_file():
    for info in PACKAGES.values():
        files = app_code(info)
        assert re.findall(r"^\| `(\S+)` \|", files["README.md"], re.MULTILINE) != []
        assert set(re.findall(r"^\| `(\S+)` \|", files["README.md"], re.MULTILINE)) == set(files) - {"README.md"}
