"""The definition: one softmax over the prompt's positions and the sample's own."""
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from kernels_pallas.prefix_attention.reference import scores
from kernels_pallas.prefix_attention.visibility import Options

NEVER = -1e30  # finite, so that a row that sees nothing gives numbers


class Cache(NamedTuple):
    """Keys and values by key head, so that the positions of one head lie together.

    Attributes:
      key, value: of each position.
      lengths: of each sequence, the number of leading positions that may be seen; behind them may stand anything
        finite.
    """

    key: Float[Array, "*B K T E"]
    value: Float[Array, "*B K T E"]
    lengths: Int[Array, "*B"]


def decode_attention(query: Float[Array, "*G P H E"], own: Cache, prompt: Cache,
                     options: Options = Options()) -> Float[Array, "*G P H E"]:
    """sum_j w_j v_j / sum_j w_j with w_j = exp(score(q k_j)) over what the prompt's cache and the own one show."""
    attend = functools.partial(_one_sample, options)
    for _ in range(query.ndim - 3):
        attend = jax.vmap(attend, in_axes=(0, 0, None))
    return attend(query, own, prompt)


def _one_sample(options: Options, query: Float[Array, "P H E"], own: Cache, prompt: Cache) -> Float[Array, "P H E"]:
    q = by_key_head(query, prompt.key.shape[1])
    near_from, far_from = first_seen(own, prompt, options.window)
    far, near = _scores(q, prompt, far_from, options), _scores(q, own, near_from, options)
    # Half of NEVER: against it, exp(NEVER) is 0 also in a row that sees nothing.
    top = jnp.maximum(jnp.maximum(far.max(axis=-1), near.max(axis=-1)), NEVER / 2)[..., None]
    far, near = jnp.exp(far - top), jnp.exp(near - top)
    total = far.sum(axis=-1, keepdims=True) + near.sum(axis=-1, keepdims=True)
    mixed = _mixture(far, prompt) + _mixture(near, own)
    return (mixed / jnp.where(total == 0, 1.0, total)).reshape(query.shape).astype(query.dtype)


def _scores(query: Float[Array, "P K R E"], cache: Cache, first: Int32[Array, " P"] | None,
            options: Options) -> Float32[Array, "P K R T"]:
    products = jnp.einsum("pkre,pkte->pkrt", query, cache.key, preferred_element_type=jnp.float32)
    visible = seen(cache)
    if first is not None:
        visible &= jax.lax.broadcasted_iota(jnp.int32, visible.shape, 1) >= first[:, None]
    return jnp.where(visible[:, None, None, :], scores(products, query.shape[-1], options), NEVER)


def _mixture(weight: Float32[Array, "P K R T"], cache: Cache) -> Float32[Array, "P K R E"]:
    return jnp.einsum("pkrt,pkte->pkre", weight.astype(cache.value.dtype), cache.value,
                      preferred_element_type=jnp.float32)


def by_key_head(query: Float[Array, "*G P H E"], key_heads: int) -> Float[Array, "*G P K R E"]:
    """The R = H / K queries of each key head, side by side."""
    *sequences, h, e = query.shape
    return query.reshape(*sequences, key_heads, h // key_heads, e)


def seen(cache: Cache) -> Bool[Array, "*B T"]:
    """Which positions may be seen."""
    positions = jax.lax.broadcasted_iota(jnp.int32, (*cache.lengths.shape, cache.key.shape[-2]), cache.lengths.ndim)
    return positions < cache.lengths[..., None]


def first_seen(own: Cache, prompt: Cache,
               window: int | None) -> tuple[Int32[Array, "*G P"] | None, Int32[Array, "*G P"] | None]:
    """The first own position, and the first of the prompt, in the window that ends with the newest token.

    It may be negative, or behind all positions: then none is in the window. None: whatever the lengths, all are.

    Args:
      own, prompt: a length beyond its cache stands for all of it.
      window: in tokens of prompt and own together; None: all.
    """
    t, s = own.key.shape[-2], prompt.key.shape[-2]
    if window is None or window >= s + t:
        return None, None
    near_from = jnp.minimum(own.lengths.astype(jnp.int32), t) - window
    far_from = near_from + jnp.broadcast_to(jnp.minimum(prompt.lengths.astype(jnp.int32), s), near_from.shape)
    return None if window >= t else near_from, far_from
