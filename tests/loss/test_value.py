"""The critic's clipped squared error against loops and differences."""
import jax
import jax.numpy as jnp
import numpy as np

from rl_jax.loss import value
from tests import numeric

VALUES, OLD, RETURNS = (numeric.normal(seed, 4, 5) for seed in range(3))
BAND = 0.5


def oracle(v, old, target):
    near = min(max(v, old - BAND), old + BAND)
    return max((v - target) ** 2, (near - target) ** 2) / 2


def test_against_loops_and_differences():
    expected = [oracle(*numbers) for numbers in zip(VALUES.flat, OLD.flat, RETURNS.flat, strict=True)]
    np.testing.assert_allclose(numeric.in_float64(value.clipped, VALUES, OLD, RETURNS, BAND).ravel(), expected,
                               rtol=1e-12)

    def of_values(values):
        return value.clipped(values, jnp.asarray(OLD), jnp.asarray(RETURNS), BAND)

    np.testing.assert_allclose(numeric.gradient(of_values, VALUES), numeric.central_difference(of_values, VALUES),
                               rtol=1e-6, atol=1e-8)


def test_moving_towards_the_return_beyond_the_band_gains_nothing():
    slope = jax.grad(lambda v: value.clipped(v, jnp.zeros((1, 2)), jnp.full((1, 2), 2.0), BAND).sum())
    # Inside the band the slope is V - G; beyond it, on the way to the return, 0.
    np.testing.assert_allclose(slope(jnp.array([[0.3, 0.8]])), [[-1.7, 0.0]], rtol=1e-6)


def test_old_values_and_returns_are_constants():
    given = (jnp.asarray(OLD, jnp.float32), jnp.asarray(RETURNS, jnp.float32))
    gradients = jax.grad(lambda given: value.clipped(jnp.asarray(VALUES, jnp.float32), *given, BAND).sum())(given)
    np.testing.assert_array_equal(gradients, 0.0)
