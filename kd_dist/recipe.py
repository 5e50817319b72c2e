"""What a recipe says: one frozen dataclass for each section, with the type, range and default of every key.

`kd_dist.config.load` reads a YAML file into these. A key without a default is required.
Paths are relative to the folder a command is run from.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, NamedTuple

from kd_dist.errors import RecipeError
from kd_dist.signals.codecs import CODECS
from kd_dist.signals.topk import is_top

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
# Keys of `views`: what is done to an image beyond crops, flips and factors.
AUGMENTATIONS = ("hue", "operations", "magnitude", "blur", "blur_sigma", "erase", "erase_scale")


class Bound(NamedTuple):
    """The range of a value, for `typing.Annotated`."""

    holds: Callable[[Any], bool]
    words: str  # completes "must be a number, ..."


def _size_in(text: str) -> re.Match | None:
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)B?\s*", text, re.IGNORECASE)
    return found if found and float(found[1]) else None


def parse_bytes(text: str) -> int:
    """`20GB`, `1.5T`, `800 MB` -> bytes, in powers of 1000. Raises RecipeError for anything else."""
    found = _size_in(text)
    if found is None:
        raise RecipeError(f"'{text}' is no size; write a number and a unit, such as 20GB")
    return int(float(found[1]) * UNITS[found[2].upper()])


Count = Annotated[int, Bound(lambda number: number >= 1, "at least 1")]
Natural = Annotated[int, Bound(lambda number: number >= 0, "at least 0")]
Above1 = Annotated[float, Bound(lambda number: number > 1, "above 1")]
Positive = Annotated[float, Bound(lambda number: number > 0, "above 0")]
Cycle = Annotated[float, Bound(lambda number: number >= 0.1, "at least 0.1")]
NonNegative = Annotated[float, Bound(lambda number: number >= 0, "at least 0")]
Size = Annotated[str, Bound(lambda text: _size_in(text) is not None, "a size such as 20GB")]
LogitsFormat = Annotated[
    str, Bound(lambda name: name in CODECS or is_top(name), f"{', '.join(CODECS)} or, of the largest, such as top20")
]
Fraction = Annotated[float, Bound(lambda number: 0 <= number <= 1, "between 0 and 1")]
Inner = Annotated[float, Bound(lambda number: 0 < number < 1, "above 0 and below 1")]
Share = Annotated[float, Bound(lambda number: 0 < number <= 1, "above 0 and at most 1")]
Factor = Annotated[float, Bound(lambda number: number >= 1, "at least 1")]


@dataclass(frozen=True, kw_only=True)
class Task:
    """`task`: what is to be predicted."""

    name: Literal["classification", "segmentation", "regression"] = "classification"
    classes: Annotated[int, Bound(lambda number: number >= 2, "at least 2")] | None = None  # of the first two
    outputs: tuple[str, ...] = ()  # of regression: the names of its numbers
    range: tuple[float, float] = (-1.0, 1.0)  # of regression: from where to where they go

    @property
    def width(self) -> int:
        """How many numbers a model gives for an example, or for each place of it."""
        return self.classes or len(self.outputs)


@dataclass(frozen=True, kw_only=True)
class Data:
    """`data`: the raw dataset, how it is split and packed, and how it is read."""

    source: str  # a name of kd_dist.sources.SOURCES, or package.module:factory
    root: str | None = None  # folder of the raw dataset; null: the source needs none
    options: dict[str, Any] = field(default_factory=dict)  # further arguments of the source
    splits: dict[str, Positive] = field(default_factory=lambda: {"train": 0.8, "val": 0.1, "test": 0.1})  # sum is 1
    shard_size: Count = 1024  # examples in a shard
    shards: str = "shards"  # folder of <recipe name>/<split>/; finished ones may lie under any URL that fsspec knows
    local_cache: Size | None = None  # of a URL: whole shards on this machine, at most so much (20GB); null: range reads
    cache_dir: str | None = None  # where those are kept; null: $XDG_CACHE_HOME/kd_dist, else ~/.cache/kd_dist
    workers: Natural = 2  # loader processes for each rank; 0 loads in the training process
    block: Count | None = None  # consecutive examples that stay together in the shuffle; null: chosen from their size
    lanes: Count | None = None  # streams of blocks that are interleaved; null: chosen
    window: Count | None = None  # examples of a lane that are shuffled together; null: chosen
    on_error: Literal["raise", "replace_masked"] = "raise"  # at a damaged example: stop, or mask it and go on
    error_limit: Count = 100  # examples that may be masked, each as often as an epoch shows it; one more stops the run


@dataclass(frozen=True, kw_only=True)
class Audio:
    """`audio`: examples are recordings, packed as log-mel spectrograms; how these are made of sound.

    Values and steps are described in shards/FORMAT.md, so that an app can do the same.
    """

    sample_rate: Count = 22050  # Hz; another rate is resampled
    n_fft: Count = 2048  # samples of a frame
    hop: Count = 512  # samples from one frame to the next
    mels: Count = 128  # bands
    fmin: NonNegative = 20.0  # Hz, the lower edge of the first band
    fmax: Positive | None = None  # Hz, the upper edge of the last; null: half the sample rate
    db: tuple[float, float] = (-60.0, 40.0)  # decibels of levels 0 and 255
    shortest: Positive = 1.0  # seconds; a shorter recording is quarantined


@dataclass(frozen=True, kw_only=True)
class Gan:
    """`gan`: more spectrograms than there are recordings, from a generator; what they sound like the teacher says.

    `kd-dist train-gan` trains it on the training split and packs what it makes.
    """

    share: Annotated[float, Bound(lambda number: 0 < number < 1, "between 0 and 1")] = 0.25  # of an epoch that has them
    epochs: Count = 200  # over the training split
    batch_size: Annotated[int, Bound(lambda number: number >= 2, "at least 2")] = 16
    lr: Positive = 2e-4  # of the generator; the discriminator's is half of it
    latent: Count = 128  # numbers that a sample is made from
    width: Annotated[int, Bound(lambda number: number >= 8 and number % 8 == 0, "a multiple of 8")] = 16  # channels
    labels: tuple[Fraction, Fraction] = (0.9, 0.1)  # what recordings and samples are called; [0.9, 0]: one-sided
    noise: tuple[NonNegative, NonNegative] = (0.1, 0.01)  # of full scale, on all that is judged: at first, in the end
    seed: Natural = 0


@dataclass(frozen=True, kw_only=True)
class Head:
    """`head` of a model: hidden layers in the place of its last layer, GELU and dropout after each."""

    hidden: Annotated[tuple[Count, ...], Bound(len, "at least one")] = (512, 128)  # their sizes
    dropout: Fraction = 0.0


@dataclass(frozen=True, kw_only=True)
class Network:
    """A model, its first weights and the input it expects."""

    model: str  # timm/<name>, torchvision/<name>, kd_dist/<name> or package.module:factory
    options: dict[str, Any] = field(default_factory=dict)  # further arguments of the model
    weights: str | None = None  # a file, `pretrained`, `stage:<name>`, or null for random ones
    image_size: Count | None = None  # pixels, height and width of its input; null: the size of the view
    mean: tuple[float, ...] | None = None  # of each channel in [0, 1]: RGB, or a spectrogram's one; null: the model's
    std: tuple[Positive, ...] | None = None  # likewise
    head: Head | None = None  # hidden layers in the place of the model's last layer; null: none


@dataclass(frozen=True, kw_only=True)
class FurtherTeacher(Network):
    """`teachers.<name>`: one more network whose logits are cached, which no stage of this recipe trains. Its name is
    that of its signals: folder <split>/<name>/, members <key>.<name>.npy."""

    seed: Natural = 0  # of its random weights, where it has any
    # runs/<recipe>/<stage>/seed-<n>: the model that was trained there, in place of the keys of a Network, which `load`
    # takes from that folder; null from then on.
    run: str | None = None


@dataclass(frozen=True, kw_only=True)
class Teacher(FurtherTeacher):
    """`teacher`: the network whose signals are cached, the first of them where there are several."""

    name: str = "teacher"  # names its signals


@dataclass(frozen=True, kw_only=True)
class Student(Network):
    """`student`: the network that learns."""

    taps: dict[str, str] = field(default_factory=dict)  # feature -> module path in the model, as in cache.features


@dataclass(frozen=True, kw_only=True)
class Views:
    """`views`: the policy that draws the views of a training example. Other splits have one canonical view."""

    count: Count = 8  # views of each training example
    size: Count | tuple[Count, Count]  # pixels: the side of a square, or [height, width]; of audio [mels, frames]
    crop_scale: tuple[Positive, Positive] = (1.0, 1.0)  # range of the crop's share of the image area
    crop_ratio: tuple[Positive, Positive] = (0.75, 1.3333)  # range of the crop's width / height
    flip: Fraction = 0.0  # probability of a left-right flip
    brightness: Fraction = 0.0  # x: the factor is drawn from [1 - x, 1 + x]
    contrast: Fraction = 0.0  # likewise
    saturation: Fraction = 0.0  # likewise
    hue: Annotated[float, Bound(lambda number: 0 <= number <= 0.5, "between 0 and 0.5")] = 0.0  # x: turned by -x to x
    operations: Annotated[int, Bound(lambda number: 0 <= number <= 3, "from 0 to 3")] = 0  # RandAugment's, of each view
    magnitude: tuple[Fraction, Fraction] = (0.3, 0.3)  # range of their strength; RandAugment's 9 of 30 by default
    blur: Fraction = 0.0  # probability of a blur
    blur_sigma: tuple[Positive, Positive] = (0.1, 2.0)  # range of its width, in pixels of the view; up to 16
    erase: Fraction = 0.0  # probability that a box is painted over
    erase_scale: tuple[Positive, Positive] = (0.02, 0.33)  # range of its share of the view's area
    mixup: NonNegative = 0.0  # alpha of Beta(alpha, alpha), the share of the view's own image; 0: no mixup
    cutmix: NonNegative = 0.0  # likewise; with both, each half of the time
    mixed: Fraction = 1.0  # share of the views that are mixed, where one of these is above 0
    self_blend: Fraction = 0.0  # share of a real face's views that are blended with itself, and fakes: class 1 of two
    gain: NonNegative = 0.0  # of audio, in decibels: what is added is drawn from [-x, x]
    time_mask: Natural = 0  # of audio: frames of the widest of two masks in time
    band_mask: Natural = 0  # of audio: bands of the widest of two masks in frequency
    seed: Natural = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) of a view in pixels."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @property
    def is_augmented(self) -> bool:
        """Whether more is done to an image than plain views can hold."""
        return any((self.hue, self.operations, self.blur, self.erase))

    @property
    def is_mixed(self) -> bool:
        """Whether views may show two images."""
        return bool(self.mixup or self.cutmix)


@dataclass(frozen=True, kw_only=True)
class Feature:
    """`cache.features.<name>`: an intermediate output of the teacher, and how it is stored."""

    tap: str  # module path, `path[1]` or `path[out]` of several outputs, or a reading of it: `saliency(path, 4x8)`
    pool: Count = 1  # the grid is divided by so much, each cell the mean of its area
    pca: Count | None = None  # principal components that are kept of the channels; null: all channels as they are
    store: Literal["int8", "fp16", "bf16", "fp32"] = "int8"  # int8 has a scale for each channel of each row
    dither: bool = False  # of int8: rounded at random, right on average


@dataclass(frozen=True, kw_only=True)
class Cache:
    """`cache`: what is kept of the teacher's output, and how the teacher is run."""

    # How a row of logits is stored: fp32, fp16, uint16, uint8; or of many classes the largest and the mass of the
    # others, such as top20. Two classes store one margin. null: fp16, of regression fp32
    logits: LogitsFormat | None = None
    features: dict[str, Feature] = field(default_factory=dict)  # of training views; the others keep logits alone
    batch_size: Count = 64  # views in a forward pass of the teacher; the last bits of its output depend on it
    threads: Count = 1  # CPU threads of the teacher; fixed for the same reason
    patience: Positive = 30.0  # minutes without a new shard after which a process stops waiting for the others


@dataclass(frozen=True, kw_only=True)
class Stage:
    """`stages.<name>`: one training run."""

    model: Literal["teacher", "student"] = "student"  # which network is trained
    # A file, `pretrained`, `stage:<name>`; null: the student's own `weights`, or random ones for a teacher.
    init: str | None = None
    teacher: Literal["cached", "online"] = "cached"  # where signals come from, if the losses need any
    # Who is listened to: names of teachers, of several the mean of what they say; empty: the first alone.
    teachers: tuple[str, ...] = ()
    losses: dict[str, dict[str, Any]]  # name of kd_dist.losses.LOSSES -> {weight, its options}
    shards: Count | None = None  # the first so many of the training split, such as are cached already; null: all
    generated: bool = False  # learn from generated examples, too, of which the teacher alone knows what they are
    epochs: Count
    batch_size: Count  # examples of an optimizer step: all ranks, all micro-batches
    accumulate: Count = 1  # micro-batches of each rank in a step; divides batch_size
    # m views of an example side by side in a batch, of one read and decode, as in FKD (Shen and Xing, ECCV 2022,
    # 2112.01528). An epoch has as many rows as ever, of 1/m of the examples: m epochs show what m others do, and
    # `epochs` is a multiple of m. A step has batch_size / m examples, m near duplicates of each: the less views differ,
    # the less it learns from them, and the statistics of BatchNorm and what relational losses compare are of so many
    # fewer. For decode-bound training on many examples in large batches. Partners of mixed views are decoded as well.
    views_per_decode: Count = 1
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: Positive  # the highest learning rate
    backbone_lr: Positive = 1.0  # factor of `lr` for all but the model's head and the projections
    layer_decay: Share = 1.0  # factor of `lr` from each block to the one before it, the head's being 1; 1: none
    train_last: Natural | None = None  # blocks before the head that learn beside it; 0: the head alone; null: all
    unfreeze: dict[str, Natural | None] = field(default_factory=dict)  # epoch -> `train_last` from then on: {5: 2}
    weight_decay: NonNegative = 0.05
    momentum: Fraction = 0.9  # of sgd
    sam: Positive | None = None  # how far SAM looks up the slope (rho), such as 0.05: two passes a step; null: no SAM
    warmup_epochs: NonNegative = 0.0  # epochs until the learning rate reaches `lr`
    min_lr: NonNegative = 0.0  # learning rate at the end, of each cycle
    cycle_epochs: Cycle | None = None  # of the first cosine, after which it begins again; null: one to the end
    cycle_factor: Factor = 1.0  # length of each further cycle, of the one before it
    ema: Inner | None = None  # the average of the weights that is evaluated and kept: its decay, as 0.999; null: none
    clip: Positive | None = 1.0  # largest norm of the gradient; null: not clipped
    precision: Literal["fp32", "fp16", "bf16"] | None = None  # null: the launcher's choice
    sync_bn: bool = False  # BatchNorm statistics over all ranks; on GPUs
    spike: Above1 | None = None  # a step whose loss is more than so many medians of those before is skipped; null: none
    find_batch_size: bool = False  # raise `accumulate` until a micro-batch fits into memory
    gradient_checkpointing: bool = False  # blocks run again in the backward pass: less memory, more time
    compile: bool = False  # training by torch.compile
    channels_last: bool = False  # convolutions on memory in the order (B, H, W, C)
    patience: Count | None = None  # epochs without improvement before the run stops; null: never
    log_every: Count = 50  # steps
    checkpoint_every: Count | None = None  # steps; the end of an epoch always saves one
    max_steps: Count | None = None  # stop after so many steps

    def learning(self, epoch: int) -> int | None:
        """What `train_last` is in an epoch, from 0 on."""
        begun = [last for first, last in self.unfreeze.items() if int(first) <= epoch]
        return begun[-1] if begun else self.train_last


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """`evaluate`: what a trained model is judged by."""

    split: str = "test"  # a split of `data.splits`
    # accuracy, nll, ece, and of two classes auc, eer, video_auc; miou, pixel_accuracy; ccc, mae; null: the task's first
    metric: str | None = None


@dataclass(frozen=True, kw_only=True)
class Limits:
    """`export.limits`: what an exported model is held to; null: it is measured, and not judged.

    `parity` and `int8` decide whether a file is written at all; `kd-dist check` judges the others.
    """

    retention: Positive | None = 0.9  # metric of each file / the teacher's
    # Largest difference of a float32 file's outputs to the student's; over the largest of them, where that is above 1
    parity: Positive = 1e-5
    int8: Share = 0.95  # metric of an int8 file / the student's
    size_mb: Positive | None = 25.0  # 10^6 bytes of a file
    latency_ms: Positive | None = 100.0  # median of one example on one thread of the machine that exports
    memory_mb: Positive | None = 500.0  # by how much a process grows to load a file and run one example, at most


@dataclass(frozen=True, kw_only=True)
class Export:
    """`export`: which student becomes a package for an app, in which formats, and what it is held to."""

    stage: str | None = None  # null: the last that trains a student
    formats: tuple[str, ...] = ()  # of kd_dist.formats.FORMATS; empty: all
    calibration: Count = 128  # cached training examples that int8 takes its ranges from
    license: str | None = None  # of the weights: an SPDX identifier or a sentence, for the model card
    teacher_license: str | None = None  # of the teacher's weights, likewise
    data_license: str | None = None  # of the training data, likewise
    limits: Limits = Limits()


@dataclass(frozen=True, kw_only=True)
class Monitor:
    """`monitor`: when a training run speaks up."""

    stagnation_epochs: Count = 5  # epochs without improvement
    retention_target: Positive = 0.9  # student metric / teacher metric
    oscillation: Positive = 0.5  # spread of the loss relative to its mean
    logit_limit: Positive = 1e3  # largest absolute logit that passes without a warning


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole recipe: one experiment."""

    name: str | None = None  # null: the stem of the file name; `load` always fills it
    seed: Natural = 0  # of the order of examples and the student's first weights
    runs: str = "runs"  # folder under which <recipe name>/<stage>/ is written
    task: Task
    data: Data
    audio: Audio | None = None  # null: examples are images
    gan: Gan | None = None  # null: no generated examples
    teacher: Teacher
    teachers: dict[str, FurtherTeacher] = field(default_factory=dict)  # further ones, by name
    views: Views
    cache: Cache = Cache()
    student: Student
    stages: dict[str, Stage]  # in the order they are run
    evaluate: Evaluate = Evaluate()
    export: Export = Export()
    monitor: Monitor = Monitor()

    @property
    def shared_features(self) -> list[str]:
        """The features that the cache keeps and the student taps: what losses can compare."""
        return [name for name in self.cache.features if name in self.student.taps]

    def teachers_of(self, stage: Stage) -> list[str]:
        """The names of the teachers that a stage listens to: the first, then others by name. A mean has no order."""
        first = self.teacher.name
        return [name for name in (first, *sorted(self.teachers)) if name in (stage.teachers or (first,))]

    def with_teacher(self, name: str) -> "Recipe":
        """The recipe with the teacher of this name for its only one, which is how each of several is run, cached and
        read. Features are those of the first."""
        if name == self.teacher.name:
            return replace(self, teachers={})
        alone = Teacher(**vars(self.teachers[name]), name=name)
        return replace(self, teacher=alone, teachers={}, cache=replace(self.cache, features={}))
