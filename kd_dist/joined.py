"""Several finished folders as one sequence of examples, and a teacher's signals for it."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from kd_dist import manifest
from kd_dist.folders import Shards
from kd_dist.remote import Remote
from kd_dist.rows import Signals, refuse_other_codecs, refuse_other_teacher
from kd_dist.shards import Shard
from kd_dist.signals import row_dtype


class JoinedShards(Shards):
    """The examples of all parts, part after part. Its manifest is that of the first."""

    def __init__(self, parts: Sequence[Shards]) -> None:
        first = parts[0]
        self.parts, self.folder, self.on_error, self.manifest = parts, first.folder, first.on_error, first.manifest
        sizes = np.concatenate([np.diff(part.starts) for part in parts])
        self.starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._owners = [(part, number) for part in parts for number in range(len(part.starts) - 1)]

    @cached_property
    def paths(self) -> list[Path | Remote]:
        """Of the tars of all parts."""
        return [path for part in self.parts for path in part.paths]

    def shard(self, number: int) -> Shard:
        """The opened shard `number`, as its part knows it."""
        part, own = self._owners[number]
        return part.shard(own)

    @property
    def fingerprint(self) -> str:
        """One digest of everything in all folders."""
        return manifest.digest([part.fingerprint for part in self.parts])

    def example_bytes(self) -> int:
        """Mean bytes of an example on disk, as it was packed."""
        return max(1, sum(part.example_bytes() * len(part) for part in self.parts) // max(1, len(self)))


class JoinedSignals:
    """A teacher's rows for the examples of all parts. Raises MismatchError when the parts store them differently."""

    def __init__(self, parts: Sequence[Signals], examples: Sequence[Shards]) -> None:
        self.parts, first = parts, parts[0]
        self.folder = first.folder
        for part in parts[1:]:
            refuse_other_teacher(first, part)
            refuse_other_codecs(first, part)
        self.manifest, self.codec, self.views = first.manifest, first.codec, min(part.views for part in parts)
        self.features = {
            name: codec for name, codec in first.features.items() if all(name in part.features for part in parts)
        }
        fields = [field for codec in (self.codec, *self.features.values()) for field in codec.fields()]
        self.dtype = row_dtype(first.dtype["view"], fields)
        self.begins = np.cumsum([0, *(len(part) for part in examples)])
        self.quarantined = np.concatenate(
            [part.quarantined + begin for part, begin in zip(parts, self.begins[:-1], strict=True)]
        )

    @property
    def fingerprint(self) -> str:
        """One digest of everything in all folders."""
        return manifest.digest([part.fingerprint for part in self.parts])

    def rows(self, ids: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Example ids and view numbers, both (B,) -> structured rows (B,), each as its part gives it but for
        `row_crc`, which is 0."""
        found = np.zeros(len(ids), self.dtype)
        for part, begin, end in zip(self.parts, self.begins[:-1], self.begins[1:], strict=True):
            here = np.flatnonzero((ids >= begin) & (ids < end))
            if len(here):
                read = part.rows(ids[here] - begin, views[here])
                for name in self.dtype.names[1:]:
                    found[name][here] = read[name]
        return found
