"""Attention in two parts, the shared prompt and the sample's own tokens, that are merged by their softmax sums."""
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import custom_batching
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from kernels_pallas.decode_attention import blocks, reference
from kernels_pallas.decode_attention.reference import NEVER, Cache
from kernels_pallas.prefix_attention.reference import scores
from kernels_pallas.prefix_attention.visibility import Options

First = Int32[Array, "*B M"] | None


class Sums(NamedTuple):
    """Softmax sums of every query row over some positions; `merged` adds two of them.

    With s the scores: top = max s (no less than NEVER / 2), total = sum exp(s - top), mixed = sum exp(s - top) v.
    """

    mixed: Float32[Array, "*B K M E"]
    top: Float32[Array, "*B K M 1"]
    total: Float32[Array, "*B K M 1"]


def decode_attention(sums: Callable[..., Sums], query: Float[Array, "*G P H E"], own: Cache, prompt: Cache,
                     options: Options) -> Float[Array, "*G P H E"]:
    """`reference.decode_attention`, by one call of `sums` for the prompt's cache and one for the own ones.

    Args:
      sums: (query [*B, K, M, E], cache, first [*B, M] or None, options) -> Sums, such as `tiled`.
    """
    own_sums = prompt_sums = sharing(functools.partial(sums, options=options))
    for _ in range(query.ndim - 3):
        prompt_sums = jax.vmap(prompt_sums, in_axes=(0, None, 0))
    q = reference.by_key_head(query, prompt.key.shape[1])
    each = lambda first: jnp.broadcast_to(first[..., None], (*first.shape, q.shape[-2]))
    near_from, far_from = jax.tree.map(each, reference.first_seen(own, prompt, options.window))
    mixed, _, total = merged(prompt_sums(q, prompt, far_from), own_sums(q, own, near_from))
    return (mixed / jnp.where(total == 0, 1.0, total)).reshape(query.shape).astype(query.dtype)


def sharing(sums: Callable[..., Sums]) -> Callable[..., Sums]:
    """`sums` whose `vmap` over the queries alone reads the cache once: mapped queries are more rows of one product.

    The first position that each of them sees goes along. A `vmap` over the cache puts one more axis in front of all.
    """
    shared = custom_batching.custom_vmap(sums)

    @shared.def_vmap
    def mapped(size: int, batched: list, query: Array, cache: Cache, first: Array | None) -> tuple[Sums, Sums]:
        whole = lambda a, has: a if has else jnp.broadcast_to(a[None], (size, *a.shape))
        if any(jax.tree.leaves(batched[1])):
            result = shared(*jax.tree.map(whole, (query, cache, first), tuple(batched)))
        else:
            query, first = jax.tree.map(whole, (query, first), (batched[0], batched[2]))
            rows = query.shape[-2]
            merge = jnp.moveaxis(query, 0, -3)
            first = jax.tree.map(lambda a: jnp.moveaxis(a, 0, -2).reshape(*a.shape[1:-1], size * rows), first)
            result = shared(merge.reshape(*merge.shape[:-3], size * rows, merge.shape[-1]), cache, first)
            result = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(*a.shape[:-2], size, rows, -1), -3, 0), result)
        return result, Sums(True, True, True)

    return shared


def tiled(query: Float[Array, "*B K M E"], cache: Cache, first: First = None, options: Options = Options()) -> Sums:
    """The sums in plain XLA, by tiles of positions, from the first to the last that some row sees.

    The last tile begins early enough to end with the cache, and leaves out what an earlier one has seen.

    Args:
      first: the first position that each row sees, also below 0 or behind all; None: 0.
    """
    size = cache.key.shape[-2]
    tile = blocks.tile_on_cpu(size)
    visible = reference.seen(cache)
    if tile == size:
        return _tile(query, cache.key, cache.value, _by_row(visible, first, 0), options)

    def at(i: int | Int[Array, ""]) -> Sums:
        start = jnp.minimum(i * tile, size - tile)
        key, value = (jax.lax.dynamic_slice_in_dim(a, start, tile, a.ndim - 2) for a in (cache.key, cache.value))
        part = jax.lax.dynamic_slice_in_dim(visible, start, tile, visible.ndim - 1)
        place = jax.lax.broadcasted_iota(jnp.int32, part.shape, part.ndim - 1)
        return _tile(query, key, value, _by_row(part & (start + place >= i * tile), first, start), options)

    column = lambda value: jax.lax.full_like(query, value, jnp.float32, (*query.shape[:-1], 1))
    nothing = Sums(jax.lax.full_like(query, 0, jnp.float32), column(NEVER / 2), column(0))
    return jax.lax.fori_loop(*_tiles(cache, first, tile), lambda i, sums: merged(sums, at(i)), nothing)


def _tiles(cache: Cache, first: First, tile: int) -> tuple[int | Int[Array, ""], Int[Array, ""]]:
    """The first tile that some row sees, and that behind the last."""
    size = cache.key.shape[-2]
    if first is None:
        return 0, (jnp.minimum(cache.lengths.max(), size) + tile - 1) // tile
    first, length = jnp.maximum(first, 0), jnp.minimum(cache.lengths, size)[..., None]
    some = first < length
    low, high = jnp.where(some, first, size).min(), jnp.where(some, length, 0).max()
    return low // tile, (high + tile - 1) // tile


def _by_row(seen: Bool[Array, "*B t"], first: First, start: int | Int[Array, ""]) -> Bool[Array, "*B 1 #M t"]:
    """Which of the positions start, start + 1, ... every row sees, for all key heads."""
    seen = seen[..., None, None, :]
    if first is None:
        return seen
    position = start + jax.lax.broadcasted_iota(jnp.int32, seen.shape, seen.ndim - 1)
    return seen & (position >= first[..., None, :, None])


def _tile(query: Float[Array, "*B K M E"], key: Float[Array, "*B K t E"], value: Float[Array, "*B K t E"],
          seen: Bool[Array, "*B 1 #M t"], options: Options) -> Sums:
    products = jnp.einsum("...me,...te->...mt", query, key, preferred_element_type=jnp.float32)
    # As a matrix: a compiler that makes a loop of every axis takes three times as long for short rows in five axes.
    flat = lambda a: a.reshape(-1, a.shape[-1])
    score = jnp.where(flat(jnp.broadcast_to(seen, products.shape)), scores(flat(products), query.shape[-1], options), NEVER)
    top = jnp.maximum(score.max(axis=-1, keepdims=True), NEVER / 2)
    weight = jnp.exp(score - top)
    top, total, weight = (a.reshape(*products.shape[:-1], -1) for a in (top, weight.sum(axis=-1, keepdims=True), weight))
    mixed = jnp.einsum("...mt,...te->...me", weight.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return Sums(mixed, top, total)


def merged(a: Sums, b: Sums) -> Sums:
    """The sums over the positions of both."""
    top = jnp.maximum(a.top, b.top)
    shrink_a, shrink_b = jnp.exp(a.top - top), jnp.exp(b.top - top)
    return Sums(a.mixed * shrink_a + b.mixed * shrink_b, top, a.total * shrink_a + b.total * shrink_b)
