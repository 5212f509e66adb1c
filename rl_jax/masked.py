"""Reductions that never read what the mask leaves out, not even a NaN."""
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rl_jax.types import Mask, Tokens


def zeroed(x: Tokens, mask: Mask) -> Tokens:
    """x where the mask is True, 0 elsewhere: the gradient of what is left out is exactly 0."""
    return jnp.where(mask, x, 0.0)


def total(x: Tokens, mask: Mask) -> Float[Array, ""]:
    """sum over chosen tokens."""
    return zeroed(x, mask).sum()


def mean(x: Tokens, mask: Mask) -> Float[Array, ""]:
    """sum over chosen tokens / max(their number, 1)."""
    return total(x, mask) / jnp.maximum(mask.sum(), 1)


def row_total(x: Tokens, mask: Mask) -> Float[Array, " N"]:
    """Per sequence: sum over its chosen tokens."""
    return zeroed(x, mask).sum(axis=1)


def row_mean(x: Tokens, mask: Mask) -> Float[Array, " N"]:
    """Per sequence: sum over its chosen tokens / max(their number, 1)."""
    return row_total(x, mask) / jnp.maximum(mask.sum(axis=1), 1)


def last(mask: Mask) -> Bool[Array, "N T"]:
    """True at the last chosen token of each sequence; all False in a row without any."""
    after = jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1]
    return mask & (after == 1)


def whiten(x: Tokens, mask: Mask, epsilon: float = 1e-8) -> Tokens:
    """(x - mean) / sqrt(variance + epsilon) over all chosen tokens of the batch; 0 elsewhere.

    The variance has Bessel's correction (ddof 1) on the number of chosen tokens; with fewer
    than two of them, or if all are equal, the result is exactly 0.

    Args:
      x: any unit.
      mask: which tokens count.
      epsilon: added to the variance, in the square of x's unit.
    """
    count = mask.sum()
    # Measured from the smallest: equal numbers give exactly 0, whatever the rounding of their mean.
    above = zeroed(x - jnp.where(mask, x, jnp.inf).min(initial=jnp.inf), mask)
    centred = zeroed(above - mean(above, mask), mask)
    variance = (centred**2).sum() / jnp.maximum(count - 1, 1)
    return centred / jnp.sqrt(variance + epsilon)
