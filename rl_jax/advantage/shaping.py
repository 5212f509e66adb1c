"""Credit that is bent after the comparison: by entropy, by length, by how much predictions differ."""
import math

import jax
import jax.numpy as jnp

from rl_jax import masked
from rl_jax.types import Group, Mask, PerSequence, Scalar, Tokens


def less_entropy(advantage: PerSequence, entropy: Tokens, mask: Mask, coefficient: Scalar) -> PerSequence:
    """A - coefficient (mean over the answer's tokens of H): answers that were drawn with less doubt are preferred.

    Args:
      advantage: A, in reward units.
      entropy: H of the distribution that the token was drawn from, in nats; carries no gradient.
      mask: which tokens the policy chose.
      coefficient: gamma, reward units per nat.

    Source: Simoni et al. 2025, arXiv:2508.03772.
    """
    return jax.lax.stop_gradient(advantage - coefficient * masked.row_mean(entropy, mask))


def stretched_by_length(advantage: PerSequence, score: PerSequence, group: Group, mask: Mask, *,
                        base: float = 1.00001, correct: Scalar = 1.0) -> PerSequence:
    """A (2 - base^-d) for a wrong answer d > 0 tokens longer than its group's correct ones on average, else A.

    Wrong answers that ramble are pushed down harder, at most twice as hard. Without a correct answer
    in the group nothing changes. "Suboptimal trajectory complexity regularization".

    Args:
      advantage: A, in reward units.
      score: what the verifier said, in reward units: not a shaped reward.
      group: id of each sequence's group, in [0, 2N).
      mask: which tokens the policy chose; their number is the length.
      base: per token, >= 1; 1 changes nothing.
      correct: the score from which on an answer counts as correct.

    Source: Hong et al. 2025, arXiv:2506.21655, "STCR", with the published code, github.com/Indolent-Kawhi/View-R1.
    """
    right, length = score >= correct, mask.sum(axis=1).astype(advantage.dtype)
    count = _total(right.astype(advantage.dtype), group)
    excess = length - _total(jnp.where(right, length, 0.0), group) / jnp.maximum(count, 1.0)
    longer = ~right & (count > 0) & (excess > 0)
    factor = 1 - jnp.expm1(-jnp.where(longer, excess, 0.0) * math.log(base))
    return jax.lax.stop_gradient(advantage * factor)


def uncertainty(prediction: PerSequence, group: Group, lowest: Scalar, highest: Scalar) -> PerSequence:
    """u = variance of the group's predictions / the largest possible, ((highest - lowest) / 2)^2, in [0, 1].

    Predictions are clipped to [lowest, highest]; one that is not finite could not be read and is left
    out. ddof 0; exactly 0 if all are equal or fewer than two can be read.

    Args:
      prediction: the number that the answer names, any unit.
      group: id of each sequence's group, in [0, 2N).
      lowest, highest: range of the predictions, in the same unit.

    Source: Xie et al. 2026, arXiv:2601.22920, with the published code, github.com/AMAP-ML/Q-Hawkeye.
    """
    read = jnp.isfinite(prediction)
    clipped = jnp.where(read, jnp.clip(jax.lax.stop_gradient(prediction), lowest, highest), highest)
    count = jnp.maximum(_total(read.astype(jnp.float32), group), 1.0)
    # measured from the group's smallest: equal predictions have exactly no variance
    smallest = jax.ops.segment_min(clipped, group, num_segments=2 * group.shape[0])[group]
    above = jnp.where(read, clipped - smallest, 0.0)
    variance = _total(jnp.where(read, above - _total(above, group) / count, 0.0) ** 2, group) / count
    return jnp.clip(variance / ((highest - lowest) ** 2 / 4 + 1e-8), 0.0, 1.0)


def discounted_by_uncertainty(advantage: PerSequence, prediction: PerSequence, group: Group, strength: Scalar,
                              lowest: Scalar, highest: Scalar) -> PerSequence:
    """A exp(-strength u), u the `uncertainty` of the group: prompts whose answers disagree teach less.

    Args:
      advantage: A, in reward units.
      prediction: the number that the answer names, any unit; not finite where it could not be read.
      group: id of each sequence's group, in [0, 2N).
      strength: alpha, dimensionless, >= 0; 0 changes nothing.
      lowest, highest: range of the predictions, in their unit.

    Source: Xie et al. 2026, arXiv:2601.22920, "Uncertainty-aware dynamic optimization".
    """
    weight = jnp.exp(-strength * uncertainty(prediction, group, lowest, highest))
    return jax.lax.stop_gradient(advantage * weight)


def _total(x: PerSequence, group: Group) -> PerSequence:
    return jax.ops.segment_sum(x, group, num_segments=2 * group.shape[0])[group]
