"""Scores bent before they are compared."""
import jax
import jax.numpy as jnp

from rl_jax.types import PerSequence, Scalar


def flattened_above(score: PerSequence, threshold: Scalar = 0.8, above: Scalar = 0.01,
                    below: Scalar = 1.0) -> PerSequence:
    """s + above ln(r - s + 1) for r >= s, else s - (exp(below (s - r)) - 1) / (exp(below) - 1), with s the threshold.

    Increasing, continuous at s. A near-perfect answer is worth hardly more than a good one, so a
    given answer in the group does not drown the others; bad answers are told apart the better the
    worse they are. below <= 0 leaves r as it is under the threshold, which is the limit below -> 0.

    Args:
      score: r, in [0, 1] in the paper (overlap with the true interval); carries no gradient.
      threshold: s, in the score's unit.
      above: alpha_1, how much is left of what exceeds the threshold, in the score's unit, > 0.
      below: alpha_2, how strongly scores under the threshold are bent, per unit of the score.

    Source: Li et al. 2025, arXiv:2509.18056, with the published code, github.com/HVision-NKU/TempSamp-R1.
    """
    score = jax.lax.stop_gradient(score)
    over, under = jnp.maximum(score - threshold, 0.0), jnp.maximum(threshold - score, 0.0)
    bent = jnp.where(below > 0, below, 1.0)
    lost = jnp.where(below > 0, jnp.expm1(bent * under) / jnp.expm1(bent), under)
    return jnp.where(score >= threshold, threshold + above * jnp.log1p(over), threshold - lost)
