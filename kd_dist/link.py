"""An existing webdataset as folders of example shards: links to its tars, with our indexes and a manifest beside them.

Nothing of it is copied or changed. Restartable: indexes that are there are kept if the tars still are what they were.
"""

import os
import secrets
import sys
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from kd_dist import choose, manifest
from kd_dist.disk import alone, file_digest, make_folder, sync
from kd_dist.errors import DataError, KdError, MismatchError, Preempted, RecipeError, ShardError
from kd_dist.foreign import Members
from kd_dist.pack import STEM, finish, finished, refuse_classes, refuse_other
from kd_dist.preempt import Notice, noticed
from kd_dist.progress import progress
from kd_dist.remote import Remote
from kd_dist.shards import Contents, Shard, index_path, index_tar, is_committed, shard_path
from kd_dist.sources.webdataset import webdataset
from kd_dist.tars import TarExample
from kd_dist.tasks import Task, packed_for

SOURCE = "webdataset"  # the data.source whose tars are used as they are
OPTIONS = ("image", "label", "class_names")  # of the source, beside the names of splits
KEY_BYTES = 63  # of a key: a signal shard's member is `<key>.<teacher>.npy`, at most 100 bytes


def link(
    folder: Path | Remote,
    *,
    root: str | None,
    options: dict[str, Any],
    fractions: Collection[str],
    required: Iterable[str],
    task: Task,
    thorough: bool = False,
) -> dict[str, dict[str, Any]]:
    """Make `folder/<split>/data-*.tar` links to the tars of every split, each with its index; return the manifests.

    Every image is decoded and every label checked once: what fails is left out of the index and listed, with its
    reason, as quarantined in the manifest. `fractions` names the splits that there are, `required` those that must be.
    A tar that changed after it was indexed is a MismatchError: by its size, and if `thorough` by its sha256.
    Raises ShardError for tars that cannot be used, after all were looked at.
    """
    source = {"name": SOURCE, "root": root, "options": options}
    about = {"kind": "examples", **packed_for(task)}
    done = finished(folder, about, required)
    remote = isinstance(folder, Remote)  # what is there has been finished elsewhere
    if done is not None and (remote or not thorough and all(made.get("source") == source for made in done.values())):
        return done
    if remote:
        _refuse_unfinished(folder)
    given = {**options, **({} if root is None else {"root": root})}
    try:
        choose.check_options(webdataset, given)
    except RecipeError as error:
        raise RecipeError(f"data.options of {SOURCE}: {error}") from error
    _refuse_splits(options, fractions, required)
    found = webdataset(**given)
    classes = found.classes or tuple(map(str, range(task.classes)))
    refuse_classes(SOURCE, classes, task)
    contents = {
        split: {
            **about,
            "split": split,
            "source": source,
            "members": {"image": list(found.members.image), "label": found.members.label},
            "tars": [tar.name for tar in tars],
            "class_names": list(classes),
        }
        for split, tars in sorted(found.splits.items())
    }
    with alone(folder), noticed() as notice, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        judge = Judge(found.members, task, pool, notice)
        try:
            return {
                split: _link_split(folder / split, found.splits[split], content, judge, thorough)
                for split, content in contents.items()
            }
        except Preempted:
            raise Preempted(f"index: stopped by {notice.name}; the same command goes on") from None


def _refuse_unfinished(folder: Remote) -> NoReturn:
    raise ShardError(
        f"{folder}: lacks a split; nothing can be indexed under a URL: index a local copy of the tars, and copy the "
        f"folder there, links followed"
    )


def _refuse_splits(options: Collection[str], fractions: Collection[str], required: Iterable[str]) -> None:
    """Raise a DataError for a split that has no tars, or that the recipe does not know."""
    for name in options:
        if name not in (*fractions, *OPTIONS):
            known = choose.hint(name, [*fractions, *OPTIONS])
            raise DataError(f"data.options: '{name}' is neither a split of data.splits nor an option{known}")
    for split in required:
        if split not in options:
            raise DataError(
                f"data.options: no tars for split '{split}'; name some: tars are used as they are, so data.splits "
                f"cannot divide them"
            )


@dataclass(frozen=True)
class Judge:
    """Which examples of a tar can be learned from."""

    members: Members
    task: Task
    pool: ThreadPoolExecutor
    notice: Notice

    @property
    def words(self) -> dict[str, Any]:
        """What it goes by: another judge may find otherwise."""
        return {"image": list(self.members.image), "label": self.members.label, "classes": self.task.classes}

    def choose(
        self, tar: Path, quarantined: list[dict[str, str]], entries: list[TarExample], contents: Contents
    ) -> Iterator[bool]:
        """Of each example whether it is good; `quarantined` lists those that are not. Raises ShardError where the whole
        tar cannot be used, Preempted once a signal is noticed."""
        problem = self.members.problem([(entry.key, [row[0] for row in entry.members]) for entry in entries])
        if problem is not None:
            raise ShardError(f"{tar}: {problem}")
        for entry in entries:
            if len(entry.key) > KEY_BYTES:
                raise ShardError(
                    f"{tar}: the key '{entry.key}' has {len(entry.key)} characters, and the name of its signals has "
                    f"room for {KEY_BYTES}; write the tar again with shorter keys"
                )

        def problem_of(entry: TarExample) -> str | None:
            try:
                extension, image, label = self.members.found(contents(entry))
                self.task.encode(image, extension, label, {})
            except DataError as error:
                return str(error)

        for entry, reason in zip(entries, self.pool.map(problem_of, entries), strict=True):
            if self.notice.name is not None:
                raise Preempted
            if reason is not None:
                quarantined.append({"key": entry.key, "name": f"{tar.name}: {entry.key}", "reason": reason})
            yield reason is None


def _link_split(
    folder: Path, tars: list[Path], content: dict[str, Any], judge: Judge, thorough: bool
) -> dict[str, Any]:
    """The manifest of one split, every tar linked and indexed."""
    make_folder(folder)
    there = manifest.read_manifest(folder) if (folder / manifest.FILE_NAME).is_file() else None
    if there is not None:
        refuse_other(folder, {"source": there.get("source", {}).get("name")}, {"source": SOURCE})
        # The data set may have moved: its tars are compared, not where they lie.
        refuse_other(folder, there, {name: one for name, one in content.items() if name != "source"})
    rows = [None] * len(tars) if there is None else there["shards"]
    paths = [shard_path(folder, STEM, number) for number in range(len(tars))]
    refused: list[ShardError] = []
    with progress(f"index {folder.name}", len(tars), "tars") as advance:
        for path, tar, row in zip(paths, tars, rows, strict=True):
            try:
                _settle(path, tar, row, judge, thorough)
            except ShardError as error:
                refused.append(error)
            advance(1)
    _refuse(folder, refused, len(tars))
    if there is None:
        _refuse_twins(paths, tars)
        return finish(folder, content, paths, ())
    if there["source"] != content["source"]:
        manifest.write_manifest(folder, {**there, "source": content["source"]})
    return manifest.read_manifest(folder)


def _settle(path: Path, tar: Path, row: dict[str, Any] | None, judge: Judge, thorough: bool) -> None:
    """Make `path` a link to the tar, and its index. `row` is the manifest's, None of a folder that is not finished.

    Raises MismatchError when the tar is not the one that the manifest lists, ShardError when it cannot be used.
    """
    linked = path.is_symlink() and os.readlink(path) == str(tar)
    if row is None:
        kept = linked and is_committed(path) and _is_current(Shard(path), tar, judge)
    else:
        if thorough or not linked or not is_committed(path):
            _refuse_changed(path, tar, row["sha256"])
        if not linked:
            _relink(path, tar)  # its index is kept: the manifest knows which it is
        kept = is_committed(path) and Shard(path).sha256 == row["sha256"]
    if not kept:
        index_path(path).unlink(missing_ok=True)  # an old index must never vouch for another tar
        _relink(path, tar)
        notes: dict[str, Any] = {"judge": judge.words, "quarantined": []}
        index_tar(tar, notes, path, partial(judge.choose, tar, notes["quarantined"]))


def _is_current(shard: Shard, tar: Path, judge: Judge) -> bool:
    """Whether an index that nothing vouches for yet is that of the tar, by this judge."""
    return shard.notes.get("judge") == judge.words and shard.sha256 == file_digest(tar)


def _refuse_changed(path: Path, tar: Path, sha256: str) -> None:
    """Raise a MismatchError unless the tar is the one that was indexed as `path`."""
    if (digest := file_digest(tar)) != sha256:
        raise MismatchError(
            f"{tar}: is not the tar that was indexed as {path}: its sha256 is {digest[:12]}, that one's {sha256[:12]}; "
            f"bring that one back, or delete {path.parent}, with all signals in it, and index this one"
        )


def _relink(path: Path, tar: Path) -> None:
    """Put a link to the tar in the place of another one. Raises a KdError where that cannot be."""
    if path.exists() and not path.is_symlink():
        raise MismatchError(
            f"{path}: is no link, but a shard of another data set; give the recipe another name, or delete the folder"
        )
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        os.symlink(tar, temporary)
    except OSError as error:
        raise KdError(
            f"{path}: cannot be made a link ({error.strerror}); set data.shards to a folder whose file system has links"
        ) from error
    os.replace(temporary, path)
    sync(path.parent)


def _refuse(folder: Path, refused: list[ShardError], count: int) -> None:
    """Raise what was said of a tar, or of several that there are some, each being told."""
    if len(refused) == 1:
        raise refused[0]
    if refused:
        for error in refused:
            print(f"index {folder.name}: {error}", file=sys.stderr)
        raise ShardError(
            f"{folder}: {len(refused)} of {count} tars cannot be used, as told above; mend them, and run the same "
            f"command again"
        )


def _refuse_twins(paths: list[Path], tars: list[Path]) -> None:
    """Raise a ShardError when a key is in two tars of a split."""
    places: dict[str, Path] = {}
    for path, tar in zip(paths, tars, strict=True):
        for key in Shard(path).keys:
            if (first := places.setdefault(key, tar)) != tar:
                raise ShardError(
                    f"{tar}: the key '{key}' is in {first} too; a key comes once in a split: leave one of the tars "
                    f"out, or write one again with other keys"
                )
