"""The JSON beside the input of an example: what is known of it."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from kd_dist.errors import DataError

MEMBER = "json"


def encoded(record: Mapping[str, Any]) -> dict[str, bytes]:
    """The member that holds `record`."""
    return {MEMBER: json.dumps(record, sort_keys=True, separators=(",", ":")).encode()}


def label_in(members: Mapping[str, bytes | memoryview]) -> Any:
    """The label of an example. Raises DataError, or ValueError for what is no JSON, when there is none."""
    return read(members)[0]


def read(members: Mapping[str, bytes | memoryview]) -> tuple[Any, Mapping[str, Any]]:
    """The label of an example and its metadata, none where it has none of ours. Raises as `label_in` does."""
    if MEMBER not in members:
        raise DataError(f"it has no {MEMBER} member, only {', '.join(sorted(members)) or 'nothing'}")
    record = json.loads(bytes(members[MEMBER]))
    if not isinstance(record, dict) or "label" not in record:
        raise DataError(f"its {MEMBER} member has no 'label'")
    metadata = record.get("metadata")
    return record["label"], metadata if isinstance(metadata, dict) else {}


@contextlib.contextmanager
def naming(key: str) -> Iterator[None]:
    """What an example of a shard cannot be used for becomes a DataError that names its key."""
    try:
        yield
    except (DataError, ValueError, RecursionError) as error:
        raise DataError(f"example '{key}': {error}; correct the source and pack again") from error
