"""Weights for samples that another engine, or older weights, drew: old over rollout probability, as a constant.

delta = old_logp - rollout_logp of a chosen token. Weights are 0 where nothing was chosen. A sample masked here has
weight 0 and still counts in the aggregator's denominators; `selection.rejection` takes it out of those, too.
"""
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rl_jax import masked
from rl_jax.types import Bound, Mask, Scalar, Tokens


def per_token(old_logp: Tokens, rollout_logp: Tokens, mask: Mask) -> Tokens:
    """w = exp(clip(delta, -20, 20)): each token by itself; biased, of low variance.

    Args:
      old_logp: log-probability under the learner's weights before this batch, in nats; carries no gradient.
      rollout_logp: that under what really sampled, in nats; carries no gradient.
      mask: which tokens the policy chose.

    Source: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training".
    """
    return _spread(_delta(old_logp, rollout_logp, mask), mask)


def per_sequence(old_logp: Tokens, rollout_logp: Tokens, mask: Mask) -> Tokens:
    """w = exp(clip(sum of delta over the sequence, -20, 20)), at each of its tokens; unbiased, of high variance.

    Args:
      old_logp: log-probability under the learner's weights before this batch, in nats; carries no gradient.
      rollout_logp: that under what really sampled, in nats; carries no gradient.
      mask: which tokens the policy chose.

    Source: Liu et al. 2025, "When Speed Kills Stability: Demystifying RL Collapse from the Training-Inference
      Mismatch".
    """
    return _spread(_delta(old_logp, rollout_logp, mask).sum(axis=1, keepdims=True), mask)


def geometric_mean(old_logp: Tokens, rollout_logp: Tokens, mask: Mask) -> Tokens:
    """w = exp(clip(mean of delta over the sequence, -20, 20)), at each of its tokens: long answers are no outliers.

    Args:
      old_logp: log-probability under the learner's weights before this batch, in nats; carries no gradient.
      rollout_logp: that under what really sampled, in nats; carries no gradient.
      mask: which tokens the policy chose.

    Source: Liu et al. 2025, "When Speed Kills Stability: Demystifying RL Collapse from the Training-Inference
      Mismatch".
    """
    return _spread(masked.row_mean(_delta(old_logp, rollout_logp, mask), mask)[:, None], mask)


def truncated(weight: Tokens, high: Bound) -> Tokens:
    """min(w, C): no sample counts more than C times.

    Args:
      weight: w, dimensionless, >= 0; carries no gradient.
      high: C, dimensionless, > 0.

    Source: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training".
    """
    return jax.lax.stop_gradient(jnp.minimum(weight, high))


def clamped(weight: Tokens, mask: Mask, low: Bound, high: Bound) -> Tokens:
    """clip(w, low, high) of chosen tokens: `truncated` at both ends.

    Args:
      weight: w, dimensionless, >= 0; carries no gradient.
      mask: which tokens the policy chose.
      low, high: smallest and largest weight, dimensionless, 0 <= low <= high.

    Source: TRL, GRPOConfig, the "truncate" modes of its importance sampling correction.
    """
    return jax.lax.stop_gradient(masked.zeroed(jnp.clip(weight, low, high), mask))


def within(weight: Tokens, low: Bound, high: Bound) -> Tokens:
    """w where low <= w <= high, 0 elsewhere: what is far from its sampler teaches nothing.

    Args:
      weight: w, dimensionless, >= 0; carries no gradient.
      low, high: smallest and largest weight that is kept, dimensionless; low = 0 keeps all below `high`.

    Source: Liu et al. 2025, "When Speed Kills Stability: Demystifying RL Collapse from the Training-Inference
      Mismatch"; TRL, GRPOConfig, the "mask" modes of its importance sampling correction.
    """
    return jax.lax.stop_gradient(jnp.where((weight >= low) & (weight <= high), weight, 0.0))


def normalised_per_token(weight: Tokens, mask: Mask) -> Tokens:
    """w / mean of w over the batch's chosen tokens: the learning rate stays what it was. All 0 stays 0.

    Args:
      weight: w of the whole batch, dimensionless, >= 0; carries no gradient.
      mask: which tokens the policy chose.

    Source: verl, rollout_corr_helper.py, rollout_is_batch_normalize with token weights.
    """
    return _over(weight, masked.mean(weight, mask), mask)


def normalised_per_sequence(weight: Tokens, mask: Mask) -> Tokens:
    """w / mean of w over the batch's sequences: for weights that are the same at each token of a sequence.

    Sequences without chosen tokens do not count; all 0 stays 0.

    Args:
      weight: w of the whole batch, dimensionless, >= 0; carries no gradient.
      mask: which tokens the policy chose.

    Source: verl, rollout_corr_helper.py, rollout_is_batch_normalize with sequence weights.
    """
    mean = masked.row_mean(weight, mask).sum() / jnp.maximum(mask.any(axis=1).sum(), 1)
    return _over(weight, mean, mask)


def off_policy_mask(logp: Tokens, old_logp: Tokens, advantage: Tokens, mask: Mask, limit: Scalar) -> Mask:
    """False where A < 0 in a sequence with mean(old_logp - logp) > limit: bad answers that the policy left long ago.

    Args:
      logp: log-probability now, in nats; carries no gradient. With that of the policy now this belongs in the loss
        slot; `x.old_logp` with `x.rollout_logp` as the old one may stand in the weighting slot.
      old_logp: that under what sampled, in nats.
      advantage: A, in reward units.
      mask: which tokens the policy chose.
      limit: the largest mean, in nats per token; 0.5 is an example of the published account, no recommendation.

    Source: DeepSeek-AI 2025, arXiv:2512.02556, "Off-Policy Sequence Masking".
    """
    away = masked.row_mean(old_logp - jax.lax.stop_gradient(logp), mask)
    return mask & ~((advantage < 0) & (away > limit)[:, None])


def gated_advantage(ratio: Tokens, advantage: Tokens, low: Bound, high: Bound) -> Tokens:
    """r A as a constant, 0 where r has left [1 - low, 1 + high] on the side that A asks for.

    As the advantage of `loss.score.policy_gradient` it gives the gradient of `loss.gate.ppo_clip`.

    Args:
      ratio: r, current over old probability of the chosen token; carries no gradient.
      advantage: A, in reward units.
      low, high: half-widths of the band, dimensionless, >= 0.

    Source: Zheng et al. 2025, arXiv:2512.01374, "MiniRL".
    """
    left = ((advantage > 0) & (ratio > 1 + high)) | ((advantage < 0) & (ratio < 1 - low))
    return jax.lax.stop_gradient(jnp.where(left, 0.0, ratio * advantage))


def _delta(old_logp: Tokens, rollout_logp: Tokens, mask: Mask) -> Tokens:
    return jax.lax.stop_gradient(masked.zeroed(old_logp - rollout_logp, mask))


def _spread(log_weight: Float[Array, "N _"], mask: Mask) -> Tokens:
    return masked.zeroed(jnp.broadcast_to(jnp.exp(jnp.clip(log_weight, -20.0, 20.0)), mask.shape), mask)


def _over(weight: Tokens, mean: Float[Array, ""], mask: Mask) -> Tokens:
    return jax.lax.stop_gradient(masked.zeroed(weight / jnp.where(mean > 0, mean, 1.0), mask))
