"""Before the teacher is run over everything: how many bytes its signals take, and which codecs fit a disk budget."""

import re
import shutil
from dataclasses import replace
from typing import Any

import torch

from kd_dist import assemble
from kd_dist.cache_teacher import extraction
from kd_dist.calibrate import PROBE_ROWS, heard, measure, measure_moments, size
from kd_dist.compress import FeatureCodec
from kd_dist.errors import RecipeError
from kd_dist.extract import Extraction
from kd_dist.recipe import Feature, Recipe
from kd_dist.shards import BLOCK
from kd_dist.signals import npy_header_size
from kd_dist.teacher import Teacher

SAMPLE_ROWS = 64  # views that a proposal's bases are fitted on
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
INDEX_BYTES = 100  # of an example, about: its entries and its key
# From the faithful to the small: (pool, share of the channels that PCA keeps, number format).
LADDER = (
    (1, None, "fp16"),
    (1, None, "int8"),
    (2, None, "int8"),
    (1, 4, "int8"),
    (2, 2, "int8"),
    (2, 4, "int8"),
    (2, 8, "int8"),
    (4, 4, "int8"),
    (4, 8, "int8"),
    (4, 16, "int8"),
)


def parse_bytes(text: str) -> int:
    """`20GB`, `1.5T`, `800 MB` -> bytes, in powers of 1000. Raises RecipeError for anything else."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)B?\s*", text, re.IGNORECASE)
    if not found or float(found[1]) == 0:
        raise RecipeError(f"'{text}' is no size; write a number and a unit, such as 20GB")
    return int(float(found[1]) * UNITS[found[2].upper()])


def plan(recipe: Recipe, budget: int | None) -> dict[str, Any]:
    """What caching will take, and, given a budget in bytes, the codec of each feature that keeps most within it.

    Returns the views and the bytes of each split, of a row and of all, the bytes free on the disk; with a budget also
    `proposal`, by feature a recipe's own words with the measured report, and the bytes they come to. Raises RecipeError
    when no proposal fits.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = assemble.teacher(recipe, recipe.cache.features).to(device)
    works = {split: extraction(recipe, split, teacher) for split in assemble.splits(recipe)}
    # A reduced feature has no basis yet, which decides its bytes.
    train = works[assemble.TRAINING_SPLIT]
    codecs = {name: size_of(train, name, one) for name, one in recipe.cache.features.items()}
    logits = row_bytes(train, 0)
    splits = {split: split_bytes(work, row_bytes(work, 0)) for split, work in works.items()}
    splits[assemble.TRAINING_SPLIT] = split_bytes(train, row_bytes(train, sum(codecs.values())))
    found = {
        "rows": {split: len(work.examples) * work.rows for split, work in works.items()},
        "logits_row_bytes": logits,
        "feature_row_bytes": codecs,
        "split_bytes": splits,
        "total_bytes": sum(splits.values()),
        "free_bytes": shutil.disk_usage(train.examples.folder).free,
    }
    if budget is not None:
        rest = budget - sum(taken for split, taken in splits.items() if split != assemble.TRAINING_SPLIT)
        found["proposal"] = propose(train, recipe.cache.features, teacher, device, rest)
        features = sum(one["report"]["bytes"] for one in found["proposal"].values())
        found["proposal_bytes"] = budget - rest + split_bytes(train, row_bytes(train, features))
    return found


def size_of(work: Extraction, name: str, wanted: Feature) -> int:
    """Bytes of a feature in a row, as a recipe describes it."""
    codec = work.features[name]
    if wanted.pca is not None:
        codec = replace(codec, shape=(wanted.pca, *codec.shape[1:]))
    return codec.row_bytes


def row_bytes(work: Extraction, features: int) -> int:
    """Bytes of a row whose features take `features`, beside its frame and its logits."""
    return replace(work, features={}).dtype.itemsize + features


def split_bytes(work: Extraction, row: int) -> int:
    """Bytes on disk of a split whose rows take `row` bytes: a member, its header and its index entry an example."""
    member = npy_header_size(replace(work, features={}).dtype, work.rows) + work.rows * row
    return len(work.examples) * (BLOCK + -(-member // BLOCK) * BLOCK + INDEX_BYTES)


def propose(
    work: Extraction, wanted: dict[str, Feature], teacher: Teacher, device: torch.device, budget: int
) -> dict[str, dict[str, Any]]:
    """The rung of LADDER for each feature: all begin with the first, then the one step down that costs the least
    gradient cosine for the bytes it saves is taken until the split fits into `budget` bytes."""
    rungs = measure_ladder(work, wanted, teacher, device)
    chosen = dict.fromkeys(rungs, 0)

    def row() -> int:
        return row_bytes(work, sum(rungs[name][rung]["report"]["bytes"] for name, rung in chosen.items()))

    def cost(name: str) -> float:
        here, below = (rungs[name][chosen[name] + step]["report"] for step in (0, 1))
        return (here["gradient_cosine"] - below["gradient_cosine"]) / (here["bytes"] - below["bytes"])

    while split_bytes(work, row()) > budget:
        lower = [name for name, rung in chosen.items() if rung + 1 < len(rungs[name])]
        if not lower:
            raise RecipeError(
                f"the smallest signals that are tried take {split_bytes(work, row()):,} bytes for the training views, "
                f"the budget leaves {budget:,}; name fewer features, draw fewer views, or give more room"
            )
        chosen[min(lower, key=cost)] += 1
    return {name: rungs[name][rung] for name, rung in chosen.items()}


def measure_ladder(
    work: Extraction, wanted: dict[str, Feature], teacher: Teacher, device: torch.device
) -> dict[str, list[dict[str, Any]]]:
    """By feature the rungs of LADDER that its shape allows, measured, each smaller than the one before."""
    if not wanted:
        raise RecipeError("cache.features names no feature; a budget chooses how features are stored")
    shapes = {name: work.features[name].shape for name in wanted}
    rungs = {name: [rung for rung in LADDER if fits(shape, *rung[:2])] for name, shape in shapes.items()}
    pools = {(name, pool) for name, tried in rungs.items() for pool, part, _ in tried if part}
    moments = measure_moments(work, sorted(pools), teacher, device, SAMPLE_ROWS)
    heard_rows = list(heard(work, SAMPLE_ROWS, PROBE_ROWS, teacher, device))
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in wanted}
    for name, tried in rungs.items():
        for pool, part, store in tried:
            kept = part and shapes[name][0] // part
            basis = moments[name, pool].basis(kept)[0] if part else None
            codec = FeatureCodec(name, shapes[name], store, pool, basis)
            cosines = [measure(codec, rows, features[name])[1] * len(rows.keys) for rows, features in heard_rows]
            mean = sum(cosines) / sum(len(rows.keys) for rows, _ in heard_rows)
            report = {**size(codec), "gradient_cosine": mean}
            if not found[name] or report["bytes"] < found[name][-1]["report"]["bytes"]:
                described = {"tap": wanted[name].tap, "pool": pool, "pca": kept, "store": store}
                found[name].append({"recipe": described, "report": report})
    return found


def fits(shape: tuple[int, ...], pool: int, part: int | None) -> bool:
    """Whether a feature of `shape` (C, *grid) can be pooled and reduced so much."""
    return (pool == 1 or (len(shape) == 3 and min(shape[1:]) >= 2 * pool)) and (part is None or shape[0] // part >= 8)


def sentences(found: dict[str, Any]) -> list[str]:
    """The plan in words; the proposal as lines for a recipe."""
    lines = [
        f"{split}: {found['rows'][split]:,} views, {taken / 1e6:,.1f} MB"
        for split, taken in found["split_bytes"].items()
    ]
    parts = {"logits and frame": found["logits_row_bytes"], **found["feature_row_bytes"]}
    lines.append("bytes of a training view: " + ", ".join(f"{name} {taken:,}" for name, taken in parts.items()))
    lines.append(f"in all {found['total_bytes'] / 1e9:,.3f} GB, free on the disk {found['free_bytes'] / 1e9:,.1f} GB")
    if "proposal" in found:
        lines.append(f"within the budget, {found['proposal_bytes'] / 1e9:,.3f} GB in all:")
        lines += ["cache:", "  features:"]
        for name, one in found["proposal"].items():
            words = ", ".join(f"{option}: {value}" for option, value in one["recipe"].items() if value is not None)
            report = one["report"]
            ratio = report["fp16_bytes"] / report["bytes"]
            lines.append(
                f"    {name}: {{{words}}}  # {report['bytes']:,} bytes, 1/{ratio:.1f} of fp16, gradient cosine "
                f"{report['gradient_cosine']:.4f}"
            )
    return lines
