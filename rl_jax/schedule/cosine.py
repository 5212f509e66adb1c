"""Coefficients that move along a cosine, batch by batch."""
import jax.numpy as jnp

from rl_jax.schedule.control import Control


def annealed(initial: float, final: float, batches: int) -> Control:
    """final + (initial - final) (1 + cos(pi min(k / batches, 1))) / 2 in batch k = 0, 1, ...

    Args:
      initial: its value in the first batch, any unit.
      final: its value from batch number `batches` on, in the same unit.
      batches: how many batches it takes, at least 1.

    Raises:
      ValueError: if `batches` is less than 1.

    Source: Loshchilov and Hutter 2016, arXiv:1608.03983, eq. 5, without restarts.
    """
    if batches < 1:
        raise ValueError(f"batches={batches}: a cosine needs at least 1 to fall over.")

    def read(state):
        # from the half angle: exactly 0 at the end, whatever the rounding of pi
        share = jnp.sin(jnp.pi / 2 * jnp.maximum(1 - state / batches, 0.0)) ** 2
        return jnp.asarray(final + (initial - final) * share, jnp.float32)

    return Control(init=lambda examples: jnp.zeros((), jnp.int32), update=lambda state, x, policy, metrics: state + 1,
                   read=read)
