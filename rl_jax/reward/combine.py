"""Scores put together with other things that count."""
import jax

from rl_jax import masked
from rl_jax.types import Mask, PerSequence, Scalar, Tokens


def less_divergence(score: PerSequence, logp: Tokens, reference_logp: Tokens, mask: Mask,
                    coefficient: Scalar) -> PerSequence:
    """R - coefficient sum_t (logp - reference_logp): k1 in the reward, where its gradient is that of the KL.

    Args:
      score: R, in reward units.
      logp: log-probability under the policy that drew the tokens, in nats; carries no gradient.
      reference_logp: that under the reference, in nats; carries no gradient.
      mask: which tokens the policy chose.
      coefficient: reward units per nat, >= 0.

    Source: Ziegler et al. 2019, arXiv:1909.08593, eq. 2.
    """
    return jax.lax.stop_gradient(score - coefficient * masked.row_total(logp - reference_logp, mask))
