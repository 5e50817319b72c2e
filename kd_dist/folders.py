"""The examples of a finished folder of shards, in manifest order, and those that their views are mixed with."""

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kd_dist import manifest
from kd_dist.batch import Example
from kd_dist.errors import DataError, ShardError
from kd_dist.foreign import Members
from kd_dist.remote import Remote, at_once, each
from kd_dist.shards import Shard
from kd_dist.views import MixedViews

OnError = Literal["raise", "replace_masked"]  # at an example that cannot be read: stop, or go on without it
Decode = Callable[[str, Mapping[str, bytes | memoryview]], Example]


class Shards:
    """The shards of one finished folder as one sequence of examples, in manifest order. Opened on first use.

    With `on_error` "replace_masked" a shard that is missing is an error of its examples, not of the folder. With a
    `limit` it is the first so many shards alone. `about` is the manifest, where it has been read.
    """

    def __init__(
        self,
        folder: Path | Remote,
        on_error: OnError = "raise",
        limit: int | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.on_error, self.limit = folder, on_error, limit
        self.manifest = manifest.read_manifest(folder) if about is None else about
        if not self.manifest["complete"]:
            raise ShardError(
                f"{folder}: not finished; run the command that makes it once more, it goes on where it was"
            )
        rows = self.manifest["shards"][:limit]
        if limit is not None and len(rows) < limit:
            raise DataError(
                f"{folder}: holds {len(rows)} shards, and a stage is to learn from the first {limit} (`shards`); lower "
                f"that number, or leave it out"
            )
        self.starts = np.concatenate([[0], np.cumsum([row["examples"] for row in rows], dtype=np.int64)])
        self._open: dict[int, Shard] = {}
        if isinstance(folder, Remote):  # now, that not each loader process has to fetch every index
            at_once(folder, self.shard, range(len(rows)))

    @cached_property
    def paths(self) -> list[Path | Remote]:
        """Of the tars. Made when asked for: reading needs those alone that it opens."""
        return [self.folder / row["name"] for row in self.manifest["shards"][: self.limit]]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def locate(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Example ids -> (shard number, place in the shard)."""
        shards = np.searchsorted(self.starts, ids, side="right") - 1
        return shards, ids - self.starts[shards]

    def shard(self, number: int) -> Shard:
        """The opened shard `number`. Raises ShardError when it is not the one that the manifest lists."""
        if number not in self._open:
            row = self.manifest["shards"][number]
            shard = Shard(self.folder / row["name"])
            if shard.sha256 != row["sha256"] or len(shard) != row["examples"]:
                raise ShardError(
                    f"{shard.path}: its index holds {len(shard)} examples with sha256 {shard.sha256[:12]}, the "
                    f"manifest {row['examples']} with {row['sha256'][:12]}; delete the folder and make it again"
                )
            self._open[number] = shard
        return self._open[number]

    @cached_property
    def members(self) -> Members | None:
        """What to take of examples that others wrote; None: these are as `kd-dist pack` writes them."""
        about = self.manifest.get("members")
        return None if about is None else Members(tuple(about["image"]), about["label"])

    def read(self, number: int, place: int) -> tuple[str, dict[str, bytes | memoryview]]:
        """The key of an example and its members, as `kd-dist pack` writes them. Raises ShardError when it is damaged,
        DataError when a foreign one lacks what it should have."""
        shard = self.shard(number)
        key, contents = shard.key(place), shard.read(place)
        return key, contents if self.members is None else self.members.packed(key, contents)

    @cached_property
    def fingerprint(self) -> str:
        """One digest of everything in the shards."""
        return manifest.digest(self.manifest["shards"][: self.limit])

    @property
    def whole_fingerprint(self) -> str:
        """One digest of everything in the folder, `limit` or not: what a cache of it is bound to."""
        return manifest.fingerprint(self.manifest)

    def example_bytes(self) -> int:
        """Mean bytes of an example on disk, as it was packed: the order of a run must not change with damage."""
        if isinstance(self.manifest.get("tar_bytes"), int):
            return max(1, self.manifest["tar_bytes"] // max(1, sum(row["examples"] for row in self.manifest["shards"])))
        total = held = 0  # an older manifest does not say, so by what is there
        for number, row in enumerate(self.manifest["shards"][: self.limit]):
            try:
                path = self.paths[number]
                total += self.shard(number).tar_bytes if isinstance(path, Remote) else path.stat().st_size
                held += row["examples"]
            except FileNotFoundError as error:
                if self.on_error == "raise":
                    raise ShardError(f"{path}: is missing; run the command that wrote it again") from error
            except ShardError:
                if self.on_error == "raise":
                    raise
        return max(1, total // max(1, held))


def read_examples(shards: Shards, ids: np.ndarray, decode: Decode) -> list[Example]:
    """Read, verify and decode the examples with these ids, in their order."""

    def read(number: int, place: int) -> Example:
        return decode(*shards.read(number, place))

    return each(shards.folder, read, *(one.tolist() for one in shards.locate(ids)))


def drawn_partners(shards: Shards, policy: MixedViews, ids: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """What views `numbers` (B,) of the examples (B,) are to be mixed with: places (B,) in the shards, -1: none."""
    found = []
    for number, place, view in zip(*(one.tolist() for one in shards.locate(ids)), numbers.tolist(), strict=True):
        shard = shards.shard(number)
        found.append(policy.partner(shard.key(place), view, place, len(shard)))
    return np.array(found, np.int64)


def with_partners(
    shards: Shards, examples: list[Example], ids: np.ndarray, partners: np.ndarray, decode: Decode
) -> list[Example]:
    """The examples, each with the one at the place `partners` (B,) of its shard, which its view shows too; -1: none.

    An example without sound signals lends its image like any other. One that cannot be read fails all that show it.
    """
    rows = np.flatnonzero(partners >= 0)
    numbers, _ = shards.locate(ids[rows])
    others = shards.starts[numbers] + partners[rows]
    if (others >= shards.starts[numbers + 1]).any():
        raise DataError(f"{shards.folder}: a view is mixed with an example beyond its shard's last; cache again")
    found = list(examples)
    for row, other in zip(rows.tolist(), read_examples(shards, others, decode), strict=True):
        found[row] = found[row]._replace(partner=(int(partners[row]), other))
    return found
