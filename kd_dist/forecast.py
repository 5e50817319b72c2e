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

SECONDS = 5.0  # that each measurement takes, about


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

    `cache_seconds` for caching every split; of each student's stage the seconds and the bytes of an epoch, and, where
    it listens to a teacher, the seconds that one in the loop takes more in an epoch, and the epoch after which caching
    has taken less; `online_seconds`, what that comes to over all such stages, seeds and epochs.
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
    partners = recipe.views.mixed if recipe.views.is_mixed else 0.0
    read = found["example_bytes"]["packed"] * (1 + partners)
    read += sum(rows[teacher] for teacher in heard) if reads_cache(stage) else 0
    training, validation = examples / rate, judged * measured["validation_seconds"] / P
    last = math.inf if stage.max_steps is None else stage.max_steps * stage.batch_size / examples
    return {
        "epochs": min(stage.epochs, last),
        "examples_per_second": rate,
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


def busiest(sizes: Sequence[int], processes: int) -> int:
    """Examples of the process that has most to do: each takes every so-manieth shard."""
    return max(sum(sizes[first::processes]) for first in range(processes))


def sentences(found: Mapping[str, Any]) -> list[str]:
    """An outlook in words."""
    measured, P = found["measured"], found["processes"]
    cache, share = measured["cache"], f" on each of {P} processes" if P > 1 else ""
    lines = [
        f"measured here ({measured['device']}, one process): {cache['rows']:,} views read, replayed, run through the "
        f"teacher and written in {cache['seconds']:.2f} s, {cache['rows'] / cache['seconds']:,.1f} a second",
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
        if one["break_even_epoch"] is not None:
            takes = "takes, of these" if one["online"] else "would take, beside these"
            lines.append(
                f"  a teacher in the loop {takes}, {duration(one['online_seconds'])} an epoch: caching has paid for "
                f"itself after epoch {one['break_even_epoch']:,}, of {one['epochs']:,.4g}"
            )
    if found["online_seconds"]:
        seeds = f" with {found['seeds']} seeds" if found["seeds"] > 1 else ""
        lines.append(
            f"all stages that listen{seeds}: {duration(found['online_seconds'])} of teacher in the loop, "
            f"{duration(found['cache_seconds'])} from a cache"
        )
    return lines


def duration(seconds: float) -> str:
    """Seconds as one reads them."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"
