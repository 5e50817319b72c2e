"""compress.py: stated bounds, rounding that is right on average, bases that hold the variance, damage noticed."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from oracles import frame
from safetensors.torch import save

from kd_dist.compress import (
    STORES,
    Basis,
    FeatureCodec,
    Moments,
    feature_error,
    feature_report,
    load_bases,
    noise,
    pooled,
    save_bases,
)
from kd_dist.errors import RecipeError, ShardError
from kd_dist.signals import from_row_bytes, pack_rows, row_dtype
from kd_dist.views.images import VIEW_DTYPE

SHAPES = [(6,), (6, 5), (6, 5, 4)]  # vectors, tokens, maps
SEEDS = np.arange(100, dtype=np.uint32) + np.uint32(4_000_000_000)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some_basis(k: int = 3, channels: int = 6) -> Basis:
    moments = Moments()
    moments.add(gaussian(200, channels, seed=5) * torch.arange(1.0, channels + 1) + 2)
    return moments.basis(k)[0]


def tensors(fields: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(values) for name, values in fields.items()}


def there_and_back(codec: FeatureCodec, features: torch.Tensor) -> torch.Tensor:
    """Features through the bytes of rows."""
    fields, storable, overflow = codec.encode(features, SEEDS[: len(features)])
    assert storable.all() and overflow == 0
    dtype = row_dtype(VIEW_DTYPE, codec.fields())
    rows = pack_rows(dtype, np.zeros(len(features), VIEW_DTYPE), np.zeros(len(features), np.uint32), fields)
    read = from_row_bytes(rows.tobytes(), dtype, "here")
    return codec.decode({name: torch.from_numpy(read[name].copy()) for name in fields})


# ---------------------------------------------------------------------------------------------- number formats


def within_bounds(store: str, features: torch.Tensor, dither: bool = False) -> None:
    """Assert the bounds that FeatureCodec's docstring states."""
    codec = FeatureCodec("f", tuple(features.shape[1:]), store, dither=dither)
    decoded = there_and_back(codec, features)
    assert decoded.dtype == torch.float32 and decoded.shape == features.shape
    exact = features.double()
    error = (decoded.double() - exact).abs()
    if store == "int8":
        scale = torch.from_numpy(codec.encode(features, SEEDS[: len(features)])[0]["f_scale"]).double()
        scale = scale.view(*scale.shape, *[1] * (features.ndim - 2))
        assert (error <= scale * (1 if dither else 0.5) * (1 + 2**-20)).all()
        largest = exact.abs().flatten(2).amax(2) if features.ndim > 2 else exact.abs().amax(1, keepdim=True)
        largest = largest.view(scale.shape)
        assert (scale * 127 >= largest).all() and (scale * 127 <= largest * (1 + 2**-10) + 127 * 2**-24).all()
    else:
        part, least = {"fp32": (0, 0), "fp16": (2.0**-11, 2.0**-25), "bf16": (2.0**-8, 2.0**-134)}[store]
        assert (error <= part * exact.abs() + least).all()


@given(
    st.sampled_from([*((store, False) for store in STORES), ("int8", True)]),
    st.sampled_from(SHAPES),
    st.sampled_from([1e-7, 1e-3, 1.0, 6e4]),
    st.data(),
)
@settings(max_examples=200, deadline=None)
def test_numbers_stay_within_the_stated_bounds(kind, shape, largest, data):
    drawn = data.draw(arrays.arrays(np.float32, (2, *shape), elements=st.floats(-1, 1, width=32)))
    within_bounds(kind[0], torch.from_numpy(drawn * np.float32(largest)), kind[1])


@pytest.mark.parametrize("dither", [False, True])
@pytest.mark.parametrize("store", ["int8", "fp16", "fp32"])
def test_extreme_numbers_stay_within_the_stated_bounds(store, dither):
    features = torch.zeros(5, 2, 300)
    features[0] = torch.linspace(-65504, 65504, 300)
    features[1] = torch.linspace(0, 1e-30, 300)
    features[2, 0, 7] = 1e-45
    features[3] = torch.linspace(1, 1 + 2**-20, 300)
    within_bounds(store, features, dither and store == "int8")


def test_bf16_is_torchs_own_rounding_to_even():
    features = torch.tensor([[1.0, 1 + 2**-8, 1 + 3 * 2**-8, -3e38, 1e-40, 0.1]])
    codec = FeatureCodec("f", (6,), "bf16")
    fields, storable, _ = codec.encode(features, SEEDS)
    assert fields["f"].dtype == np.dtype("<u2") and storable.all()
    assert fields["f"][0, :3].tolist() == [0x3F80, 0x3F80, 0x3F82]
    assert torch.equal(there_and_back(codec, features), features.bfloat16().float())


def test_no_int8_clips_and_a_scale_is_never_too_small():
    """Scales that fp16 would round down, and the largest number, which is 127 steps in every channel."""
    features = torch.rand(50, 40, 3, generator=torch.Generator().manual_seed(1)) * 10
    codec = FeatureCodec("f", (40, 3), "int8")
    fields, _, _ = codec.encode(features, SEEDS)
    assert (np.abs(fields["f"].astype(int)).max(axis=2) >= 126).all()
    down = (features.amax(2) / 127).half().float() * 127 < features.amax(2)
    assert 500 < int(down.sum()) < 1500
    assert (torch.from_numpy(fields["f_scale"]).float() * 127 >= features.amax(2)).all()


@pytest.mark.parametrize("store", list(STORES))
@pytest.mark.parametrize("shape", SHAPES)
def test_zeros_stay_zeros(store, shape):
    features = gaussian(2, *shape)
    features[1] = 0
    decoded = there_and_back(FeatureCodec("f", shape, store), features)
    assert not decoded[1].any() and decoded[0].any()


@pytest.mark.parametrize("store", list(STORES))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("basis", [None, some_basis()])
def test_a_row_that_is_not_finite_is_reported_and_its_neighbours_are_kept(store, value, basis):
    features = gaussian(3, 6, 5, 4)
    features[1, 2, 3, 1] = value
    before = features.clone()
    codec = FeatureCodec("f", (6, 5, 4), store, pool=2, basis=basis)
    fields, storable, overflow = codec.encode(features, SEEDS)
    assert storable.dtype == np.bool_ and storable.tolist() == [True, False, True] and overflow == 0
    assert torch.equal(features.nan_to_num(9), before.nan_to_num(9))
    clean, _, _ = codec.encode(gaussian(3, 6, 5, 4), SEEDS)
    for field, values in fields.items():
        assert not values[1].any()
        assert np.array_equal(values[::2], clean[field][::2])


@pytest.mark.parametrize(
    ("store", "value", "fits"),
    [
        ("fp16", 65504.0, True),
        ("fp16", -65505.0, False),
        ("fp16", 1e6, False),
        ("int8", 8319008.0, True),
        ("int8", 8319009.0, False),
        ("bf16", 3.38e38, True),
        ("bf16", 3.4e38, False),
        ("fp32", 3.4e38, True),
    ],
)
def test_numbers_too_large_for_the_format_are_counted(store, value, fits):
    features = gaussian(3, 6, 5)
    features[1, :2, 0] = value
    fields, storable, overflow = FeatureCodec("f", (6, 5), store).encode(features, SEEDS)
    assert storable.tolist() == [True, fits, True] and overflow == (0 if fits else 2)
    assert all(np.isfinite(values).all() and values[1].any() == fits for values in fields.values())


# ---------------------------------------------------------------------------------------------- rounding at random


def test_dithered_numbers_are_right_on_average():
    features = torch.linspace(-1, 1, 41).repeat(4000, 1).view(4000, 1, 41)
    codec = FeatureCodec("f", (1, 41), "int8", dither=True)
    fields, storable, _ = codec.encode(features, np.arange(4000, dtype=np.uint32) * np.uint32(7919))
    decoded = codec.decode(tensors(fields))
    scale = float(fields["f_scale"][0, 0])
    step = (features[0, 0] / scale).double()
    spread = torch.sqrt((step - step.floor()) * (step.ceil() - step))  # of one rounding, in steps
    off = (decoded.double().mean(0)[0] / scale - step).abs()
    assert storable.all() and (off <= 4.5 * spread / 4000**0.5 + 1e-4).all()
    assert (spread > 0.3).sum() > 15  # most lie well between two steps
    plain = FeatureCodec("f", (1, 41), "int8")
    kept = plain.decode(tensors(plain.encode(features[:1], SEEDS)[0]))[0, 0]
    assert (kept.double() / scale - step).abs().max() > 0.3


def test_noise_is_uniform_and_neither_positions_nor_seeds_go_together():
    device = torch.device("cpu")
    many = torch.stack([noise(seed, 5000, device) for seed in (0, 1, 2, 2**31, 2**32 - 1)]).double()
    assert many.min() > 0 and many.max() < 1 and many.dtype == torch.float64
    assert (many.mean(1) - 0.5).abs().max() < 4.5 * 12**-0.5 / 5000**0.5
    cells = torch.stack([(row * 16).long().bincount(minlength=16) for row in many])
    assert ((cells - 312.5).square() / 312.5).sum(1).max() < 45  # chi square of 15 degrees: 1 in 10,000
    table = torch.cat([many, many[:1].roll(1, 1), many[:1].roll(64, 1)])
    between = torch.corrcoef(table) - torch.eye(len(table))
    assert between.abs().max() < 4.5 / 5000**0.5


def test_noise_is_golden():
    """The same numbers on every machine: rows must not depend on where they were written."""
    stirred, numbers = [], noise(123456789, 4, torch.device("cpu")) * 65536 - 0.5

    def fmix(bits: int) -> int:
        bits = (bits ^ bits >> 16) * 0x85EBCA6B % 2**32
        bits = (bits ^ bits >> 13) * 0xC2B2AE35 % 2**32
        return bits ^ bits >> 16

    for position in range(4):
        stirred.append(fmix((position * 0x9E3779B1 + fmix(123456789)) % 2**32) >> 16)
    assert numbers.tolist() == stirred
    assert 127 + noise(1, 200_000, torch.device("cpu")).max() < 128


@pytest.mark.parametrize("seeds", [SEEDS[:6], torch.from_numpy(SEEDS[:6].astype(np.int64))])
def test_a_dithered_row_depends_on_itself_and_its_seed_alone(seeds):
    features = gaussian(6, 6, 5, 4)
    codec = FeatureCodec("f", (6, 5, 4), "int8", dither=True)
    whole, _, _ = codec.encode(features, seeds)
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        assert np.array_equal(codec.encode(features[part], seeds[part])[0]["f"], whole["f"][part])
    other, _, _ = codec.encode(features, seeds + 1)
    assert not np.array_equal(other["f"], whole["f"]) and np.array_equal(other["f_scale"], whole["f_scale"])


# ---------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    ("codec", "fields", "size"),
    [
        (FeatureCodec("f", (6,), "int8"), [("f_scale", "<f2", (1,)), ("f", "i1", (6,))], 8),
        (FeatureCodec("f", (6, 5), "int8"), [("f_scale", "<f2", (6,)), ("f", "i1", (6, 5))], 42),
        (FeatureCodec("f", (6, 5, 4), "fp16", 2), [("f", "<f2", (6, 3, 2))], 72),
        (
            FeatureCodec("f", (6, 5, 4), "int8", 3, some_basis(3)),
            [("f_scale", "<f2", (3,)), ("f", "i1", (3, 2, 2))],
            18,
        ),
        (FeatureCodec("f", (6, 5), "bf16", basis=some_basis(2)), [("f", "<u2", (2, 5))], 20),
        (FeatureCodec("f", (6, 5), "fp32"), [("f", "<f4", (6, 5))], 120),
    ],
)
def test_the_fields_of_a_codec(codec, fields, size):
    assert codec.fields() == fields and codec.row_bytes == size
    assert codec.stored_shape == fields[-1][2]
    features = gaussian(3, *codec.shape)
    found, storable, _ = codec.encode(features, SEEDS)
    assert {name: (values.dtype, values.shape) for name, values in found.items()} == {
        name: (np.dtype(kind), (3, *shape)) for name, kind, shape in fields
    }
    decoded = there_and_back(codec, features)
    assert decoded.shape == (3, codec.shape[0], *codec.stored_shape[1:]) and storable.shape == (3,)


@pytest.mark.parametrize("store", list(STORES))
@pytest.mark.parametrize("shape", SHAPES)
def test_no_rows_encode_and_decode_to_no_rows(store, shape):
    codec = FeatureCodec("f", shape, store, basis=some_basis(2), dither=store == "int8")
    fields, storable, overflow = codec.encode(torch.zeros(0, *shape), SEEDS[:0])
    assert storable.shape == (0,) and overflow == 0
    assert codec.decode(tensors(fields)).shape == (0, *shape)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"store": "int4"}, r"unknown number format of a feature 'int4'; did you mean 'int8'\?"),
        ({"shape": (6, 5), "pool": 2}, r"feature 'f' of shape \(6, 5\): pool 2 is not possible; only maps"),
        ({"pool": 0}, "pool 0 is not possible"),
        ({"dither": True}, "dither is for int8, not for fp16"),
        (
            {"shape": (2, 6, 5, 4)},
            r"of shape \(2, 6, 5, 4\): must be \(C,\), \(C, N\) or \(C, h, w\); tap another module",
        ),
        ({"shape": ()}, r"of shape \(\): must be"),
        ({"shape": (7, 5, 4), "basis": some_basis()}, "its basis is of 6 channels; cache it again"),
    ],
)
def test_an_impossible_codec_is_refused(options, named):
    with pytest.raises(RecipeError, match=named):
        FeatureCodec(**{"name": "f", "shape": (6, 5, 4), "store": "fp16", **options})


# ---------------------------------------------------------------------------------------------- pool and components


def test_a_pooled_map_holds_the_means_of_its_cells():
    features = gaussian(2, 3, 6, 4)
    found = there_and_back(FeatureCodec("f", (3, 6, 4), "fp32", pool=2), features)
    torch.testing.assert_close(found, features.view(2, 3, 3, 2, 2, 2).mean((3, 5)))
    odd = pooled(gaussian(1, 1, 5, 3), 2)
    torch.testing.assert_close(odd[0, 0, 1, 1], gaussian(1, 1, 5, 3)[0, 0, 1:4, 1:3].mean())


def test_a_basis_is_that_of_an_exact_decomposition():
    features = gaussian(30, 8, 4, 3) * torch.arange(1.0, 9).view(8, 1, 1) + 100
    moments = Moments()
    for part in features.split(7):
        moments.add(part)
    basis, kept = moments.basis(3)
    vectors = features.movedim(1, -1).reshape(-1, 8).double()
    _, sizes, exact = torch.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    assert moments.count == 360
    torch.testing.assert_close(basis.mean.double(), vectors.mean(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        (basis.components.double() @ exact[:3].T).abs(), torch.eye(3).double(), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(basis.components @ basis.components.T, torch.eye(3), atol=1e-6, rtol=0)
    assert (basis.components.gather(1, basis.components.abs().argmax(1, keepdim=True)) > 0).all()
    assert kept == pytest.approx(float(sizes[:3].square().sum() / sizes.square().sum()))
    assert basis.mean.dtype == basis.components.dtype == torch.float32


def test_features_that_lie_in_few_directions_survive_their_projection():
    features = torch.einsum("bkp,kc->bcp", gaussian(40, 2, 5), gaussian(2, 6, seed=1)) + gaussian(6, seed=2).view(6, 1)
    moments = Moments()
    moments.add(features)
    basis, kept = moments.basis(2)
    codec = FeatureCodec("f", (6, 5), "fp32", basis=basis)
    assert kept == pytest.approx(1) and codec.stored_shape == (2, 5)
    torch.testing.assert_close(there_and_back(codec, features), features, atol=1e-4, rtol=0)
    whole = FeatureCodec("f", (6, 5), "fp32", basis=some_basis(6))
    torch.testing.assert_close(there_and_back(whole, features), features, atol=1e-4, rtol=0)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(("shape", "pool"), [((6,), 1), ((6, 5), 1), ((6, 5, 4), 2)])
@pytest.mark.parametrize(("k", "width"), [(1, 2), (3, 4), (5, 6), (6, 6)])
def test_coordinates_are_the_decoded_feature_in_an_orthonormal_frame(store, shape, pool, k, width):
    """From the same rows, whatever lies in them: every row and position, and so every inner product."""
    codec = FeatureCodec("f", shape, store, pool, some_basis(k))
    compact, axes = codec.in_coordinates(), frame(codec.basis)
    features = gaussian(4, *shape) * 3 + 1
    fields = tensors(codec.encode(features, SEEDS[:4])[0])
    dense, coordinates = codec.decode(fields), compact.decode(fields)
    assert coordinates.shape == (4, *compact.decoded_shape) == (4, width, *codec.decoded_shape[1:])
    assert dense.shape == (4, *codec.decoded_shape) and compact.fields() == codec.fields()
    torch.testing.assert_close(axes.T @ axes, torch.eye(width), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.einsum("cw,bw...->bc...", axes, coordinates), dense, atol=2e-5, rtol=0)
    products = (one.flatten(2) if one.ndim > 2 else one[..., None] for one in (dense, coordinates))
    there, here = (torch.einsum("bcp,dcq->bpdq", one, one) for one in products)
    torch.testing.assert_close(here, there, atol=1e-4, rtol=1e-5)


def test_without_components_there_are_no_other_coordinates():
    codec = FeatureCodec("f", (6, 5), "fp16")
    assert codec.in_coordinates() is codec


def test_moments_leave_out_rows_that_are_not_finite():
    one, other, features = Moments(), Moments(), gaussian(5, 6, 4)
    other.add(features[[0, 2, 4]])
    features[1, 0, 0], features[3] = np.nan, np.inf
    one.add(features)
    assert one.count == other.count == 12
    torch.testing.assert_close(one.basis(2)[0].components, other.basis(2)[0].components)


def test_features_without_variance_have_a_basis_that_keeps_it_all():
    moments = Moments()
    moments.add(torch.ones(4, 3, 5))
    assert moments.basis(1)[1] == 1.0


@pytest.mark.parametrize(
    ("rows", "k", "named"),
    [
        (0, 2, "2 principal components cannot be found in 0 positions of 0 channels"),
        (9, 7, "7 principal components cannot be found in 9 positions of 6 channels; use 1 to 6, or more examples"),
        (4, 5, "5 principal components cannot be found in 4 positions of 6 channels; use 1 to 4"),
        (9, 0, "0 principal components cannot be found"),
    ],
)
def test_too_many_components_are_refused(rows, k, named):
    moments = Moments()
    if rows:
        moments.add(gaussian(rows, 6))
    with pytest.raises(RecipeError, match=named):
        moments.basis(k)


def test_bases_survive_their_file(tmp_path):
    bases = {"layer3": some_basis(3), "layer4": some_basis(2)}
    payload = save_bases(bases)
    assert payload == save_bases({name: bases[name] for name in ("layer4", "layer3")})
    (tmp_path / "b").write_bytes(payload)
    read = load_bases(tmp_path / "b")
    assert list(read) == ["layer3", "layer4"]
    for name, basis in bases.items():
        assert torch.equal(read[name].mean, basis.mean) and torch.equal(read[name].components, basis.components)
    (tmp_path / "none").write_bytes(save_bases({}))
    assert load_bases(tmp_path / "none") == {}


def test_a_damaged_file_of_bases_is_refused(tmp_path):
    path, payload, good = tmp_path / "b", save_bases({"layer3": some_basis()}), some_basis()
    named = {f"layer3.{part}": one for part, one in good._asdict().items()}
    damaged = {
        "it cannot be read": [b"", payload[:-1], payload[:20], payload + b"x", b"\xff" * 100],
        r"it cannot be read \('layer3.components'\)": [save({"layer3.mean": good.mean})],
        "it holds 'layer3.other'": [save({**named, "layer3.other": torch.ones(2)})],
        "mean and components of 'layer3' do not fit": [
            save_bases({"layer3": Basis(good.mean[:5], good.components)}),
            save_bases({"layer3": Basis(good.mean.double(), good.components)}),
            save_bases({"layer3": Basis(good.mean, good.components[0])}),
        ],
    }
    tried = 0
    for reason, files in damaged.items():
        for one in files:
            path.write_bytes(one)
            with pytest.raises(
                ShardError, match=f"b: is no file of principal components, {reason}.*; delete its folder"
            ):
                load_bases(path)
            tried += 1
    assert tried == 10
    with pytest.raises(ShardError, match="it cannot be read .*No such file"):
        load_bases(tmp_path / "missing")


# ---------------------------------------------------------------------------------------------- measured errors


def test_feature_error_of_known_pairs():
    exact = torch.tensor([[[3.0, 0.0, 0.0], [4.0, 0.0, 2.0]], [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]])  # (2, 2 channels, 3)
    decoded = torch.tensor([[[4.0, 0.0, 0.0], [3.0, 0.0, 0.0]], [[1.0, -1.0, 0.0], [0.0, 0.0, 1.0]]])
    error = feature_error(exact, decoded)
    assert error == pytest.approx(
        {"count": 2, "squared_error": 2 + 4 + 4 + 2, "squared_norm": 25 + 4 + 3, "cosine": (0.96 + 1 + 0) / 3 + 0}
    )
    assert feature_report(error) == pytest.approx({"relative_error": (12 / 32) ** 0.5, "cosine": 1.96 / 6})


def test_a_pooled_map_is_compared_at_the_full_grid():
    exact = gaussian(4, 3, 8, 6)
    decoded = pooled(exact, 2)
    back = F.interpolate(decoded, (8, 6), mode="bilinear")
    error = feature_error(exact, decoded)
    assert error["squared_error"] == pytest.approx(float((exact - back).square().sum()), rel=1e-5)
    assert error["squared_norm"] == pytest.approx(float(exact.square().sum()), rel=1e-5)
    assert error["cosine"] == pytest.approx(float(F.cosine_similarity(exact, back).mean((1, 2)).sum()), rel=1e-5)
    vectors = gaussian(4, 9)
    assert feature_report(feature_error(vectors, -2 * vectors)) == pytest.approx({"relative_error": 3, "cosine": -1})


def test_feature_errors_add_up_over_batches():
    exact, decoded = gaussian(9, 3, 4), gaussian(9, 3, 4, seed=1)
    parts = [feature_error(exact[a:b], decoded[a:b]) for a, b in ((0, 1), (1, 7), (7, 9))]
    merged = {name: sum(json.loads(json.dumps(part))[name] for part in parts) for name in parts[0]}
    assert merged == pytest.approx(feature_error(exact, decoded), rel=1e-6)
    assert feature_report(dict.fromkeys(merged, 0)) == {"relative_error": 0.0, "cosine": 0.0}
