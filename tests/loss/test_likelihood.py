"""The penalty on answers that became less probable: loops over Python floats, gradients, the sheet's numbers."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.loss import likelihood
from rl_jax.weighting import aggregate
from tests import numeric

MASK = np.array([[1, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [1, 1, 1, 1]], bool)
LOGP, OLD = (np.where(MASK, -np.abs(numeric.normal(seed, 6, 4)), np.nan) for seed in (4, 1))
ADVANTAGE = np.broadcast_to(np.array([0.5, 0.0, 1.0, -1.0, 2.0, 0.3])[:, None], (6, 4)).copy()


def falls(i):
    return [float(OLD[i, t] - LOGP[i, t]) for t in range(4) if MASK[i, t]]


def opened(i):
    return ADVANTAGE[i, 0] >= 0 and sum(falls(i)) > 0


def test_against_loops_and_differences():
    expected = [max(0.0, OLD[i, t] - LOGP[i, t]) if MASK[i, t] and opened(i) else 0.0 for i, t in np.ndindex(6, 4)]
    found = numeric.in_float64(likelihood.displacement, LOGP, OLD, ADVANTAGE, MASK)
    np.testing.assert_allclose(found.ravel(), expected, rtol=1e-12)
    assert {opened(i) for i in (0, 1, 4, 5)} == {True, False}, "the batch must have gates of both kinds"
    clean = np.nan_to_num(LOGP)

    def of_logp(logp):
        return likelihood.displacement(logp, *(jnp.asarray(a) for a in (OLD, ADVANTAGE, MASK)))

    np.testing.assert_allclose(numeric.gradient(of_logp, clean), numeric.central_difference(of_logp, clean),
                               rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(numeric.gradient(of_logp, clean), -1.0 * (found > 0))


def test_old_policy_and_advantage_are_constants():
    logp, old = jnp.array([[-3.0, -1.0]]), jnp.array([[-1.0, -1.5]])
    gradient = jax.grad(lambda old, a: likelihood.displacement(logp, old, a, jnp.ones((1, 2), bool)).sum(),
                        argnums=(0, 1))(old, jnp.ones((1, 2)))
    np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("advantage, fall, penalty", [(0, (2, -1), 1.0), (0, (1, -2), 0.0), (-1, (2, -1), 0.0),
                                                      (1, (0, 0), 0.0)])
def test_worked_example(advantage, fall, penalty):
    # Formula sheet of LLDS: lambda 2 / 2 for D = (2, -1); 0 where the sum fell, where A < 0, and before any move.
    mask = jnp.ones((1, 2), bool)
    weight = aggregate.token_mean(mask)

    def total(logp):
        credit = jnp.full((1, 2), float(advantage))
        return (weight * likelihood.displacement(logp, jnp.zeros((1, 2)), credit, mask)).sum()

    value, gradient = jax.value_and_grad(total)(-jnp.array([fall], jnp.float32))
    np.testing.assert_allclose(value, penalty)
    np.testing.assert_allclose(gradient, [[-0.5, 0.0]] if penalty else [[0.0, 0.0]])
