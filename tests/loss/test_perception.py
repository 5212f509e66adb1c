"""The gap between a prompt and its degraded form: value, gradient, ceiling."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.loss import perception
from tests import numeric

LOGP, DEGRADED = -np.abs(numeric.normal(0, 3, 4)), -np.abs(numeric.normal(1, 3, 4))


def oracle(logp, degraded, coefficient, ceiling):
    away = logp - degraded
    return -coefficient * min(math.exp(-away) + away - 1, ceiling)


@pytest.mark.parametrize("coefficient, ceiling", [(1e-4, 10.0), (0.3, 0.2)])
def test_against_loops(coefficient, ceiling):
    found = numeric.in_float64(perception.gap, LOGP, DEGRADED, coefficient, ceiling)
    expected = [oracle(*pair, coefficient, ceiling) for pair in zip(LOGP.flat, DEGRADED.flat, strict=True)]
    np.testing.assert_allclose(found.ravel(), expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("away, value, slope", [(0.0, 0.0, 0.0), (0.5, 0.106531, 0.393469),
                                                (-0.5, 0.148721, -0.648721)])
def test_the_gradient_widens_the_gap(away, value, slope):
    # Numbers of k3 from the formula sheet of the KL estimators; the loss is largest where both prompts say the same.
    found, gradient = jax.value_and_grad(lambda logp: perception.gap(logp, jnp.full((1, 1), -2.0), 1.0).sum())(
        jnp.full((1, 1), -2.0 + away))
    np.testing.assert_allclose(found, -value, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(gradient, -slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("away", [-3.0, -25.0, 12.0])
def test_nothing_is_gained_beyond_the_ceiling(away):
    found, gradient = jax.value_and_grad(lambda logp: perception.gap(logp, jnp.zeros((1, 1)), 1.0).sum())(
        jnp.full((1, 1), away))
    np.testing.assert_allclose(found, -10.0)
    np.testing.assert_array_equal(gradient, 0.0)


def test_gradient_in_the_clean_log_probability_only():
    def of_logp(logp):
        return perception.gap(logp, jnp.asarray(DEGRADED), 0.3)

    np.testing.assert_allclose(numeric.gradient(of_logp, LOGP), numeric.central_difference(of_logp, LOGP), atol=1e-8)
    constant = jax.grad(lambda d: perception.gap(jnp.asarray(LOGP), d, 0.3).sum())(jnp.asarray(DEGRADED))
    np.testing.assert_array_equal(constant, 0.0)
