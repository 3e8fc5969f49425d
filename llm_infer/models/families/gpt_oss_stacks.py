"""Puts the experts of gpt-oss together as its safetensors files have them: stacks of all experts, gates and ups in turn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llm_infer.models.config import ModelConfig
from llm_infer.models.names import BLOCK
from llm_infer.weights.undo_rules import Undo

_EXPERTS = BLOCK + "mlp.experts."
_MLP = "layers.mlp."


def stacks(config: ModelConfig) -> list[Undo]:
    """Says how the experts' tensors are made: matrices [X, in, out] and biases [X, out]; inverse of `ExpertTensors`."""
    assert config.moe is not None
    experts = config.moe.num_experts

    def of_experts(rows: np.ndarray) -> np.ndarray:
        return rows.reshape(experts, -1, *rows.shape[1:])

    def columns(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [np.swapaxes(of_experts(arrays[0]), 1, 2)]

    def biases(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [of_experts(arrays[0])]

    def in_turn(arrays: Sequence[np.ndarray]) -> np.ndarray:
        gate, up = map(of_experts, arrays)
        return np.stack((gate, up), axis=2).reshape(experts, -1, *gate.shape[2:])

    return [
        Undo(
            (_MLP + "gate.weight", _MLP + "up.weight"),
            (_EXPERTS + "gate_up_proj",),
            lambda arrays: [np.swapaxes(in_turn(arrays), 1, 2)],
        ),
        Undo(
            (_MLP + "gate.bias", _MLP + "up.bias"), (_EXPERTS + "gate_up_proj_bias",), lambda arrays: [in_turn(arrays)]
        ),
        Undo((_MLP + "down.weight",), (_EXPERTS + "down_proj",), columns),
        Undo((_MLP + "down.bias",), (_EXPERTS + "down_proj_bias",), biases),
    ]
