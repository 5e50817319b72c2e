"""Examples that others wrote: which of their members are the image and the label."""

import json
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from kd_dist.errors import DataError

SHOWN = 20  # extensions in a sentence
_INTEGER = re.compile(rb"\s*[+-]?[0-9]{1,18}\s*")


class Members(NamedTuple):
    """What to take of an example. Extensions are compared in lower case, as webdataset does."""

    image: tuple[str, ...]  # extensions of images; of several in an example the first of these is taken
    label: str  # the extension of an ASCII integer, or `json:field`, a field of a JSON object

    @property
    def label_extension(self) -> str:
        """The extension of the member that holds the label."""
        return self.label.partition(":")[0]

    def found(self, contents: Mapping[str, bytes | memoryview]) -> tuple[str, bytes | memoryview, Any]:
        """The image's format, its bytes, and the label of an example {extension: content}.

        Raises DataError when one of them is not there, or the label cannot be read; what it says is not checked.
        """
        folded = {extension.lower(): content for extension, content in contents.items()}
        image = next((extension for extension in self.image if extension in folded), None)
        if image is None:
            raise DataError(f"it has no image, only {', '.join(sorted(folded))}")
        if self.label_extension not in folded:
            raise DataError(f"it has no label '{self.label_extension}', only {', '.join(sorted(folded))}")
        return image.rpartition(".")[2], folded[image], self._label(folded[self.label_extension])

    def packed(self, key: str, contents: Mapping[str, bytes | memoryview]) -> dict[str, bytes | memoryview]:
        """The example as `kd-dist pack` would have written it. Raises DataError that names the key."""
        try:
            extension, image, label = self.found(contents)
        except DataError as error:
            raise DataError(f"example '{key}': {error}; correct the tar and index it again") from error
        return {extension: image, "json": json.dumps({"label": label}).encode()}

    def problem(self, examples: Collection[tuple[str, Collection[str]]]) -> str | None:
        """What keeps all of a tar's examples, (key, extensions), from being used, and what to do; None: nothing."""
        if not examples:
            return "holds no example; take it out of data.options"
        held: set[str] = set()
        for key, extensions in examples:
            folded = {extension.lower() for extension in extensions}
            held |= folded
            for prefix in sorted({extension.rpartition(".")[0] for extension in folded} - {""}):
                inner = [f"{prefix}.{name}" for name in self.image if f"{prefix}.{name}" in folded]
                if inner and f"{prefix}.{self.label_extension}" in folded:
                    return (
                        f"'{key}.{inner[0]}' and its label are of an example of their own, but a key ends at its first "
                        f"dot, so webdataset merges them into '{key}'; write the tar again with keys without dots"
                    )
        for option, wanted in (("image", self.image), ("label", (self.label_extension,))):
            if not held & set(wanted):
                names = ", ".join(sorted(held)[:SHOWN])
                return f"no example has the {option} '{';'.join(wanted)}', only {names}; set data.options.{option}"
        return None

    def _label(self, content: bytes | memoryview) -> Any:
        extension, _, field = self.label.partition(":")
        content = bytes(content)
        if not field:
            if not _INTEGER.fullmatch(content):
                raise DataError(f"its label '{extension}' is {content[:40]!r}, no whole number")
            return int(content)
        try:
            record = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise DataError(f"its label '{extension}' is no JSON ({error})") from error
        if not isinstance(record, dict) or field not in record:
            raise DataError(f"its label '{extension}' is JSON without a field '{field}'")
        return record[field]
