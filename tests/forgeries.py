"""Shards that are written anew with something changed in them, every CRC, digest, index and manifest made to fit."""

from collections.abc import Callable, Mapping

import numpy as np

from kd_dist import assemble, caches, manifest, places
from kd_dist.recipe import Recipe
from kd_dist.shards import Shard, write_shard
from kd_dist.signals import pack_rows, to_npy

Members = Mapping[str, bytes]


def forge_signals(recipe: Recipe, split: str, change: Callable[[str, np.ndarray], np.ndarray]) -> None:
    """Replace the rows of each example by what `change` makes of its key and rows (V,)."""
    cache = caches.signals(recipe, split, assemble.examples(recipe, split))
    content = manifest.read_manifest(cache.folder)
    for number, path in enumerate(cache.paths):
        old, made = Shard(path), []
        for place, key in enumerate(old.keys):
            ids = np.full(cache.views, cache.starts[number] + place)
            rows = change(key, cache.rows(ids, np.arange(cache.views)))
            fields = {name: rows[name].copy() for name in rows.dtype.names[3:]}
            packed = pack_rows(cache.dtype, rows["view"], rows["input_crc"], fields)
            made.append((key, {f"{cache.teacher}.npy": to_npy(packed)}))
        write_shard(path, made, old.notes)
        content["shards"][number] = manifest.shard_entry(Shard(path))
    manifest.write_manifest(cache.folder, content)


def forge_examples(recipe: Recipe, split: str, change: Callable[[str, Members], Members]) -> None:
    """Replace the members of each example by what `change` makes of its key and members; its cache is bound to them."""
    shards = assemble.examples(recipe, split)
    content = manifest.read_manifest(shards.folder)
    for number, path in enumerate(shards.paths):
        old = Shard(path)
        made = [(key, change(key, old.read(place))) for place, key in enumerate(old.keys)]
        write_shard(path, made, old.notes)
        content["shards"][number] = manifest.shard_entry(Shard(path))
    manifest.write_manifest(shards.folder, content)
    folder = places.signals_folder(recipe, split)
    bound = {"examples_fingerprint": manifest.fingerprint(content)}
    manifest.write_manifest(folder, {**manifest.read_manifest(folder), **bound})
