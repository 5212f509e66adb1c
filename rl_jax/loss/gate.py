"""When a change of probability stops being rewarded."""
import jax
import jax.numpy as jnp

from rl_jax.types import Bound, Tokens


def ppo_clip(ratio: Tokens, advantage: Tokens, low: Bound, high: Bound) -> Tokens:
    """-min(r A, clip(r, 1 - low, 1 + high) A): nothing is gained by leaving the band.

    Args:
      ratio: r, current over old probability of the chosen token; differentiable.
      advantage: A, in reward units; carries no gradient.
      low, high: half-widths of the band, dimensionless, >= 0.

    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7.
    """
    advantage = jax.lax.stop_gradient(advantage)
    return -jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - low, 1 + high) * advantage)


def dual_clip(ratio: Tokens, advantage: Tokens, low: Bound, high: Bound, ceiling: Bound) -> Tokens:
    """`ppo_clip`, but at most -c A where A < 0: a bad token that became probable does not dominate the batch.

    Args:
      ratio: r, current over old probability of the chosen token; differentiable.
      advantage: A, in reward units; carries no gradient.
      low, high: half-widths of the band, dimensionless, >= 0.
      ceiling: c, the largest ratio that counts where A < 0, dimensionless, > 1 + high.

    Source: Ye et al. 2019, arXiv:1912.09729, "Dual-clip PPO".
    """
    advantage = jax.lax.stop_gradient(advantage)
    clipped = ppo_clip(ratio, advantage, low, high)
    return jnp.where(advantage < 0, jnp.minimum(clipped, -ceiling * advantage), clipped)
