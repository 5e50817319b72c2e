"""The model card: what a package holds, in words and tables that a person reads before an app is built on it."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kd_dist.losses import signals_needed
from kd_dist.tasks import METRICS, retention

NOT_STATED = "not stated: ask before you ship"
DOES = {
    "classification": "says which of {count} classes {what} is of",
    "segmentation": "says of each pixel of {what} which of {count} classes it is of",
    "regression": "says {count} of {what}",
}
OUTPUTS = {
    "classification": "one logit a class; the softmax of them are probabilities",
    "segmentation": "one map of logits a class, coarser than the input; scaled up bilinearly to the image, the largest "
    "is a pixel's class",
    "regression": "one value an output, final as it is",
}
VIEWS = {
    "centre": "the largest centred box of the input's aspect ratio, scaled",
    "whole": "the whole image, stretched",
}
MEANS = {
    "accuracy": "share of examples whose most probable class is the right one",
    "nll": "mean of -log of the right class's probability, in nat",
    "ece": "how far the top probability is from the share of right answers, over 15 bins; 0: it can be believed",
    "auc": "area under the ROC curve of class 1 against class 0; 0.5 is chance, 1 faultless",
    "eer": "error rate at the threshold where both kinds of error are as frequent",
    "video_auc": "the AUC of videos: mean over the frames of the highest score in a frame",
    "miou": "mean over the classes of intersection / union of predicted and labelled pixels",
    "pixel_accuracy": "share of labelled pixels whose class is the right one",
    "ccc": "Lin's concordance correlation coefficient, mean over the outputs; 0 is chance, 1 faultless",
    "mae": "mean absolute error, in the unit of the outputs",
}
RETENTION = "the student's / the teacher's; where lower is better, the teacher's / the student's"
FILES = ("file", "format", "bytes", "int8", "largest difference", "of outputs up to")
SPEED = ("one thread, ms", "p95", "all threads, ms", "p95", "memory, MB")


def model_card(info: Mapping[str, Any]) -> str:
    """The card as Markdown, from what deployment_info.json says."""
    parts = [
        _opening(info),
        _section("How it was made", _origin(info)),
        _section("Input and output", _interface(info)),
        _section("Files", _files(info)),
        _section("Evaluation", _evaluation(info)),
        _section("Intended use and limits", _limits(info)),
        _section("Licences", _licences(info)),
        _section("Versions", _versions(info)),
        _section("How to verify", _verification(info)),
    ]
    return "\n\n".join(parts) + "\n"


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table, whatever the cells hold."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)


def cell(value: object) -> str:
    """A value in a table: one line, in which `|` divides nothing and nothing is HTML, a link or bold."""
    return " ".join(re.sub(r"[\\|<[*]", r"\\\g<0>", shown(value)).split())


def shown(value: object) -> str:
    """A value in words; a number with the digits that tell it apart."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def _section(title: str, parts: Iterator[str]) -> str:
    return "\n\n".join([f"## {title}", *parts])


def _listed(lines: Iterator[str] | Sequence[str]) -> str:
    return "\n".join(f"* {' '.join(line.split())}" for line in lines)


def _opening(info: Mapping[str, Any]) -> str:
    model = info["model"]
    return (
        f"# {info['name']}\n\n{model['name']}, {model['parameters']:,} parameters, {model['macs']:,} multiply-adds an "
        f"input: it {_does(info)}."
    )


def _does(info: Mapping[str, Any]) -> str:
    what = "an image" if info["input"]["name"] == "image" else "a recording"
    if info["task"] == "regression":
        return DOES["regression"].format(count=_and(info["outputs"]), what=what)
    return DOES[info["task"]].format(count=info["output"]["shape"][1], what=what)


def _and(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _origin(info: Mapping[str, Any]) -> Iterator[str]:
    teacher, stage = info["teacher"], info["recipe"]["stages"][info["stage"]]
    who = f"{teacher['name']} ({teacher['model']})"
    way = f"distilled from {who}, " + (
        "which was asked in every step" if stage["teacher"] == "online" else "whose outputs were kept beforehand"
    )
    if not signals_needed(stage["losses"]):
        way = f"trained on labels alone; no loss asks a teacher, and {who} is what it is compared with"
    made = ", and generated ones without labels" if stage["generated"] else ""
    yield (
        f"Stage `{info['stage']}`, seed {info['seed']}, {stage['epochs']} epochs: {way}. Its examples were read by the "
        f"source `{info['recipe']['data']['source']}`{made}."
    )
    rows = []
    for name, written in stage["losses"].items():
        options = {key: one for key, one in written.items() if key != "weight"}
        rows.append((name, _option(written.get("weight", 1.0)), _option(options)))
    yield table(("loss", "weight", "options"), rows)
    known = teacher["weights_sha256"]
    lines = [
        f"weights of the student: sha256 `{info['student']['weights_sha256']}`",
        f"weights of {who}: " + (f"sha256 `{known}`" if known else "random, it was given none"),
        *(f"cache of what it said, {split}: `{mark}`" for split, mark in teacher["cache"].items()),
        *(f"examples, {split}: `{mark}`" for split, mark in info["examples"].items()),
    ]
    yield _listed(lines)


def _option(value: Any) -> str:
    """An option as a recipe writes it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_option(one)}" for key, one in value.items())
    return value if isinstance(value, str) else json.dumps(value)


def _interface(info: Mapping[str, Any]) -> Iterator[str]:
    given, said = info["input"], info["output"]
    low, high = given["range"]
    lines = [
        f"input `{given['name']}`: {given['dtype']} {given['shape']}, {given['layout']}, channels {given['channels']}, "
        f"from {shown(low)} to {shown(high)}: a level of 8 bits divided by 255",
        _seen(info),
        f"mean {given['normalisation']['mean']} and std {given['normalisation']['std']} are "
        + ("applied inside the model: give it no normalised input" if given["normalisation"]["in_graph"] else "yours")
    ]
    if given["resized_in_graph_to"] is not None:
        side = given["resized_in_graph_to"]
        lines.append(f"inside, the model scales its input to {side} x {side}")
    span = "" if said["range"] is None else f", from {shown(said['range'][0])} to {shown(said['range'][1])}"
    lines.append(f"output `{said['name']}`: {said['shape']}, {OUTPUTS[info['task']]}{span}")
    yield _listed(lines)
    if info["outputs"] is not None:
        yield table(("output", "name"), list(enumerate(info["outputs"])))
    elif info["class_names"] is not None:
        yield table(("class", "name"), list(enumerate(info["class_names"])))
    else:
        yield "The data give the classes no names; they are numbered from 0."


def _seen(info: Mapping[str, Any]) -> str:
    given, sound = info["input"], info["front_end"]
    if sound is None:
        _, _, height, width = given["shape"]
        return (
            f"of an image: {VIEWS[given['view']]} with {given['resize']}; `android/Preprocess.java` does it to the "
            f"bit. In Python: `image.convert('RGB').resize(({width}, {height}), Image.BILINEAR, box=(left, top, right, "
            f"bottom))`, of the image with that box and not of one that was cut"
        )
    low, high = sound["db"]
    highest = sound["sample_rate"] / 2 if sound["fmax"] is None else sound["fmax"]
    return (
        f"of a recording at {sound['sample_rate']} Hz, one channel: the middle {sound['frames']} frames of its log-mel "
        f"spectrogram, {sound['mels']} bands from {shown(sound['fmin'])} to {shown(highest)} Hz, windows of "
        f"{sound['n_fft']} samples every {sound['hop']}, {shown(low)} to {shown(high)} dB, as `android/LogMel.java`"
    )


def _files(info: Mapping[str, Any]) -> Iterator[str]:
    main, files = info["metrics"]["metric"], info["files"]
    yield table(
        FILES,
        [
            (f"`{one['file']}`", name, one["bytes"], one["int8"], one["max_difference"], one["largest_output"])
            for name, one in files.items()
        ],
    )
    yield "Difference: the largest from the student's own outputs in Python, over the examples of the evaluation."
    metrics = list(dict.fromkeys(name for one in files.values() for name in one["metrics"]))
    rows = [(_directed(name), *(one["metrics"].get(name) for one in files.values())) for name in metrics]
    for of, key in (("the teacher's", "retention"), ("the student's", "kept")):
        rows.append((f"{main}, share of {of}", *(one[key] for one in files.values())))
    yield table(("metric", *(f"`{one['file']}`" for one in files.values())), rows)
    yield table(("file", *SPEED), [(f"`{one['file']}`", *_speed(one)) for one in files.values()])
    threads = sorted({one["latency_ms"]["all_threads"]["threads"] for one in files.values()})
    yield (
        f"Time of one input, median and 95th percentile, on {info['machine']['processor']}; all threads: "
        f"{', '.join(map(str, threads))}. That machine's load was {info['machine']['load']:.1f}, this "
        f"process included; where it is above the number of threads, times of several threads say little. "
        f"Memory: how far that of a process rises while the file is opened and run on "
        f"one thread. A phone is another machine: measure there."
    )
    yield _listed([f"`{one['file']}`: {one['note']}" for one in files.values()])
    if info["not_written"]:
        yield "Not written:"
        yield table(("format", "why"), list(info["not_written"].items()))
    if info["front_end"] is not None:
        yield from _front_end(info["front_end"])


def _front_end(front_end: Mapping[str, Any]) -> Iterator[str]:
    yield "The front end alone, from a waveform to the student's input:"
    rows = [(f"`{one['file']}`", name, one["bytes"], one["max_difference"]) for name, one in front_end["files"].items()]
    yield table(("file", "format", "bytes", "largest difference in levels"), rows)
    if front_end["not_written"]:
        yield table(("format of the front end", "why it is not written"), list(front_end["not_written"].items()))


def _speed(one: Mapping[str, Any]) -> Iterator[object]:
    for threads in ("one_thread", "all_threads"):
        yield from (one["latency_ms"][threads][name] for name in ("median", "p95"))
    yield one["memory_mb"]


def _directed(metric: str) -> str:
    return metric if METRICS.get(metric.partition("/")[0], True) else f"{metric} (lower is better)"


def _evaluation(info: Mapping[str, Any]) -> Iterator[str]:
    found = info["metrics"]
    student, teacher = found["student"], found["teacher"]
    yield (
        f"Split `{found['split']}`, {found['examples']:,} examples; the student in Python before it was exported. Main "
        f"metric: {found['metric']}"
        + (f", {shown(found['retention'])} of the teacher's." if found["retention"] is not None else ".")
    )
    yield table(
        ("metric", "student", "teacher", "retention"),
        [
            (_directed(name), value, teacher.get(name), _kept(name, value, teacher.get(name)))
            for name, value in student.items()
        ],
    )
    told = {name: MEANS[name] for name in MEANS if name in student}
    yield _listed([f"{name}: {what}" for name, what in {**told, "retention": RETENTION}.items()])
    yield "The weights are those of the epoch that did best on the validation split, of one seed."


def _kept(metric: str, student: float | None, teacher: float | None) -> float | None:
    """What is kept of the teacher's metric, where it is one that has a direction."""
    if metric not in METRICS or student is None or teacher is None:
        return None
    return retention(metric, student, teacher)


def _limits(info: Mapping[str, Any]) -> Iterator[str]:
    found = info["metrics"]
    lines = [
        f"made for inputs like those of its training data; how well it does on others was not measured: all figures "
        f"are of {found['examples']:,} examples of one split, `{found['split']}`",
        "no group of people, device or place was looked at by itself: differences between them are not known",
        "an input of something else gets an answer too; the model has no way to say that it does not know",
    ]
    if info["task"] == "classification":
        lines.append("a probability is no promise: see `ece` and `nll` above, where they are given")
    if any(one["int8"] for one in info["files"].values()):
        lines.append("int8 files answer a little differently from the others; their figures are their own")
    yield _listed(lines)


def _licences(info: Mapping[str, Any]) -> Iterator[str]:
    names = {"weights": "these weights", "teacher": "the teacher's weights", "data": "the training data"}
    yield table(("of", "licence"), [(what, info["licences"][key] or NOT_STATED) for key, what in names.items()])


def _versions(info: Mapping[str, Any]) -> Iterator[str]:
    yield table(("made with", "version"), list(info["made_with"].items()))


def _verification(info: Mapping[str, Any]) -> Iterator[str]:
    yield "`sha256sum -c SHA256SUMS` looks at every file of the package; those of the models are:"
    files = [*info["files"].values(), *(info["front_end"] or {"files": {}})["files"].values()]
    yield table(("file", "sha256"), [(f"`{one['file']}`", f"`{one['sha256']}`") for one in files])
    yield (
        "`golden/` holds examples with what the model takes and says, `golden/golden.json` lists them, and "
        "`android/README.md` says how to compare. `deployment_info.json` has every figure of this card."
    )
