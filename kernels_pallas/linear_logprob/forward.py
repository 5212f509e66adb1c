"""Log-probability and entropy by one pass over vocabulary tiles (online softmax)."""
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, UInt32

from kernels_pallas.linear_logprob import reference, support as support_bits
from kernels_pallas.linear_logprob.reference import Scalar


class Moments(NamedTuple):
    """Sums over the tokens seen so far, per row.

    With u the logits: maximum, sum exp(u - maximum), sum exp(u - maximum) (u - maximum), and the
    target's u, which stays at -inf until a tile holds the target and its support keeps it.
    """

    maximum: Float32[Array, " M"]
    total: Float32[Array, " M"]
    weighted: Float32[Array, " M"]
    chosen: Float32[Array, " M"]


def linear_logprob(hidden: Float[Array, "M D"], vocabulary: Float[Array, "V D"], targets: Int[Array, " M"],
                   temperature: Scalar, support: UInt32[Array, "M W"] | None, soft_cap: int | float | None,
                   tile: int) -> tuple[Float32[Array, " M"], Float32[Array, " M"], Float32[Array, " M"]]:
    """(logp, entropy, log-normaliser) in nats; nothing larger than [M, tile] is made.

    The log-normaliser of a row that keeps no token is 0, so that later arithmetic stays finite.
    """
    size = vocabulary.shape[0]

    def add(start, seen: Moments, width: int) -> Moments:
        u, kept = tile_logits(hidden, vocabulary, temperature, support, soft_cap, start, width)
        return _add(seen, u, kept, targets - start)

    zero = jnp.zeros(hidden.shape[:1], jnp.float32)
    seen = Moments(zero + reference.EXCLUDED / 2, zero, zero, zero - jnp.inf)
    seen = over_tiles(add, seen, size, tile)
    empty = seen.total == 0
    total = jnp.where(empty, 1.0, seen.total)
    normaliser = jnp.where(empty, 0.0, seen.maximum + jnp.log(total))
    return seen.chosen - normaliser, jnp.log(total) - seen.weighted / total, normaliser


def over_tiles(body, carry, size: int, tile: int):
    """body(start, carry, width) over all full tiles, and once more, narrower, over what is left."""
    full = size // tile
    if full == 1:
        carry = body(0, carry, tile)
    else:
        carry = jax.lax.fori_loop(0, full, lambda i, carry: body(i * tile, carry, tile), carry)
    if size % tile:
        carry = body(full * tile, carry, size % tile)
    return carry


def tile_logits(hidden: Float[Array, "M D"], vocabulary: Float[Array, "V D"], temperature: Scalar,
                support: UInt32[Array, "M W"] | None, soft_cap: int | float | None, start: int | Int[Array, ""],
                width: int) -> tuple[Float32[Array, "M v"], Bool[Array, "M v"] | None]:
    """Logits of tokens start .. start + width - 1, and which of them are kept (None: all)."""
    rows = jax.lax.dynamic_slice_in_dim(vocabulary, start, width, axis=0)
    u = reference.logits(hidden, rows, temperature, soft_cap)
    if support is None:
        return u, None
    words = support_bits.words_for(width)
    part = jax.lax.dynamic_slice_in_dim(support, start // support_bits.WORD, words, axis=1)
    return u, support_bits.unpack_support(part, width)


def _add(seen: Moments, u: Float32[Array, "M v"], kept: Bool[Array, "M v"] | None, column: Int[Array, " M"]) -> Moments:
    if kept is not None:
        u = jnp.where(kept, u, reference.EXCLUDED)
    maximum = jnp.maximum(seen.maximum, u.max(axis=-1))
    x = u - maximum[:, None]
    e = jnp.exp(x)
    shift = seen.maximum - maximum
    shrink = jnp.exp(shift)
    here = jnp.take_along_axis(u, jnp.clip(column, 0, u.shape[1] - 1)[:, None], axis=1)[:, 0]
    inside = (column >= 0) & (column < u.shape[1]) & (here > reference.EXCLUDED / 2)
    return Moments(
        maximum=maximum,
        total=seen.total * shrink + e.sum(axis=-1),
        weighted=(seen.weighted + seen.total * shift) * shrink + (e * x).sum(axis=-1),
        chosen=jnp.where(inside, here, seen.chosen))
