"""How much a term of the loss counts, by how hard the prompt was: by its group's share of correct answers."""
import math

import jax
import jax.numpy as jnp

from rl_jax.types import Group, PerSequence, Scalar


def divergence_weight(advantage: PerSequence, score: PerSequence, group: Group, *, rate: Scalar = math.e,
                      correct: Scalar = 1.0) -> PerSequence:
    """kappa = 1 - exp(-rate p) where A > 0 and 0 < p < 1, else 1; p is the group's share of correct answers.

    A good answer to a hard prompt is held less near to the reference. "Difficulty-adaptive divergence shaping".

    Args:
      advantage: A, of which the sign is read.
      score: what the verifier said, in reward units: not a shaped reward.
      group: id of each sequence's group, in [0, 2N).
      rate: dimensionless, > 0; infinite makes every weight 1.
      correct: the score from which on an answer counts as correct.

    Source: Hong et al. 2025, arXiv:2506.21655, "DADS", with the published code, github.com/Indolent-Kawhi/View-R1.
    """
    def total(x):
        return jax.ops.segment_sum(x, group, num_segments=2 * group.shape[0])[group]

    right = (score >= correct).astype(jnp.float32)
    share = total(right) / total(jnp.ones_like(right))
    shaped = (advantage > 0) & (share > 0) & (share < 1)
    return jax.lax.stop_gradient(jnp.where(shaped, -jnp.expm1(-rate * jnp.where(shaped, share, 1.0)), 1.0))
