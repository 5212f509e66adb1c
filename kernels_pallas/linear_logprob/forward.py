"""Log-probability and entropy by one pass over vocabulary tiles (online softmax)."""
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, UInt32

from kernels_pallas.linear_logprob import blocks, reference, support as support_bits
from kernels_pallas.linear_logprob.reference import Scalar

Rows = Float32[Array, " M"]


class Moments(NamedTuple):
    """Sums over the tokens seen so far, per row.

    With u the logits: maximum, sum exp(u - maximum), sum exp(u - maximum) (u - maximum), and the
    target's u, which stays -inf until a tile holds the target and keeps it.
    """

    maximum: Rows
    total: Rows
    weighted: Rows
    chosen: Rows


def moments(hidden: Float[Array, "M D"], vocabulary: Float[Array, "V D"], targets: Int[Array, " M"],
            temperature: Scalar, support: UInt32[Array, "M W"] | None, soft_cap: int | float | None) -> Moments:
    """The sums over the whole vocabulary, one block of logits in memory at a time."""
    size = vocabulary.shape[0]
    row_blocks, tile = blocks.choose(hidden.shape[0], size)

    def one_block(_, rows):
        hidden, targets, support = rows

        def add(start, seen, width):
            u = tile_logits(hidden, vocabulary, temperature, support, soft_cap, start, width)
            return merged(seen, tile_moments(u, targets - start))

        return None, blocks.over_tiles(add, _nothing_seen(hidden), size, tile)

    return blocks.over_rows(one_block, None, (hidden, targets, support), row_blocks)[1]


def tile_logits(hidden: Float[Array, "M D"], vocabulary: Float[Array, "V D"], temperature: Scalar,
                support: UInt32[Array, "M W"] | None, soft_cap: int | float | None, start: int | Int[Array, ""],
                width: int) -> Float32[Array, "M v"]:
    """Logits of tokens start .. start + width - 1; `reference.EXCLUDED` for tokens that are not kept."""
    rows = jax.lax.dynamic_slice_in_dim(vocabulary, start, width, axis=0)
    u = reference.logits(hidden, rows, temperature, soft_cap)
    if support is None:
        return u
    words = support_bits.words_for(width)
    part = jax.lax.dynamic_slice_in_dim(support, start // support_bits.WORD, words, axis=1)
    return jnp.where(support_bits.unpack_support(part, width), u, reference.EXCLUDED)


def _nothing_seen(hidden: Float[Array, "M D"]) -> Moments:
    full = lambda value: jax.lax.full_like(hidden, value, jnp.float32, hidden.shape[:1])
    return Moments(full(reference.EXCLUDED / 2), full(0), full(0), full(-jnp.inf))


def tile_moments(u: Float32[Array, "M v"], column: Int[Array, " M"]) -> Moments:
    """The sums over one tile of logits.

    Args:
      u: logits, in nats.
      column: of the target; outside the tile where it is not there.
    """
    maximum = jnp.maximum(u.max(axis=-1), reference.EXCLUDED / 2)
    x = u - maximum[:, None]
    e = jnp.exp(x)
    here = jnp.take_along_axis(u, jnp.clip(column, 0, u.shape[1] - 1)[:, None], axis=1)[:, 0]
    inside = (column >= 0) & (column < u.shape[1]) & (here > reference.EXCLUDED / 2)
    return Moments(maximum, e.sum(axis=-1), (e * x).sum(axis=-1), jnp.where(inside, here, -jnp.inf))


def merged(a: Moments, b: Moments) -> Moments:
    """The sums over what either has seen."""
    maximum = jnp.maximum(a.maximum, b.maximum)
    shift_a, shift_b = a.maximum - maximum, b.maximum - maximum
    shrink_a, shrink_b = jnp.exp(shift_a), jnp.exp(shift_b)
    return Moments(
        maximum=maximum,
        total=a.total * shrink_a + b.total * shrink_b,
        weighted=(a.weighted + a.total * shift_a) * shrink_a + (b.weighted + b.total * shift_b) * shrink_b,
        chosen=jnp.maximum(a.chosen, b.chosen))


def results(seen: Moments) -> tuple[Rows, Rows, Rows, Rows]:
    """(logp, entropy, a, b) in nats, of sums over the whole vocabulary.

    a, the largest logit, and b, the log of sum exp(logit - a), make the log-normaliser a + b;
    they stay apart because their sum would round away digits of b. A row that keeps no token has
    b = 0, so that later arithmetic stays finite.
    """
    total = jnp.where(seen.total == 0, 1.0, seen.total)
    log_total = jnp.log(total)
    return (seen.chosen - seen.maximum) - log_total, log_total - seen.weighted / total, seen.maximum, log_total
