"""Token for token: is the completion the answer that was asked for?"""
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def match(
    tokens: Int[Array, "N T"],
    mask: Bool[Array, "N T"],
    target: Int[Array, "N T"],
    target_mask: Bool[Array, "N T"],
) -> Float[Array, " N"]:
    """1 where the chosen tokens are the target's tokens, all of them and no more; else 0.

    An answer that was cut off before the target's end token is not a match. What stands at
    unchosen positions is never read.
    """
    agree = (mask == target_mask) & ((tokens == target) | ~target_mask)
    return jnp.all(agree, axis=1).astype(jnp.float32)


def share(
    tokens: Int[Array, "N T"],
    mask: Bool[Array, "N T"],
    target: Int[Array, "N T"],
    target_mask: Bool[Array, "N T"],
) -> Float[Array, " N"]:
    """The share of the target's tokens that were chosen at their place, in [0, 1]; 0 for an empty target."""
    agree = mask & target_mask & (tokens == target)
    return agree.sum(axis=1) / jnp.maximum(target_mask.sum(axis=1), 1)
