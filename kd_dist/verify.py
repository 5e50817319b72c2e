"""Re-run the live teacher on a sample of a cache and compare: the proof that stored signals belong to these pixels."""

from typing import Any

import numpy as np
import torch

from kd_dist import assemble
from kd_dist.data import Shards, read_examples
from kd_dist.errors import ShardError
from kd_dist.plan import mix, permute
from kd_dist.recipe import Recipe
from kd_dist.signals import error_report, measured_error, merge_errors
from kd_dist.views import input_crc, replay

BATCH = 64
TOLERANCE = 1e-4  # nat, mean KL(live || cached) at T = 1; other hardware moves logits by far less


def verify(recipe: Recipe, split: str, sample: int, seed: int = 0) -> dict[str, Any]:
    """Check every shard's sha256, then compare `sample` examples of a split, one stored view each.

    Returns the examples compared, the keys whose pixels have another CRC than the teacher saw, the share of equal top
    classes, the error of the cached against the live logits (`error_report`), what the manifest states for its codec,
    and `ok`: every CRC equal and a mean KL within TOLERANCE of the codec's own.
    """
    examples = assemble.examples(recipe, split)
    cache = assemble.signals(recipe, split, examples)
    for shards in (examples, cache):
        refuse_damaged(shards)
    kept = np.setdiff1d(np.arange(len(examples)), cache.quarantined)
    if not len(kept):
        raise ShardError(f"{cache.folder}: every example is quarantined; there is nothing to compare")
    ids = kept[permute(np.arange(min(sample, len(kept))), len(kept), mix(seed))]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network, decode = assemble.teacher_network(recipe).to(device), assemble.decoder(recipe)
    strangers, agreed, errors = [], 0, []
    for chosen in np.array_split(ids, -(-len(ids) // BATCH)):
        rows = cache.rows(chosen, mix(seed, chosen) % np.uint64(cache.views))
        pixels = np.empty((len(chosen), *recipe.views.shape, 3), np.uint8)
        for place, example in enumerate(read_examples(examples, chosen, decode)):
            pixels[place] = replay(example.image, rows["view"][place], recipe.views.shape)
            if input_crc(pixels[place]) != rows["input_crc"][place]:
                strangers.append(example.key)
        with torch.inference_mode():
            live = network(torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2)).float().cpu().numpy()
        cached = cache.codec.decode(rows)
        agreed += int((live.argmax(1) == cached.argmax(1)).sum())
        errors.append(measured_error(live, cached))
    error, stated = error_report(merge_errors(errors)), cache.manifest["codec_error"]["logits"]
    return {
        "split": split,
        "examples": len(ids),
        "other_pixels": strangers,
        "top_class_agreement": agreed / max(len(ids), 1),
        "error": error,
        "codec_error": stated,
        "ok": not strangers and error["mean_kl_t1"] <= stated["mean_kl_t1"] + TOLERANCE,
    }


def refuse_damaged(shards: Shards) -> None:
    """Raise a ShardError for the first shard whose bytes are not those that were written: headers count too."""
    for path, row in zip(shards.paths, shards.manifest["shards"], strict=True):
        if not path.is_file() or assemble.file_digest(path) != row["sha256"]:
            raise ShardError(
                f"{path}: is missing or damaged, its sha256 is not the manifest's; delete it and run the command that "
                f"wrote it again (kd-dist pack or kd-dist cache-teacher)"
            )


def sentence(found: dict[str, Any]) -> str:
    """The outcome in words."""
    error, n = found["error"], found["examples"]
    line = f"{found['split']}: {n} examples, top class equal in {found['top_class_agreement']:.1%}, mean KL "
    line += f"{error['mean_kl_t1']:.1e} nat (codec {found['codec_error']['mean_kl_t1']:.1e}), largest difference "
    line += f"{error['max_abs']:.1e}"
    if found["other_pixels"]:
        line += (
            f"; {len(found['other_pixels'])} with other pixels than the teacher saw, first '{found['other_pixels'][0]}'"
        )
    return f"{line}: " + ("the cache is this teacher's" if found["ok"] else "NOT this teacher's; cache it again")
