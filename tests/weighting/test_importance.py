"""Importance weights against loops over Python floats, their degenerate cases, and the formula sheets' numbers."""
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.loss import gate
from rl_jax.weighting import importance
from tests import numeric

MASK = np.array([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]], bool)
# Padding holds NaN: what was not chosen is never read.
OLD, ROLLOUT = (np.where(MASK, -np.abs(numeric.normal(seed, 4, 5)), np.nan) for seed in (0, 1))
WEIGHT = np.where(MASK, np.exp(numeric.normal(2, 4, 5)), 0.0)
ROWS, PLACES = range(4), [(i, t) for i in range(4) for t in range(5)]


def deltas(i):
    return [float(OLD[i, t] - ROLLOUT[i, t]) for t in range(5) if MASK[i, t]]


def oracle_token(i, t):
    return math.exp(OLD[i, t] - ROLLOUT[i, t])


def oracle_sequence(i, t):
    return math.exp(sum(deltas(i)))


def oracle_geometric(i, t):
    return math.exp(sum(deltas(i)) / len(deltas(i)))


def expected(oracle):
    return np.array([oracle(i, t) if MASK[i, t] else 0.0 for i, t in PLACES]).reshape(4, 5)


LEVELS = [(importance.per_token, oracle_token), (importance.per_sequence, oracle_sequence),
          (importance.geometric_mean, oracle_geometric)]


@pytest.mark.parametrize("function, oracle", LEVELS)
def test_levels_against_loops(function, oracle):
    np.testing.assert_allclose(numeric.in_float64(function, OLD, ROLLOUT, MASK), expected(oracle), rtol=1e-12)


@pytest.mark.parametrize("function", [function for function, _ in LEVELS])
def test_levels_reduce_to_ones_clamp_and_are_constants(function):
    same = jnp.asarray(np.nan_to_num(OLD), jnp.float32)
    np.testing.assert_array_equal(function(same, same, jnp.asarray(MASK)), MASK.astype(float))
    far = function(same + 1e30, same, jnp.asarray(MASK))
    np.testing.assert_allclose(far, np.where(MASK, math.exp(20), 0.0), rtol=1e-6)
    gradient = jax.grad(lambda a, b: function(a, b, jnp.asarray(MASK)).sum(), argnums=(0, 1))(same, same)
    np.testing.assert_array_equal(gradient, 0.0)


def token_mean(i, t):
    chosen = [WEIGHT[i, t] for i, t in PLACES if MASK[i, t]]
    return WEIGHT[i, t] / (sum(chosen) / len(chosen))


def sequence_mean(i, t):
    rows = [[WEIGHT[i, t] for t in range(5) if MASK[i, t]] for i in ROWS]
    means = [sum(row) / len(row) for row in rows if row]
    return WEIGHT[i, t] / (sum(means) / len(means))


@pytest.mark.parametrize("function, oracle", [
    (lambda w, mask: importance.truncated(w, 1.5), lambda i, t: min(WEIGHT[i, t], 1.5)),
    (lambda w, mask: importance.clamped(w, mask, 0.5, 1.5), lambda i, t: min(max(WEIGHT[i, t], 0.5), 1.5)),
    (lambda w, mask: importance.within(w, 0.5, 1.5), lambda i, t: WEIGHT[i, t] if 0.5 <= WEIGHT[i, t] <= 1.5 else 0.0),
    (importance.normalised_per_token, token_mean), (importance.normalised_per_sequence, sequence_mean)])
def test_bounds_and_normalisation_against_loops(function, oracle):
    np.testing.assert_allclose(numeric.in_float64(function, WEIGHT, MASK), expected(oracle), rtol=1e-12)
    gradient = jax.grad(lambda w: function(w, jnp.asarray(MASK)).sum())(jnp.asarray(WEIGHT, jnp.float32))
    np.testing.assert_array_equal(gradient, 0.0)


def test_normalised_weights_have_mean_one_and_all_rejected_stays_zero():
    mask = jnp.asarray(MASK)
    weight = importance.per_sequence(jnp.asarray(OLD, jnp.float32), jnp.asarray(ROLLOUT, jnp.float32), mask)
    rows = importance.normalised_per_sequence(weight, mask)[jnp.array([0, 1, 3]), jnp.array([0, 1, 0])]
    np.testing.assert_allclose(rows.mean(), 1.0, rtol=1e-6)
    for function in (importance.normalised_per_token, importance.normalised_per_sequence):
        np.testing.assert_array_equal(function(jnp.zeros((4, 5)), mask), 0.0)


def test_worked_example():
    # Formula sheet of TIS and MIS: delta = (1, -1), C = 2.
    delta, zero, mask = jnp.array([[1.0, -1.0]]), jnp.zeros((1, 2)), jnp.ones((1, 2), bool)
    weight = importance.per_token(delta, zero, mask)
    np.testing.assert_allclose(weight, [[2.71828, 0.36788]], rtol=1e-5)
    np.testing.assert_allclose(importance.truncated(weight, 2.0), [[2.0, 0.36788]], rtol=1e-5)
    np.testing.assert_allclose(importance.per_sequence(delta, zero, mask), [[1.0, 1.0]])
    np.testing.assert_allclose(importance.within(weight, 0.0, 2.0), [[0.0, 0.36788]], rtol=1e-5)


@pytest.mark.parametrize("advantage, away, kept", [(-1.0, 0.6, False), (-1.0, 0.4, True), (1.0, 0.6, True),
                                                   (0.0, 0.6, True), (-1.0, -0.6, True)])
def test_bad_answers_that_the_policy_left_are_dropped(advantage, away, kept):
    # Formula sheet of TIS and MIS, DeepSeek-V3.2: dropped iff A < 0 and mean(old - now) > 0.5.
    old = jnp.array([[-1.0, -1.0, jnp.nan]])
    now = old - jnp.array([[2 * away, 0.0, 1.0]])
    mask = jnp.array([[True, True, False]])
    found = importance.off_policy_mask(now, old, jnp.full((1, 3), advantage), mask, 0.5)
    np.testing.assert_array_equal(found, [[kept, kept, False]])


RATIO, ADVANTAGE = np.exp(numeric.normal(3, 4, 5) / 3), numeric.normal(4, 4, 5)


def test_gated_advantage_is_the_clips_gradient_and_a_constant():
    found = numeric.in_float64(functools.partial(importance.gated_advantage, low=0.2, high=0.27), RATIO, ADVANTAGE)
    for r, a, value in zip(RATIO.flat, ADVANTAGE.flat, found.flat, strict=True):
        gone = (a > 0 and r > 1.27) or (a < 0 and r < 0.8)
        assert value == pytest.approx(0.0 if gone else r * a, rel=1e-12, abs=0)
    assert 0 < (found == 0).sum() < 20
    clip = numeric.gradient(lambda r: -gate.ppo_clip(r, jnp.asarray(ADVANTAGE), 0.2, 0.27), RATIO)
    np.testing.assert_allclose(found, RATIO * clip, rtol=1e-12)
    gradient = jax.grad(lambda r: importance.gated_advantage(r, jnp.ones((1, 2)), 0.2, 0.27).sum())(jnp.ones((1, 2)))
    np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("ratio, advantage, slope", [(1.3, 1, 0), (1.3, -1, -1.3), (0.7, 1, 0.7), (0.7, -1, 0)])
def test_gated_advantage_worked_example(ratio, advantage, slope):
    # Formula sheet of MiniRL: the gradient of the objective in log p, band (.2, .27).
    found = importance.gated_advantage(jnp.full((1, 1), ratio), jnp.full((1, 1), float(advantage)), 0.2, 0.27)
    np.testing.assert_allclose(found, slope, rtol=1e-6)
