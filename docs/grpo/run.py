"""Trains the default model with GRPO to write the letter e, three times; writes rewards.json and rewards.svg beside this file.

    python docs/grpo/run.py

The reward is simple so that anybody can see whether it rises: the share of the letter e among an answer's letters.
"""

import json
import sys
import time
from pathlib import Path

import jax
import optax

from llm_infer import SamplingParams, load_model
from llm_infer.train import grpo

QUESTIONS = (
    "What is a river?",
    "Describe a forest.",
    "Why do birds sing?",
    "How is bread made?",
    "Tell me about winter.",
    "What do teachers do?",
    "Write about the sea.",
    "What is a bridge for?",
)
PROMPTS = [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in QUESTIONS]
STEPS, SEEDS = 30, (0, 1, 2)


def reward(prompts: list[str], texts: list[str]) -> list[float]:
    """Returns the share of the letter e among the letters of each answer."""
    letters = [[c for c in text.lower() if c.isalpha()] for text in texts]
    return [each.count("e") / max(1, len(each)) for each in letters]


def main() -> None:
    """Makes the runs and writes the figures of all steps."""
    runs = []
    for seed in SEEDS:
        started = time.monotonic()
        found = grpo(
            load_model(weights="dense"),
            PROMPTS,
            reward,
            steps=STEPS,
            samples=8,
            prompts_per_step=4,
            sampling=SamplingParams(temperature=1.0, max_tokens=32),
            optimizer=optax.adamw(3e-5),
            seed=seed,
        )
        runs.append({"seed": seed, "seconds": round(time.monotonic() - started), "steps": found.history})
        print(seed, [round(step["reward"], 4) for step in found.history], file=sys.stderr)
    about = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "reward": reward.__doc__, "runs": runs}
    Path(__file__).with_name("rewards.json").write_text(json.dumps(about, indent=1) + "\n")
    Path(__file__).with_name("rewards.svg").write_text(
        figure([[step["reward"] for step in run["steps"]] for run in runs])
    )


def figure(rewards: list[list[float]]) -> str:
    """Draws the mean reward of each step, a line for each seed."""
    left, bottom, wide, high = 60, 260, 480, 220
    low, top = 0.10, max(map(max, rewards)) + 0.01

    def place(step: int, value: float) -> str:
        return f"{left + wide * step / (STEPS - 1):.1f},{bottom - high * (value - low) / (top - low):.1f}"

    marks = [low + (top - low) * i / 4 for i in range(5)]
    lines = [
        f'<text x="{left - 6}" y="{place(0, mark).split(",")[1]}" text-anchor="end" dominant-baseline="middle">{mark:.3f}</text>'
        for mark in marks
    ]
    lines += [f'<text x="{left + wide / 2}" y="{bottom + 30}" text-anchor="middle">step</text>']
    lines += [
        f'<text x="{left}" y="20">share of the letter e, mean of 32 answers; seeds {", ".join(map(str, SEEDS))}</text>'
    ]
    for run, colour in zip(rewards, ("#0072b2", "#d55e00", "#009e73"), strict=True):
        points = " ".join(place(step, value) for step, value in enumerate(run))
        lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
    style = 'font-family="sans-serif" font-size="12" fill="currentColor"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="560" height="300" {style}>{"".join(lines)}</svg>\n'


if __name__ == "__main__":
    main()
