"""Estimates of KL(policy || reference) from the chosen token, one number per token, in nats.

With x = logp - reference_logp and tokens drawn from the policy, k1 and k3 have the KL as their
mean and k2 is close to it. As a term of the loss what counts is the mean *gradient*, and that is
another matter: k1 has none, k2 has that of KL(policy || reference), k3 that of
KL(reference || policy).
"""
import jax
import jax.numpy as jnp

from rl_jax.types import Tokens


def k1(logp: Tokens, reference_logp: Tokens) -> Tokens:
    """x = logp - reference_logp: mean KL(policy || reference), of either sign; d/dlogp = 1.

    As a term of the loss its mean gradient is 0: it belongs in the reward, as a constant.

    Args:
      logp: log-probability of the chosen token now, in nats; differentiable.
      reference_logp: that of the reference, in nats; carries no gradient.

    Source: Schulman 2020, "Approximating KL divergence", joschu.net/blog/kl-approx.html.
    """
    return _log_ratio(logp, reference_logp)


def k2(logp: Tokens, reference_logp: Tokens) -> Tokens:
    """x^2 / 2 >= 0: biased as a value; d/dlogp = x, whose mean is the gradient of KL(policy || reference).

    Args:
      logp: log-probability of the chosen token now, in nats; differentiable.
      reference_logp: that of the reference, in nats; carries no gradient.

    Source: Schulman 2020, "Approximating KL divergence", joschu.net/blog/kl-approx.html.
    """
    return _log_ratio(logp, reference_logp) ** 2 / 2


def k3(logp: Tokens, reference_logp: Tokens) -> Tokens:
    """exp(-x) + x - 1 >= 0: mean KL(policy || reference); d/dlogp = 1 - exp(-x).

    The mean of that gradient is the gradient of the other direction, KL(reference || policy).

    Args:
      logp: log-probability of the chosen token now, in nats; differentiable.
      reference_logp: that of the reference, in nats; carries no gradient.

    Source: Schulman 2020, "Approximating KL divergence"; Shao et al. 2024, arXiv:2402.03300, eq. 4.
    """
    log_ratio = _log_ratio(logp, reference_logp)
    return jnp.expm1(-log_ratio) + log_ratio


def _log_ratio(logp: Tokens, reference_logp: Tokens) -> Tokens:
    # Within +-20 nats: beyond, exp leaves float32's range and one token would be the whole gradient.
    return jnp.clip(logp - jax.lax.stop_gradient(reference_logp), -20.0, 20.0)
