"""The gradient: a kernel computes the logits' cotangent of a chunk of tokens, XLA multiplies it back.

Four matrix products in all, one more than with the logits kept.
"""
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from kernels_pallas.linear_logprob import backward, blocks, pallas_tile, reference, support as support_bits
from kernels_pallas.linear_logprob.reference import Scalar


def cotangents(rows: tuple, vocabulary: Float[Array, "V D"], temperature: Scalar,
               soft_cap: int | float | None) -> tuple[Float[Array, "M D"], Float[Array, "V D"]]:
    """`backward.cotangents` with the cotangent of the logits by a kernel, one chunk in memory at a time."""
    count, (size, width) = rows[0].shape[0], vocabulary.shape
    itemsize = jnp.dtype(reference.operand_dtype(rows[0], vocabulary)).itemsize
    chosen = blocks.kernel(count, size, width, itemsize)
    chunks = blocks.chunks(count, size, chosen.tile, itemsize)
    # Rows of zeros have no cotangent of their results, so they add nothing.
    whole = jax.tree.map(lambda x: pallas_tile.whole_rows(x, chosen.rows * chunks.row_blocks), rows)
    d_hidden, d_vocabulary = backward.over_blocks(
        functools.partial(_d_logits, chosen), chunks, whole, vocabulary, temperature, soft_cap)
    return d_hidden[:count], d_vocabulary


def _d_logits(chosen: blocks.Kernel, rows: tuple, vocabulary: Float[Array, "V D"], temperature: Scalar,
              soft_cap: int | float | None, start: int | Int[Array, ""], width: int) -> Float[Array, "M v"]:
    """`backward.d_logits`: whole tiles by the kernel, the fewer tokens that may be left by XLA.

    A TPU's part is transposed, which the products that follow take as it is.
    """
    left = width % chosen.tile
    last = lambda: backward.d_logits(rows, vocabulary, temperature, soft_cap, start + width - left, left)
    if left == width:
        return last()
    found = _whole_tiles(chosen, rows, vocabulary, temperature, soft_cap, start, width - left)
    return jnp.concatenate([found, last()], axis=1) if left else found


def _whole_tiles(chosen, rows, vocabulary, temperature, soft_cap, start, width) -> Float[Array, "M v"]:
    hidden, targets, support, *numbers = rows
    temperatures = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), targets.shape)
    nothing = jnp.zeros_like(temperatures)
    part = jax.lax.dynamic_slice_in_dim(vocabulary, start, width, axis=0)
    if support is not None:
        support = jax.lax.dynamic_slice_in_dim(support, start // support_bits.WORD, width // support_bits.WORD, axis=1)
    # Eight rows of numbers: a whole tile of a TPU's registers.
    stacked = jnp.stack([*numbers, temperatures, nothing, nothing])
    read = pallas_tile.operands(chosen, hidden, part, targets - start, stacked, support)
    if chosen.token_axis:
        out, shape = pl.BlockSpec((chosen.rows, chosen.tile), lambda i, j: (i, j)), (hidden.shape[0], width)
    else:
        out, shape = pl.BlockSpec((chosen.tile, chosen.rows), lambda i, j: (j, i)), (width, hidden.shape[0])
    found = pallas_tile.run(functools.partial(_body, chosen, soft_cap), chosen, read, out=out, shape=shape,
                            dtype=reference.operand_dtype(hidden, vocabulary), name="linear_logprob_backward")
    return found if chosen.token_axis else found.T


def _body(chosen, soft_cap, hidden, vocabulary, targets, numbers, support, out):
    entropy, maximum, log_total, d_logp, d_entropy, temperature = (
        pallas_tile.per_row(chosen, numbers[i:i + 1, :]) for i in range(6))
    u = pallas_tile.logits(chosen, hidden, vocabulary, temperature, support, soft_cap)
    d_u = backward.without_target(u, entropy, maximum, log_total, d_logp, d_entropy)
    d_u += jnp.where(pallas_tile.is_target(chosen, targets, u.shape), d_logp, 0.0)
    out[...] = (d_u * backward.slope(u, temperature, soft_cap)).astype(out.dtype)
