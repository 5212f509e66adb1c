"""Estimates of KL(policy || reference) from the chosen token, one number per token, in nats.

With x = logp - reference_logp and tokens drawn from the policy, k1 and k3 have the KL as their mean and k2 is close
to it. What a KL term does is its mean *gradient*, and that is another matter. On tokens of the present policy:

| estimate | as a term of the loss | in the reward, as a constant |
|---|---|---|
| k1 | none | KL(policy, reference) |
| k2 | KL(policy, reference) | E[k2] - KL(policy, reference) |
| k3 | KL(reference, policy) | KL(policy, reference) - KL(reference, policy) |
| k3_straight_through | KL(policy, reference) | as k3 |
| k3_corrected | KL(policy, reference) | as k3 |

A cell names that whose gradient it is. In the loss it is of the next token's distribution, the prefixes as they were
drawn; k1 in the reward is of whole answers, as it also answers for which prefixes are reached. In the reward k2 and k3
hardly pull at all near the reference: their first order cancels.
"""
import jax
import jax.numpy as jnp

from rl_jax.loss import ratio
from rl_jax.types import Tokens


def k1(logp: Tokens, reference_logp: Tokens) -> Tokens:
    """x = logp - reference_logp: mean KL(policy || reference), of either sign; d/dlogp = 1.

    As a term of the loss its mean gradient is 0. It belongs in the reward, as a constant: there its gradient is that
    of KL(policy || reference).

    Args:
      logp: log-probability of the chosen token now, in nats; differentiable.
      reference_logp: that of the reference, in nats; carries no gradient.

    Source: Schulman 2020, "Approximating KL divergence", joschu.net/blog/kl-approx.html.
    """
    return _log_ratio(logp, reference_logp)


def k2(logp: Tokens, reference_logp: Tokens) -> Tokens:
    """x^2 / 2 >= 0: biased as a value; d/dlogp = x, whose mean is the gradient of KL(policy || reference).

    In the reward its gradient is that of E[k2] - KL(policy || reference).

    Args:
      logp: log-probability of the chosen token now, in nats; differentiable.
      reference_logp: that of the reference, in nats; carries no gradient.

    Source: Schulman 2020, "Approximating KL divergence", joschu.net/blog/kl-approx.html.
    """
    return _log_ratio(logp, reference_logp) ** 2 / 2


def k3(logp: Tokens, reference_logp: Tokens) -> Tokens:
    """exp(-x) + x - 1 >= 0: mean KL(policy || reference); d/dlogp = 1 - exp(-x).

    As a term of the loss the mean of that gradient is the gradient of the other direction, KL(reference || policy).
    In the reward it is that of KL(policy || reference) - KL(reference || policy).

    Args:
      logp: log-probability of the chosen token now, in nats; differentiable.
      reference_logp: that of the reference, in nats; carries no gradient.

    Source: Schulman 2020, "Approximating KL divergence"; Shao et al. 2024, arXiv:2402.03300, eq. 4.
    """
    log_ratio = _log_ratio(logp, reference_logp)
    return jnp.expm1(-log_ratio) + log_ratio


def k3_straight_through(logp: Tokens, reference_logp: Tokens) -> Tokens:
    """k2 + constant(k3 - k2), "k3+": the value of k3 with the gradient of k2, that of KL(policy || reference).

    Args:
      logp: log-probability of the chosen token now, in nats; differentiable.
      reference_logp: that of the reference, in nats; carries no gradient.

    Source: verl, core_algos.py, kl_penalty "k3+"; Liu et al. 2025, arXiv:2510.01555, for the gradients.
    """
    square = k2(logp, reference_logp)
    return square + jax.lax.stop_gradient(k3(logp, reference_logp) - square)


def k3_corrected(logp: Tokens, old_logp: Tokens, reference_logp: Tokens) -> Tokens:
    """r k3 with r = exp(clip(logp - old_logp, -20, 20)) differentiable: mean KL(policy || reference) off-policy, too.

    d/dlogp = r (k3 + 1 - exp(-x)) = r x, whose mean over tokens of the old policy is the gradient of
    KL(policy || reference).

    Args:
      logp: log-probability of the chosen token now, in nats; differentiable.
      old_logp: that of the policy that drew it, in nats; carries no gradient.
      reference_logp: that of the reference, in nats; carries no gradient.

    Source: DeepSeek-AI 2025, arXiv:2512.02556, "Unbiased KL Estimate".
    """
    return ratio.per_token(logp, old_logp) * k3(logp, reference_logp)


def _log_ratio(logp: Tokens, reference_logp: Tokens) -> Tokens:
    # Within +-20 nats: beyond, exp leaves float32's range and one token would be the whole gradient.
    return jnp.clip(logp - jax.lax.stop_gradient(reference_logp), -20.0, 20.0)
