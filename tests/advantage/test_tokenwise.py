"""HAPO's token-level z-score and redistribution against loops over every token, and its formula sheet's numbers."""
import functools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.advantage import group, tokenwise
from tests import numeric

# Groups of 3, 4 and 1, interleaved; one sequence of the second has no token, and one group has none at all.
IDS = np.array([3, 0, 3, 0, 15, 0, 3, 0, 7, 7])
LENGTH = np.array([2, 4, 1, 0, 3, 1, 4, 2, 0, 0])
MASK = np.arange(5)[None, :] < LENGTH[:, None]
REWARD = numeric.normal(0, 10)
LOW, HIGH = 0.2, 0.3


def oracle_zscore(i, epsilon=1e-6, limit=5.0):
    if not LENGTH[i]:
        return 0.0
    peers = [j for j in range(10) if IDS[j] == IDS[i]]
    if len(peers) == 1:
        return REWARD[i]
    tokens = [float(REWARD[j]) for j in peers for _ in range(LENGTH[j])]
    mean, std = statistics.fmean(tokens), statistics.pstdev(tokens)
    if max(abs(r - mean) / (std + epsilon) for r in tokens) < limit:
        return (REWARD[i] - mean) / (std + epsilon)
    answers = [float(REWARD[j]) for j in peers]
    return (REWARD[i] - statistics.fmean(answers)) / (statistics.stdev(answers) + epsilon)


@pytest.mark.parametrize("options", [{}, {"epsilon": 0.3}, {"limit": 1.45}, {"limit": 0.0}], ids=str)
def test_zscore_against_loops(options):
    found = numeric.in_float64(functools.partial(tokenwise.zscore, **options), REWARD, IDS, MASK)
    np.testing.assert_allclose(found, [oracle_zscore(i, **options) for i in range(10)], rtol=1e-9, atol=1e-12)


def test_the_limit_divides_the_groups_of_this_batch():
    """So that the oracle above has met both sides of it."""
    fell_back = [oracle_zscore(i, limit=1.45) != oracle_zscore(i) for i in range(10)]
    assert any(fell_back) and [i for i in range(10) if LENGTH[i] and IDS[i] != 15 and not fell_back[i]]


def test_zscore_worked_example():
    # Formula sheet of HAPO: R = 1 with one token, R = 0 with three; by answers (ddof 1) it would be +-.7071.
    mask = jnp.array([[1, 0, 0], [1, 1, 1]], bool)
    reward, ids = jnp.array([1.0, 0.0]), jnp.zeros(2, int)
    np.testing.assert_allclose(tokenwise.zscore(reward, ids, mask), [1.73205, -0.57735], rtol=1e-5)
    np.testing.assert_allclose(tokenwise.zscore(reward, ids, mask, limit=0.0), [0.707106, -0.707106], rtol=1e-5)


def test_a_credit_of_five_deviations_falls_back_to_answers():
    """|A| of one right token among n wrong ones is sqrt(n)."""
    reward, ids = jnp.array([1.0, 0.0]), jnp.zeros(2, int)
    for others, by_answers in ((27, True), (26, True), (24, False)):
        mask = jnp.arange(27)[None, :] < jnp.array([[1], [others]])
        found = tokenwise.zscore(reward, ids, mask, epsilon=1e-9)
        assert bool(jnp.allclose(found, group.zscore(reward, ids, epsilon=1e-9), rtol=1e-5)) == by_answers


def test_the_mean_over_all_tokens_of_a_group_is_zero():
    credit = numeric.in_float64(tokenwise.zscore, REWARD, IDS, MASK)
    for g in (0, 3):
        np.testing.assert_allclose((credit * LENGTH)[IDS == g].sum(), 0.0, atol=1e-12)
        assert np.abs(credit[IDS == g]).max() > 0.1


def test_answers_of_one_length_give_the_zscore_with_ddof_0():
    mask = np.ones((10, 3), bool)
    plain = numeric.in_float64(functools.partial(group.zscore, ddof=0), REWARD, IDS)
    np.testing.assert_allclose(numeric.in_float64(tokenwise.zscore, REWARD, IDS, mask), plain, rtol=1e-9)


def test_with_limit_zero_it_is_the_zscore_by_answers():
    plain = numeric.in_float64(group.zscore, REWARD, IDS)
    found = numeric.in_float64(functools.partial(tokenwise.zscore, limit=0.0), REWARD, IDS, MASK)
    np.testing.assert_allclose(found, np.where(LENGTH > 0, plain, 0.0), rtol=1e-12)


@pytest.mark.parametrize("reward", [0.0, 0.1, 1.0 / 3.0, -7.7e3])
def test_equal_rewards_give_exactly_zero(reward):
    """Whatever a sequence without tokens was given."""
    credit = tokenwise.zscore(jnp.where(LENGTH > 0, reward, -1.0), jnp.asarray(IDS), jnp.asarray(MASK))
    np.testing.assert_array_equal(np.asarray(credit)[IDS != 15], 0.0)


def test_a_bad_number_stays_in_its_group():
    credit = tokenwise.zscore(jnp.asarray(REWARD).at[4].set(jnp.nan), jnp.asarray(IDS), jnp.asarray(MASK))
    assert np.isfinite(np.delete(credit, 4)).all()


def test_the_reward_of_a_sequence_without_tokens_is_not_read():
    found = numeric.in_float64(tokenwise.zscore, np.where(LENGTH > 0, REWARD, np.nan), IDS, MASK)
    np.testing.assert_array_equal(found, numeric.in_float64(tokenwise.zscore, REWARD, IDS, MASK))


def test_rewards_are_constants():
    gradient = jax.grad(lambda r: tokenwise.zscore(r, jnp.asarray(IDS), jnp.asarray(MASK)).sum())(jnp.asarray(REWARD))
    np.testing.assert_array_equal(gradient, 0.0)


A, R, H = numeric.normal(1, 4, 6), np.exp(0.15 * numeric.normal(2, 4, 6)), np.clip(numeric.normal(3, 4, 6), -1, 1)


def oracle_redistributed(a, r, h, low, high, strength):
    inside = 1 - low / 2 < r < 1 + high / 2
    moved = a * (1 + strength * h)
    if h > 0:
        return a if inside else moved
    return moved if inside else a


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_redistributed_against_loops(strength):
    bands = [LOW * np.exp(numeric.normal(seed, 4, 6) / 3) for seed in (4, 5)]
    found = numeric.in_float64(tokenwise.redistributed, A, R, H, *bands, strength)
    every = zip(*(a.flat for a in (A, R, H, *bands)), strict=True)
    expected = [oracle_redistributed(*one, strength) for one in every]
    np.testing.assert_allclose(found.ravel(), expected, rtol=1e-12)
    assert 0 < sum(not math.isclose(a, e) for a, e in zip(A.flat, expected, strict=True)) < A.size


@pytest.mark.parametrize("h, ratio, factor", [(0.5, 1.0, 1.0), (0.5, 1.2, 1.5), (0.5, 0.85, 1.5), (-0.5, 1.0, 0.5),
                                              (-0.5, 1.2, 1.0), (-0.5, 0.85, 1.0), (0.0, 1.0, 1.0)])
def test_unsure_tokens_gain_outside_of_the_zone_and_sure_ones_lose_inside(h, ratio, factor):
    full = functools.partial(jnp.full, (1, 1))
    found = tokenwise.redistributed(full(2.0), full(ratio), full(h), LOW, HIGH, 1.0)
    np.testing.assert_allclose(found, 2 * factor, rtol=1e-6)


def test_redistribution_switched_off_is_the_advantage():
    found = tokenwise.redistributed(*(jnp.asarray(a) for a in (A, R, H)), LOW, HIGH, 0.0)
    np.testing.assert_array_equal(found, jnp.asarray(A))


def test_redistribution_is_constant_the_ratio_included():
    inputs = [jnp.asarray(a, jnp.float32) for a in (A, R, H)]
    for values in jax.grad(lambda inputs: tokenwise.redistributed(*inputs, LOW, HIGH, 1.0).sum())(inputs):
        np.testing.assert_array_equal(values, 0.0)
