"""Baselines that do not depend on the answer."""
import jax
import jax.numpy as jnp
import numpy as np

from rl_jax.advantage import baseline

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
