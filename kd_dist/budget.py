"""Before the teacher is run over everything: how many bytes its signals take, which codecs fit a disk budget, and,
measured in small, the hours."""

import json
import shutil
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from kd_dist import assemble, caches, forecast, manifest, places
from kd_dist.cache_teacher import extraction
from kd_dist.caches import Piece
from kd_dist.compress import FeatureCodec
from kd_dist.errors import RecipeError
from kd_dist.extract import STEM, Extraction, Rows, Said, note
from kd_dist.forecast import Timing
from kd_dist.link import SOURCE
from kd_dist.pack import refuse_writing
from kd_dist.proposals import combinations, device_of, measure_ladder, smaller_logits
from kd_dist.recipe import Feature, Recipe
from kd_dist.rehearsal import Counted, Small, counted, divided, likely_teacher, quiet, small, tar_bytes
from kd_dist.rehearsal import measure as rehearse
from kd_dist.rows import LOGITS
from kd_dist.shards import BLOCK, index_bytes, shard_path
from kd_dist.signals import Codec, codec_of, npy_header_size, pack_rows
from kd_dist.teacher import Teacher

INDEX_OF_EXAMPLE = 130  # bytes, about, of a packed example's entries in the index and its key


class Planned(NamedTuple):
    """What is to be cached: how each split is extracted, and how much of it there is, or is to be thought of."""

    works: dict[str, Extraction]  # of the splits that a source gives
    there: Counted
    more: float  # generated examples for each of the training split: they may be yet to be made, and take as much

    @property
    def train(self) -> Extraction:
        return self.works[places.TRAINING_SPLIT]

    @property
    def examples(self) -> dict[str, int]:
        """Of each split, the generated ones among them."""
        found = {split: sum(sizes) for split, sizes in self.there.shards.items()}
        made = {manifest.GENERATED: max(1, round(self.more * found[places.TRAINING_SPLIT]))} if self.more else {}
        return found | made

    def rows(self, split: str) -> int:
        """Of an example."""
        return (self.train if places.is_trained_on(split) else self.works[split]).rows

    def bytes(self, codec: Codec, features: Mapping[str, Feature]) -> dict[str, int]:
        """That the signals of each split take on the disk, logits and features being stored in this way."""
        found = {}
        for split, work in self.works.items():
            found[split] = self.work_bytes(split, replace(work, codec=codec), features)
        if self.more:
            found[manifest.GENERATED] = round(self.more * found[places.TRAINING_SPLIT])
        return found

    def work_bytes(self, split: str, work: Extraction, features: Mapping[str, Feature]) -> int:
        """That an extraction over a split takes."""
        trained = places.is_trained_on(split)
        stored = stored_as(work, features) if trained else work
        taken = split_bytes(stored, self.there.shards[split], self.there.key_bytes[split])
        return taken + (bases_bytes(work, features) if trained else 0)

    def piece_bytes(self, split: str, piece: Piece, features: Mapping[str, Feature]) -> int:
        """That one folder of a split takes: some of the views, and some of what is stored of each."""
        if split == manifest.GENERATED:
            return round(self.more * self.piece_bytes(places.TRAINING_SPLIT, piece, features))
        work = self.works[split]
        if LOGITS not in piece.stored:
            work = replace(work, codec=codec_of(work.task.name, None, work.codec.classes, work.codec.grid))
        work = replace(work, views=piece.count if work.views else 0, first=piece.first)
        return self.work_bytes(split, work, {name: one for name, one in features.items() if name in piece.stored})


def plan(
    recipe: Recipe,
    budget: int | None,
    timing: Timing | None = None,
    students: bool = True,
    examples: int | None = None,
) -> dict[str, Any]:
    """What caching will take, and, given a budget in bytes, how to store most within it; with `timing` also the hours.

    Returns the views and the bytes of each split, of a row, an example and of all, what is still to be written and the
    bytes free on the disk, `training_files`, and what is `estimated` from what; with a budget also `proposal`, by
    feature a recipe's own words with the measured report, how logits are to be stored, and the bytes they come to; with
    `timing` what `forecast.outlook` says. Further teachers count too, their splits as `places.beside` calls them.
    Without `students` nothing is said of stages. With `examples` the training split is thought to have so many, each
    like those that are there. Raises RecipeError when no proposal fits, or what is still to be written not on the disk,
    which is not asked of a split that is thought of.
    """
    others = places.cached_teachers(recipe)[1:]
    further = {one.teacher.name: plan(one, None, timing, False, examples) for one in others}
    refuse_writing(places.shards_folder(recipe))
    there, (likely, trained) = counted(recipe), likely_teacher(recipe)
    meant = there if examples is None else of_size(recipe, there, examples)
    tried, processes = None, 1 if timing is None else timing.processes
    with tempfile.TemporaryDirectory(prefix="kd-dist-plan-") as folder:
        if there.listing is not None or timing is not None:
            with quiet():
                tried = small(likely, there, Path(folder), processes)
        teacher = assemble.teacher(likely, recipe.cache.features)
        teacher = teacher.to("cuda" if torch.cuda.is_available() else "cpu")
        planned = planned_of(likely if there.listing is None else tried.recipe, recipe, meant, teacher)
        found = counts(recipe, planned, tried, meant is not there)
        found["training_files"] = training_files(recipe, planned)
        found["estimated"] = estimated(recipe, there, meant, trained)
        for one in further.values():
            found["total_bytes"] += one["total_bytes"]
            found["still_bytes"] += one["still_bytes"] - one["packing_bytes"]
        if budget is not None:
            beside = sum(one["total_bytes"] for one in further.values())
            found |= proposal(recipe, planned, teacher, trained, budget, beside)
        elif examples is None:
            refuse_full(recipe, planned, teacher, trained, found)
        if timing is not None:
            measured = rehearse(tried, teacher, timing.clock, timing.seconds, students)
            found["time"] = forecast.outlook(recipe, measured, planned.there.shards, found, timing, further)
    for name, one in further.items():
        for part in ("rows", "row_bytes", "split_bytes"):
            found[part] |= {places.beside(recipe, name, split): taken for split, taken in one[part].items()}
    return found


def planned_of(read: Recipe, recipe: Recipe, there: Counted, teacher: Teacher) -> Planned:
    """The extractions of a recipe whose examples `read` has, or some of them."""
    works = {split: extraction(read, split, teacher) for split in places.splits(recipe)}
    works = {
        split: replace(work, views=places.stored_views(recipe, split), folder=places.signals_folder(recipe, split))
        for split, work in works.items()
    }
    generated = manifest.GENERATED in places.cached_splits(recipe)
    return Planned(works, there, recipe.gan.share / (1 - recipe.gan.share) if generated else 0.0)


def of_size(recipe: Recipe, there: Counted, examples: int) -> Counted:
    """What there is, with so many examples in its training split, in shards of the recipe's size."""
    sizes, keys, split = there.shards[places.TRAINING_SPLIT], there.key_bytes, places.TRAINING_SPLIT
    size = max(sizes) if recipe.data.source == SOURCE else recipe.data.shard_size
    more = {split: round(keys[split] * examples / sum(sizes))}
    return there._replace(shards={**there.shards, split: divided(examples, size)}, key_bytes={**keys, **more})


def counts(recipe: Recipe, planned: Planned, tried: Small | None, thought_of: bool) -> dict[str, Any]:
    """The bytes of a plan: see `plan`."""
    stored, examples = stored_as(planned.train, recipe.cache.features), planned.examples
    splits = planned.bytes(stored.codec, recipe.cache.features)
    each, packing = planned.train.examples.example_bytes(), 0
    if planned.there.listing is not None:
        each = tried.example_bytes
    if planned.there.listing is not None or thought_of:
        for split, count in examples.items():
            there = written(places.shards_folder(recipe) / split, "data")
            packing += max(0, round(count * (each + INDEX_OF_EXAMPLE)) - there)
    return {
        "rows": {split: count * planned.rows(split) for split, count in examples.items()},
        "row_bytes": {split: work.dtype.itemsize for split, work in {**planned.works, "train": stored}.items()},
        "logits_row_bytes": replace(stored, features={}).dtype.itemsize,
        "feature_row_bytes": {name: codec.row_bytes for name, codec in stored.features.items()},
        "example_bytes": {"packed": each, "signals": splits[places.TRAINING_SPLIT] / examples[places.TRAINING_SPLIT]},
        "example_requests": 1 + (recipe.views.mixed if recipe.views.is_mixed else 0.0),  # for it and its partner
        "split_bytes": splits,
        "total_bytes": sum(splits.values()),
        "packing_bytes": packing,
        "still_bytes": packing + sum(still_to_write(recipe, planned, split, thought_of) for split in splits),
        "free_bytes": shutil.disk_usage(nearest(places.shards_folder(recipe))).free,
    }


def training_files(recipe: Recipe, planned: Planned) -> dict[str, Any]:
    """What the training split lies in: how many `shards`, in one folder of examples and so many `signal_folders`, of
    which a row is read in `row_reads` on average; all `files`; of examples and of signals the bytes of all indexes, and
    of what the manifests say of single shards."""
    split, keys = places.TRAINING_SPLIT, planned.there.key_bytes[places.TRAINING_SPLIT]
    work, sizes = stored_as(planned.train, recipe.cache.features), planned.there.shards[split]
    pieces = caches.pieces(recipe, split)
    packed, signals = packed_index_bytes(work, sizes, keys), len(pieces) * signal_index_bytes(work, sizes, keys)
    return {
        "shards": len(sizes),
        "signal_folders": len(pieces),
        "row_reads": sum(piece.count for piece in pieces) / work.rows,
        "files": (1 + len(pieces)) * (2 * len(sizes) + 1),
        "index_bytes": {"packed": packed, "signals": signals},
        "manifest_bytes": {"packed": listed_bytes("data", sizes), "signals": len(pieces) * listed_bytes(STEM, sizes)},
    }


def packed_index_bytes(work: Extraction, sizes: Sequence[int], key_bytes: int) -> int:
    """Bytes of the indexes of example shards of these `sizes`, by the first that is there."""
    shard = work.examples.shard(0)
    extensions = sorted(shard.read(0))
    texts, count = {"extensions": extensions, "notes": shard.notes}, sum(sizes)
    whole = index_bytes(count, len(extensions) * count, key_bytes, texts)
    return whole + (len(sizes) - 1) * index_bytes(0, 0, 0, texts)


def listed_bytes(stem: str, sizes: Sequence[int]) -> int:
    """Bytes of what a manifest says of its shards, of these `sizes`."""
    row = {"name": shard_path("", stem, 0).name, "sha256": "0" * 64, "examples": 0}
    two, one = (len(json.dumps({"shards": [row] * count}, indent=1)) for count in (2, 1))  # as manifests are written
    return sum(two - one - 1 + len(str(count)) for count in sizes)


def still_to_write(recipe: Recipe, planned: Planned, split: str, thought_of: bool) -> int:
    """Bytes of signals of a split that are not there yet: of the folders that caching would begin, or finish. One that
    is finished is no more than a part of a training split that is `thought_of`."""
    total, more = 0, thought_of and places.is_trained_on(split)
    for piece in caches.pieces(recipe, split):
        if more or not caches.is_finished(recipe, split, piece):
            taken = planned.piece_bytes(split, piece, recipe.cache.features)
            total += max(0, taken - written(places.signals_folder(recipe, split, piece.number), "signals"))
    return total


def written(folder: Path, stem: str) -> int:
    """Bytes of the shards that are in a folder already."""
    return sum(path.stat().st_size for path in folder.glob(f"{stem}-*") if path.suffix in (".tar", ".idx"))


def nearest(folder: Path) -> Path:
    """The folder, or the first around it that there is."""
    return next(one for one in (folder.absolute(), *folder.absolute().parents) if one.is_dir())


def estimated(recipe: Recipe, there: Counted, meant: Counted, trained: bool) -> list[str]:
    """What the figures rest on where there is not yet all that there will be, or is to be thought of."""
    said = []
    if meant is not there:
        real, thought = (sum(one.shards[places.TRAINING_SPLIT]) for one in (there, meant))
        said.append(f"{thought:,} training examples are thought of, each like the {real:,} that there are")
    if there.listing is not None:
        said.append(
            f"not packed yet: examples are counted from what data.source {recipe.data.source} lists, bytes of examples "
            f"and hours are those of its first ones"
        )
    if not trained:
        said.append(
            f"{recipe.teacher.weights} is not there yet: the teacher has random weights, which changes no bytes and "
            f"hardly the hours; what codecs keep can be told of a trained one only"
        )
    return said


def refuse_full(recipe: Recipe, planned: Planned, teacher: Teacher, trained: bool, found: Mapping[str, Any]) -> None:
    """Raise a RecipeError when the disk has not the room for what is still to be written."""
    short = found["still_bytes"] - found["free_bytes"]
    if short <= 0:
        return
    advice = ""
    for codec in smaller_logits(recipe, planned.train, teacher, trained):
        taken = sum(planned.bytes(codec, recipe.cache.features).values())
        if found["total_bytes"] - taken >= short:
            advice = f", store logits as `cache: {{logits: {codec.name}}}`, which takes {taken:,} bytes in all"
            break
    else:
        advice = ", let `--budget` say how features fit" if recipe.cache.features else ""
    raise RecipeError(
        f"{places.shards_folder(recipe)}: {found['still_bytes']:,} bytes are still to be written and the disk has "
        f"{found['free_bytes']:,}; make room for {short:,} more, choose another data.shards, draw fewer views{advice}"
    )


def stored_as(work: Extraction, wanted: Mapping[str, Feature]) -> Extraction:
    """The extraction with its features stored as a recipe describes them, to count bytes: a reduced feature has no
    basis yet, and takes what one of so many channels takes."""
    shapes = {name: codec.shape for name, codec in work.features.items()}
    codecs = {
        name: FeatureCodec(name, (one.pca or shapes[name][0], *shapes[name][1:]), one.store, one.pool)
        for name, one in sorted(wanted.items())
    }
    return replace(work, features=codecs)


def features_of(proposal: Mapping[str, dict[str, Any]]) -> dict[str, Feature]:
    """A proposal as a recipe would hold it."""
    return {name: Feature(**one["recipe"]) for name, one in proposal.items()}


def split_bytes(work: Extraction, sizes: Sequence[int], key_bytes: int) -> int:
    """Bytes that a split takes on the disk: of an example a header and a member, in shards of these `sizes` whose tars
    end on a record, each with its index. Exact but for a few digits of what an index notes."""
    member = tar_bytes([npy_header_size(work.dtype, work.rows) + work.rows * work.dtype.itemsize])
    records = sum(-(-(count * member + 2 * BLOCK) // tarfile.RECORDSIZE) for count in sizes)
    return records * tarfile.RECORDSIZE + signal_index_bytes(work, sizes, key_bytes)


def signal_index_bytes(work: Extraction, sizes: Sequence[int], key_bytes: int) -> int:
    """Bytes of the indexes of signal shards of these `sizes`."""
    texts, count = {"extensions": [f"{work.teacher}.npy"], "notes": notes_of(work)}, sum(sizes)
    return index_bytes(count, count, key_bytes, texts) + (len(sizes) - 1) * index_bytes(0, 0, 0, texts)


def notes_of(work: Extraction) -> dict[str, Any]:
    """What a shard's index notes, of two rows of random logits: as long as of many."""
    logits = np.random.default_rng(0).standard_normal((2, work.codec.classes, *(work.codec.grid or ())), np.float32)
    targets, sizes = work.task.collate([work.task.no_target(work.policy.size)] * 2)
    rows = Rows(["", ""], np.zeros(2, work.policy.dtype), np.zeros(2, np.uint32), targets, sizes, targets, np.zeros(2))
    kinds = [field for codec in work.features.values() for field in codec.fields()]
    empty = {name: np.zeros((2, *map(int, *shape)), kind) for name, kind, *shape in kinds}
    fields, good = work.codec.encode(logits, targets)
    notes: dict[str, Any] = {"quarantined": [], "error": None, "teacher": None, "overflow": None}
    packed = pack_rows(work.dtype, rows.views, rows.crcs, fields | empty)
    note(work, notes, Said(rows, logits, empty, {}, dict.fromkeys(work.features, 0)), packed, good)
    return notes


def bases_bytes(work: Extraction, wanted: Mapping[str, Feature]) -> int:
    """Bytes of the principal components, about."""
    channels = {name: codec.shape[0] for name, codec in work.features.items()}
    return sum(4 * channels[name] * (one.pca + 1) for name, one in wanted.items() if one.pca is not None)


def proposal(
    recipe: Recipe, planned: Planned, teacher: Teacher, trained: bool, budget: int, beside: int
) -> dict[str, Any]:
    """How logits and features are stored so that all fits into `budget` bytes: logits as the recipe says, and the rung
    of LADDER for each feature with which the gradient cosines add up to the most; where nothing fits, with the next
    smaller of LOGITS that the losses allow. Further teachers take `beside` bytes of it."""
    wanted, own, smallest = recipe.cache.features, planned.train.codec, 0
    choices = combinations(measure_ladder(planned.train, wanted, teacher, device_of(teacher)))
    for codec in (own, *smaller_logits(recipe, planned.train, teacher, trained)):
        for choice in choices:
            taken = beside + sum(planned.bytes(codec, features_of(choice)).values())
            if taken <= budget:
                kept = {"logits": codec.name, "batch_size": recipe.cache.batch_size, "threads": recipe.cache.threads}
                return {"proposal": choice, "proposal_bytes": taken, "cache": kept}
            smallest = min(smallest or taken, taken)
    fewer = "name fewer features, " if wanted else ""
    raise RecipeError(
        f"the smallest signals that are tried take {smallest:,} bytes, the budget is {budget:,}; {fewer}draw fewer "
        f"views, or give {smallest - budget:,} bytes more"
    )


def sentences(found: dict[str, Any]) -> list[str]:
    """The plan in words; the proposal as lines for a recipe."""
    lines = [
        f"{split}: {found['rows'][split]:,} views, {forecast.volume(taken)}"
        for split, taken in found["split_bytes"].items()
    ]
    parts, each = {"logits and frame": found["logits_row_bytes"], **found["feature_row_bytes"]}, found["example_bytes"]
    lines.append("bytes of a training view: " + ", ".join(f"{name} {taken:,}" for name, taken in parts.items()))
    lines.append(f"bytes of a training example: {each['signals']:,.0f} of signals, {each['packed']:,.0f} packed")
    lines.append(
        f"signals in all {forecast.volume(found['total_bytes'])}; still to be written, packed examples too, "
        f"{forecast.volume(found['still_bytes'])}, free on the disk {forecast.volume(found['free_bytes'])}"
        + (", which is too little" if found["still_bytes"] > found["free_bytes"] else "")
    )
    files = found["training_files"]
    lines.append(
        f"training split: {files['shards']:,} shard{'s' if files['shards'] > 1 else ''} of examples, "
        f"{files['files']:,} files in all; indexes {forecast.volume(sum(files['index_bytes'].values()))}, manifests "
        f"{forecast.volume(sum(files['manifest_bytes'].values()))}"
    )
    lines += forecast.sentences(found["time"]) if "time" in found else []
    lines += [f"estimated: {one}" for one in found["estimated"]]
    if "proposal" in found:
        lines.append(f"within the budget, {forecast.volume(found['proposal_bytes'])} in all:")
        lines += ["cache:", *(f"  {option}: {value}" for option, value in found["cache"].items())]
        lines += ["  features:"] if found["proposal"] else []
        for name, one in found["proposal"].items():
            words = ", ".join(
                f"{option}: {json.dumps(value)}" for option, value in one["recipe"].items() if value is not None
            )
            report = one["report"]
            ratio = report["fp16_bytes"] / report["bytes"]
            lines.append(
                f"    {name}: {{{words}}}  # {report['bytes']:,} bytes, 1/{ratio:.1f} of fp16, gradient cosine "
                f"{report['gradient_cosine']:.4f}"
            )
    return lines
