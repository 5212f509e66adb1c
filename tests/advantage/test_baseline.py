"""Baselines that do not depend on the answer."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.advantage import baseline, group
from tests import numeric

REWARD = jnp.array([1.0, 0.0, 0.5, jnp.nan])
COUNTED = jnp.array([True, True, True, False])


def test_constant():
    np.testing.assert_allclose(baseline.constant(REWARD[:3], 0.25), [0.75, -0.25, 0.25])
    np.testing.assert_allclose(baseline.constant(REWARD[:3], jnp.float32(0.25)), [0.75, -0.25, 0.25])


def test_batch_mean_counts_only_what_has_a_reward():
    np.testing.assert_allclose(baseline.batch_mean(REWARD, COUNTED), [0.5, -0.5, 0.0, 0.0])
    np.testing.assert_array_equal(baseline.batch_mean(REWARD, jnp.zeros(4, bool)), 0.0)


def test_rewards_are_constants():
    for function in (lambda r: baseline.constant(r, 0.1), lambda r: baseline.batch_mean(r, COUNTED)):
        np.testing.assert_array_equal(jax.grad(lambda r: function(r)[:3].sum())(REWARD), 0.0)


def test_whitened_against_loops():
    mask = np.array([[1, 0, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]], bool)
    credit = [0.7, np.nan, -1.2]
    tokens = [credit[i] for i in range(3) for t in range(4) if mask[i, t]]
    mean = sum(tokens) / len(tokens)
    std = (sum((a - mean) ** 2 for a in tokens) / (len(tokens) - 1) + 1e-8) ** 0.5
    expected = [[(credit[i] - mean) / std if mask[i, t] else 0.0 for t in range(4)] for i in range(3)]
    np.testing.assert_allclose(numeric.in_float64(baseline.whitened, np.array(credit), mask), expected, rtol=1e-12)
    slope = jax.grad(lambda a: (baseline.whitened(a, jnp.asarray(mask)) ** 3).sum())(jnp.array([0.7, 0.0, -1.2]))
    np.testing.assert_array_equal(slope, 0.0)


def test_whitened_worked_example():
    # Formula sheet of REINFORCE++, baseline variant: groups (1, 0) and (5, 5), one token each.
    centred = group.centred(jnp.array([1.0, 0.0, 5.0, 5.0]), jnp.array([0, 0, 1, 1]))
    found = baseline.whitened(centred, jnp.ones((4, 1), bool))
    np.testing.assert_allclose(found[:, 0], [1.2247, -1.2247, 0, 0], atol=1e-4)


@pytest.mark.parametrize("n", [1, 3])
def test_whitened_with_equal_lengths(n):
    # Formula sheet of REINFORCE++: A = x / sqrt(n sum x^2 / (N n - 1)), the sequences' own std only for n = 1.
    x = np.array([0.5, -0.5, 1.5, -1.5])
    found = numeric.in_float64(baseline.whitened, x, np.ones((4, n), bool))
    expected = x / (n * (x**2).sum() / (4 * n - 1)) ** 0.5
    np.testing.assert_allclose(found, np.repeat(expected[:, None], n, axis=1), rtol=1e-6)
    longer = (4 * n - 1) / (n * 3)
    np.testing.assert_allclose(found[:, 0], x / x.std(ddof=1) * longer**0.5, rtol=1e-6)


def test_whitened_of_a_batch_without_contrast_is_zero():
    np.testing.assert_array_equal(baseline.whitened(jnp.ones(4), jnp.ones((4, 3), bool)), 0.0)
