"""Before the teacher is run over everything: how many bytes its signals take, and which codecs fit a disk budget."""

import json
import shutil
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from kd_dist import assemble, manifest, places
from kd_dist.cache_teacher import extraction
from kd_dist.calibrate import heard, measure, measure_moments, probed, size
from kd_dist.compress import FeatureCodec
from kd_dist.errors import RecipeError
from kd_dist.extract import Extraction
from kd_dist.models.taps import reads_shares
from kd_dist.pack import refuse_writing
from kd_dist.recipe import Feature, Recipe
from kd_dist.shards import BLOCK
from kd_dist.signals import npy_header_size
from kd_dist.teacher import Teacher

SAMPLE_ROWS = 64  # views that a proposal's bases are fitted on
INDEX_BYTES, NOTES_BYTES = 80, 500  # of an index, about: an example's entries and its key; the rest
# From the faithful to the small: (pool, share of the channels that PCA keeps, number format).
LADDER = (
    (1, None, "fp16"),
    (1, None, "int8"),
    (1, 4, "int8"),
    (2, None, "int8"),
    (1, 8, "int8"),
    (1, 16, "int8"),
    (2, 4, "int8"),
    (1, 32, "int8"),
    (2, 8, "int8"),
    (2, 16, "int8"),
    (4, 16, "int8"),
    (4, 32, "int8"),
)


def plan(recipe: Recipe, budget: int | None) -> dict[str, Any]:
    """What caching will take, and, given a budget in bytes, the codec of each feature that keeps most within it.

    Returns the views and the bytes of each split, of a row and of all, the bytes free on the disk; with a budget also
    `proposal`, by feature a recipe's own words with the measured report, and the bytes they come to. Raises RecipeError
    when no proposal fits.
    """
    refuse_writing(places.shards_folder(recipe))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = assemble.teacher(recipe, recipe.cache.features).to(device)
    works = {split: extraction(recipe, split, teacher) for split in places.splits(recipe)}
    train = works[places.TRAINING_SPLIT]
    stored = works[places.TRAINING_SPLIT] = stored_as(train, recipe.cache.features)
    splits = {
        split: training_bytes(train, recipe.cache.features) if work is stored else split_bytes(work)
        for split, work in works.items()
    }
    rows = {split: len(work.examples) * work.rows for split, work in works.items()}
    more = 0.0  # generated examples for each packed one: they may be yet to be made, and take as much
    if manifest.GENERATED in places.cached_splits(recipe):
        more = assemble.generated_count(recipe) / len(train.examples)
        rows[manifest.GENERATED] = assemble.generated_count(recipe) * train.rows
        splits[manifest.GENERATED] = round(more * splits[places.TRAINING_SPLIT])
    found = {
        "rows": rows,
        "row_bytes": {split: work.dtype.itemsize for split, work in works.items()},
        "logits_row_bytes": replace(stored, features={}).dtype.itemsize,
        "feature_row_bytes": {name: codec.row_bytes for name, codec in stored.features.items()},
        "split_bytes": splits,
        "total_bytes": sum(splits.values()),
        "free_bytes": shutil.disk_usage(train.examples.folder).free,
    }
    if budget is not None:
        others = sum(taken for split, taken in splits.items() if not places.is_trained_on(split))
        left = int((budget - others) / (1 + more))
        found["proposal"] = propose(train, recipe.cache.features, teacher, device, left)
        found["proposal_bytes"] = others + round((1 + more) * training_bytes(train, features_of(found["proposal"])))
        found["cache"] = {option: getattr(recipe.cache, option) for option in ("logits", "batch_size", "threads")}
    return found


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


def split_bytes(work: Extraction) -> int:
    """Bytes that a split takes on the disk: of an example a header and a member, in shards whose tars end on a record,
    each with its index. Exact but for the index, which holds keys and notes."""
    member = npy_header_size(work.dtype, work.rows) + work.rows * work.dtype.itemsize
    example = BLOCK + -(-member // BLOCK) * BLOCK
    tars = [one["examples"] * example + 2 * BLOCK for one in work.examples.manifest["shards"]]
    records = sum(-(-tar // tarfile.RECORDSIZE) for tar in tars)
    return records * tarfile.RECORDSIZE + len(work.examples) * INDEX_BYTES + len(tars) * NOTES_BYTES


def training_bytes(work: Extraction, wanted: Mapping[str, Feature]) -> int:
    """Bytes of the training split with features stored as a recipe describes them, principal components included."""
    channels = {name: codec.shape[0] for name, codec in work.features.items()}
    bases = sum(4 * channels[name] * (one.pca + 1) for name, one in wanted.items() if one.pca is not None)
    return split_bytes(stored_as(work, wanted)) + bases


def propose(
    work: Extraction, wanted: dict[str, Feature], teacher: Teacher, device: torch.device, budget: int
) -> dict[str, dict[str, Any]]:
    """The rung of LADDER for each feature with which the gradient cosines add up to the most while the split fits into
    `budget` bytes."""
    choices = combinations(measure_ladder(work, wanted, teacher, device))
    sizes = [training_bytes(work, features_of(choice)) for choice in choices]
    for choice, taken in zip(choices, sizes, strict=True):
        if taken <= budget:
            return choice
    raise RecipeError(
        f"the smallest signals that are tried take {min(sizes):,} bytes for the training views, the budget leaves "
        f"{max(budget, 0):,}; name fewer features, draw fewer views, or give {min(sizes) - budget:,} bytes more"
    )


def combinations(rungs: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, dict[str, Any]]]:
    """Every choice of a rung for each feature that no other beats in as few bytes, from the most faithful."""
    found: list[dict[str, Any]] = [{"choice": {}, "report": {"bytes": 0, "gradient_cosine": 0.0}}]
    for name, tried in rungs.items():
        found = worth(
            [
                {
                    "choice": {**one["choice"], name: rung},
                    "report": {part: one["report"][part] + rung["report"][part] for part in one["report"]},
                }
                for one in found
                for rung in tried
            ]
        )
    return [one["choice"] for one in found]


def measure_ladder(
    work: Extraction, wanted: dict[str, Feature], teacher: Teacher, device: torch.device
) -> dict[str, list[dict[str, Any]]]:
    """By feature the rungs of LADDER that its shape allows, measured, each smaller and less faithful than the one
    before."""
    if not wanted:
        raise RecipeError("cache.features names no feature; a budget chooses how features are stored")
    shapes = {name: work.features[name].shape for name in wanted}
    whole = {name for name, one in wanted.items() if reads_shares(one.tap)}  # a recipe may not pool these
    rungs = {
        name: [rung for rung in LADDER if fits(shape, *rung[:2]) and (rung[0] == 1 or name not in whole)]
        for name, shape in shapes.items()
    }
    pools = {(name, pool) for name, tried in rungs.items() for pool, part, _ in tried if part}
    moments = measure_moments(work, sorted(pools), teacher, device, SAMPLE_ROWS)
    heard_rows = list(heard(work, *probed(work, SAMPLE_ROWS), teacher, device))
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in wanted}
    for name, tried in rungs.items():
        for pool, part, store in tried:
            kept = part and shapes[name][0] // part
            if part and kept > moments[name, pool].count:
                continue  # the sample has too few positions to find so many components
            basis = moments[name, pool].basis(kept)[0] if part else None
            codec = FeatureCodec(name, shapes[name], store, pool, basis)
            cosines = [measure(codec, rows, features[name])[1] * len(rows.keys) for rows, features in heard_rows]
            mean = sum(cosines) / sum(len(rows.keys) for rows, _ in heard_rows)
            described = {"tap": wanted[name].tap, "pool": pool, "pca": kept, "store": store}
            found[name].append({"recipe": described, "report": {**size(codec), "gradient_cosine": mean}})
    return {name: worth(measured) for name, measured in found.items()}


def worth(rungs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rungs that no rung of as few bytes beats, from the largest: less room never gives more."""
    kept: list[dict[str, Any]] = []
    for rung in sorted(rungs, key=lambda one: (one["report"]["bytes"], -one["report"]["gradient_cosine"])):
        if not kept or rung["report"]["gradient_cosine"] > kept[-1]["report"]["gradient_cosine"]:
            kept.append(rung)
    return kept[::-1]


def fits(shape: tuple[int, ...], pool: int, part: int | None) -> bool:
    """Whether a feature of `shape` (C, *grid) can be pooled and reduced so much."""
    return (pool == 1 or (len(shape) == 3 and min(shape[1:]) >= 2 * pool)) and (part is None or shape[0] // part >= 8)


def sentences(found: dict[str, Any]) -> list[str]:
    """The plan in words; the proposal as lines for a recipe."""
    lines = [
        f"{split}: {found['rows'][split]:,} views, {taken / 1e6:,.2f} MB"
        for split, taken in found["split_bytes"].items()
    ]
    parts = {"logits and frame": found["logits_row_bytes"], **found["feature_row_bytes"]}
    lines.append("bytes of a training view: " + ", ".join(f"{name} {taken:,}" for name, taken in parts.items()))
    lines.append(f"in all {found['total_bytes'] / 1e6:,.2f} MB, free on the disk {found['free_bytes'] / 1e9:,.1f} GB")
    if "proposal" in found:
        lines.append(f"within the budget, {found['proposal_bytes'] / 1e6:,.2f} MB in all:")
        lines += ["cache:", *(f"  {option}: {value}" for option, value in found["cache"].items()), "  features:"]
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
