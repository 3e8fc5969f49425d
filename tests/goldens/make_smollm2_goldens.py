"""Make smollm2_greedy.npz: greedy continuations of the default model by `transformers` (float32, the same GGUF file).

Usage: python make_smollm2_goldens.py MODEL.gguf      (needs torch, transformers, gguf; see CONTRIBUTING.md)

For each prompt of prompts.txt (ids from the GGUF tokenizer, stored so that the tokenizer is not part of the comparison)
it stores 64 greedy ids, the top-two margin of every step, and every 8th logit of the last prompt token.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

STEPS = 64
STRIDE = 8  # every 8th logit: 24 full rows would be 5 MB in the repository

here = Path(__file__).parent
folder, name = os.path.split(os.path.abspath(sys.argv[1]))
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
prompts = [line.replace("\\n", "\n") for line in (here / "prompts.txt").read_text().splitlines()]

prompt_ids, tokens, margins, last_logits = [], [], [], []
with torch.inference_mode():
    for prompt in prompts:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        prompt_ids.append(ids)
        out = model(torch.tensor([ids]), use_cache=True)
        last_logits.append(out.logits[0, -1, ::STRIDE].numpy())
        row_tokens, row_margins = [], []
        for _ in range(STEPS):
            top = torch.topk(out.logits[0, -1], 2).values
            token = int(out.logits[0, -1].argmax())
            row_tokens.append(token)
            row_margins.append(float(top[0] - top[1]))
            out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
        tokens.append(row_tokens)
        margins.append(row_margins)
        print(repr(prompt), "->", repr(tokenizer.decode(row_tokens))[:70], flush=True)

np.savez_compressed(
    here / "smollm2_greedy.npz",
    prompts=np.array(json.dumps(prompts)),
    prompt_ids=np.array(json.dumps(prompt_ids)),
    tokens=np.array(tokens, np.int32),
    margins=np.array(margins, np.float32),
    last_logits=np.array(last_logits, np.float32),
    stride=np.array(STRIDE),
    versions=np.array(json.dumps({"transformers": transformers.__version__, "torch": torch.__version__})),
)
