"""Raw data set -> example shards. Restartable: committed shards are kept, the rest is written."""

import contextlib
import errno
import hashlib
import json
import math
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from kd_dist import manifest
from kd_dist.choose import hint
from kd_dist.disk import alone
from kd_dist.errors import DataError, KdError, MismatchError, Preempted, RecipeError
from kd_dist.inputs.spectrograms import Spectrograms, filters
from kd_dist.preempt import Notice, noticed
from kd_dist.progress import progress
from kd_dist.remote import Remote
from kd_dist.shards import Shard, is_committed, member_key, shard_path, write_shard
from kd_dist.sources import Item, Raw, list_items
from kd_dist.tasks import Regression, Task, packed_for

STEM = "data"
OF_THE_MACHINE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ENOSPC}  # no item's own fault
Members = Generator[tuple[str, dict[str, bytes]], None, None]  # key, {extension: content}


def pack(
    folder: Path | Remote,
    *,
    source: str,
    root: str | None,
    options: dict[str, Any],
    fractions: dict[str, float],
    required: Iterable[str],
    task: Task,
    shard_size: int,
) -> dict[str, dict[str, Any]]:
    """Write `folder/<split>/data-*.tar` for every split; return the manifests by split.

    Every image is decoded and every label or mask checked once, here: what fails is left out and listed, with its
    reason, as quarantined in the manifest. `required` names the splits that must end up with an example. The same data
    and recipe give the same bytes. Raises Preempted at the next item once a signal is noticed, and KdError when another
    command writes in the folder.
    """
    identity = {
        "kind": "examples",
        "source": {"name": source, "root": root, "options": options},
        "fractions": fractions,
        **packed_for(task),
        "shard_size": shard_size,
    }
    done = finished(folder, identity, required)
    if done is not None:
        return done
    refuse_writing(folder)
    if isinstance(task.input, Spectrograms):
        filters(task.input.front_end)  # refuses what cannot be, before a folder is claimed for it
    listing = list_items(source, root, options)
    refuse_classes(source, listing.classes, task)
    for note in listing.notes:
        print(f"pack: {note}", file=sys.stderr)
    splits = assign(listing.items, fractions)
    if manifest.GENERATED in splits:
        raise DataError(f"data.source {source}: a split cannot be called '{manifest.GENERATED}'; name it otherwise")
    for split in required:
        if not splits.get(split):
            raise DataError(
                f"data.source {source}: no example for split '{split}'; it has {sorted(splits)}; name in data.splits "
                f"those that the source names, or give larger shares of more examples; a group stays whole"
            )
    for items in splits.values():  # before anything is written
        refuse_twins(items)
        refuse_short(items, task)
    manifests = {}
    with alone(folder), noticed() as notice:
        done = finished(folder, identity, required)  # by another command, while this one listed its items
        if done is not None:
            return done
        for split, items in sorted(splits.items()):
            about = {"split": split, "class_names": list(listing.classes), "listing": listing_digest(items)}
            try:
                content, libraries = {**identity, **about}, listing.libraries
                manifests[split] = pack_split(folder / split, items, content, task, notice, libraries)
            except Preempted:
                raise Preempted(stopped(folder / split, len(items), shard_size, notice.name)) from None
    return manifests


def finished(
    folder: Path | Remote, identity: dict[str, Any], required: Iterable[str]
) -> dict[str, dict[str, Any]] | None:
    """The manifests, when every required split was packed to the end from this identity.

    Raises MismatchError when a split was packed from something else.
    """
    if isinstance(folder, Remote):  # not every store can list what it has
        splits = [split for split in required if (folder / split / manifest.FILE_NAME).is_file()]
    else:
        splits = [path.parent.name for path in sorted(folder.glob(f"*/{manifest.FILE_NAME}"))]
        splits = [split for split in splits if split != manifest.GENERATED]
    manifests = {split: manifest.read_manifest(folder / split) for split in splits}
    for split, content in manifests.items():
        refuse_other(folder / split, content, identity)
    complete = all(manifest.finished(folder / split) is not None for split in manifests)
    return manifests if complete and set(required) <= manifests.keys() else None


def refuse_classes(source: str, classes: Sequence[str], task: Task) -> None:
    """Raise a DataError when the classes or outputs of a source are not the task's."""
    if isinstance(task, Regression) and tuple(classes) != task.outputs:
        raise DataError(
            f"data.source {source}: gives {', '.join(classes) or 'nothing'}, the recipe's task.outputs are "
            f"{', '.join(task.outputs)}; name the same ones in the same order"
        )
    if len(classes) != task.classes:
        raise DataError(
            f"data.source {source}: has {len(classes)} classes, the recipe's task.classes says {task.classes}; "
            f"set task.classes to {len(classes)}, or name other classes in data.options if the source can"
        )


def refuse_writing(folder: Path | Remote) -> None:
    """Raise a RecipeError for a folder under a URL."""
    if isinstance(folder, Remote):
        raise RecipeError(
            f"{folder}: nothing can be written under a URL; set data.shards to a local folder, run the same command, "
            f"and copy the finished shards to the URL with the store's own tool"
        )


def refuse_other(folder: Path | Remote, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raise a MismatchError that names the first value of `here`, what the recipe says, that a folder's manifest has
    otherwise."""
    difference = manifest.first_difference(here, {name: there.get(name) for name in here})
    if difference is not None:
        place, ours, theirs = difference
        raise MismatchError(
            f"{folder}: was made with {place} = {theirs!r}, the recipe says {ours!r}; "
            f"restore the recipe, give it another name, or delete the folder"
        )


def assign(items: Iterable[Item], fractions: dict[str, float]) -> dict[str, list[Item]]:
    """Items by split, each split in a keyed random order that adding or removing items does not disturb.

    Raises DataError when the source divides a group among splits, or leaves an item out of one that there is not.
    """
    splits: dict[str, list[tuple[int, Item]]] = defaultdict(list)
    groups: dict[str, tuple[str, str]] = {}  # the split of each, and who said so
    for item in items:
        name = item.name.encode("utf-8", "surrogateescape")  # not every file name is UTF-8
        rank = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")
        split = item.split or choose_split(item.group or item.name, fractions)
        for name in item.not_in:
            if name not in fractions:
                raise DataError(
                    f"'{item.name}' is to be left out of split '{name}', which data.splits does not name"
                    f"{hint(name, fractions)}; correct data.options or data.splits"
                )
        if item.group is not None:
            known, first = groups.setdefault(item.group, (split, item.name))
            if known != split:
                raise DataError(
                    f"'{first}' is in split '{known}' and '{item.name}' in '{split}', but both are of group "
                    f"'{item.group}', which stays in one; correct the splits or the groups"
                )
        if split not in item.not_in:
            splits[split].append((rank, item))
    return {split: [item for _, item in sorted(ranked, key=_by_rank)] for split, ranked in splits.items()}


def _by_rank(ranked: tuple[int, Item]) -> tuple[int, str]:
    return ranked[0], ranked[1].name


def choose_split(name: str, fractions: dict[str, float]) -> str:
    """The split of an item whose source names none: by a hash of its name, or its group's, so it never moves."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8, person=b"kd_dist split").digest()
    point, reached = int.from_bytes(digest, "little") / 2**64, 0.0
    for split, fraction in fractions.items():
        reached += fraction
        if point < reached:
            return split
    return split  # fractions sum to 1 but for rounding


def listing_digest(items: Iterable[Item]) -> str:
    """sha256 over the names and labels of a split in order, and over the groups, spans and metadata of those that
    have one: a data set that changed half-way is noticed."""
    digest = hashlib.sha256()
    for item in items:
        label = "" if callable(item.label) else item.label  # a function has an address, not a value
        group = "" if item.group is None else f"\tgroup {item.group}"
        span = "" if item.span is None else f"\tspan {list(map(float, item.span))}"
        about = f"\tabout {json.dumps(item.about, sort_keys=True)}" if item.about else ""
        line = f"{item.name}\t{item.extension}\t{label}{group}{span}{about}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def item_key(item: Item) -> str:
    """The key of an item: its name without the ending, made safe for tar."""
    return member_key(item.name.rsplit(".", 1)[0] if item.name.endswith("." + item.extension) else item.name)


def refuse_twins(items: Iterable[Item]) -> None:
    """Raise a DataError when two items of a split would share a key."""
    names: dict[str, str] = {}
    for item in items:
        key = item_key(item)
        if key in names:
            raise DataError(f"'{names[key]}' and '{item.name}' would share the key '{key}'; rename one of them")
        names[key] = item.name


def refuse_short(items: Iterable[Item], task: Task) -> None:
    """Raise a DataError for a part of a recording that is shorter than one may be."""
    shortest = task.input.shortest if isinstance(task.input, Spectrograms) else 0.0
    for item in items:
        seconds = math.inf if item.span is None else item.span[1] - item.span[0]
        if seconds < shortest:
            raise DataError(
                f"'{item.name}' is a part of {seconds:g} s, less than audio.shortest, {shortest:g} s; take longer "
                f"windows, or lower audio.shortest"
            )


def stopped(folder: Path, items: int, shard_size: int, signal: str) -> str:
    """What is said when a signal has stopped the work at a split."""
    count = -(-items // shard_size)
    done = sum(is_committed(shard_path(folder, STEM, number)) for number in range(count))
    return f"pack {folder.name}: stopped by {signal} after {done} of {count} shards; the same command goes on"


def pack_split(
    folder: Path,
    items: list[Item],
    content: dict[str, Any],
    task: Task,
    notice: Notice,
    libraries: Sequence[str] = (),
) -> dict[str, Any]:
    """Write one split's shards and, last, its manifest marked complete."""
    workers = min(8, os.cpu_count() or 1)  # decoding releases the interpreter lock
    with ThreadPoolExecutor(workers) as pool:

        def checked(numbers: range, quarantined: list[dict[str, str]]) -> Members:
            return _checked(items[numbers.start : numbers.stop], task, pool, quarantined, notice)

        return write_folder(folder, len(items), content, task, f"pack {folder.name}", checked, libraries)


def write_folder(
    folder: Path,
    count: int,
    content: dict[str, Any],
    task: Task,
    title: str,
    examples: Callable[[range, list[dict[str, str]]], Members],
    libraries: Sequence[str] = (),
) -> dict[str, Any]:
    """Write `count` examples as shards and, last, the manifest marked complete, which is returned. Shards that are
    there already are kept.

    `examples` is asked for those with the numbers of one shard, and lists what it leaves out; the manifest states the
    versions of the `libraries` that it needs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / manifest.FILE_NAME).exists():
        refuse_other(folder, manifest.read_manifest(folder), content)
    manifest.write_manifest(folder, {**content, "complete": False})
    size = content["shard_size"]
    paths = [shard_path(folder, STEM, number) for number in range(-(-count // size))]
    with progress(title, count, "examples") as advance:
        for number, path in enumerate(paths):
            numbers = range(number * size, min((number + 1) * size, count))
            if not is_committed(path):
                notes: dict[str, Any] = {"quarantined": []}
                # Closed when writing fails: what has not been made by then is left alone.
                with contextlib.closing(examples(numbers, notes["quarantined"])) as made:
                    write_shard(path, made, notes)
            advance(len(numbers))
    return finish(folder, content, paths, (*task.input.libraries, *libraries))


def finish(folder: Path, content: dict[str, Any], paths: list[Path], libraries: Sequence[str]) -> dict[str, Any]:
    """Write the manifest that completes a folder of example shards; returns it."""
    shards = [Shard(path) for path in paths]
    quarantined = [row for shard in shards for row in shard.note("quarantined")]
    if quarantined and not any(len(shard) for shard in shards):
        first = quarantined[0]
        raise DataError(
            f"{folder}: every example is quarantined, the first is '{first['name']}': {first['reason']}; correct the "
            f"data, delete the folder and pack again"
        )
    final = {
        **content,
        "complete": True,
        "examples": sum(len(shard) for shard in shards),
        "tar_bytes": sum(shard.tar_bytes for shard in shards),
        "shards": [manifest.shard_entry(shard) for shard in shards],
        "quarantined": quarantined,
        "versions": manifest.versions(*libraries),
    }
    manifest.write_manifest(folder, final)
    return manifest.read_manifest(folder)


def _checked(
    items: list[Item], task: Task, pool: ThreadPoolExecutor, quarantined: list[dict[str, str]], notice: Notice
) -> Members:
    def read(item: Item) -> dict[str, bytes] | str:
        try:
            read = item.read()
            raw = read if isinstance(read, Raw) else Raw(read, {})
            metadata = {"name": item.name, **item.about, **raw.about}
            return task.encode(raw.payload, raw.extension or item.extension, item.label, metadata, item.span)
        except DataError as error:
            return str(error)
        except OSError as error:
            if error.errno in OF_THE_MACHINE:
                raise KdError(
                    f"{item.name}: cannot be read now ({error}); free what is short, and run the same command again"
                ) from error
            return str(error)

    for item, members in zip(items, pool.map(read, items), strict=True):
        if notice.name is not None:
            raise Preempted
        key = item_key(item)
        if isinstance(members, str):
            quarantined.append({"key": key, "name": item.name, "reason": members})
        else:
            yield key, members
