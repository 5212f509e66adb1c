"""Teaching the critic what an answer is worth."""
import jax
import jax.numpy as jnp

from rl_jax.types import Bound, Tokens


def clipped(values: Tokens, old_values: Tokens, returns: Tokens, band: Bound) -> Tokens:
    """max((V - G)^2, (clip(V, V_old - band, V_old + band) - G)^2) / 2: moving further than the band gains nothing.

    Args:
      values: V, what the critic says now, in reward units; differentiable.
      old_values: V_old, what it said before this batch; carries no gradient.
      returns: G, what it should have said; carries no gradient.
      band: largest useful change of a value, in reward units.

    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 9, with the clipping of its published code.
    """
    old_values, returns = jax.lax.stop_gradient((old_values, returns))
    near = jnp.clip(values, old_values - band, old_values + band)
    return jnp.maximum((values - returns) ** 2, (near - returns) ** 2) / 2
