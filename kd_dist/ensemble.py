"""Several teachers as one: the mean of what their caches say of the same pixels."""

from collections.abc import Collection, Sequence

import numpy as np

from kd_dist import manifest
from kd_dist.errors import MismatchError
from kd_dist.folders import Shards
from kd_dist.rows import Signals
from kd_dist.signals import FRAME, codec_of, row_dtype


class MeanSignals:
    """The mean of several teachers' logits, or outputs, for the same examples in the same views, and the `features` of
    the first of them.

    The mean is that of the decoded logits: up to a constant, of the teachers' own, so the probabilities at any
    temperature are the geometric means, normalised (Hinton et al. 2015, 1503.02531, section 1: "an arithmetic or
    geometric mean"). Its rows are those of a cache that keeps it in fp32. An example that is quarantined by any teacher
    is left out. Raises MismatchError, naming both folders, for another number of classes, another grid, or records of
    another kind of views.
    """

    def __init__(self, parts: Sequence[Signals], examples: Shards, features: Collection[str] = ()) -> None:
        first = parts[0]
        self.parts, self.examples, self.folder = parts, examples, first.folder
        self.views = min(part.views for part in parts)
        for part in parts[1:]:
            refuse_unlike(first, part)
        self.codec = codec_of(first.manifest["task"], "fp32", first.codec.classes, first.codec.grid)
        self.features = {name: first.features[name] for name in sorted(features)}
        fields = [field for codec in (self.codec, *self.features.values()) for field in codec.fields()]
        self.dtype = row_dtype(first.dtype["view"], fields)
        self.quarantined = np.unique(np.concatenate([part.quarantined for part in parts]))
        self.manifest = {"versions": first.manifest["versions"], "teacher_report": self._report()}

    @property
    def fingerprint(self) -> str:
        """One digest of all the caches."""
        return manifest.digest([part.fingerprint for part in self.parts])

    def rows(self, ids: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Example ids and view numbers, both (B,) -> structured rows (B,), each checked against its CRC.

        Raises MismatchError when two teachers have not seen the same pixels.
        """
        read = [part.rows(ids, views) for part in self.parts]
        for part, rows in zip(self.parts[1:], read[1:], strict=True):
            strange = differing(read[0]["view"], rows["view"]) | (read[0]["input_crc"] != rows["input_crc"])
            others = np.flatnonzero(strange)
            if len(others):
                raise MismatchError(self._stranger(part, int(ids[others[0]]), read[0][others[0]], rows[others[0]]))
        decoded = [part.codec.decode(rows) for part, rows in zip(self.parts, read, strict=True)]
        fields, _ = self.codec.encode(np.mean(decoded, axis=0, dtype=np.float64).astype(np.float32))
        mean = np.zeros(len(ids), self.dtype)
        for name in FRAME[1:]:
            mean[name] = read[0][name]
        for codec in self.features.values():
            fields |= {name: read[0][name] for name, *_ in codec.fields()}
        for name, values in fields.items():
            mean[name] = values
        return mean

    def _stranger(self, part: Signals, one: int, mine: np.void, its: np.void) -> str:
        """What is said of an example that two teachers have not seen alike."""
        [number], [place] = self.examples.locate(np.array([one]))
        key, crcs = self.examples.shard(int(number)).key(int(place)), [int(row["input_crc"]) for row in (mine, its)]
        seen = "other views"
        if crcs[0] != crcs[1]:
            seen = f"pixels of CRC {crcs[1]:08x} and {crcs[0]:08x}"
        return (
            f"{part.folder} and {self.folder} have {seen} of example '{key}', so they have no mean; delete the one "
            f"that `kd-dist verify` finds wrong and run `kd-dist cache-teacher`"
        )

    def _report(self) -> dict[str, float]:
        """Of a regression the mean of the teachers' largest errors, which the mean output never exceeds, as a squared
        error is convex: what `ail` divides by it stays within 0 and 1."""
        said = [part.manifest.get("teacher_report") or {} for part in self.parts]
        known = [one["largest_error"] for one in said if "largest_error" in one]
        return {"largest_error": float(np.mean(known))} if len(known) == len(self.parts) else {}


def refuse_unlike(first: Signals, other: Signals) -> None:
    """Raise MismatchError when two teachers' logits, or their records of a view, have another form."""
    forms = [
        {"classes": one.codec.classes, "grid": one.codec.grid, "view": str(one.dtype["view"])} for one in (first, other)
    ]
    difference = manifest.first_difference(*forms)
    if difference is not None:
        place, mine, its = difference
        raise MismatchError(
            f"{other.folder}: has {place} = {its!r}, {first.folder} has {mine!r}, so they have no mean; leave one of "
            f"the two out of the stage's `teachers`"
        )


def differing(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Where two arrays (B, ...), structured or not, differ in a value: (B,) bool. Padding does not count."""
    if ours.dtype.names:
        return np.any([differing(ours[name], theirs[name]) for name in ours.dtype.names], axis=0)
    return (ours != theirs).reshape(len(ours), -1).any(axis=1)
