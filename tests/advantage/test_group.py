"""Group statistics against loops over Python floats; degenerate groups; worked examples of the formula sheets."""
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.advantage import group
from tests import numeric

# Three groups of 3, 4 and 1, interleaved, with ids anywhere in [0, 2N).
IDS = np.array([3, 0, 3, 0, 15, 0, 3, 0])
REWARD = numeric.normal(0, 8)


def peers(i):
    return [float(r) for r, g in zip(REWARD, IDS, strict=True) if g == IDS[i]]


def oracle_mean(i):
    return sum(peers(i)) / len(peers(i))


def oracle_std(i, ddof):
    of = peers(i)
    if len(of) <= ddof:
        return 0.0
    return math.sqrt(sum((r - oracle_mean(i)) ** 2 for r in of) / (len(of) - ddof))


def oracle_centred(i):
    return REWARD[i] if len(peers(i)) == 1 else REWARD[i] - oracle_mean(i)


def oracle_zscore(i, ddof, epsilon):
    return REWARD[i] if len(peers(i)) == 1 else oracle_centred(i) / (oracle_std(i, ddof) + epsilon)


def oracle_leave_one_out(i):
    others = [float(REWARD[j]) for j in range(8) if IDS[j] == IDS[i] and j != i]
    return REWARD[i] - sum(others) / len(others) if others else REWARD[i]


CASES = [
    (group.size, None, lambda i: len(peers(i))),
    (group.mean, {}, oracle_mean),
    (group.std, {"ddof": 1}, lambda i: oracle_std(i, 1)),
    (group.std, {"ddof": 0}, lambda i: oracle_std(i, 0)),
    (group.centred, {}, oracle_centred),
    (group.zscore, {"ddof": 1, "epsilon": 1e-6}, lambda i: oracle_zscore(i, 1, 1e-6)),
    (group.zscore, {"ddof": 0, "epsilon": 1e-2}, lambda i: oracle_zscore(i, 0, 1e-2)),
    (group.leave_one_out, {}, oracle_leave_one_out),
]
CREDITS = [group.centred, group.zscore, group.leave_one_out]


@pytest.mark.parametrize("function, options, oracle", CASES)
def test_against_loops(function, options, oracle):
    arguments = (IDS,) if options is None else (REWARD, IDS)
    found = numeric.in_float64(functools.partial(function, **options or {}), *arguments)
    np.testing.assert_allclose(found, [oracle(i) for i in range(8)], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("function", [group.mean, group.std, *CREDITS])
def test_order_and_numbering_change_nothing(function):
    order = np.random.default_rng(1).permutation(8)
    renamed = np.array([7, 1, 2, 12, 4, 5, 6, 3, 8, 9, 10, 11, 0, 13, 14, 15])[IDS]
    straight = numeric.in_float64(function, REWARD, IDS)
    np.testing.assert_allclose(numeric.in_float64(function, REWARD[order], renamed[order]), straight[order],
                               rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("function", CREDITS)
@pytest.mark.parametrize("reward", [0.0, 0.1, 1.0 / 3.0, -7.7e3, 1e-20])
def test_equal_rewards_give_exactly_zero(function, reward):
    ids = jnp.array([0, 0, 0, 0, 0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(function(jnp.full(10, reward), ids), 0.0)


@pytest.mark.parametrize("function", CREDITS)
def test_a_sequence_alone_keeps_its_reward(function):
    np.testing.assert_array_equal(function(jnp.array([0.7, 1.0, 0.0]), jnp.array([5, 0, 0]))[0], jnp.float32(0.7))


@pytest.mark.parametrize("function", CREDITS)
def test_a_bad_number_stays_in_its_group(function):
    credit = function(jnp.array([jnp.nan, 1.0, 0.0]), jnp.array([5, 0, 0]))
    assert np.isfinite(credit[1:]).all()


@pytest.mark.parametrize("function", [group.mean, group.std, *CREDITS])
def test_rewards_are_constants(function):
    gradient = jax.grad(lambda r: function(r, jnp.asarray(IDS)).sum())(jnp.asarray(REWARD, jnp.float32))
    np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("function, expected", [
    (functools.partial(group.zscore, epsilon=0.0), [1.5, -0.5, -0.5, -0.5]),
    (functools.partial(group.zscore, epsilon=0.0, ddof=0), [3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)]),
    (group.leave_one_out, [1, -1 / 3, -1 / 3, -1 / 3]),
    (group.centred, [0.75, -0.25, -0.25, -0.25])])
def test_worked_examples(function, expected):
    # Formula sheets of GRPO and RLOO: R = (1, 0, 0, 0).
    found = function(jnp.array([1.0, 0, 0, 0]), jnp.zeros(4, int))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
