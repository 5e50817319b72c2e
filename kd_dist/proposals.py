"""How less room is taken: codecs of features and of logits from the faithful to the small, as measured on a sample."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from kd_dist import assemble
from kd_dist.caches import served
from kd_dist.calibrate import heard, measure, measure_moments, probed, size
from kd_dist.compress import FeatureCodec
from kd_dist.errors import MismatchError, RecipeError
from kd_dist.extract import Extraction, made_rows
from kd_dist.losses.served import refuse_unserved
from kd_dist.models.taps import reads_shares
from kd_dist.plan import mix, permute
from kd_dist.recipe import Feature, Recipe
from kd_dist.signals import Codec, codec_of
from kd_dist.teacher import Teacher

SAMPLE_ROWS = 64  # views that a proposal's bases are fitted on, and that its logits are measured on
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
LOGITS = ("fp16", "uint16", "uint8", "top50", "top20", "top10", "top5")  # likewise, of logits


def smaller_logits(recipe: Recipe, work: Extraction, teacher: Teacher, trained: bool) -> Iterator[Codec]:
    """Codecs of logits that take less than the recipe's own, the largest first, and that all its stages' losses can
    learn from; of a trained teacher, as measured."""
    found, bare = [], replace(work, features={})
    for name in LOGITS:
        try:
            codec = codec_of(work.task.name, name, work.task.classes, work.codec.grid)
        except RecipeError:
            continue
        if replace(bare, codec=codec).dtype.itemsize < bare.dtype.itemsize and codec.classes > 2:
            found.append(codec)
    logits, targets = said_by(work, teacher) if found else (None, None)
    for codec in sorted(found, key=lambda one: -replace(bare, codec=one).dtype.itemsize):
        about = {"codec": {"logits": codec.name}, **served(work.task, codec.name)}
        if trained:
            report = codec.report(codec.error(logits, decoded(replace(bare, codec=codec), logits, targets)))
            about["codec_error"] = {"logits": report}
        try:
            for stage in recipe.stages.values():
                if assemble.reads_cache(stage):
                    refuse_unserved(stage.losses, about, "")
        except MismatchError:
            continue
        yield codec


def decoded(work: Extraction, logits: np.ndarray, targets: np.ndarray) -> Any:
    """What comes back of logits (B, C, ...) that are stored."""
    fields, good = work.codec.encode(logits, targets)
    rows = np.zeros(len(logits), work.dtype)
    for name, values in fields.items():
        rows[name] = values
    return work.codec.decode(rows)


def said_by(work: Extraction, teacher: Teacher) -> tuple[np.ndarray, np.ndarray]:
    """The teacher's finite logits, and the targets, of some views in a fixed random order."""
    examples = len(work.examples)
    numbers = np.arange(min(SAMPLE_ROWS, examples * work.rows))
    parts = np.array_split(numbers, -(-len(numbers) // work.batch_size))
    logits, targets = [], []
    for rows in made_rows(work, ((permute(part % examples, examples, mix(0)), part // examples) for part in parts)):
        images = torch.from_numpy(rows.pixels).to(device_of(teacher)).permute(0, 3, 1, 2)
        logits.append(teacher(images).logits.cpu().numpy())
        targets.append(rows.targets)
    said = np.concatenate(logits)
    fine = np.isfinite(said).reshape(len(said), -1).all(axis=1)
    return said[fine], np.concatenate(targets)[fine]


def device_of(teacher: Teacher) -> torch.device:
    return teacher.network.mean.device


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
        return {}
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
