"""Which tokens' own update would change the policy too much, by a quadratic model of the last layer.

The model: logits = W h, with h the token's last hidden state. Its gradient of A logp in W is g = A v h', with
v = e_a - p, a the chosen token and p the distribution. A step eta along a direction G changes the logits by
eta u, u = G h. Along the gradient itself (plain SGD), u = A |h|^2 v, and everything is a function of moments of p.
"""
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rl_jax.types import Bound, Mask, Scalar, Tokens

Entries = Float[Array, "N T K"]


def divergence_along(score: Entries, direction: Entries, rate: Scalar) -> Tokens:
    """m_F = eta^2 (v.u)^2 / 2: the KL that the step causes, as the chosen token sees it.

    Over tokens drawn from p and one direction, its mean is the quadratic model of the KL, eta^2 u' F u / 2.

    Args:
      score: v = e_a - p on K entries of the vocabulary, the chosen token among them; carries no gradient.
      direction: u = G h on the same entries, with G what the optimiser would do with the token's gradient (for Adam
        its look-ahead).
      rate: eta, the learning rate.

    Source: Melo et al. 2025, arXiv:2510.00819.
    """
    return jax.lax.stop_gradient((rate * (score * direction).sum(axis=2)) ** 2 / 2)


def improvement_along(score: Entries, direction: Entries, probability: Entries, advantage: Tokens,
                      rate: Scalar) -> Tokens:
    """m_H = A (eta v.u + eta^2 ((v.u)^2 - u' F u) / 2), F = diag(p) - p p': what the step adds to r A.

    It is the Taylor polynomial of second order, r being the token's probability after over before the step.

    Args:
      score: v = e_a - p on K entries of the vocabulary, the chosen token among them; carries no gradient.
      direction: u = G h on the same entries, see `divergence_along`.
      probability: p of those entries.
      advantage: A, in reward units.
      rate: eta, the learning rate.

    Source: Melo et al. 2025, arXiv:2510.00819.
    """
    along = (score * direction).sum(axis=2)
    spread = (probability * direction**2).sum(axis=2) - (probability * direction).sum(axis=2) ** 2
    return _improvement(along, spread, advantage, rate)


def divergence_of_sgd(logp: Tokens, second_moment: Tokens, hidden_square: Tokens, advantage: Tokens,
                      rate: Scalar) -> Tokens:
    """m_F of `divergence_along` the token's own gradient, over the whole vocabulary: v.u = A |h|^2 |v|^2.

    |v|^2 = 1 - 2 p_a + sum_v p_v^2.

    Args:
      logp: log p_a of the chosen token, in nats; carries no gradient.
      second_moment: sum_v p_v^2.
      hidden_square: |h|^2, h being what times W gives the logits of p.
      advantage: A, in reward units.
      rate: eta, the learning rate.

    Source: Melo et al. 2025, arXiv:2510.00819.
    """
    along = advantage * hidden_square * _score_square(jnp.exp(logp), second_moment)
    return jax.lax.stop_gradient((rate * along) ** 2 / 2)


def improvement_of_sgd(logp: Tokens, second_moment: Tokens, third_moment: Tokens, hidden_square: Tokens,
                       advantage: Tokens, rate: Scalar) -> Tokens:
    """m_H of `improvement_along` the token's own gradient, over the whole vocabulary.

    u' F u = A^2 |h|^4 (p_a - 2 p_a^2 + sum_v p_v^3 - (p_a - sum_v p_v^2)^2).

    Args:
      logp: log p_a of the chosen token, in nats; carries no gradient.
      second_moment, third_moment: sum_v p_v^2 and sum_v p_v^3.
      hidden_square: |h|^2, h being what times W gives the logits of p.
      advantage: A, in reward units.
      rate: eta, the learning rate.

    Source: Melo et al. 2025, arXiv:2510.00819.
    """
    chosen, scale = jnp.exp(logp), advantage * hidden_square
    variance = chosen - 2 * chosen**2 + third_moment - (chosen - second_moment) ** 2
    along = scale * _score_square(chosen, second_moment)
    return _improvement(along, scale**2 * jnp.maximum(variance, 0.0), advantage, rate)


def kept_symmetric(divergence: Tokens, improvement: Tokens, divergence_limit: Bound, improvement_limit: Bound) -> Mask:
    """m_F < tau_F and |m_H| < tau_H; a limit of 0 switches its test off.

    Args:
      divergence: m_F, in nats; carries no gradient.
      improvement: m_H, in reward units.
      divergence_limit, improvement_limit: tau_F and tau_H, in those units, >= 0.

    Source: Melo et al. 2025, arXiv:2510.00819.
    """
    return _below(divergence, divergence_limit) & _below(jnp.abs(improvement), improvement_limit)


def kept_asymmetric(divergence: Tokens, improvement: Tokens, divergence_limit: Bound, improvement_limit: Bound) -> Mask:
    """m_F < tau_F and 0 <= m_H < tau_H: no step that would make things worse; a limit of 0 switches its test off.

    Args:
      divergence: m_F, in nats; carries no gradient.
      improvement: m_H, in reward units.
      divergence_limit, improvement_limit: tau_F and tau_H, in those units, >= 0.

    Source: Melo et al. 2025, arXiv:2510.00819.
    """
    worse = (improvement < 0) & (jnp.asarray(improvement_limit) != 0)
    return _below(divergence, divergence_limit) & _below(improvement, improvement_limit) & ~worse


def _improvement(along: Tokens, spread: Tokens, advantage: Tokens, rate: Scalar) -> Tokens:
    return jax.lax.stop_gradient(advantage * (rate * along + rate**2 * (along**2 - spread) / 2))


def _score_square(chosen: Tokens, second_moment: Tokens) -> Tokens:
    return jnp.maximum(1 - 2 * chosen + second_moment, 0.0)


def _below(measure: Tokens, limit: Bound) -> Mask:
    return (measure < limit) | (jnp.asarray(limit) == 0)
