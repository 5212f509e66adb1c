"""A coefficient that is the price of a constraint: it rises while what is measured is above its limit."""
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rl_jax.schedule.control import Control
from rl_jax.types import Scalar


def ascended(coefficient: Float[Array, ""], measured: Scalar, target: Scalar, rate: Scalar) -> Float[Array, ""]:
    """max(0, lambda + eta (V - delta)): one step of projected dual ascent.

    Args:
      coefficient: lambda so far, >= 0.
      measured: V, the constrained quantity.
      target: delta, the largest V allowed, in the same unit.
      rate: eta, by how much lambda changes per unit of V, >= 0; 0 keeps it.

    Source: Luo et al. 2026, arXiv:2601.03320, "primal-dual"; the step is the standard one, a reconstruction.
    """
    return jnp.maximum(coefficient + rate * (measured - target), 0.0)


def ascent(initial: float, target: float, rate: float, metric: str) -> Control:
    """The dual variable of the constraint metric <= target, one step of `ascended` per batch, from what its update met.

    The metric is an extra of the recipe's loss slot, averaged over the update's optimiser steps. It is read after the
    update because before it fresh data has a ratio of 1. A batch without tokens, or a metric that is not finite,
    changes nothing. What answers to its price only after many batches, as old data does, needs a small rate: a large
    one overshoots ever further.

    Args:
      initial: lambda in the first batch, >= 0.
      target: delta, the largest value of the metric allowed.
      rate: eta, >= 0.
      metric: name that the loss slot gave its extra.

    Raises:
      ValueError: if `initial` or `rate` is negative; by `update`, if no metric has that name.

    Source: Luo et al. 2026, arXiv:2601.03320, see `ascended`.
    """
    if initial < 0 or rate < 0:
        raise ValueError(f"initial={initial}, rate={rate}: neither a price nor its step size can be negative.")

    def update(state, x, policy, metrics):
        if metric not in metrics:
            raise ValueError(f"no metric is called {metric!r}: the loss slot must return it among its extras "
                             f"(there are: {sorted(metrics) or 'none'}).")
        measured = metrics[metric]
        known = x.mask.any() & jnp.isfinite(measured)
        new = ascended(state, jnp.where(known, measured, target), target, rate)
        return jax.lax.stop_gradient(jnp.where(known, new, state))

    return Control(init=lambda examples: jnp.asarray(initial, jnp.float32), update=update, read=lambda state: state)
