"""The gradient, by computing every block of logits a second time."""
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from kernels_pallas.linear_logprob import blocks, forward, reference
from kernels_pallas.linear_logprob.reference import Scalar

Rows = Float32[Array, " M"]


def cotangents(rows: tuple, vocabulary: Float[Array, "V D"], temperature: Scalar,
               soft_cap: int | float | None) -> tuple[Float[Array, "M D"], Float[Array, "V D"]]:
    """Cotangents of hidden and vocabulary, one block of logits in memory at a time.

    Args:
      rows: everything that has a row per hidden state: hidden, targets, support; entropy, a and b
        from the forward pass, in nats; the cotangents of log-probability and entropy.
      vocabulary, temperature, soft_cap: as in the forward pass.
    """
    row_blocks, tile = blocks.choose(rows[0].shape[0], vocabulary.shape[0])

    def one_block(d_vocabulary, rows):
        hidden, targets, support, *per_row = rows

        def add(start, carry, width):
            d_hidden, d_vocabulary = carry
            u = forward.tile_logits(hidden, vocabulary, temperature, support, soft_cap, start, width)
            d_z = _logit_cotangent(u, targets - start, *per_row) * _slope(u, temperature, soft_cap)
            d_z = d_z.astype(reference.operand_dtype(hidden, vocabulary))
            part = jax.lax.dynamic_slice_in_dim(vocabulary, start, width, axis=0)
            d_hidden += reference.product(d_z, part, 1, 0)
            return d_hidden, _add_rows(d_vocabulary, reference.product(d_z, hidden, 0, 0), start)

        carry = jax.lax.full_like(hidden, 0, jnp.float32), d_vocabulary
        d_hidden, d_vocabulary = blocks.over_tiles(add, carry, vocabulary.shape[0], tile)
        return d_vocabulary, d_hidden.astype(hidden.dtype)

    d_vocabulary = jax.lax.full_like(vocabulary, 0, vocabulary.dtype if row_blocks == 1 else jnp.float32)
    d_vocabulary, d_hidden = blocks.over_rows(one_block, d_vocabulary, rows, row_blocks)
    return d_hidden, d_vocabulary.astype(vocabulary.dtype)


def _add_rows(whole: Float[Array, "V D"], part: Float32[Array, "v D"],
              start: int | Int[Array, ""]) -> Float[Array, "V D"]:
    part += jax.lax.dynamic_slice_in_dim(whole, start, part.shape[0], axis=0)
    return jax.lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), start, axis=0)


def _logit_cotangent(u: Float32[Array, "M v"], column: Int[Array, " M"], entropy: Rows, maximum: Rows,
                     log_total: Rows, d_logp: Rows, d_entropy: Rows) -> Float32[Array, "M v"]:
    """d_logp (1[v = target] - p_v) - d_entropy p_v (log p_v + H)."""
    logp = (u - maximum[:, None]) - log_total[:, None]
    d_u = -jnp.exp(logp) * ((d_logp + d_entropy * entropy)[:, None] + d_entropy[:, None] * logp)
    here = (column >= 0) & (column < u.shape[1])
    # Row by row, not by an index pair: a row axis that is sharded over devices stays so.
    add = jax.vmap(lambda row, v, x: row.at[v].add(x))
    return add(d_u, jnp.where(here, column, 0), jnp.where(here, d_logp, 0.0))


def _slope(u: Float32[Array, "M v"], temperature: Scalar,
           soft_cap: int | float | None) -> Scalar | Float32[Array, "M v"]:
    """d u / d (h w) at u = cap tanh(h w / cap) / temperature."""
    if soft_cap is None:
        return 1.0 / temperature
    return (1.0 - (u * temperature / soft_cap) ** 2) / temperature
