"""Clipped objectives against loops over Python floats, their gradients, and the formula sheets' numbers."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.loss import gate
from tests import numeric

RATIO = np.exp(numeric.normal(0, 4, 5))
ADVANTAGE = numeric.normal(1, 4, 5)
LOW, HIGH, CEILING = 0.2, 0.28, 3.0


def oracle_ppo(r, a):
    clipped = min(max(r, 1 - LOW), 1 + HIGH)
    return -min(r * a, clipped * a)


def oracle_dual(r, a):
    return min(oracle_ppo(r, a), -CEILING * a) if a < 0 else oracle_ppo(r, a)


CASES = [(functools.partial(gate.ppo_clip, low=LOW, high=HIGH), oracle_ppo),
         (functools.partial(gate.dual_clip, low=LOW, high=HIGH, ceiling=CEILING), oracle_dual)]


@pytest.mark.parametrize("function, oracle", CASES)
def test_against_loops(function, oracle):
    found = numeric.in_float64(function, RATIO, ADVANTAGE)
    expected = [oracle(r, a) for r, a in zip(RATIO.flat, ADVANTAGE.flat, strict=True)]
    np.testing.assert_allclose(found.ravel(), expected, rtol=1e-12)


@pytest.mark.parametrize("function, oracle", CASES)
def test_gradient_in_the_ratio_only(function, oracle):
    def of_ratio(ratio):
        return function(ratio, jnp.asarray(ADVANTAGE))

    np.testing.assert_allclose(numeric.gradient(of_ratio, RATIO), numeric.central_difference(of_ratio, RATIO),
                               rtol=1e-6, atol=1e-9)
    credit = jax.grad(lambda a: function(jnp.asarray(RATIO, jnp.float32), a).sum())(jnp.asarray(ADVANTAGE, jnp.float32))
    np.testing.assert_array_equal(credit, 0.0)


@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_the_whole_gradient_at_ratio_one(advantage):
    gradient = jax.grad(lambda r: gate.ppo_clip(r, jnp.full((1, 1), advantage), LOW, HIGH).sum())(jnp.ones((1, 1)))
    np.testing.assert_allclose(gradient, -advantage)


@pytest.mark.parametrize("ratio, advantage, loss", [(5, -1, 3), (1.5, -1, 1.5), (0.5, -1, 0.8), (1.5, 1, -1.2)])
def test_dual_clip_worked_example(ratio, advantage, loss):
    # Formula sheet of PPO: band .2, c = 3.
    found = gate.dual_clip(jnp.full((1, 1), float(ratio)), jnp.full((1, 1), float(advantage)), 0.2, 0.2, 3.0)
    np.testing.assert_allclose(found, loss, rtol=1e-6)


@pytest.mark.parametrize("ratio, advantage, high, slope", [(1.25, 1, 0.28, 1.25), (1.25, 1, 0.2, 0),
                                                           (0.75, -1, 0.28, 0)])
def test_decoupled_band_worked_example(ratio, advantage, high, slope):
    # Formula sheet of DAPO: gradient in the log-probability, which is r times that in r.
    gradient = jax.grad(lambda r: -gate.ppo_clip(r, jnp.full((1, 1), float(advantage)), 0.2, high).sum())(
        jnp.full((1, 1), ratio))
    np.testing.assert_allclose(ratio * gradient, slope, rtol=1e-6)


def test_the_band_may_be_traced_or_differ_per_token():
    ratio, advantage = jnp.full((1, 2), 1.5), jnp.ones((1, 2))
    np.testing.assert_allclose(jax.jit(gate.ppo_clip)(ratio, advantage, 0.2, jnp.float32(0.3)), -1.3, rtol=1e-6)
    np.testing.assert_allclose(gate.ppo_clip(ratio, advantage, 0.2, jnp.array([[0.1, 0.9]])), [[-1.1, -1.5]], rtol=1e-6)
