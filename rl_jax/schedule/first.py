"""What the first batch of a run was like."""
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rl_jax import masked
from rl_jax.schedule.control import Control
from rl_jax.types import Experience, Tokens


def token_mean(quantity: Callable[[Experience], Tokens]) -> Control:
    """Mean of a quantity over the chosen tokens of the first batch that has any; +inf until then.

    So +inf says to what reads it that this is the first batch, whose own mean it can take.

    Args:
      quantity: x -> [N, T], such as `lambda x: x.rollout_entropy`.
    """
    def update(state, x, policy, metrics):
        found = jnp.where(x.mask.any(), masked.mean(quantity(x), x.mask), jnp.inf)
        return jax.lax.stop_gradient(jnp.where(jnp.isfinite(state), state, found).astype(jnp.float32))

    return Control(init=lambda examples: jnp.asarray(jnp.inf, jnp.float32), update=update, read=lambda state: state)
