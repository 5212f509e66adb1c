"""Which tokens are learned from, by how far the learner is from what sampled them.

delta = old_logp - rollout_logp of a chosen token. A criterion is a statistic of delta, one number per token (`k1`,
`k2`, `k3`), perhaps of its whole sequence (`sequence_total`, `sequence_mean`, `sequence_max`), and a range; several
are joined with `&`. The result goes into an aggregator in the place of the mask: rejected tokens count in no
denominator (a sequence without any left still counts as one of the N sequences). Weights of 0 that leave the
denominators as they are: `weighting.importance`.

Source: Liu et al. 2025, "When Speed Kills Stability: Demystifying RL Collapse from the Training-Inference Mismatch",
as in verl, rollout_corr_helper.py.
"""
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rl_jax import masked
from rl_jax.types import Bound, Mask, Tokens


def k1(old_logp: Tokens, rollout_logp: Tokens) -> Tokens:
    """-delta, in nats: what to bound with `within_ratio`.

    As in verl this is the log of rollout over old probability, the *reciprocal* of the importance weight: bounds of
    0.5 and 3 keep weights from 1/3 to 2. Swapping the arguments bounds the weight itself.

    Args:
      old_logp: log-probability under the learner's weights before this batch, in nats; carries no gradient.
      rollout_logp: that under what really sampled, in nats; carries no gradient.
    """
    return -_delta(old_logp, rollout_logp)


def k2(old_logp: Tokens, rollout_logp: Tokens) -> Tokens:
    """delta^2 / 2 >= 0, in nats squared: what to bound with `at_most`.

    Args:
      old_logp: log-probability under the learner's weights before this batch, in nats; carries no gradient.
      rollout_logp: that under what really sampled, in nats; carries no gradient.
    """
    return _delta(old_logp, rollout_logp) ** 2 / 2


def k3(old_logp: Tokens, rollout_logp: Tokens) -> Tokens:
    """exp(delta) - 1 - delta >= 0, in nats: what to bound with `at_most`; its mean is KL(rollout || old).

    Args:
      old_logp: log-probability under the learner's weights before this batch, in nats; carries no gradient.
      rollout_logp: that under what really sampled, in nats; carries no gradient.
    """
    delta = _delta(old_logp, rollout_logp)
    return jnp.expm1(delta) - delta


def sequence_total(statistic: Tokens, mask: Mask) -> Tokens:
    """Its sum over the sequence's chosen tokens, at each position.

    Args:
      statistic: one number per token.
      mask: which tokens the policy chose.
    """
    return _spread(masked.row_total(statistic, mask)[:, None], mask)


def sequence_mean(statistic: Tokens, mask: Mask) -> Tokens:
    """Its mean over the sequence's chosen tokens, at each position: the same bound for short and long answers.

    Args:
      statistic: one number per token.
      mask: which tokens the policy chose.
    """
    return _spread(masked.row_mean(statistic, mask)[:, None], mask)


def sequence_max(statistic: Tokens, mask: Mask) -> Tokens:
    """Its largest value among the sequence's chosen tokens, at each position: one outlier rejects the answer.

    Args:
      statistic: one number per token, >= 0; verl offers this for k2 and k3 only.
      mask: which tokens the policy chose.
    """
    return _spread(masked.zeroed(statistic, mask).max(axis=1, keepdims=True), mask)


def within_ratio(statistic: Tokens, mask: Mask, low: Bound, high: Bound) -> Mask:
    """Chosen tokens with log low <= statistic <= log high.

    Args:
      statistic: k1 of tokens or sequences, in nats.
      mask: which tokens the policy chose.
      low, high: bounds as ratios, dimensionless, 0 < low <= high; see `k1` for which ratio.
    """
    return mask & (statistic >= jnp.log(low)) & (statistic <= jnp.log(high))


def at_most(statistic: Tokens, mask: Mask, high: Bound) -> Mask:
    """Chosen tokens with statistic <= high.

    Args:
      statistic: k2 or k3 of tokens or sequences.
      mask: which tokens the policy chose.
      high: in the statistic's unit, > 0.
    """
    return mask & (statistic <= high)


def _delta(old_logp: Tokens, rollout_logp: Tokens) -> Tokens:
    return jnp.clip(jax.lax.stop_gradient(old_logp - rollout_logp), -20.0, 20.0)


def _spread(statistic: Float[Array, "N 1"], mask: Mask) -> Tokens:
    return jnp.broadcast_to(statistic, mask.shape)
