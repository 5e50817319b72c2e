"""What the manifests of a recipe's caches must say: who the teacher is, which views, how they are stored; and the
caches that say so, with what was added to them."""

import functools
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from kd_dist import manifest, places
from kd_dist.checkpoint import best_digest, read_record
from kd_dist.config import to_dict
from kd_dist.disk import file_digest
from kd_dist.errors import DataError, MismatchError, ShardError
from kd_dist.extract import NOTED, STEM
from kd_dist.folders import Shards
from kd_dist.losses import LOSSES, suits
from kd_dist.losses.served import exactly, nearly
from kd_dist.models import Network, weights_digest
from kd_dist.policies import split_policy, task
from kd_dist.recipe import Recipe
from kd_dist.remote import Remote
from kd_dist.rows import AGAIN, LOGITS, LayeredSignals, Signals, SignalShards, span
from kd_dist.shards import Shard, shard_path
from kd_dist.signals import add_sums, codec_of
from kd_dist.tasks import Task
from kd_dist.views import ImageViews


def best_sha256(recipe: Recipe, name: str) -> str:
    """The digest of the best weights of a stage that has ended. Raises TrainingError when they are lost, or not those
    that its result tells of."""
    folder = places.stage_folder(recipe, name)
    return best_digest(folder / places.BEST, read_record(folder / places.RESULT).get("best_sha256"))


def weights_sha256(recipe: Recipe, reference: str | None) -> str | None:
    """The digest of the file that `reference` means; None when there is none. Raises TrainingError for weights that are
    not those that their stage ended with."""
    file = places.weights_file(recipe, reference)
    if file is None or not file.is_file():
        return None
    if reference.startswith(places.STAGE_REFERENCE) and places.weights_ready(recipe, reference):
        return best_sha256(recipe, reference.removeprefix(places.STAGE_REFERENCE))
    return file_digest(file)


def teacher_identity(recipe: Recipe, built: Network | None = None) -> dict[str, Any]:
    """Who the teacher is, for a manifest. The digest is of the weights file, or of `built` where there is no file;
    None when neither is at hand (a machine that only trains)."""
    t = recipe.teacher
    file = places.weights_file(recipe, t.weights)
    digest = weights_sha256(recipe, t.weights)
    if file is None and built is not None:
        digest = weights_digest(built)
    kind = "file" if file is not None else t.weights or f"random, seed {t.seed}"
    described = {name: getattr(t, name) for name in ("name", "model", "options", "image_size", "mean", "std")}
    if t.head is not None:  # one without a head is described as it always was
        described["head"] = to_dict(t.head)
    return {**described, "weights": kind, "weights_sha256": digest}


class Piece(NamedTuple):
    """One folder of a cache: a rectangle of views and what is stored of each of them."""

    number: int  # of the folder: 0 is the first, others were added
    first: int  # view of an example
    count: int  # views
    stored: frozenset[str]  # LOGITS, and features by name
    about: dict[str, Any] | None  # the manifest; None where it is yet to be begun

    @property
    def words(self) -> str:
        """What it holds."""
        return f"{', '.join(sorted(self.stored))} of views {self.first} to {self.first + self.count - 1}"


def folders(recipe: Recipe, split: str) -> Iterator[tuple[int, Path | Remote]]:
    """The folders with a manifest of a teacher's signals of a split, finished or not, by number. Under a URL, where no
    folder is listed, the first, which is not looked for, and others up to a number that is not there."""
    first = places.signals_folder(recipe, split)
    numbers: Iterable[int] = itertools.count()
    if isinstance(first, Path):
        ends = [path.name.removeprefix(f"{first.name}.") for path in first.parent.glob(f"{first.name}.*")]
        numbers = [0, *sorted(int(end) for end in ends if re.fullmatch("[1-9][0-9]*", end))]
    for number in numbers:
        folder = places.signals_folder(recipe, split, number)
        remote = isinstance(folder, Remote)
        if (remote and number == 0) or (folder / manifest.FILE_NAME).is_file():
            yield number, folder
        elif remote:
            return


def every_folder(recipe: Recipe) -> dict[str, Path | Remote]:
    """The folders of a recipe's cache by split, and what was added to them as `<split>.<number>`."""
    found = {}
    for split in places.cached_splits(recipe):
        found[split] = places.signals_folder(recipe, split)
        found |= {f"{split}.{number}": folder for number, folder in folders(recipe, split) if number}
    return found


def pieces(recipe: Recipe, split: str, features: Collection[str] | None = None) -> list[Piece]:
    """What holds the logits and these features, all of the recipe's by default, of a split's views: folders that are
    there, finished or begun, and then those that are yet to be begun: as few as cover what is missing without the
    teacher being run on a view twice."""
    wanted = {LOGITS, *(codec_identity(recipe, split)["features"] if features is None else features)}
    lacking = [(0, max(1, places.stored_views(recipe, split)), wanted)]  # of views from one to before another
    found, taken = [], set()
    for number, folder in folders(recipe, split):
        taken.add(number)
        piece = _piece_of(number, folder, manifest.read_manifest(folder))
        cuts = [cut for span in lacking for cut in _cut(*span, piece)]
        if any(need & piece.stored for _, _, need, inside in cuts if inside):
            found.append(piece)
        lacking = [(first, end, need - piece.stored if inside else need) for first, end, need, inside in cuts]
        if not any(need for _, _, need in lacking):
            return found
    free = (number for number in itertools.count() if number not in taken)
    for stored, alike in itertools.groupby(lacking, lambda span: frozenset(span[2])):
        (first, end, _), *others = alike
        end = others[-1][1] if others else end
        found += [Piece(next(free), first, end - first, stored, None)] if stored else []
    return found


def _cut(first: int, end: int, need: set[str], piece: Piece) -> Iterator[tuple[int, int, set[str], bool]]:
    """Views `first` to before `end`, cut where those of the piece begin and end, and whether it has them."""
    cuts = sorted({first, end, *(cut for cut in (piece.first, piece.first + piece.count) if first < cut < end)})
    for begin, stop in itertools.pairwise(cuts):
        yield begin, stop, need, piece.first <= begin and stop <= piece.first + piece.count


def _piece_of(number: int, folder: Path | Remote, about: dict[str, Any]) -> Piece:
    try:
        (first, count), codec = span(about), about["codec"]
        stored = frozenset([*codec["features"], *([] if codec["logits"] is None else [LOGITS])])
        if type(first) is not int or type(count) is not int or first < 0:
            raise TypeError(f"{count!r} views from {first!r} on")
    except (AttributeError, KeyError, TypeError) as error:
        raise ShardError(f"{folder}: the manifest does not say what is stored ({error!r}); {AGAIN}") from error
    return Piece(number, first, count, stored, about)


def is_finished(recipe: Recipe, split: str, piece: Piece) -> bool:
    """Whether a piece is cached, with every shard."""
    folder = places.signals_folder(recipe, split, piece.number)
    return piece.about is not None and manifest.finished(folder) is not None


def is_cached(recipe: Recipe, split: str) -> bool:
    """Whether all that a recipe wants of a split is cached."""
    if not (places.signals_folder(recipe, split) / manifest.FILE_NAME).is_file():
        return False
    return all(is_finished(recipe, split, piece) for piece in pieces(recipe, split))


def signals(recipe: Recipe, split: str, of: Shards, features: Collection[str] | None = None) -> Signals:
    """The cached logits and these features, all of the recipe's by default, of a split; of its first shards where `of`
    is those alone, which need no more than to be finished themselves. Only folders that have something of it are read.

    Raises MismatchError, naming both values, when they are not this recipe's, and DataError when some are missing.
    """
    parts, first = [], places.signals_folder(recipe, split)
    for piece in pieces(recipe, split, features):
        folder, about = places.signals_folder(recipe, split, piece.number), piece.about
        if piece.number == 0 and about is None and isinstance(folder, Path) and not folder.is_dir():
            raise DataError(f"{folder}: no cached signals; run `kd-dist cache-teacher` first")
        if about is None and piece.number == 0:
            about = manifest.read_manifest(folder)  # says what to do
        if about is None:
            raise DataError(f"{first}: lacks {piece.words}; run `kd-dist cache-teacher`, which adds what is missing")
        if of.limit is not None:
            about = limited(recipe, folder, about, of)
        cache = SignalShards(folder, of, recipe.data.on_error, about)
        refuse_others(recipe, split, cache)
        parts.append(cache)
    if len(parts) == 1:
        return parts[0]
    wanted = codec_identity(recipe, split)["features"] if features is None else features
    return LayeredSignals(parts, max(1, places.stored_views(recipe, split)), wanted)


def refuse_others(recipe: Recipe, split: str, cache: SignalShards) -> None:
    """Raise a MismatchError, naming both values, when a folder is not of this recipe. More views or features than the
    recipe's do no harm."""
    ours, theirs = manifest.plain(teacher_identity(recipe)), dict(cache.manifest["teacher"])
    if ours["weights_sha256"] is None:
        ours["weights_sha256"] = theirs["weights_sha256"]
    wanted, codec = codec_identity(recipe, split), cache.manifest["codec"]
    held = codec["features"].keys() & wanted["features"].keys()
    expected = {
        "teacher": ours,
        "views": views_identity(recipe, split, cache.first, cache.count),
        "logits": wanted["logits"] if cache.codec.fields() else None,
        "features": {name: wanted["features"][name] for name in held},
    }
    kept = {
        name: {option: value for option, value in codec["features"][name].items() if option != "shape"} for name in held
    }
    there = {"teacher": theirs, "views": cache.manifest["views"], "logits": codec["logits"], "features": kept}
    difference = manifest.first_difference(expected, there)
    if difference is not None:
        place, mine, its = difference
        raise MismatchError(
            f"{cache.folder}: was made with {place} = {its!r}, the recipe has {mine!r}; restore the recipe, or delete "
            f"the folder and run `kd-dist cache-teacher`"
        )


def limited(recipe: Recipe, folder: Path | Remote, about: Mapping[str, Any], of: Shards) -> dict[str, Any]:
    """The manifest of a folder as if it held nothing but the first shards, finished or not as a whole: what it says
    comes from their indices. Raises DataError when they are not all finished."""
    shards = []
    for number in range(of.limit):
        try:
            shards.append(Shard(folder / shard_path("", STEM, number).name))
        except ShardError as error:
            raise DataError(
                f"{folder}: {number} of the first {of.limit} shards are finished, which a stage is to learn from "
                f"(`shards`); let `kd-dist cache-teacher` go on, or lower that number"
            ) from error
    found = {"versions": {}, **about, **told(shards, about, task(recipe)), "complete": True}
    manifest.refuse_senseless(folder, found)
    return found


def told(shards: Sequence[Shard], about: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """What a manifest says of shards by their indices: the codec's measured error, the teacher's report, what could not
    be stored, and which losses the logits serve. `about` is what it said when it was begun."""
    grid, stored = about["codec"]["grid"], about["codec"]["logits"]
    codec = codec_of(task.name, stored, task.classes, grid and tuple(grid))
    sums = {name: functools.reduce(add_sums, [one.note(name) for one in shards], None) for name in NOTED}
    return {
        **(served(task, stored) if stored else {"exact_losses": [], "near_losses": []}),
        "examples": sum(len(shard) for shard in shards),
        "codec_error": {LOGITS: codec.report(sums["error"])} if stored else {},
        "overflow": sums["overflow"] or {},
        "teacher_report": sums["teacher"] and task.teacher_report(sums["teacher"]),
        "shards": [manifest.shard_entry(shard) for shard in shards],
        "quarantined": [row for number, shard in enumerate(shards) for row in _quarantined(number, shard)],
    }


def _quarantined(number: int, shard: Shard) -> Iterator[dict[str, Any]]:
    """What could not be stored of a shard, and where it is, so that nobody has to look for its keys."""
    rows = shard.note("quarantined")
    places = {key: place for place, key in enumerate(shard.keys)} if rows else {}
    for row in rows:
        yield {**row, "shard": number, "place": places[row["key"]]}


def served(task: Task, stored: str) -> dict[str, list[str]]:
    """The losses that logits which are `stored` so serve: exactly, and within the codec's measured gradient error."""
    suited = {name: row for name, row in LOSSES.items() if suits(row, task.name, task.classes)}
    return {
        kind: sorted(name for name, row in suited.items() if serves(row, stored))
        for kind, serves in (("exact_losses", exactly), ("near_losses", nearly))
    }


def codec_identity(recipe: Recipe, split: str) -> dict[str, Any]:
    """How the signals of a split are stored, as the recipe says it. Features are for training."""
    features = recipe.cache.features if places.is_trained_on(split) else {}
    return {"logits": recipe.cache.logits, "features": {name: to_dict(one) for name, one in features.items()}}


def views_identity(recipe: Recipe, split: str, first: int = 0, count: int | None = None) -> dict[str, Any]:
    """The view policy of a split as a manifest states it, for `count` views, by default the recipe's, from `first` on.
    Canonical views depend on nothing but their size."""
    views = places.stored_views(recipe, split) and (count or places.stored_views(recipe, split))
    policy = split_policy(recipe, split)
    kind = {} if policy.kind == ImageViews.kind else {"kind": policy.kind}
    kind |= {"first": first} if first else {}
    if not views:
        return {**kind, "canonical": True, "count": 1, "size": list(policy.size)}
    described = asdict(policy)
    described |= described.pop("views", {})  # what a mixed view is mixed of
    return manifest.plain({**kind, "canonical": False, "count": views, **described})
