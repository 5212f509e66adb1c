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
