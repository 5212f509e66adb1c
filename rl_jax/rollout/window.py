"""Answers that grow by a window of tokens per step and go on in the next, with the weights of then."""
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.linear_logprob import support
from rl_jax.models.network import Network
from rl_jax.recipe import Rollout
from rl_jax.record import record
from rl_jax.rollout import decode
from rl_jax.types import Parameters, Prompts, Samples


@record
class Slots:
    """One place per prompt of the batch, and what its answers are so far.

    `busy` says that an answer to the prompt goes on in the next step; `uniforms` are the random
    numbers of the whole answers, so that one drawn in windows equals one drawn at once.
    """

    prompts: Prompts
    samples: Samples
    uniforms: Float[Array, "P G T"]
    busy: Bool[Array, " P"]


def make_window(network: Network, rollout: Rollout, *, completion_length: int, stop_ids: tuple[int, ...],
                pad_id: int, axis: str | None = None) -> Callable[..., Slots]:
    """Returns grow(parameters, slots, prompts, uniforms, version, coefficient) -> slots.

    A slot that is not busy takes the fresh prompt of its place; a fresh prompt in the place of a
    busy slot is not asked. Then every answer that has not ended grows by at most `rollout.window`
    tokens: what it has so far is prefilled behind its prompt. `samples.fresh` marks the new tokens,
    `samples.complete` the answers whose whole group has ended or has no room left.

    Args:
      completion_length: T, the budget of a whole answer in tokens, its end included.
      stop_ids, pad_id, axis: see `decode.make_rollout`.
    """
    window = min(rollout.window, completion_length)
    stops = np.asarray(stop_ids, np.int32)
    draw = decode.make_rollout(network, dataclasses.replace(rollout, group_size=1, group_size_at_least=1, window=0),
                               completion_length=window, stop_ids=stop_ids, pad_id=pad_id, axis=axis)

    def grow(parameters: Parameters, slots: Slots, prompts: Prompts, uniforms: Float[Array, "P G T"],
             version: Int[Array, ""], coefficient: Any = None) -> Slots:
        new = blank(prompts, slots.samples, uniforms)
        slots = jax.tree.map(lambda old, new: _choose(slots.busy, old, new), slots, new)
        samples, group = slots.samples, rollout.group_size
        length = samples.mask.sum(axis=1)
        asked = _with_answer_so_far(slots.prompts, samples.tokens, length, group)
        offset = length[:, None] + jnp.arange(window)[None, :]
        numbers = slots.uniforms.reshape(length.shape[0], completion_length)
        numbers = jnp.take_along_axis(numbers, jnp.minimum(offset, completion_length - 1), axis=1)
        drawn = draw(parameters, asked, numbers[:, None, :], version, coefficient)
        allowed = drawn.mask & ~samples.finished[:, None] & (offset < completion_length)
        step = jnp.arange(completion_length)[None, :] - length[:, None]
        column = jnp.clip(step, 0, window - 1)
        fresh = (step >= 0) & (step < window) & jnp.take_along_axis(allowed, column, axis=1)

        def put(old, new):
            if old is None:
                return None
            wide = column.reshape(*column.shape, *[1] * (new.ndim - 2))
            new = jnp.take_along_axis(new, wide, axis=1)
            return jnp.where(fresh.reshape(*fresh.shape, *[1] * (new.ndim - 2)), new, old)

        mask = samples.mask | fresh
        finished = samples.finished | (allowed & jnp.isin(drawn.tokens, stops)).any(axis=1)
        ended = (finished | mask.all(axis=1)).reshape(-1, group).all(axis=1)
        samples = Samples(
            tokens=jnp.where(mask, put(samples.tokens, drawn.tokens), pad_id), mask=mask,
            rollout_logp=put(samples.rollout_logp, drawn.rollout_logp),
            rollout_entropy=put(samples.rollout_entropy, drawn.rollout_entropy), finished=finished,
            version=jnp.where(fresh.any(axis=1), version, samples.version), support=put(samples.support, drawn.support),
            complete=jnp.repeat(ended, group), fresh=fresh)
        return dataclasses.replace(slots, samples=samples, busy=~ended)

    return grow


def blank(prompts: Prompts, samples: Samples, uniforms: Float[Array, "P G T"]) -> Slots:
    """Slots whose answers are still empty.

    Args:
      samples: anything with the shapes of the whole answers.
      uniforms: the random numbers to draw them with.
    """
    empty = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), samples)
    return Slots(prompts=prompts, samples=empty, uniforms=uniforms, busy=jnp.zeros(prompts.lengths.shape, bool))


def whole(network: Network, rollout: Rollout, rows: int, completion_length: int) -> Samples:
    """Samples of the shape of `rows` whole answers, all empty."""
    shape = (rows, completion_length)
    flag, number = jnp.zeros(shape, bool), jnp.zeros(shape)
    words = support.words_for(network.shape.vocabulary)
    bits = jnp.zeros((*shape, words), jnp.uint32) if rollout.truncated else None
    return Samples(tokens=jnp.zeros(shape, jnp.int32), mask=flag, rollout_logp=number, rollout_entropy=number,
                   finished=flag[:, 0], version=jnp.zeros(rows, jnp.int32), support=bits, complete=flag[:, 0],
                   fresh=flag)


def _choose(busy: Bool[Array, " P"], old: Array, new: Array) -> Array:
    """Rows of the busy prompts from `old`, the others from `new`; rows are P or P times G."""
    rows = jnp.repeat(busy, old.shape[0] // busy.shape[0])
    return jnp.where(rows.reshape(-1, *[1] * (old.ndim - 1)), old, new)


def _with_answer_so_far(prompts: Prompts, tokens: Int[Array, "N T"], length: Int[Array, " N"], group: int) -> Prompts:
    """Every answer as a prompt of its own: [N, S + T], right-padded."""
    asked = jax.tree.map(lambda a: jnp.repeat(a, group, axis=0), dataclasses.replace(prompts, facts={}))
    (n, t), s = tokens.shape, asked.tokens.shape[1]
    position = jnp.broadcast_to(jnp.arange(s + t)[None, :], (n, s + t))
    behind = position - asked.lengths[:, None]
    own = jnp.take_along_axis(asked.tokens, jnp.minimum(position, s - 1), axis=1)
    answer = jnp.take_along_axis(tokens, jnp.clip(behind, 0, t - 1), axis=1)
    wide = jnp.where(behind < 0, own, jnp.where(behind < length[:, None], answer, 0))
    return dataclasses.replace(asked, tokens=wide, lengths=asked.lengths + length)
