"""Which answers are learned from, by how their group did."""
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from rl_jax.types import Group, PerSequence, Scalar


def mixed(score: PerSequence, group: Group, correct: Scalar = 1.0) -> Bool[Array, " N"]:
    """0 < number correct < G: True for every sequence of a group that disagrees.

    A group of one never disagrees.

    Args:
      score: what the verifier said, in reward units: not a shaped reward.
      group: id of each sequence's group, in [0, 2N).
      correct: the score from which on an answer counts as correct.

    Source: Yu et al. 2025, arXiv:2503.14476, eq. 11.
    """
    def total(x):
        return jax.ops.segment_sum(x, group, num_segments=2 * group.shape[0])[group]

    right = total((score >= correct).astype(jnp.int32))
    return (right > 0) & (right < total(jnp.ones_like(group)))
