"""Tokens that do not count because the policy has moved too far: rejected, not clipped.

`one_side`, `two_side` and `ring` say which tokens are kept; `policy_gradient` is the loss of those. A rejected token
keeps its place in the aggregator's denominators. What holds the policy without rejecting anything is at the end.
"""
import jax
import jax.numpy as jnp

from rl_jax.types import Bound, Mask, Scalar, Tokens


def one_side(ratio: Tokens, advantage: Tokens, low: Bound, high: Bound) -> Mask:
    """(A >= 0 and r <= 1 + high) or (A <= 0 and r >= 1 - low): what went too far the way its credit asks is rejected.

    With r as the weight in `policy_gradient` this has the gradient of `gate.ppo_clip`. A = 0 keeps everything.

    Args:
      ratio: r, current over old probability of the chosen token; carries no gradient.
      advantage: A, of which the sign is read.
      low, high: half-widths of the band, dimensionless, >= 0.

    Source: Yao et al. 2025, arXiv:2509.24203, "REC-OneSide".
    """
    ratio, advantage = jax.lax.stop_gradient((ratio, advantage))
    return ((advantage >= 0) & (ratio <= 1 + high)) | ((advantage <= 0) & (ratio >= 1 - low))


def two_side(ratio: Tokens, low: Bound, high: Bound) -> Mask:
    """1 - low <= r <= 1 + high, whatever the credit.

    Args:
      ratio: r, current over old probability of the chosen token; carries no gradient.
      low, high: half-widths of the band, dimensionless, >= 0.

    Source: Yao et al. 2025, arXiv:2509.24203, "REC-TwoSide".
    """
    ratio = jax.lax.stop_gradient(ratio)
    return (ratio >= 1 - low) & (ratio <= 1 + high)


def ring(ratio: Tokens, advantage: Tokens, low: Bound, high: Bound, *, far_low: Bound, far_high: Bound) -> Mask:
    """`two_side`, or (A >= 0 and r <= 1 - far_low), or (A <= 0 and r >= 1 + far_high).

    What is far out on the side that its credit wants it back from is kept, too.

    Args:
      ratio: r, current over old probability of the chosen token; carries no gradient.
      advantage: A, of which the sign is read.
      low, high: half-widths of the inner band, dimensionless, >= 0.
      far_low, far_high: distances from 1 at which the outer ranges begin, dimensionless, >= low and >= high.

    Source: Yao et al. 2025, arXiv:2509.24203, "REC-Ring".
    """
    ratio, advantage = jax.lax.stop_gradient((ratio, advantage))
    pulled_back = ((advantage >= 0) & (ratio <= 1 - far_low)) | ((advantage <= 0) & (ratio >= 1 + far_high))
    return two_side(ratio, low, high) | pulled_back


def policy_gradient(logp: Tokens, advantage: Tokens, weight: Bound, kept: Mask) -> Tokens:
    """-sg[W A] logp where kept, 0 elsewhere.

    With everything kept and W = 1 it is REINFORCE on whatever data there are, `score.policy_gradient`.

    Args:
      logp: log-probability of the chosen token now, in nats; differentiable.
      advantage: A, in reward units; carries no gradient.
      weight: W, dimensionless, carries no gradient: 1, or the ratio for importance sampling.
      kept: which tokens are not rejected.

    Source: Yao et al. 2025, arXiv:2509.24203, "REC"; Trinity-RFT, rec_policy_loss.py.
    """
    return -jax.lax.stop_gradient(jnp.where(kept, weight * advantage, 0.0)) * logp


def mirror_descent(logp: Tokens, advantage: Tokens, temperature: Scalar) -> Tokens:
    """-A logp / (1 + tau): REINFORCE, shorter in step the more the old policy is trusted ("OPMD").

    It is `policy_gradient` with everything kept and W = 1 / (1 + tau).

    Args:
      logp: log-probability of the chosen token now, in nats; differentiable.
      advantage: A, in reward units; carries no gradient.
      temperature: tau, weight of the divergence from the old policy, >= 0.

    Source: Pan et al. 2025, arXiv:2505.17826, "OPMD"; Trinity-RFT, opmd_policy_loss.py.
    """
    return policy_gradient(logp, advantage, 1 / (1 + temperature), jnp.ones(logp.shape, bool))


def squared_change(logp: Tokens, old_logp: Tokens, coefficient: Scalar) -> Tokens:
    """c (logp - old_logp)^2: `divergence.k2` without its half and without a clip; no token is left out.

    Args:
      logp: log-probability of the chosen token now, in nats; differentiable.
      old_logp: that of the policy that drew it, in nats; carries no gradient.
      coefficient: c, per nat squared, >= 0.

    Source: Yao et al. 2025, arXiv:2509.24203; Trinity-RFT, rec_policy_loss.py, regularizer "k2".
    """
    return coefficient * (logp - jax.lax.stop_gradient(old_logp)) ** 2


def forward_divergence(logp: Tokens, coefficient: Scalar) -> Tokens:
    """-c logp: up to a constant, c KL(who drew the tokens || policy); imitation of all that was drawn.

    Args:
      logp: log-probability of the chosen token now, in nats; differentiable.
      coefficient: c, in reward units per nat, >= 0.

    Source: Yao et al. 2025, arXiv:2509.24203; Trinity-RFT, rec_policy_loss.py, regularizer "forward-kl".
    """
    return -coefficient * logp


def reciprocal_clip(ratio: Tokens, advantage: Tokens, clip: Bound) -> Tokens:
    """-min(r A, (1 + clip) A if A >= 0 else A / (1 + clip)): `gate.ppo_clip` in the band [1 / (1 + clip), 1 + clip].

    The band is symmetric in log-probability; [1 - clip, 1 + clip] is wider below.

    Args:
      ratio: r, current over old probability of the chosen token; differentiable.
      advantage: A, in reward units; carries no gradient.
      clip: how far r may rise above 1, dimensionless, >= 0.

    Source: Chen et al. 2025, arXiv:2502.01600, "LOOP", with its published code.
    """
    advantage = jax.lax.stop_gradient(advantage)
    edge = jnp.where(advantage >= 0, 1 + clip, 1 / (1 + clip))
    return -jnp.minimum(ratio * advantage, edge * advantage)
