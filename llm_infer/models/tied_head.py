"""Whether a model's head is its embedding, told from its tensors: where config and file disagree, the file is right.

As transformers 5 does it (`PreTrainedModel.tie_weights`): a head that differs from the embedding is used, and where
the file has only one of the two tensors, that is both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

from llm_infer.models.config import ModelConfig
from llm_infer.weights.rules import Rule
from llm_infer.weights.tensor_source import TensorSource

HEAD = "lm_head.weight"


@runtime_checkable
class HuggingFaceTensors(TensorSource, Protocol):
    """The tensors of a Hugging Face directory."""

    def same_values(self, name: str, other: str) -> bool:
        """Checks whether two tensors have the same shape and values."""
        ...


def own_head(config: ModelConfig, rules: Sequence[Rule], tensors: HuggingFaceTensors) -> ModelConfig:
    """Returns the configuration, without `tie_word_embeddings` where the file holds a head that is not the embedding."""
    embedding, names = embedding_name(rules), set(tensors.names)
    if not config.tie_word_embeddings or not {HEAD, embedding} <= names or tensors.same_values(HEAD, embedding):
        return config
    return replace(config, tie_word_embeddings=False)


def embedding_or_head(config: ModelConfig, rules: Sequence[Rule], tensors: HuggingFaceTensors) -> list[Rule]:
    """Returns the rules, with the embedding read from the head where they are one and the file holds it under that name."""
    embedding, names = embedding_name(rules), set(tensors.names)
    if not config.tie_word_embeddings or embedding in names or HEAD not in names:
        return list(rules)
    return [replace(rule, sources=(HEAD,)) if rule.param == "embed.weight" else rule for rule in rules]


def embedding_name(rules: Sequence[Rule]) -> str:
    """Returns the name of the embedding's tensor."""
    return next(rule.sources[0] for rule in rules if rule.param == "embed.weight")
