"""The score function: the gradient of a log-probability, times credit."""
import jax
import jax.numpy as jnp

from rl_jax.types import Bound, Tokens


def policy_gradient(logp: Tokens, advantage: Tokens) -> Tokens:
    """-A logp: its gradient is that of the expected reward; its value means nothing.

    Args:
      logp: log-probability of the chosen token now, in nats; differentiable.
      advantage: A, in reward units; carries no gradient.

    Source: Williams 1992, Machine Learning 8, section 4.
    """
    return -jax.lax.stop_gradient(advantage) * logp


def weighted_by_clipped_ratio(logp: Tokens, ratio: Tokens, advantage: Tokens, low: Bound, high: Bound) -> Tokens:
    """-sg[clip(r, 1 - low, 1 + high)] A logp: a token outside the band counts as one at its edge, not as none.

    Args:
      logp: log-probability of the chosen token now, in nats; differentiable.
      ratio: r, current over old probability of the chosen token; carries no gradient.
      advantage: A, in reward units; carries no gradient.
      low, high: half-widths of the band, dimensionless, >= 0; low = 1 has no lower bound.

    Source: MiniMax 2025, arXiv:2506.13585, eq. 4 and 5.
    """
    return policy_gradient(logp, jnp.clip(ratio, 1 - low, 1 + high) * advantage)


def weighted_by_capped_ratio(logp: Tokens, ratio: Tokens, advantage: Tokens, cap: Bound) -> Tokens:
    """-sg[min(r, c)] A logp: importance sampling with a largest weight, and no smallest.

    Args:
      logp: log-probability of the chosen token now, in nats; differentiable.
      ratio: r, current over old probability of the chosen token; carries no gradient.
      advantage: A, in reward units; carries no gradient.
      cap: c, the largest ratio that counts, dimensionless, > 0.

    Source: MiniMax 2025, arXiv:2506.13585, section 3.1; Khatri et al. 2025, arXiv:2510.13786.
    """
    return policy_gradient(logp, jnp.minimum(ratio, cap) * advantage)
