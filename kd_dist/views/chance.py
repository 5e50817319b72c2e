"""What the views of every kind of input are drawn from: chance that depends on nothing but its arguments."""

import hashlib

import numpy as np


def uniform(seed: int, key: str, number: int, name: str) -> float:
    """A number in [0, 1), a pure function of its arguments: 53 bits of a BLAKE2b digest."""
    # The key stands last and the others hold no slash at their joints, so no two sets of arguments share a text.
    text = f"{seed}/{number}/{name}/{key}".encode()
    digest = hashlib.blake2b(text, digest_size=8, person=b"kd_dist.views").digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def record(dtype: np.dtype, *values: object) -> np.void:
    """One record of `dtype`, of values in the order of its fields, with its padding zeroed."""
    made = np.zeros((), dtype)
    made[()] = values
    return made[()]
