"""The gradient: the same recursion in the other direction of time."""
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.discounted_scan import forward
from kernels_pallas.discounted_scan.forward import Rows, Steps


def cotangents(passes: forward.Passes, factor: Steps, last: Rows, y: Steps, d_y: Steps) -> tuple[Steps, Steps, Rows]:
    """Cotangents of x, factor and last.

    What y_t is worth to every result, w_t = d_y_t + factor_{t-1} w_{t-1}, is the cotangent of x_t; factor_t has
    w_t y_{t+1}, and last has factor_T w_T.

    Args:
      passes: the sweeps over a block.
      factor, last, y: of the forward pass.
      d_y: cotangent of y.
    """
    earlier = jnp.concatenate([jnp.zeros_like(factor[:, :1]), factor[:, :-1]], axis=1)
    # Turned around and not a second recursion: the turns join the copies that put time in front.
    worth = forward.scan(passes, d_y[:, ::-1], earlier[:, ::-1], jnp.zeros_like(last))[:, ::-1]
    after = jnp.concatenate([y[:, 1:], last[:, None]], axis=1)
    return worth, worth * after, factor[:, -1] * worth[:, -1]
