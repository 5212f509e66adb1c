"""Credit by comparison within a group: the samples of one prompt.

`group` numbers the group of each sequence, in any order, with ids in [0, 2N). A sequence that is
alone in its group has nothing to be compared with and keeps its raw reward. Rewards are constants:
no gradient passes.
"""
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rl_jax.types import Group, PerSequence


def size(group: Group) -> Float[Array, " N"]:
    """G: how many sequences there are in each sequence's group.

    Args:
      group: id of each sequence's group, in [0, 2N).
    """
    return _total(jnp.ones(group.shape), group)


def mean(reward: PerSequence, group: Group) -> PerSequence:
    """mu = sum of the group's rewards / G, for each sequence that of its group.

    Args:
      reward: R, in reward units.
      group: id of each sequence's group, in [0, 2N).
    """
    return jax.lax.stop_gradient(reward) - _deviation(reward, group)


def std(reward: PerSequence, group: Group, *, ddof: int = 1) -> PerSequence:
    """sigma = sqrt(sum of the group's (R - mu)^2 / (G - ddof)); exactly 0 if all are equal or G <= ddof.

    Args:
      reward: R, in reward units.
      group: id of each sequence's group, in [0, 2N).
      ddof: what is taken off the count: 1 gives the sample's estimate, 0 the population's.
    """
    squares = _total(_deviation(reward, group) ** 2, group)
    return jnp.sqrt(squares / jnp.maximum(size(group) - ddof, 1))


def centred(reward: PerSequence, group: Group) -> PerSequence:
    """R - mu, in reward units; exactly 0 if all are equal, R in a group of one.

    Args:
      reward: R, in reward units.
      group: id of each sequence's group, in [0, 2N).

    Source: Liu et al. 2025, arXiv:2503.20783, section 3.2.
    """
    return jnp.where(size(group) == 1, jax.lax.stop_gradient(reward), _deviation(reward, group))


def zscore(reward: PerSequence, group: Group, *, epsilon: float = 1e-6, ddof: int = 1) -> PerSequence:
    """(R - mu) / (sigma + epsilon), dimensionless; exactly 0 if all are equal, R in a group of one.

    Args:
      reward: R, in reward units.
      group: id of each sequence's group, in [0, 2N).
      epsilon: added to the standard deviation, in reward units.
      ddof: 1 for the sample's standard deviation, 0 for the population's; papers differ.

    Source: Shao et al. 2024, arXiv:2402.03300, section 4.1.2.
    """
    scale = jnp.where(size(group) == 1, 1.0, std(reward, group, ddof=ddof) + epsilon)
    return centred(reward, group) / scale


def leave_one_out(reward: PerSequence, group: Group) -> PerSequence:
    """R - mean of the group's other rewards = G / (G - 1) (R - mu); R in a group of one.

    Args:
      reward: R, in reward units.
      group: id of each sequence's group, in [0, 2N).

    Source: Ahmadian et al. 2024, arXiv:2402.14740, "REINFORCE Leave-One-Out".
    """
    count = size(group)
    return jnp.where(count == 1, 1.0, count / jnp.maximum(count - 1, 1)) * centred(reward, group)


def _deviation(reward: PerSequence, group: Group) -> PerSequence:
    # Measured from the group's smallest reward: equal rewards give exactly 0, whatever the rounding of their mean.
    reward = jax.lax.stop_gradient(reward)
    smallest = jax.ops.segment_min(reward, group, num_segments=2 * group.shape[0])[group]
    above = reward - smallest
    return above - _total(above, group) / size(group)


def _total(x: PerSequence, group: Group) -> PerSequence:
    return jax.ops.segment_sum(x, group, num_segments=2 * group.shape[0])[group]
