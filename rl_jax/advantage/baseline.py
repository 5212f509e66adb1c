"""Credit against a baseline that does not depend on the answer."""
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from rl_jax import masked
from rl_jax.types import Mask, PerSequence, Scalar, Tokens


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


def whitened(advantage: PerSequence, mask: Mask) -> Tokens:
    """(A - mean) / std, dimensionless, with A on each chosen token: long answers count more in mean and std.

    Both are over all chosen tokens of the batch, with Bessel's correction on their number; see `masked.whiten`.

    Args:
      advantage: A of each sequence, in reward units; carries no gradient.
      mask: which tokens the policy chose.

    Source: Hu et al. 2025, arXiv:2501.03262, "Global Advantage Normalization".
    """
    per_token = jnp.broadcast_to(jax.lax.stop_gradient(advantage)[:, None], mask.shape)
    return masked.whiten(per_token, mask)
