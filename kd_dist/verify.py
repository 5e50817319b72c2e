"""Re-run the live teacher on a sample of a cache and compare: the proof that stored signals belong to these pixels."""

import itertools
from typing import Any

import numpy as np
import torch

from kd_dist import assemble, caches, policies
from kd_dist.calibrate import stored
from kd_dist.compress import feature_error, feature_report
from kd_dist.disk import file_digest
from kd_dist.errors import ShardError
from kd_dist.folders import Shards, read_examples, with_partners
from kd_dist.loader import on_device
from kd_dist.plan import mix, permute
from kd_dist.recipe import Recipe
from kd_dist.remote import Remote
from kd_dist.shards import mend
from kd_dist.signals import add_sums
from kd_dist.teacher import repeatable
from kd_dist.views import input_crc, replayed
from kd_dist.views.mixed import partners_of

# How far the live teacher may be from the cached one beyond the codec's own error; other hardware moves it far less.
TOLERANCES = {"mean_kl_t1": 1e-4, "mean_square": 1e-6}  # nat, of KL(live || cached) at T = 1; of regression's outputs
FEATURE_TOLERANCE = 0.02  # relative error; other hardware turns a few int8 steps, another teacher is off by 1


def verify(recipe: Recipe, split: str, sample: int, seed: int = 0) -> dict[str, Any]:
    """Check every shard's sha256, then compare `sample` examples of a split, one stored view of each folder, with the
    recipe's first teacher.

    Returns the examples compared, the keys whose pixels have another CRC than the teacher saw, the error of the cached
    against the live logits (the codec's `report`), what the manifest states for their codec, that of the cached
    features against what their codec makes of the live ones (`feature_report`), and `ok`: every CRC equal, a mean KL,
    or square, within TOLERANCES of the codec's own, each feature's relative error within FEATURE_TOLERANCE.
    """
    examples = assemble.examples(recipe, split)
    cache = caches.signals(recipe, split, examples)
    for shards in (examples, *cache.parts):
        refuse_damaged(shards)
    kept = np.setdiff1d(np.arange(len(examples)), cache.quarantined)
    if not len(kept):
        raise ShardError(f"{cache.folder}: every example is quarantined; there is nothing to compare")
    ids = kept[permute(np.arange(min(sample, len(kept))), len(kept), mix(seed))]
    repeatable()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    codecs = {name: codec for name, codec in cache.features.items() if name in recipe.cache.features}
    teacher, decode = assemble.teacher(recipe, codecs).to(device), assemble.task(recipe).decode
    codecs = on_device(codecs, device)
    policy = policies.split_policy(recipe, split)
    strangers, sums, features = [], None, dict.fromkeys(codecs)
    chunks = np.array_split(ids, -(-len(ids) // recipe.cache.batch_size))
    for part, chosen in itertools.product(cache.parts, chunks):
        count = min(part.views, cache.views) - part.first  # of its views those that are served
        rows = cache.rows(chosen, part.first + (mix(seed, chosen) % np.uint64(count)).astype(np.int64))
        pixels = np.empty((len(chosen), *policy.size, policy.channels), np.uint8)
        shown = read_examples(examples, chosen, decode)
        shown = with_partners(examples, shown, chosen, partners_of(rows["view"]), decode)
        for place, example in enumerate(shown):
            pixels[place] = replayed(policy, example, rows["view"][place])
            if input_crc(pixels[place]) != rows["input_crc"][place]:
                strangers.append(example.key)
        live = teacher(torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2))
        sums = add_sums(sums, cache.codec.error(live.logits.cpu().numpy(), cache.codec.decode(rows)))
        for name, codec in codecs.items():
            fields = {field: torch.from_numpy(rows[field].copy()).to(device) for field, *_ in codec.fields()}
            anew = stored(codec, live.features[name], rows["input_crc"])
            features[name] = add_sums(features[name], feature_error(anew, codec.decode(fields)))
    error, stated, drift = cache.codec.report(sums), cache.manifest["codec_error"]["logits"], cache.codec.drift
    reports = {name: feature_report(sums) for name, sums in features.items()}
    return {
        "teacher": recipe.teacher.name,
        "split": split,
        "examples": len(ids),
        "other_pixels": strangers,
        "error": error,
        "codec_error": stated,
        "features": reports,
        "ok": not strangers
        and error[drift] <= stated[drift] + TOLERANCES[drift]
        and all(one["relative_error"] <= FEATURE_TOLERANCE for one in reports.values()),
    }


def refuse_damaged(shards: Shards) -> None:
    """Raise a ShardError for the first shard whose bytes are not those that were written: headers count too."""
    for number, (path, row) in enumerate(zip(shards.paths, shards.manifest["shards"], strict=True)):
        if isinstance(path, Remote):
            path.fetch(shards.shard(number).tar_bytes, row["sha256"])
        elif not path.is_file() or file_digest(path) != row["sha256"]:
            raise ShardError(
                f"{path}: is missing or damaged, its sha256 is not the manifest's; {mend(path)}"
            )
        shards.shard(number)  # its index is whole, and holds as many examples as the manifest says


def sentence(found: dict[str, Any]) -> str:
    """The outcome in words."""
    error, n = found["error"], found["examples"]
    line = f"{found['split']}: {n} examples, "
    if "mean_square" in error:
        line += f"mean squared difference {error['mean_square']:.1e} (codec {found['codec_error']['mean_square']:.1e})"
    else:
        line += f"top class equal in {error['top_class_agreement']:.1%}, mean KL {error['mean_kl_t1']:.1e} nat "
        line += f"(codec {found['codec_error']['mean_kl_t1']:.1e})"
    line += f", largest difference {error['max_abs']:.1e}"
    for name, one in found["features"].items():
        line += f", {name} off by {one['relative_error']:.1e}"
    if found["other_pixels"]:
        line += (
            f"; {len(found['other_pixels'])} with other pixels than the teacher saw, first '{found['other_pixels'][0]}'"
        )
    return f"{line}: " + ("the cache is this teacher's" if found["ok"] else "NOT this teacher's; cache it again")
