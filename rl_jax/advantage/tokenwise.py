"""Credit that counts tokens instead of answers, and credit that differs between the tokens of an answer."""
import jax
import jax.numpy as jnp

from rl_jax.advantage import group as groups
from rl_jax.types import Bound, Group, Mask, PerSequence, Scalar, Tokens


def zscore(reward: PerSequence, group: Group, mask: Mask, *, epsilon: float = 1e-6, limit: Scalar = 5.0) -> PerSequence:
    """(R - mu) / (sigma + epsilon), mu and sigma (ddof 0) over all tokens of the group, each with its answer's R.

    Its mean over the tokens of a group is 0. A group in which |A| reaches the limit for any token
    takes `group.zscore` (ddof 1) instead. 0 where nothing was chosen, and if all rewards are equal; R in a
    group of one.

    Args:
      reward: R, in reward units.
      group: id of each sequence's group, in [0, 2N).
      mask: which tokens the policy chose.
      epsilon: added to the standard deviation, in reward units; that of the fallback is the same, a
        choice and not the paper's.
      limit: dimensionless; 0 compares answers in every group, infinity never does.

    Source: Liu et al. 2025, arXiv:2509.16591, "Token-Level Group Average", and its published code.
    """
    reward, count, segments = jax.lax.stop_gradient(reward), mask.sum(axis=1), 2 * group.shape[0]
    has = count > 0

    def mean(x):
        total = jax.ops.segment_sum(jnp.where(has, count * x, 0.0), group, num_segments=segments)[group]
        return total / jnp.maximum(jax.ops.segment_sum(count, group, num_segments=segments)[group], 1)

    # measured from the smallest: equal rewards give exactly 0, whatever the rounding of their mean
    smallest = jax.ops.segment_min(jnp.where(has, reward, jnp.inf), group, num_segments=segments)[group]
    above = jnp.where(has, reward - smallest, 0.0)
    deviation = above - mean(above)
    credit = jnp.where(groups.size(group) == 1, reward, deviation / (jnp.sqrt(mean(deviation**2)) + epsilon))
    largest = jax.ops.segment_max(jnp.where(has, jnp.abs(credit), 0.0), group, num_segments=segments)[group]
    credit = jnp.where(largest >= limit, groups.zscore(reward, group, epsilon=epsilon), credit)
    return jnp.where(has, credit, 0.0)


def redistributed(advantage: Tokens, ratio: Tokens, scaled_entropy: Tokens, low: Bound, high: Bound,
                  strength: Scalar) -> Tokens:
    """A (1 + beta h) for unsure tokens outside of the neutral zone and for sure ones inside of it; A for the others.

    The zone is 1 - low / 2 < r < 1 + high / 2. Unsure tokens (h > 0) gain once they have moved, sure ones
    (h <= 0) lose until they have. Constant in the weights, r included.

    Args:
      advantage: A, in reward units.
      ratio: r, current over old probability of the chosen token.
      scaled_entropy: h, where the token's entropy stands, in [-1, 1].
      low, high: half-widths of the ratio's band, dimensionless; the zone is half as wide.
      strength: beta, dimensionless; 0 leaves A as it is, at most 1 keeps its sign.

    Source: Liu et al. 2025, arXiv:2509.16591, "Differential Advantage Redistribution".
    """
    advantage, ratio, h, low, high = jax.lax.stop_gradient((advantage, ratio, scaled_entropy, low, high))
    inside = (ratio > 1 - low / 2) & (ratio < 1 + high / 2)
    return jnp.where((h > 0) ^ inside, advantage * (1 + strength * h), advantage)
