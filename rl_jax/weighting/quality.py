"""Answers that count more, the better they were."""
import jax
import jax.numpy as jnp

from rl_jax.types import Scalar, Tokens


def exponential(advantage: Tokens, temperature: Scalar) -> Tokens:
    """exp(A / temperature), dimensionless: good answers count more than 1, bad ones less.

    The exponent is held within +-20.

    Args:
      advantage: A, in reward units, not divided by a standard deviation; carries no gradient.
      temperature: the credit that makes e of 1, in reward units, > 0.

    Source: Yao et al. 2025, arXiv:2509.24203, "RED-Weight"; Trinity-RFT, rec_policy_loss.py, weight "advantage".
    """
    return jnp.exp(jnp.clip(jax.lax.stop_gradient(advantage) / temperature, -20.0, 20.0))
