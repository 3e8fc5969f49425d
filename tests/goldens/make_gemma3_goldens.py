"""Make gemma3_greedy.npz: greedy continuations of Gemma 3 270M (base) by `transformers` (float32, the same GGUF file).

Usage: python make_gemma3_goldens.py MODEL.gguf      (needs torch, transformers, gguf; see CONTRIBUTING.md)

MODEL.gguf is Q4_K_M of google/gemma-3-270m, under Gemma's terms: only ids are stored. Prompts are the lines of prompts.txt that
are no chats, and the beginnings of six pages of docs/, longer than the model's windows of 512 tokens. For each it stores 64
greedy ids, the top-two margin of every step, and every 64th logit of the last prompt token.
"""

import os
import sys
from pathlib import Path

import torch
from greedy import save_greedy
from transformers import AutoModelForCausalLM, AutoTokenizer

STRIDE = 64
PAGES = ("architecture", "using", "serving", "cli", "precision", "cloud_tpu")
LENGTHS = (560, 600, 700, 777, 900, 1024)  # tokens of the long prompts

here = Path(__file__).parent
folder, name = os.path.split(os.path.abspath(sys.argv[1]))
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
config = model.config
# The file says how long windows are and not in which layers: all but every sixth.
assert config.sliding_window == 512 and config.layer_types == [
    "full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(config.num_hidden_layers)
], config
print(config)
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
lines = [line.replace("\\n", "\n") for line in (here / "prompts.txt").read_text().splitlines() if "<|im_" not in line]
prompt_ids = [[2, *tokenizer(line, add_special_tokens=False)["input_ids"]] for line in lines]
for page, length in zip(PAGES, LENGTHS, strict=True):
    text = (here.parents[1] / "docs" / f"{page}.md").read_text()
    prompt_ids.append([2, *tokenizer(text, add_special_tokens=False)["input_ids"]][:length])

save_greedy(here / "gemma3_greedy.npz", model, tokenizer, prompt_ids, STRIDE)
