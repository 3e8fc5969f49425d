"""The jitted function of the engine: one step from packed plan to drawn ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from llm_infer.config import LOGPROBS_MODES
from llm_infer.decoding.beam import NUM_CANDIDATES
from llm_infer.decoding.features import StepFeatures
from llm_infer.decoding.logprobs import Logprobs, logprobs_of
from llm_infer.decoding.penalties import PenaltyRows, PenaltyState, count_drawn, mask_logits, packed_mask, penalised
from llm_infer.decoding.sample import SamplingRows, drawn_from, sample
from llm_infer.decoding.sampling_params import MAX_LOGPROBS
from llm_infer.engine.step.features import TOLD_OF_DRAWS
from llm_infer.engine.step.layout import StepLayout
from llm_infer.engine.step.paged import Paging, copied_pages
from llm_infer.engine.step.state import StepInputs, StepState
from llm_infer.models.decoder import LayerLoop
from llm_infer.models.params import Definition, Params, merge_model
from pallas_kernels.causal_conv import StateRows
from pallas_kernels.draw_tokens.top_tokens import top_tokens
from pallas_kernels.paged_attention import AttentionPlan
from pallas_kernels.row_sums import logsumexp

LOGITS_BLOCK = 32
"""Rows whose logits exist at the same time when all tokens of a step need them."""

StepFunction = Callable[[Params, StepState, StepInputs], tuple[StepState, dict[str, Array]]]


def make_step(
    definition: Definition,
    layout: StepLayout,
    features: StepFeatures,
    paging: Paging,
    *,
    loop: LayerLoop = 1,
    logprobs_mode: str = LOGPROBS_MODES[0],
    keep_logits: bool = False,
) -> StepFunction:
    """Makes the step of one token bucket and a set of features, to be jitted with the state donated.

    `step(params, state, inputs) -> (state, outputs)`: copies shared pages that are about to be written, fetches ids that
    are still on the device, runs the model over the pages, draws the next id of each row and keeps it in the row's slot
    for the next step. `outputs["ids"]` is [dp, R], R rows of logits; with LOGPROBS there are the fields of `Logprobs` with a
    leading dp axis, those of the most likely tokens only with TOP_LOGPROBS; with PROMPT_LOGPROBS all of them for the
    `targets`, [dp, T] with names `prompt_…`; with POOLED `pooled_sum` and `pooled_last` [dp, R, E]; with BEAMS `beam_ids` and
    `beam_logprobs` [dp, R, N], best first; with KEPT `kept` [dp, R, W]; with `keep_logits`, also `logits` [dp, R, V].
    """

    def step(params: Params, state: StepState, inputs: StepInputs) -> tuple[StepState, dict[str, Array]]:
        f = layout.unpack(inputs.packed[0])
        plan = AttentionPlan(**{name: f[name] for name in AttentionPlan._fields})
        model = merge_model(definition, params)

        cache = copied_pages(state.cache, f)
        token_ids = jnp.where(f["feeds"] == 1, state.last_ids[0, f["feed_slot"]], f["token_ids"])
        # The sequence of each token; padding lies behind the last range.
        token = jnp.arange(token_ids.shape[0], dtype=jnp.int32)
        owner = jnp.sum(token[:, None] >= f["q_start"][None, 1:], axis=1, dtype=jnp.int32)
        used = token < f["q_start"][-1]
        states = StateRows(**{name: f[name] for name in StateRows._fields}) if layout.states else None
        attend = paging.attention_over(plan, f.get("more_tables"), owner, f["positions"], used, states)
        hidden, cache = model(token_ids, f["positions"], cache, attend, loop=loop)
        logits = model.logits(hidden[f["logits_row"]])
        allowed = None if inputs.allowed is None else inputs.allowed[0]
        ids, penalties, shaped = draw_ids(logits, f, state.penalties, allowed)
        last_ids = state.last_ids.at[0, f["slot"]].set(ids)
        told = drawn_outputs(logits, shaped, ids, f, features, logprobs_mode)
        outputs = {name: value[None] for name, value in told.items()}
        if StepFeatures.PROMPT_LOGPROBS in features:
            with jax.named_scope("prompt_logprobs"):
                found = logprobs_in_blocks(model.logits, hidden, f["targets"])
                outputs |= {f"prompt_{name}": value[None] for name, value in found._asdict().items()}
        if StepFeatures.POOLED in features:
            with jax.named_scope("pool"):
                normed = model.normed(hidden).astype(jnp.float32)
                outputs["pooled_last"] = normed[f["logits_row"]][None]
                outputs["pooled_sum"] = jax.ops.segment_sum(normed, owner, f["logits_row"].shape[0])[None]
        if StepFeatures.BEAMS in features:
            with jax.named_scope("beams"):
                values, top_ids = top_tokens(logits, min(NUM_CANDIDATES, logits.shape[-1]))
                outputs["beam_ids"] = top_ids[None]
                outputs["beam_logprobs"] = (values - logsumexp(logits)[:, None])[None]
        if keep_logits:
            outputs["logits"] = logits[None]
        return StepState(cache, last_ids, penalties), outputs

    return step


def draw_ids(
    logits: Float[Array, "R V"], f: Mapping[str, Array], state: PenaltyState | None, allowed: Int[Array, "R W"] | None
) -> tuple[Int[Array, " R"], PenaltyState | None, Float[Array, "R V"]]:
    """Computes the next id of each row, the state after it, and the logits after penalties and masks; `f` are the fields of the
    step."""
    with jax.named_scope("sample"):
        if state is not None:
            rows = PenaltyRows(**{name: f[name] for name in PenaltyRows._fields})
            logits = penalised(logits, state, f["slot"], rows)
        if allowed is not None:
            logits = mask_logits(logits, allowed)
        ids = sample(logits, SamplingRows(**{name: f[name] for name in SamplingRows._fields}))
        return ids, None if state is None else count_drawn(state, f["slot"], ids), logits


def drawn_outputs(
    logits: Float[Array, "R V"],
    shaped: Float[Array, "R V"],
    ids: Int[Array, " R"],
    f: Mapping[str, Array],
    features: StepFeatures,
    logprobs_mode: str,
) -> dict[str, Array]:
    """Returns `ids`, and of `Logprobs`, `all_logprobs` [R, V] and `kept` [R, W] what the features ask for.

    Log-probabilities are those of the model's own `logits`, or of the distribution that is drawn from, by `logprobs_mode`;
    `shaped` are the logits after penalties and masks, `kept` a bit for each token as in `penalties.unpacked_mask`.
    """
    outputs = {"ids": ids}
    if not features & TOLD_OF_DRAWS:
        return outputs  # before limits are traced that the compiler would take out again
    limited = drawn_from(shaped, SamplingRows(**{name: f[name] for name in SamplingRows._fields}))
    if StepFeatures.LOGPROBS in features:
        with jax.named_scope("logprobs"):
            told = logits if logprobs_mode == "raw_logprobs" else limited
            found = logprobs_of(told, ids, min(MAX_LOGPROBS, told.shape[-1]))
            outputs |= {"logprobs": found.logprobs, "ranks": found.ranks}
            if StepFeatures.TOP_LOGPROBS in features:
                outputs |= {"top_ids": found.top_ids, "top_logprobs": found.top_logprobs}
            if StepFeatures.ALL_LOGPROBS in features:
                outputs["all_logprobs"] = told.astype(jnp.float32) - logsumexp(told)[:, None]
    if StepFeatures.KEPT in features:
        with jax.named_scope("kept"):
            outputs["kept"] = packed_mask(jnp.isfinite(limited))
    return outputs


def logprobs_in_blocks(
    head: Callable[[Array], Array], hidden: Float[Array, "T E"], targets: Int[Array, " T"]
) -> Logprobs:
    """Computes log-probabilities of `targets` after each token, in blocks: logits of all at once would fill the memory."""
    tokens = hidden.shape[0]
    size = min(tokens, LOGITS_BLOCK)
    padding = -tokens % size
    blocks = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, size, hidden.shape[1])

    def block(pair: tuple[Array, Array]) -> Logprobs:
        logits = head(pair[0])
        return logprobs_of(logits, pair[1], min(MAX_LOGPROBS, logits.shape[-1]))

    found = lax.map(block, (blocks, jnp.pad(targets, (0, padding)).reshape(-1, size)))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:tokens], found)
