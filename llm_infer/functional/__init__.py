"""The model as functions of arrays: to be jitted, differentiated, scanned and vmapped. These names and arguments stay.

model = load_model("org/name", weights="dense")
logits = forward(model, model.params, token_ids).logits                  # [B, T, V]
logprobs = token_logprobs(model, model.params, token_ids, remat=True)    # [B, T]
cache = make_cache(model, sequences=4, max_len=256)
logits, cache = decode_step(model, model.params, cache, prompts)         # [S, V]
token = draw(logits, keys, temperature=0.7, top_p=0.9)                   # [S]
"""

from llm_infer.decoding.penalties import unpacked_mask
from llm_infer.functional.decode import Cache, decode_step, make_cache
from llm_infer.functional.drawing import draw, sampling_logits
from llm_infer.functional.own_model import register_model
from llm_infer.functional.whole import Forward, forward, token_logprobs
from llm_infer.loading import load_model
from llm_infer.models.config import ModelConfig
from llm_infer.models.load import LoadedModel

__all__ = [
    "Cache",
    "Forward",
    "LoadedModel",
    "ModelConfig",
    "decode_step",
    "draw",
    "forward",
    "load_model",
    "make_cache",
    "register_model",
    "sampling_logits",
    "token_logprobs",
    "unpacked_mask",
]
