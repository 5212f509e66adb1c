"""Answers should depend on what was asked: what is said of them under a degraded prompt."""
import jax.numpy as jnp

from rl_jax.loss import divergence
from rl_jax.types import Scalar, Tokens


def gap(logp: Tokens, degraded_logp: Tokens, coefficient: Scalar, ceiling: Scalar = 10.0) -> Tokens:
    """-coefficient min(k3(logp, degraded_logp), ceiling): the loss falls as the two prompts say different things.

    0 where both say the same; no gradient beyond the ceiling, as nothing else holds the term.

    Args:
      logp: log-probability of the chosen token under the prompt, in nats; differentiable.
      degraded_logp: that under the degraded prompt, in nats; carries no gradient.
      coefficient: reward units per nat, >= 0.
      ceiling: the largest divergence of a token that is rewarded, in nats.

    Source: Xie et al. 2026, arXiv:2601.22920, "Perception-aware optimization", with the published code,
      github.com/AMAP-ML/Q-Hawkeye.
    """
    return -coefficient * jnp.minimum(divergence.k3(logp, degraded_logp), ceiling)
