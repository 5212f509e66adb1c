"""How wide the ratio's band is by what came out: half-widths (low, high) of [1 - low, 1 + high], as gates take them.

Reconstructed: the paper's abstract says that the band grows with the size of the credit and with the spread of the
group's rewards; the forms below are choices.
"""
import math

import jax
import jax.numpy as jnp

from rl_jax.types import Group, PerSequence, Scalar, Tokens


def spread(reward: PerSequence, group: Group, *, lowest: Scalar = 0.0, highest: Scalar = 1.0) -> PerSequence:
    """v = variance of the group's rewards (ddof 0) / (highest - lowest)^2 * 4: 1 is the largest there can be.

    4 p (1 - p) for rewards of 0 and 1, p the share of 1: most for prompts of middle difficulty, exactly 0 if all agree.

    Args:
      reward: R, in reward units, in [lowest, highest]; carries no gradient.
      group: id of each sequence's group, in [0, 2N).
      lowest, highest: ends of the range that rewards can have, a declared constant.

    Raises:
      ValueError: if `highest` is not above `lowest`, both given as numbers.

    Source: Zhang et al. 2026, arXiv:2601.03723, abstract.
    """
    if isinstance(lowest, (int, float)) and isinstance(highest, (int, float)) and not lowest < highest:
        raise ValueError(f"lowest={lowest}, highest={highest}: the range of rewards must have a width.")

    def mean(values):
        total, count = (jax.ops.segment_sum(one, group, num_segments=2 * group.shape[0])[group]
                        for one in (values, jnp.ones_like(values)))
        return total / count

    reward = jax.lax.stop_gradient(reward)
    # from the group's smallest reward: equal rewards give exactly 0, whatever the rounding of their mean
    above = reward - jax.ops.segment_min(reward, group, num_segments=2 * group.shape[0])[group]
    return 4 * mean((above - mean(above)) ** 2) / (highest - lowest) ** 2


def by_outcome(advantage: Tokens, spread: PerSequence, low: Scalar, high: Scalar, *, micro: Scalar,
               macro: Scalar) -> tuple[Tokens, Tokens]:
    """low and high times (1 + micro tanh|A|) (1 + macro v), low at most .99: clear signals may move the policy further.

    Constant in the weights; the same for A and -A.

    Args:
      advantage: A, in reward units.
      spread: v of each sequence's group, in [0, 1], from `spread`.
      low, high: half-widths for A = 0 and v = 0, dimensionless, >= 0.
      micro, macro: alpha and kappa, dimensionless, >= 0; 0 and 0 give every token the same band.

    Source: Zhang et al. 2026, arXiv:2601.03723, abstract; the formula is a choice.
    """
    return _stretched(1 + micro * jnp.tanh(jnp.abs(advantage)), 1 + macro * spread, low, high)


def by_outcome_centred(advantage: Tokens, spread: PerSequence, low: Scalar, high: Scalar, *, micro: Scalar,
                       macro: Scalar) -> tuple[Tokens, Tokens]:
    """`by_outcome` with 1 + micro (tanh|A| - tanh 1): the band of weak signals, |A| < 1, is narrower than without.

    Never negative, whatever `micro`.

    Args:
      advantage: A, in reward units.
      spread: v of each sequence's group, in [0, 1], from `spread`.
      low, high: half-widths for |A| = 1 and v = 0, dimensionless, >= 0.
      micro, macro: alpha and kappa, dimensionless, >= 0; 0 and 0 give every token the same band.

    Source: Zhang et al. 2026, arXiv:2601.03723, abstract; the formula is a choice.
    """
    factor = 1 + micro * (jnp.tanh(jnp.abs(advantage)) - math.tanh(1.0))
    return _stretched(jnp.maximum(factor, 0.0), 1 + macro * spread, low, high)


def _stretched(of_token: Tokens, of_group: PerSequence, low: Scalar, high: Scalar) -> tuple[Tokens, Tokens]:
    factor = jax.lax.stop_gradient(of_token * of_group[:, None])
    return jnp.minimum(low * factor, 0.99), high * factor
