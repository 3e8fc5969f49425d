"""Opens the files of a model: a config as Hugging Face writes it, and tensors under Hugging Face's names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_infer.models.registry import family, gguf_family
from llm_infer.models.text_part import TextTensors, text_class, text_config
from llm_infer.weights.gguf import GGUFFile
from llm_infer.weights.gguf_adapter import GGUFSource, gguf_to_hf_config
from llm_infer.weights.orbax_checkpoint import Checkpoint
from llm_infer.weights.safetensors_files import SafetensorsSource
from llm_infer.weights.sources import ModelSource, read_json
from llm_infer.weights.tensor_source import TensorSource

GGUF_TOKENIZER = "gguf_tokenizer.json"
"""File, in a checkpoint made from a GGUF file, that holds that file's metadata on its tokenizer."""

_HF_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json", "generation_config.json"),
    *("chat_template.jinja", "additional_chat_templates/*.jinja"),
)


@dataclass(frozen=True, slots=True)
class OpenModel:
    """A model whose files are open and whose header is checked; no weight has been read.

    Attributes:
        source: where it is.
        config: as in Hugging Face's config.json; for a checkpoint, `architectures` and the fields of `ModelConfig`.
        tensors: the weights under Hugging Face names; for a checkpoint, the stacked parameters.
        gguf: the GGUF file (its metadata hold tokenizer and chat template), or None for a directory.
        checkpoint: the checkpoint, or None for other kinds.
        note: what the user should know of the files; None for nothing.
    """

    source: ModelSource
    config: dict[str, Any]
    tensors: TensorSource
    gguf: GGUFFile | None
    checkpoint: Checkpoint | None = None
    note: str | None = None

    @property
    def tokenizer_metadata(self) -> Mapping[str, Any] | None:
        """GGUF metadata from which the tokenizer is built: of this file, or of the one from which a checkpoint was made."""
        if self.gguf is not None:
            return self.gguf.metadata
        stored = None if self.checkpoint is None else self.checkpoint.tokenizer_directory / GGUF_TOKENIZER
        return read_json(stored) if stored is not None and stored.is_file() else None

    @property
    def tokenizer_directory(self) -> Path:
        """The directory of the tokenizer's files, for models without GGUF metadata."""
        return self.source.path if self.checkpoint is None else self.checkpoint.tokenizer_directory


def open_model(source: ModelSource) -> OpenModel:
    """Opens the files of a model and reads its config.

    Raises:
        ModelError: a file is damaged, or the architecture is not supported.
    """
    if source.kind == "gguf":
        file = GGUFFile(source.path)
        return OpenModel(source, *gguf_model(file), file)
    if source.kind == "orbax":
        checkpoint = Checkpoint(source.path)
        config = {"architectures": [checkpoint.model.get("architecture")], **checkpoint.model}
        return OpenModel(source, config, checkpoint, None, checkpoint)
    config, tensors = read_json(source.path / "config.json"), SafetensorsSource.from_directory(source.path)
    if (hf_class := text_class(config)) is not None:
        found = TextTensors(tensors)
        left_out = f"{config['architectures'][0]}: its text model is loaded, without what reads pictures or sound"
        return OpenModel(source, text_config(config, hf_class), found, None, note=left_out)
    arranged = getattr(family(config), "tensors", None)
    return OpenModel(source, config, tensors if arranged is None else arranged(tensors), None)


def gguf_model(file: GGUFFile) -> tuple[dict[str, Any], GGUFSource]:
    """Returns the config and the tensors of a GGUF file.

    Raises:
        ModelError: the architecture is not supported, or the metadata are not understood.
    """
    name = file.require("general.architecture", str)
    hf_class, names = gguf_family(name, bool(file.metadata.get(f"{name}.expert_count")), str(file.path))
    return gguf_to_hf_config(file, hf_class, names), GGUFSource(file, names)


def tokenizer_files(opened: OpenModel) -> dict[str, bytes]:
    """Returns what a checkpoint needs to build the same tokenizer and chat template: relative path → content.

    GGUF metadata is kept as it is: a tokenizer.json cannot say which ids stand in for missing byte tokens, which
    tokens end an answer, or that the vocabulary ends before those stand-ins.
    """
    if (metadata := opened.tokenizer_metadata) is not None:
        kept = {
            key: value.tolist() if hasattr(value, "tolist") else value
            for key, value in metadata.items()
            if key.startswith("tokenizer.") or key == "general.name"
        }
        return {GGUF_TOKENIZER: json.dumps(kept, ensure_ascii=False).encode()}
    directory = opened.tokenizer_directory
    found = [file for pattern in _HF_TOKENIZER for file in sorted(directory.glob(pattern))]
    return {file.relative_to(directory).as_posix(): file.read_bytes() for file in found}


def end_ids(opened: OpenModel, vocab_size: int) -> set[int]:
    """Returns the ids that end a sequence, as the files beside the tokenizer say it."""
    found: list[Any] = []
    if opened.tokenizer_metadata is not None:
        found.append(opened.tokenizer_metadata.get("tokenizer.ggml.eos_token_id"))
    elif opened.tokenizer_directory is not None:
        for name in ("config.json", "generation_config.json"):
            file = opened.tokenizer_directory / name
            found.append(read_json(file).get("eos_token_id") if file.is_file() else None)
    ids = [each for one in found for each in (one if isinstance(one, list) else [one])]
    return {int(each) for each in ids if isinstance(each, int | np.integer) and 0 <= each < vocab_size}
