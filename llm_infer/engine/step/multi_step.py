"""Several decode steps as one program: what the next one needs to know is computed on the device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from llm_infer.config import LOGPROBS_MODES
from llm_infer.decoding.features import StepFeatures
from llm_infer.decoding.penalties import PenaltyState
from llm_infer.engine.step.layout import StepLayout
from llm_infer.engine.step.paged import Paging, copied_pages
from llm_infer.engine.step.state import Cache, StepInputs, StepState
from llm_infer.engine.step.step import StepFunction, draw_ids, drawn_outputs
from llm_infer.models.decoder import LayerLoop
from llm_infer.models.params import Definition, Params, merge_model
from pallas_kernels.causal_conv import StateRows
from pallas_kernels.paged_attention import AttentionPlan
from pallas_kernels.paged_attention.decode_plan import decode_plan


def make_steps(
    definition: Definition,
    layout: StepLayout,
    features: StepFeatures,
    paging: Paging,
    *,
    loop: LayerLoop = 1,
    logprobs_mode: str = LOGPROBS_MODES[0],
    ends_early: bool = True,
) -> StepFunction:
    """Makes a program of up to `layout.steps` decode steps, with the arguments and results of `make_step`.

    Each row has one token and draws `num_steps` more, each from the one before. It ends earlier at one of its `stop_ids`;
    what it would compute then goes to the null page. With `ends_early` the loop ends when all rows have ended; shards must
    take the same number of turns where they talk to each other, so it is for one shard. The outputs have an axis of steps
    behind that of shards: `ids` is [dp, K, R].
    """

    def steps(params: Params, state: StepState, inputs: StepInputs) -> tuple[StepState, dict[str, Array]]:
        f = layout.unpack(inputs.packed[0])
        first_plan = AttentionPlan(**{name: f[name] for name in AttentionPlan._fields})
        model = merge_model(definition, params)
        unread = state.last_ids.shape[1] - 1
        mask = None if inputs.allowed is None else inputs.allowed[0]

        def one(
            index: Array, ids: Array, ended: Array, cache: Cache, penalties: PenaltyState | None
        ) -> tuple[Array, Array, Cache, PenaltyState | None, dict[str, Array]]:
            active = ~ended & (index < f["num_steps"])
            positions = f["positions"] + index
            plan = decode_plan(first_plan, positions, active, paging.page_size)
            rows = jnp.arange(ids.shape[0], dtype=jnp.int32)
            states = None
            if layout.states:  # only the first step reads another state than it writes
                before = jnp.where(index == 0, f["state_from"], f["state_to"])
                states = StateRows(plan.q_start, before, jnp.where(active, f["state_to"], 0), active.astype(jnp.int32))
            attend = paging.attention_over(plan, f.get("more_tables"), rows, positions, active, states)
            hidden, cache = model(ids, positions, cache, attend, loop=loop)
            logits = model.logits(hidden)
            rows = f | {"position": f["position"] + index, "slot": jnp.where(active, f["slot"], unread)}
            drawn, penalties, shaped = draw_ids(logits, rows, penalties, mask)
            stopped = jnp.any(drawn[:, None] == f["stop_ids"], axis=1)
            outputs = drawn_outputs(logits, shaped, drawn, rows, features, logprobs_mode)
            return jnp.where(active, drawn, ids), ended | (active & stopped), cache, penalties, outputs

        def proceeds(carry: tuple) -> Array:
            index, _, ended, *_ = carry
            goes_on = jnp.any(~ended & (index < f["num_steps"])) if ends_early else True
            return (index < f["max_steps"][0]) & goes_on

        def body(carry: tuple) -> tuple:
            index, ids, ended, cache, penalties, outputs = carry
            ids, ended, cache, penalties, found = one(index, ids, ended, cache, penalties)
            outputs = jax.tree.map(
                lambda all_, new: lax.dynamic_update_index_in_dim(all_, new, index, 0), outputs, found
            )
            return index + 1, ids, ended, cache, penalties, outputs

        cache = copied_pages(state.cache, f)
        ids = jnp.where(f["feeds"] == 1, state.last_ids[0, f["feed_slot"]], f["token_ids"])
        # A sequence that ended in the step before, of which the host does not know yet, does nothing.
        ended = (f["feeds"] == 1) & jnp.any(ids[:, None] == f["stop_ids"], axis=1)
        *_, shapes = jax.eval_shape(one, jnp.int32(0), ids, ended, cache, state.penalties)
        outputs = jax.tree.map(lambda x: jnp.zeros((layout.steps, *x.shape), x.dtype), shapes)
        _, ids, _, cache, penalties, outputs = lax.while_loop(
            proceeds, body, (jnp.int32(0), ids, ended, cache, state.penalties, outputs)
        )
        last_ids = state.last_ids.at[0, f["slot"]].set(ids)
        return StepState(cache, last_ids, penalties), {name: value[None] for name, value in outputs.items()}

    return steps
