"""Fit the bases of reduced features on a sample of views, and measure what each codec keeps of a feature."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd_dist.compress import Basis, FeatureCodec, Moments, feature_error, feature_report, pooled
from kd_dist.errors import DataError, RecipeError
from kd_dist.extract import Extraction, Rows, made_rows
from kd_dist.loader import on_device
from kd_dist.plan import mix, permute
from kd_dist.probe import gradient_cosine
from kd_dist.recipe import Feature
from kd_dist.signals import add_sums
from kd_dist.teacher import Teacher

BASIS_ROWS = 512  # views that the principal components are fitted on
PROBE_ROWS = 16  # further views that the codecs are measured on


def planned_codecs(wanted: Mapping[str, Feature], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, FeatureCodec]:
    """How features of these shapes (C, *grid) are to be stored, in the order of a row; none has its basis yet.

    Raises a RecipeError for a feature that cannot be pooled or reduced so much.
    """
    found = {}
    for name, one in sorted(wanted.items()):
        if one.pca is not None and one.pca > shapes[name][0]:
            raise RecipeError(
                f"cache.features.{name}.pca: {one.pca} components cannot be had from the {shapes[name][0]} channels of "
                f"'{one.tap}'; use fewer"
            )
        found[name] = FeatureCodec(name, shapes[name], one.store, one.pool, None, one.dither)
    return found


def calibrate(
    work: Extraction,
    wanted: Mapping[str, Feature],
    teacher: Teacher,
    device: torch.device,
    given: dict[str, Basis] | None = None,
) -> tuple[dict[str, Basis], dict[str, dict[str, Any]]]:
    """The bases of the features that are reduced, on the CPU, and by feature what its codec keeps. Features whose bases
    are `given`, fitted on other examples or views, are reduced with those.

    A report states the bytes of a row and those of the whole feature in fp16, and on views that the basis has not seen
    the relative error, the cosine and the gradient cosine of a probe student, against the feature as the teacher gave
    it; for a feature that was reduced here also the share of its variance that is kept.
    """
    fresh = {name: one for name, one in wanted.items() if name not in (given or {})}
    fitted, kept = fit(work, fresh, teacher, device)
    bases = {**(given or {}), **fitted}
    seen = BASIS_ROWS if given is None or fitted else 0
    codecs = {name: replace(codec, basis=bases.get(name)) for name, codec in work.features.items()}
    codecs = on_device(codecs, device)
    errors, cosines, count = dict.fromkeys(codecs), dict.fromkeys(codecs, 0.0), 0
    for rows, features in heard(work, *probed(work, seen), teacher, device):
        count += len(rows.keys)
        for name, codec in codecs.items():
            error, cosine = measure(codec, rows, features[name])
            errors[name] = add_sums(errors[name], error)
            cosines[name] += cosine * len(rows.keys)
    report = {
        name: {
            **size(codec),
            **feature_report(errors[name]),
            "gradient_cosine": cosines[name] / count,
            "rows": count,
            **({"kept_variance": kept[name]} if name in kept else {}),
        }
        for name, codec in codecs.items()
    }
    return bases, report


def fit(
    work: Extraction, wanted: Mapping[str, Feature], teacher: Teacher, device: torch.device
) -> tuple[dict[str, Basis], dict[str, float]]:
    """The bases of the features that a recipe reduces, and the share of the variance that each keeps.

    Raises RecipeError for more components than there are channels or positions.
    """
    reduced = {name: one for name, one in wanted.items() if one.pca is not None}
    moments = measure_moments(work, [(name, one.pool) for name, one in reduced.items()], teacher, device, BASIS_ROWS)
    bases, kept = {}, {}
    for name, one in reduced.items():
        try:
            basis, kept[name] = moments[name, one.pool].basis(one.pca)
        except RecipeError as error:
            raise RecipeError(f"cache.features.{name}.pca: {error}") from error
        bases[name] = Basis(*(value.cpu() for value in basis))
    return bases, kept


def measure_moments(
    work: Extraction, pools: Iterable[tuple[str, int]], teacher: Teacher, device: torch.device, count: int
) -> dict[tuple[str, int], Moments]:
    """By (feature, pool) what a basis of the pooled feature is made from, over the first `count` views of `heard`, or
    what `probed` leaves of them."""
    moments = {pair: Moments() for pair in pools}
    if moments:
        for _, features in heard(work, 0, probed(work, count)[0], teacher, device):
            for (name, pool), one in moments.items():
                one.add(pooled(features[name], pool))
    return moments


def probed(work: Extraction, fitted: int) -> tuple[int, int]:
    """From which view on, and on how many, codecs are measured when bases are fitted on the `fitted` views before:
    fewer where there are not as many, a quarter of all at the most."""
    views = len(work.examples) * work.rows
    count = min(PROBE_ROWS, max(1, views // 4))
    return min(fitted, max(1, views - count)), count


def heard(
    work: Extraction, start: int, count: int, teacher: Teacher, device: torch.device
) -> Iterator[tuple[Rows, dict[str, Tensor]]]:
    """`count` views from number `start` of a fixed random order of all views, and what the teacher's features are.

    Views with a value that is not finite are left out. With fewer views than asked for, the last `count` are taken.
    Raises DataError when none is left.
    """
    examples, views = len(work.examples), work.rows
    start = max(0, min(start, examples * views - count))
    numbers = np.arange(start, min(start + count, examples * views))
    found = 0
    parts = np.array_split(numbers, -(-len(numbers) // work.batch_size))
    chosen = ((permute(part % examples, examples, mix(0)), part // examples) for part in parts)
    with contextlib.closing(made_rows(work, chosen)) as made:
        for rows in made:
            features = teacher(torch.from_numpy(rows.pixels).to(device).permute(0, 3, 1, 2)).features
            fine = torch.stack([value.flatten(1).isfinite().all(dim=1) for value in features.values()]).all(dim=0)
            keep = np.flatnonzero(fine.cpu().numpy())
            found += len(keep)
            if len(keep):
                yield rows.only(keep), {name: value[fine] for name, value in features.items()}
    if not found:
        raise DataError(
            f"{work.folder}: the teacher's features are not finite on any of {len(numbers)} views; check its weights "
            f"and normalisation"
        )


def measure(codec: FeatureCodec, rows: Rows, exact: Tensor) -> tuple[dict[str, Any], float]:
    """What a codec does to features (B, C, *grid): sums for `feature_report`, and the probe's gradient cosine."""
    decoded = stored(codec, exact, rows.crcs)
    images = torch.from_numpy(rows.pixels).to(exact.device).permute(0, 3, 1, 2)
    return feature_error(exact, decoded), gradient_cosine(images, exact, decoded)


def stored(codec: FeatureCodec, exact: Tensor, seeds: np.ndarray) -> Tensor:
    """What comes back of features (B, C, *grid) that a codec has stored, with `seeds` (B,) as for `encode`."""
    fields, _, _ = codec.encode(exact, seeds)
    return codec.decode({name: torch.from_numpy(value).to(exact.device) for name, value in fields.items()})


def size(codec: FeatureCodec) -> dict[str, int]:
    """Bytes of a row as the codec stores it, and of the whole feature in fp16."""
    return {"bytes": codec.row_bytes, "fp16_bytes": 2 * int(np.prod(codec.shape))}
