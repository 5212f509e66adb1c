"""KL estimators: values, and the gradient that each really has in expectation."""
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


def test_the_mean_gradient_is_none_the_reverse_or_the_forward_kl():
    """Over a policy of three tokens the expectation is exact: sum_v p(v) d estimator / d logits."""
    with jax.enable_x64(True):
        logits, reference = jnp.array([0.3, -1.0, 0.5]), jax.nn.log_softmax(jnp.array([-0.2, 0.4, 1.0]))
        drawn = jax.nn.softmax(logits)

        def mean_gradient(function):
            def mean(z):
                return (drawn * function(jax.nn.log_softmax(z)[None], reference[None])[0]).sum()
            return jax.grad(mean)(logits)

        def reverse(z):
            return (jax.nn.softmax(z) * (jax.nn.log_softmax(z) - reference)).sum()

        def forward(z):
            return (jnp.exp(reference) * (reference - jax.nn.log_softmax(z))).sum()

        np.testing.assert_allclose(mean_gradient(divergence.k1), 0.0, atol=1e-15)
        np.testing.assert_allclose(mean_gradient(divergence.k2), jax.grad(reverse)(logits), rtol=1e-12)
        np.testing.assert_allclose(mean_gradient(divergence.k3), jax.grad(forward)(logits), rtol=1e-12)
        for function in (divergence.k1, divergence.k3):
            value = (drawn * function(jax.nn.log_softmax(logits)[None], reference[None])[0]).sum()
            np.testing.assert_allclose(value, reverse(logits), rtol=1e-12)
