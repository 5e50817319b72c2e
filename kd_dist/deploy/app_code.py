"""Code for an Android app: a student's constants, its input and output in plain Java, an example of each runtime."""

import re
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

SOURCES = Path(__file__).with_name("android")
MARK = re.compile(r"@(\w+)@")
WIDTH = 112  # characters that a line of names may have, so that it fits into 120 with its indent

INPUTS = {
    "image": {
        "java_import": "import android.graphics.Bitmap;",
        "java_argument": "Bitmap bitmap",
        "java_input": """\
        int width = bitmap.getWidth();
        int height = bitmap.getHeight();
        int[] pixels = new int[width * height];
        bitmap.getPixels(pixels, 0, width, 0, 0, width, height);
        float[] input = Preprocess.input(pixels, width, height);""",
        "kotlin_import": "import android.graphics.Bitmap",
        "kotlin_argument": "bitmap: Bitmap",
        "kotlin_input": """\
        val width = bitmap.width
        val height = bitmap.height
        val pixels = IntArray(width * height)
        bitmap.getPixels(pixels, 0, width, 0, 0, width, height)
        val input = Preprocess.input(pixels, width, height)""",
        "note": """\
The student learnt from pixels as they are stored: no orientation of EXIF was applied, no colour profile, and what
 * is transparent kept its colour. BitmapFactory turns nothing either, ImageDecoder does; set inScaled and
 * inPremultiplied to false, and do not ask for Bitmap.Config.HARDWARE, which has no pixels to read. getPixels makes
 * sRGB of other colour spaces (Display P3), which training did not. Two JPEG decoders may differ by a level here and
 * there. A camera often stores photographs on their side: where those of training stood upright, turn them first.""",
        "originals": "* `Preprocess.input` of a case's `.png` must give its `.input.f32`, to the bit.",
    },
    "spectrogram": {
        "java_import": "",
        "java_argument": "float[] waveform",
        "java_input": "        float[] input = Preprocess.input(waveform);",
        "kotlin_import": "",
        "kotlin_argument": "waveform: FloatArray",
        "kotlin_input": "        val input = Preprocess.input(waveform)",
        "note": """\
The waveform has one channel, the mean of all, at StudentInfo.SAMPLE_RATE Hz, full scale 1: samples of 16 bits
 * are divided by 32768. Loudness counts, so it is not normalised.""",
        "originals": """\
* `LogMel.spectrogram` of `front_end.wav` must give `front_end.u8`, to the byte. A case's `.u8` are the levels of a
  whole recording, band by band; its `.input.f32` is the middle of them, divided by 255. `front_end.wav` has 16-bit
  samples of one channel, `front_end.u8` a row of levels a band.
* In place of `LogMel.java`, `../front_end.onnx`, `.pte` or `.torchscript` make the same of a waveform, at most a level
  off here and there; which samples they take is `front_end.rule` in `../deployment_info.json`.""",
    },
}

OUTPUTS = {
    "classification": {
        "returns": "The probability of each of StudentInfo.CLASS_NAMES; Postprocess.best has the index of the largest.",
        "method": "probabilities",
        "java_type": "float[]",
        "java_util_import": "",
        "kotlin_type": "FloatArray",
        "result": "Postprocess.probabilities(output)",
    },
    "segmentation": {
        "returns": "The class of each pixel of the bitmap, row by row, as Postprocess.classMap says.",
        "method": "classMap",
        "java_type": "byte[]",
        "java_util_import": "",
        "kotlin_type": "ByteArray",
        "result": "Postprocess.classMap(output, width, height)",
    },
    "regression": {
        "returns": "The student's values by the names of StudentInfo.OUTPUT_NAMES.",
        "method": "values",
        "java_type": "Map<String, Float>",
        "java_util_import": "import java.util.Map;",
        "kotlin_type": "Map<String, Float>",
        "result": "Postprocess.byName(output)",
    },
}

EXAMPLES = {  # file: the formats that it can run, the best one first, and where their versions are told
    "JavaExample.java": (("executorch", "executorch_int8"), "executorch"),
    "KotlinExample.kt": (("executorch", "executorch_int8"), "executorch"),
    "OnnxExample.kt": (("onnx", "onnx_int8", "onnx_dynamic_int8"), "onnxruntime"),
    "TorchScriptExample.java": (("torchscript",), "torch"),
}


def app_code(info: Mapping[str, Any]) -> dict[str, str]:
    """The text of each file of `android/` by its name. There is an example of each runtime that can run one of the
    files of `info`, and all of them compile together."""
    image = info["input"]["name"] == "image"
    files = {
        "StudentInfo.java": student_info(info),
        "Preprocess.java": _source(f"Preprocess.{'image' if image else 'recording'}.java"),
        "Postprocess.java": _source(f"Postprocess.{info['task']}.java"),
    }
    if image:
        files["CanonicalBox.java"] = _source(f"CanonicalBox.{info['input']['view']}.java")
    else:
        files["LogMel.java"] = _source("LogMel.java")
    parts = {**INPUTS[info["input"]["name"]], **OUTPUTS[info["task"]]}
    for name, (formats, library) in EXAMPLES.items():
        known = [one for one in formats if one in info["files"]]
        if known:
            version = info["made_with"][library].partition("+")[0]  # 2.13.0+cpu is no version of an Android library
            text = _source(name)
            files[name] = filled(text, {**parts, formats[0]: known[0].upper(), f"{library}_version": version})
    if "JavaExample.java" in files or "TorchScriptExample.java" in files:
        files["AssetFile.java"] = _source("AssetFile.java")
    return {**files, "README.md": readme(files, parts["originals"])}


def filled(template: str, parts: Mapping[str, str]) -> str:
    """A template with each `@name@` replaced; a line that holds only such a name, and gets nothing, is left out."""
    lines = []
    for line in template.splitlines():
        whole = MARK.fullmatch(line)
        if whole is None or parts[whole[1]]:
            lines.append(MARK.sub(lambda mark: parts[mark[1]], line))
    return "\n".join([*lines, ""])


def student_info(info: Mapping[str, Any]) -> str:
    """`StudentInfo.java`: what `info` says that code needs, in ASCII whatever the names are."""
    lines = "\n".join(f"    public static final {one};" for one in _constants(info))
    return (
        "package dev.kd_dist.student;\n\n"
        "/** The student in constants, as deployment_info.json has them. */\n"
        f"public final class StudentInfo {{\n{lines}\n\n    private StudentInfo() {{}}\n}}\n"
    )


def _constants(info: Mapping[str, Any]) -> Iterator[str]:
    """Type, name and value of each."""
    given, said, shape = info["input"], info["output"], info["input"]["shape"]
    yield f"String NAME = {quoted(info['name'])}"
    yield f"String TASK = {quoted(info['task'])}"
    yield f"String INPUT_NAME = {quoted(given['name'])}"
    yield f"long[] INPUT_SHAPE = {{{', '.join(map(str, shape))}}}"
    yield f"int HEIGHT = {shape[2]}"
    yield f"int WIDTH = {shape[3]}"
    yield f"String OUTPUT_NAME = {quoted(said['name'])}"
    yield f"long[] OUTPUT_SHAPE = {{{', '.join(map(str, said['shape']))}}}"
    yield f"int OUTPUT_SIZE = {prod(said['shape'])}"
    if said["range"] is not None:
        yield f"float[] OUTPUT_RANGE = {{{', '.join(f'{one!r}f' for one in map(float, said['range']))}}}"
    if info["outputs"] is not None:
        yield f"String[] OUTPUT_NAMES = {_names(info['outputs'])}"
    else:  # a class without a name is called by its number
        yield f"String[] CLASS_NAMES = {_names(info['class_names'] or map(str, range(said['shape'][1])))}"
    if info["front_end"] is not None:
        yield from _sound(info["front_end"])
    runnable = {one for formats, _ in EXAMPLES.values() for one in formats}
    for name, one in info["files"].items():
        if name in runnable:
            yield f"String {name.upper()}_FILE = {quoted(one['file'])}"
            yield f"String {name.upper()}_SHA256 =\n            {quoted(one['sha256'])}"


def _sound(front_end: Mapping[str, Any]) -> Iterator[str]:
    """What LogMel is made with."""
    fmax = front_end["fmax"]
    for name in ("sample_rate", "n_fft", "hop"):
        yield f"int {name.upper()} = {front_end[name]}"
    yield f"double FMIN = {float(front_end['fmin'])}"
    yield f"double FMAX = {float(front_end['sample_rate'] / 2 if fmax is None else fmax)}"
    for name, value in zip(("DB_LOW", "DB_HIGH"), front_end["db"], strict=True):
        yield f"double {name} = {float(value)}"


def _names(names: Any) -> str:
    """An array of strings, on as many lines as it takes."""
    lines = [""]
    for name in map(quoted, names):
        if lines[-1] and len(lines[-1]) + len(name) > WIDTH:
            lines.append("")
        lines[-1] += f"{name}, "
    return "{\n" + "".join(f"        {line.rstrip()}\n" for line in lines) + "    }"


def quoted(text: str) -> str:
    """A Java string that says `text`, in ASCII. A control character is an octal escape: Java takes `\\u000a` for the
    end of a line before it looks for strings."""
    units = np.frombuffer(text.encode("utf-16-le", "surrogatepass"), "<u2")
    return '"' + "".join(map(_unit, units.tolist())) + '"'


def _unit(unit: int) -> str:
    if unit < 32 or unit == 127:
        return f"\\{unit:03o}"
    if unit > 127:
        return f"\\u{unit:04x}"
    return f"\\{unit:c}" if chr(unit) in '"\\' else chr(unit)


def readme(files: Mapping[str, str], originals: str) -> str:
    """What the files are, how to use them and how to try them."""
    about = {
        "StudentInfo.java": "names, shapes, class names and files of the student",
        "CanonicalBox.java": "the part of an image that the student sees",
        "LogMel.java": "a waveform to the levels of its spectrogram",
        "Preprocess.java": "to the student's input, the same numbers as in training",
        "Postprocess.java": "what the output says",
        "AssetFile.java": "an asset as a file, for the examples that need one",
        "JavaExample.java": "all of it with ExecuTorch, in Java",
        "KotlinExample.kt": "all of it with ExecuTorch, in Kotlin",
        "OnnxExample.kt": "all of it with ONNX Runtime, in Kotlin",
        "TorchScriptExample.java": "all of it with PyTorch Mobile, which is retired",
    }
    listed = "\n".join(f"| `{name}` | {what} |" for name, what in about.items() if name in files)
    return filled(_source("README.md"), {"listed": listed, "originals": originals})


def _source(name: str) -> str:
    return (SOURCES / name).read_text(encoding="utf-8")
