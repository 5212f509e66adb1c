"""Credit against a baseline that does not depend on the answer."""
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from rl_jax.types import PerSequence, Scalar


def constant(reward: PerSequence, baseline: Scalar) -> PerSequence:
    """R - b.

    Args:
      reward: R, in reward units; carries no gradient.
      baseline: b, in reward units.

    Source: Williams 1992, Machine Learning 8, section 4.
    """
    return jax.lax.stop_gradient(reward - baseline)


def batch_mean(reward: PerSequence, counted: Bool[Array, " N"]) -> PerSequence:
    """R - mean of the counted rewards of the batch; 0 where not counted.

    Args:
      reward: R, in reward units; carries no gradient.
      counted: which sequences have a reward (a failed verifier gives none).

    Source: Williams 1992, Machine Learning 8, section 4.
    """
    mean = jnp.where(counted, reward, 0.0).sum() / jnp.maximum(counted.sum(), 1)
    return jax.lax.stop_gradient(jnp.where(counted, reward - mean, 0.0))
