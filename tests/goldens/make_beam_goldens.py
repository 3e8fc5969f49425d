"""Make smollm2_beams.json: beam searches of the default model by `transformers` (float32, the same GGUF file).

Usage: python make_beam_goldens.py MODEL.gguf      (needs torch, transformers, gguf; see CONTRIBUTING.md)

For a few prompts of prompts.txt and widths 2, 4 and 8 it stores all beams with their scores. Penalty and rule of early
stopping differ from prompt to prompt.
"""

import json
import os
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

RULES = [(1.0, False), (0.0, "never"), (1.0, True), (2.0, "never"), (-1.0, False), (0.6, True)]
NEW_TOKENS = 24

here = Path(__file__).parent
folder, name = os.path.split(os.path.abspath(sys.argv[1]))
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
lines = [line.replace("\\n", "\n") for line in (here / "prompts.txt").read_text().splitlines()]
encoded = [tokenizer(line, add_special_tokens=False)["input_ids"] for line in lines]
# Short ones, among them sentences that soon end, so that end-of-sequence is met.
chosen = [ids for ids in encoded if 3 <= len(ids) <= 30][: len(RULES) - 2]
chat = [{"role": "user", "content": "Answer with one word: what is the capital of France?"}]
chosen += [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]]
chosen += [tokenizer("<|im_start|>user\nSay hello.<|im_end|>\n<|im_start|>assistant\n")["input_ids"]]
eos = model.generation_config.eos_token_id or tokenizer.eos_token_id

searches = []
with torch.inference_mode():
    for ids, (penalty, early) in zip(chosen, RULES, strict=True):
        for width in (2, 4, 8):
            out = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                num_beams=width,
                num_return_sequences=width,
                max_new_tokens=NEW_TOKENS,
                length_penalty=penalty,
                early_stopping=early,
                do_sample=False,
                eos_token_id=eos,
                pad_token_id=eos,
                return_dict_in_generate=True,
                output_scores=True,
            )
            tokens = []
            for row in out.sequences[:, len(ids) :].tolist():
                end = row.index(eos) + 1 if eos in row else len(row)
                tokens.append(row[:end])
            scores = out.sequences_scores.tolist()
            searches.append(
                {
                    "prompt": ids,
                    "width": width,
                    "length_penalty": penalty,
                    "early_stopping": early,
                    "max_tokens": NEW_TOKENS,
                    "tokens": tokens,
                    "scores": scores,
                }
            )
            print(width, penalty, early, [len(t) for t in tokens], repr(tokenizer.decode(tokens[0]))[:70], flush=True)

versions = {"transformers": transformers.__version__, "torch": torch.__version__}
text = json.dumps({"eos_token_id": eos, "versions": versions, "searches": searches})
(here / "smollm2_beams.json").write_text(text.replace("}, {", "},\n{") + "\n")
