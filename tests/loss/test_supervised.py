"""Negative log-likelihood."""
import jax.numpy as jnp
import numpy as np

from rl_jax.loss import supervised


def test_minus_the_log_probability():
    np.testing.assert_array_equal(supervised.negative_log_likelihood(jnp.array([[-0.5, -2.0]])), [[0.5, 2.0]])
