"""Several finished folders as one sequence of examples, and a teacher's signals for it."""

from collections.abc import Sequence

import numpy as np

from kd_dist import manifest
from kd_dist.data import AGAIN, Shards, SignalShards
from kd_dist.errors import MismatchError
from kd_dist.shards import Shard


class JoinedShards(Shards):
    """The examples of all parts, part after part. Its manifest is that of the first."""

    def __init__(self, parts: Sequence[Shards]) -> None:
        first = parts[0]
        self.parts, self.folder, self.on_error, self.manifest = parts, first.folder, first.on_error, first.manifest
        self.paths = [path for part in parts for path in part.paths]
        sizes = np.concatenate([np.diff(part.starts) for part in parts])
        self.starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._owners = [(part, number) for part in parts for number in range(len(part.paths))]

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


class JoinedSignals(JoinedShards, SignalShards):
    """A teacher's rows for the examples of all parts. Raises MismatchError when the parts store them differently."""

    def __init__(self, parts: Sequence[SignalShards]) -> None:
        super().__init__(parts)
        first = parts[0]
        for part in parts[1:]:
            both = [{name: one.manifest[name] for name in ("teacher", "codec", "row_dtype")} for one in (first, part)]
            difference = manifest.first_difference(*both)
            if difference is not None:
                place, wanted, there = difference
                raise MismatchError(
                    f"{part.folder}: has {place} = {there!r}, {first.folder} has {wanted!r}, so they cannot be trained "
                    f"on together; {AGAIN}"
                )
        self.examples = JoinedShards([part.examples for part in parts])
        self.teacher, self.views, self.dtype, self.header = first.teacher, first.views, first.dtype, first.header
        self.codec, self.features = first.codec, first.features
        begins = np.cumsum([0, *(len(part) for part in parts[:-1])])
        self.quarantined = np.concatenate([one.quarantined + begin for one, begin in zip(parts, begins, strict=True)])
