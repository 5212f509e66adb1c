"""The gradient, by computing every block of logits a second time."""
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from kernels_pallas.linear_logprob import blocks, forward, reference
from kernels_pallas.linear_logprob.reference import Scalar

Rows = Float32[Array, " M"]
Logits = PerRow = Float32[Array, "_ _"]  # tokens on either axis


def cotangents(rows: tuple, vocabulary: Float[Array, "V D"], temperature: Scalar,
               soft_cap: int | float | None) -> tuple[Float[Array, "M D"], Float[Array, "V D"]]:
    """Cotangents of hidden and vocabulary, one block of logits in memory at a time.

    Args:
      rows: everything that has a row per hidden state: hidden, targets, support; entropy, a and b
        from the forward pass, in nats; the cotangents of log-probability and entropy.
      vocabulary, temperature, soft_cap: as in the forward pass.
    """
    chosen = blocks.choose(rows[0].shape[0], vocabulary.shape[0])
    return over_blocks(d_logits, chosen, rows, vocabulary, temperature, soft_cap)


def over_blocks(block_d_logits: Callable[..., Float[Array, "M v"]], chosen: blocks.Blocks, rows: tuple,
                vocabulary: Float[Array, "V D"], temperature: Scalar,
                soft_cap: int | float | None) -> tuple[Float[Array, "M D"], Float[Array, "V D"]]:
    """Cotangents of hidden and vocabulary from those of the logits, which `block_d_logits` gives block by block.

    Args:
      block_d_logits: `d_logits`, or another of its signature.
      chosen: how the rows and the vocabulary are cut.
      rows, vocabulary, temperature, soft_cap: as in `cotangents`.
    """
    row_blocks, tile = chosen

    def one_block(d_vocabulary, rows):
        hidden = rows[0]

        def add(start, carry, width):
            d_hidden, d_vocabulary = carry
            d_z = block_d_logits(rows, vocabulary, temperature, soft_cap, start, width)
            part = jax.lax.dynamic_slice_in_dim(vocabulary, start, width, axis=0)
            d_hidden += reference.product(d_z, part, 1, 0)
            return d_hidden, _add_rows(d_vocabulary, reference.product(d_z, hidden, 0, 0), start)

        carry = jax.lax.full_like(hidden, 0, jnp.float32), d_vocabulary
        d_hidden, d_vocabulary = blocks.over_tiles(add, carry, vocabulary.shape[0], tile)
        return d_vocabulary, d_hidden.astype(hidden.dtype)

    d_vocabulary = jax.lax.full_like(vocabulary, 0, vocabulary.dtype if row_blocks == 1 else jnp.float32)
    d_vocabulary, d_hidden = blocks.over_rows(one_block, d_vocabulary, rows, row_blocks)
    return d_hidden, d_vocabulary.astype(vocabulary.dtype)


def d_logits(rows: tuple, vocabulary: Float[Array, "V D"], temperature: Scalar, soft_cap: int | float | None,
             start: int | Int[Array, ""], width: int) -> Float[Array, "M v"]:
    """Cotangent of hidden vocabulary^T at tokens start .. start + width - 1, in the dtype of products.

    Args:
      rows, vocabulary, temperature, soft_cap: as in `cotangents`.
    """
    hidden, targets, support, *per_row = rows
    u = forward.tile_logits(hidden, vocabulary, temperature, support, soft_cap, start, width)
    d_z = _logit_cotangent(u, targets - start, *per_row) * slope(u, temperature, soft_cap)
    return d_z.astype(reference.operand_dtype(hidden, vocabulary))


def _add_rows(whole: Float[Array, "V D"], part: Float32[Array, "v D"],
              start: int | Int[Array, ""]) -> Float[Array, "V D"]:
    part += jax.lax.dynamic_slice_in_dim(whole, start, part.shape[0], axis=0)
    return jax.lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), start, axis=0)


def _logit_cotangent(u: Float32[Array, "M v"], column: Int[Array, " M"], entropy: Rows, maximum: Rows,
                     log_total: Rows, d_logp: Rows, d_entropy: Rows) -> Float32[Array, "M v"]:
    """d_logp (1[v = target] - p_v) - d_entropy p_v (log p_v + H)."""
    d_u = without_target(u, *(x[:, None] for x in (entropy, maximum, log_total, d_logp, d_entropy)))
    here = (column >= 0) & (column < u.shape[1])
    # Row by row, not by an index pair: a row axis that is sharded over devices stays so.
    add = jax.vmap(lambda row, v, x: row.at[v].add(x))
    return add(d_u, jnp.where(here, column, 0), jnp.where(here, d_logp, 0.0))


def without_target(u: Logits, entropy: PerRow, maximum: PerRow, log_total: PerRow, d_logp: PerRow,
                   d_entropy: PerRow) -> Logits:
    """-d_logp p - d_entropy p (log p + H), p = exp(u - maximum - log_total), whichever axis the tokens are on.

    Args:
      u: logits, in nats.
      entropy, maximum, log_total: of every row's whole distribution, in nats.
      d_logp, d_entropy: cotangents of the results.
    """
    logp = (u - maximum) - log_total
    return -jnp.exp(logp) * ((d_logp + d_entropy * entropy) + d_entropy * logp)


def slope(u: Logits, temperature: Scalar | PerRow, soft_cap: int | float | None) -> Scalar | Float32[Array, "_ _"]:
    """d u / d (h w) at u = cap tanh(h w / cap) / temperature.

    Args:
      u: logits, in nats.
      temperature: one, or one for every row.
      soft_cap: in nats, or None.
    """
    if soft_cap is None:
        return 1.0 / temperature
    return (1.0 - (u * (temperature / soft_cap)) ** 2) * (1.0 / temperature)
