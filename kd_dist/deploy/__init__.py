"""What an app developer gets beside the model: what it takes and gives, a model card, example code for Android."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_dist.checkpoint import write_atomic
from kd_dist.deploy import golden
from kd_dist.deploy.app_code import app_code
from kd_dist.deploy.card import model_card
from kd_dist.deploy.golden import Case

__all__ = ["CARD", "INFO", "Case", "write"]

INFO = "deployment_info.json"
CARD = "MODEL_CARD.md"


def write(folder: Path, info: Mapping[str, Any], cases: Sequence[Case]) -> None:
    """Write deployment_info.json, MODEL_CARD.md, android/ and golden/ into `folder`, beside the model files that
    `info` lists. Raises KdError for cases that cannot be told apart."""
    golden.write(folder / "golden", cases)
    for name, text in app_code(info).items():
        write_atomic(folder / "android" / name, text)
    write_atomic(folder / CARD, _encodable(model_card(info)))
    write_atomic(folder / INFO, _encodable(json.dumps(info, indent=1, ensure_ascii=False, allow_nan=False) + "\n"))


def _encodable(text: str) -> str:
    """Text with the bytes of a folder's name that are no UTF-8, half a surrogate pair each, as JSON escapes them."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
