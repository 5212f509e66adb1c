"""Answers left out by lot. A lot is drawn from the answer's own seed: the order of rows decides nothing."""
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt32

from rl_jax.types import Group, PerSequence


def balanced(reward: PerSequence, group: Group, seed: UInt32[Array, " N"]) -> Bool[Array, " N"]:
    """All answers with R >= mu, and by lot at most as many of the others in each group.

    Args:
      reward: R, in reward units; mu is the mean of the group's.
      group: id of each sequence's group, in [0, 2N).
      seed: a random number of each sequence's own; equal ones within a group share their fate.

    Source: Yao et al. 2025, arXiv:2509.24203, "RED-Drop"; Trinity-RFT, rec_advantage.py, drop "balance".
    """
    segments = 2 * group.shape[0]

    def total(x):
        return jax.ops.segment_sum(x, group, num_segments=segments)[group]

    # Measured from the group's smallest reward: equal rewards are never below their mean, whatever its rounding.
    above = reward - jax.ops.segment_min(reward, group, num_segments=segments)[group]
    good = above >= total(above) / total(jnp.ones_like(reward))
    lot = jax.vmap(lambda s: jax.random.bits(jax.random.key(s), dtype=jnp.uint32))(seed)
    return good | (_rank(lot, jnp.where(good, segments, group)) < total(good.astype(jnp.int32)))


def _rank(lot: UInt32[Array, " N"], among: Int[Array, " N"]) -> Int[Array, " N"]:
    """How many of those with the same number in `among`, in [0, 2N], drew a smaller lot."""
    order = jnp.lexsort((lot, among))
    place = jnp.zeros_like(among).at[order].set(jnp.arange(among.shape[0], dtype=among.dtype))
    return place - jax.ops.segment_min(place, among, num_segments=2 * among.shape[0] + 1)[among]
