"""The ratio against math.exp, its clamp and its gradient."""
import math

import jax
import jax.numpy as jnp
import numpy as np

from rl_jax.loss import ratio
from tests import numeric

LOGP, OLD = -np.abs(numeric.normal(0, 3, 4)), -np.abs(numeric.normal(1, 3, 4))


def test_against_loops():
    expected = [[math.exp(a - b) for a, b in zip(*rows, strict=True)] for rows in zip(LOGP, OLD, strict=True)]
    np.testing.assert_allclose(numeric.in_float64(ratio.per_token, LOGP, OLD), expected, rtol=1e-12)


def test_clamped_at_20_nats_and_without_gradient_beyond():
    logp = jnp.array([[100.0, -100.0, 19.0]])
    value = ratio.per_token(logp, jnp.zeros((1, 3)))
    np.testing.assert_allclose(value, [[math.exp(20), math.exp(-20), math.exp(19)]], rtol=1e-5)
    gradient = jax.grad(lambda x: ratio.per_token(x, jnp.zeros((1, 3))).sum())(logp)
    np.testing.assert_allclose(gradient, [[0.0, 0.0, math.exp(19)]], rtol=1e-5)


def test_gradient_against_differences_and_none_to_the_old_policy():
    def function(logp):
        return ratio.per_token(logp, jnp.asarray(OLD))

    np.testing.assert_allclose(numeric.gradient(function, LOGP), numeric.central_difference(function, LOGP), rtol=1e-6)
    old = jax.grad(lambda old: ratio.per_token(jnp.zeros((3, 4)), old).sum())(jnp.asarray(OLD, jnp.float32))
    np.testing.assert_array_equal(old, 0.0)
