"""Which GGUF files of a repository make one model, and which model is meant, told from the names of the files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from llm_infer.base.errors import ModelError
from llm_infer.base.sizes import size
from llm_infer.weights.gguf_parts import PART_NAME

PREFERRED = "Q4_K_M"
"""The type that is taken where none is named, as in llama.cpp."""

_TYPE = re.compile(
    r"(?<![A-Z0-9])(?:UD-)?(?:I?Q\d(?:_[A-Z0-9]+)*|TQ\d_\d|MXFP4(?:_MOE)?|NVFP4|BF16|F16|F32|FP16|FP32)(?![A-Z0-9])"
)
_NO_MODELS = ("mmproj", "imatrix")
"""Beginnings and ends of names of files that accompany a model: image encoders, statistics of the quantisation."""


@dataclass(frozen=True, slots=True)
class GGUFModel:
    """A model in one GGUF file or in several parts.

    Attributes:
        stem: path of the files without the number of the part and the ending.
        files: paths of its files, first part first.
        num_bytes: size of all of them.
        missing: parts that are not there.
    """

    stem: str
    files: tuple[str, ...]
    num_bytes: int
    missing: int = 0

    @property
    def quantisation(self) -> str:
        """The type that the file's name tells, such as Q4_K_M, else the name itself."""
        found = _TYPE.findall(self.name.upper())
        return found[-1] if found else self.name

    @property
    def name(self) -> str:
        """The file's name without directory, number of the part and ending."""
        return PurePosixPath(self.stem).name

    def is_called(self, quantisation: str) -> bool:
        """Says whether it has this type or this name, in letters of either case."""
        asked = quantisation.removesuffix(".gguf").upper()
        return asked in (self.quantisation.upper(), self.name.upper(), self.stem.upper())


def gguf_models(sizes: Mapping[str, int]) -> list[GGUFModel]:
    """Returns the models among the files of a repository, given as path → bytes, in the order of their sizes."""
    groups: dict[str, dict[int, str]] = {}
    counts: dict[str, int] = {}
    for path in sorted(sizes):
        if not path.lower().endswith(".gguf"):
            continue
        whole = path[: -len(".gguf")]
        parts = PART_NAME.fullmatch(whole)
        stem = whole if parts is None else parts["stem"]
        name = PurePosixPath(stem).name.lower()
        if name.startswith(_NO_MODELS) or name.endswith(_NO_MODELS):
            continue
        groups.setdefault(stem, {})[1 if parts is None else int(parts["part"])] = path
        counts[stem] = 1 if parts is None else int(parts["count"])
    found = [
        GGUFModel(
            stem,
            tuple(files[part] for part in sorted(files)),
            sum(sizes[path] for path in files.values()),
            missing=counts[stem] - len(files),
        )
        for stem, files in groups.items()
    ]
    return sorted(found, key=lambda model: (model.num_bytes, model.stem))


def labels(models: list[GGUFModel]) -> list[str]:
    """Returns what to call each model of a repository: its type, or its name where several have the same type."""
    types = [model.quantisation for model in models]
    return [model.quantisation if types.count(model.quantisation) == 1 else model.name for model in models]


def choose(models: list[GGUFModel], quantisation: str | None, repo_id: str) -> GGUFModel:
    """Returns the model that is asked for; without a type Q4_K_M, or the only one.

    Raises:
        ModelError: there is none of this type or several are; the message lists what there is.
    """
    if quantisation is None and len(models) == 1:
        return models[0]
    found = [model for model in models if model.is_called(quantisation or PREFERRED)]
    if len(found) == 1:
        return _whole(found[0], repo_id)
    listed = ", ".join(
        f"{label} ({size(model.num_bytes)})" for label, model in zip(labels(models), models, strict=True)
    )
    if found:
        names = ", ".join(f"{repo_id}:{model.name}" for model in found)
        raise ModelError(
            f"hub model {repo_id!r} has several files of type {found[0].quantisation}: give one of {names}"
        )
    if quantisation is None:
        example = f"{repo_id}:{labels(models)[0]}"
        raise ModelError(f"hub model {repo_id!r} holds several types: name one, as in {example}; there are {listed}")
    there = f"there are {listed}" if models else "it has no GGUF files"
    raise ModelError(f"hub model {repo_id!r} has no GGUF file of type {quantisation!r}: {there}")


def _whole(model: GGUFModel, repo_id: str) -> GGUFModel:
    if model.missing:
        raise ModelError(
            f"hub model {repo_id!r}: {model.quantisation} lacks {model.missing} of {model.missing + len(model.files)} "
            f"parts: run `llm-infer pull {repo_id}:{model.quantisation}`"
        )
    return model
