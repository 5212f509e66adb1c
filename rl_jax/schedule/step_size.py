"""How large a step the gradient's noise allows."""
import jax.numpy as jnp

from rl_jax.types import Scalar


def signal_share(square: Scalar, variance: Scalar, *, gain: Scalar = 1.0, ceiling: Scalar = 1.0) -> Scalar:
    """min(gain S / (1 + S), ceiling), S the signal-to-noise ratio: the less of a gradient is noise, the larger it is.

    S = max(|g|^2 - V, 0) / V: noise adds V to the expected square of the batch's gradient g. S / (1 + S) goes to 1
    without noise and is 0 where the square is not above the noise.

    Args:
      square: |g|^2, squared norm of the batch's gradient.
      variance: V, the trace of the covariance of that gradient: that of one sample's over the number of samples.
      gain: 1 / L over the optimiser's learning rate, L the smoothness of the objective; a choice, as L is unknown.
      ceiling: the largest factor, a choice, not the paper's.

    Source: Huang et al. 2025, arXiv:2511.23310, abstract; the formula is the standard derivation.
    """
    signal = jnp.maximum(square - variance, 0.0)
    power = signal + variance
    return jnp.minimum(gain * signal / jnp.where(power > 0, power, 1.0), ceiling)
