"""Run by test_distributed as each of two processes: prints what it generates as JSON, then idles until something ends it.

Arguments: a directory with a config.json, the coordinator's address, the number of this process.
"""

from __future__ import annotations

import json
import sys
import time

from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.llm import LLM
from llm_infer.starting import follow

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9] * 20]
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True, presence_penalty=0.5),
    SamplingParams(temperature=1.0, max_tokens=10, ignore_eos=True, seed=5, repetition_penalty=1.2, n=2),
]
ARGUMENTS = dict(load_format="dummy", max_num_seqs=8, max_num_batched_tokens=8, max_model_len=64, num_pages=32)


def generate(llm: LLM) -> list[list[list[int]]]:
    """Tokens of each sample of each prompt, for both kinds of parameters."""
    llm.engine.runner.buckets = (8,)  # one program per set of features
    found = [llm.generate(PROMPTS, params, progress=False) for params in PARAMS]
    return [[output.token_ids for output in result.outputs] for results in found for result in results]


if __name__ == "__main__":
    directory, address, process = sys.argv[1:]
    hosts = dict(coordinator_address=address, num_processes=2, process_id=int(process))
    settings = dict(tensor_parallel_size=2, data_parallel_size=2, progress=False, **ARGUMENTS, **hosts)
    if not follow(directory, **settings):
        print(json.dumps(generate(LLM(directory, **settings))), flush=True)
        time.sleep(600)
