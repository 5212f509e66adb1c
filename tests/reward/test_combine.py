"""The divergence inside the reward."""
import jax
import jax.numpy as jnp
import numpy as np

from rl_jax.reward import combine
from tests import numeric

MASK = np.array([[1, 0, 1], [0, 0, 0]], bool)
LOGP, REFERENCE = (np.where(MASK, -np.abs(numeric.normal(seed, 2, 3)), np.nan) for seed in range(2))


def test_against_loops_and_constant():
    expected = 1.0 - 0.1 * (float(LOGP[0, 0]) - float(REFERENCE[0, 0]) + float(LOGP[0, 2]) - float(REFERENCE[0, 2]))
    found = numeric.in_float64(combine.less_divergence, np.array([1.0, 0.5]), LOGP, REFERENCE, MASK, 0.1)
    np.testing.assert_allclose(found, [expected, 0.5], rtol=1e-12)
    gradient = jax.grad(lambda logp: combine.less_divergence(
        jnp.ones(2), logp, jnp.asarray(REFERENCE), jnp.asarray(MASK), 0.1).sum())(jnp.asarray(LOGP))
    np.testing.assert_array_equal(gradient, 0.0)


def test_per_token_against_loops():
    # A row with a hole, an empty one, a full one; what is not chosen is NaN.
    mask = np.array([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], bool)
    logp, reference = (np.where(mask, -np.abs(numeric.normal(seed, 3, 4)), np.nan) for seed in (2, 3))
    score, beta = np.array([1.0, 0.5, -2.0]), 0.1
    expected = [[-beta * (logp[i, t] - reference[i, t]) if mask[i, t] else 0.0 for t in range(4)] for i in range(3)]
    expected[0][2] += 1.0
    expected[2][3] -= 2.0
    found = numeric.in_float64(combine.less_divergence_per_token, score, logp, reference, mask, beta)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    whole = numeric.in_float64(combine.less_divergence, score, logp, reference, mask, beta)
    np.testing.assert_allclose(found.sum(axis=1)[[0, 2]], whole[[0, 2]], rtol=1e-12)
    for constant in jax.grad(lambda *a: combine.less_divergence_per_token(*a, jnp.asarray(mask), beta).sum(), (0, 1, 2))(
            jnp.asarray(score), jnp.asarray(logp), jnp.asarray(reference)):
        np.testing.assert_array_equal(constant, 0.0)


def test_any_estimate_against_loops_and_constant():
    expected = 1.0 - 0.1 * (float(LOGP[0, 0]) + float(LOGP[0, 2]))
    found = numeric.in_float64(combine.less_estimate, np.array([1.0, 0.5]), LOGP, MASK, 0.1)
    np.testing.assert_allclose(found, [expected, 0.5], rtol=1e-12)
    k1 = numeric.in_float64(combine.less_estimate, np.array([1.0, 0.5]), LOGP - REFERENCE, MASK, 0.1)
    np.testing.assert_allclose(k1, numeric.in_float64(combine.less_divergence, np.array([1.0, 0.5]), LOGP, REFERENCE,
                                                      MASK, 0.1), rtol=1e-12)
    for constant in jax.grad(lambda *a: combine.less_estimate(*a, jnp.asarray(MASK), 0.1).sum(), (0, 1))(
            jnp.ones(2), jnp.asarray(LOGP)):
        np.testing.assert_array_equal(constant, 0.0)
