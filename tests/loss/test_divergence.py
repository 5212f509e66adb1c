"""KL estimators: values and slopes. What gradient each has in expectation: tests/recipes/test_kl_gradients.py."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.loss import divergence
from tests import numeric

LOGP, REFERENCE = -np.abs(numeric.normal(0, 3, 4)), -np.abs(numeric.normal(1, 3, 4))
CASES = [(divergence.k1, lambda x: x), (divergence.k2, lambda x: x * x / 2),
         (divergence.k3, lambda x: math.exp(-x) + x - 1)]


@pytest.mark.parametrize("function, oracle", CASES)
def test_against_loops_and_differences(function, oracle):
    expected = [oracle(a - b) for a, b in zip(LOGP.flat, REFERENCE.flat, strict=True)]
    np.testing.assert_allclose(numeric.in_float64(function, LOGP, REFERENCE).ravel(), expected, rtol=1e-9)

    def of_logp(logp):
        return function(logp, jnp.asarray(REFERENCE))

    np.testing.assert_allclose(numeric.gradient(of_logp, LOGP), numeric.central_difference(of_logp, LOGP),
                               rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("x, values, slopes", [(0.5, (0.5, 0.125, 0.106531), (1, 0.5, 0.393469)),
                                               (-0.5, (-0.5, 0.125, 0.148721), (1, -0.5, -0.648721)),
                                               (0.0, (0, 0, 0), (1, 0, 0))])
def test_worked_example(x, values, slopes):
    # Formula sheet of the KL estimators.
    for (function, _), value, slope in zip(CASES, values, slopes, strict=True):
        found = jax.value_and_grad(lambda logp: function(logp, jnp.zeros((1, 1))).sum())(jnp.full((1, 1), x))
        np.testing.assert_allclose([float(found[0]), found[1].item()], [value, slope], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("function, _", CASES)
def test_finite_far_away_and_no_gradient_to_the_reference(function, _):
    far = jnp.array([[500.0, -500.0, -1e30]])
    value, gradient = jax.value_and_grad(lambda x: function(x, jnp.zeros((1, 3))).sum())(far)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    reference = jax.grad(lambda x: function(jnp.ones((1, 3)), x).sum())(jnp.zeros((1, 3)))
    np.testing.assert_array_equal(reference, 0.0)


def test_straight_through_has_the_value_of_k3_and_the_gradient_of_k2():
    value = numeric.in_float64(divergence.k3_straight_through, LOGP, REFERENCE)
    np.testing.assert_allclose(value, numeric.in_float64(divergence.k3, LOGP, REFERENCE), rtol=1e-12)
    slope = numeric.gradient(lambda logp: divergence.k3_straight_through(logp, jnp.asarray(REFERENCE)), LOGP)
    np.testing.assert_allclose(slope, LOGP - REFERENCE, rtol=1e-12)
    reference = jax.grad(lambda x: divergence.k3_straight_through(jnp.ones((1, 3)), x).sum())(jnp.zeros((1, 3)))
    np.testing.assert_array_equal(reference, 0.0)


OLD = -np.abs(numeric.normal(2, 3, 4))


def test_corrected_against_loops_and_differences():
    def of_logp(logp):
        return divergence.k3_corrected(logp, jnp.asarray(OLD), jnp.asarray(REFERENCE))

    found, slopes = numeric.in_float64(of_logp, LOGP), numeric.gradient(of_logp, LOGP)
    for logp, old, reference, value, slope in zip(LOGP.flat, OLD.flat, REFERENCE.flat, found.flat, slopes.flat,
                                                  strict=True):
        x, ratio = logp - reference, math.exp(logp - old)
        assert value == pytest.approx(ratio * (math.exp(-x) + x - 1), rel=1e-9)
        assert slope == pytest.approx(ratio * x, rel=1e-9)
    np.testing.assert_allclose(slopes, numeric.central_difference(of_logp, LOGP), rtol=1e-5, atol=1e-8)
    gradients = jax.grad(lambda old, reference: divergence.k3_corrected(-jnp.ones((1, 3)), old, reference).sum(),
                         argnums=(0, 1))(jnp.zeros((1, 3)), jnp.zeros((1, 3)))
    np.testing.assert_array_equal(gradients, 0.0)


@pytest.mark.parametrize("function", [divergence.k2, divergence.k3, divergence.k3_straight_through])
def test_all_are_half_the_square_near_the_reference(function):
    # Formula sheet of the KL estimators, reduces to; k2 exactly.
    x = np.array([[1e-4, -1e-4]])
    np.testing.assert_allclose(numeric.in_float64(function, x, np.zeros((1, 2))), x**2 / 2, rtol=1e-4)
