"""Answers drawn in groups: the prompt is prefilled once, the decode step is vmapped over the group."""
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from kernels_pallas.linear_logprob.support import pack_support
from rl_jax.models import routes, transformer
from rl_jax.models.network import Network
from rl_jax.recipe import Rollout
from rl_jax.rollout import sample
from rl_jax.types import Parameters, Prompts, Samples

MOST_SAMPLES = 4096


def make_rollout(network: Network, rollout: Rollout, *, completion_length: int, stop_ids: tuple[int, ...],
                 pad_id: int, axis: str | None = None) -> Callable[..., Samples]:
    """Returns draw(parameters, prompts, uniforms, version, coefficient) -> Samples of G answers each, prompt-major.

    The group axis is a `vmap` with the prompt's cache at `in_axes=None`: it is never copied. It
    wraps the step inside the loop; the loop stops when every answer has ended. `uniforms` [P, G, T]
    are the random numbers, from `make_uniforms`; `coefficient` holds the recipe's adapting
    coefficients by name, for a rollout whose temperature reads them. A sixth argument, `budget` [P, G], gives each
    answer a budget of its own in tokens, at least 1.

    Args:
      completion_length: T, the budget in tokens, the end token included.
      stop_ids: each ends an answer; it is a chosen token and stays in the mask, also where pad_id equals it.
      pad_id: fills what follows.
      axis: name of an outer vmap axis (replicas): the loop runs until all of its members have ended.
    """
    group = rollout.group_size
    stops = np.asarray(stop_ids, np.int32)
    drawn = make_drawn(network, rollout, pad_id)

    def draw(parameters: Parameters, prompts: Prompts, uniforms: Float[Array, "P G T"],
             version: Int[Array, ""], coefficient: Any = None, budget: Int[Array, "P G"] | None = None) -> Samples:
        count = prompts.lengths.shape[0]
        head = network.vocabulary(parameters)
        prompt_cache, prompt_routes = network.prefill(parameters, prompts.tokens)
        uniforms = jnp.moveaxis(uniforms, 0, 1)
        turns = network.turns(prompts.tokens.shape[1] + completion_length)
        limit = None if budget is None else budget.T

        def one_sample(cache, token, uniforms, alive, now):
            hidden, cache, chosen = network.decode(parameters, prompt_cache, cache, token, prompts.lengths, now, turns)
            uniform = jax.lax.dynamic_index_in_dim(uniforms, now, 1, keepdims=False)
            return cache, drawn(network.logits(hidden, head), uniform, alive, chosen, coefficient)

        step = jax.vmap(one_sample, in_axes=(0, 0, 0, 0, None))
        first = jnp.repeat(transformer.last_token(prompts.tokens, prompts.lengths)[None], group, axis=0)
        cache = own_caches(network, parameters, group, count, completion_length)
        alive = jnp.ones((group, count), bool)
        shapes = jax.eval_shape(step, cache, first, uniforms, alive, jnp.zeros((), jnp.int32))[1]
        buffers = jax.tree.map(lambda a: jnp.zeros((completion_length, *a.shape), a.dtype), shapes)
        buffers["tokens"] = jnp.full_like(buffers["tokens"], pad_id)

        def body(carry):
            now, cache, token, alive, buffers = carry
            cache, new = step(cache, token, uniforms, alive, now)
            buffers = jax.tree.map(lambda b, d: jax.lax.dynamic_update_index_in_dim(b, d, now, 0), buffers, new)
            return now + 1, cache, new["tokens"], goes_on(alive, new["tokens"], stops, now, limit), buffers

        def unfinished(carry):
            now, _, _, alive, _ = carry
            left = alive.any()
            if axis is not None:
                left = jax.lax.psum(left.astype(jnp.int32), axis) > 0
            return (now < completion_length) & left

        carry = (jnp.zeros((), jnp.int32), cache, first, alive, buffers)
        *_, buffers = jax.lax.while_loop(unfinished, body, carry)
        rows = {name: _prompt_major(a) for name, a in buffers.items()}
        return whole(network, rows, prompt_routes, stops, version)

    return draw


def make_drawn(network: Network, rollout: Rollout, pad_id: int) -> Callable[..., dict[str, Array]]:
    """Returns drawn(logits, uniform, alive, experts, coefficient) -> a token per row and its numbers, named as in `Samples`.

    Rows that are not alive get `pad_id` and zeros; what they could have drawn and their experts are not told apart.
    """
    def drawn(logits: Float[Array, "B V"], uniform: Float[Array, " B"], alive: Bool[Array, " B"],
              experts: Int[Array, "B L k"] | None, coefficient: Any = None) -> dict[str, Array]:
        token, logp, entropy, keep = sample.draw(uniform, logits, rollout, coefficient)
        more = {} if keep is None else {"support": pack_support(keep)}
        if experts is not None:
            more["routes"] = _small(network, experts)
        return {"tokens": jnp.where(alive, token, pad_id).astype(jnp.int32), "mask": alive,
                "rollout_logp": jnp.where(alive, logp, 0.0), "rollout_entropy": jnp.where(alive, entropy, 0.0), **more}

    return drawn


def own_caches(network: Network, parameters: Parameters, copies: int, rows: int, length: int) -> Any:
    """Room for the keys and values of `copies` samples of each of `rows` prompts, the copies in front."""
    return jax.tree.map(lambda a: jnp.zeros((copies, *a.shape), a.dtype),
                        jax.eval_shape(lambda: network.empty_cache(parameters, rows, length)))


def goes_on(alive: Bool[Array, "*B"], token: Int[Array, "*B"], stops: np.ndarray, now: Int[Array, "..."],
            limit: Int[Array, "*B"] | None) -> Bool[Array, "*B"]:
    """Whether another token of the answer is drawn behind the one at position `now`.

    Args:
      limit: the answer's own budget in tokens, if it has one.
    """
    more = alive & ~jnp.isin(token, stops)
    return more if limit is None else more & (now + 1 < limit)


def whole(network: Network, rows: dict[str, Array], prompt_routes: Array | None, stops: np.ndarray,
          version: Int[Array, ""]) -> Samples:
    """The samples of the buffers [N, T, ...] that a loop has filled: finished are those with a stop token."""
    if prompt_routes is not None:
        rows = {**rows, "prompt_routes": _small(network, prompt_routes)}
    finished = (rows["mask"] & jnp.isin(rows["tokens"], stops)).any(axis=1)
    return Samples(**rows, finished=finished, version=jnp.full(finished.shape, version, jnp.int32))


def make_uniforms(key: Key[Array, ""], prompts: int, group: int, length: int) -> Float[Array, "P G T"]:
    """The random numbers of a rollout, in [0, 1): those of sample g of prompt p come from a key of their own.

    They are the same whatever the number of prompts, samples or positions. The key is consumed.

    Args:
      prompts, group, length: P, G and T; G at most 4,096.

    Raises:
      ValueError: if G is larger.
    """
    if group > MOST_SAMPLES:
        raise ValueError(f"group_size={group}: at most {MOST_SAMPLES} samples per prompt can be drawn.")
    identity = jnp.arange(prompts)[:, None] * MOST_SAMPLES + jnp.arange(group)[None, :]
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, identity.reshape(-1))
    return jax.vmap(lambda k: jax.random.uniform(k, (length,)))(keys).reshape(prompts, group, length)


def _small(network: Network, chosen: Array) -> Array:
    return chosen.astype(routes.dtype(network.shape.mixture.experts))


def _prompt_major(a: Any) -> Array:
    """[T, G, P, ...] -> [P * G, T, ...]."""
    a = jnp.moveaxis(a, (2, 1, 0), (0, 1, 2))
    return a.reshape(-1, *a.shape[2:])
