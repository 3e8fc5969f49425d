"""Training over our own models: pure functions, optax for what is learnt, Orbax for what is kept.

tuned = finetune(model, [("prompt", "completion"), …], steps=100)
found = grpo(model, ["prompt", …], lambda prompts, texts: [float(len(text)) for text in texts], steps=30)
"""

from llm_infer.train.finetuning import Tuned, finetune
from llm_infer.train.policy import Learnt, grpo
from llm_infer.train.state import TrainState

__all__ = ["Learnt", "TrainState", "Tuned", "finetune", "grpo"]
