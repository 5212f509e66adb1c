"""Attention in two parts, the shared prompt and the sample's own tokens, that are merged by their softmax sums."""
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import custom_batching
from jaxtyping import Array, Bool, Float, Float32, Int

from kernels_pallas.decode_attention import blocks, reference
from kernels_pallas.decode_attention.reference import NEVER, Cache


class Sums(NamedTuple):
    """Softmax sums of every query row over some positions; `merged` adds two of them.

    With s the scores: top = max s (no less than NEVER / 2), total = sum exp(s - top), mixed = sum exp(s - top) v.
    """

    mixed: Float32[Array, "*B K M E"]
    top: Float32[Array, "*B K M 1"]
    total: Float32[Array, "*B K M 1"]


def decode_attention(sums: Callable[..., Sums], query: Float[Array, "*G P H E"], own: Cache,
                     prompt: Cache) -> Float[Array, "*G P H E"]:
    """`reference.decode_attention`, by one call of `sums` for the prompt's cache and one for the own ones.

    Args:
      sums: (query [*B, K, M, E], cache) -> Sums, such as `tiled`.
    """
    own_sums = prompt_sums = sharing(sums)
    for _ in range(query.ndim - 3):
        prompt_sums = jax.vmap(prompt_sums, in_axes=(0, None))
    q = reference.by_key_head(query, prompt.key.shape[1])
    mixed, _, total = merged(prompt_sums(q, prompt), own_sums(q, own))
    return (mixed / jnp.where(total == 0, 1.0, total)).reshape(query.shape).astype(query.dtype)


def sharing(sums: Callable[..., Sums]) -> Callable[..., Sums]:
    """`sums` whose `vmap` over the queries alone reads the cache once: mapped queries are more rows of one product.

    A `vmap` over the cache as well puts one more axis in front of both.
    """
    shared = custom_batching.custom_vmap(sums)

    @shared.def_vmap
    def mapped(size: int, batched: list, query: Array, cache: Cache) -> tuple[Sums, Sums]:
        if any(jax.tree.leaves(batched[1])):
            whole = lambda a, has: a if has else jnp.broadcast_to(a[None], (size, *a.shape))
            result = shared(*jax.tree.map(whole, (query, cache), tuple(batched)))
        else:
            rows = query.shape[-2]
            merge = jnp.moveaxis(query, 0, -3)
            result = shared(merge.reshape(*merge.shape[:-3], size * rows, merge.shape[-1]), cache)
            result = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(*a.shape[:-2], size, rows, -1), -3, 0), result)
        return result, Sums(True, True, True)

    return shared


def tiled(query: Float[Array, "*B K M E"], cache: Cache) -> Sums:
    """The sums in plain XLA, by tiles of positions, as far as the longest sequence reaches.

    The last tile begins early enough to end with the cache, and leaves out what an earlier one has seen.
    """
    size = cache.key.shape[-2]
    tile = blocks.tile_on_cpu(size)
    visible = reference.seen(cache)
    if tile == size:
        return _tile(query, cache.key, cache.value, visible)

    def at(i: int | Int[Array, ""]) -> Sums:
        start = jnp.minimum(i * tile, size - tile)
        key, value = (jax.lax.dynamic_slice_in_dim(a, start, tile, a.ndim - 2) for a in (cache.key, cache.value))
        part = jax.lax.dynamic_slice_in_dim(visible, start, tile, visible.ndim - 1)
        place = jax.lax.broadcasted_iota(jnp.int32, part.shape, part.ndim - 1)
        return _tile(query, key, value, part & (start + place >= i * tile))

    column = lambda value: jax.lax.full_like(query, value, jnp.float32, (*query.shape[:-1], 1))
    nothing = Sums(jax.lax.full_like(query, 0, jnp.float32), column(NEVER / 2), column(0))
    tiles = (jnp.minimum(cache.lengths.max(), size) + tile - 1) // tile
    return jax.lax.fori_loop(0, tiles, lambda i, sums: merged(sums, at(i)), nothing)


def _tile(query: Float[Array, "*B K M E"], key: Float[Array, "*B K t E"], value: Float[Array, "*B K t E"],
          seen: Bool[Array, "*B t"]) -> Sums:
    score = jnp.einsum("...me,...te->...mt", query, key, preferred_element_type=jnp.float32) * query.shape[-1] ** -0.5
    score = jnp.where(seen[..., None, None, :], score, NEVER)
    top = jnp.maximum(score.max(axis=-1, keepdims=True), NEVER / 2)
    weight = jnp.exp(score - top)
    mixed = jnp.einsum("...mt,...te->...me", weight.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return Sums(mixed, top, weight.sum(axis=-1, keepdims=True))


def merged(a: Sums, b: Sums) -> Sums:
    """The sums over the positions of both."""
    top = jnp.maximum(a.top, b.top)
    shrink_a, shrink_b = jnp.exp(a.top - top), jnp.exp(b.top - top)
    return Sums(a.mixed * shrink_a + b.mixed * shrink_b, top, a.total * shrink_a + b.total * shrink_b)
