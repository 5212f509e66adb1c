"""Rotary position embedding."""
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotate(x: Float[Array, "M H E"], position: Int[Array, " M"], base: float) -> Float[Array, "M H E"]:
    """Turns the pair (x_i, x_{i + E/2}) by the angle position * base^(-2i / E).

    Args:
      x: queries or keys, E even.
      position: of each row in its text, from 0.
      base: of the geometric progression of wavelengths.

    Source: Su et al. 2021, arXiv:2104.09864, in the half-split layout of published checkpoints.
    """
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position.astype(jnp.float32)[:, None] * frequency[None, :]
    cosine, sine = jnp.cos(angle)[:, None, :], jnp.sin(angle)[:, None, :]
    left, right = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    turned = jnp.concatenate([left * cosine - right * sine, right * cosine + left * sine], axis=-1)
    return turned.astype(x.dtype)
