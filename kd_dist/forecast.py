"""From what was measured in small to the whole: hours, epochs, bytes a second, and when a cache has paid for itself."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kd_dist import places
from kd_dist.assemble import is_online, reads_cache
from kd_dist.calibrate import BASIS_ROWS, PROBE_ROWS
from kd_dist.losses import signals_needed
from kd_dist.manifest import GENERATED
from kd_dist.recipe import Recipe
from kd_dist.rehearsal import Clock
from kd_dist.remote import CHUNK

SECONDS = 5.0  # that each measurement takes, about
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
MANIFEST_REQUESTS, SHARD_REQUESTS = 1, 2  # of a folder to read its manifest; of a shard, for its index and its size


class Timing(NamedTuple):
    """How time is measured, and for what."""

    processes: int = 1  # that share the work
    seeds: int = 1  # of each student's stage
    seconds: float = SECONDS
    clock: Clock = time.perf_counter


def outlook(
    recipe: Recipe,
    measured: Mapping[str, Any],
    shards: Mapping[str, Sequence[int]],
    found: Mapping[str, Any],
    timing: Timing,
    further: Mapping[str, Any],
) -> dict[str, Any]:
    """What a plan `found` takes in time, given what was `measured` by one process (see `rehearsal.measure`), and the
    plans of `further` teachers by name.

    `cache_seconds` for caching every split; of each student's stage the seconds and the bytes of an epoch, how many
    `loaders` keep up, what `reading` says, and, where it listens to a teacher, the seconds that one in the loop takes
    more in an epoch, and the epoch after which caching has taken less; `online_seconds`, what that comes to over all
    such stages, seeds and epochs.
    """
    P, cache = timing.processes, measured["cache"]
    views = {split: found["rows"][split] // max(1, sum(sizes)) for split, sizes in shards.items()}
    rows = sum(busiest(sizes, P) * views[split] for split, sizes in shards.items())
    rows += -(-found["rows"].get(GENERATED, 0) // P)
    if recipe.cache.features:  # the first process measures what codecs keep
        rows += min(found["rows"][places.TRAINING_SPLIT], BASIS_ROWS + PROBE_ROWS)
    seconds = rows * cache["seconds"] / cache["rows"]
    first = recipe.teacher.name
    caching = {first: seconds, **{name: one["time"]["cache_seconds"] for name, one in further.items()}}
    stages, online = {}, 0.0
    for name, one in measured["stages"].items():
        stages[name] = stage_outlook(recipe, name, one, shards, found, timing, further)
        heard = recipe.teachers_of(recipe.stages[name]) if reads_cache(recipe.stages[name]) else []
        plans = [found if teacher == first else further[teacher] for teacher in heard]
        examples = sum(shards[places.TRAINING_SPLIT])
        rate, repeats = stages[name]["examples_per_second"], recipe.stages[name].views_per_decode
        stages[name] |= reading(examples, found, plans, measured["start"], rate, repeats)
        if stages[name]["online_seconds"] is not None:
            cached = sum(caching[teacher] for teacher in recipe.teachers_of(recipe.stages[name]))
            stages[name]["break_even_epoch"] = math.ceil(cached / stages[name]["online_seconds"])
            online += stages[name]["online_seconds"] * stages[name]["epochs"] * timing.seeds
    return {
        "measured": measured,
        "processes": P,
        "seeds": timing.seeds,
        "cache_seconds": sum(caching.values()),
        "cache_hours": sum(caching.values()) / 3600,
        "teachers": caching,
        "online_seconds": online,
        "stages": stages,
    }


def stage_outlook(
    recipe: Recipe,
    name: str,
    measured: Mapping[str, Any],
    shards: Mapping[str, Sequence[int]],
    found: Mapping[str, Any],
    timing: Timing,
    further: Mapping[str, Any],
) -> dict[str, Any]:
    """What an epoch of a stage takes and reads; see `outlook`."""
    stage, P, first = recipe.stages[name], timing.processes, recipe.teacher.name
    spoken, rows = {first: measured["teacher_seconds"]}, {first: found["row_bytes"][places.TRAINING_SPLIT]}
    spoken |= {teacher: one["time"]["measured"]["teacher_seconds"] for teacher, one in further.items()}
    rows |= {teacher: one["row_bytes"][places.TRAINING_SPLIT] for teacher, one in further.items()}
    heard = recipe.teachers_of(stage)
    examples = sum(shards[places.TRAINING_SPLIT])
    if stage.generated:
        examples += found["rows"][GENERATED] // recipe.views.count
    judged = sum(shards[places.VALIDATION_SPLIT])
    rate = P * measured["rows"] / measured["step_seconds"]
    read = found["example_bytes"]["packed"] * (found["example_requests"] - 1 + 1 / stage.views_per_decode)
    read += sum(rows[teacher] for teacher in heard) if reads_cache(stage) else 0
    training, validation = examples / rate, judged * measured["validation_seconds"] / P
    last = math.inf if stage.max_steps is None else stage.max_steps * stage.batch_size / examples
    return {
        "epochs": min(stage.epochs, last),
        "examples_per_second": rate,
        "loaders": loaders(measured),
        "epoch_seconds": training + validation,
        "validation_seconds": validation,
        "example_bytes": read,
        "bytes_per_second": read * rate,
        "online": is_online(stage),
        "online_seconds": examples * sum(spoken[teacher] for teacher in heard) / P
        if signals_needed(stage.losses)
        else None,
        "break_even_epoch": None,
    }


def loaders(measured: Mapping[str, Any]) -> int:
    """How many loader processes read as fast as the rest of a step goes; see `rehearsal.stage_time`."""
    rest = measured["step_seconds"] - min(measured["wait_seconds"], 0.99 * measured["step_seconds"])
    return math.ceil(measured["read_seconds"] * measured["rows"] / rest)


def reading(
    examples: int,
    found: Mapping[str, Any],
    signals: Sequence[Mapping[str, Any]],
    start: Mapping[str, float],
    rate: float,
    repeats: int = 1,
) -> dict[str, Any]:
    """What reading so many training examples comes to, at a `rate` a second: those that are packed by the plan `found`,
    and the signals of some plans. Each is read once for `repeats` views.

    `index_bytes` that each machine holds. `start_seconds` for reading the manifests, before the first batch of each
    process, and `index_seconds` for opening all indexes. From an object store each process makes `start_requests`
    before its first batch, for `start_bytes`, and all together `epoch_requests` and so many a second: `remote` asks for
    each example and each row alone. Or a machine fetches the shards whole: `whole_bytes`, in `whole_requests`.
    """
    files, told = found["training_files"], [one["training_files"] for one in signals]
    shards, folders = files["shards"], [1, *(one["signal_folders"] for one in told)]
    kinds = [(files, "packed"), *((one, "signals") for one in told)]
    indexes, listed = (sum(one[what][kind] for one, kind in kinds) for what in ("index_bytes", "manifest_bytes"))
    held = [found["example_bytes"]["packed"] * examples]
    held += [one["split_bytes"][places.TRAINING_SPLIT] for one in signals]
    requests = found["example_requests"] - 1 + 1 / repeats + sum(one["row_reads"] for one in told)
    return {
        "index_bytes": indexes,
        "start_seconds": start["listed_seconds"] * shards * sum(folders),
        "index_seconds": (start["index_seconds"] * examples + start["opened_seconds"] * shards) * sum(folders),
        "start_requests": sum(folders) * (MANIFEST_REQUESTS + SHARD_REQUESTS * shards),
        "start_bytes": indexes + listed,
        "epoch_requests": requests * examples,
        "requests_per_second": requests * rate,
        "whole_bytes": sum(held),
        "whole_requests": shards
        * sum(count * math.ceil(one / (count * shards * CHUNK)) for one, count in zip(held, folders, strict=True)),
    }


def busiest(sizes: Sequence[int], processes: int) -> int:
    """Examples of the process that has most to do: each takes every so-manieth shard."""
    return max(sum(sizes[first::processes]) for first in range(processes))


def sentences(found: Mapping[str, Any]) -> list[str]:
    """An outlook in words."""
    measured, P = found["measured"], found["processes"]
    cache, share = measured["cache"], f" on each of {P} processes" if P > 1 else ""
    divided = f", of whose time each of {P} takes a part" if P > 1 else ""
    lines = [
        f"measured here ({measured['device']}, one process{divided}): {cache['rows']:,} views read, replayed, run "
        f"through the teacher and written in {cache['seconds']:.2f} s, {cache['rows'] / cache['seconds']:,.1f} in each",
        f"caching takes {duration(found['cache_seconds'])}{share}",
    ]
    if len(found["teachers"]) > 1:
        lines += [f"  {name}: {duration(one)}" for name, one in found["teachers"].items()]
    for name, one in found["stages"].items():
        its = measured["stages"][name]
        lines.append(
            f"{name}: a step of {its['rows']} examples took {1e3 * its['step_seconds']:,.1f} ms ({its['steps']} were "
            f"measured), reading included; an epoch takes {duration(one['epoch_seconds'])}, of it "
            f"{duration(one['validation_seconds'])} validation, and reads {one['bytes_per_second'] / 1e6:,.2f} MB/s, "
            f"{one['example_bytes']:,.0f} bytes an example"
        )
        lines.append(
            f"  to read an example takes a process {1e3 * its['read_seconds']:,.2f} ms, so {one['loaders']:,} "
            f"(data.workers) keep{'s' * (one['loaders'] == 1)} up with the rest of the step"
            f"{' on each' if P > 1 else ''}; here it waited {its['wait_seconds'] / its['step_seconds']:.0%} of its time"
        )
        lines.append(
            f"  each process takes {duration(one['start_seconds'])} for manifests before its first batch and "
            f"{duration(one['index_seconds'])} to open {volume(one['index_bytes'])} of indexes; from an object store "
            f"an epoch is {one['epoch_requests']:,.0f} requests, {one['requests_per_second']:,.0f} a second, after "
            f"{one['start_requests']:,} for each process to start, or with data.local_cache each machine fetches "
            f"{volume(one['whole_bytes'])} once, in {one['whole_requests']:,} requests"
        )
        if one["break_even_epoch"] is not None:
            takes = "takes, of these" if one["online"] else "would take, beside these"
            lines.append(
                f"  a teacher in the loop {takes}, {duration(one['online_seconds'])} an epoch: caching has paid for "
                f"itself {paid_by(one['break_even_epoch'], one['epochs'])}"
            )
    if found["online_seconds"]:
        seeds = f" with {found['seeds']} seeds" if found["seeds"] > 1 else ""
        lines.append(
            f"all stages that listen{seeds}: {duration(found['online_seconds'])} of teacher in the loop, "
            f"{duration(found['cache_seconds'])} from a cache"
        )
    return lines


def paid_by(epoch: int, epochs: float) -> str:
    """When caching has taken less time than a teacher in the loop of a stage of so many epochs."""
    if epoch <= epochs:
        return f"after epoch {epoch:,}, of {epochs:,.4g}"
    return f"after {epoch:,} epochs, more than the {epochs:,.4g} of one run: with further seeds, or another student"


def volume(size: float) -> str:
    """Bytes as one reads them."""
    unit = next((unit for unit in ("TB", "GB", "MB") if size >= UNITS[unit]), "KB")
    return f"{size / UNITS[unit]:,.3g} {unit}"


def duration(seconds: float) -> str:
    """Seconds as one reads them."""
    if seconds < 0.001:
        return "less than a millisecond"
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"
