"""Makes processors.npz: what transformers' logits processors make of random logits. Needs torch and transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

ROWS, VOCAB = 4, 700
CASES = {
    "repetition": lambda: RepetitionPenaltyLogitsProcessor(1.3),
    "top_k": lambda: TopKLogitsWarper(30),
    "top_p": lambda: TopPLogitsWarper(0.8),
    "min_p": lambda: MinPLogitsWarper(0.05),
    "typical_p": lambda: TypicalLogitsWarper(0.7),
}


def main() -> None:
    """Writes the logits, the token ids that were seen, and the output of each processor and of all in a row."""
    rng = np.random.default_rng(0)
    logits = (rng.standard_normal((ROWS, VOCAB)) * 3).astype(np.float32)
    seen = rng.integers(0, VOCAB, (ROWS, 12))
    ids, whole = torch.from_numpy(seen), torch.from_numpy(logits)
    result = {"logits": logits, "seen": seen.astype(np.int32)}
    for name, make in CASES.items():
        result[name] = make()(ids, torch.from_numpy(logits).clone()).numpy()
        whole = make()(ids, whole)
    result["all"] = whole.numpy()
    np.savez_compressed(Path(__file__).parent / "processors.npz", **result)


if __name__ == "__main__":
    main()
