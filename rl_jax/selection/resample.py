"""Which answers are learned from, drawn by lot within each prompt's group, by how they were rewarded.

A reward model is not equally right everywhere: where it is unreliable its answers are drawn less. All
lots come from the sequences' own random numbers, so that the order of the rows decides nothing. A
sequence that is alone in its group stays what it is.
"""
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from rl_jax.types import Group, PerSequence, Scalar


def ranked(reward: PerSequence, group: Group, seed: UInt32[Array, " N"], *, best: Scalar, worst: Scalar,
           rest: Scalar) -> Float[Array, " N"]:
    """Weights by rank within the group: one best, one worst (if it is another), and the rest.

    Best and worst: (1, 1, 0). Best and random: (0.4, 0.1, 0.1). Best of n: (1, 0, 0). Weights need
    not sum to 1. Of equal rewards, lots decide which is the one best and the one worst.

    Args:
      reward: R, in reward units.
      group: id of each sequence's group, in [0, 2N).
      seed: a random number of each sequence's own.
      best, worst, rest: weights, dimensionless, >= 0.

    Source: Shen and Zhang 2024, arXiv:2409.06957, "BW", "BR" and "BoN", with the published code,
      github.com/swtheing/PF-PPO-RLHF.
    """
    first, last = _ends(reward, group, seed)
    return jnp.where(first, best, jnp.where(last, worst, rest)).astype(jnp.float32)


def power(reward: PerSequence, exponent: Scalar = 2.0) -> Float[Array, " N"]:
    """|R|^exponent: weights by the size of the reward, whatever its sign.

    Args:
      reward: R, in reward units.
      exponent: dimensionless, >= 0; 0 keeps all alike.

    Source: Shen and Zhang 2024, the published code of arXiv:2409.06957, github.com/swtheing/PF-PPO-RLHF.
    """
    return jax.lax.stop_gradient(jnp.abs(reward) ** exponent)


def drawn(weight: Float[Array, " N"], group: Group, seed: UInt32[Array, " N"]) -> Int[Array, " N"]:
    """For each row a row of its group, drawn with replacement with probability weight / the group's total.

    A group whose weights are all 0 is drawn from evenly. Row i takes the largest of log weight_j +
    g_ij with g_ij Gumbel noise made of the random numbers of i and j, so rows in another order take
    the same rows. O(N^2) lots, of which those between groups are not read.

    Args:
      weight: dimensionless, >= 0.
      group: id of each sequence's group, in [0, 2N).
      seed: a random number of each sequence's own.

    Source: Shen and Zhang 2024, arXiv:2409.06957, which draws from a buffer of all prompts; the same number of
      draws for every prompt is a choice.
    """
    largest = jax.ops.segment_max(weight, group, num_segments=2 * group.shape[0])[group]
    log_weight = jnp.log(jax.lax.stop_gradient(jnp.where(largest > 0, weight, 1.0)))

    def lots(own):
        return jax.vmap(lambda other: jax.random.gumbel(jax.random.fold_in(jax.random.key(own), other)))(seed)

    same = group[:, None] == group[None, :]
    return jnp.where(same, log_weight[None, :] + jax.vmap(lots)(seed), -jnp.inf).argmax(axis=1)


def best_and_another(reward: PerSequence, group: Group, seed: UInt32[Array, " N"]) -> Bool[Array, " N"]:
    """True for the group's one best answer and for one of the others, drawn evenly: the filter without repetition.

    Args:
      reward: R, in reward units.
      group: id of each sequence's group, in [0, 2N).
      seed: a random number of each sequence's own.

    Source: Shen and Zhang 2024, the published code of arXiv:2409.06957, github.com/swtheing/PF-PPO-RLHF,
      openrlhf_filter.
    """
    best, _ = _ends(reward, group, seed)
    lot = jax.vmap(lambda own: jax.random.uniform(jax.random.key(own)))(seed)
    another, _ = _ends(jnp.where(best, -1.0, lot), group, seed)  # lots are in [0, 1): the best one is last
    return best | another


def _ends(value: Float[Array, " N"], group: Group, seed: UInt32[Array, " N"]) -> tuple[
        Bool[Array, " N"], Bool[Array, " N"]]:
    """Which row is the first and which the last of its group, from large values to small, equal ones by their seed."""
    order = jnp.lexsort((seed, -value, group))
    change, end = group[order][1:] != group[order][:-1], jnp.ones(1, bool)
    ends = jnp.concatenate([end, change]), jnp.concatenate([change, end])
    return tuple(jnp.zeros(group.shape, bool).at[order].set(each) for each in ends)
