"""An older JSON configuration for distilling a deepfake detector becomes a recipe.

Of that format the keys of `Old` are known, and nothing more. Paths in it are relative to the folder a command is run
from, as in a recipe.
"""

import glob
import json
import math
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import yaml

from kd_dist.choose import describe, nearest
from kd_dist.config import checked
from kd_dist.disk import published
from kd_dist.errors import RecipeError
from kd_dist.losses.logits import TEMPERATURE
from kd_dist.recipe import Bound, Count, Fraction, Positive

COLDEST, HOTTEST = TEMPERATURE
Warmth = Annotated[float, Bound(lambda number: COLDEST <= number <= HOTTEST, f"between {COLDEST:g} and {HOTTEST:g}")]


@dataclass(frozen=True, kw_only=True)
class Old:
    """The keys of an older configuration. Those without a default are required."""

    image_size: Count  # pixels, the side of what both models get
    batch_size: Count
    epoch: Count
    lr: Positive
    temperature: Warmth
    teacher_weights: str  # a file, or a glob
    pretrained_student_weights: str | None = None  # likewise; null or empty: the student is pretrained first
    use_progressive_distillation: bool
    alpha_start: Fraction  # the label's share of the loss; without progress, all the time
    alpha_end: Fraction | None = None
    progressive_epochs: Positive | None = None  # how long it takes from the one to the other


def import_config(path: Path, out: Path | None = None) -> Path:
    """Write the recipe that the configuration `path` means to `out`, else as `<its stem>.yaml` here; returns where.

    What is left out, and which of several files is taken, is said on stderr. RecipeError: `path` cannot be read or
    meant, a weights file is not there, or `out` is.
    """
    out = Path(f"{path.stem}.yaml") if out is None else out
    if out.exists():
        raise RecipeError(f"{out}: is there already; give another file with --out, or move it away")
    old, unknown = read(path)
    for name in unknown:
        print(f"{path}: unknown key '{name}'; it is noted in the recipe and changes nothing", file=sys.stderr)
    teacher = _newest(path, "teacher_weights", old.teacher_weights)
    student = old.pretrained_student_weights
    student = _newest(path, "pretrained_student_weights", student) if student else None
    with published(out) as file:
        file.write(_recipe_text(old, path.name, out, unknown, teacher, student).encode())
    return out


def read(path: Path) -> tuple[Old, dict[str, Any]]:
    """The configuration in a file, and what stands under keys that are not known.

    An unknown key that is nearly a known one is a mistake, and a RecipeError as is any other.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once, parse_constant=_refused)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: is no JSON ({error}); correct it") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: must be an object of keys and values, not {describe(type(values))}")
    known = [field.name for field in fields(Old)]
    unknown = {name: value for name, value in values.items() if name not in known and nearest(name, known) is None}
    old = checked({name: value for name, value in values.items() if name not in unknown}, Old, str(path))
    for name in ("alpha_end", "progressive_epochs"):
        if old.use_progressive_distillation and getattr(old, name) is None:
            raise RecipeError(f"{path}: key '{name}' is missing; use_progressive_distillation needs it")
    return old, unknown


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for number, (name, _) in enumerate(pairs):
        if name in [other for other, _ in pairs[:number]]:
            raise ValueError(f"key '{name}' is given twice")
    return dict(pairs)


def _refused(word: str) -> Any:
    raise ValueError(f"{word} is no number")


def _newest(path: Path, key: str, pattern: str) -> str:
    """The file of that name, or the one modified last of those that match."""
    names = [pattern] if Path(pattern).is_file() else glob.glob(pattern, recursive=True)
    names = [name for name in names if Path(name).is_file()]
    if not names:
        raise RecipeError(f"{path}: {key}: '{pattern}' matches no file; run where the path begins, or correct it")
    newest = max(names, key=lambda name: (Path(name).stat().st_mtime_ns, name))
    if len(names) > 1:
        print(f"{path}: {key}: {len(names)} files match, of which {newest} was modified last", file=sys.stderr)
    return newest


def _recipe_text(old: Old, source: str, out: Path, unknown: dict[str, Any], teacher: str, student: str | None) -> str:
    """The recipe, with comments."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", out.stem).lstrip("_-")[:32] or "imported"
    hard, soft = _shares(old)
    lr = old.lr if student else old.lr / 2
    start = "" if student else "\n  weights: pretrained                  # ImageNet's, from timm; null: random ones"
    first = f"""\
  pretrain:                            # the student alone, on labels
    losses: {{cross_entropy: {{}}}}
    epochs: {old.epoch}
    batch_size: {old.batch_size}
    lr: {_number(old.lr)}
"""
    return f"""\
{_header(old, source, out, unknown, alone=student is not None)}
name: {name}
task: {{name: classification, classes: 2}}

data:
  source: face_frames
  root: FaceForensics++                # not in {source}: the folder of the data set
  options:                             # faces by the arrays that SBI's preprocessing leaves beside the frames
    {{faces: beside, frames: 16, blends: 1, blends_not_in: [train, test], fakes_not_in: [train, val]}}
  splits: {{train: 0.72, val: 0.14, test: 0.14}}

views:
  # A third of the epochs; each one more costs the teacher time, once.
  count: {math.ceil(old.epoch / 3)}
  size: {old.image_size}
  flip: 0.5
  self_blend: 0.5                      # share of a real face's views

teacher:
  model: timm/tf_efficientnet_b4
  weights: {_text(teacher)}
  image_size: {old.image_size}
  mean: [0, 0, 0]                      # pixels in [0, 1] as they are
  std: [1, 1, 1]

cache: {{logits: fp16, batch_size: {old.batch_size}}}  # of two logits one margin

student:
  model: timm/mobilevitv2_200{start}

stages:
{"" if student else first}\
  distill:
    init: {_text(student) if student else "stage:pretrain               # its best epoch"}
    losses:                            # a * hard + (1 - a) * soft
      cross_entropy: {{weight: {hard}}}
      kd_binary: {{weight: {soft}, temperature: {_number(old.temperature)}}}
    epochs: {old.epoch}
    batch_size: {old.batch_size}
    lr: {_number(lr)}

evaluate: {{metric: video_auc}}
"""


def _header(old: Old, source: str, out: Path, unknown: dict[str, Any], alone: bool) -> str:
    """Where a recipe comes from, how it is run, what was chosen in it."""
    rate = f"# * Which stage lr, {_number(old.lr)}, is for: "
    if alone:
        rate += "the distillation, the only one. If the student was pretrained with it, halve it."
    else:
        rate += f"the pretraining; the distillation has half of it. Both have {old.epoch} epochs."
    if not old.use_progressive_distillation:
        rate += "\n# * What a is without progress: alpha_start, all the time."
    foreign = "".join(f"\n#     {json.dumps({name: value})[1:-1]}" for name, value in unknown.items())
    foreign = f"\n# Keys of {source} that are not known, and change nothing here:{foreign}" if unknown else ""
    return f"""\
# An EfficientNet-B4 that finds deepfakes (Self-Blended Images) teaches a MobileViTv2. Made by `kd-dist import-config`
# from {source}.
#
#   kd-dist run {out} data.root=FOLDER
#
# What {source} does not say, and what stands here in its place:
# * Where the images are: put the folder into data.root. How faces are found and cut out: data.options. What students
#   learn from: real faces and their self-blended views alone, as the teacher did; fakes are what they are judged by.
{rate}
# * The optimiser (adamw), what else changes from view to view (a flip), what the student began with.
# * Whether the soft loss had the factor T^2; kd_binary has it, so that T does not change the size of its gradient.
#
# timm/mobilevitv2_200 (17.4 M parameters, 16.0 G multiply-adds at 380 pixels) is no compression of the teacher (17.6 M,
# 4.4 G); timm/mobilevitv2_100 (4.4 M, 4.0 G), _075 (2.5 M, 2.3 G) and _050 (1.1 M, 1.0 G) are.{foreign}"""


def _shares(old: Old) -> tuple[str, str]:
    """The weights of the hard and the soft loss, as a recipe writes them."""
    if not old.use_progressive_distillation:
        return _number(old.alpha_start), _number(1 - old.alpha_start)
    ends, over = (old.alpha_start, old.alpha_end), _number(old.progressive_epochs)
    lines = [tuple(map(_number, one)) for one in (ends, [1 - end for end in ends])]
    hard, soft = (f"{{linear: {{start: {start}, end: {end}, over: {over}}}}}" for start, end in lines)
    return hard, soft


def _number(value: float) -> str:
    """Without what is left of a subtraction: 1 - 0.95 is 0.05."""
    return f"{value:.12g}"


def _text(value: str) -> str:
    """A text in quotes, on one line."""
    return yaml.safe_dump(value, default_style='"', width=math.inf).strip()
