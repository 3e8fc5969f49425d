"""A model in several GGUF files, NAME-00001-of-00003.gguf and so on: the first has the metadata, all have tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_infer.base.errors import ModelError

PART_NAME = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})")
"""Name of a part, without the ending."""


def other_parts(path: Path, metadata: Mapping[str, Any]) -> list[Path]:
    """Returns the files that the first one of a model needs beside it, in order; none for a model in one file.

    Raises:
        ModelError: the file is a later part, or does not have the name of a part.
    """
    count = metadata.get("split.count", 0)
    if not isinstance(count, int) or count <= 1:
        return []
    found = PART_NAME.fullmatch(path.name.removesuffix(".gguf"))
    if found is None or int(found["count"]) != count:
        raise ModelError(
            f"{path}: one of {count} parts of a model: expected a name that ends in -00001-of-{count:05}.gguf"
        )
    names = [path.with_name(f"{found['stem']}-{part:05}-of-{count:05}.gguf") for part in range(1, count + 1)]
    if int(found["part"]) != 1:
        raise ModelError(f"{path}: part {int(found['part'])} of {count} of a model: give the first, {names[0]}")
    return names[1:]


def check_part(path: Path, number: int, first: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Raises ModelError unless a file says that it is this part (from 0) of the same number of parts."""
    for key, expected in (("split.count", first["split.count"]), ("split.no", number)):
        if (value := metadata.get(key)) != expected:
            raise ModelError(f"{path}: metadata {key}={value!r:.80}, expected {expected}: a file of another model?")
