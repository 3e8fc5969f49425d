"""`llm-infer bench quality`: measures by teacher forcing what rounding costs, of activations or of another file's weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from llm_infer.base.errors import UserError
from llm_infer.base.files import read_text
from llm_infer.base.progress import Progress
from llm_infer.engine.step.paged import PagedAttention
from llm_infer.engine.step.sharding import StepSharding
from llm_infer.engine.step.state import PAGES
from llm_infer.loading import differing_tokens, load
from llm_infer.models.load import LoadedModel
from llm_infer.models.params import merge_model
from llm_infer.text.tokenizer import Tokenizer
from pallas_kernels.causal_conv import StateRows
from pallas_kernels.paged_attention import AttentionPlan, kv_pool_dtype, kv_pool_shape
from pallas_kernels.paged_attention.plan import PlanShape, fill_plan, plan_fields

PAGE = 16
PAGE_DTYPES = {"exact": "float32", "fast": "bfloat16"}


@dataclass(frozen=True)
class Quality:
    """Differences between a model with rounding and its reference over the same texts.

    Attributes:
        tokens: positions compared.
        top1_agreement: share of positions with the same most likely token.
        mean_kl: mean of KL(reference ‖ model) in nats.
        perplexity_reference, perplexity: exp of the mean negative log-likelihood of the next token.
    """

    tokens: int
    top1_agreement: float
    mean_kl: float
    perplexity_reference: float
    perplexity: float

    @property
    def perplexity_change(self) -> float:
        """The relative change of perplexity; positive is worse."""
        return self.perplexity / self.perplexity_reference - 1

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens: top-1 agreement {self.top1_agreement:.2%}, mean KL {self.mean_kl:.5f} nat, "
            f"perplexity {self.perplexity_reference:.4f} → {self.perplexity:.4f} ({self.perplexity_change:+.3%})"
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
            num_layers=config.num_attending,
            num_pages=self._shape.pages_per_seq + 1,
            page_size=PAGE,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=page_dtype,
        )
        pool_dtype = kv_pool_dtype(platform, page_dtype)
        pools = StepSharding.of(config, None).states(1, model.dtype)

        @jax.jit
        def forward(params: dict, ids: Array, positions: Array, plan: AttentionPlan) -> Float[Array, "T V"]:
            decoder = merge_model(model.definition, params)

            # Texts are computed whole: states begin with zeros, and nobody goes on from where they end.
            null = jnp.zeros(1, jnp.int32)
            states = {name: jnp.zeros(each.shape, each.dtype) for name, each in pools.items()}
            cache = {PAGES: jnp.zeros(pool_shape, pool_dtype), **states}
            attend = PagedAttention(plan, StateRows(plan.q_start, null, null, null))
            hidden, _ = decoder(ids, positions, cache, attend)
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


def compare(
    reference: LoadedModel,
    models: Mapping[str, LoadedModel],
    texts: Sequence[Sequence[int]],
    progress: Progress,
    pages: str = "auto",
) -> dict[str, Quality]:
    """Returns the quality of each model against the exact reference, over texts of token ids that are forced token by token.

    Args:
        reference: the model whose probabilities are the right ones; it keeps float32 pages.
        models: precision → model of the same vocabulary.
        texts: at least two tokens each.
        progress: counts the texts.
        pages: type of the models' pages; `auto` is that of the precision.
    """
    length = max(map(len, texts))
    exact = TeacherForced(reference, PAGE_DTYPES["exact"], length)
    of_model = {name: PAGE_DTYPES[name] if pages == "auto" else pages for name in models}
    rounded = {name: TeacherForced(model, of_model[name], length) for name, model in models.items()}
    sums = {name: np.zeros(3) for name in models}  # agreements, divergences, losses
    loss, count = 0.0, 0
    with progress.task("Comparing", total=len(texts)) as bar:
        for tokens in texts:
            p = exact(tokens)[:-1].astype(np.float64)
            probability, likeliest = np.exp(p), p.argmax(-1)
            following = np.arange(len(p)), np.asarray(tokens[1:])
            for name, model in rounded.items():
                q = model(tokens)[:-1].astype(np.float64)
                sums[name] += ((q.argmax(-1) == likeliest).sum(), (probability * (p - q)).sum(), -q[following].sum())
            loss -= p[following].sum()
            count += len(p)
            bar.advance(1)
    return {
        name: Quality(count, *(found[:2] / count).tolist(), *np.exp([loss / count, found[2] / count]).tolist())
        for name, found in sums.items()
    }


def run(
    model: str, reference: str | None, text_file: str | None, tokens: int, json_file: str | None, pages: str = "auto"
) -> None:
    """Compares `fast` with `exact` on a text, or both of them with another model in `exact`, and prints the figures.

    Raises:
        UserError: a model or the text cannot be loaded, or the reference has other tokens than the model.
    """
    progress, text = Progress(), _text(text_file)
    exact = _load(model, "exact", progress)
    tokenizer, base, models = _tokenizer(exact), exact, {}
    if reference is not None or pages != "auto":
        models["exact"] = exact
    if reference is not None:
        base = _load(reference, "exact", progress)
        if (difference := differing_tokens(tokenizer, _tokenizer(base))) is not None:
            raise UserError(
                f"--reference {reference} has another vocabulary than the model ({difference}): expected the same model "
                "with other weights, such as the file that it was quantised from"
            )
    models["fast"] = _load(model, "fast", progress)
    ids = tokenizer.encode(text[: 12 * tokens], add_special_tokens=False)[:tokens]
    if len(ids) < 2:
        raise UserError(f"--text {text_file}: expected at least two tokens of text, found {len(ids)}")
    length = min(256, exact.config.max_position_embeddings, base.config.max_position_embeddings)
    texts = [ids[i : i + length] for i in range(0, len(ids), length) if len(ids) - i > 1]
    found = compare(base, models, texts, progress, pages)
    for precision, quality in found.items():
        print(quality if len(found) == 1 else f"{precision + ':':7}{quality}")
    if json_file:
        figures = {precision: asdict(quality) for precision, quality in found.items()}
        about = {"model": model, "reference": model if reference is None else reference, "kv_cache_dtype": pages}
        report = {**about, **figures}
        Path(json_file).write_text(json.dumps(report, indent=2) + "\n")


def _load(name: str, precision: str, progress: Progress) -> LoadedModel:
    return load(name, load_format="auto", fused_qkv=True, precision=precision, progress=progress)


def _tokenizer(model: LoadedModel) -> Tokenizer:
    assert model.tokenizer is not None
    return model.tokenizer


def _text(file: str | None) -> str:
    """Returns the file's text; without one, the prose of Python's own language reference."""
    if file is not None:
        return read_text(file, f"--text {file}")
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))
