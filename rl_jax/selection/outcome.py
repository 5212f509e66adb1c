"""Which answers are learned from, by how their group did."""
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

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
    right, count = _right(score, group, correct)
    return (right > 0) & (right < count)


def not_all_correct(score: PerSequence, group: Group, correct: Scalar = 1.0) -> Bool[Array, " N"]:
    """number correct < G: False for every sequence of a group in which all are right.

    Args:
      score: what the verifier said, in reward units: not a shaped reward.
      group: id of each sequence's group, in [0, 2N).
      correct: the score from which on an answer counts as correct.

    Source: Nan et al. 2025, arXiv:2509.18851, with its published code.
    """
    right, count = _right(score, group, correct)
    return right < count


def at_least(credit: PerSequence, threshold: Scalar) -> Bool[Array, " N"]:
    """|A| >= threshold: True for the sequences that there is something to learn from.

    Args:
      credit: A, in reward units.
      threshold: the smallest size that counts, in reward units, > 0.

    Source: Chen et al. 2025, arXiv:2502.01600, with its published code.
    """
    return jnp.abs(credit) >= threshold


def _right(score: PerSequence, group: Group, correct: Scalar) -> tuple[Int[Array, " N"], Int[Array, " N"]]:
    """How many of each sequence's group are correct, and how many there are."""
    def total(x):
        return jax.ops.segment_sum(x, group, num_segments=2 * group.shape[0])[group]

    return total((score >= correct).astype(jnp.int32)), total(jnp.ones_like(group))
