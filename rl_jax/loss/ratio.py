"""How much more probable a chosen token has become."""
import jax
import jax.numpy as jnp

from rl_jax.types import Tokens


def per_token(logp: Tokens, old_logp: Tokens) -> Tokens:
    """r = exp(clip(logp - old_logp, -20, 20)); no gradient beyond the clip.

    Args:
      logp: log-probability of the chosen token now, in nats; differentiable.
      old_logp: that of the policy to compare with, in nats; carries no gradient.

    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 6.
    """
    return jnp.exp(jnp.clip(logp - jax.lax.stop_gradient(old_logp), -20.0, 20.0))
