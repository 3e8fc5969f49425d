"""SmolLM3: Llama without rotary positions in every fourth layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_infer.base.errors import ModelError
from llm_infer.models.config import ModelConfig
from llm_infer.models.hf_config import ConfigReader
from llm_infer.models.names import LLAMA_IGNORED, llama_rules
from llm_infer.weights.gguf_names import BIASES, GGUFNames

rules = llama_rules
IGNORED_TENSORS = LLAMA_IGNORED
GGUF = GGUFNames("smollm3", interleaved_rope=True, flags=BIASES)


def config(values: Mapping[str, Any], *, fused_qkv: bool = True) -> ModelConfig:
    """Makes the model configuration of a Hugging Face `SmolLM3Config`.

    Raises:
        ModelError: also for a list of layers with rotary positions that is not one of 0 and 1 for each layer.
    """
    reader = ConfigReader({"tie_word_embeddings": True, "rope_theta": 2e6, **values})
    windows, fields = reader.windows(), reader.llama_like()
    layers, interval = fields["num_layers"], reader.integer("no_rope_layer_interval", 4)
    # In spite of its name the list has a 1 for each layer with rotary positions.
    rotated = reader.take("no_rope_layers", [int((i + 1) % interval != 0) for i in range(layers)])
    if not isinstance(rotated, list) or len(rotated) != layers or not all(each in (0, 1) for each in rotated):
        raise ModelError(f"config.json: no_rope_layers={rotated!r:.60}, expected 0 or 1 for each of {layers} layers")
    result = ModelConfig(
        "SmolLM3ForCausalLM",
        **fields,
        layer_ropes=tuple(fields["rope"] if each else None for each in rotated),
        windows=windows,
        **reader.attention_biases(),
        mlp_bias=reader.flag("mlp_bias", False),
        fused_qkv=fused_qkv,
    )
    reader.finish()
    return result
