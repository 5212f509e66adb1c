"""Weights by quality against loops."""
import math

import jax
import jax.numpy as jnp
import numpy as np

from rl_jax.weighting import quality
from tests import numeric


def test_exponential():
    advantage = numeric.normal(0, 3, 4)
    found = numeric.in_float64(quality.exponential, advantage, 0.7)
    np.testing.assert_allclose(found.ravel(), [math.exp(a / 0.7) for a in advantage.flat], rtol=1e-12)
    np.testing.assert_array_equal(quality.exponential(jnp.zeros((1, 2)), 0.7), 1.0)


def test_it_is_constant_and_finite():
    far = jnp.array([[1e6, -1e6]])
    np.testing.assert_allclose(quality.exponential(far, 1.0), [[math.exp(20), math.exp(-20)]], rtol=1e-6)
    np.testing.assert_array_equal(jax.grad(lambda a: quality.exponential(a, 1.0).sum())(jnp.ones((1, 2))), 0.0)
