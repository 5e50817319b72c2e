"""Codecs that keep every logit of a teacher, or every number of a regression."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kd_dist.choose import entry
from kd_dist.errors import RecipeError
from kd_dist.signals.fidelity import (
    error_report,
    every_words,
    gradient_words,
    measured_error,
    measured_every,
    merge_errors,
)

# Codec of the logits -> what one number is stored as.
CODECS = {"fp32": "<f4", "fp16": "<f2", "uint16": "<u2", "uint8": "u1"}
LEVELS = {"uint16": 2**16 - 1, "uint8": 2**8 - 1}  # of a codec with a scale
TINY = np.finfo(np.float32).tiny


@dataclass(frozen=True)
class LogitsCodec:
    """How C logits are stored, those of an image or, with a grid, of every place. A constant over the classes of one
    place is never kept: no loss depends on it.

    Two classes store one `margin` z1 - z0 a place, as fp32 or fp16. More store `logits`: z - max(z) of each place, as
    fp32, fp16, uint16 or uint8. Of the last two `logits_scale` s is one number a row, and the stored q, in 0..n with n
    of LEVELS, stands for
    -s q without a grid: n equal steps span the row;
    -s q^2 with one: a map has one s for all its places, and equal steps of a confident map are too coarse where the
    probability is. These begin at 1/n of an equal step and end at 2 of them.

    Bounds on the error of d = z - max(z), or of the margin, each tested: fp32 2**-24 |d|; fp16 2**-11 |d| + 2**-25 (the
    second term is for |d| < 2**-14); uint8 0.5001 s, with a grid 1.0003 (sqrt(s |d|) + s/4);
    uint16 0.52 s, with a grid 1.02 (sqrt(s |d|) + s/4), as float32 has 256 places between its steps. There is no int8:
    z - max(z) has one sign.

    Raises RecipeError for an unknown codec, fewer than two classes, or one with a scale for two.
    """

    name: str  # one of CODECS
    classes: int
    grid: tuple[int, int] | None = None  # (h, w) of a segmentation teacher's logits; None: one row of logits an image

    drift: ClassVar[str] = "mean_kl_t1"  # the entry of a report that says how far two teachers are apart

    def __post_init__(self) -> None:
        entry(CODECS, "logits codec", self.name)
        if self.classes < 2:
            raise RecipeError(f"a teacher of {self.classes} classes has no logits to distil; it needs at least 2")
        if self.classes == 2 and self.name in LEVELS:
            raise RecipeError(f"two classes store one margin, which {self.name} cannot hold; use fp16 or fp32")

    @property
    def every(self) -> int:
        """Of how many rows one is measured; see `measured_every`."""
        return measured_every(self.classes, self.grid)

    def fields(self) -> list[tuple]:
        """The fields that this codec adds to a row, as NumPy describes them."""
        stored, grid = CODECS[self.name], self.grid or ()
        if self.classes == 2:
            return [("margin", stored, grid)] if grid else [("margin", stored)]
        scale = [("logits_scale", "<f4")] if self.name in LEVELS else []
        return [*scale, ("logits", stored, (self.classes, *grid))]

    def encode(self, logits: np.ndarray, targets: np.ndarray | None = None) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Logits (B, C, *grid) float32, whatever the targets -> the fields, each (B, ...), and a mask (B,) bool of the
        rows that could be stored.

        A row with a NaN, an infinity or a difference too large for the codec is False in the mask and holds zeros:
        the caller quarantines its example.
        """
        stored = CODECS[self.name]
        largest = np.finfo(np.float16 if self.name == "fp16" else np.float32).max
        with np.errstate(over="ignore", invalid="ignore"):  # such rows are what the mask is for
            below = logits - logits.max(axis=1, keepdims=True)
        places = tuple(range(1, below.ndim))
        storable = (below >= -np.float32(largest)).all(axis=places)  # a NaN compares False
        below[~storable] = 0
        if self.classes == 2:
            return {"margin": (below[:, 1] - below[:, 0]).astype(stored)}, storable
        if self.name in LEVELS:
            whole = LEVELS[self.name] ** (2 if self.grid else 1)
            scale = np.maximum(below.min(axis=places) / np.float32(-whole), TINY)  # never 0: all logits may be equal
            steps = below / -_per_row(scale, below)
            if self.grid:
                steps = np.sqrt(steps)
            return {"logits_scale": scale, "logits": np.rint(steps).astype(stored)}, storable
        return {"logits": below.astype(stored)}, storable

    def decode(self, rows: np.ndarray) -> np.ndarray:
        """Structured rows (B,) -> logits (B, C, *grid) float32: [0, margin] for two classes, otherwise z - max(z)."""
        if self.classes == 2:
            margin = rows["margin"].astype(np.float32)
            return np.stack([np.zeros_like(margin), margin], axis=1)
        logits = rows["logits"].astype(np.float32)
        if self.name in LEVELS:
            if self.grid:
                np.square(logits, out=logits)
            logits *= -_per_row(rows["logits_scale"], logits)
        return logits

    def error(self, exact: np.ndarray, decoded: np.ndarray) -> dict[str, float]:
        """What storing finite logits did to them; see `measured_error`."""
        return measured_error(exact, decoded)

    def report(self, sums: Mapping[str, float] | None) -> dict[str, float]:
        """Errors that were added up, None for none, as a manifest states them; see `error_report`."""
        return error_report(sums or merge_errors([]))

    def words(self, report: Mapping[str, float]) -> str:
        """A report in words."""
        return (
            f"{self.name} logits: largest error {report['max_abs']:.1e}, mean KL {report['mean_kl_t1']:.1e} nat, top "
            f"class equal in {report['top_class_agreement']:.2%}{gradient_words(report)}{every_words(self.every)}"
        )


@dataclass(frozen=True)
class OutputsCodec:
    """How the D real numbers that a regression teacher says are stored: as they are, fp32 exactly, or as fp16.

    Bound on the error of a number x, fp16: 2**-11 |x| + 2**-25. It has the methods of LogitsCodec.
    Raises RecipeError for another codec.
    """

    name: str  # fp32 or fp16
    classes: int  # D
    grid: None = None

    drift: ClassVar[str] = "mean_square"
    every: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.name not in ("fp32", "fp16"):
            raise RecipeError(f"the outputs of a regression are stored as fp32 or fp16, not {self.name}")

    def fields(self) -> list[tuple]:
        """The field that this codec adds to a row, as NumPy describes it."""
        return [("outputs", CODECS[self.name], (self.classes,))]

    def encode(
        self, outputs: np.ndarray, targets: np.ndarray | None = None
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Outputs (B, D) float32, whatever the targets -> the field, (B, D), and a mask (B,) bool of the rows that
        could be stored; another row holds zeros."""
        largest = np.finfo(CODECS[self.name]).max
        storable = (np.abs(outputs) <= largest).all(axis=1)  # a NaN compares False
        return {"outputs": np.where(storable[:, None], outputs, 0).astype(CODECS[self.name])}, storable

    def decode(self, rows: np.ndarray) -> np.ndarray:
        """Structured rows (B,) -> outputs (B, D) float32."""
        return rows["outputs"].astype(np.float32)

    def error(self, exact: np.ndarray, decoded: np.ndarray) -> dict[str, float]:
        """What storing finite outputs (B, D) did to them: `count` rows, `max_abs` difference, and the sum over rows of
        the mean squared difference."""
        gap = exact.astype(np.float64) - decoded
        squares = float((gap**2).mean(axis=1).sum()) if len(gap) else 0.0
        return {"count": len(gap), "max_abs": float(np.abs(gap).max(initial=0)), "squares": squares}

    def report(self, sums: Mapping[str, float] | None) -> dict[str, float]:
        """Errors that were added up, None for none: `count`, `max_abs` and `mean_square`."""
        sums = sums or {"count": 0, "max_abs": 0.0, "squares": 0.0}
        kept = {name: sums[name] for name in ("count", "max_abs")}
        return {**kept, "mean_square": sums["squares"] / max(sums["count"], 1)}

    def words(self, report: Mapping[str, float]) -> str:
        """A report in words."""
        return f"{self.name} outputs: largest error {report['max_abs']:.1e}"


@dataclass(frozen=True)
class NoLogits:
    """Rows of features alone, which are added to others that have the logits. It has the methods of LogitsCodec that
    writing such rows takes."""

    classes: int
    name: None = None
    grid: None = None

    def fields(self) -> list[tuple]:
        """None."""
        return []

    def encode(
        self, logits: np.ndarray, targets: np.ndarray | None = None
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Logits (B, ...), whatever they are -> no fields, and a mask (B,) bool: there is nothing to store."""
        return {}, np.ones(len(logits), bool)


def _per_row(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Values (B,) in a shape (B, 1, ...) that broadcasts over `like` (B, ...)."""
    return values[(..., *[None] * (like.ndim - 1))]
