"""Answers drawn in few slots: where one ends, the next takes its slot, inside the same compiled loop."""
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rl_jax.models import transformer
from rl_jax.models.network import Network
from rl_jax.recipe import Rollout
from rl_jax.rollout import decode, lanes
from rl_jax.types import Parameters, Prompts, Samples


def make_rollout(network: Network, rollout: Rollout, *, slots: int, completion_length: int, stop_ids: tuple[int, ...],
                 pad_id: int, axis: str | None = None) -> Callable[..., Samples]:
    """Returns draw as `decode.make_rollout` does: the same answers, at most `slots` of them at once.

    Slots stand in lanes (`lanes.shape`), those of a lane share one prompt. A slot whose answer has ended takes its
    lane's next sample, a lane whose samples have all ended takes the next prompt. All prompts are prefilled at the
    start; an inner loop draws until a lane wants a prompt, an outer one gives it the prompt's cache, so that a step
    gathers none.

    Args:
      slots: at least 1, no more than answers.
      completion_length, stop_ids, pad_id: see `decode.make_rollout`.
      axis: name of an outer vmap axis (replicas): both loops go on until all of its members are done.
    """
    group = rollout.group_size
    stops = np.asarray(stop_ids, np.int32)
    drawn = decode.make_drawn(network, rollout, pad_id)

    def anywhere(flag: Array) -> Array:
        return flag if axis is None else jax.lax.psum(flag.astype(jnp.int32), axis) > 0

    def draw(parameters: Parameters, prompts: Prompts, uniforms: Float[Array, "P G T"], version: Int[Array, ""],
             coefficient: Any = None, budget: Int[Array, "P G"] | None = None) -> Samples:
        count = prompts.lengths.shape[0]
        width, lane_count = lanes.shape(slots, count, group)
        most = completion_length if budget is None else jnp.minimum(budget, completion_length)
        limits = jnp.broadcast_to(most, (count, group))
        head, turns = network.vocabulary(parameters), network.turns(prompts.tokens.shape[1] + completion_length)
        prompt_cache, prompt_routes = network.prefill(parameters, prompts.tokens)
        first = transformer.last_token(prompts.tokens, prompts.lengths)

        def one_slot(lane, cache, token, uniform, alive, now):
            lane_cache, lengths = lane
            hidden, cache, experts = network.decode(parameters, lane_cache, cache, token, lengths, now, turns)
            return cache, drawn(network.logits(hidden, head), uniform, alive, experts, coefficient)

        step = jax.vmap(one_slot, in_axes=(None, 0, 0, 0, 0, 0))

        def draw_token(carry):
            state, lane, cache, token, buffers = carry
            answer = state.prompt[None], state.sample
            cache, new = step(lane, cache, token, uniforms[*answer, state.now], state.busy, state.now)
            place = lanes.row(state, count, group), state.now
            buffers = jax.tree.map(lambda b, d: b.at[place].set(d, mode="drop", unique_indices=True), buffers, new)
            alive = decode.goes_on(state.busy, new["tokens"], stops, state.now, limits[answer])
            token = jnp.where(alive, new["tokens"], first[state.prompt][None])
            return lanes.advanced(state, alive, group), lane, cache, token, buffers

        def no_lane_is_wanting(carry):
            return anywhere(carry[0].busy.any()) & ~anywhere(lanes.wanting(carry[0], count))

        def on_prompts(carry):
            state, _, *rest = jax.lax.while_loop(no_lane_is_wanting, draw_token, carry)
            state = lanes.renewed(state, count)
            cache, token, buffers = rest
            token = jnp.where(state.now == 0, first[state.prompt][None], token)
            return state, lane_of(state), cache, token, buffers

        def lane_of(state):
            return network.rows_of_cache(prompt_cache, state.prompt), prompts.lengths[state.prompt]

        state = lanes.first(width, lane_count)
        cache = decode.own_caches(network, parameters, width, lane_count, completion_length)
        token = jnp.broadcast_to(first[state.prompt], (width, lane_count))
        shapes = jax.eval_shape(step, lane_of(state), cache, token, jnp.zeros(token.shape), state.busy, state.now)[1]
        buffers = jax.tree.map(lambda a: jnp.zeros((count * group, completion_length, *a.shape[2:]), a.dtype), shapes)
        buffers["tokens"] = jnp.full_like(buffers["tokens"], pad_id)
        carry = state, lane_of(state), cache, token, buffers
        *_, buffers = jax.lax.while_loop(lambda carry: anywhere(carry[0].busy.any()), on_prompts, carry)
        return decode.whole(network, buffers, prompt_routes, stops, version)

    return draw
