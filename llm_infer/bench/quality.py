"""`llm-infer bench quality`: measures by teacher forcing what precision `fast` changes: agreement, KL divergence, perplexity."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from llm_infer.base.progress import Progress
from llm_infer.engine.step.state import FULL
from llm_infer.engine.step.step import attention_over
from llm_infer.loading import load
from llm_infer.models.load import LoadedModel
from llm_infer.models.params import merge_model
from llm_infer.text.tokenizer import Tokenizer
from pallas_kernels.paged_attention import AttentionPlan, kv_pool_dtype, kv_pool_shape
from pallas_kernels.paged_attention.plan import PlanShape, fill_plan, plan_fields

PAGE = 16
PAGE_DTYPES = {"exact": "float32", "fast": "bfloat16"}


@dataclass(frozen=True)
class Quality:
    """Differences between a model with rounding and the exact one over the same texts.

    Attributes:
        tokens: positions compared.
        top1_agreement: share of positions with the same most likely token.
        mean_kl: mean of KL(exact ‖ rounded) in nats.
        perplexity_exact, perplexity_fast: exp of the mean negative log-likelihood of the next token.
    """

    tokens: int
    top1_agreement: float
    mean_kl: float
    perplexity_exact: float
    perplexity_fast: float

    @property
    def perplexity_change(self) -> float:
        """The relative change of perplexity; positive is worse."""
        return self.perplexity_fast / self.perplexity_exact - 1

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens: top-1 agreement {self.top1_agreement:.2%}, mean KL {self.mean_kl:.5f} nat, "
            f"perplexity {self.perplexity_exact:.4f} → {self.perplexity_fast:.4f} ({self.perplexity_change:+.3%})"
        )


class TeacherForced:
    """Computes log-probabilities of every next token of given texts, through pages like the engine's.

    Args:
        model: a loaded model.
        page_dtype: type of the keys and values in the pages.
        length: longest text in tokens; shorter ones are padded, so that one program serves all.
    """

    def __init__(self, model: LoadedModel, page_dtype: str, length: int) -> None:
        self._params = model.params
        config = model.config
        self._shape = PlanShape(length, 1, -(-length // PAGE), min(32, length))
        platform = jax.default_backend()
        pool_shape = kv_pool_shape(
            platform,
            num_layers=config.num_layers,
            num_pages=self._shape.pages_per_seq + 1,
            page_size=PAGE,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=page_dtype,
        )
        pool_dtype = kv_pool_dtype(platform, page_dtype)

        @jax.jit
        def forward(params: dict, ids: Array, positions: Array, plan: AttentionPlan) -> Float[Array, "T V"]:
            decoder = merge_model(model.definition, params)

            cache = {FULL: jnp.zeros(pool_shape, pool_dtype)}
            hidden, _ = decoder(ids, positions, cache, attention_over(plan))
            return jax.nn.log_softmax(decoder.logits(hidden), axis=-1)

        self._forward = forward

    def __call__(self, tokens: Sequence[int]) -> Float[np.ndarray, "N V"]:
        """Returns the log-probabilities after each of N tokens."""
        length, count = self._shape.tokens, len(tokens)
        fields = {name: np.zeros(shape, np.int32) for name, shape in plan_fields(self._shape).items()}
        table = np.arange(1, self._shape.pages_per_seq + 1, dtype=np.int32)[None]
        fields["block_tables"][:] = table
        counts = np.array([count], np.int32)
        fill_plan(self._shape, fields, counts, counts, fields["block_tables"], PAGE)
        ids, positions = np.zeros(length, np.int32), np.zeros(length, np.int32)
        ids[:count], positions[:count] = tokens, np.arange(count)
        return np.asarray(self._forward(self._params, ids, positions, AttentionPlan(**fields)))[:count]


def compare(exact: LoadedModel, fast: LoadedModel, texts: Sequence[Sequence[int]], progress: Progress) -> Quality:
    """Returns the quality of `fast` over texts of token ids, each forced token by token."""
    length = max(map(len, texts))
    models = [TeacherForced(model, PAGE_DTYPES[name], length) for name, model in (("exact", exact), ("fast", fast))]
    same, divergence, losses, count = 0, 0.0, np.zeros(2), 0
    with progress.task("Comparing", total=len(texts)) as bar:
        for tokens in texts:
            p, q = (model(tokens)[:-1].astype(np.float64) for model in models)
            following = np.asarray(tokens[1:])
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            divergence += float((np.exp(p) * (p - q)).sum())
            losses -= [x[np.arange(len(x)), following].sum() for x in (p, q)]
            count += len(following)
            bar.advance(1)
    return Quality(count, same / count, divergence / count, *np.exp(losses / count).tolist())


def run(model: str, text_file: str | None, tokens: int, json_file: str | None) -> None:
    """Compares the precisions on a text and prints the figures."""
    progress = Progress()
    tokenizer, exact = load(model, load_format="auto", fused_qkv=True, precision="exact", progress=progress)
    _, fast = load(model, load_format="auto", fused_qkv=True, precision="fast", progress=progress)
    texts = _chunks(tokenizer, text_file, tokens, min(256, exact.config.max_position_embeddings))
    quality = compare(exact, fast, texts, progress)
    print(quality)
    if json_file:
        Path(json_file).write_text(json.dumps({"model": model, **asdict(quality)}, indent=2) + "\n")


def _chunks(tokenizer: Tokenizer, text_file: str | None, tokens: int, length: int) -> list[list[int]]:
    """Returns the text's first tokens in pieces; by default the prose of Python's own language reference."""
    if text_file is not None:
        text = Path(text_file).read_text(encoding="utf-8")
    else:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = tokenizer.encode(text[: 12 * tokens], add_special_tokens=False)[:tokens]
    return [ids[i : i + length] for i in range(0, len(ids), length) if len(ids) - i > 1]
