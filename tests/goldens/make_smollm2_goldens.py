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
from greedy import save_greedy
from transformers import AutoModelForCausalLM, AutoTokenizer

STRIDE = 8  # every 8th logit: 24 full rows would be 5 MB in the repository

here = Path(__file__).parent
folder, name = os.path.split(os.path.abspath(sys.argv[1]))
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
prompts = [line.replace("\\n", "\n") for line in (here / "prompts.txt").read_text().splitlines()]

prompt_ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
save_greedy(here / "smollm2_greedy.npz", model, tokenizer, prompt_ids, STRIDE, prompts=np.array(json.dumps(prompts)))
