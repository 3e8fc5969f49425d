"""Greedy continuations by `transformers`, of which make_*_goldens.py make files."""

import json
from pathlib import Path

import numpy as np
import torch
import transformers

STEPS = 64


def save_greedy(path: Path, model, tokenizer, prompt_ids: list[list[int]], stride: int, **more: np.ndarray) -> None:
    """Writes STEPS greedy ids of each prompt, the top-two margin of every step, and every `stride`th logit of its last token."""
    tokens, margins, last_logits = [], [], []
    with torch.inference_mode():
        for ids in prompt_ids:
            out = model(torch.tensor([ids]), use_cache=True)
            last_logits.append(out.logits[0, -1, ::stride].numpy())
            row_tokens, row_margins = [], []
            for _ in range(STEPS):
                top = torch.topk(out.logits[0, -1], 2).values
                token = int(out.logits[0, -1].argmax())
                row_tokens.append(token)
                row_margins.append(float(top[0] - top[1]))
                out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
            tokens.append(row_tokens)
            margins.append(row_margins)
            print(len(ids), len(set(row_tokens)), min(row_margins), repr(tokenizer.decode(row_tokens))[:90], flush=True)
    np.savez_compressed(
        path,
        **more,
        prompt_ids=np.array(json.dumps(prompt_ids)),
        tokens=np.array(tokens, np.int32),
        margins=np.array(margins, np.float32),
        last_logits=np.array(last_logits, np.float32),
        stride=np.array(stride),
        versions=np.array(json.dumps({"transformers": transformers.__version__, "torch": torch.__version__})),
    )
