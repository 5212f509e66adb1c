"""Baselines that weigh each answer by the size of its gradient: those that leave the estimate least variance.

The variance of (G - b) s over samples, s = d logp / d parameters, is smallest at b = E[|s|^2 G] / E[|s|^2]. |s|^2 is
taken in the logits, where it is known from probabilities alone. Rewards, probabilities and baselines are constants:
no gradient passes. `group` numbers the group of each sequence, in any order, with ids in [0, 2N).
"""
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rl_jax import masked
from rl_jax.types import Group, Mask, PerSequence, Scalar, Tokens


def score_norm(logp: Tokens, second_moment: Tokens) -> Tokens:
    """w = |d logp / d logits|^2 = 1 - 2 p + sum_v p_v^2, in [0, 2): large for a surprising token of a sure policy.

    Args:
      logp: log p of the chosen token under the policy before this batch, in nats.
      second_moment: sum_v p_v^2 of the same distribution.

    Source: Li et al. 2026, arXiv:2602.07078, "Logit-Gradient Proxy".
    """
    norm = 1 - 2 * jnp.exp(logp) + second_moment
    return jax.lax.stop_gradient(jnp.maximum(norm, 0.0))  # rounding makes it negative where p is nearly 1


def reweighted(norm: Tokens, weight: Tokens) -> Tokens:
    """w rho^2: the squared norm of a score that an importance weight multiplies.

    Args:
      norm: w of each token, as by `score_norm`.
      weight: rho, dimensionless.

    Source: verl, core_algos.py, optimal token baseline with rollout importance weights.
    """
    return jax.lax.stop_gradient(norm * weight**2)


def accumulated(norm: Tokens, mask: Mask) -> Tokens:
    """W_t = sum of w over the chosen tokens up to and with t.

    Args:
      norm: w of each token, as by `score_norm`.
      mask: which tokens the policy chose.

    Source: Li et al. 2026, arXiv:2602.07078, "Realized Energy".
    """
    return jax.lax.stop_gradient(jnp.cumsum(masked.zeroed(norm, mask), axis=1))


def optimal(reward_to_go: Tokens, energy: Tokens, mask: Mask, group: Group, *, epsilon: Scalar = 1e-8) -> Tokens:
    """G_t - b_t with b_t = sum W_t G_t / (sum W_t + epsilon) over the group's sequences that chose a token at t.

    Where one sequence of a group is alone at a position, b_t is its own G_t and its credit 0; a group of one has
    no baseline. Equal W give the group's mean at each position. 0 where nothing was chosen.

    Args:
      reward_to_go: G, in reward units.
      energy: W, as by `accumulated`, >= 0.
      mask: which tokens the policy chose.
      group: id of each sequence's group, in [0, 2N).
      epsilon: added to the sum of W; where all W are far below it there is no baseline.

    Source: Li et al. 2026, arXiv:2602.07078; verl, core_algos.py, optimal token baseline.
    """
    reward_to_go, energy = jax.lax.stop_gradient((masked.zeroed(reward_to_go, mask), masked.zeroed(energy, mask)))
    baseline = _total(energy * reward_to_go, group) / (_total(energy, group) + epsilon)
    alone = _total(jnp.ones_like(energy), group) == 1
    return masked.zeroed(jnp.where(alone, reward_to_go, reward_to_go - baseline), mask)


def norm_weighted(reward: PerSequence, norm: PerSequence, group: Group) -> PerSequence:
    """R - b with b = sum W R / sum W over the group, its mean where all W are 0; R in a group of one.

    The sum of W (R - b) over a group is 0. As an answer is part of its own baseline the estimate is biased, as with
    the group's mean; `norm_weighted_leave_one_out` is not. Equal rewards give exactly 0.

    Args:
      reward: R, in reward units.
      norm: W, squared norm of the gradient of each answer's log-probability, any unit, >= 0.
      group: id of each sequence's group, in [0, 2N).

    Source: Huang et al. 2025, arXiv:2511.23310, abstract; the formula is the standard derivation.
    """
    above, norm = _above(reward, group), jax.lax.stop_gradient(norm)
    count, total = _total(jnp.ones_like(above), group), _total(norm, group)
    weighted = _total(norm * above, group) / jnp.where(total > 0, total, 1.0)
    baseline = jnp.where(total > 0, weighted, _total(above, group) / count)
    return jnp.where(count == 1, jax.lax.stop_gradient(reward), above - baseline)


def norm_weighted_leave_one_out(reward: PerSequence, norm: PerSequence, group: Group, *,
                                smallest: float = 1e-5) -> PerSequence:
    """R - b with b = sum W R / sum W over the group's other answers, their mean where those W are 0; R if alone.

    Equal rewards give exactly 0.

    Args:
      reward: R, in reward units.
      norm: W, squared norm of the gradient of each answer's log-probability, any unit, >= 0.
      group: id of each sequence's group, in [0, 2N).
      smallest: the share of the group's W below which that of the others is rounding and counts as 0.

    Source: Huang et al. 2025, arXiv:2511.23310, abstract; leaving the answer out is the standard way to no bias.
    """
    above, norm = _above(reward, group), jax.lax.stop_gradient(norm)
    count, total = _total(jnp.ones_like(above), group), _total(norm, group)
    others = total - norm
    known = others > smallest * total
    weighted = (_total(norm * above, group) - norm * above) / jnp.where(known, others, 1.0)
    mean = (_total(above, group) - above) / jnp.maximum(count - 1, 1)
    return jnp.where(count == 1, jax.lax.stop_gradient(reward), above - jnp.where(known, weighted, mean))


def _above(reward: PerSequence, group: Group) -> PerSequence:
    # Measured from the group's smallest reward: equal rewards are exactly 0 from their mean, whatever its rounding.
    reward = jax.lax.stop_gradient(reward)
    return reward - jax.ops.segment_min(reward, group, num_segments=2 * group.shape[0])[group]


def _total(x: Float[Array, "N ..."], group: Group) -> Float[Array, "N ..."]:
    return jax.ops.segment_sum(x, group, num_segments=2 * group.shape[0])[group]
