"""The gradient, by recomputing one vocabulary tile at a time."""
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, UInt32

from kernels_pallas.linear_logprob import forward
from kernels_pallas.linear_logprob.reference import Scalar

Rows = Float32[Array, " M"]


def linear_logprob(hidden: Float[Array, "M D"], vocabulary: Float[Array, "V D"], targets: Int[Array, " M"],
                   temperature: Scalar, support: UInt32[Array, "M W"] | None, normaliser: Rows, entropy: Rows,
                   d_logp: Rows, d_entropy: Rows, soft_cap: int | float | None,
                   tile: int) -> tuple[Float[Array, "M D"], Float[Array, "V D"]]:
    """Cotangents of hidden and vocabulary; nothing larger than [M, tile] is made beside them."""

    def add(start, carry, width: int):
        d_hidden, d_vocabulary = carry
        u, kept = forward.tile_logits(hidden, vocabulary, temperature, support, soft_cap, start, width)
        d_u = _logit_cotangent(u, kept, targets - start, normaliser, entropy, d_logp, d_entropy)
        d_z = (d_u * _slope(u, temperature, soft_cap)).astype(hidden.dtype)
        rows = jax.lax.dynamic_slice_in_dim(vocabulary, start, width, axis=0)
        d_rows = _product(d_z, hidden, 0).astype(vocabulary.dtype)
        d_vocabulary = jax.lax.dynamic_update_slice_in_dim(d_vocabulary, d_rows, start, axis=0)
        return d_hidden + _product(d_z, rows, 1), d_vocabulary

    carry = jnp.zeros(hidden.shape, jnp.float32), jnp.zeros_like(vocabulary)
    d_hidden, d_vocabulary = forward.over_tiles(add, carry, vocabulary.shape[0], tile)
    return d_hidden.astype(hidden.dtype), d_vocabulary


def _logit_cotangent(u: Float32[Array, "M v"], kept: Bool[Array, "M v"] | None, column: Int[Array, " M"],
                     normaliser: Rows, entropy: Rows, d_logp: Rows, d_entropy: Rows) -> Float32[Array, "M v"]:
    """d_logp (1[v = target] - p_v) - d_entropy p_v (log p_v + H); 0 for tokens that are not kept."""
    logp = u - normaliser[:, None]
    p = jnp.exp(logp)
    pull = d_logp[:, None] + d_entropy[:, None] * (logp + entropy[:, None])
    target = jnp.arange(u.shape[1])[None, :] == column[:, None]
    d_u = jnp.where(target, d_logp[:, None], 0.0) - p * pull
    return d_u if kept is None else jnp.where(kept, d_u, 0.0)


def _slope(u: Float32[Array, "M v"], temperature: Scalar, soft_cap: int | float | None) -> Scalar | Float32[Array, "M v"]:
    """d u / d (h w) at u = cap tanh(h w / cap) / temperature."""
    if soft_cap is None:
        return 1.0 / temperature
    return (1.0 - (u * temperature / soft_cap) ** 2) / temperature


def _product(d_z: Float[Array, "M v"], other: Float[Array, "..."], axis: int) -> Float32[Array, "..."]:
    return jax.lax.dot_general(d_z, other, (((axis,), (0,)), ((), ())), preferred_element_type=jnp.float32)
