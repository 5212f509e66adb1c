"""Scores put together with other things that count."""
import jax
import jax.numpy as jnp

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


def less_estimate(score: PerSequence, estimate: Tokens, mask: Mask, coefficient: Scalar) -> PerSequence:
    """R - coefficient sum_t estimate_t: any estimate of a divergence in the reward, as a constant.

    With k1 this is `less_divergence`. With k2 or k3, which `loss.divergence` describes, the gradient is not that of
    the KL.

    Args:
      score: R, in reward units.
      estimate: one number per token, in nats; carries no gradient.
      mask: which tokens the policy chose.
      coefficient: reward units per nat, >= 0.

    Source: Shah et al. 2025, arXiv:2512.21852.
    """
    return jax.lax.stop_gradient(score - coefficient * masked.row_total(estimate, mask))


def less_divergence_per_token(score: PerSequence, logp: Tokens, reference_logp: Tokens, mask: Mask,
                              coefficient: Scalar) -> Tokens:
    """R at the last chosen token, less coefficient (logp - reference_logp) at each; 0 where nothing was chosen.

    Its total over a sequence is `less_divergence`.

    Args:
      score: R, in reward units.
      logp: log-probability under the policy that drew the tokens, in nats; carries no gradient.
      reference_logp: that under the reference, in nats; carries no gradient.
      mask: which tokens the policy chose.
      coefficient: reward units per nat, >= 0.

    Source: Ouyang et al. 2022, arXiv:2203.02155, section 3.5; Hu et al. 2025, arXiv:2501.03262.
    """
    outcome = jnp.where(masked.last(mask), score[:, None], 0.0)
    return jax.lax.stop_gradient(outcome - coefficient * masked.zeroed(logp - reference_logp, mask))
