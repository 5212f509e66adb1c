"""How far the turns that were updated first have moved each answer."""
import jax
import jax.numpy as jnp

from rl_jax import masked
from rl_jax.types import Mask, PerSequence, Scalar, Tokens


def carried_ratio(factor: PerSequence, logp: Tokens, old_logp: Tokens, mask: Mask, band: Scalar = 0.2) -> PerSequence:
    """M <- clip(M clip(s, 1 - band, 1 + band), 1 - band, 1 + band), s the turn's mean ratio; M where there is no turn.

    s = exp(clip(mean over the turn's tokens of logp - old_logp, -10, 10)). No gradient passes.

    Args:
      factor: M of each sequence so far, dimensionless; 1 before the first turn.
      logp: log-probability of the chosen token after the turn's step, in nats.
      old_logp: that before it, in nats.
      mask: the turn's tokens that the policy chose.
      band: half-width of the band around 1, dimensionless.

    Source: SeeUPO, arXiv:2602.06554.
    """
    change = masked.row_mean(masked.zeroed(logp, mask) - masked.zeroed(old_logp, mask), mask)
    ratio = jnp.clip(jnp.exp(jnp.clip(change, -10.0, 10.0)), 1 - band, 1 + band)
    carried = jnp.clip(factor * ratio, 1 - band, 1 + band)
    return jax.lax.stop_gradient(jnp.where(mask.any(axis=1), carried, factor))
