"""What must go together in a recipe whose values are each well formed."""

import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from kd_dist.batch import IGNORED
from kd_dist.choose import hint
from kd_dist.errors import RecipeError
from kd_dist.formats import FORMATS
from kd_dist.inputs import Images, Spectrograms
from kd_dist.inputs.spectrograms import STEPS
from kd_dist.losses import LOSSES, asks_the_cache, check_losses, features_read, imitates, signals_needed
from kd_dist.losses.served import codec_problem
from kd_dist.manifest import GENERATED, GENERATOR
from kd_dist.models import FAMILIES
from kd_dist.models.taps import reads_shares
from kd_dist.recipe import AUGMENTATIONS, Network, Recipe, Views
from kd_dist.remote import url_problem
from kd_dist.signals.codecs import LEVELS
from kd_dist.signals.topk import TopCodec, is_top
from kd_dist.sources import SOURCES
from kd_dist.stage_rules import Keys, Problems, repeat_problems, schedule_problems
from kd_dist.tasks import TASKS, metrics_of
from kd_dist.views.augmented import WIDEST
from kd_dist.views.mixed import ALPHA

MOST_MASK_CLASSES = IGNORED  # of a mask's 256 values the last says "ignored"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")  # 32: `<key>.<teacher>.npy` has to fit a tar header
FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
FIELDS = "logits|margin|view|row_crc|input_crc|tail_ends|tail_step|tail_below|logits_ids|logits_sum|logits_squares"
FEATURE = re.compile(rf"(?!(?:{FIELDS})$)(?!.*_scale$)[a-z][a-z0-9_]{{0,31}}")  # names a field of its own
# Options of views.
MIXING = ("mixup", "cutmix")
OF_IMAGES = ("crop_scale", "crop_ratio", "flip", "brightness", "contrast", "saturation", "self_blend")
OF_IMAGES += (*AUGMENTATIONS, *MIXING, "mixed")
BLIND_TO_MASKS = ("operations", "erase")  # they move or hide what a mask tells of
OF_AUDIO = ("gain", "time_mask", "band_mask")
LABELLED = ("huggingface", "webdataset")  # sources of images with a class
GIVEN = "given"  # in reports: a teacher that no stage trains
MODEL = re.compile(rf"({'|'.join(FAMILIES)})/\S+|" + FACTORY.pattern)


def problems(recipe: Recipe) -> Problems:
    """What is wrong between values that are each well formed: the keys that lead there, and a sentence."""
    yield from _name_problems(recipe)
    yield from _task_problems(recipe)
    yield from _data_problems(recipe)
    yield from _view_problems(recipe.views)
    yield from _kind_problems(recipe)
    yield from _mixing_problems(recipe)
    yield from _gan_problems(recipe)
    yield from _feature_problems(recipe)
    sections: dict[Keys, Network] = {("teacher",): recipe.teacher, ("student",): recipe.student}
    sections |= {("teachers", name): one for name, one in recipe.teachers.items()}
    for keys, network in sections.items():
        if not MODEL.fullmatch(network.model):
            forms = ", ".join(f"{family}/<name>" for family in FAMILIES)
            yield (*keys, "model"), f"'{network.model}' is not a model; write {forms} or package.module:factory"
        yield from _channel_problems(recipe, keys, network)
        yield from _weights_problems(recipe, (*keys, "weights"), network.weights, keys[0], list(recipe.stages))
    if not recipe.stages:
        yield ("stages",), "at least one stage is needed"
    for name in recipe.stages:
        yield from _stage_problems(recipe, name)
    yield from _export_problems(recipe)


def _name_problems(recipe: Recipe) -> Problems:
    """Names that become folders and parts of tar members."""
    named = [(("name",), recipe.name), (("teacher", "name"), recipe.teacher.name)]
    named += [(("teachers", name), name) for name in recipe.teachers]
    named += [(("stages", name), name) for name in recipe.stages]
    named += [(("data", "splits", name), name) for name in recipe.data.splits]
    if GIVEN in recipe.stages:
        yield ("stages", GIVEN), "is the name of a teacher that no stage trains; take another one"
    for name in recipe.teachers:
        if name == recipe.teacher.name:
            yield ("teachers", name), "is the name of the first teacher, teacher.name; take another one"
        elif name in (*recipe.stages, GIVEN):  # each has a row of that name in reports
            yield ("teachers", name), "is the name of another row of reports, too; take one that no stage has"
    for keys, name in named:
        if not NAME.fullmatch(name):
            yield keys, f"'{name}' is not a safe name; use 1 to 32 of A-Z a-z 0-9 _ -, a letter or digit first"


def _task_problems(recipe: Recipe) -> Problems:
    task = recipe.task
    known = metrics_of(task.name, task.classes)
    regression = task.name == "regression"
    if regression and (task.classes is not None or not task.outputs):
        yield ("task",), "a regression names its `outputs`, such as [valence, arousal], and has no classes"
        return
    if not regression and (task.classes is None or task.outputs):
        yield ("task",), f"{task.name} needs `classes`, their number, and has no outputs"
        return
    yield from _list_problems(("task", "outputs"), "output", task.outputs, task.outputs)
    if task.range[0] >= task.range[1]:
        yield ("task", "range"), f"must begin with its lower end, not {task.range[0]:g} before {task.range[1]:g}"
    if task.name == "segmentation" and recipe.audio is not None:
        yield ("audio",), "segmentation is for images; leave `audio` out"
    if task.name == "segmentation" and task.classes > MOST_MASK_CLASSES:
        yield ("task", "classes"), f"a mask has room for {MOST_MASK_CLASSES} classes, not for {task.classes}"
    metric = recipe.evaluate.metric
    if metric in TASKS[task.name].metrics_known and metric not in known:
        yield ("evaluate", "metric"), (
            f"'{metric}' is for two classes, the task has {task.classes}; choose one of {', '.join(known)}"
        )
    elif metric not in known:
        yield ("evaluate", "metric"), f"unknown metric '{metric}' of {task.name}{hint(metric, known)}"
    stored = recipe.cache.logits
    if stored in LEVELS and regression:
        yield ("cache", "logits"), f"'{stored}' is for classes; the outputs of a regression are stored as fp32 or fp16"
    if is_top(stored):
        yield from _top_problems(recipe)
    if stored in LEVELS and task.classes == 2:
        yield ("cache", "logits"), f"two classes store one margin, which '{stored}' cannot hold; use 'fp16' or 'fp32'"


def _top_problems(recipe: Recipe) -> Problems:
    """Logits of which only the largest are kept."""
    name, classes = recipe.cache.logits, recipe.task.classes
    if recipe.task.name != "classification":
        yield ("cache", "logits"), f"'{name}' is for classification, not for {recipe.task.name}"
    elif int(name.removeprefix("top")) >= classes or TopCodec(name, classes).row_bytes >= 2 * classes:
        yield ("cache", "logits"), f"'{name}' takes no less than all {classes} classes as 'fp16', which are exact"


def _feature_problems(recipe: Recipe) -> Problems:
    """Names of features become fields of a row."""
    for keys, names in ((("cache", "features"), recipe.cache.features), (("student", "taps"), recipe.student.taps)):
        for name in names:
            if not FEATURE.fullmatch(name):
                yield (*keys, name), (
                    f"'{name}' cannot name a feature; use 1 to 32 of a-z 0-9 _, a letter first, no '_scale' at the end"
                )
    for name in recipe.student.taps:
        if name not in recipe.cache.features:
            known = hint(name, recipe.cache.features)
            yield ("student", "taps", name), f"cache.features keeps no feature '{name}' to compare it with{known}"
    for name, feature in recipe.cache.features.items():
        if feature.dither and feature.store != "int8":
            yield ("cache", "features", name, "dither"), f"is for int8, not for {feature.store}"
        if feature.pool > 1 and reads_shares(feature.tap):
            yield ("cache", "features", name, "pool"), (
                f"'{feature.tap}' reads shares of places, which are none when pooled; leave `pool` out and name a "
                f"smaller grid in the tap, as in saliency(PATH, 4x8)"
            )


def _data_problems(recipe: Recipe) -> Problems:
    source, splits = recipe.data.source, recipe.data.splits
    if source not in SOURCES and not FACTORY.fullmatch(source):
        yield ("data", "source"), f"'{source}' is neither a source nor package.module:factory{hint(source, SOURCES)}"
    if source in LABELLED and (recipe.task.name != "classification" or recipe.audio is not None):
        yield ("data", "source"), f"'{source}' gives images with one class each, for classification only"
    if GENERATED in splits:
        yield ("data", "splits", GENERATED), "is the name of generated examples; take another one"
    for name in ("train", "val"):
        if name not in splits:
            yield ("data", "splits"), f"split '{name}' is missing; training needs 'train' and 'val'"
    if not math.isclose(sum(splits.values()), 1.0, abs_tol=1e-6):
        yield ("data", "splits"), f"the fractions must sum to 1, not {sum(splits.values()):g}"
    if (problem := url_problem(recipe.data.shards)) is not None:
        yield ("data", "shards"), problem
    yield from _list_problems(("evaluate", "split"), "split", [recipe.evaluate.split], splits)


def _view_problems(views: Views) -> Problems:
    for name in ("crop_scale", "crop_ratio", "magnitude", "blur_sigma", "erase_scale"):
        low, high = getattr(views, name)
        if low > high:
            yield ("views", name), f"the range must begin with its lower end, not {low:g} before {high:g}"
    if views.crop_scale[1] > 1:
        yield ("views", "crop_scale"), f"a crop cannot cover more than the image: {views.crop_scale[1]:g} is above 1"
    if views.erase_scale[1] > 1:
        yield ("views", "erase_scale"), f"no more than the view can be erased: {views.erase_scale[1]:g} is above 1"
    if views.blur_sigma[1] > WIDEST:
        yield ("views", "blur_sigma"), f"a blur is {WIDEST:g} pixels wide at most, not {views.blur_sigma[1]:g}"
    for name in MIXING:
        alpha = getattr(views, name)
        if alpha and not ALPHA[0] <= alpha <= ALPHA[1]:
            yield ("views", name), f"must be 0, or from {ALPHA[0]:g} to {ALPHA[1]:g}, not {alpha:g}"


def _mixing_problems(recipe: Recipe) -> Problems:
    """What is done to pixels that the labels cannot follow."""
    views, task = recipe.views, recipe.task.name
    for name in (*BLIND_TO_MASKS, *MIXING):
        if not getattr(views, name) or recipe.audio is not None:
            continue
        if name in MIXING and task != "classification":
            yield ("views", name), f"shows two examples, whose classes are weighed; it is not for {task}"
        elif name in BLIND_TO_MASKS and task == "segmentation":
            yield ("views", name), "moves or hides pixels, which a mask does not follow; it is not for segmentation"
        elif name in MIXING and recipe.data.shard_size < 2:
            yield ("views", name), "needs a second example in each shard; data.shard_size must be at least 2"
    if views.self_blend:
        for name in ("hue", "operations", "blur", "erase", *MIXING):
            if getattr(views, name):
                yield ("views", name), "would cover the traces of self_blend's fakes; leave one of the two out"


def _kind_problems(recipe: Recipe) -> Problems:
    """Views of the other kind of input than the recipe's."""
    views, audio = recipe.views, recipe.audio
    if views.self_blend and (recipe.task.name, recipe.task.classes) != ("classification", 2):
        yield ("views", "self_blend"), "makes fakes of real faces; it is for a classification of two classes"
    for name in OF_IMAGES if audio is not None else OF_AUDIO:
        if getattr(views, name) != getattr(Views(size=1), name):
            what = "of images; this recipe has `audio`" if audio is not None else "of audio; this recipe has no `audio`"
            yield ("views", name), f"is an option of views {what}"
    if audio is None:
        return
    mels, frames = views.shape
    if mels != audio.mels:
        yield ("views", "size"), f"the first number, {mels}, must be audio.mels, {audio.mels}: [mels, frames]"
    span = audio.db[1] - audio.db[0]
    if views.gain and not span / STEPS / 2 < views.gain <= span:
        yield ("views", "gain"), f"{views.gain:g} dB is below one step of audio.db, or above its range of {span:g} dB"
    for name, most in (("time_mask", frames), ("band_mask", mels)):
        if getattr(views, name) > most:
            yield ("views", name), f"{getattr(views, name)} is more than the {most} of views.size"
    if audio.db[0] >= audio.db[1]:
        yield ("audio", "db"), f"must begin with its lower end, not {audio.db[0]:g} before {audio.db[1]:g}"
    most = audio.sample_rate / 2
    if not audio.fmin < (audio.fmax or most) <= most:
        yield ("audio", "fmax"), f"the bands must lie between 0 and half the sample rate, {most:g} Hz"


def _gan_problems(recipe: Recipe) -> Problems:
    """Generated examples: spectrograms without a label."""
    gan = recipe.gan
    if gan is not None:
        if recipe.audio is None or recipe.task.name != "regression":
            yield ("gan",), "is for regression from recordings: only there an example may have no label"
        if gan.labels[0] <= gan.labels[1]:
            yield ("gan", "labels"), f"recordings must be called more than samples, not {list(gan.labels)}"
        if gan.noise[0] < gan.noise[1]:
            yield ("gan", "noise"), f"must not grow, from {gan.noise[0]:g} to {gan.noise[1]:g}"
        if min(recipe.views.shape) < 2:
            yield ("gan",), "needs views of two bands and two frames at least"
        if GENERATOR in recipe.stages:
            yield ("stages", GENERATOR), "is the name of the generator's folder; take another one"
    for name, stage in recipe.stages.items():
        if stage.generated and gan is None:
            yield ("stages", name, "generated"), "needs the section `gan`, which says how examples are generated"
        elif stage.generated and stage.shards is not None:
            yield ("stages", name, "shards"), (
                "is for a part of the packed examples, and generated ones are made of all of them; leave one out"
            )
        elif stage.generated and not (stage.model == "student" and imitates(stage.losses)):
            yield ("stages", name, "generated"), (
                "generated examples have no labels; they are for a student with a loss that compares it with the "
                "teacher alone, such as kd_huber"
            )


def _channel_problems(recipe: Recipe, keys: Keys, network: Network) -> Problems:
    """A normalisation of another kind of input than the recipe's."""
    if recipe.audio is None:
        channels, wanted = Images.channels, "images have red, green and blue; give three"
    else:
        channels, wanted = Spectrograms.channels, "spectrograms are grey; give one"
    for name, values in (("mean", network.mean), ("std", network.std)):
        if values is not None and len(values) != channels:
            yield (*keys, name), f"has {len(values)} numbers, but {wanted}"


def _weights_problems(recipe: Recipe, keys: Keys, weights: str | None, model: str, above: Sequence[str]) -> Problems:
    """First weights for `model`, "teacher", "student" or "teachers"; they may come from the stages `above`, but those
    of further teachers."""
    if weights is None or weights == "pretrained":
        return
    if not weights.startswith("stage:"):
        if not Path(weights).exists():
            yield keys, f"no file '{weights}'; give a file, 'pretrained' or 'stage:<name>'"
        return
    name = weights.removeprefix("stage:")
    if model == "teachers":
        yield keys, (
            "no stage trains a further teacher; in place of model and weights give the folder of a trained one, such "
            "as `run: runs/<recipe>/<stage>/seed-1`"
        )
    elif name not in recipe.stages:
        yield keys, f"unknown stage '{name}'{hint(name, recipe.stages)}"
    elif recipe.stages[name].model != model:
        yield keys, f"stage '{name}' trains the {recipe.stages[name].model}, not the {model}"
    elif name not in above:
        yield keys, f"stage '{name}' must stand above the stage that starts from it"


def _stage_problems(recipe: Recipe, name: str) -> Problems:
    stage, keys, order = recipe.stages[name], ("stages", name), list(recipe.stages)
    yield from _weights_problems(recipe, (*keys, "init"), stage.init, stage.model, order[: order.index(name)])
    if stage.model == "teacher" and stage.init is None and recipe.teacher.weights == "pretrained":
        yield ("teacher", "weights"), (
            f"are what is cached, and the stage '{name}' would start from random ones; write stages.{name}.init: "
            f"pretrained, and here stage:{name}"
        )
    if stage.batch_size % stage.accumulate:
        yield (*keys, "batch_size"), f"{stage.batch_size} cannot be divided by accumulate, {stage.accumulate}"
    yield from schedule_problems(stage, keys)
    known = {loss: written for loss, written in stage.losses.items() if loss in LOSSES}
    yield from repeat_problems(stage, keys, recipe.views.count if signals_needed(known) else None)
    if not stage.losses:
        yield (*keys, "losses"), "at least one loss is needed"
    related = [loss for loss in stage.losses if loss in LOSSES and LOSSES[loss].relational]
    if stage.find_batch_size and related:
        yield (*keys, "find_batch_size"), (
            f"would change the result: '{related[0]}' compares the rows of a micro-batch; leave it out, and give "
            f"`accumulate`"
        )
    for loss, options in stage.losses.items():
        try:
            check_losses({loss: options}, recipe.task.name, recipe.task.width, recipe.shared_features)
        except RecipeError as error:
            yield (*keys, "losses", loss), str(error).removeprefix(f"loss '{loss}': ")  # the keys have said it
            continue
        if stage.model == "teacher" and signals_needed({loss: options}):
            yield (*keys, "losses", loss), "needs a teacher's signals, and this stage trains the teacher"
        elif stage.teacher == "cached" and (problem := codec_problem(LOSSES[loss], options, recipe.cache.logits)):
            yield (*keys, "losses", loss), problem
        elif stage.teacher == "online" and asks_the_cache(loss, options):
            yield (*keys, "losses", loss), (
                "needs `eta`, the teacher's largest squared error on the training set, which only a cache knows; write "
                "it, or train with `teacher: cached`"
            )
    yield from _teachers_problems(recipe, name)


def _teachers_problems(recipe: Recipe, name: str) -> Problems:
    """Who teaches a stage."""
    stage, keys = recipe.stages[name], ("stages", name, "teachers")
    known = (recipe.teacher.name, *recipe.teachers)
    yield from _list_problems(keys, "teacher", stage.teachers, known)
    losses = {loss: written for loss, written in stage.losses.items() if loss in LOSSES}
    if stage.teachers and not signals_needed(losses):
        yield keys, "none of the losses listens to a teacher; leave it out, or add one that does, such as kd"
    if stage.teachers and recipe.teacher.name not in stage.teachers and features_read(losses, recipe.shared_features):
        yield keys, f"the losses read features, and only the first teacher's are cached; add '{recipe.teacher.name}'"
    if len(stage.teachers) > 1 and is_top(recipe.cache.logits):
        stored = recipe.cache.logits
        yield keys, (
            f"a mean needs the logits of every class, and the cache keeps the {stored.removeprefix('top')} largest "
            f"(cache.logits: {stored}); store them as fp16, or name one teacher"
        )


def _export_problems(recipe: Recipe) -> Problems:
    """Which student is exported, and in which formats."""
    if (name := recipe.export.stage) is not None:
        yield from _weights_problems(recipe, ("export", "stage"), f"stage:{name}", "student", list(recipe.stages))
    yield from _list_problems(("export", "formats"), "format", recipe.export.formats, FORMATS)


def _list_problems(keys: Keys, what: str, names: Sequence[str], known: Collection[str]) -> Problems:
    """Names that are not known, or stand twice."""
    for name in names:
        if name not in known:
            yield keys, f"unknown {what} '{name}'{hint(name, known)}"
    if len(set(names)) < len(names):
        yield keys, f"names one of them twice: {', '.join(names)}"
