"""The sums over the vocabulary, a kernel program per block of rows and tile of tokens."""
import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Float32, Int, UInt32

from kernels_pallas.linear_logprob import blocks, forward, pallas_tile, reference
from kernels_pallas.linear_logprob.forward import Moments
from kernels_pallas.linear_logprob.reference import Scalar


def moments(hidden: Float[Array, "M D"], vocabulary: Float[Array, "V D"], targets: Int[Array, " M"],
            temperature: Scalar, support: UInt32[Array, "M W"] | None, soft_cap: int | float | None) -> Moments:
    """`forward.moments` by a kernel; the tokens beyond the last whole tile, fewer than a tile, by XLA."""
    count, (size, width) = hidden.shape[0], vocabulary.shape
    chosen = blocks.kernel(count, size, width, jnp.dtype(reference.operand_dtype(hidden, vocabulary)).itemsize)
    partial = _partial_sums(chosen, hidden, vocabulary, targets, temperature, support, soft_cap)
    seen = _merged(partial[:, :, :count])
    left = size % chosen.tile
    if not left:
        return seen
    u = forward.tile_logits(hidden, vocabulary, temperature, support, soft_cap, size - left, left)
    return forward.merged(seen, forward.tile_moments(u, targets - (size - left)))


def _partial_sums(chosen, hidden, vocabulary, targets, temperature, support,
                  soft_cap) -> Float32[Array, "tiles 4 M"]:
    """The fields of `Moments` of every tile, where a target that is not there is `reference.EXCLUDED`."""
    hidden, targets = (pallas_tile.whole_rows(x, chosen.rows) for x in (hidden, targets))
    support = None if support is None else pallas_tile.whole_rows(support, chosen.rows)
    temperatures = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32).reshape(1, 1), (1, hidden.shape[0]))
    read = pallas_tile.operands(chosen, hidden, vocabulary, targets, temperatures, support)
    return pallas_tile.run(
        functools.partial(_body, chosen, soft_cap), chosen, read,
        out=pl.BlockSpec((None, 4, chosen.rows), lambda i, j: (j, 0, i)),
        shape=(vocabulary.shape[0] // chosen.tile, 4, hidden.shape[0]), dtype=jnp.float32,
        name="linear_logprob_forward")


def _body(chosen, soft_cap, hidden, vocabulary, targets, temperature, support, out):
    over_tokens = {"axis": chosen.token_axis, "keepdims": True}
    temperature = pallas_tile.per_row(chosen, temperature[...])
    u = pallas_tile.logits(chosen, hidden, vocabulary, temperature, support, soft_cap)
    maximum = jnp.maximum(u.max(**over_tokens), reference.EXCLUDED / 2)
    x = u - maximum
    e = jnp.exp(x)
    target = jnp.where(pallas_tile.is_target(chosen, targets, u.shape), u, reference.EXCLUDED)
    found = maximum, e.sum(**over_tokens), (e * x).sum(**over_tokens), target.max(**over_tokens)
    for i, numbers in enumerate(found):
        out[i:i + 1, :] = numbers.reshape(1, -1)


def _merged(partial: Float32[Array, "tiles 4 M"]) -> Moments:
    """The sums over all tiles at once: the sums of each, shifted to the maximum of all."""
    maxima, totals, weighted, chosen = (partial[:, i] for i in range(4))
    maximum, chosen = maxima.max(axis=0), chosen.max(axis=0)
    shift = maxima - maximum[None]
    shrink = jnp.exp(shift)
    return Moments(
        maximum=maximum,
        total=(totals * shrink).sum(axis=0),
        weighted=((weighted + totals * shift) * shrink).sum(axis=0),
        chosen=jnp.where(chosen > reference.EXCLUDED / 2, chosen, -jnp.inf))
