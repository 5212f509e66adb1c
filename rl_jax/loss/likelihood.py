"""Keeping answers that were not bad as probable as they were."""
import jax
import jax.numpy as jnp

from rl_jax import masked
from rl_jax.types import Mask, Tokens


def displacement(logp: Tokens, old_logp: Tokens, advantage: Tokens, mask: Mask) -> Tokens:
    """max(0, D) with D = old_logp - logp, where A >= 0 in a sequence that fell as a whole, sum of D > 0; else 0.

    Which tokens are gated in is a constant. While the policy has not moved there is neither value nor gradient, so it
    acts from the second optimiser step of a batch on. The variant that leaves the answer's span out of both sums
    (LLDS-MA) is this with a mask that does.

    Args:
      logp: log-probability of the chosen token now, in nats; differentiable.
      old_logp: that of the policy before the batch, in nats; carries no gradient.
      advantage: A, in reward units; carries no gradient.
      mask: which tokens the policy chose.

    Source: Deng et al. 2025, arXiv:2512.04220, "LLDS", as in third-party implementations.
    """
    fall = masked.zeroed(jax.lax.stop_gradient(old_logp) - logp, mask)
    fell = fall.sum(axis=1, keepdims=True) > 0
    return jnp.where(fell & (advantage >= 0) & (fall > 0), fall, 0.0)
