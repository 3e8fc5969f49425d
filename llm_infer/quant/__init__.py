"""Weights in fewer bits: how they are held, and how layers multiply with them."""

from llm_infer.quant.stored import StoredWeights

__all__ = ["StoredWeights"]
