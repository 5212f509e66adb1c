"""How much more probable a chosen token has become."""
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rl_jax import masked
from rl_jax.types import Bound, Mask, Tokens


def per_token(logp: Tokens, old_logp: Tokens) -> Tokens:
    """r = exp(clip(logp - old_logp, -20, 20)); no gradient beyond the clip.

    Args:
      logp: log-probability of the chosen token now, in nats; differentiable.
      old_logp: that of the policy to compare with, in nats; carries no gradient.

    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 6.
    """
    return jnp.exp(jnp.clip(logp - jax.lax.stop_gradient(old_logp), -20.0, 20.0))


def per_sequence(logp: Tokens, old_logp: Tokens, mask: Mask) -> Tokens:
    """s_i = exp(mean over the sequence's tokens of (logp - old_logp)), the same at each of its positions.

    The geometric mean of the token ratios; 1 where nothing was chosen. Its logarithm is clipped to
    [-20, 10], with no gradient beyond.

    Args:
      logp: log-probability of the chosen token now, in nats; differentiable.
      old_logp: that of the policy to compare with, in nats; carries no gradient.
      mask: which tokens the policy chose.

    Source: Zheng et al. 2025, arXiv:2507.18071, eq. 7.
    """
    return _geometric_mean(_log_ratio(logp, old_logp, mask), mask)


def per_sequence_token(logp: Tokens, old_logp: Tokens, mask: Mask) -> Tokens:
    """s_it = sg[s_i] exp(logp - sg[logp]): the value of `per_sequence`, but each token moves its own only.

    For credit that differs from token to token; with the same credit on every token, the mean over
    the sequence has the value and the gradient of `per_sequence`.

    Args:
      logp: log-probability of the chosen token now, in nats; differentiable.
      old_logp: that of the policy to compare with, in nats; carries no gradient.
      mask: which tokens the policy chose.

    Source: Zheng et al. 2025, arXiv:2507.18071, eq. 14.
    """
    log_ratio = _log_ratio(logp, old_logp, mask)
    mean = jax.lax.stop_gradient(masked.row_mean(log_ratio, mask))[:, None]
    return _exp(mean + (log_ratio - jax.lax.stop_gradient(log_ratio)))


def clipped_geometric_mean(logp: Tokens, old_logp: Tokens, advantage: Tokens, mask: Mask, low: Bound,
                           high: Bound) -> Tokens:
    """exp(mean of d'), with d' = min(d, high) where A > 0 and max(d, -low) where A < 0, d = logp - old_logp.

    Each token is clipped in nats before the mean, on the side where its credit is gained, so one
    token cannot use up the sequence's band. Clipped as in `per_sequence` after the mean.

    Args:
      logp: log-probability of the chosen token now, in nats; differentiable.
      old_logp: that of the policy to compare with, in nats; carries no gradient.
      advantage: A, of which the sign is read.
      mask: which tokens the policy chose.
      low, high: half-widths of the band, in nats, >= 0.

    Source: Zhao et al. 2025, arXiv:2507.20673, "Geometric-Mean Policy Optimization", with its published code.
    """
    log_ratio = _log_ratio(logp, old_logp, mask)
    clipped = jnp.where(advantage < 0, jnp.maximum(log_ratio, -low), jnp.minimum(log_ratio, high))
    return _geometric_mean(clipped, mask)


def _log_ratio(logp: Tokens, old_logp: Tokens, mask: Mask) -> Tokens:
    return masked.zeroed(logp - jax.lax.stop_gradient(old_logp), mask)


def _geometric_mean(log_ratio: Tokens, mask: Mask) -> Tokens:
    return jnp.broadcast_to(_exp(masked.row_mean(log_ratio, mask)[:, None]), mask.shape)


def _exp(log_ratio: Float[Array, "N _"]) -> Float[Array, "N _"]:
    # A whole sequence that became e^10 times as probable per token is broken: it must not be the whole gradient.
    return jnp.exp(jnp.clip(log_ratio, -20.0, 10.0))
