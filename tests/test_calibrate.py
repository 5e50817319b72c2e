"""What a cache says about its codecs: measured on views the basis has not seen, the same each time, and right."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scenes import MODEL, SPLITS

from kd_dist import assemble, calibrate
from kd_dist.cache_teacher import extraction
from kd_dist.compress import save_bases
from kd_dist.config import load
from kd_dist.errors import DataError, RecipeError
from kd_dist.extract import Extraction
from kd_dist.recipe import Recipe
from kd_dist.teacher import Teacher

ALL = 2 * SPLITS["train"]  # views
CPU = torch.device("cpu")

BLIND = '''

import torch


class Blind(nn.Module):
    """Its feature is NaN for pictures darker than `limit`."""

    def __init__(self, classes, limit):
        super().__init__()
        self.low, self.high = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, classes, 1)
        self.limit = limit

    def forward(self, images):
        dark = images.mean(dim=(1, 2, 3)) < self.limit
        low = self.low(images * torch.where(dark, torch.nan, 1.0)[:, None, None, None])
        return self.high(low.nan_to_num())


def blind(classes, limit):
    return Blind(classes, limit)
'''


class Parts(NamedTuple):
    recipe: Recipe
    work: Extraction
    teacher: Teacher


def parts(*words: str) -> Parts:
    recipe = load("scenes.yaml", list(words))
    teacher = assemble.teacher(recipe, recipe.cache.features)
    return Parts(recipe, extraction(recipe, "train", teacher), teacher)


def names(start: int, count: int, own: Parts) -> list[tuple[str, bytes]]:
    """Key and pixels of each view that is heard."""
    heard = calibrate.heard(own.work, start, count, own.teacher, CPU)
    return [(key, pixels.tobytes()) for rows, _ in heard for key, pixels in zip(rows.keys, rows.pixels, strict=True)]


def exact(own: Parts, start: int, count: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Pixels and features of all the views that are heard."""
    heard = list(calibrate.heard(own.work, start, count, own.teacher, CPU))
    features = {name: np.concatenate([said[name].numpy() for _, said in heard]) for name in own.work.features}
    return np.concatenate([rows.pixels for rows, _ in heard]), features


# ---------------------------------------------------------------------------------------------- which views


def test_every_view_is_heard_once_in_a_fixed_order(scenery):
    own = parts()
    order = names(0, ALL, own)
    assert order == names(0, ALL, parts("cache.batch_size=3")) == names(0, 10**6, own)
    assert len(set(order)) == ALL
    keys = [key for key, _ in order]
    assert set(keys[:10]) == set(keys[10:]) and len(set(keys[:10])) == 10  # of each example one view before another
    assert keys != sorted(keys)


def test_what_is_measured_on_has_not_been_fitted_on_when_there_are_enough(scenery):
    own, order = parts(), names(0, ALL, parts())
    assert names(12, 8, own) == order[12:] and names(0, 12, own) == order[:12]
    assert names(5, 4, own) == order[5:9]
    # Too few: the last ones, some of which were fitted on.
    assert names(18, 8, own) == names(512, 8, own) == order[12:]
    assert names(512, 10**6, own) == order


def test_views_whose_features_are_not_finite_are_left_out(scenery):
    Path("scene_model.py").write_text(MODEL + BLIND)
    words = ["teacher.model=scene_model:blind", "cache.features.high.pca=null", "cache.batch_size=6"]
    whole = parts(*words, "teacher.options={limit: 0.0}")
    pixels, _ = exact(whole, 0, ALL)
    brightness = torch.from_numpy(pixels).float().div(255).mean(dim=(1, 2, 3)).numpy()
    limit = float(np.sort(brightness)[6:8].mean())
    partly = parts(*words, f"teacher.options={{limit: {limit}}}")
    order, kept = names(0, ALL, whole), names(0, ALL, partly)
    assert kept == [one for one, light in zip(order, brightness, strict=True) if light > limit] and len(kept) == ALL - 7
    _, features = exact(partly, 0, ALL)
    assert len(features["low"]) == len(features["high"]) == ALL - 7 and np.isfinite(features["low"]).all()
    _, report = calibrate.calibrate(partly.work, partly.recipe.cache.features, partly.teacher, CPU)
    assert report["low"]["rows"] < calibrate.PROBE_ROWS and np.isfinite(report["low"]["relative_error"])
    none = parts(*words, "teacher.options={limit: 2.0}")
    with pytest.raises(DataError, match="teacher's features are not finite on any of 20 views; check its weights and"):
        names(0, ALL, none)


# ---------------------------------------------------------------------------------------------- what is reported


def test_the_report_is_what_numpy_computes(scenery, monkeypatch):
    """Fitted on 12 views, measured on a quarter of the 20 that there are."""
    monkeypatch.setattr(calibrate, "BASIS_ROWS", 12)
    monkeypatch.setattr(calibrate, "PROBE_ROWS", 8)
    own = parts()
    bases, reports = calibrate.calibrate(own.work, own.recipe.cache.features, own.teacher, CPU)
    assert reports.keys() == {"low", "high"} and bases.keys() == {"high"}
    report = reports["high"]
    fitted = exact(own, 0, 12)[1]["high"].astype(np.float64)
    vectors = fitted.transpose(0, 2, 3, 1).reshape(-1, 16)
    mean = vectors.mean(axis=0)
    _, sizes, components = np.linalg.svd(vectors - mean, full_matrices=False)
    assert report["kept_variance"] == pytest.approx((sizes[:6] ** 2).sum() / (sizes**2).sum(), rel=1e-6)
    assert 0.5 < report["kept_variance"] < 1
    fresh = exact(own, 12, 5)[1]["high"].astype(np.float64).transpose(0, 2, 3, 1)
    decoded = ((fresh - mean) @ components[:6].T).astype(np.float16) @ components[:6] + mean
    error = np.sqrt(((fresh - decoded) ** 2).sum() / (fresh**2).sum())
    norms = np.linalg.norm(fresh, axis=-1) * np.linalg.norm(decoded, axis=-1)
    assert report["relative_error"] == pytest.approx(error, rel=1e-3)
    assert report["cosine"] == pytest.approx(((fresh * decoded).sum(axis=-1) / norms).mean(), abs=1e-5)
    assert 0.9 < report["gradient_cosine"] < 1 and report["rows"] == 5
    assert (report["bytes"], report["fp16_bytes"]) == (2 * 6 * 24, 2 * 16 * 24)
    # Of what is pooled, the error against the whole map. Nothing was reduced, so nothing is said of a variance.
    assert "kept_variance" not in reports["low"] and reports["low"]["rows"] == 5
    assert (reports["low"]["bytes"], reports["low"]["fp16_bytes"]) == (8 * 24 + 2 * 8, 2 * 8 * 96)
    low = torch.from_numpy(exact(own, 12, 5)[1]["low"])
    cells = low.reshape(5, 8, 4, 2, 6, 2).mean(dim=(3, 5))
    wide = torch.nn.functional.interpolate(cells, (8, 12), mode="bilinear", align_corners=False)
    assert reports["low"]["relative_error"] == pytest.approx(float((wide - low).norm() / low.norm()), rel=0.02)


def test_a_worse_codec_is_reported_as_worse(scenery):
    said = []
    for codec in ("{tap: low, store: fp32}", "{tap: low}", "{tap: low, pool: 2}", "{tap: low, pool: 4}"):
        own = parts(f"cache.features.low={codec}")
        said.append(calibrate.calibrate(own.work, own.recipe.cache.features, own.teacher, CPU)[1]["low"])
    errors, cosines, gradients, sizes = (
        [one[name] for one in said] for name in ("relative_error", "cosine", "gradient_cosine", "bytes")
    )
    assert errors == sorted(errors) and errors[0] == 0 and errors[1] < 0.02 and errors[2] > 0.1
    assert cosines == sorted(cosines, reverse=True) and cosines[0] == pytest.approx(1)
    assert gradients == sorted(gradients, reverse=True) and gradients[0] == pytest.approx(1)
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4


def test_it_finds_the_same_each_time(scenery):
    made = []
    for _ in range(2):
        own = parts()
        torch.manual_seed(len(made))
        bases, report = calibrate.calibrate(own.work, own.recipe.cache.features, own.teacher, CPU)
        made.append((save_bases(bases), report))
    assert made[0] == made[1]


def test_what_comes_back_is_what_the_codec_decodes(scenery):
    own = parts()
    codec = replace(own.work.features["low"], pool=1, dither=False)
    _, features = exact(own, 0, 4)
    back = calibrate.stored(codec, torch.from_numpy(features["low"]), np.zeros(4, np.uint32)).numpy()
    scale = np.abs(features["low"]).max(axis=(2, 3), keepdims=True) / 127
    assert (np.abs(back - features["low"]) <= scale * (0.5 + 1e-3)).all() and (back != features["low"]).any()


def test_more_components_than_channels_are_one_sentence(scenery):
    words = "^cache.features.high.pca: 17 components cannot be had from the 16 channels of 'high'; use fewer"
    with pytest.raises(RecipeError, match=words):
        parts("cache.features.high.pca=17")


def test_codecs_are_measured_on_views_that_no_basis_was_fitted_on(scenery):
    work = parts().work
    assert len(work.examples) * work.rows == 20
    for fitted in (1, 12, 15, 16, 512):
        start, count = calibrate.probed(work, fitted)
        assert (start, count) == (min(fitted, 15), 5)
