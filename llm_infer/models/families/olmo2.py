"""OLMo 2: Llama with norms after attention and MLP, and queries and keys normalised over all heads."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from llm_infer.models.config import ModelConfig
from llm_infer.models.hf_config import ConfigReader
from llm_infer.models.names import AFTER_NORMS, LLAMA_IGNORED, llama_rules
from llm_infer.weights.gguf_names import DENSE_LAYER, OUT_NORMS, QK_NORMS, WINDOW_KEYS, GGUFNames

rules = partial(llama_rules, norms=AFTER_NORMS)
IGNORED_TENSORS = LLAMA_IGNORED


def _third_version(config: dict[str, Any]) -> None:
    """Makes it OLMo 3's, which has the same names, where there are windows."""
    if "sliding_window" in config:
        config |= {"architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3"}


GGUF = GGUFNames(
    "olmo2",
    {name: hf for name, hf in DENSE_LAYER.items() if not name.endswith("_norm")} | OUT_NORMS | QK_NORMS,
    keys=WINDOW_KEYS,
    adjust=_third_version,
)


def config(values: Mapping[str, Any], *, fused_qkv: bool = True) -> ModelConfig:
    """Makes the model configuration of a Hugging Face `Olmo2Config`."""
    reader = ConfigReader({"rms_norm_eps": 1e-5, **values})
    result = ModelConfig(
        "Olmo2ForCausalLM",
        **reader.llama_like(),
        **reader.attention_biases(),
        qk_norm_whole=True,
        norms="after",
        fused_qkv=fused_qkv,
    )
    reader.finish()
    return result
