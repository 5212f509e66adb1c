"""Ratios against math.exp, their clamps and gradients, and the formula sheets' numbers."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.loss import ratio
from tests import numeric

LOGP, OLD = -np.abs(numeric.normal(0, 3, 4)), -np.abs(numeric.normal(1, 3, 4))
# A row with a hole, an empty one, a full one; what is not chosen is NaN where no gradient is compared with differences.
MASK = np.array([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]], bool)
HIDDEN, HIDDEN_OLD = np.where(MASK, LOGP, np.nan), np.where(MASK, OLD, np.nan)
ADVANTAGE = np.array([[1.5], [1.0], [-0.5]]) * np.ones((3, 4))
LOW, HIGH = 0.3, 0.4


def test_against_loops():
    expected = [[math.exp(a - b) for a, b in zip(*rows, strict=True)] for rows in zip(LOGP, OLD, strict=True)]
    np.testing.assert_allclose(numeric.in_float64(ratio.per_token, LOGP, OLD), expected, rtol=1e-12)


def test_clamped_at_20_nats_and_without_gradient_beyond():
    logp = jnp.array([[100.0, -100.0, 19.0]])
    value = ratio.per_token(logp, jnp.zeros((1, 3)))
    np.testing.assert_allclose(value, [[math.exp(20), math.exp(-20), math.exp(19)]], rtol=1e-5)
    gradient = jax.grad(lambda x: ratio.per_token(x, jnp.zeros((1, 3))).sum())(logp)
    np.testing.assert_allclose(gradient, [[0.0, 0.0, math.exp(19)]], rtol=1e-5)


def test_gradient_against_differences_and_none_to_the_old_policy():
    def function(logp):
        return ratio.per_token(logp, jnp.asarray(OLD))

    np.testing.assert_allclose(numeric.gradient(function, LOGP), numeric.central_difference(function, LOGP), rtol=1e-6)
    old = jax.grad(lambda old: ratio.per_token(jnp.zeros((3, 4)), old).sum())(jnp.asarray(OLD, jnp.float32))
    np.testing.assert_array_equal(old, 0.0)


def tokens(i):
    return [t for t in range(4) if MASK[i, t]]


def oracle_sequence(i):
    away = [float(LOGP[i, t]) - float(OLD[i, t]) for t in tokens(i)]
    return math.exp(sum(away) / max(len(away), 1))


def oracle_geometric(i):
    sign = math.copysign(1.0, ADVANTAGE[i, 0])
    total = 0.0
    for t in tokens(i):
        away = float(LOGP[i, t]) - float(OLD[i, t])
        total += sign * min(sign * away, sign * min(max(away, -LOW), HIGH))
    return math.exp(total / max(len(tokens(i)), 1))


def per_sequence(logp, old):
    return ratio.per_sequence(logp, old, jnp.asarray(MASK))


def per_sequence_token(logp, old):
    return ratio.per_sequence_token(logp, old, jnp.asarray(MASK))


def geometric(logp, old):
    return ratio.clipped_geometric_mean(logp, old, jnp.asarray(ADVANTAGE), jnp.asarray(MASK), LOW, HIGH)


OF_SEQUENCES = [(per_sequence, oracle_sequence), (per_sequence_token, oracle_sequence), (geometric, oracle_geometric)]


@pytest.mark.parametrize("function, oracle", OF_SEQUENCES)
def test_of_a_sequence_against_loops(function, oracle):
    found = numeric.in_float64(function, HIDDEN, HIDDEN_OLD)
    np.testing.assert_allclose(found, [[oracle(i)] * 4 for i in range(3)], rtol=1e-12)


@pytest.mark.parametrize("function", [per_sequence, geometric])
def test_gradient_of_a_sequence_against_differences(function):
    weight = numeric.normal(2, 3, 4)

    def weighted(logp):
        return function(logp, jnp.asarray(OLD)) * weight

    np.testing.assert_allclose(numeric.gradient(weighted, LOGP), numeric.central_difference(weighted, LOGP), rtol=1e-6,
                               atol=1e-9)


def test_in_its_token_form_each_token_moves_its_own_ratio_only():
    # d s_it / d logp_it = s_i; differences would also move what is constant.
    weight = numeric.normal(2, 3, 4)
    found = numeric.gradient(lambda logp: per_sequence_token(logp, jnp.asarray(OLD)) * weight, LOGP)
    expected = [[weight[i, t] * oracle_sequence(i) if MASK[i, t] else 0.0 for t in range(4)] for i in range(3)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("function, _", OF_SEQUENCES)
def test_hidden_tokens_and_the_old_policy_get_no_gradient(function, _):
    gradients = jax.grad(lambda *a: jnp.where(MASK, function(*a), 0.0).sum(), (0, 1))(
        jnp.asarray(HIDDEN, jnp.float32), jnp.asarray(HIDDEN_OLD, jnp.float32))
    assert np.isfinite(gradients[0]).all() and (np.asarray(gradients[0])[~MASK] == 0).all()
    np.testing.assert_array_equal(gradients[1], 0.0)


@pytest.mark.parametrize("function", [ratio.per_sequence, ratio.per_sequence_token])
@pytest.mark.parametrize("nats, value, slope", [(100.0, math.exp(10), 0), (11.0, math.exp(10), 0),
                                                (-100.0, math.exp(-20), 0), (9.0, math.exp(9), math.exp(9))])
def test_the_log_of_a_sequences_ratio_is_clipped(function, nats, value, slope):
    # Formula sheets, section 0: log s within [-20, 10].
    def total(logp):
        return function(logp, jnp.zeros((1, 2)), jnp.ones((1, 2), bool))

    logp = jnp.full((1, 2), nats)
    np.testing.assert_allclose(total(logp), jnp.full((1, 2), value), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(lambda logp: total(logp).mean())(logp), jnp.full((1, 2), slope / 2), rtol=1e-5)


def test_gspo_worked_example():
    # Formula sheet of GSPO: d = (.6, -.2). The product of the ratios would be 1.4918, their mean 1.3204.
    logp, mask = jnp.array([[0.6, -0.2]]), jnp.ones((1, 2), bool)
    for function in (ratio.per_sequence, ratio.per_sequence_token):
        found, slope = jax.value_and_grad(lambda logp, f=function: f(logp, jnp.zeros((1, 2)), mask).mean())(logp)
        np.testing.assert_allclose(found, 1.2214, rtol=1e-4)
        np.testing.assert_allclose(slope, [[1.2214 / 2] * 2], rtol=1e-4)


@pytest.mark.parametrize("advantage, expected", [(1.0, 1.10517), (-1.0, 1.22140)])
def test_gmpo_worked_example(advantage, expected):
    # Formula sheet of GMPO: d = (.6, -.2), both bounds .4.
    found = ratio.clipped_geometric_mean(jnp.array([[0.6, -0.2]]), jnp.zeros((1, 2)), jnp.full((1, 2), advantage),
                                         jnp.ones((1, 2), bool), 0.4, 0.4)
    np.testing.assert_allclose(found, [[expected] * 2], rtol=1e-5)
