"""Root-mean-square normalisation."""
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


def rms(x: Float[Array, "... D"], scale: Float[Array, " D"], epsilon: float,
        offset: float = 0.0) -> Float[Array, "... D"]:
    """x / sqrt(mean(x^2) + epsilon) * (offset + scale), in float32, returned in x's dtype.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    y = x.astype(jnp.float32)
    y = y / jnp.sqrt(jnp.mean(y * y, axis=-1, keepdims=True) + epsilon)
    scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
    return (y * (offset + scale if offset else scale)).astype(x.dtype)


class Norm(nnx.Module):
    """`rms` with its learnt scale; offset + scale starts at 1."""

    def __init__(self, width: int, epsilon: float, offset: float = 0.0):
        self.scale = nnx.Param(jnp.full((width,), 1.0 - offset, jnp.float32))
        self.epsilon, self.offset = epsilon, offset

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return rms(x, self.scale[...], self.epsilon, self.offset)
