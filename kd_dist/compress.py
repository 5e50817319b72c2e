"""Feature maps as fields of a row and back: pooled, reduced to principal components, quantised; and what that loses.

Features are channels first, (B, C, *grid): maps (B, C, h, w), tokens (B, C, N) or vectors (B, C). Everything is done
on the device where the features are.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load as deserialized
from safetensors.torch import save as serialized
from torch import Tensor

from kd_dist.choose import entry
from kd_dist.errors import RecipeError, ShardError

STORES = {"int8": "i1", "fp16": "<f2", "bf16": "<u2", "fp32": "<f4"}  # number format -> what NumPy stores
STEPS = 127  # int8 steps on either side of zero
LARGEST = {
    "int8": STEPS * torch.finfo(torch.float16).max,  # its scale is a float16
    "fp16": torch.finfo(torch.float16).max,
    "bf16": torch.finfo(torch.bfloat16).max,
    "fp32": torch.finfo(torch.float32).max,
}


class Basis(NamedTuple):
    """Principal components of a feature's channels."""

    mean: Tensor  # (C,) float32
    components: Tensor  # (K, C) float32, orthonormal rows, the strongest first


@dataclass(frozen=True, eq=False)  # tensors have no one answer to ==
class FeatureCodec:
    """How one feature of a row is stored, in this order: area means over cells of the grid, projection on a basis,
    number format.

    Bounds on the error of a number x that is stored, each tested: fp32 exact; fp16 2**-11 |x| + 2**-25; bf16
    2**-8 |x|; int8 half a scale, with `dither` a whole one, but right on average. An int8 scale is
    max |x| / 127 over the grid, rounded up to fp16, for each channel of each row; a vector has one scale for all.

    Raises RecipeError for an unknown format, a pool without a grid of two sides, dither without int8, or a basis of
    other channels.
    """

    name: str
    shape: tuple[int, ...]  # (C, *grid) as the network gives it
    store: str  # one of STORES
    pool: int = 1  # both sides of the grid are divided by it, rounded up
    basis: Basis | None = None
    dither: bool = False

    def __post_init__(self) -> None:
        entry(STORES, "number format of a feature", self.store)
        where = f"feature '{self.name}' of shape {self.shape}"
        if not 1 <= len(self.shape) <= 3 or min(self.shape) < 1:
            raise RecipeError(f"{where}: must be (C,), (C, N) or (C, h, w); tap another module or select an output")
        if self.pool < 1 or (self.pool > 1 and len(self.shape) != 3):
            raise RecipeError(f"{where}: pool {self.pool} is not possible; only maps (C, h, w) have cells to join")
        if self.dither and self.store != "int8":
            raise RecipeError(f"{where}: dither is for int8, not for {self.store}")
        if self.basis is not None and self.basis.components.shape[1] != self.shape[0]:
            raise RecipeError(f"{where}: its basis is of {self.basis.components.shape[1]} channels; cache it again")

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """(C or K, *pooled grid)."""
        channels = self.shape[0] if self.basis is None else len(self.basis.components)
        return (channels, *pooled_grid(self.shape[1:], self.pool))

    @property
    def decoded_shape(self) -> tuple[int, ...]:
        """(C, *pooled grid)."""
        return (self.shape[0], *self.stored_shape[1:])

    @property
    def row_bytes(self) -> int:
        """Bytes that the fields take in a row."""
        return np.dtype(self.fields()).itemsize

    def fields(self) -> list[tuple]:
        """The fields that this codec adds to a row, as NumPy describes them."""
        values = (self.name, STORES[self.store], self.stored_shape)
        if self.store != "int8":
            return [values]
        scales = self.stored_shape[0] if len(self.shape) > 1 else 1
        return [(f"{self.name}_scale", "<f2", (scales,)), values]

    def encode(self, features: Tensor, seeds: Tensor | np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray, int]:
        """Features (B, C, *grid) float -> the fields, each (B, ...); a mask (B,) bool of the rows that could be
        stored; and how many finite numbers were too large for the format.

        `seeds` (B,) uint32 decide how dithered rows are rounded: a row's bytes depend on it and its seed alone. A row
        that is not finite, or too large, is False in the mask and holds zeros: the caller quarantines its example.
        """
        reduced = pooled(features.float(), self.pool)
        if self.basis is not None:
            mean, components = (one.to(reduced.device) for one in self.basis)
            reduced = torch.einsum("kc,bc...->bk...", components, reduced - _per_channel(mean, reduced))
        large = reduced.abs() > LARGEST[self.store]
        storable = (reduced.isfinite() & ~large).flatten(1).all(dim=1)
        overflow = int((large & reduced.isfinite()).sum())
        kept = torch.where(storable.view(-1, *[1] * (reduced.ndim - 1)), reduced, 0.0)
        fields = {name: values.cpu().numpy() for name, values in self._numbers(kept, seeds).items()}
        return fields, storable.cpu().numpy(), overflow

    def decode(self, fields: Mapping[str, Tensor]) -> Tensor:
        """The fields (B, ...) of rows -> features (B, C, *pooled grid) float32, on the fields' device."""
        stored = fields[self.name]
        values = (stored.view(torch.bfloat16) if self.store == "bf16" else stored).float()
        if self.store == "int8":
            values = values * _per_channel(fields[f"{self.name}_scale"].float(), values)
        if self.basis is None:
            return values
        mean, components = (one.to(values.device) for one in self.basis)
        return torch.einsum("kc,bk...->bc...", components, values) + _per_channel(mean, values)

    def in_coordinates(self) -> "FeatureCodec":
        """The codec of the same rows that decodes them to W = min(K + 1, C) coordinates instead of C channels.

        All that K components b and a mean m decode to lies in the span of the b and of m. The coordinates are those in
        an orthonormal frame of it, the b and the direction of what of m is outside theirs: norms, inner products,
        distances and angles are those of the channels, without a matrix product of C. Without a basis: itself.
        """
        if self.basis is None:
            return self
        mean, components = (one.double() for one in self.basis)
        inside = components @ mean
        outside = torch.linalg.vector_norm(mean - inside @ components)
        kept, width = len(components), min(len(components) + 1, self.shape[0])
        mean = torch.cat([inside, outside[None]])[:width].float()
        frame = torch.eye(kept, width, device=mean.device)
        return replace(self, shape=(width, *self.shape[1:]), basis=Basis(mean, frame))

    def _numbers(self, kept: Tensor, seeds: Tensor | np.ndarray) -> dict[str, Tensor]:
        """Storable numbers in their format, by field."""
        if self.store == "fp32":
            return {self.name: kept}
        if self.store == "fp16":
            return {self.name: kept.half()}
        if self.store == "bf16":
            return {self.name: kept.bfloat16().view(torch.uint16)}
        sizes = kept.abs()
        scale = _scale(sizes.flatten(2).amax(dim=2) if kept.ndim > 2 else sizes.amax(dim=1, keepdim=True))
        steps = kept / _per_channel(scale.float(), kept).clamp(min=torch.finfo(torch.float32).tiny)
        if not self.dither:
            return {f"{self.name}_scale": scale, self.name: steps.round().to(torch.int8)}
        rounded = torch.empty(steps.shape, dtype=torch.int8, device=steps.device)
        for one, into, seed in zip(steps, rounded, map(int, seeds), strict=True):  # one by one: noise takes much room
            into.copy_((one + noise(seed, one.numel(), one.device).view(one.shape)).floor())
        return {f"{self.name}_scale": scale, self.name: rounded}


def pooled_grid(grid: tuple[int, ...], pool: int) -> tuple[int, ...]:
    """The grid of a feature after its sides were divided by `pool`, rounded up."""
    return tuple(math.ceil(side / pool) for side in grid)


def pooled(features: Tensor, pool: int) -> Tensor:
    """Features (B, C, *grid) float -> (B, C, *pooled grid): the mean of each cell. Cells share a line where `pool`
    does not divide a side."""
    return features if pool == 1 else F.adaptive_avg_pool2d(features, pooled_grid(tuple(features.shape[2:]), pool))


class Moments:
    """Sums over the positions of features, in float64 on their device, from which a basis is made."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor | None = None  # (C,)
        self.products: Tensor | None = None  # (C, C), sum of outer products

    def add(self, features: Tensor) -> None:
        """Add features (B, C, *grid), pooled as they will be stored. Rows that are not finite are left out."""
        finite = features[features.isfinite().flatten(1).all(dim=1)]
        vectors = finite.movedim(1, -1).reshape(-1, features.shape[1]).double()
        total, products = vectors.sum(dim=0), vectors.T @ vectors
        self.count += len(vectors)
        self.total = total if self.total is None else self.total + total
        self.products = products if self.products is None else self.products + products

    def basis(self, k: int) -> tuple[Basis, float]:
        """The `k` strongest principal components, and the share of the variance that they keep.

        The sign of a component makes its largest entry positive. Raises RecipeError when there are fewer channels, or
        fewer positions were seen.
        """
        channels = 0 if self.total is None else len(self.total)
        if not 1 <= k <= min(channels, self.count):
            raise RecipeError(
                f"{k} principal components cannot be found in {self.count} positions of {channels} channels; "
                f"use 1 to {min(channels, self.count)}, or more examples"
            )
        mean = self.total / self.count
        values, vectors = torch.linalg.eigh(self.products / self.count - torch.outer(mean, mean))
        values, components = values.flip(0).clamp(min=0), vectors.T.flip(0)[:k]
        largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
        components = components * largest.sign()
        variance = float(values.sum())
        return Basis(mean.float(), components.float()), float(values[:k].sum()) / variance if variance else 1.0


def save_bases(bases: Mapping[str, Basis]) -> bytes:
    """Bases by feature as the bytes of one safetensors file: `<feature>.mean`, `<feature>.components`."""
    tensors = {f"{name}.{part}": one for name, basis in bases.items() for part, one in basis._asdict().items()}
    return serialized({name: one.cpu().contiguous() for name, one in tensors.items()})


def load_bases(path: Path, payload: bytes | None = None) -> dict[str, Basis]:
    """What `save_bases` wrote; `payload` is what the file holds, where it has been read.

    Raises ShardError when the file is missing, damaged or something else.
    """
    try:
        tensors = deserialized(path.read_bytes() if payload is None else payload)
        names = sorted({name.rpartition(".")[0] for name in tensors})
        bases = {name: Basis(*(tensors.pop(f"{name}.{part}") for part in Basis._fields)) for name in names}
    except (OSError, SafetensorError, KeyError) as error:
        raise _no_bases(path, f"it cannot be read ({error})") from error
    if tensors:
        raise _no_bases(path, f"it holds '{min(tensors)}'")
    for name, (mean, components) in bases.items():
        if mean.ndim != 1 or components.shape[1:] != mean.shape or {mean.dtype, components.dtype} != {torch.float32}:
            raise _no_bases(path, f"mean and components of '{name}' do not fit")
    return bases


def feature_error(exact: Tensor, decoded: Tensor) -> dict[str, float]:
    """What a codec did to features: sums over rows, which add up over batches.

    exact (B, C, *grid), decoded (B, C, *pooled grid) float, compared at the grid of `exact`, to which the decoded map
    is brought bilinearly: `count` rows, `squared_error`, `squared_norm`, and `cosine`, of each row the mean over
    positions of the cosine over channels (1 where both are zero).
    """
    exact, decoded = exact.float(), decoded.float()
    if exact.shape != decoded.shape:
        decoded = F.interpolate(decoded, exact.shape[2:], mode="bilinear", align_corners=False)
    exact, decoded = (one.unsqueeze(-1).flatten(2) for one in (exact, decoded))
    cosine = F.cosine_similarity(exact, decoded, dim=1)
    cosine = torch.where((exact == 0).all(dim=1) & (decoded == 0).all(dim=1), 1.0, cosine)
    sums = {
        "squared_error": (exact - decoded).square().sum(dtype=torch.float64),
        "squared_norm": exact.square().sum(dtype=torch.float64),
        "cosine": cosine.mean(dim=1).sum(dtype=torch.float64),
    }
    return {"count": len(exact), **{name: float(one) for name, one in sums.items()}}


def feature_report(sums: Mapping[str, float]) -> dict[str, float]:
    """For a manifest: `relative_error`, |exact - decoded| / |exact| over everything, and the mean `cosine` a row."""
    return {
        "relative_error": math.sqrt(sums["squared_error"] / (sums["squared_norm"] or 1.0)),
        "cosine": sums["cosine"] / max(sums["count"], 1),
    }


def noise(seed: int, count: int, device: torch.device) -> Tensor:
    """`count` float32 numbers, uniform on the 65,536 middles of (0, 1), a function of seed and position alone.

    No finer: 127 plus the largest must not round to 128 in float32.
    """
    start = _mixed(torch.tensor(seed, dtype=torch.int64, device=device))
    mixed = _mixed(torch.arange(count, dtype=torch.int64, device=device) * 0x9E3779B1 + start)
    return ((mixed >> 16).float() + 0.5) / 65536


def _no_bases(path: Path, reason: str) -> ShardError:
    return ShardError(
        f"{path}: is no file of principal components, {reason}; delete its folder and run `kd-dist cache-teacher`"
    )


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    """Values (C,) or (B, C) in a shape that broadcasts over `like` (B, C, *grid)."""
    return values[(..., *[None] * (like.ndim - 2))]


def _scale(largest: Tensor) -> Tensor:
    """The smallest float16 not below largest / 127, for each entry: what int8 steps must be so that none clips."""
    scale = (largest / STEPS).half()
    # Exact: 11 bits times 7 fit into float32. The bits of positive floats count upwards.
    return torch.where(scale.float() * STEPS < largest, (scale.view(torch.int16) + 1).view(torch.float16), scale)


def _mixed(bits: Tensor) -> Tensor:
    """int64 -> int64 in 0..2**32 - 1: every bit of the lower 32 stirred into all others, as MurmurHash3 ends."""
    bits = bits & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = ((bits ^ (bits >> shift)) * factor) & 0xFFFFFFFF  # int64 wraps around; the lower 32 bits stay right
    return bits ^ (bits >> 16)
